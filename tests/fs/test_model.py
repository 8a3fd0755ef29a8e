# SPDX-License-Identifier: GPL-2.0-or-later
"""Random calls on the tree against a model that is a dictionary of paths."""

import errno
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pkramfs.fs.tree import Tree

NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff" * 255])
PICK = st.integers(0, 50)


class TreeMachine(RuleBasedStateMachine):
    """`model`: path (tuple of names) to content: bytes of a file (a list cell shared by hard links) or None."""

    new_tree = None  # set by the test: makes (tree, audit, way to save and restore a tree)

    @initialize()
    def start(self) -> None:
        self.tree, self.audit, self.again = type(self).new_tree()
        self.model: dict[tuple[bytes, ...], list | None] = {(): None}
        self.handles: list[tuple[int, list]] = []

    # -- helpers ----------------------------------------------------------------------------------

    def folder(self, pick: int) -> tuple[bytes, ...]:
        folders = sorted(path for path, cell in self.model.items() if cell is None)
        return folders[pick % len(folders)]

    def ino(self, path: tuple[bytes, ...]) -> int:
        ino = 1
        for name in path:
            ino = self.tree.lookup(ino, name).ino
        return ino

    def call(self, expected: int, function, *arguments):
        """The call fails with `expected`, or does not where it is 0."""
        try:
            result = function(*arguments)
        except OSError as error:
            assert error.errno == expected, (error, errno.errorcode.get(expected))
            return None
        assert not expected, errno.errorcode[expected]
        return result

    def below(self, path: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
        return [p for p in self.model if len(p) > len(path) and p[: len(path)] == path]

    # -- calls ------------------------------------------------------------------------------------

    @rule(pick=PICK, name=NAMES, directory=st.booleans())
    def create(self, pick: int, name: bytes, directory: bool) -> None:
        folder = self.folder(pick)
        path = (*folder, name)
        make = self.tree.mkdir if directory else self.tree.create
        self.call(errno.EEXIST if path in self.model else 0, make, self.ino(folder), name, 0o700)
        if path not in self.model:
            self.model[path] = None if directory else [bytearray()]

    @rule(pick=PICK, name=NAMES)
    def unlink(self, pick: int, name: bytes) -> None:
        folder = self.folder(pick)
        path = (*folder, name)
        expected = 0 if path in self.model else errno.ENOENT
        if path in self.model and self.model[path] is None:
            expected = errno.EISDIR
        self.call(expected, self.tree.unlink, self.ino(folder), name)
        if not expected:
            del self.model[path]

    @rule(pick=PICK, name=NAMES)
    def rmdir(self, pick: int, name: bytes) -> None:
        folder = self.folder(pick)
        path = (*folder, name)
        expected = 0 if path in self.model else errno.ENOENT
        if path in self.model and self.model[path] is not None:
            expected = errno.ENOTDIR
        elif self.below(path):
            expected = errno.ENOTEMPTY
        self.call(expected, self.tree.rmdir, self.ino(folder), name)
        if not expected:
            del self.model[path]

    @rule(pick=PICK, name=NAMES, other=PICK, new=NAMES)
    def link(self, pick: int, name: bytes, other: int, new: bytes) -> None:
        old, folder = (*self.folder(pick), name), self.folder(other)
        if old not in self.model:
            return
        path = (*folder, new)
        expected = errno.EEXIST if path in self.model else 0
        if self.model[old] is None:
            expected = errno.EPERM
        self.call(expected, self.tree.link, self.ino(old), self.ino(folder), new)
        if not expected:
            self.model[path] = self.model[old]

    @rule(pick=PICK, name=NAMES, other=PICK, new=NAMES, flags=st.sampled_from([0, 0, 1, 2]))
    def rename(self, pick: int, name: bytes, other: int, new: bytes, flags: int) -> None:
        source, target = self.folder(pick), self.folder(other)
        old, path = (*source, name), (*target, new)
        expected = self.rename_refusal(old, path, flags)
        self.call(expected, self.tree.rename, self.ino(source), name, self.ino(target), new, flags)
        if expected or old == path:
            return
        if self.model.get(path, 0) is self.model[old] is not None:
            return  # two names of one file
        self.move(old, path, exchange=flags == 2)

    def rename_refusal(self, old: tuple[bytes, ...], path: tuple[bytes, ...], flags: int) -> int:
        model = self.model
        if old not in model:
            return errno.ENOENT
        if path in model and flags == 1:
            return errno.EEXIST
        if path not in model and flags == 2:
            return errno.ENOENT
        if model[old] is None and len(path) > len(old) and path[: len(old)] == old:
            return errno.EINVAL
        if path in model and model[path] is None and len(old) > len(path) and old[: len(path)] == path:
            return errno.EINVAL if flags == 2 else errno.ENOTEMPTY
        if path not in model or flags == 2 or old == path:
            return 0
        if model[old] is None and model[path] is not None:
            return errno.ENOTDIR
        if model[old] is not None and model[path] is None:
            return errno.EISDIR
        return errno.ENOTEMPTY if self.below(path) else 0

    def move(self, old: tuple[bytes, ...], path: tuple[bytes, ...], *, exchange: bool) -> None:
        one = {p[len(old) :]: self.model.pop(p) for p in [old, *self.below(old)]}
        two = {p[len(path) :]: self.model.pop(p) for p in [path, *self.below(path)] if p in self.model}
        self.model |= {path + rest: cell for rest, cell in one.items()}
        if exchange:
            self.model |= {old + rest: cell for rest, cell in two.items()}

    @rule(pick=PICK, offset=st.integers(0, 20_000), size=st.integers(1, 9000))
    @precondition(lambda self: any(self.model.values()))
    def write(self, pick: int, offset: int, size: int) -> None:
        files = sorted(path for path, cell in self.model.items() if cell is not None)
        path = files[pick % len(files)]
        cell, data = self.model[path], bytes([pick + 1]) * size
        self.call(0, self.tree.write, self.ino(path), offset, data)
        cell[0].extend(bytes(max(offset + size - len(cell[0]), 0)))
        cell[0][offset : offset + size] = data

    @rule(pick=PICK, size=st.integers(0, 20_000))
    @precondition(lambda self: any(self.model.values()))
    def truncate(self, pick: int, size: int) -> None:
        files = sorted(path for path, cell in self.model.items() if cell is not None)
        path = files[pick % len(files)]
        cell = self.model[path]
        self.tree.setattr(self.ino(path), size=size)
        cell[0] = cell[0][:size] + bytes(max(size - len(cell[0]), 0))

    @rule(pick=PICK)
    @precondition(lambda self: any(self.model.values()))
    def open(self, pick: int) -> None:
        files = sorted(path for path, cell in self.model.items() if cell is not None)
        path = files[pick % len(files)]
        self.handles.append((self.tree.open(self.ino(path), pick % 3), self.model[path]))

    @rule(pick=PICK)
    @precondition(lambda self: self.handles)
    def read_and_close(self, pick: int) -> None:
        handle, cell = self.handles.pop(pick % len(self.handles))
        assert bytes(self.tree.read(handle, 0, 1 << 20)) == cell[0]
        self.tree.release(handle)

    @rule()
    @precondition(lambda self: not self.handles)
    def kexec(self) -> None:
        self.tree = self.again(self.tree)

    # -- what always holds ------------------------------------------------------------------------

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "tree"):
            return
        found = {}
        stack: list[tuple[tuple[bytes, ...], int]] = [((), 1)]
        while stack:
            path, ino = stack.pop()
            inode = self.tree.inode(ino)
            found[path] = None if inode.entries is not None else bytes(self.tree.read(ino, 0, inode.size))
            if inode.entries is not None:
                stack += [((*path, name), child.ino) for name, child, _ in self.tree.readdir(ino, 2)]
        assert found == {path: cell and bytes(cell[0]) for path, cell in self.model.items()}

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            self.audit(self.tree)
            for handle, _ in self.handles:
                self.tree.release(handle)
            self.audit(self.tree)
            assert len(self.tree.inodes) == len({id(c) if c else p for p, c in self.model.items()})


class SleepyMachine(TreeMachine):
    """The same, looked at as a whole only in the end: what nobody asks for stays asleep from one kexec to the next."""

    def same(self) -> None:
        pass

    def teardown(self) -> None:
        TreeMachine.same(self)
        super().teardown()


@pytest.mark.parametrize("machine", [TreeMachine, SleepyMachine])
def test_the_tree_is_a_dictionary(small_round_trip, sh, machine) -> None:
    def new_tree():
        tree, again = small_round_trip()
        return tree, sh.audit, again

    machine.new_tree = staticmethod(new_tree)
    machine.TestCase.settings = settings(
        max_examples=settings.default.max_examples // 5, stateful_step_count=40, deadline=None
    )
    machine.TestCase().runTest()


def test_an_empty_file_costs_less_than_a_kilobyte(tree: Tree) -> None:
    """Objects of one file with a name of 20 bytes, and its share of the tables."""
    total = 10_000
    names = [b"%020d" % number for number in range(total)]
    for name in names:
        tree.create(1, name, 0o644)
    entries = tree.root.entries
    shared = sum(map(sys.getsizeof, (tree.inodes, entries.entries, entries._names, entries._cookies)))
    inode = tree.lookup(1, names[5])
    own = sys.getsizeof(inode) + 16 + sys.getsizeof(names[5]) + sys.getsizeof(entries.entries[names[5]]) + 16
    own += sum(sys.getsizeof(value) for value in (inode.ino, inode.mode, inode.ctime, 10**6))
    assert own + shared / total < 1024
    assert own + shared / total < 700, "leave room for what the door keeps"
