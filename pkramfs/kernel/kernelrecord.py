# SPDX-License-Identifier: GPL-2.0-or-later
"""kernel.json: the decisions of one boot, for all processes under this kernel.

The kernel is no process; it is this record and the tables in RAM that it points to. Boot writes the
record last, by rename: that is the moment at which the kernel is up. `layout` is the version of the
private tables (lease table, reserve blocks). Commands of another version refuse to touch them, and
kexec is the upgrade, because pkram/format.py alone declares what crosses it. The record authorises
punching memory, so it carries a checksum: a damaged kernel.json is refused.

    super_pfn, reserve_blocks    the super block and the blocks held back for its region list
    lease_table_pfn, blocks      the owners of page blocks
    reserved                     named page ranges that are the kernel's: image, tables, scratch …
    old_super_pfn, stale         data of the last kernel: consumed, then freed (succession.py)
    initmem                      pages that only boot needed: the loaded segments

Kernel: boot_params, /sys/kernel/pkram, the symbols _text … _end
"""

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pkramfs import __version__, schema
from pkramfs.errors import MachineError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import nvram
from pkramfs.machine.files import Sealed, sealed
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine

NAME = "kernel.json"
LAYOUT = 2
"""Version of everything private to a kernel: lease table, reserve blocks, kernel.json itself."""
_REMEDY = "put back a copy from this boot, or give up all memory: pkram-kexec --cold --force boots with it empty"

Range = tuple[int, int]


@dataclass(frozen=True)
class KernelInfo:
    """The running kernel. Ranges are [start, end) in pages."""

    generation: int
    kind: str
    image: str
    super_pfn: int
    lease_table_pfn: int
    blocks: int
    reserve_blocks: tuple[int, ...]
    reserved: dict[str, Range]
    old_super_pfn: int = 0
    stale: tuple[Range, ...] = ()
    initmem: tuple[Range, ...] = ()
    booted: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    layout: int = LAYOUT
    version: str = __version__
    boot_id: str = ""
    """The host's boot in which this kernel was booted, and with which it ends; empty in the simulation."""

    @property
    def pkram(self) -> bool:
        """Return True if PKRAM is on: a crash kernel has no super block, nor has a kernel with pkram=off."""
        return self.super_pfn != 0

    @property
    def crash(self) -> bool:
        """Return True if this is a crash kernel."""
        return self.kind == nvram.CRASH

    @property
    def reserve_pages(self) -> Spans:
        """Return the pages held back for the super block and the region list."""
        return Spans((b * BLOCK_PAGES, (b + 1) * BLOCK_PAGES) for b in self.reserve_blocks)

    @property
    def own_pages(self) -> Spans:
        """Return everything that this kernel reserved for itself."""
        return Spans(self.reserved.values())

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in found.items() if name != "boot_id" or value}


def write(machine: "Machine", info: KernelInfo) -> None:
    """Publish a kernel: from now on it is the running one."""
    machine.write_json(NAME, sealed(info.to_json()))


def read(machine: "Machine", *, any_layout: bool = False) -> KernelInfo | None:
    """Read the running kernel's record; None if no kernel runs, or it ended with that of the host.

    Raise MachineError if the kernel is another version's, unless `any_layout`.
    """
    if not machine.has(NAME):
        return None
    data = machine.read_json(NAME, _sealed(machine.hardware().size >> PAGE_SHIFT), _REMEDY)
    if data is None:
        return None  # removed since has() saw it
    info = KernelInfo(**data)
    if info.boot_id and info.boot_id != machine.host.boot_id:
        return None  # it ended with the host's kernel
    if not any_layout:
        check_layout(info)
    return info


def cmdline(machine: "Machine") -> str:
    """Return the running kernel's command line, as boot wrote it beside kernel.json.

    On a machine on real memory it is the host's, of which only pkram= is for us.
    """
    said = (machine.read_text("cmdline") or "").rstrip("\n")
    return said if machine.elsewhere() is None else words.only(said, words.PKRAM)


def _is_ours(data: dict[str, Any]) -> bool:
    """Return True if this version wrote the object; then it is sealed."""
    return data.get("layout") == LAYOUT


@cache
def _sealed(frames: int) -> Sealed:
    """Declare kernel.json for RAM of so many pages; once, since it is read again and again."""
    return Sealed(declared(frames), _is_ours)


def declared(frames: int) -> schema.Object:
    """Declare the fields of kernel.json for RAM of so many pages."""
    blocks = -(-frames // BLOCK_PAGES)
    pfn, part = schema.Whole(0, frames - 1), schema.Range(frames)
    return schema.Object(
        {
            "generation": schema.Whole(1),
            "kind": schema.OneOf((nvram.COLD, nvram.KEXEC, nvram.CRASH)),
            "image": schema.Text(),
            "super_pfn": pfn,
            "lease_table_pfn": schema.Whole(1, frames - -(-blocks * 8 // PAGE_SIZE)),
            "blocks": schema.Whole(blocks, blocks),
            "reserve_blocks": _Tuple(schema.Whole(0, blocks - 1)),
            "reserved": schema.MapOf(part),
        },
        optional={
            "old_super_pfn": pfn,
            "stale": _Tuple(part),
            "initmem": _Tuple(part),
            "booted": schema.Number(0),
            "report": _REPORT,
            "layout": schema.Whole(),
            "version": schema.Text(64),
            "boot_id": schema.Text(32),
        },
    )


class _Tuple(schema.ListOf):
    """A list that is read as a tuple."""

    def read(self, value: Any, at: str = "") -> Any:
        """Return the list as a tuple."""
        return tuple(super().read(value, at))


_COUNT = schema.Whole()
_DEAD = schema.OneOf((schema.Empty(), nvram.DEAD))
_REPORT = schema.Object(
    {},
    optional={
        "cmdline": schema.Text(),
        "nodes": schema.ListOf(
            schema.Object(
                {"name": schema.Text(), "pages": _COUNT, "ranges": _COUNT, "moved": _COUNT},
                optional={"unchecked": schema.Maybe(_COUNT)},
            )
        ),
        "lost": schema.ListOf(schema.Object({"name": schema.Text(), "pages": _COUNT})),
        "preserved_pages": _COUNT,
        "preserved_ranges": _COUNT,
        "reserved_bytes": schema.MapOf(_COUNT),
        "numa": schema.MapOf(schema.Object({"pages": _COUNT, "preserved": _COUNT})),
        "dead": _DEAD,
        "kaslr_slots": _COUNT,
        "segments": schema.ListOf(schema.Text()),
        "phases": schema.MapOf(schema.Number(0)),
    },
    others=schema.Anything(),
)


def check_layout(info: KernelInfo) -> None:
    """Raise MachineError if another version wrote the running kernel's private tables."""
    if info.layout != LAYOUT:
        raise MachineError(
            f"the kernel runs pkramfs {info.version}, this command is {__version__}: upgrade the kernel by pkram-kexec"
        )
