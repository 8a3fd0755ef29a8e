# SPDX-License-Identifier: GPL-2.0-or-later
"""The soak: one machine after another, each living through generations of random everything.

    a generation    restore every tree, compare it with what it was; change it; make and drop trees;
                    save, before or after a kernel is loaded; kexec, killed at a random step or not
    a machine       20 generations on random hardware

What is compared is a picture of the tree: every path with its kind, mode, times, links, target, xattrs
and the checksum of its bytes. After each boot the page blocks are counted: none may leak. Everything
goes through the library, in one process and without FUSE; a kill is an exception at that step.
`--processes` does the like with real mounts, commands and SIGKILL (killing.py).

The seed is printed; the same seed does the same. The first difference ends it and keeps the machine.
"""

import argparse
import os
import random
import shutil
import stat
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Generator
from typing import Any

from pkramfs.errors import ExhaustedError
from pkramfs.fs.limits import Limits
from pkramfs.fs.restore import restore
from pkramfs.fs.save import save
from pkramfs.fs.tree import Tree
from pkramfs.kernel import boot, kexec, loading, running, succession
from pkramfs.kernel.loading import Request
from pkramfs.kernel.running import Running
from pkramfs.machine.directory import Machine
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.machine.mounts import MountLock
from pkramfs.machine.policy import Policy
from pkramfs.units import BLOCK_PAGES, MIB, format_pfn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import killing

GENERATIONS = 20
STEPS = [step.__name__ for step in boot.STEPS]
OPTIONS = ["ro", "nokaslr", "ro crashkernel=8M", "ro scratch=80M", "ro quiet"]
POLICIES = [None, None, "prefer:0", "interleave"]
Picture = dict[bytes, tuple[Any, ...]]


class Died(BaseException):
    """The process was killed."""


class Difference(Exception):
    """What came back is not what was there."""


class Mounted:
    """A tree as a mount daemon has it."""

    def __init__(self, kernel: Running, name: bytes, policy: Policy | None) -> None:
        self.kernel, self.name = kernel, name
        node = kernel.store.find(name)
        self.lock: MountLock = kernel.machine.claim(node.tree_id if node else new_tree_id())
        self.frames = Frames(kernel.ram, kernel.leases, self.lock.tree_id, policy)
        if node:
            self.tree = exhaust(restore(kernel.store, name, kernel.ram, self.frames, Limits()))
        else:
            self.tree = Tree(kernel.ram, self.frames, Limits())

    def preserve(self) -> None:
        """Save, unless nothing has changed since it was restored."""
        self.tree.freeze()
        if not self.tree.preserved:
            exhaust(save(self.tree, self.kernel.store, self.name, banned=self.kernel.banned()))

    def drop(self) -> None:
        """Umount a tree that nobody preserves."""
        if self.tree.preserved:
            self.tree.preservation.withdraw()
        self.frames.release_all()
        self.lock.release()


def exhaust(steps: Generator[Any, None, Any]) -> Any:
    """The result of a long work."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def picture(tree: Tree) -> Picture:
    """All that can be seen of a tree, by path."""
    found: Picture = {}
    below = [(b"", tree.root)]
    while below:
        path, inode = below.pop()
        kind = stat.S_IFMT(inode.mode)
        xattrs = tuple((name, tree.getxattr(inode.ino, name)) for name in sorted(tree.listxattr(inode.ino)))
        content: Any = None
        if kind == stat.S_IFREG:
            content = inode.size, zlib.crc32(bytes(tree.read(inode.ino, 0, inode.size)))
        elif kind == stat.S_IFLNK:
            content = tree.readlink(inode.ino)
        elif kind == stat.S_IFDIR:
            names = list(tree.readdir(inode.ino, 2))
            content = [name for name, _, _ in names]
            below += [(path + b"/" + name, child) for name, child, _ in names]
        found[path] = (inode.ino, inode.mode, inode.nlink, inode.mtime, inode.ctime, xattrs, content)
    return found


def change(tree: Tree, chance: random.Random, steps: int) -> None:
    """Random changes; those that cannot be are not made."""
    for _ in range(steps):
        try:
            _one_change(tree, chance)
        except OSError:
            continue  # full, not empty, not there: what a user sees, too


def _one_change(tree: Tree, chance: random.Random) -> None:
    tree.wake()
    folders = [inode.ino for inode in tree.inodes.values() if stat.S_ISDIR(inode.mode) and inode.nlink]
    files = [inode.ino for inode in tree.inodes.values() if stat.S_ISREG(inode.mode) and inode.nlink]
    parent, name = chance.choice(folders), b"%d" % chance.randrange(30)
    what = chance.randrange(12)
    if what < 3 or not files:
        tree.create(parent, name, chance.randrange(0o1000))
    elif what < 6:
        size = chance.choice([1, 100, 4096, 70_000, chance.randrange(1 << 20)])
        tree.write(chance.choice(files), chance.choice([0, 5000, 1 << 21, 1 << 23]), chance.randbytes(size))
    elif what == 6:
        tree.mkdir(parent, name, 0o755)
    elif what == 7:
        tree.symlink(parent, name, chance.randbytes(chance.randrange(1, 3000)).replace(b"\0", b"x"))
    elif what == 8:
        tree.link(chance.choice(files), parent, name)
    elif what == 9:
        tree.setxattr(chance.choice(files), b"user.%d" % chance.randrange(5), chance.randbytes(chance.randrange(2000)))
    elif what == 10:
        _remove(tree, parent, name)
    else:
        tree.rename(parent, name, chance.choice(folders), b"%d" % chance.randrange(30))


def _remove(tree: Tree, parent: int, name: bytes) -> None:
    inode = tree.lookup(parent, name)
    if inode is not None:
        (tree.rmdir if stat.S_ISDIR(inode.mode) else tree.unlink)(parent, name)


class Soak:
    """One machine and what its trees should be."""

    def __init__(self, root: str, seed: int) -> None:
        self.chance, self.die_after, self.killed = random.Random(seed), "", {"at a step": 0}
        self.machine, self.trees = Machine(os.path.join(root, "machine")), dict[bytes, Picture]()
        ram, nodes = self.chance.randrange(160, 640) * MIB, self.chance.choice([1, 1, 2, 4])
        self.hardware = FirmwareMap.default(ram, nodes, seed=self.chance.randrange(1 << 30))
        self.machine.create(self.hardware)
        succession.start_boot = self._boot

    def _boot(self, machine: Machine, *, force: bool = False) -> None:
        boot.boot(machine, force=force, after_step=self._after)

    def _after(self, step: str) -> None:
        if step == self.die_after:
            self.die_after = ""
            self.killed["at a step"] += 1
            raise Died(step)

    def generation(self) -> None:
        """Compare, change, preserve, kexec."""
        kernel = running.attach(self.machine)
        self._count(kernel)
        mounts = [self._mount(kernel, name) for name in sorted(self.trees)]
        for _ in range(self.chance.randrange(3)):
            name = b"shmem-%d" % self.chance.randrange(1 << 30)
            mounts.append(Mounted(kernel, name, self._policy()))
        kernel.sweep()
        for mounted in mounts:
            if self.chance.random() < 0.7:
                change(mounted.tree, self.chance, self.chance.randrange(60))
        early = self.chance.random() < 0.5
        if early:
            self._load(kernel)
        self._preserve(mounts)
        if not early:
            self._load(kernel)
        self._kexec()

    def _policy(self) -> Policy | None:
        return Policy.parse(self.chance.choice(POLICIES), self.hardware)

    def _mount(self, kernel: Running, name: bytes) -> Mounted:
        mounted, expected = Mounted(kernel, name, self._policy()), self.trees[name]
        found = picture(mounted.tree)
        for path in sorted(found.keys() | expected.keys()):
            if found.get(path) != expected.get(path):
                raise Difference(f"{name!r} {path!r}: {found.get(path)}, expected {expected.get(path)}")
        return mounted

    def _preserve(self, mounts: list[Mounted]) -> None:
        self.trees = {}
        for mounted in mounts:
            if self.chance.random() < 0.2:
                mounted.drop()
                continue
            seen = picture(mounted.tree)
            try:
                mounted.preserve()
            except ExhaustedError:  # RAM is full; nothing of the node may be left
                mounted.drop()
                continue
            self.trees[mounted.name] = seen
            mounted.lock.release()

    def _load(self, kernel: Running) -> None:
        append = f"{self.chance.choice(OPTIONS)} pkram={format_pfn(kernel.info.super_pfn)}"
        for option in (append, f"ro pkram={format_pfn(kernel.info.super_pfn)}"):
            try:
                request = Request(f"builtin:{self.chance.randrange(1, 16)}M", append=option)
                loading.load(self.machine, request)
                return
            except ExhaustedError:
                continue  # too little room for this kernel: a smaller one

    def _kexec(self) -> None:
        self.die_after = self.chance.choice([*STEPS, *[""] * len(STEPS)])
        try:
            with self.machine.lifecycle(shared=False):
                plan = kexec.plan(self.machine, [], poison=self.chance.random() < 0.5)
                if plan.problems and isinstance(plan.problems[0], ExhaustedError):
                    return  # refused while the old kernel lives: it goes on
                plan.execute()
        except Died:
            running.attach(self.machine)

    def finish(self) -> None:
        """The last generation's trees, once more."""
        self._count(running.attach(self.machine))

    def stop(self, *, kept: bool) -> None:
        """Nothing runs here that would have to end."""

    def _count(self, kernel: Running) -> None:
        """Every page block is free or has an owner that is preserved, and nothing preserved is missing."""
        kernel.sweep()
        names = {node.name for node in kernel.store.nodes()}
        if names != set(self.trees):
            raise Difference(f"nodes {sorted(names)}, expected {sorted(self.trees)}")
        blocks, counts = kernel.store.preserved().outward(BLOCK_PAGES).total, kernel.leases.counts()
        if counts["tree"] < blocks or (counts["tree"] and not names):
            raise Difference(f"{counts['tree']} page blocks belong to trees, expected {blocks}")
        own = (kernel.info.own_pages - kernel.info.reserve_pages).outward(BLOCK_PAGES).total
        if counts["kernel"] > own:
            raise Difference(f"{counts['kernel']} page blocks belong to the kernel, expected {own} at most")


def main() -> int:
    """Soak until the time is over, the generations are lived, or something is wrong."""
    args = _parser().parse_args()
    print(f"soak: seed {args.seed}", flush=True)
    end, seed, generations = time.monotonic() + args.seconds, args.seed, 0
    while time.monotonic() < end and generations < args.generations:
        root = tempfile.mkdtemp(prefix="pkram-soak-", dir=args.keep or "/dev/shm")
        soak = killing.Rig(root, seed) if args.processes else Soak(root, seed)
        try:
            for _ in range(GENERATIONS):
                if time.monotonic() >= end or generations >= args.generations:
                    break
                soak.generation()
                generations += 1
            soak.finish()
        except KeyboardInterrupt:
            end = 0.0
        except Exception:
            traceback.print_exc()
            soak.stop(kept=True)
            where = soak.machine.path()
            print(f"soak: seed {seed} failed after {generations} generations; the machine is kept in {where}")
            return 1
        soak.stop(kept=False)
        _tell_deaths(soak.killed)
        shutil.rmtree(root)
        seed += 1
    print(f"soak: {generations} generations, no difference")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="soak", description="Random generations until told to stop.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long (default: until ^C)")
    parser.add_argument("--generations", type=float, default=float("inf"), help="how many (default: until ^C)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--keep", metavar="DIR", help="where machines are made (default: /dev/shm)")
    parser.add_argument("--processes", action="store_true", help="real mounts and commands, killed by SIGKILL")
    return parser


def _tell_deaths(killed: dict[str, int]) -> None:
    deaths = ", ".join(f"{count} {victim}" for victim, count in killed.items() if count)
    print(f"soak: killed: {deaths or 'nobody'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
