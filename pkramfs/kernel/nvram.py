# SPDX-License-Identifier: GPL-2.0-or-later
"""nvram.json: the few facts that cross a kexec beside RAM, as firmware variables would.

    boot_count   how many kernels this machine has had; the next kernel's generation is one more
    pending      the boot that was decided and is not finished: the next command finishes it
    mounts       the mounts to make again after the boot (the machine's /etc/fstab)
    pause        seconds that the last kexec took beside copying, as a prediction of the next

The pending boot is written before the point of no return and cleared when the new kernel has
taken over. Next to kernel.json it says where a kexec died:

    kernel.json of      pending of       meaning
    generation n        n + 1            died before the point of no return: cancelled
    none                n + 1            died after it: resume
    generation n + 1    n + 1            the new kernel is up and has to finish taking over
    none                none             never booted; or damaged, if RAM holds data

Kernel: drivers/firmware/efi/vars.c; struct kimage, which this record replaces once the old kernel is gone
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pkramfs import schema
from pkramfs.errors import MachineError
from pkramfs.kernel.image import MAX_IMAGE
from pkramfs.kernel.segments import Segment, declared, from_json
from pkramfs.machine.files import Sealed, sealed
from pkramfs.units import GIB, PAGE_SHIFT

if TYPE_CHECKING:
    from pkramfs.kernel.image import Image
    from pkramfs.machine.directory import Machine

NAME = "nvram.json"
NodePages = tuple[str, int]
"""A node's name and how many pages it has."""

_PLACE = {"mountpoint": str, "order": int, "on": dict}
_MOUNT = _PLACE | {"name": str, "options": dict, "tree": str, "binds": list}
_BIND = _PLACE | {"root": str, "inode": (int, type(None)), "options": list}
_ON = {"dev": int, "ino": int, "tree": str}
_TREE = re.compile("[0-9a-f]{1,16}")

COLD, KEXEC, CRASH = "cold", "kexec", "crash"


@dataclass(frozen=True)
class ImageInfo:
    """A kernel image as boot must know it; the bytes are in the kernel segment. Sizes in bytes."""

    kind: str
    name: str
    version: str
    init_size: int
    align: int
    preferred: int
    relocatable: bool

    @classmethod
    def of(cls, image: "Image") -> "ImageInfo":
        """Return the facts of an image that boot needs."""
        return cls(**{name: getattr(image, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Pending:
    """A boot that was decided. Boot must find `nodes`; `lost` are given up, and only named in its log."""

    kind: str
    generation: int
    cmdline: str
    image: ImageInfo
    segments: tuple[Segment, ...] = ()
    force: bool = False
    poison: bool = False
    nodes: tuple[NodePages, ...] = ()
    lost: tuple[NodePages, ...] = ()
    scratch: tuple[int, int] | None = None
    """Pages in which to place the kernel and its tables, as KHO hands them on."""
    crash: tuple[int, int] | None = None
    """Pages in which a crash kernel has to live; it touches no other."""
    dead: dict[str, Any] = field(default_factory=dict)
    """The last facts about the dead kernel, for the crash kernel that finds its memory."""
    host: dict[str, Any] = field(default_factory=dict)
    """The host's own boot in which this one was decided (hostboot.py); empty for a machine of the simulation."""

    def to_json(self) -> dict[str, Any]:
        """Return the boot as JSON data."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "host" or self.host}
        return plain | {
            "image": dict(vars(self.image)),
            "segments": [s.to_json() for s in self.segments],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Pending":
        """Return the boot that `to_json` gave, as it was read."""
        rows = {name: tuple(data[name]) for name in ("nodes", "lost")}
        parts = {"image": ImageInfo(**data["image"]), "segments": tuple(from_json(data["segments"]))}
        return cls(**data | rows | parts)


DEAD = schema.Object(
    {
        "generation": schema.Whole(),
        "super_pfn": schema.Whole(),
        "lease_table_pfn": schema.Whole(),
        "cmdline": schema.Text(),
        "dmesg": schema.ListOf(schema.Text(nul=True)),
    },
    others=schema.Anything(),
)
"""The last facts about the dead kernel."""
HOST = schema.Object(
    {"boot_id": schema.Text(32), "cmdline": schema.Text(), "release": schema.Text()},
    closed=True,
)
"""The host's boot in which a boot of ours was decided."""
IMAGE = schema.Object(
    {
        "kind": schema.Text(),
        "name": schema.Text(),
        "version": schema.Text(),
        "init_size": schema.Whole(1, MAX_IMAGE),
        "align": schema.Whole(1, GIB),
        "preferred": schema.Whole(0, (1 << 52) - 1),
        "relocatable": schema.Flag(),
    },
    closed=True,
)
MOUNT = schema.Object(
    {"name": schema.Maybe(schema.Text()), "mountpoint": schema.Text()},
    optional={"options": schema.MapOf(schema.OneOf((schema.Text(), schema.Flag())))},
    others=schema.Anything(),
)
"""One mount that comes back."""
_REMEDY = (
    "put a copy of it back; if a kernel is running (kernel.json is there), "
    "removing it forgets only what would be mounted again"
)


def _frames(machine: "Machine") -> int:
    return machine.hardware().size >> PAGE_SHIFT


@cache
def _sealed(frames: int) -> Sealed:
    """Declare nvram.json for RAM of so many pages; once, since it is read again and again."""
    return Sealed(_declared(frames))


def _declared(frames: int) -> schema.Object:
    """Declare the fields of nvram.json for RAM of so many pages."""
    part = schema.Maybe(schema.Range(frames))
    nodes = schema.ListOf(schema.Row((schema.Text(), schema.Whole())))
    boot = schema.Object(
        {
            "kind": schema.OneOf((COLD, KEXEC, CRASH)),
            "generation": schema.Whole(1),
            "cmdline": schema.Text(),
            "image": IMAGE,
            "segments": declared(frames),
            "nodes": nodes,
            "lost": nodes,
            "scratch": part,
            "crash": part,
        },
        optional={
            "force": schema.Flag(),
            "poison": schema.Flag(),
            "dead": schema.OneOf((schema.Empty(), DEAD)),
            "host": HOST,
        },
        closed=True,
    )
    return schema.Object(
        {},
        optional={
            "boot_count": schema.Whole(),
            "pending": schema.Maybe(boot),
            "mounts": schema.ListOf(MOUNT),
            "pause": schema.Maybe(schema.Number(0)),
        },
        others=schema.Anything(),
    )


def read(machine: "Machine") -> dict[str, Any]:
    """Read all of nvram.json; fields that were never written are those of a machine that never booted."""
    data = (machine.read_json(NAME, _sealed(_frames(machine)), _REMEDY) or {}) if machine.has(NAME) else {}
    return {"boot_count": 0, "pending": None, "mounts": []} | data


def _write(machine: "Machine", data: dict[str, Any]) -> None:
    """Replace nvram.json, sealed; raise MachineError for content that could not be read again."""
    try:
        _declared(_frames(machine)).read(data)
    except schema.Invalid as error:
        raise MachineError(f"{machine.path(NAME)} cannot hold this: {error}") from None
    machine.write_json(NAME, sealed(data))


def pending(machine: "Machine") -> Pending | None:
    """Return the pending boot, or None."""
    data = read(machine)["pending"]
    return Pending.from_json(data) if data else None


def set_pending(machine: "Machine", pending: Pending, mounts: Sequence[dict[str, Any]] | None = None) -> None:
    """Decide a boot. `mounts`, if given, replaces the list of what to mount again."""
    data = read(machine) | {"pending": pending.to_json()}
    if mounts is not None:
        data["mounts"] = list(mounts)
    _write(machine, data)


def cancel(machine: "Machine", mounts: Sequence[dict[str, Any]] | None = None) -> None:
    """Forget a boot that died before the point of no return.

    Its mounts may have been stopped: they stay listed, unless `mounts` says what was listed before.
    """
    found = read(machine) | {"pending": None}
    _write(machine, found if mounts is None else found | {"mounts": list(mounts)})


def finished(machine: "Machine", generation: int) -> None:
    """Note that the kernel of this generation has taken over: no boot is pending."""
    _write(machine, read(machine) | {"pending": None, "boot_count": generation})


def pause(machine: "Machine") -> float | None:
    """Return the seconds that the last kexec of this machine took beside copying; None before the first."""
    found = read(machine).get("pause")
    return float(found) if isinstance(found, int | float) else None


def set_pause(machine: "Machine", seconds: float) -> None:
    """Note the seconds that a kexec took beside copying."""
    _write(machine, read(machine) | {"pause": round(max(0.0, seconds), 3)})


def next_generation(machine: "Machine") -> int:
    """Return the generation of the next kernel."""
    return int(read(machine)["boot_count"]) + 1


def mounted_again(machine: "Machine", mounts: Sequence[dict[str, Any]]) -> None:
    """Take mounts off the list: they were mounted again."""
    data, names = read(machine), {mount["name"] for mount in mounts}
    left = [mount for mount in data["mounts"] if mount.get("name") not in names]
    if left != data["mounts"]:
        _write(machine, data | {"mounts": left})


def mounts(machine: "Machine") -> list[dict[str, Any]]:
    """Return the mounts to be mounted again after the boot (cli/again.py).

    Entries that older releases wrote have only name, mountpoint and options.
    """
    found = read(machine)["mounts"]
    wrong = "mounts is no list" if not isinstance(found, list) else next(filter(None, map(_wrong_mount, found)), "")
    if wrong:
        raise MachineError(f"{machine.path(NAME)} is damaged: {wrong}")
    return list(found)


def _wrong_mount(data: Any) -> str:
    """Return the fault of an entry of the list of mounts; empty if it is sound."""
    wrong = _wrong_place(data, _MOUNT, ("mountpoint",))
    if wrong:
        return wrong
    if any(not isinstance(value, bool | str) for value in data.get("options", {}).values()):
        return f"mounts: options is {data['options']!r}"
    if not _TREE.fullmatch(data.get("tree", "0")):
        return f"mounts: tree is {data['tree']!r}"
    for bind in data.get("binds", ()):
        if wrong := _wrong_place(bind, _BIND, tuple(_BIND)):
            return wrong
        if any(not isinstance(word, str) for word in bind["options"]):
            return f"mounts: options is {bind['options']!r}"
    return ""


def _wrong_place(data: Any, fields: dict[str, Any], needed: tuple[str, ...]) -> str:
    """Return the fault of the place of an entry; empty if it is sound."""
    if not isinstance(data, dict):
        return f"mounts: {data!r}"
    for part, known in ((data, fields), (data.get("on", {}), _ON)):
        for key in known.keys() & (part.keys() if isinstance(part, dict) else ()):
            if isinstance(part[key], bool) or not isinstance(part[key], known[key]):
                return f"mounts: {key} is {part[key]!r}"
    if missing := [key for key in needed if key not in data]:
        return f"mounts: {missing[0]} is missing"
    if not _TREE.fullmatch(data.get("on", {}).get("tree", "0")):
        return f"mounts: tree is {data['on']['tree']!r}"
    return "" if data["mountpoint"].startswith("/") else f"mounts: mountpoint is {data['mountpoint']!r}"


def clear_mounts(machine: "Machine") -> None:
    """Clear the list of mounts: they were mounted again, or are not wanted."""
    data = read(machine)
    if data["mounts"]:
        _write(machine, data | {"mounts": []})
