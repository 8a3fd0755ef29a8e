# SPDX-License-Identifier: GPL-2.0-or-later
"""How many requests the kernel makes of a file system for one call, and waits for: of ours, and of each peer.

Ours counts them (pkramctl metrics); a program of libfuse prints each with -d.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.files import _create
from benchmarks.mounts import Lab, command, served
from benchmarks.table import Table

_COUNT = 50
_PRINTED = re.compile(r"opcode: (\w+)")
_OURS = re.compile(r'^pkramfs_requests_total{kind="(\w+)",mountpoint="([^"]*)".*} ([0-9.]+)$', re.MULTILINE)
_NOT_AWAITED = ("FORGET", "BATCH_FORGET")

Count = Callable[[], float]


def requests_for_each(table: Table, place: Lab, peers: dict[str, list[str]]) -> None:
    """A row for each kind of call and peer, which the words given serve."""
    ours = place.directory / "peers"
    counts = _of_calls(ours, lambda: _counted(ours))
    for peer, words in peers.items():
        path, said = place.directory / "counted", place.directory / "counted.log"
        path.mkdir(exist_ok=True)
        with open(said, "wb") as output, served([*words, "-d"], path, output):
            theirs = _of_calls(path, lambda said=said: _printed(said))
        for call, number in counts.items():
            table.add("peers", f"requests for {call}", [number], "", reference=[theirs[call]], reference_name=peer)


def _of_calls(directory: Path, count: Count) -> dict[str, float]:
    """The requests that each kind of call takes, one file after the other."""
    paths = [str(directory / f"file{number}") for number in range(_COUNT)]
    (directory / "elsewhere").mkdir()
    found: dict[str, float] = {}

    def note(name: str, work: Callable[[str], object]) -> None:
        before = count()
        for path in paths:
            work(path)
        found[name] = (count() - before) / _COUNT

    note("create+close", _create)
    note("rename", lambda path: os.rename(path, _moved(path)))
    note("unlink", lambda path: os.unlink(_moved(path)))
    note("mkdir", os.mkdir)
    return found


def _moved(path: str) -> str:
    return path.replace("/file", "/elsewhere/")


def _counted(directory: Path) -> float:
    """The requests that our daemon has served on a mount."""
    text = command("pkramctl", "metrics")
    return sum(
        float(number)
        for kind, where, number in _OURS.findall(text)
        if where == str(directory) and kind.upper() not in _NOT_AWAITED
    )


def _printed(said: Path) -> float:
    """The requests that a program of libfuse has printed."""
    return sum(kind not in _NOT_AWAITED for kind in _PRINTED.findall(said.read_text(errors="replace")))
