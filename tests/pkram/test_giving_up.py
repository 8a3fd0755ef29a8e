# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes that cannot be read are given up, one store each; all that can still be reached stays."""

import pytest

from pkramfs.errors import FormatError
from pkramfs.pkram.check import check
from pkramfs.pkram.format import NEXT
from pkramfs.pkram.page import corrected, seal, write_word

from .conftest import SUPER_PFN, TREE

NAMES = [b"d", b"c", b"b", b"a"]
"""Four nodes in the order of the list, newest first."""


@pytest.fixture
def nodes(store, frames):
    for number, name in enumerate(reversed(NAMES)):
        with store.prepare_save(name, tree_id=TREE + number, frames=frames) as saving:
            with saving.object() as writer:
                writer.write(name)
            saving.finish()
    return {node.name: node.pfn for node in store.nodes()}


@pytest.mark.parametrize("hit", [{0}, {1}, {3}, {1, 2}, {0, 3}, {0, 1, 2, 3}])
def test_what_can_be_read_stays(ram, store, nodes, hit):
    for number in hit:
        ram.page(nodes[NAMES[number]])[104] ^= 1  # the name
    kept = [name for number, name in enumerate(NAMES) if number not in hit]
    with pytest.raises(FormatError, match=r"checksum .*; `pkramctl free --damaged` gives up"):
        store.nodes()
    assert [error.pfn for error in store.withdraw_damaged()] == [nodes[NAMES[number]] for number in sorted(hit)]
    assert [node.name for node in store.nodes()] == kept
    for name in kept:
        with store.prepare_load(name) as load:
            assert next(iter(load)).read() == name
    assert store.withdraw_damaged() == []


@pytest.mark.parametrize("flipped", [1, 3])
@pytest.mark.parametrize("where", range(-1, 4))
def test_a_broken_list_ends_where_it_breaks_but_one_bit_breaks_nothing(ram, store, nodes, where, flipped):
    page = SUPER_PFN if where < 0 else nodes[NAMES[where]]
    ram.page(page)[NEXT] ^= flipped
    (problem,) = store.withdraw_damaged()
    assert (problem.field, problem.pfn) == ("node" if where < 0 else "next", page)
    assert [node.name for node in store.nodes()] == (NAMES if flipped == 1 else NAMES[: where + 1])


@pytest.mark.parametrize("bit", range(64))
def test_one_flipped_bit_of_a_word_is_told(bit):
    for pfn, address in ((0, 0x5010), (0x34F, 0x5010), (0x12345678, 0xFFFF0010)):
        assert corrected(seal(pfn, address) ^ 1 << bit, address) == pfn
        assert corrected(seal(pfn, address), address) is None
        assert corrected(seal(pfn, address) ^ 1 << bit ^ 1 << (bit + 7) % 64, address) is None


@pytest.mark.parametrize("leads_to", ["itself", "outside"])
def test_a_list_that_leads_astray(ram, store, nodes, leads_to):
    page = nodes[b"b"]
    write_word(ram, page, NEXT, nodes[b"c"] if leads_to == "itself" else ram.pages + 5)
    assert len(store.withdraw_damaged()) == 1
    assert [node.name for node in store.nodes()] == [b"d", b"c", b"b"]
    assert ram.load((page << 12) + NEXT) == seal(0, (page << 12) + NEXT)


def test_a_node_that_is_gone_altogether(ram, store, nodes):
    ram.page(nodes[b"c"])[:] = bytes(4096)
    assert [error.field for error in store.withdraw_damaged()] == ["magic", "next"]
    assert [node.name for node in store.nodes()] == [b"d"]
    assert check(ram, SUPER_PFN).problems == []


def test_damage_below_a_node_is_that_node_s_alone(ram, store, nodes):
    table = store.find(b"c").table_pfn
    ram.page(table)[8] ^= 1
    assert store.withdraw_damaged() == [], "the node itself can be read, and freed by name"
    with pytest.raises(FormatError, match=r"; `pkramctl free c` gives the node up$"):
        store.prepare_load(b"c")
    assert store.withdraw(b"c").pfn == nodes[b"c"]
