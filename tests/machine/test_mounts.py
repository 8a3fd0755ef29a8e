# SPDX-License-Identifier: GPL-2.0-or-later
"""Entries of mount daemons: living, dead and damaged."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.errors import MachineError
from pkramfs.machine import mounts

ENTRY = {"name": "a", "mountpoint": "/mnt", "pid": 42, "options": {"pkram": "a", "ro": True}, "dev": 7, "more": 1}
ID = 0xABCD


def test_an_entry_lives_as_long_as_its_lock(tmp_path: Path) -> None:
    lock = mounts.claim(str(tmp_path), ID)
    lock.write_entry(ENTRY)
    (entry,) = mounts.read_entries(str(tmp_path))
    assert (entry.tree_id, entry.name, entry.pid, entry.alive, entry.damaged) == (ID, "a", 42, True, "")
    assert (entry.options, entry.dev, entry.extra) == (ENTRY["options"], 7, {"more": 1})
    assert mounts.live_ids(str(tmp_path)) == {ID}
    with pytest.raises(MachineError, match="tree abcd is in use by another mount daemon"):
        mounts.claim(str(tmp_path), ID)
    lock.release()
    lock.release()
    assert os.listdir(tmp_path) == []
    assert mounts.live_ids(str(tmp_path)) == set()


def test_a_lock_whose_file_was_removed_is_still_held(tmp_path: Path) -> None:
    """By whoever has it open, and is named in the entry: there are never two daemons for a tree."""
    lock = mounts.claim(str(tmp_path), ID)
    if not (daemon := os.fork()):
        while True:
            signal.pause()
    try:
        lock.write_entry(ENTRY | {"pid": daemon, "journal": 5})
        lock.abandon()
        os.unlink(lock.path("lock"))
        for _ in range(2):  # the second time a file is there, of a lock that nobody holds
            assert [(entry.alive, entry.outlived) for entry in mounts.read_entries(str(tmp_path))] == [(True, False)]
            assert mounts.live_ids(str(tmp_path)) == {ID}
            with pytest.raises(MachineError, match="tree abcd is in use by another mount daemon"):
                mounts.claim(str(tmp_path), ID)
        mounts.clear_away(str(tmp_path), (), [].append)
        assert Path(lock.path("json")).exists()
    finally:
        os.kill(daemon, signal.SIGKILL)
        os.waitpid(daemon, 0)
    assert [(entry.alive, entry.outlived) for entry in mounts.read_entries(str(tmp_path))] == [(False, True)]
    mounts.claim(str(tmp_path), ID).release()
    assert os.listdir(tmp_path) == []


def test_who_has_no_entry_yet_is_alive(tmp_path: Path) -> None:
    lock = mounts.claim(str(tmp_path), ID)
    assert mounts.read_entries(str(tmp_path)) == []
    assert mounts.live_ids(str(tmp_path)) == {ID}
    lock.release()


def test_what_a_dead_daemon_left(tmp_path: Path) -> None:
    (tmp_path / f"{ID:016x}.lock").touch()
    (tmp_path / f"{ID:016x}.json").write_text(json.dumps(ENTRY))
    assert [entry.alive for entry in mounts.read_entries(str(tmp_path))] == [False]
    assert mounts.live_ids(str(tmp_path)) == set()
    mounts.claim(str(tmp_path), ID).release()
    assert os.listdir(tmp_path) == []


def test_an_entry_is_replaced_where_the_host_is_full(host: Any) -> None:
    """Its next text has pages already, however often; without them it stays what it was."""
    directory = host.directory / "mounts"
    directory.mkdir()
    lock = mounts.claim(str(directory), ID)
    lock.write_entry(ENTRY)
    host.fill()
    for pid in (43, 44, 45):
        lock.write_entry(ENTRY | {"pid": pid, "longer": "x" * pid})
        (entry,) = mounts.read_entries(str(directory))
        assert (entry.pid, entry.damaged) == (pid, "")
    os.unlink(lock.path("spare"))
    host.fill()
    with pytest.raises(MachineError, match="No space left"):
        lock.write_entry(ENTRY)
    assert [entry.pid for entry in mounts.read_entries(str(directory))] == [45]
    host.empty()
    lock.release()
    assert os.listdir(directory) == []


@pytest.mark.parametrize("name", ["x.json", "12.json", "+00000000000abcd.json", "000000000000abcd.json.tmp", "x.lock"])
def test_foreign_files_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert mounts.read_entries(str(tmp_path)) == []
    assert mounts.live_ids(str(tmp_path)) == set()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[]", "not a JSON object"),
        (json.dumps(ENTRY | {"pid": "forty-two"}), "pid is 'forty-two'"),
        (json.dumps(ENTRY | {"pid": True}), "pid is True"),
        (json.dumps(ENTRY | {"pid": -1}), "pid is -1"),
        (json.dumps(ENTRY | {"options": ["ro"]}), r"options is \['ro'\]"),
        (json.dumps(ENTRY | {"name": 5}), "name is 5"),
        (json.dumps(ENTRY | {"mountpoint": {}}), "mountpoint is {}"),
        (json.dumps(ENTRY | {"dev": "7"}), "dev is '7'"),
        ("\xff\xfe", "is damaged"),
    ],
)
def test_a_damaged_entry_is_still_a_mount_and_says_why(tmp_path: Path, text: str, reason: str) -> None:
    lock = mounts.claim(str(tmp_path), ID)
    Path(lock.path("json")).write_bytes(text.encode("latin-1"))
    (entry,) = mounts.read_entries(str(tmp_path))
    assert (entry.tree_id, entry.alive, entry.options) == (ID, True, {})
    assert lock.path("json") in entry.damaged
    assert re.search(reason, entry.damaged)
    lock.release()


def test_an_entry_that_says_little_is_read(tmp_path: Path) -> None:
    (tmp_path / f"{ID:016x}.json").write_text('{"pid": null}')
    (entry,) = mounts.read_entries(str(tmp_path))
    assert (entry.name, entry.mountpoint, entry.pid, entry.damaged) == (None, "?", 0, "")


def test_no_directory_is_no_entry_but_nobody_says_that_none_lives(tmp_path: Path) -> None:
    assert mounts.read_entries(str(tmp_path / "gone")) == []
    with pytest.raises(MachineError, match="cannot list the mounts"):
        mounts.live_ids(str(tmp_path / "gone"))


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[int]:
    """A daemon that was killed with all its files there; its tree id."""
    for suffix in ("json", "sock", "log", "lock"):
        (tmp_path / f"{ID:016x}.{suffix}").touch()
    yield ID


def test_the_files_of_the_dead_are_cleared_away_and_of_nobody_else(tmp_path: Path, killed: int) -> None:
    living = mounts.claim(str(tmp_path), ID + 1)
    living.write_entry(ENTRY)
    kept = tmp_path / f"{ID + 2:016x}.json"
    strange = tmp_path / "somebody.json"
    for path in (kept, strange):
        path.touch()
    (tmp_path / f"{killed:016x}.log").write_text("first\n" * 30 + "\nlast\n")
    said: list[str] = []
    mounts.clear_away(str(tmp_path), {ID + 2}, said.append)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [kept.name, strange.name, *(f"{ID + 1:016x}.{suffix}" for suffix in ("json", "lock", "spare"))]
    )
    assert said[-2:] == [f"pkramfs: daemon of tree {ID:016x}: {word}" for word in ("first", "last")] and len(said) == 21
    assert said[0] == f"pkramfs: daemon of tree {ID:016x} (pid 0, ?) has died"
    living.release()
    mounts.clear_away(str(tmp_path), set(), said.append)
    assert os.listdir(tmp_path) == [strange.name]


def test_what_is_just_being_mounted_is_not_cleared_away(
    tmp_path: Path, killed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(mounts, "live_ids", lambda _: set())  # it is claimed after we looked
        held = mounts.claim(str(tmp_path), killed)
        mounts.clear_away(str(tmp_path), set(), lambda _: None)
    assert len(os.listdir(tmp_path)) == 4
    held.release()
