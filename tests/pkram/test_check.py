# SPDX-License-Identifier: GPL-2.0-or-later
"""Checking all nodes costs so much for each node, however many there are."""

import numpy as np
import pytest

from pkramfs import spans
from pkramfs.pkram.check import check

from .conftest import SUPER_PFN, TREE


def save(store, frames, number):
    """A node of 300 single pages with holes between them."""
    ((start, _),) = frames.allocate(600)
    pfn = np.arange(start, start + 600, 2, dtype=np.uint64)
    with store.prepare_save(b"node-%d" % number, tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.save_runs(np.arange(300) * 2, pfn, np.ones_like(pfn))
        saving.finish()


def test_twice_the_nodes_take_twice_the_work(ram, store, frames, monkeypatch):
    merged, real, work = [0], spans._merge, []

    def counted(starts, ends):
        merged[0] += len(starts)
        return real(starts, ends)

    for number in range(32):
        save(store, frames, number)
        if number in (7, 15, 31):
            merged[0] = 0
            with monkeypatch.context() as patched:
                patched.setattr(spans, "_merge", counted)
                assert check(ram, SUPER_PFN).problems == []
            work.append(merged[0])
    assert work[2] < 2.2 * work[1] < 5 * work[0]


@pytest.mark.usefixtures("damaged")
def test_pages_of_two_nodes_are_named_with_the_second(ram, store, frames):
    save(store, frames, 1)
    shared = store.find(b"node-1")
    ((start, _),) = [(int(s), int(e)) for s, e in store.pages_of(shared)][:1]
    pfn = np.array([start], dtype=np.uint64)
    with store.prepare_save(b"node-2", tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.save_runs([0], pfn, [1])
        saving.finish()
    (problem,) = check(ram, SUPER_PFN).problems
    assert problem == f"node-1: 1 page from pfn {start:x} on are another node's, too"


def test_a_node_that_is_replaced_while_it_is_read_is_read_again(ram, store, frames):
    """What its frames hold by then is no damage."""
    save(store, frames, 1)
    looks = []

    def visit(node, readers, pages):
        looks.append(node.pfn)
        if len(looks) > 1:
            return []
        old = store.own_pages(node)
        with store.prepare_save(b"node-1", tree_id=TREE, frames=frames, instead=True) as saving:
            with saving.object() as writer:
                writer.write(b"new")
            saving.finish()
        frames.free(old.starts, old.counts)
        return ["its frames hold something else"]

    assert check(ram, SUPER_PFN, visit=visit).problems == []
    assert len(looks) == 2 and looks[0] != looks[1]
    assert check(ram, SUPER_PFN, visit=lambda *_: ["damage that stays"]).problems == ["node-1: damage that stays"]
