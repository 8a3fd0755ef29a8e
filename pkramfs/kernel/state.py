"""kernel.json: what one boot decided, for everybody who works under this kernel.

The kernel is no process; it is this record and the tables in RAM that it points to. It is written
last, by rename: that is the moment at which the kernel is up. `layout` names the version of the
private tables (lease table, reserve blocks); another version's commands refuse to touch them, and
kexec is the upgrade, because what crosses it is declared in pkram/format.py alone. What it says
authorises to punch memory, so it carries a checksum: a kernel.json that was damaged is refused.

    super_pfn, reserve_blocks    the super block and the blocks held back for its region list
    lease_table_pfn, blocks      who owns which page block
    reserved                     named page ranges that are the kernel's: image, tables, scratch …
    old_super_pfn, stale         what the last kernel handed over: consumed, then freed (running.py)
    initmem                      what was needed to boot only: the loaded segments

Kernel: boot_params, /sys/kernel/pkram, the symbols _text … _end
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pkramfs import __version__
from pkramfs.errors import MachineError
from pkramfs.kernel import nvram
from pkramfs.machine.files import is_sealed, sealed
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine

NAME = "kernel.json"
LAYOUT = 2
"""Version of everything private to a kernel: lease table, reserve blocks, kernel.json itself."""

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

    @property
    def pkram(self) -> bool:
        """Whether PKRAM is on: a crash kernel has no super block, nor has one with pkram=off."""
        return self.super_pfn != 0

    @property
    def crash(self) -> bool:
        """Whether this is a crash kernel."""
        return self.kind == nvram.CRASH

    @property
    def reserve_pages(self) -> Spans:
        """The pages held back for the super block and the region list."""
        return Spans((b * BLOCK_PAGES, (b + 1) * BLOCK_PAGES) for b in self.reserve_blocks)

    @property
    def own_pages(self) -> Spans:
        """Everything that this kernel reserved for itself."""
        return Spans(self.reserved.values())

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def write(machine: "Machine", info: KernelInfo) -> None:
    """Publish a kernel: from now on it is the running one."""
    machine.write_json(NAME, sealed(info.to_json()))


def read(machine: "Machine", *, any_layout: bool = False) -> KernelInfo | None:
    """The running kernel, or None. MachineError if it is another version's, unless `any_layout`."""
    data = machine.read_json(NAME)
    if data is None:
        return None
    known = KernelInfo.__dataclass_fields__
    try:
        info = KernelInfo(**{key: value for key, value in data.items() if key in known})
    except TypeError as error:
        raise MachineError(f"{machine.path(NAME)} cannot be read ({error})") from None
    if not any_layout:
        check_layout(info)
    if info.layout == LAYOUT and not is_sealed(data):
        raise MachineError(
            f"{machine.path(NAME)} is damaged: its checksum does not fit; nothing was changed: put it back as it was "
            "(or start empty: pkram-kexec --cold --force)"
        )
    return _with_tuples(info)


def check_layout(info: KernelInfo) -> None:
    """MachineError if the running kernel's private tables are another version's."""
    if info.layout != LAYOUT:
        raise MachineError(
            f"this kernel runs pkramfs {info.version}, this is {__version__}: pkram-kexec is the upgrade"
        )


def _with_tuples(info: KernelInfo) -> KernelInfo:
    """JSON knows lists only."""
    return replace(
        info,
        reserve_blocks=tuple(info.reserve_blocks),
        reserved={name: (r[0], r[1]) for name, r in info.reserved.items()},
        stale=tuple((r[0], r[1]) for r in info.stale),
        initmem=tuple((r[0], r[1]) for r in info.initmem),
    )
