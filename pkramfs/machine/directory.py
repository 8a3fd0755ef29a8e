# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine is a directory: its RAM, its hardware, and the files that its kernel exports.

    machine.json  ram                         the hardware; survives a kexec. RAM may be elsewhere (named.py)
    machine.json.copy                         from which a lost machine.json is made again
    nvram.json                                firmware variables; survive too
    cmdline pkram iomem dmesg kernel.json     exported by the running kernel
    kexec/                                    the image loaded for the next boot
    mounts/ID.{lock,json,spare,sock,log}      one mount daemon each, ID is its tree id
    lock  lock.tables                         held to boot; held to change the shared tables

This module knows names, atomic replacement and locks. The chapters that write the files define their
meaning, and declare their schemas (schema.py). JSON files are replaced by rename, so a
reader sees the old one or the new one.

The owner of the directory owns the memory. Every user may write to /dev/shm, so the default place is
checked before use: it must belong to this user, and no other user may be able to replace parts of it. A place that
PKRAM_ROOT names is root's own choice.

Kernel: /proc/cmdline, /proc/iomem, /sys/kernel/pkram, /sys/firmware/memmap
"""

import json
import logging
import os
import secrets
import shlex
import stat
import time
from collections.abc import Container
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from pkramfs import schema, stdio
from pkramfs.errors import DamagedError, MachineError, UsageError, explain
from pkramfs.machine import backing, claims, conf, locks, mounts, named
from pkramfs.machine.backing import Backing
from pkramfs.machine.files import append_line, clear_temporary, open_regular, read_file, read_json, replace_file
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.host import Host
from pkramfs.machine.mapped import open_ram
from pkramfs.machine.mounts import MountEntry, MountLock, claim, live_ids, outlived_ids, read_entries, tree_ids
from pkramfs.machine.ram import Ram
from pkramfs.text import literal, printable
from pkramfs.units import GIB, PAGE_SIZE, round_down

log = logging.getLogger(__name__)

DEFAULT = "default"
RUN_LINK = "/run/pkram"
LIFECYCLE_TIMEOUT = 60.0
HARDWARE_JSON, COPY = "machine.json", "machine.json.copy"
_MACHINE = schema.Object(
    {"version": schema.OneOf((1,))}, optional={"backing": backing.DECLARED}, others=schema.Anything()
)
_ANY = schema.Object({}, others=schema.Anything())
_SAID: set[str] = set()
"""Machines whose kernel log this process could not write, and has warned about."""
_HARDWARE_REMEDY = "remove it, and `pkramctl machine create` makes it again; the memory stays"
_COPY_REMEDY = "remove it, and give `pkramctl machine create` the options with which the machine was made"


class Machine:
    """One machine's directory. Making the object touches nothing."""

    def __init__(self, directory: str, host: Host | None = None) -> None:
        self.directory, self.host = directory, host or Host()

    @classmethod
    def locate(cls, name: str | None = None) -> "Machine":
        """Return the machine called `name` below PKRAM_ROOT (or /dev/shm/pkram, /dev/shm/pkram-UID)."""
        name = DEFAULT if name is None else name
        if not name or name in (".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
            raise UsageError(f"invalid machine name {name!r}: give a plain file name")
        return cls(os.path.join(os.environ.get("PKRAM_ROOT") or default_root(), name))

    @classmethod
    def all(cls) -> list["Machine"]:
        """Return our machines below PKRAM_ROOT, by name; those of other users are ignored."""
        root = os.environ.get("PKRAM_ROOT") or default_root()
        try:
            names = sorted(os.listdir(root))
        except OSError:
            return []  # no directory, no machines
        machines = [cls(os.path.join(root, name)) for name in names]
        return [machine for machine in machines if machine.exists() and machine.is_ours()]

    @classmethod
    def on_host(cls) -> list["Machine"]:
        """Return our machines on memory of the host, by name, including those that are not up in this boot yet.

        A copy of a NAME.conf under another name is no other machine.
        """
        root = os.environ.get("PKRAM_ROOT") or default_root()
        place = os.path.dirname(cls(os.path.join(root, DEFAULT)).conf_path)
        names = {machine.name for machine in cls.all() if machine.elsewhere() is not None}
        names |= {name.removesuffix(conf.SUFFIX) for name in conf.files(place)}
        machines, found = [cls(os.path.join(root, name)) for name in sorted(names)], dict[str, Machine]()
        for one in sorted(machines, key=lambda one: not one.exists()):
            said = one.configuration()
            if said is not None or one.exists():
                found.setdefault(said.uuid if said else one.name, one)
        return sorted(found.values(), key=lambda one: one.name)

    def is_ours(self) -> bool:
        """Return True if the directory itself, not the target of a link, belongs to this user."""
        found = os.lstat(self.directory)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()

    def path(self, *parts: str) -> str:
        """Return the path of a file of this machine; without parts, of its directory."""
        return os.path.join(self.directory, *parts)

    def exists(self) -> bool:
        """Return True if the machine was made (it has hardware)."""
        return self.has(HARDWARE_JSON)

    def create(self, hardware: FirmwareMap | None = None) -> None:
        """Make the directory, machine.json and the RAM file; what exists stays as it is.

        If RAM holds memory and only machine.json was lost, machine.json is made again and the memory is not touched.
        """
        self._check_owner()
        try:
            os.makedirs(os.path.dirname(self.directory), mode=0o755, exist_ok=True)
            for parts in ((), ("mounts",), ("kexec",)):
                os.makedirs(self.path(*parts), mode=0o700, exist_ok=True)
            with self.lifecycle(shared=False):  # two first mounts at once make one machine
                if not self.exists():
                    self._make(hardware)
        except OSError as error:
            raise MachineError(f"cannot make the machine {self.directory}: {explain(error)}") from None
        self._link_run()

    @property
    def name(self) -> str:
        """Return the name under which `locate` finds the machine."""
        return os.path.basename(self.directory)

    @property
    def words(self) -> str:
        """Return the option by which commands find the machine, with a blank before it; nothing for the default one."""
        return "" if self.name == DEFAULT else f" --machine {shlex.quote(self.name)}"

    @property
    def conf_path(self) -> str:
        """Return the path of the file that names the machine's memory; it need not exist."""
        place = os.path.dirname(self.directory)
        if place == default_root() and os.geteuid() == 0:
            place = conf.DIRECTORY
        return os.path.join(place, f"{self.name}{conf.SUFFIX}")

    def configuration(self) -> conf.Conf | None:
        """Return the configuration that names the machine's memory, None if RAM is a file of its own."""
        return None if os.path.isdir(self.conf_path) else conf.read(self.conf_path)

    def _make(self, hardware: FirmwareMap | None) -> None:
        """Write machine.json, last, for new RAM or for the RAM that exists."""
        named_ram = self.configuration()
        if named_ram is not None:
            self._make_named(named_ram, hardware)
            return
        lost = self.holds_memory()
        kept = self._read_hardware(COPY, _COPY_REMEDY) if lost else None
        made = hardware or kept or FirmwareMap.default(host_memory(), seed=secrets.randbits(63))
        if lost:
            self._check_fits(made, kept)
            self.log(f"machine.json was lost and is made again{' from its copy' if made is kept else ''}")
        else:
            self.remove("ram")  # empty: its maker died, or another user made it before us
            Ram(self.path("ram"), made.size, create=True).close()
        for name in (COPY, HARDWARE_JSON):
            self.write_json(name, {"version": 1, **made.to_json()})

    def _make_named(self, said: conf.Conf, hardware: FirmwareMap | None) -> None:
        """Write machine.json for memory that the user named."""
        if hardware is not None:
            raise MachineError(f"{self.conf_path} says that RAM is {said.ram}: leave the hardware out, or remove it")
        found = named.find(said, self.host, self.words)
        made = FirmwareMap.flat(found.header.size, found.header.seed)
        self.write_json(HARDWARE_JSON, {"version": 1, **made.to_json(), "backing": found.backing.to_json()})

    def holds_memory(self) -> bool:
        """Return True if the RAM file has any page backed."""
        try:
            return os.stat(self.path("ram")).st_blocks > 0
        except FileNotFoundError:
            return False

    def _check_fits(self, made: FirmwareMap, kept: FirmwareMap | None) -> None:
        """Raise MachineError unless RAM was made for this hardware."""
        size = os.stat(self.path("ram")).st_size
        wrong = f"{self.path('ram')} holds memory, but machine.json is missing"
        if kept is not None and (made.entries, made.nodes) != (kept.entries, kept.nodes):
            raise MachineError(f"{wrong}, and its copy says other hardware: `pkramctl machine create` without options")
        if made.size != size:
            ram = size - GIB if size > 4 * GIB else size  # as FirmwareMap.default spreads it
            raise MachineError(
                f"{wrong}, and RAM was {size} bytes, not {made.size}: put it back, or make it again as it was made: "
                f"`pkramctl machine create --ram {ram}`, or --map FILE"
            )

    def keep_copy(self) -> None:
        """Write the copy of machine.json if it is missing: earlier versions made none."""
        if not self.has(COPY) and self.elsewhere() is None:
            self.write_json(COPY, {"version": 1, **self.hardware().to_json()})

    def missing(self) -> str:
        """Return a message: why there is no machine here, and what to do."""
        if self.has("ram"):
            return (
                f"{self.path(HARDWARE_JSON)} is missing, but its RAM is there: "
                "`pkramctl machine create`, or a mount, makes it again; the memory stays"
            )
        if os.path.isfile(self.conf_path):
            return f"the machine of {self.conf_path} is not up: a mount brings it up"
        try:
            os.stat(self.path(HARDWARE_JSON))
        except PermissionError as error:
            return f"cannot look into {self.directory}: {error.strerror}: name a machine of your own (PKRAM_ROOT)"
        except OSError:
            pass  # there is none
        return f"there is no machine in {self.directory}: a mount or `pkramctl machine create` makes it"

    def _check_owner(self) -> None:
        """Raise MachineError if another user could replace our memory with memory of their own."""
        parent, mine = os.path.dirname(self.directory), os.geteuid()
        open_to_all = parent == default_root()  # another user may have made it before us
        for place in (parent, self.directory) if open_to_all else (self.directory,):
            try:
                found = (os.lstat(place), os.stat(place))
            except OSError:
                continue  # missing: the caller reports that, or makes it
            strangers = {status.st_uid for status in found} - {mine}
            if strangers and (mine != 0 or open_to_all):
                raise MachineError(
                    f"{place} belongs to user {min(strangers)}: set PKRAM_ROOT to a directory of your own"
                )
            if open_to_all and found[1].st_mode & 0o022 and not found[1].st_mode & stat.S_ISVTX:
                raise MachineError(f"{place} can be written by others: chmod go-w it, or set PKRAM_ROOT")

    def _link_run(self) -> None:
        """Point /run/pkram at root's default machine, unless something else has that name."""
        if os.geteuid() != 0 or self.directory != os.path.join(default_root(), DEFAULT):
            return
        try:
            if stat.S_ISLNK(os.lstat(RUN_LINK).st_mode):
                return
        except FileNotFoundError:
            os.symlink(self.directory, RUN_LINK)
        except OSError as error:
            raise MachineError(f"cannot look at {RUN_LINK}: {explain(error)}") from None

    def hardware(self) -> FirmwareMap:
        """Return the firmware map of machine.json."""
        self._check_owner()
        found = self._read_hardware(HARDWARE_JSON, _HARDWARE_REMEDY)
        if found is None:
            raise MachineError(self.missing())
        return found

    def elsewhere(self) -> Backing | None:
        """Return the memory that the user named; None if RAM is a file of the machine's own."""
        data = self.read_json(HARDWARE_JSON, _MACHINE, _HARDWARE_REMEDY)
        return Backing(**data["backing"]) if data and "backing" in data else None

    def _read_hardware(self, name: str, remedy: str) -> FirmwareMap | None:
        data = self.read_json(name, _MACHINE, remedy)
        if data is None:
            return None
        try:
            found = FirmwareMap.from_json(data)
            if data.get("ram_bytes", found.size) != found.size:
                raise MachineError(f"ram_bytes is {literal(data['ram_bytes'])}, but its map ends at {found.size}")
            return found
        except MachineError as error:
            raise DamagedError(self.path(name), str(error), remedy, found=str(error)) from None

    def ram(self) -> Ram:
        """Open the machine's RAM, whose size must be what machine.json says."""
        size, found = self.hardware().size, self.elsewhere()
        return Ram(self.path("ram"), size) if found is None else open_ram(found)

    def lifecycle(self, *, shared: bool, timeout: float = LIFECYCLE_TIMEOUT) -> AbstractContextManager[None]:
        """Hold the machine: shared to start a mount, exclusive to boot or to kexec."""
        self._check_owner()
        return locks.held(self.path("lock"), shared=shared, timeout=timeout, what=f"the machine {self.directory}")

    def tables(self) -> AbstractContextManager[None]:
        """Hold the lock of the node list and the lease table, for moments only."""
        return locks.held(self.path("lock.tables"), what=f"the tables of the machine {self.directory}")

    def read_text(self, name: str) -> str | None:
        """Return a file's text, or None if it is missing."""
        try:
            data = read_file(self.path(name))
        except OSError as error:
            raise MachineError(f"cannot read {explain(error)}") from None
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def write_text(self, name: str, text: str) -> None:
        """Replace a file by rename: readers see the old text or the new."""
        replace_file(self.path(name), text)

    def has(self, name: str) -> bool:
        """Return True if anything has this name, of whatever type."""
        return os.path.lexists(self.path(name))

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        try:
            os.unlink(self.path(name))
        except FileNotFoundError:
            return
        except OSError as error:
            raise MachineError(f"cannot remove {explain(error)}") from None

    def read_json(self, name: str, kind: schema.Kind = _ANY, remedy: str = "") -> dict[str, Any] | None:
        """Read a JSON file as its owner declares it; return None if it is missing. See files.read_json."""
        found: dict[str, Any] | None = read_json(self.path(name), kind, remedy)
        return found

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Replace a JSON file by rename."""
        self.write_text(name, json.dumps(data, indent=1) + "\n")

    def log(self, message: str, *, warn: bool = True) -> None:
        """Append a line to the kernel log, with the seconds since boot as dmesg shows them.

        A line that cannot be written never fails the work that it reports.
        """
        log.info("%s", message)
        try:
            append_line(self.path("dmesg"), f"[{self._uptime():12.6f}] {printable(message)}")
        except MachineError as error:
            if warn:
                self._no_log(error)

    def _no_log(self, error: MachineError) -> None:
        """Warn once, on stderr, that the kernel log cannot be used."""
        if self.path() not in _SAID:
            _SAID.add(self.path())
            stdio.say(printable(f"pkramfs: warning: no kernel log: {error}"))

    def _uptime(self) -> float:
        """Return the seconds since the dmesg file was begun: since the kernel started."""
        try:
            fd = open_regular(self.path("dmesg"))
        except OSError:
            return 0.0  # the writer of the line reports what is wrong
        try:
            first = os.read(fd, 200).partition(b"\n")[0]
        except OSError:
            return 0.0
        finally:
            os.close(fd)
        _, found, began = first.partition(b"boot clock ")
        try:
            return max(0.0, time.time() - float(began)) if found else 0.0
        except ValueError:
            return 0.0

    def begin_log(self) -> None:
        """Begin an empty kernel log: the clock of a new kernel starts now."""
        try:
            replace_file(self.path("dmesg"), f"[{0:12.6f}] clocksource: boot clock {time.time():.6f}\n")
        except MachineError as error:
            self._no_log(error)

    def drop_log(self) -> None:
        """Remove the kernel log: its kernel has ended."""
        try:
            self.remove("dmesg")
        except MachineError as error:
            self._no_log(error)

    def dmesg(self) -> str:
        """Return the kernel log."""
        return self.read_text("dmesg") or ""

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines of the kernel log, none if it cannot be read."""
        try:
            return self.dmesg().splitlines()[-count:]
        except MachineError as error:
            self._no_log(error)
            return []

    def mounts(self) -> list[MountEntry]:
        """Return the entries of mount daemons, those of dead ones included."""
        return read_entries(self.path("mounts"))

    def live_ids(self) -> set[int]:
        """Return the tree ids whose lock is held: their daemons live, with an entry or without."""
        return live_ids(self.path("mounts"))

    def held_ids(self) -> set[int]:
        """Return the tree ids of mounts whose memory is not to be freed: of living daemons, and what dead ones left."""
        return mounts.held_ids(self.path("mounts"))

    def outlived_ids(self) -> set[int]:
        """Return the tree ids of dead daemons whose trees can be recovered."""
        return outlived_ids(self.path("mounts"))

    def tree_ids(self) -> set[int]:
        """Return the tree ids that have a lock file: living daemons, and dead ones not yet cleared away."""
        return tree_ids(self.path("mounts"))

    def clear_away(self, keep: Container[int]) -> None:
        """Remove what dead processes left: files of mounts except those in `keep`, claims, temporary files."""
        try:
            # who only happens to clear up need not hear that the log cannot be written
            mounts.clear_away(self.path("mounts"), keep, partial(self.log, warn=False))
            claims.clear_away(self.path("claims"))
            for directory in (self.path(), self.path("mounts"), self.path("kexec")):
                clear_temporary(directory)
        except OSError as error:
            self.log(f"cannot remove files of dead processes: {explain(error)}")

    def inherit(self, tree_id: int, lock: int) -> MountLock:
        """Return the lock of a tree, which another process has left to us."""
        return MountLock(self.path("mounts"), tree_id, lock)

    def claim(self, tree_id: int) -> MountLock:
        """Take the lock of a tree; MachineError if a living daemon holds it."""
        return claim(self.path("mounts"), tree_id)


def default_root() -> str:
    """Return the directory of machines if PKRAM_ROOT is not set."""
    return "/dev/shm/pkram" if os.geteuid() == 0 else f"/dev/shm/pkram-{os.geteuid()}"


def host_memory() -> int:
    """Return the bytes of memory of the host: the default size of RAM, which is sparse."""
    return round_down(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), PAGE_SIZE)
