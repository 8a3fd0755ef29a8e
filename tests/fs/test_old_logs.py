# SPDX-License-Identifier: GPL-2.0-or-later
"""A log that an older program began is replayed, and goes on as one of this version, which the older one refuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pkramfs.errors import VersionError
from pkramfs.fs.limits import Limits
from pkramfs.fs.recover import recover
from pkramfs.fs.restore import restore as restore_node
from pkramfs.journal import layout
from pkramfs.journal.reader import chunks
from tests.data.make_image import restore as fill
from tests.data.make_log import BLOCKS, NODE, summary
from tests.fs.conftest import audit
from tests.support.journals import Driver, Memory, end, live, state
from tests.support.stores import Recording, deaths, restore

LIVE, SUMMARY = 512, "bc880e42d976d9d0"
IMAGE = Path(__file__).parents[1] / "data" / "log-1.ram.xz"


@pytest.fixture
def memory() -> Iterator[Memory]:
    """What a daemon of version 1 has left."""
    with Memory.make(BLOCKS, Recording) as made:
        fill(made.ram, IMAGE.read_bytes())
        assert layout.LIVE.read(made.ram.peek(LIVE)).version == 1
        yield Memory(made.ram)


def test_it_goes_on(memory: Memory) -> None:
    tree = memory.recover(LIVE)
    assert summary(tree) == SUMMARY
    audit(tree)
    assert layout.LIVE.read(memory.ram.peek(LIVE)).version == layout.VERSION
    driver = Driver(tree, 1)
    for _ in range(30):
        driver.step()
    rebuilt = memory.rebuild(live(tree))
    assert state(rebuilt.tree) == state(tree)
    kinds = set[int]()
    for position, *_ in chunks(memory.ram, rebuilt.log):
        segment = next(one for one in reversed(rebuilt.log.segments) if one.base <= position)
        kinds.add(layout.CHUNK.unpack_from(memory.ram.bytes, segment.address(position))[1])
    assert kinds == {layout.OLD_KIND, layout.CHUNK_KIND}


def test_a_node_that_it_holds_is_restored(memory: Memory) -> None:
    tree = end(restore_node(memory.store, NODE, memory.ram, memory.frames, Limits()))
    assert summary(tree) == SUMMARY
    tree.mkdir(1, b"new", 0o755)
    tree.commit()
    assert state(memory.rebuild(live(tree)).tree) == state(tree)


def test_who_takes_it_over_may_die_at_every_store(memory: Memory) -> None:
    """The version is raised by two stores, and a reader of this version takes what is between them."""
    ram = memory.ram
    assert isinstance(ram, Recording)
    held = ram.record()
    tree = end(recover(memory.store, LIVE, ram, memory.frames, Limits(), 1, NODE))
    tree.commit()
    count = 0
    for what, image in deaths(held, ram.recorded()):
        again = restore(image, ram.path + ".death", ram.size)
        assert summary(Memory(again).recover(LIVE)) == SUMMARY, what
        again.close()
        count += 1
    print(f"\n{count} deaths")
    assert count >= 4  # nothing, the version, the checksum, what was cleared


@pytest.mark.parametrize("version", [0, 3, 1 << 31])
def test_another_version_is_refused(memory: Memory, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(layout, "VERSION", version)
        layout.renew(memory.ram, LIVE)
    before = bytes(memory.ram.page(LIVE))
    with pytest.raises(VersionError, match=rf"version.*{version}.*at most 2, this program's"):
        memory.recover(LIVE)
    assert bytes(memory.ram.page(LIVE)) == before


def test_the_older_program_refuses_what_goes_on(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.recover(LIVE)
    monkeypatch.setattr(layout, "VERSION", 1)
    with pytest.raises(VersionError, match=r"version is 2, expected at most 1"):
        layout.read_live(memory.ram, LIVE)
