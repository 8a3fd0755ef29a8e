# SPDX-License-Identifier: GPL-2.0-or-later
"""One flipped bit in what leads to nodes: no tree that is whole is lost, and what is lost is named before."""

import contextlib
from typing import Any

import pytest

from pkramfs.errors import FormatError, PkramfsError
from pkramfs.kernel import running
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NEXT, NODE, SUPER
from pkramfs.pkram.page import seal_page, write_word
from pkramfs.pkram.rescue import Survey
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE
from tests.support.lab import Died

NAMES = ["c", "b", "a"]
"""In the order of the list, newest first."""


class Picture:
    """All of a RAM as it is now, to be put back after each attack."""

    def __init__(self, ram: Ram) -> None:
        self.ram, self._pages = ram, {start: bytes(ram.page(start, end - start)) for start, end in ram.data_spans()}

    def put_back(self) -> None:
        self.ram.punch(self.ram.data_spans())
        for start, data in self._pages.items():
            self.ram.page(start, len(data) // PAGE_SIZE)[:] = data


@pytest.fixture
def three(lab: Any) -> Any:
    for seed, name in enumerate(reversed(NAMES)):
        lab.preserve(name, 40, seed=seed)
    lab.picture = Picture(lab.up().ram)
    return lab


def mend(lab: Any) -> tuple[Survey, dict[str, list[str]]]:
    """Do what `pkramctl free --damaged` does; return the survey, and the messages before the first store."""
    kernel, said, seen = running.look(lab.machine), dict[str, list[str]](), []
    kernel.mend(seen.append)
    with lab.machine.tables():
        kernel.ownership.mend(lambda kind, line: said.setdefault(kind, []).append(line))
    kernel.sweep()
    return seen[0], said


def bits(record: Any, rest: int, some: Any) -> list[int]:
    """Return every bit of a record's fields and two of the rest; without --long 24, and 10 of `next`."""
    link = range(NEXT * 8, NEXT * 8 + 64)
    other = [bit for bit in range(record.size * 8) if bit not in link]
    return [*some(other, 24), *some(link, 10), rest * 8 + 3, PAGE_SIZE * 8 - 1]


@pytest.mark.usefixtures("damaged")
def test_every_bit_of_the_super_block(three: Any, some: Any) -> None:
    ram, pfn = three.up().ram, three.up().info.super_pfn
    for bit in bits(SUPER, 100, some):
        ram.page(pfn)[bit // 8] ^= 1 << bit % 8
        survey, said = mend(three)
        assert (survey.damaged, said) == ([], {})
        assert [node.name for node in three.up().store.nodes()] == [b"c", b"b", b"a"]
        assert all(three.intact(name) for name in NAMES)
        three.picture.put_back()


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("hit", NAMES)
def test_every_bit_of_a_node_page(three: Any, hit: str, some: Any) -> None:
    kernel = three.up()
    ram, pfn = kernel.ram, kernel.store.find(hit.encode()).pfn
    others = [name for name in NAMES if name != hit]
    for bit in bits(NODE, 1000, some):
        ram.page(pfn)[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="free --damaged"):
            running.look(three.machine).sweep()
        survey, _ = mend(three)
        word = NEXT <= bit // 8 < NEXT + 8
        assert [error.pfn for error in survey.damaged] == [] if word else [pfn]
        left = {node.name.decode() for node in three.up().store.nodes()}
        assert left == set(NAMES if word else others)
        assert all(three.intact(name) for name in left)
        three.picture.put_back()


@pytest.mark.usefixtures("damaged")
def test_whoever_dies_between_two_stores_has_lost_nothing(three: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = three.up()
    ram, pfns = kernel.ram, {n.name.decode(): n.pfn for n in kernel.store.nodes()}
    for page in (kernel.info.super_pfn, pfns["c"]):
        for at in range(4):
            ram.page(page)[NEXT] ^= 1
            with monkeypatch.context() as patched:
                left, real = [at], Ram.publish

                def dies(self: Ram, address: int, value: int, left: Any = left, real: Any = real) -> None:
                    if not left[0]:
                        raise Died
                    left[0] -= 1
                    real(self, address, value)

                patched.setattr(Ram, "publish", dies)
                with contextlib.suppress(Died):
                    mend(three)
            mend(three)
            assert sorted(node.name for node in three.up().store.nodes()) == [b"a", b"b", b"c"]
            assert all(three.intact(name) for name in NAMES)
            three.picture.put_back()


@pytest.mark.usefixtures("damaged")
def test_a_node_that_was_withdrawn_is_not_found_again(three: Any) -> None:
    kernel = three.up()
    kernel.store.withdraw(b"b")
    kernel.ram.page(kernel.info.super_pfn)[NEXT] ^= 1
    survey, _ = mend(three)
    assert sorted(node.name for node in survey.found) == [b"a", b"c"]
    assert sorted(node.name for node in three.up().store.nodes()) == [b"a", b"c"]


@pytest.mark.usefixtures("damaged")
def test_contents_that_look_like_a_node_are_not_taken_for_one(three: Any) -> None:
    """Put a copy of a node page, checksum and all, into a file of another tree."""
    frames, runs, _ = three.grow(3, seed=9)
    claim = three.machine.claim(frames.tree_id)
    kernel, forged = three.up(), runs[0][0]
    kernel.ram.page(forged)[:] = kernel.ram.page(kernel.store.find(b"a").pfn)
    write_word(kernel.ram, forged, NEXT, 0)
    write_word(kernel.ram, forged, 24, 0)
    seal_page(kernel.ram, forged)
    kernel.ram.page(kernel.info.super_pfn)[NEXT] ^= 1
    survey, _ = mend(three)
    assert forged not in [node.pfn for node in survey.nodes]
    assert all(three.intact(name) for name in NAMES)
    claim.release()


@pytest.mark.usefixtures("damaged")
def test_the_lease_table_is_mended_from_the_nodes(three: Any) -> None:
    kernel = three.up()
    words, good = kernel.leases.ids, kernel.leases.ids.copy()
    block = kernel.store.find(b"b").pfn // BLOCK_PAGES
    free = int(kernel.leases.taken().gaps(0, kernel.info.blocks).starts[0])
    for at, word in ((block, 0), (block, int(good[block]) ^ 4), (0, 0), (kernel.info.super_pfn // BLOCK_PAGES, 0)):
        words[at] = word
        _, said = mend(three)
        assert list(said) == ["mended"] and f"page block {at:x} " in said["mended"][0]
        assert (words == good).all()
    for word in (1, 2, 77, 1 << 40):
        words[free] = word
        _, said = mend(three)
        assert list(said) == ["given_up"]
        assert (words == good).all()
    frames, _, _ = three.grow(3, seed=9)
    with_lock = three.machine.claim(frames.tree_id)
    words[free] = 1 << 40
    with pytest.raises(PkramfsError, match=f"page block {free:x} "):
        mend(three)
    words[free] = 0
    with_lock.release()
    assert all(three.intact(name) for name in NAMES)
