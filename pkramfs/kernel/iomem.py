# SPDX-License-Identifier: GPL-2.0-or-later
"""The resource map of a booted machine, as /proc/iomem has it.

    00100000-bfffffff : System RAM
      01000000-01ffffff : Kernel image
      02000000-021fffff : shmem-mytmpfs
    c0000000-ffffffff : Reserved

Boot writes the map as it finds it into the file `iomem`; `current` also has the trees that were saved
since, and not those that were withdrawn.

Kernel: kernel/resource.c, arch/x86/kernel/e820.c (e820__reserve_resources)
"""

from collections.abc import Iterable

from pkramfs.kernel import incoming
from pkramfs.kernel.running import Running
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.spans import Spans
from pkramfs.text import printable
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

_KINDS = {"usable": "System RAM", "reserved": "Reserved", "acpi": "ACPI Tables"}
_MOST_LINES = 512
"""Lines for one owner; a tree in a hundred thousand pieces is summed up."""


def current(kernel: Running) -> str:
    """Return the map of a running kernel: its record, and the nodes that are listed now."""
    owners = [(name, Spans([part])) for name, part in kernel.info.reserved.items()]
    if kernel.info.pkram:
        owners += [(node.name, node.spans) for node in incoming.nodes(kernel.ram, kernel.info.super_pfn)]
    return render(kernel.machine.hardware(), owners)


def render(hardware: FirmwareMap, owners: Iterable[tuple[str, Spans]]) -> str:
    """Draw the map: firmware ranges, and inside RAM the ranges of `owners` (spans in pages)."""
    width = max(8, len(f"{hardware.size - 1:x}"))
    inner = sorted(line for owner, spans in owners for line in _pieces(owner, spans))
    lines, at = [], 0
    for start, end, kind in hardware.entries:
        lines.append(f"{start:0{width}x}-{end - 1:0{width}x} : {printable(_KINDS.get(kind, kind))}")
        while at < len(inner) and inner[at][0] < end:
            first, last, owner = inner[at]
            lines.append(f"  {first:0{width}x}-{last:0{width}x} : {printable(owner)}")
            at += 1
    return "\n".join(lines) + "\n"


def _pieces(owner: str, spans: Spans) -> Iterable[tuple[int, int, str]]:
    if len(spans) > _MOST_LINES:
        start, end = int(spans.starts[0]), int(spans.ends[-1])
        text = f"{owner} ({len(spans)} ranges, {spans.total} pages)"
        return [(start << PAGE_SHIFT, end * PAGE_SIZE - 1, text)]
    return [(start << PAGE_SHIFT, end * PAGE_SIZE - 1, owner) for start, end in spans]
