# SPDX-License-Identifier: GPL-2.0-or-later
"""The states of a tree, with a store that only remembers what it was asked."""

import errno
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from pkramfs.control import keeper as module
from pkramfs.control.keeper import Keeper
from pkramfs.control.replies import LOG, Done, Foreseen, Frozen, Status, read
from pkramfs.control.settings import Settings
from pkramfs.errors import ErrnoError, FormatError, PkramError
from pkramfs.fs.limits import Limits
from pkramfs.fs.save import Progress, SaveReport
from pkramfs.fs.tree import Tree
from pkramfs.spans import Spans


class Store:
    def __init__(self) -> None:
        self.names: list[bytes] = []

    def withdraw(self, name: bytes) -> None:
        if name not in self.names:
            raise PkramError("no such node", errno.ENOENT)
        self.names.remove(name)

    def find(self, name: bytes) -> bytes | None:
        if b"damaged" in self.names:
            raise FormatError("Node", "checksum", pfn=1)
        return name if name in self.names else None


class Frames:
    def __init__(self) -> None:
        self.freed = self.held_pages = 0

    def room(self) -> int:
        return 1 << 20

    def free(self, starts: Any, counts: Any) -> None:
        self.freed += int(sum(counts))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def keeper(said: list[str], monkeypatch: pytest.MonkeyPatch) -> Keeper:
    tree = Tree(None, Frames(), Limits())  # type: ignore[arg-type]

    def save(tree: Tree, store: Any, name: bytes, **_: Any) -> Iterator[Progress]:
        assert tree.frozen
        yield Progress("half", 0, 1)
        if store.names is None:
            raise PkramError("no memory", errno.ENOMEM)
        store.names.append(name)
        tree.preservation.preserve(partial(store.withdraw, name), Spans([(10, 12)]))
        return SaveReport(1, 1, 1, 1, 1, 1, 0, [], 0.0)

    monkeypatch.setattr(module, "preserve", save)
    return Keeper(
        tree,
        Store(),
        name="x",
        mountpoint="/mnt",
        say=said.append,
        banned=Spans,  # type: ignore[arg-type]
        settings=Settings(tree, {"size": "1G", "ro": True}, policy=lambda _: None),
    )


def ask(function: Any, *args: Any) -> Any:
    return trio.run(function, *args)


def test_there_and_back(keeper: Keeper, said: list[str]) -> None:
    answer = ask(keeper.preserve)
    assert (answer["state"], answer["frozen"]) == ("preserved", True)
    assert keeper.store.names == [b"shmem-x"]  # type: ignore[attr-defined]
    with pytest.raises(OSError):
        keeper.tree.create(1, b"new", 0o644)
    answer = ask(keeper.unpreserve)
    assert (answer["state"], answer["frozen"]) == ("live", False)
    assert keeper.store.names == []  # type: ignore[attr-defined]
    assert keeper.tree.frames.freed == 2  # type: ignore[attr-defined]
    keeper.tree.create(1, b"new", 0o644)
    assert [line for line in said if "x preserved" in line]


def test_the_first_change_withdraws(keeper: Keeper) -> None:
    ask(keeper.preserve)
    ask(keeper.thaw)
    assert keeper.tree.preserved and keeper.store.names == [b"shmem-x"]  # type: ignore[attr-defined]
    keeper.tree.create(1, b"new", 0o644)
    assert not keeper.tree.preserved and keeper.store.names == []  # type: ignore[attr-defined]
    keeper.tree.create(1, b"more", 0o644)
    ask(keeper.preserve)
    assert keeper.store.names == [b"shmem-x"]  # type: ignore[attr-defined]


def test_a_node_that_was_given_up_preserves_nothing(keeper: Keeper, said: list[str]) -> None:
    ask(keeper.preserve)
    names = keeper.store.names  # type: ignore[attr-defined]
    names[:] = [b"damaged"]
    assert ask(keeper.status)["state"] == "preserved", "it may still be there"
    names.clear()
    answer = ask(keeper.status)
    assert (answer["state"], answer["frozen"]) == ("live", True)
    assert keeper.tree.frames.freed == 2  # type: ignore[attr-defined]
    assert "x is no longer preserved" in said[-1]
    assert ask(keeper.preserve)["state"] == "preserved"
    names.clear()
    assert ask(keeper.preserve)["state"] == "preserved"
    assert names == [b"shmem-x"]


def test_freeze_is_for_preserved_trees(keeper: Keeper) -> None:
    assert ask(keeper.freeze) == {"preserved": False}
    assert not keeper.tree.frozen
    ask(keeper.preserve)
    ask(keeper.thaw)
    assert ask(keeper.freeze) == {"preserved": True}
    assert keeper.tree.frozen


def test_a_freeze_ends_with_its_connection(keeper: Keeper) -> None:
    ask(keeper.preserve)
    ask(keeper.thaw)
    first, second = ask(keeper.freeze), ask(keeper.freeze)
    ask(keeper.release, first)
    assert keeper.tree.frozen, "another holds it"
    ask(keeper.release, second)
    assert keeper.tree.preserved and not keeper.tree.frozen


def test_a_freeze_of_a_live_tree_holds_nothing(keeper: Keeper) -> None:
    answer = ask(keeper.freeze)
    ask(keeper.preserve)
    ask(keeper.release, answer)
    assert keeper.tree.frozen


def test_what_preserve_froze_no_connection_thaws(keeper: Keeper) -> None:
    ask(keeper.preserve)
    ask(keeper.release, ask(keeper.freeze))
    assert keeper.tree.frozen
    ask(keeper.thaw)
    answer = ask(keeper.freeze)
    ask(keeper.preserve)  # while it is held
    ask(keeper.release, answer)
    assert keeper.tree.frozen


def test_while_a_freeze_holds_nobody_else_thaws(keeper: Keeper) -> None:
    ask(keeper.preserve)
    answer = ask(keeper.freeze)
    for verb in (keeper.unpreserve, keeper.thaw):
        with pytest.raises(ErrnoError, match="a kexec has frozen /mnt") as caught:
            ask(verb)
        assert caught.value.errno == errno.EBUSY
    ask(keeper.release, answer)
    assert ask(keeper.unpreserve)["state"] == "live"


def test_a_tree_that_is_to_stop_is_not_thawed(keeper: Keeper) -> None:
    ask(keeper.preserve)
    ask(keeper.thaw)
    answer = ask(keeper.freeze)
    ask(keeper.stop)
    ask(keeper.release, answer)
    assert keeper.tree.frozen


def test_a_failed_save_thaws(keeper: Keeper, said: list[str]) -> None:
    keeper.store.names = None  # type: ignore[attr-defined]
    with pytest.raises(PkramError):
        ask(keeper.preserve)
    assert not keeper.tree.frozen and not keeper.tree.preserved
    assert "was not preserved: no memory" in said[-1]


def test_without_a_name(keeper: Keeper) -> None:
    keeper.name = None
    with pytest.raises(ErrnoError, match="without pkram=NAME"):
        ask(keeper.preserve)


def test_writers_are_waited_for_and_then_named(keeper: Keeper, autojump_clock: Any) -> None:
    inode = keeper.tree.create(1, b"file", 0o644)
    keeper.tree.open(inode.ino, os.O_WRONLY)

    async def wait() -> None:
        began = trio.current_time()
        with pytest.raises(ErrnoError, match="/file is open for writing") as caught:
            await keeper.preserve()
        assert caught.value.errno == errno.EBUSY
        assert trio.current_time() - began == pytest.approx(module.WRITERS_SECONDS)

    trio.run(wait, clock=autojump_clock)
    assert not keeper.tree.frozen


def test_many_writers_are_counted(keeper: Keeper, autojump_clock: Any) -> None:
    for number in range(30):
        keeper.tree.open(keeper.tree.create(1, b"%d" % number, 0o644).ino, os.O_WRONLY)
    with pytest.raises(ErrnoError, match=r"^/0, /1, /2, /3, /4 and 25 more are open for writing on /mnt: "):
        trio.run(keeper.preserve, clock=autojump_clock)
    answer = ask(keeper.status)
    assert (answer["writers_count"], len(answer["writers"])) == (30, 10)
    assert (answer["open_deleted_count"], answer["open_deleted"]) == (0, [])


def test_what_is_not_preserved_is_counted_in_the_log(
    keeper: Keeper, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preserve = module.preserve

    def less(*args: Any, **words: Any) -> Iterator[Progress]:
        report = yield from preserve(*args, **words)  # type: ignore[misc]
        return report._replace(deleted=["/a (deleted)", "/b (deleted)"], deleted_count=1002)  # type: ignore[return-value]

    monkeypatch.setattr(module, "preserve", less)
    ask(keeper.preserve)
    assert said[1:] == [
        "pkramfs: x: /a (deleted) is not preserved",
        "pkramfs: x: /b (deleted) is not preserved",
        "pkramfs: x: nor are 1,000 other open files",
    ]


def test_the_last_close_lets_preserve_go_on(keeper: Keeper, autojump_clock: Any) -> None:
    inode = keeper.tree.create(1, b"file", 0o644)
    handles = [keeper.tree.open(inode.ino, os.O_WRONLY) for _ in range(2)]

    async def close() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.preserve)
            for handle in handles:
                await trio.testing.wait_all_tasks_blocked()
                assert not keeper.tree.frozen
                keeper.tree.release(handle)
                keeper.writer_gone()

    trio.run(close, clock=autojump_clock)
    assert keeper.tree.preserved


def test_two_at_once_save_once(keeper: Keeper, said: list[str]) -> None:
    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.preserve)
            nursery.start_soon(keeper.preserve)

    trio.run(both)
    assert keeper.store.names == [b"shmem-x"]  # type: ignore[attr-defined]
    assert len(said) == 1


def test_verbs_name_themselves(keeper: Keeper) -> None:
    assert set(keeper.verbs()) == {
        *("status", "preserve", "foresee", "unpreserve", "freeze", "thaw", "compare", "reconfigure", "stop"),
    }


def test_what_is_said_is_what_commands_read(keeper: Keeper) -> None:
    keeper.outlives = lambda: dict.fromkeys(LOG, 1) | {"on_trial": True, "went_back": "its holder ended"}
    keeper.summed = lambda: {"unsummed": 1, "to_compare": 1, "damaged": ["bytes 0-4095 of /f"], "damaged_count": 1}
    said: dict[Any, Any] = {Status: ask(keeper.status), Frozen: ask(keeper.thaw), Done: ask(keeper.stop)}
    said[Foreseen] = ask(keeper.foresee)
    assert {kind: read(kind, reply) for kind, reply in said.items()} == said
    assert said[Status].keys() == Status.__annotations__.keys()


def lose(keeper: Keeper, *names: bytes) -> None:
    for name in names:
        keeper.tree.lose(keeper.tree.create(1, name, 0o644).ino, 0, 4096, errno.ENOSPC)
    keeper.data_lost()


def test_data_that_are_lost_are_not_preserved_as_zeros(keeper: Keeper, said: list[str]) -> None:
    lose(keeper, *(b"file%d" % number for number in range(7)))
    status = ask(keeper.status)
    assert (status["lost_count"], status["lost"][0]) == (7, "/file0")
    with pytest.raises(ErrnoError) as refused:
        ask(keeper.preserve)
    assert refused.value.errno == errno.EIO
    assert all(f"/file{number}" in str(refused.value) for number in range(5)) and " and 2 more" in str(refused.value)
    assert keeper.store.names == [] and not keeper.tree.frozen  # type: ignore[attr-defined]
    assert any("was not preserved" in line and "/file0" in line for line in said)
    keeper.tree.create(1, b"new", 0o644)
    for number in range(7):
        keeper.tree.unlink(1, b"file%d" % number)
    assert ask(keeper.preserve)["state"] == "preserved"
    assert not any("without data" in line for line in said)


def test_a_word_goes_on_without_what_is_lost(keeper: Keeper, said: list[str]) -> None:
    lose(keeper, b"a", b"b")
    answer = ask(keeper.preserve, False, True)
    assert (answer["state"], answer["lost"], answer["lost_count"]) == ("preserved", [], 0)
    assert any("x is preserved without data written to /a, /b" in line for line in said)
    ask(keeper.unpreserve)
    assert ask(keeper.preserve)["state"] == "preserved", "what was given up is not asked for again"


def test_a_restored_tree_that_lost_data_since(keeper: Keeper) -> None:
    """It is preserved, but not with what was written to it."""
    keeper.tree.create(1, b"a", 0o644)
    ask(keeper.preserve)
    ask(keeper.thaw)
    keeper.tree.lose(2, 0, 4096)
    with pytest.raises(ErrnoError, match="/a"):
        ask(keeper.preserve)
    assert keeper.tree.preserved and not keeper.tree.frozen


def test_the_log_names_each_file_once(keeper: Keeper, said: list[str], autojump_clock: trio.testing.MockClock) -> None:
    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.watch_losses)
            lose(keeper, b"a", b"mended")
            keeper.tree.unlink(1, b"mended")
            await trio.sleep(1)
            assert said == ["pkramfs: /mnt: data written to /a are lost: No space left on device"]
            keeper.tree.lose(2, 4096, 8192)
            keeper.data_lost()
            await trio.sleep(1)
            assert len(said) == 1
            keeper.tree.losses.drop(2)
            lose(keeper, *(b"%d" % number for number in range(8)))
            await trio.sleep(1)
            assert len(said) == 7 and said[-1] == "pkramfs: /mnt: data written to 3 more files are lost"
            nursery.cancel_scope.cancel()

    trio.run(scenario, clock=autojump_clock)


def test_preserve_with_verify_saves_once_all_data_have_checksums(keeper: Keeper) -> None:
    done: list[str] = []

    async def sum_all() -> None:
        assert keeper.tree.frozen and not keeper.tree.preserved
        done.append("summed")

    keeper.sum_all = sum_all
    ask(partial(keeper.preserve, verify=True))
    assert done == ["summed"] and keeper.tree.preserved and keeper._settings.words["verify"] == "data"


def test_a_node_that_may_lack_checksums_is_saved_anew(keeper: Keeper) -> None:
    ask(keeper.preserve)
    nodes = keeper.store.names  # type: ignore[attr-defined]
    assert len(nodes) == 1
    ask(partial(keeper.preserve, verify=True))
    assert len(nodes) == 1 and keeper.tree.preserved and keeper.tree.frozen
