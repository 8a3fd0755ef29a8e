# SPDX-License-Identifier: GPL-2.0-or-later
"""Progress: a bar that leaves nothing behind, lines for programs, nothing in a pipe, nothing too early."""

import argparse
import json
import os
import re
import select
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pkramfs.cli import progress, render
from pkramfs.fs.picture import Progress
from pkramfs.mounting import patience
from tests.support.preserved import Trees, write


class Clock:
    """A clock that goes on by a quarter of a second each time that work yields."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def work(clock: Clock, steps: int = 8) -> Iterator[Progress]:
    for number in range(steps + 1):
        yield Progress("export", number << 20, steps << 20)
        clock.now += 0.25
    return "done"


@contextmanager
def terminal(columns: int = 100) -> Iterator[object]:
    """Make stderr a terminal; give what reads all that was shown on it. (Not a fixture: pytest would undo it.)"""
    ours, theirs = os.openpty()
    with open(theirs, "w") as stderr, pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", stderr)
        patched.setenv("TERM", "xterm")
        patched.setenv("COLUMNS", str(columns))

        def read() -> str:
            stderr.flush()
            shown = b""
            while select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 1 << 16)
            return shown.decode()

        yield read
    os.close(ours)


def test_a_bar_after_half_a_second_that_leaves_nothing(clock):
    with terminal() as read:
        assert progress.drive(work(clock, 1)) == "done" and read() == ""
        assert progress.drive(work(clock)) == "done"
        shown = read()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    first = next(line for line in re.split(r"[\r\n]+", plain) if line.strip())
    assert re.fullmatch(r"export \S+ +2\.0 MiB of 8\.0 MiB   4\.0 MiB/s   0:00:02 left *", first.replace("╺", "━"))
    assert "8.0 MiB of 8.0 MiB   4.0 MiB/s   0:00:00 left" in plain
    assert shown.endswith("\x1b[2K") and shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (50, "export 2.0 MiB of 8.0 MiB   0:00:02 left"),
        (60, "export 2.0 MiB of 8.0 MiB   4.0 MiB/s   0:00:02 left"),
        (30, "export 0:00:02 left"),
    ],
)
def test_a_narrow_terminal_has_whole_figures(clock, columns, line):
    with terminal(columns) as read:
        assert progress.drive(work(clock)) == "done"
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read())
    assert line in [one.strip() for one in re.split(r"[\r\n]+", plain)]


def test_a_line_takes_the_bar_away_and_it_comes_again(clock, capsys):
    def mixed() -> Iterator[object]:
        for number, one in enumerate(work(clock)):
            yield one
            if number == 4:
                yield "a line"

    with terminal() as read:
        for one in progress.shown(mixed()):
            render.say(one)
        assert read().count("\x1b[?25h") == 2
    assert capsys.readouterr().out == "a line\n"


def test_lines_for_programs(clock, capsys):
    assert progress.drive(work(clock), argparse.Namespace(progress="json")) == "done"
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["done"] >> 20 for line in lines] == [2, 4, 6, 8, 8]
    assert lines[1] == {
        "stage": "export",
        "done": 4 << 20,
        "total": 8 << 20,
        "seconds": 1.0,
        "rate": 4 << 20,
        "left": 1.0,
    }


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_nothing_in_a_pipe(clock, capsys, mode):
    assert progress.drive(work(clock), argparse.Namespace(progress=mode)) == "done"
    assert capsys.readouterr() == ("", "")


def test_work_that_others_do_is_ticked_while_it_is_waited_for():
    """The child waits for a byte that only the third tick sends."""
    ours, theirs = os.pipe()
    ticks = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 3:
            os.write(theirs, b"x")

    with patience.calling(tick):
        assert patience.within(lambda: os.read(ours, 1), 20, "a byte") == b"x"
    before = len(ticks)
    assert before >= 3 and patience.within(lambda: 5, 20, "a number") == 5 and len(ticks) == before
    os.close(ours)
    os.close(theirs)


def test_a_command_tells_programs(machine, tmp_path):
    trees = Trees(machine)
    trees.plant("x", lambda tree: write(tree, b"f", b"x" * 100_000))
    done = trees.run("ctl", "export", "x", "-", "--progress=json")
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["stage"], last["done"], last["total"]) == ("export", 100_000, 102_400)
    done = trees.run("ctl", "verify", "--progress=json")
    assert json.loads(done.stderr.splitlines()[-1])["stage"] == "verify"


def test_a_kexec_is_counted_in_steps(machine, ctl, kexec):
    Trees(machine).preserve("guest", 10)
    status, out, err = kexec("-le", "builtin:2M", "--reuse-cmdline", "--progress=json")
    assert status == 0 and out.startswith("kernel 2 ")
    last = json.loads(err.splitlines()[-1])
    assert last["stage"] == "kexec" and last["done"] == last["total"] > 5 and last["rate"] is None


def test_steps_on_a_terminal(clock):
    with terminal() as read, progress.waiting(None, "kexec") as drawn:
        drawn.show("kexec", 3, 12)
        clock.now += 1
        drawn.show("kexec", 4, 12)
        assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read()).rstrip().endswith(" 4 of 12   0:00:01")


def test_a_bar_moves_within_a_step(clock):
    with terminal() as read, progress.waiting(None, "kexec") as drawn:
        drawn.begin("kexec", 3, 4)
        places = []
        for part in (0.0, 0.3, 0.9):
            clock.now += 1
            patience.tell(part)
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read())
            places.append(re.search("[╺╸]", shown).start())  # where the bright part ends
            assert "3 of 4" in shown
    assert places == sorted({*places})


def test_a_boot_tells_how_far_it_is(machine, boots_apart, kexec, monkeypatch):
    parts: list[float] = []
    monkeypatch.setattr(progress.Bar, "within", lambda _, part: parts.append(part))
    assert kexec("-le", "builtin:8M", "--reuse-cmdline")[0] == 0
    assert 0.5 in parts, "the image was copied"
    booting = parts[parts.index(0.5) + 1 : parts.index(1.0) + 1]
    assert booting == sorted(booting) and booting[0] > 0.5
