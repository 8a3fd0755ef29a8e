# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount the present mounts again after a kexec, as they are mounted now.

    plan()      from the mount table, when all is frozen: every place of every preserved tree, its flags,
                the mount below it, and the order; and a note on each mount that cannot be made again, and why
    restart()   after the boot: each place after those that it lies on, several at once

    nvram.json, an entry of `mounts`
      name, mountpoint, options    as for mount(8); the flags are those of the mount table
      tree                         the tree id, so that no other tree of that name is taken
      order                        place in the order of mounting
      on                           the directory: {dev, ino}, or {tree, ino} in another tree of ours, whose device
                                   number will be another; a number that is not known is missing
      binds                        bind mounts: mountpoint, order, on, options; root (what of the tree), inode

Lists of older versions have only the first three keys; their order is that of the list.

Only a mount in our own mount namespace, at a path that leads to it, can be mounted again by its path. A tree
that is mounted in a container, or was unmounted and is in use, stays preserved. A file system that is mounted
inside a tree, or a container's copy of a mount, is lost. `plan` says which.

Kernel: fs/namespace.c, fs/pnode.c
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from pkramfs.cli.daemons import Seen
from pkramfs.errors import MachineError, PkramfsError, explain
from pkramfs.mounting import options, syscalls
from pkramfs.mounting.forks import Forks
from pkramfs.mounting.helper import PROGRAM, AnsweredError
from pkramfs.mounting.mountpoints import prepare
from pkramfs.mounting.names import node_name
from pkramfs.mounting.starting import Expected
from pkramfs.mounting.syscalls import Mounted, Table
from pkramfs.units import plural

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry

Json = dict[str, Any]
Warn = Callable[[str], None]
_NAMED = 3
"""How many places in other mount namespaces are named for a tree."""


class Plan(NamedTuple):
    """The entries for nvram.json, and a note on each mount that has none."""

    mounts: list[Json]
    notes: list[str]


def plan(seen: Sequence[Seen]) -> Plan:
    """Plan from the mount table of now. Daemons that do not answer are asked nothing."""
    return _Planner(seen, Table(syscalls.mounts())).plan()


def waiting(machine: "Machine") -> list[Json]:
    """Return the mounts that an earlier command left to be made again, and that were not made since."""
    from pkramfs.kernel import nvram

    mounted = {entry.name for entry in machine.mounts() if entry.alive}
    return [mount for mount in nvram.mounts(machine) if mount.get("name") not in mounted]


class _Planner:
    def __init__(self, seen: Sequence[Seen], table: Table) -> None:
        self.seen, self.table = seen, table
        self.kept = {one.entry.dev: one.entry for one in seen if one.report.preserved and one.entry.dev is not None}
        self.ours = {one.entry.dev for one in seen}
        self.silent = {one.entry.dev for one in seen if one.status is None}
        self.mains: dict[int | None, Mounted] = {
            dev: main for dev, entry in self.kept.items() if (main := _main(entry, table.of(dev)))
        }
        self.circular: set[int] = set()
        self.order = {number: place for place, number in enumerate(self._sorted())}
        self.notes: list[str] = []

    def _sorted(self) -> list[int]:
        """Return the ids of all mounts in order: after the mount below, and after the source of a bind mount.

        In the table a mount that was moved keeps its old place.
        """
        from graphlib import CycleError, TopologicalSorter

        needs = {one.id: {one.parent} & self.table.by_id.keys() - {one.id} for one in self.table.mounts}
        for one in self.table.mounts:
            if (main := self.mains.get(one.dev)) is not None and main is not one:
                needs[one.id].add(main.id)
        while True:
            try:
                return list(TopologicalSorter(needs).static_order())
            except CycleError as error:  # a tree lies on a part of itself: its mount was moved there
                self.circular.update(error.args[1])
                for number in error.args[1]:
                    needs[number] = set()

    def plan(self) -> Plan:
        found = [entry for one in self.seen if one.report.preserved and (entry := self._entry(one.entry)) is not None]
        self._lost_inside()
        self._elsewhere()
        return Plan(sorted(found, key=lambda entry: int(entry["order"])), self.notes)

    def _entry(self, entry: "MountEntry") -> Json | None:
        """Return one tree's entry, or None with a note."""
        places, main = self.table.of(entry.dev), self.mains.get(entry.dev)
        if main is None or (why := self._unreachable(main)):
            self.notes.append(f"{entry.name}: {_absent(entry, places) if main is None else why}; it stays preserved")
            return None
        said: Json = {
            "name": entry.name,
            "mountpoint": main.mountpoint,
            "options": options.with_flags(entry.options, main.flags),
            "tree": f"{entry.tree_id:016x}",
            "order": self.order[main.id],
            "on": self._on(main, entry),
        }
        binds = [bind for one in places if one is not main and (bind := self._bind(one, entry)) is not None]
        return said | {"binds": sorted(binds, key=lambda bind: int(bind["order"]))}

    def _bind(self, one: Mounted, entry: "MountEntry") -> Json | None:
        """Return a bind mount's entry, or None with a note."""
        why = self._unreachable(one)
        if not why and one.root.endswith("//deleted"):
            why = f"{one.root.removesuffix('//deleted')} is deleted"
        if not why and os.geteuid() != 0:
            why = "only root can"
        if why:
            self.notes.append(f"{one.mountpoint}, a bind mount of {_part(one, entry)}, is not mounted again: {why}")
            return None
        return {
            "mountpoint": one.mountpoint,
            "root": one.root,
            "inode": None if self.table.cover(one) else _inode(one),
            "options": options.words_of(one.own),
            "order": self.order[one.id],
            "on": self._on(one, None),
        }

    def _unreachable(self, one: Mounted) -> str:
        """Return why a mount cannot be mounted again at its path, or nothing."""
        if one.id in self.circular:
            return f"{one.mountpoint} lies on a bind mount of itself"
        cover = self.table.cover(one)
        if cover is not None and cover.dev not in self.kept:
            return f"{one.mountpoint} is covered by another mount ({cover.fstype})"
        if hider := self.table.hidden(one):
            return f"{one.mountpoint} is hidden by a mount on {hider.mountpoint} ({hider.fstype})"
        foreign: Mounted | None = None
        for upper in self.table.above(one):
            if upper.dev in self.ours and foreign is not None:
                return f"it lies on {foreign.mountpoint} ({foreign.fstype}), which is mounted inside a tree"
            if upper.dev in self.ours and upper.dev not in self.kept:
                return f"it lies in {upper.mountpoint}, which is not mounted again"
            if upper.dev not in self.ours:
                foreign = upper
        return ""

    def _on(self, one: Mounted, entry: "MountEntry | None") -> Json:
        """Return the mount below a mount, as far as it is known."""
        from pkramfs.mounting.binds import covered

        upper = self.table.by_id.get(one.parent)
        below = self.kept.get(upper.dev) if upper else None
        hangs = any(above.dev in self.silent for above in self.table.above(one))
        found = None if hangs or os.geteuid() != 0 else covered(one, self.table)
        if below is not None:
            return {"tree": f"{below.tree_id:016x}", **({"ino": found[1]} if found else {})}
        if found is None and entry is not None and one.mountpoint == entry.mountpoint:
            found = entry.on
        return {} if found is None else {"dev": found[0], "ino": found[1]}

    def _lost_inside(self) -> None:
        """Note other file systems mounted inside of trees: they are unmounted with the trees."""
        for one in self.table.mounts:
            if one.dev not in self.ours and any(upper.dev in self.kept for upper in self.table.above(one)):
                self.notes.append(f"{one.mountpoint} ({one.fstype}) is mounted inside a tree and is not mounted again")

    def _elsewhere(self) -> None:
        """Note the mounts of our trees in other mount namespaces, which end there, unless they follow our mounts."""
        groups = {one.mountpoint: one.groups for one in self.table.mounts if one.dev in self.kept}
        found: dict[int, list[str]] = {}
        for pid, mounts in namespaces():
            for one in mounts:
                if one.dev in self.mains and not one.groups & groups.get(one.mountpoint, frozenset()):
                    found.setdefault(one.dev, []).append(f"on {one.mountpoint} in that of pid {pid}")
        for dev, copies in found.items():
            more = f" and {len(copies) - _NAMED} more" if len(copies) > _NAMED else ""
            self.notes.append(
                f"{self.kept[dev].name} is mounted in other mount namespaces, too, and not mounted again there: "
                f"{', '.join(copies[:_NAMED])}{more}"
            )


def _main(entry: "MountEntry", places: Sequence[Mounted]) -> Mounted | None:
    """Return the place where the tree will be mounted; at the others it is bound."""
    whole = [one for one in places if one.root == "/"]
    return next((one for one in whole if one.mountpoint == entry.mountpoint), whole[0] if whole else None)


def _part(one: Mounted, entry: "MountEntry") -> str:
    return f"{entry.name}" if one.root == "/" else f"{one.root} of {entry.name}"


def _absent(entry: "MountEntry", places: Sequence[Mounted]) -> str:
    """Return why a tree whose daemon lives cannot be mounted again."""
    if places:
        one = places[0]
        return f"only {one.root} of it is mounted, on {one.mountpoint}, so it is not mounted again"
    for pid, mounts in namespaces():
        if there := next((one for one in mounts if one.dev == entry.dev), None):
            return (
                f"it is mounted on {there.mountpoint} in the mount namespace of pid {pid}, "
                "not in ours, so it is not mounted again"
            )
    return f"it was unmounted from {entry.mountpoint} and is still in use, so it is not mounted again"


def namespaces() -> Iterator[tuple[int, list[Mounted]]]:
    """Yield the mounts of every other mount namespace that /proc shows us, with the lowest pid that lives in it."""
    seen = {os.stat("/proc/self/ns/mnt").st_ino}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            number = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            if number not in seen:
                seen.add(number)
                yield pid, syscalls.mounts(pid)
        except OSError:
            continue  # not ours to look at, or gone


def _inode(one: Mounted) -> int | None:
    """Return the inode number of a bind mount's root."""
    try:
        with syscalls.holding(one.mountpoint, directory=False) as held:
            return os.fstat(held).st_ino if syscalls.mount_id(held) == one.id else None
    except OSError:
        return None


# -- after the boot -------------------------------------------------------------------------------


def still_there(machine: "Machine", mounts: Sequence[Json], warn: Warn) -> list[Json]:
    """Return the mounts whose tree crossed; an empty mount in the place of a lost tree would look like that tree."""
    if not mounts:
        return []
    from pkramfs.kernel.running import look

    kernel = look(machine)
    crossed = {node.name for node in kernel.store.nodes()} if kernel.info.pkram else set()
    crossed |= {node_name(entry.name) for entry in machine.mounts() if entry.alive and entry.name}
    for mount in mounts:
        if _node(mount) not in crossed:
            warn(f"{mount.get('name')} is not mounted again on {mount['mountpoint']}: its tree was lost")
    return [mount for mount in mounts if _node(mount) in crossed]


def _node(mount: Json) -> bytes:
    """Return the name of the node that an entry of nvram.json's list is preserved in."""
    return node_name(str(mount.get("name")))


class _Step(NamedTuple):
    """One place to mount on: a tree, or a bind mount of one."""

    mount: Json
    bind: Json | None
    order: tuple[int, int]

    @property
    def place(self) -> str:
        return str((self.bind or self.mount)["mountpoint"])


class _Missing(PkramfsError):
    """The mount that this one lies on was not mounted again."""


def places(mount: Json) -> list[str]:
    """Return every place of an entry."""
    return [str(one["mountpoint"]) for one in (mount, *mount.get("binds", ()))]


def restart(machine: "Machine", mounts: Sequence[Json], warn: Warn, forks: Forks) -> int:
    """Mount the preserved trees again; warn of each failure, and return the number of failures."""
    from pkramfs.cli import arguments

    with ExitStack() as held:
        failures = _run(_steps(mounts), _Work(machine, forks, held))
    for step, error in failures:
        reason = explain(error) if isinstance(error, OSError) else str(error)
        warn(f"{step.place} was not mounted again: {reason}")
        if not isinstance(error, AnsweredError):  # whose daemon has logged it
            arguments.note(machine, f"{PROGRAM}: {step.place}: {reason}")
    failed = sum(step.bind is None for step, _ in failures)
    if failed:
        stay = "stays" if failed == 1 else "stay"
        warn(f"{plural(failed, 'tree')} {stay} preserved: mount them by hand when the reason is gone")
    return len(failures)


def _steps(mounts: Sequence[Json]) -> list[_Step]:
    """Return the steps in the order in which the mounts were made."""
    steps = []
    for number, mount in enumerate(mounts):
        steps.append(_Step(mount, None, (int(mount.get("order", -1)), number)))
        steps += [_Step(mount, bind, (int(bind["order"]), number)) for bind in mount.get("binds", ())]
    return sorted(steps, key=lambda step: step.order)


def _needs(step: _Step, before: Sequence[_Step]) -> list[int]:
    """Return the numbers of earlier steps that this one lies on, or that it binds."""
    return [
        number
        for number, other in enumerate(before)
        if syscalls.inside(step.place, other.place) or (step.bind is not None and other.mount is step.mount)
    ]


def _run(steps: Sequence[_Step], work: Callable[[_Step], None]) -> list[tuple[_Step, Exception]]:
    """Do all steps, several at once, each after those that it needs; return the failures in order."""
    from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

    waiting = {number: set(_needs(step, steps[:number])) for number, step in enumerate(steps)}
    failures: dict[int, Exception] = {}
    done: set[int] = set()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 1) as pool:
        running: dict[Future[None], int] = {}
        while waiting or running:
            for number in [number for number, needs in waiting.items() if needs <= done]:
                lacking = [steps[need].place for need in waiting.pop(number) if need in failures]
                if lacking:
                    failures[number] = _Missing(f"{lacking[0]} was not, and it is needed")
                    done.add(number)
                else:
                    running[pool.submit(work, steps[number])] = number
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                number = running.pop(future)
                done.add(number)
                error = future.exception()
                if isinstance(error, PkramfsError | OSError):
                    failures[number] = error
                elif error is not None:
                    raise error
    return [(steps[number], failures[number]) for number in sorted(failures)]


def _is_bound(held: int, root: int, bind: Json) -> bool:
    """Return True if a bind mount is there already, as after a kexec of which a part had to be done again."""
    found = {one.id: one for one in syscalls.mounts()}
    there, tree = found.get(syscalls.mount_id(held)), found.get(syscalls.mount_id(root))
    return (
        there is not None
        and tree is not None
        and (there.dev, there.root, there.mountpoint) == (tree.dev, bind["root"], bind["mountpoint"])
    )


class _Work:
    """The work of a step. `held` keeps the roots of trees until all bind mounts are made."""

    def __init__(self, machine: "Machine", forks: Forks, held: ExitStack) -> None:
        self.machine, self._forks, self._held = machine, forks, held
        self._roots: dict[int, int] = {}

    def __call__(self, step: _Step) -> None:
        if step.bind is None:
            self._mount(step.mount)
        else:
            self._bind(step.mount, step.bind)

    def _mount(self, mount: Json) -> None:
        prepare(mount["mountpoint"])
        tree = int(mount["tree"], 16) if "tree" in mount else None
        self._forks.serve(mount, Expected(tree, self._on(mount)))
        if mount.get("binds"):
            self._roots[id(mount)] = self._hold(mount)

    def _hold(self, mount: Json) -> int:
        """Hold the root of a tree that was mounted, before another can be mounted over it."""
        root = syscalls.hold(mount["mountpoint"])
        self._held.callback(os.close, root)
        return root

    def _bind(self, mount: Json, bind: Json) -> None:
        from pkramfs.mounting import binds

        root, expected = self._roots[id(mount)], self._on(bind)
        with syscalls.holding(bind["mountpoint"], directory=False) as held:
            if _is_bound(held, root, bind):
                return
            if expected and not syscalls.same(syscalls.identity(held), expected):
                raise MachineError(syscalls.ANOTHER)
            flags = options.parse(",".join(bind["options"])).flags()
            binds.bind(root, bind["root"], held, flags, bind["inode"])

    def _on(self, place: Json) -> tuple[int, int | None] | None:
        """Return device and inode number of the directory that a place must be, as they are by now."""
        on = place.get("on") or {}
        if "tree" in on:
            tree = int(on["tree"], 16)
            dev = next((one.dev for one in self.machine.mounts() if one.alive and one.tree_id == tree), None)
            if dev is None:
                raise _Missing("the tree in which it lies is not mounted")
        else:
            dev = on.get("dev")
        return None if dev is None else (dev, on.get("ino"))
