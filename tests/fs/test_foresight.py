# SPDX-License-Identifier: GPL-2.0-or-later
"""What is foretold of a save is what the save then does."""

import os

from pkramfs.fs.foresight import foresee
from pkramfs.spans import Spans


def test_nothing_is_in_the_way(tree, sh) -> None:
    sh.write(b"f", b"x" * 10_000)
    found = foresee(tree, Spans())
    assert (found.refused, found.lost, found.moved) == ([], [], [])
    assert (found.files, found.pages) == (1, 3) and 0 < found.seconds < 1
    assert not tree.frozen and not tree.preserved


def test_every_path_is_named(tree, sh) -> None:
    handles = [tree.open(sh.write(b"w%d" % number), os.O_WRONLY) for number in range(30)]
    open_ino = sh.write(b"gone", b"z")
    handles.append(tree.open(open_ino))
    tree.unlink(1, b"gone")
    tree.lose(sh.write(b"torn"), 0, 5)
    found = foresee(tree, Spans())
    assert found.refused[:30] == [(b"/w%d" % number, "open for writing") for number in range(30)]
    assert found.refused[30:] == [(b"/torn", "data written to it are lost (Input/output error)")]
    assert found.lost == [b"/gone (deleted)"] and found.files == 31
    found = foresee(tree, Spans(), lossy=True)
    assert found.lost == [b"/gone (deleted)", b"/torn"] and len(found.refused) == 30
    for handle in handles:
        tree.release(handle)


def test_strict_has_its_own_reasons(tree, sh) -> None:
    sh.mkdir(b"d")
    assert foresee(tree, Spans(), strict=True).refused[0][1].startswith("/d is not a regular file")


def test_no_room(tree, sh, monkeypatch) -> None:
    sh.write(b"f", b"x")
    monkeypatch.setattr(tree.frames, "room", lambda: 3)
    assert foresee(tree, Spans()).refused[0][1].startswith("no room for the ")


def moves(tree, banned: Spans) -> dict[bytes, int]:
    return dict(foresee(tree, banned).moved)


def test_moved_pages_are_those_that_lie_in_the_way(tree, sh, round_trip) -> None:
    for number in range(4):
        sh.write(b"%d" % number, b"x" * 4096 * 10)
    sh.mkdir(b"d")
    pfns = {name: next(iter(tree.lookup(1, name).pages))[1] for name in (b"1", b"3")}
    banned = Spans([(pfns[b"1"] + 2, pfns[b"1"] + 5), (pfns[b"1"] + 9, pfns[b"1"] + 10), (pfns[b"3"], pfns[b"3"] + 99)])
    assert moves(tree, Spans()) == {} and moves(tree, banned) == {b"/1": 4, b"/3": 10}
    copy = round_trip(tree)
    assert moves(copy, banned) == {b"/1": 4, b"/3": 10}
    copy.wake()
    assert moves(copy, banned) == {b"/1": 4, b"/3": 10}
