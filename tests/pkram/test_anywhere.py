# SPDX-License-Identifier: GPL-2.0-or-later
"""Death at any moment: between any two lines of the core, memory holds the old state or the new one.

A trace function looks at memory, as another process would, whenever a line of the chapter is about
to be executed; and the same with an interrupt raised there, after which the `with` gives the save up.
"""

import contextlib
import sys
from pathlib import Path

import pytest

import pkramfs.pkram
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans

from .conftest import SUPER_PFN, TREE

CHAPTER = str(Path(pkramfs.pkram.__file__).parent)
WRITERS = (
    "save.py",
    "store.py",
    "writer.py",
    "bytewriter.py",
    "pagewriter.py",
    "linkwriter.py",
    "link.py",
    "page.py",
    "saveframes.py",
    "relocate.py",
)


class Tracer:
    """Calls `look` before lines of the chapter's writing modules."""

    def __init__(self, look):
        self.look, self.lines = look, 0

    def __call__(self, frame, event, _argument):
        path = frame.f_code.co_filename
        if not path.startswith(CHAPTER) or Path(path).name not in WRITERS:
            return None
        if event == "line":
            self.lines += 1
            sys.settrace(None)
            try:
                self.look(self.lines)
            finally:
                sys.settrace(self)
        return self


@contextlib.contextmanager
def traced(look):
    tracer = Tracer(look)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield tracer
    finally:
        sys.settrace(before)


def save(store, frames, name, data, runs, banned):
    with store.prepare_save(name, tree_id=TREE, frames=frames, banned=banned) as saving:
        with saving.object() as writer:
            writer.write(data)
            writer.save_runs(*zip(*runs, strict=True))
        with saving.object() as writer:
            writer.save_pages([0], [runs[0][1] + 463 & ~15], [4])
        saving.finish()


def state(ram):
    store, found = Store(ram, SUPER_PFN, contextlib.nullcontext), {}
    for node in store.nodes():
        with store.prepare_load(node.name) as load:
            found[node.name] = [(one.read(), [c.tolist() for c in one.load_runs()]) for one in load]
    return found


@pytest.fixture
def scene(ram, store, frames):
    ((start, _),) = frames.allocate(2000)
    save(store, frames, b"first", b"1" * 5000, [(0, start + 500, 100), (700, start + 700, 3)], Spans())
    banned = Spans([(start + 1005, start + 1009)])
    runs = [(0, start + 1000, 90), (95, start + 1200, 6)]

    def run():  # with a store of its own, as another process has
        save(Store(ram, SUPER_PFN, contextlib.nullcontext), frames, b"second", b"2" * 9000, runs, banned)

    return run


@pytest.fixture
def step(request: pytest.FixtureRequest) -> int:
    """How many lines are passed over between two that are looked at: none with --long."""
    return 1 if request.config.getoption("--long") else 11


def test_between_any_two_lines_of_a_save(ram, scene, step):
    old, seen = state(ram), []

    def look(line):
        if line % step:
            return
        now = state(ram)
        if not seen or now != seen[-1]:
            seen.append(now)

    with traced(look) as tracer:
        scene()
    new = state(ram)
    assert seen == [old, new] and set(new) == {b"first", b"second"}
    assert tracer.lines > 500


def test_between_any_two_lines_of_a_withdrawal(ram, store, scene):
    scene()
    for name in (b"first", b"second"):
        old, seen = state(ram), []
        with traced(lambda _line: seen.append(state(ram))):  # noqa: B023
            store.withdraw(name)
        new = state(ram)
        assert all(found in (old, new) for found in seen)
        assert name not in new


def test_an_interrupt_at_any_line_of_a_save_harms_nothing(ram, store, frames, scene, step):
    """Ctrl-C at every fourth line (without --long, at every forty-fourth): published whole, or given up.

    Then the next save of the name works.

    Frames on their way from the allocator to the save's own list are the only ones that may stay
    taken; they come back when the tree's page blocks are adopted again.
    """
    old, used, line, done = state(ram), frames.used_pages, 1, False
    while not done:

        def look(now, at=line):
            if now == at:
                raise KeyboardInterrupt

        try:
            with traced(look):
                scene()
            done = True
        except KeyboardInterrupt:
            if store.find(b"second") is None:
                assert state(ram) == old
                assert 0 <= frames.used_pages - used < 16, line
                used = frames.used_pages
            else:
                done = True
        line += 4 * step
    assert set(state(ram)) == {b"first", b"second"}
    assert line > 500
    frames.adopt(store.preserved())
    assert frames.used() == store.preserved()
