# SPDX-License-Identifier: GPL-2.0-or-later
"""The core against a dictionary: any order of saves, loads, withdrawals, deaths and kernels."""

import contextlib
import os
import tempfile

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from pkramfs.errors import PkramError
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.machine.ram import Ram
from pkramfs.pkram import regions, superblock
from pkramfs.pkram.check import check
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_PAGES, BLOCK_SIZE

BLOCKS = 64
NAMES = st.sampled_from([b"a", b"b", b"shmem-mytmpfs", b"\xff" * 255])
LAYOUT = st.lists(st.tuples(st.sampled_from([1, 2, 7, 64, 513]), st.integers(0, 3), st.booleans()), max_size=12)


class Core(RuleBasedStateMachine):
    """`model` says what each published name holds: bytes, and the first word of each page by index.

    `living` are the owners of the bundle that are alive, whether they have leased anything or not: their locks
    would be held, so no sweep takes from them. A kexec ends them all.
    """

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.ram = Ram(os.path.join(self.directory.name, "ram"), BLOCKS * BLOCK_SIZE, create=True)
        self.leases = Leases(self.ram, 1, BLOCKS, contextlib.nullcontext)
        self.leases.ids[0] = KERNEL
        self.super_pfn, self.generation, self.next_id = 9, 1, 1000
        superblock.create(self.ram, self.super_pfn, self.generation)
        self.model: dict[bytes, tuple[bytes, dict[int, int]]] = {}
        self.homes: dict[bytes, Frames] = {}
        self.living: set[int] = set()

    def teardown(self) -> None:
        self.ram.close()
        self.directory.cleanup()

    @property
    def store(self) -> Store:
        """A process of its own each time: nothing is remembered but what lies in RAM."""
        return Store(self.ram, self.super_pfn, contextlib.nullcontext)

    @rule(target=owners)
    def begin_owner(self):
        self.next_id += 1
        self.living.add(self.next_id)
        return Frames(self.ram, self.leases, self.next_id)

    def write(self, saving, frames, layout, data):
        """Save runs as `layout` says: (pages, hole after them, in a call of its own)."""
        words, index, runs, taken = {}, 0, [], []
        with saving.object() as writer:
            writer.write(data)
            for size, hole, alone in layout:
                taken += (got := frames.allocate(size))
                for pfn, count in got:
                    for page in range(count):
                        words[index + page] = self.ram.words(pfn + page)[0] = self.next_id * 1000 + index + page
                    runs.append((index, pfn, count))
                    index += count
                index += hole
                if alone and runs:
                    writer.save_runs(*zip(*runs, strict=True))
                    runs = []
            if runs:
                writer.save_runs(*zip(*runs, strict=True))
        return {key: int(value) for key, value in words.items()}, taken

    @rule(
        frames=consumes(owners),
        name=NAMES,
        layout=LAYOUT,
        data=st.binary(max_size=9000),
        strict=st.booleans(),
        align=st.booleans(),
        ban=st.integers(0, 40),
        end=st.sampled_from(["finish", "finish", "finish", "leave", "die"]),
    )
    def save(self, frames, name, layout, data, strict, align, ban, end):
        banned = Spans([(BLOCK_PAGES * 3 + ban * 40, BLOCK_PAGES * 3 + ban * 60)])
        if frames.tree_id not in self.living:
            return
        self.living.remove(frames.tree_id)
        words = {"tree_id": frames.tree_id, "frames": frames, "banned": banned, "strict": strict, "align": align}
        try:
            saving = self.store.prepare_save(name, **words)
        except PkramError:
            assert name in self.model
            return
        assert name not in self.model
        try:
            written, taken = self.write(saving, frames, layout, data)
        except PkramError:
            saving.discard()
            raise
        if end == "finish":
            node = saving.finish()
            assert not self.store.pages_of(node) & banned
            self.model[name], self.homes[name] = (data, written), frames
        elif end == "leave":
            saving.discard()
            assert frames.used() == Spans((a, a + n) for a, n in taken)
            self.leases.release(frames.tree_id, self.leases.blocks_of(frames.tree_id))
        # who dies has published nothing; the sweep takes it

    @rule(name=NAMES, consume=st.booleans())
    def load(self, name, consume):
        try:
            load = self.store.prepare_load(name, consume=consume)
        except PkramError:
            assert name not in self.model
            return
        data, words = self.model[name]
        with load:
            (reader,) = load
            assert reader.read() == data
            runs = zip(*(column.tolist() for column in reader.load_runs()), strict=True)
            found = {i + k: int(self.ram.words(p + k)[0]) for i, p, n in runs for k in range(n)}
        assert found == words
        if consume:
            del self.model[name], self.homes[name]

    @rule(target=owners, name=NAMES)
    def take_back(self, name):
        """What `remount,rw` does: withdraw the node, free its metadata, go on with the frames."""
        if name not in self.model:
            return multiple()
        frames = self.homes.pop(name)
        metadata = self.store.metadata_pages(name)
        self.store.withdraw(name)
        frames.free(metadata.starts, metadata.counts)
        used = frames.used()
        frames.free(used.starts, used.counts)
        del self.model[name]
        self.living.add(frames.tree_id)
        return frames

    @rule(target=owners, name=NAMES)
    def restart_owner(self, name):
        """A daemon dies after preserving, another adopts what its node names."""
        if name not in self.model:
            return multiple()
        node = self.store.find(name)
        heir = Frames(self.ram, self.leases, node.tree_id)
        heir.adopt(self.store.pages_of(node))
        assert heir.used() == self.store.pages_of(node)
        self.homes[name] = heir
        return multiple()

    @rule()
    def sweep(self):
        live = {frames.tree_id for frames in self.homes.values()} | self.living
        self.leases.sweep(lambda: self.store.preserved_ids() | live)

    @rule()
    def kexec(self):
        """The end of a kernel: list everything, punch the rest, a new super block, the old one consumed."""
        taken = self.store.preserved() | Spans([(self.super_pfn, self.super_pfn + 1)])
        spare = iter(pfn for pfn in range(10, BLOCK_PAGES) if pfn != self.super_pfn)
        head = regions.build(self.ram, taken, lambda n: np.array([next(spare) for _ in range(n)], dtype=np.uint64))
        superblock.set_regions(self.ram, self.super_pfn, head)
        listed = regions.read(self.ram, head)
        assert not taken - listed
        self.ram.poison(self.ram.data_spans() - listed - Spans([(0, 10)]))
        self.generation, self.living = self.generation + 1, set()
        new = 9 if self.super_pfn != 9 else 400
        superblock.create(self.ram, new, self.generation, superblock.check(self.ram, self.super_pfn).node_pfn)
        superblock.consume(self.ram, self.super_pfn)
        self.super_pfn = new
        for name, home in self.homes.items():
            node = self.store.find(name)
            home.adopt(self.store.pages_of(node))

    @invariant()
    def sound(self):
        report = check(self.ram, self.super_pfn, owned=lambda tree: self.leases.blocks_of(tree).scale(BLOCK_PAGES))
        assert report.problems == []
        assert {node.name for node in report.nodes} == set(self.model)


TestCore = Core.TestCase
TestCore.settings = settings(max_examples=settings.default.max_examples * 2 // 5, stateful_step_count=30, deadline=None)
