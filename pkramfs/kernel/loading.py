# SPDX-License-Identifier: GPL-2.0-or-later
"""Loading a kernel: from files to segments with destinations that hold no preserved page.

    -s  kexec_file_load   we choose: between preserved ranges, off the running kernel, from the top
                          down; free page blocks first, so that nothing need be relocated later
    -c  kexec_load        you choose (--mem-min, --mem-max, --segment FILE@ADDR); a conflict is
                          EADDRNOTAVAIL and lists the ranges and whose they are
    -p  crash kernel      into crashkernel=, copied at once, because a crash leaves no time

Loading again replaces; unloading removes. A command line that would lose preserved nodes is a warning
here and a refusal at -e, because a tree may be preserved after loading.

Kernel: kernel/kexec_file.c (kexec_locate_mem_hole), kernel/kexec.c (do_kexec_load), patches 16 to 18
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pkramfs.errors import ConflictError, ExhaustedError, MachineError, UsageError, explain
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import incoming, placement, running, staging
from pkramfs.kernel.image import Image, load_image, setup_header
from pkramfs.kernel.incoming import IncomingNode
from pkramfs.kernel.kernelrecord import LAYOUT
from pkramfs.kernel.nvram import ImageInfo
from pkramfs.kernel.running import Running
from pkramfs.kernel.segments import Segment, check_destinations, destinations, place_all
from pkramfs.kernel.staging import CRASH_JSON, CRASH_MODE, FILE_MODE, LOAD_MODE, Loaded, Stage
from pkramfs.machine.directory import Machine
from pkramfs.machine.files import open_regular
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE, format_pfn, format_size, plural

UserSegment = tuple[str, int]
"""A file and the address at which the user wants it."""
_MOST_NAMED = 10
"""Nodes that one line names."""


@dataclass(frozen=True)
class Request:
    """A kernel to be loaded, as pkram-kexec's command line describes it. Addresses in bytes."""

    image: str
    initrd: str | None = None
    append: str | None = None
    reuse_cmdline: bool = False
    syscall: str = "file"
    mem_min: int = 0
    mem_max: int | None = None
    segments: Sequence[UserSegment] = ()


@dataclass(frozen=True)
class LoadResult:
    """The loaded kernel, and warnings for its user."""

    loaded: Loaded
    warnings: list[str] = field(default_factory=list)


def load(machine: Machine, request: Request, *, panic: bool = False) -> LoadResult:
    """Load a kernel for the next -e, or as crash kernel. Takes the machine lock."""
    image = load_image(request.image)
    _check_files(request)
    with running.exclusively(machine) as kernel, Stage(machine) as stage:
        refuse_crash(kernel)
        cmdline = compose_cmdline(kernel, request)
        segments = _stage(stage, image, request, cmdline)
        nodes = preserved_nodes(kernel)
        room = _crash_range(kernel) if panic else None
        placed = _place_in(room, segments) if room else _place(kernel, segments, nodes, request)
        mode = CRASH_MODE if panic else FILE_MODE if request.syscall == "file" else LOAD_MODE
        loaded = Loaded(mode, ImageInfo.of(image), cmdline, stage.seal(placed, setup_header(image)))
        if panic:
            _load_crash(kernel, loaded)
            return LoadResult(loaded)
        staging.write(machine, loaded)
        return LoadResult(loaded, _warnings(kernel, loaded, nodes))


def refuse_crash(kernel: Running) -> None:
    """Raise MachineError in a crash kernel: it looks at the dead one and kexecs nothing."""
    if kernel.info.crash:
        raise MachineError("a crash kernel is running: leave it with pkram-kexec --cold")


def unload(machine: Machine, *, panic: bool = False) -> bool:
    """Forget the loaded kernel, and return True if there was one. Takes the machine lock."""
    with running.exclusively(machine):
        return staging.remove(machine, CRASH_JSON if panic else staging.KEXEC_JSON)


def compose_cmdline(kernel: Running, request: Request) -> str:
    """Compose the next kernel's command line: the running one with the current pkram=, then the appended words."""
    cmdline = ""
    if request.reuse_cmdline:
        pfn = format_pfn(kernel.info.super_pfn)
        cmdline = words.put(kernel.cmdline, "pkram", pfn if kernel.info.pkram else words.PKRAM_OFF)
    if request.append:
        cmdline = words.join(cmdline, request.append) if cmdline else request.append.strip()
    words.validate(cmdline)
    return cmdline


def _stage(stage: Stage, image: Image, request: Request, cmdline: str) -> list[Segment]:
    """Stage every segment's bytes; those that the user placed have their pfn."""
    stage.check_room(image.size + sum(_file_size(path) for path in (request.initrd, *dict(request.segments)) if path))
    segments = [stage.kernel(image)]
    if request.initrd:
        segments.append(stage.copy("initrd", request.initrd))
    segments.append(stage.data("cmdline", cmdline.encode("utf-8", "surrogateescape") + b"\0"))
    for number, (path, address) in enumerate(request.segments):
        if address % PAGE_SIZE or not address:
            raise UsageError(f"--segment {path}@{address:#x}: the address must be a multiple of {PAGE_SIZE}, and not 0")
        segments.append(stage.copy(f"segment{number}", path, address >> PAGE_SHIFT))
    return segments + stage.reserve(len(segments) + 1)


def _check_files(request: Request) -> None:
    """Raise UsageError unless every file can be read; asked before we take the machine lock."""
    files = [("initrd", request.initrd)] if request.initrd else []
    for name, path in [*files, *(("segment", path) for path, _ in request.segments)]:
        try:
            os.close(open_regular(path, follow=True))
        except OSError as error:
            raise UsageError(f"cannot load the {name} from {explain(error)}") from None


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # opening the file reports the error


def _place(kernel: Running, segments: list[Segment], nodes: list[IncomingNode], request: Request) -> list[Segment]:
    usable = kernel.machine.hardware().usable
    limits = usable.clip(request.mem_min >> PAGE_SHIFT, (request.mem_max or 1 << 62) >> PAGE_SHIFT)
    owned = owners(kernel, nodes)
    remedy = "choose other addresses, or load with -s, which finds them"
    if request.syscall == "file":
        remedy = f"{request.image} cannot run anywhere else"
        placed = place_all(segments, [room & limits for room in _rooms(kernel, owned)], remedy=_remedy(kernel))
    else:
        # userspace knows the running kernel from /proc/iomem, but no preserved pages
        wider = "widen --mem-min and --mem-max, or load less"
        placed = place_all(segments, [limits - kernel.info.own_pages], top_down=False, remedy=wider)
    check_destinations(placed, usable, owned, remedy)
    return placed


def _place_in(room: Spans, segments: list[Segment]) -> list[Segment]:
    """Place segments in the crash kernel's window and nowhere else: they are copied there at once."""
    placed = place_all(segments, [room], remedy="boot with a larger crashkernel=, or load less")
    check_destinations(placed, room, {}, "a crash kernel must be relocatable, or crashkernel= be where it runs")
    return placed


def preserved_nodes(kernel: Running) -> list[IncomingNode]:
    """Return the preserved nodes; none where PKRAM is switched off."""
    return incoming.nodes(kernel.ram, kernel.info.super_pfn) if kernel.info.pkram else []


def owners(kernel: Running, nodes: list[IncomingNode]) -> dict[str, Spans]:
    """Return the pages that must not be a destination, by the name of their owner."""
    found = {f"node {node.name}": node.spans for node in nodes}
    return found | {"the super block and region list": kernel.info.reserve_pages}


def _rooms(kernel: Running, owned: dict[str, Spans]) -> list[Spans]:
    """Return the room for segments, best first: free blocks, then all pages that are not preserved."""
    info, usable = kernel.info, kernel.machine.hardware().usable
    if scratch := info.reserved.get("Scratch"):
        return [Spans([scratch]) - Spans(part for name, part in info.reserved.items() if name != "Scratch")]
    preserved = placement.blocks_of(Spans.union(owned.values()))
    rest = usable - info.own_pages - preserved
    if info.layout != LAYOUT:
        return [rest]
    return [kernel.leases.taken().gaps(0, info.blocks).scale(BLOCK_PAGES) & rest, rest]


def _remedy(kernel: Running) -> str:
    """Return the remedy for when no place is left to choose."""
    if "Scratch" in kernel.info.reserved:
        return "boot with a larger scratch=, or load less"
    return "free preserved memory (pkramctl free), or load less"


def _crash_range(kernel: Running) -> Spans:
    crash = kernel.info.reserved.get("Crash kernel")
    if crash is None:
        raise MachineError("no memory is set aside for a crash kernel: boot with crashkernel=SIZE")
    return Spans([crash])


def _load_crash(kernel: Running, loaded: Loaded) -> None:
    """Copy a crash kernel into RAM at once, and drop its staged files."""
    staging.copy_into_ram(kernel.machine, kernel.ram, loaded.segments)
    in_ram = replace(loaded, segments=tuple(replace(s, file="") for s in loaded.segments))
    staging.write(kernel.machine, in_ram, CRASH_JSON)


def _warnings(kernel: Running, loaded: Loaded, nodes: list[IncomingNode]) -> list[str]:
    found = []
    if nodes and words.pkram_pfn(loaded.cmdline) != kernel.info.super_pfn:
        found.append(loss(nodes, loaded.cmdline, kernel.info.super_pfn))
    elif kernel.info.pkram and not words.pkram_off(loaded.cmdline) and (wrong := _wrong_pfn(kernel, loaded)):
        pfn = format_pfn(kernel.info.super_pfn)
        found.append(f"the command line {wrong}: to keep what will be preserved, append pkram={pfn}")
    return found


def _wrong_pfn(kernel: Running, loaded: Loaded) -> str:
    """Describe what the command line has instead of the super block's pfn; empty if it has that pfn."""
    if words.pkram_pfn(loaded.cmdline) == kernel.info.super_pfn:
        return ""
    said = words.get(loaded.cmdline, "pkram")
    return f"says pkram={said}" if said else "has no pkram="


def loss(nodes: list[IncomingNode], cmdline: str, super_pfn: int) -> str:
    """Describe the loss that a wrong command line would cause, and the remedy."""
    names = ", ".join([n.name for n in nodes[:_MOST_NAMED]] + ["…"] * (len(nodes) > _MOST_NAMED))
    size = format_size(sum(n.spans.total for n in nodes) * PAGE_SIZE)
    said = words.get(cmdline, "pkram")
    wrong = f"the loaded command line says pkram={said}, " if said else ""
    return f"{plural(len(nodes), 'node')} ({names}), {size} would be lost: {wrong}append pkram={format_pfn(super_pfn)}"


def blocking(loaded: Loaded, preserved: Spans) -> Spans:
    """Return the preserved pages that lie where the kernel will be copied."""
    return destinations(loaded.segments) & preserved


def conflict(lines: list[str]) -> ConflictError:
    """Return the error for a kernel whose destinations hold preserved pages."""
    return ConflictError(
        f"cannot assign requested address: the loaded kernel would overwrite preserved pages; {lines[0]}; "
        "load it elsewhere, or with -s",
        lines,
    )


def elsewhere(kernel: Running, loaded: Loaded, preserved: Spans) -> Loaded:
    """Return the same kernel with destinations clear of `preserved`; raise ExhaustedError if there is no room."""
    fixed = 0 if loaded.image.relocatable else loaded.image.preferred >> PAGE_SHIFT
    unplaced = [replace(s, pfn=fixed if s.name == "kernel" else 0) for s in loaded.segments]
    placed = place_all(unplaced, _rooms(kernel, {"": preserved}), remedy=_remedy(kernel))
    if destinations(placed) & preserved:
        raise ExhaustedError(f"{loaded.image.name} runs at {loaded.image.preferred:#x} only, where preserved pages are")
    return replace(loaded, segments=tuple(placed))


def restage(machine: Machine, loaded: Loaded) -> Loaded:
    """Write boot parameters and purgatory again for new destinations."""
    with Stage(machine) as stage:
        sealed = replace(loaded, segments=stage.seal(loaded.segments, staging.header_of(machine, loaded)))
        staging.write(machine, sealed)
    return sealed
