# SPDX-License-Identifier: GPL-2.0-or-later
"""The soak with real processes: mounts, saves and kexecs by command, one of them killed in each generation.

    a generation    compare every tree, change it, preserve or drop it, load a kernel, kexec, count blocks
    its victim      nobody; a mount daemon while files are written, or while it preserves; pkram-kexec;
                    the boot process. Always by SIGKILL
    its moment      what can be seen is waited for (the mount is read-only, kernel.json is gone or back,
                    the new kernel's log has so many lines), then a random delay

What may be lost is what was not preserved when its daemon was killed. A tree whose node is there must
be the tree that was saved, a tree whose node is gone must be gone whole; and after pkram-kexec or boot
was killed, every tree must be there, in the old kernel or in the next. At the end all nodes are freed,
and the free page blocks must be as many as at the beginning.

Victim, condition and delay come from the seed; where exactly a process is by then, the host decides.
Only processes of the soak's own machine are killed, by their pids.
"""

import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkramfs.kernel import running
from pkramfs.kernel.running import Running
from pkramfs.machine.directory import Machine
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.mounts import MountEntry, kill
from pkramfs.mounting import syscalls
from pkramfs.mounting.names import mount_name, node_name
from pkramfs.mounting.options import MS_RDONLY
from pkramfs.units import BLOCK_PAGES, MIB

NOBODY, WRITER, SAVER, KEXEC, BOOT = "nobody", "writer", "saver", "pkram-kexec", "boot"
VICTIMS = [NOBODY, WRITER, SAVER, SAVER, KEXEC, KEXEC, KEXEC, BOOT, BOOT]
OPTIONS = ["ro", "ro nokaslr", "ro crashkernel=8M", "ro scratch=80M", "ro quiet"]
IMAGES = ["builtin:1M", "builtin:4M", "builtin:7M", "builtin:16M"]
DEADLINE = 120.0
"""Seconds that anything may take; only a hang takes so long."""
_POLL = 0.0005
_LOG_LINES = 22
"""The most lines of a boot's log that are waited for."""
Picture = dict[str, tuple[Any, ...]]


class Difference(Exception):
    """What came back is not what was there."""


def picture(top: Path) -> Picture:
    """All that can be seen of a mounted tree, by path."""
    found: Picture = {}
    for folder, names, files in os.walk(top):
        for name in [".", *names, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            xattrs = [(key, os.getxattr(path, key, follow_symlinks=False)) for key in sorted(_xattrs(path))]
            content: Any = None
            if stat.S_ISREG(status.st_mode):
                content = status.st_size, _checksum(path)
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            identity = (status.st_ino, status.st_mode, status.st_nlink, status.st_mtime_ns, status.st_uid)
            found[os.path.relpath(path, top)] = (*identity, xattrs, content)
    return found


def _xattrs(path: str) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def _checksum(path: str) -> int:
    total = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            total = zlib.crc32(data, total)
    return total


def change(top: Path, chance: random.Random, steps: int) -> None:
    """Random changes by system calls; those that cannot be are not made."""
    for _ in range(steps):
        folders = [Path(folder) for folder, _, _ in os.walk(top)]
        if not folders:
            return  # the daemon was killed
        with suppress(OSError):  # full, not empty, not there, not connected: what a user sees, too
            _one_change(chance.choice(folders), chance.choice(folders), chance)


def _one_change(folder: Path, other: Path, chance: random.Random) -> None:
    path, target = folder / str(chance.randrange(20)), other / str(chance.randrange(20))
    what = chance.randrange(10)
    if what < 5:
        size = chance.choice([1, 4096, 70_000, chance.randrange(1, 2 << 20)])
        with open(path, "r+b" if path.is_file() and not path.is_symlink() else "xb") as file:
            file.seek(chance.choice([0, 5000, 3 << 20]))
            file.write(chance.randbytes(size))
    elif what == 5:
        path.mkdir(mode=chance.randrange(0o1000) | 0o700)
    elif what == 6:
        path.symlink_to("x" * chance.randrange(1, 2000))
    elif what == 7:
        os.link(path, target, follow_symlinks=False)
    elif what == 8:
        os.setxattr(path, f"user.{chance.randrange(3)}", chance.randbytes(chance.randrange(1000)))
    elif chance.random() < 0.5 and path.is_file():
        path.unlink()
    else:
        path.rename(target)


class Rig:
    """One machine, its mounts, and what its trees should be."""

    def __init__(self, root: str, seed: int) -> None:
        self.chance, self.root, self.seed = random.Random(seed), Path(root), seed
        self.machine, self.trees = Machine(os.path.join(root, "default")), dict[str, Picture]()
        self.env = {**os.environ, "PKRAM_ROOT": root, "PYTHONPATH": str(Path(__file__).parents[1])}
        ram, nodes = self.chance.randrange(256, 640) * MIB, self.chance.choice([1, 1, 2, 4])
        self.machine.create(FirmwareMap.default(ram, nodes, seed=self.chance.randrange(1 << 30)))
        self.killed = dict.fromkeys(VICTIMS, 0)
        self.free = self._settle()

    # -- commands ---------------------------------------------------------------------------------

    def words(self, verb: str, *words: str) -> list[str]:
        return [sys.executable, "-m", "pkramfs", verb, *words]

    def run(self, verb: str, *words: str) -> str:
        """A command that must succeed; its output."""
        done = subprocess.run(
            self.words(verb, *words), env=self.env, capture_output=True, text=True, check=False, timeout=DEADLINE
        )
        if done.returncode:
            raise Difference(f"{verb} {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, verb: str, *words: str) -> subprocess.Popen[bytes]:
        """A command that may be killed."""
        return subprocess.Popen(
            self.words(verb, *words), env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def place(self, name: str) -> Path:
        path = self.root / name
        with suppress(FileExistsError):
            path.mkdir()
        return path

    def mount(self, name: str) -> Path:
        self.run("mount", "none", str(self.root / name), "-o", f"pkram={name},size=64M")
        return self.root / name

    def remount(self, name: str, how: str) -> list[str]:
        return ["none", str(self.root / name), "-o", f"remount,{how}"]

    def unmount(self, name: str) -> None:
        """Take a mount away, dead or alive, and wait for its daemon."""
        place = str(self.root / name)
        for _ in range(3):  # a mount over a dead mount
            if subprocess.run(["fusermount3", "-u", "-z", place], capture_output=True, check=False).returncode:
                break
        self.wait(lambda: not any(entry.alive for entry in self.entries(name)), f"the daemon of {name} does not end")

    def entries(self, name: str) -> list[MountEntry]:
        return [entry for entry in self.machine.mounts() if entry.name == name]

    def wait(self, condition: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > deadline:
                raise Difference(otherwise)
            time.sleep(_POLL)

    # -- a generation -----------------------------------------------------------------------------

    def generation(self) -> None:
        """Compare, change, preserve, kexec, with one death in it; then count."""
        victim = self.chance.choice(VICTIMS)
        names = [self.compare(name) for name in sorted(self.trees)]
        names += [self.fresh() for _ in range(self.chance.randrange(1, 3) if len(names) < 3 else 0)]
        target = self.chance.choice(names) if victim in (WRITER, SAVER) else ""
        early = self.chance.random() < 0.5
        if early:
            self.load()
        for name in names:
            self.live(name, victim if name == target else NOBODY)
        if not early:
            self.load()
        self.kexec(victim if victim in (KEXEC, BOOT) else NOBODY)
        self.count()

    def fresh(self) -> str:
        name = f"t{self.chance.randrange(1 << 30)}"
        self.place(name)
        self.mount(name)
        return name

    def compare(self, name: str) -> str:
        """Mount a tree (or find it mounted) and see that it is what was saved."""
        found, expected = picture(self.mount(name)), self.trees[name]
        for path in sorted(found.keys() | expected.keys()):
            if found.get(path) != expected.get(path):
                raise Difference(f"{name}: {path}: {found.get(path)}, expected {expected.get(path)}")
        return name

    def live(self, name: str, victim: str) -> None:
        """One tree's part of a generation: changes, and its end or its preservation."""
        before = self.trees.pop(name, None)
        if self.chance.random() < 0.15 and victim == NOBODY:
            self.run("mount", *self.remount(name, "nopreserve,rw"))
            self.unmount(name)
            return
        if before is None or self.chance.random() < 0.7:
            self.run("mount", *self.remount(name, "rw"))
            if victim == WRITER:
                self.killed_while_writing(name, before)
                return
            change(self.root / name, self.chance, self.chance.randrange(40))
        os.sync()
        after = picture(self.root / name)
        if victim == SAVER:
            self.killed_while_saving(name, after)
            return
        self.run("mount", *self.remount(name, "preserve,ro"))
        self.trees[name] = after

    def killed_while_writing(self, name: str, before: Picture | None) -> None:
        """A node that is still there was not changed yet; else nobody preserved the tree, and all of it is gone."""
        (entry,) = [entry for entry in self.entries(name) if entry.alive]
        timer = threading.Timer(self.chance.uniform(0, 0.3), kill, [entry])
        timer.start()
        change(self.root / name, random.Random(self.seed), 200)
        timer.join()
        self.killed[WRITER] += 1
        self.unmount(name)
        if self.node(name):
            if before is None:
                raise Difference(f"{name} was never preserved, but has a node")
            self.trees[name] = before

    def killed_while_saving(self, name: str, after: Picture) -> None:
        """Either the node is there, and is the tree; or nothing of it is."""
        (entry,) = [entry for entry in self.entries(name) if entry.alive]
        saving = self.start("mount", *self.remount(name, "preserve,ro"))
        late = f"{name} does not become read-only"
        self.wait(lambda: _read_only(self.root / name) or saving.poll() is not None, late)
        time.sleep(self.chance.uniform(0, 0.05))
        kill(entry)
        saving.wait(DEADLINE)
        self.killed[SAVER] += 1
        self.unmount(name)
        if self.node(name):
            self.trees[name] = after

    def node(self, name: str) -> bool:
        """Whether a tree's node is published."""
        kernel = running.attach(self.machine)
        return kernel.store.find(node_name(name)) is not None

    def load(self, image: str = "", options: str = "") -> None:
        append = f"{options or self.chance.choice(OPTIONS)} pkram={self.machine.read_text('pkram')}".strip()
        self.run("kexec", "-s", "-l", image or self.chance.choice(IMAGES), f"--append={append}")

    def kexec(self, victim: str) -> None:
        """The kexec, perhaps with a death in it, and what a user does then."""
        how = ["--poison"] * (self.chance.random() < 0.5) + ["--no-remount"] * (self.chance.random() < 0.3)
        moment, delay = self._moment(victim), self.chance.uniform(0, 0.03)
        doing = self.start("kexec", "-e", *how)
        if victim != NOBODY:
            self.wait(lambda: moment() or doing.poll() is not None, "pkram-kexec does not come so far")
            time.sleep(delay)
            pids = [doing.pid] if victim == KEXEC else _children(doing.pid, b"boot")
            for pid in pids if doing.poll() is None else []:
                with suppress(ProcessLookupError):  # it was faster
                    os.kill(pid, signal.SIGKILL)
                    self.killed[victim] += 1
        status = doing.wait(DEADLINE)
        if status and victim == NOBODY:
            raise Difference(f"pkram-kexec -e: status {status}: {self.run('ctl', 'dmesg')}")
        if self.chance.random() < 0.5:
            self.run("kexec", "--resume")

    def _moment(self, victim: str) -> Callable[[], bool]:
        """What is waited for before the victim is killed."""
        kernel, log = Path(self.machine.path("kernel.json")), Path(self.machine.path("dmesg"))
        lines, since = self.chance.randrange(1, _LOG_LINES), time.monotonic() + self.chance.uniform(0, 1)
        gone: list[bool] = []

        def after() -> bool:
            if not kernel.exists():
                gone.append(True)
            return bool(gone)

        def logged() -> bool:
            return after() and _lines(log) >= lines

        def back() -> bool:
            return after() and kernel.exists()

        if victim == BOOT:
            return self.chance.choice([after, logged, logged, logged])
        return self.chance.choice([lambda: time.monotonic() > since, after, logged, logged, back])

    # -- what must be true ------------------------------------------------------------------------

    def count(self) -> None:
        """With nothing mounted: the nodes are the trees, and every page block is free or theirs."""
        for name in {entry.name for entry in self.machine.mounts() if entry.name} | set(self.trees):
            self.unmount(name)
        kernel = running.attach(self.machine)  # who was killed after the point of no return left this to us
        self.run("ctl", "verify")
        kernel.sweep()
        nodes = {mount_name(node.name) or node.name.decode() for node in kernel.store.nodes()}
        if nodes != set(self.trees):
            raise Difference(f"nodes {sorted(nodes)}, expected {sorted(self.trees)}")
        counts, own = kernel.leases.counts(), _own_blocks(kernel)
        if counts["kernel"] > own:
            raise Difference(f"{counts['kernel']} page blocks belong to the kernel, expected {own} at most")
        if counts["tree"] and not nodes:
            raise Difference(f"{counts['tree']} page blocks belong to trees, expected none")

    def _settle(self) -> int:
        """Free page blocks of an empty machine with one kernel that is always the same."""
        running.attach(self.machine)
        self.load("builtin:4M", "ro")
        self.run("kexec", "-e")
        kernel = running.attach(self.machine)
        kernel.sweep()
        return kernel.leases.counts()["free"]

    def finish(self) -> None:
        """Free everything: the machine must have as much memory as in the beginning."""
        for name in sorted(self.trees):
            self.compare(name)
            self.unmount(name)
            self.run("ctl", "free", name)
        self.trees = {}
        free = self._settle()
        if free != self.free:
            raise Difference(f"{free} free page blocks with nothing preserved, expected {self.free}")

    def stop(self, *, kept: bool) -> None:
        """Take every mount away; where RAM is evidence, its daemon dies first and changes nothing more."""
        for entry in self.machine.mounts():
            if kept:
                kill(entry)
            if entry.name:
                self.unmount(entry.name)


def _own_blocks(kernel: Running) -> int:
    return (kernel.info.own_pages - kernel.info.reserve_pages).outward(BLOCK_PAGES).total


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _read_only(place: Path) -> bool:
    """Whether the mount is read-only, without asking its daemon."""
    found = syscalls.mounted_at(str(place))
    return found is None or bool(found.flags & MS_RDONLY)  # None: gone


def _children(pid: int, word: bytes) -> list[int]:
    """Children of a process that have a word on their command line."""
    children: list[str] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += task.read_text().split()
    return [int(child) for child in children if word in _words(child)]


def _words(pid: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []  # it has ended
