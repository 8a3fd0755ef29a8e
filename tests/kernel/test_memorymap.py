# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has which pages: each page once, and drawn so that nothing small is lost."""

import random
from itertools import pairwise

import pytest

from pkramfs.kernel import memorymap
from pkramfs.kernel.memorymap import DESTINATION, ENDED, FREE, HOLE, KERNEL, LEASED, PRESERVED, RESERVE, Part, rows
from pkramfs.spans import Spans
from tests.support.lab import Boots

NAMES = {".": FREE, "k": KERNEL, "r": RESERVE, "p": PRESERVED, "l": LEASED, " ": HOLE}


def drawn(picture: str, scale: int = 1) -> list[Part]:
    """Return the parts of a picture, a character for each `scale` pages."""
    return [
        Part(kind, char, Spans((at, at + 1) for at, found in enumerate(picture) if found == char).scale(scale))
        for char, kind in NAMES.items()
        if char in picture
    ]


def redrawn(parts: list[Part], found: list[memorymap.Row], which: int = 0) -> list[str]:
    """Return rows as text, each part by its owner; a folded row in brackets."""
    texts = ["".join(parts[cell].owner if cell >= 0 else "_" for cell in row.cells[which]) for row in found]
    return [f"[{text}]" if row.folded else text for row, text in zip(found, texts, strict=True)]


def test_a_row_is_cells_and_rows_of_nobody_are_folded():
    parts = drawn("..kk" + "rrpp" + 3 * "...." + "pl  " + 2 * "pppp")
    unit, found = rows([parts], columns=4, most=8)
    assert unit == 1
    assert redrawn(parts, found) == ["..kk", "rrpp", "[.]", "pl  ", "pppp", "pppp"]
    assert [(row.start, row.end) for row in found] == [(0, 4), (4, 8), (8, 20), (20, 24), (24, 28), (28, 32)]


def test_cells_grow_until_the_rows_are_few_enough():
    parts = drawn("k.p." * 64)
    unit, found = rows([parts], columns=8, most=4)
    assert unit == 8 and len(found) == 4
    assert {text for text in redrawn(parts, found)} <= {"p" * 8, "k" * 8}  # never nobody's


def test_the_largest_share_wins_and_nobody_loses_against_one_page():
    parts = drawn("kkkp...l....")
    unit, found = rows([parts], columns=3, most=1)
    assert (unit, redrawn(parts, found)) == (4, ["kl."])


def test_a_destination_is_seen_over_all_else_and_unfolds():
    parts = [*drawn("." * 64), Part(DESTINATION, "*", Spans([(33, 34)]))]
    _, found = rows([parts], columns=4, most=8)
    assert redrawn(parts, found) == ["[.]", ".*..", "[.]"]


def test_the_end_of_ram_is_no_cell():
    parts = drawn("kkkkk")
    _, found = rows([parts], columns=4, most=9)
    assert redrawn(parts, found) == ["kkkk", "k___"]


def test_two_pictures_are_laid_out_alike():
    before, after = drawn("kk..........pp.."), drawn("............ppkk")
    _, found = rows([before, after], columns=4, most=8)
    assert redrawn(before, found, 0) == ["kk..", "[.]", "pp.."]
    assert redrawn(after, found, 1) == ["....", "[.]", "ppkk"]


@pytest.mark.parametrize("columns", [1, 7, 60])
def test_any_picture_is_drawn_whole(seed, columns):
    """Every page is in one row, in order, and whoever has a whole cell is seen there."""
    chosen = random.Random(seed)
    for _ in range(50):
        text = "".join(chosen.choice(".krpl ") * chosen.randrange(1, 90) for _ in range(chosen.randrange(1, 60)))
        parts = drawn(text)
        unit, found = rows([parts], columns, most=chosen.randrange(1, 40))
        assert found[0].start == 0 and found[-1].end == len(text)
        assert all(one.end == other.start for one, other in pairwise(found))
        for row in found:
            for number, cell in enumerate(row.cells[0]):
                end = row.end if row.folded else min(row.start + (number + 1) * unit, row.end)
                there = set(text[row.start + (0 if row.folded else number * unit) : end])
                assert (cell < 0) == (not there)
                if cell >= 0:
                    assert parts[cell].owner in there
                    assert parts[cell].kind not in (FREE, HOLE) or there <= set(". ")


def test_cells_are_those_that_counting_every_page_finds(seed):
    chosen = random.Random(seed)
    text = "".join(chosen.choice("krpl") * chosen.randrange(1, 9) for _ in range(200))
    parts = drawn(text)
    unit, found = rows([parts], 10, most=6)
    for row in found:
        for number, cell in enumerate(row.cells[0]):
            there = text[row.start + number * unit : row.start + (number + 1) * unit]
            if cell >= 0:
                assert there.count(parts[cell].owner) == max(map(there.count, there))


def test_each_page_has_one_owner(lab: Boots):
    """The parts of a machine in use are RAM, each page once; the destination lies over them."""
    lab.preserve("one", 600)
    lab.load("builtin:4M")
    frames, _, _ = lab.grow(100)
    kernel = lab.up()
    found = memorymap.parts(kernel, {frames.tree_id: "/mnt"})
    base = [part for part in found if part.kind != DESTINATION]
    assert sum(part.pages.total for part in base) == kernel.ram.pages
    assert Spans.union(part.pages for part in base) == Spans([(0, kernel.ram.pages)])
    by_owner = {part.owner: part for part in found}
    assert by_owner["one"].kind == PRESERVED and by_owner["one"].pages.total >= 600
    assert by_owner["/mnt"].kind == LEASED and by_owner["/mnt"].pages.total == 512
    assert by_owner["builtin:4M"].kind == DESTINATION
    assert {part.kind for part in found} >= {HOLE, FREE, KERNEL, RESERVE}
    ended = [part for part in memorymap.parts(kernel, {}) if part.kind == ENDED]
    assert [part.pages for part in ended] == [by_owner["/mnt"].pages]
    without = memorymap.parts(kernel, {}, readable=False)
    assert PRESERVED not in {part.kind for part in without}
