# SPDX-License-Identifier: GPL-2.0-or-later
"""Typed replies: what the keeper says is what a command reads, and a reply of another shape is one clear error."""

from typing import Any

import pytest

from pkramfs.control import commands
from pkramfs.control.commands import Commands
from pkramfs.control.replies import Done, Frozen, Status, read, unnamed
from pkramfs.errors import DaemonError

STATUS: dict[str, Any] = {
    "name": "x",
    "mountpoint": "/mnt",
    "state": "live",
    "frozen": False,
    "files": 1,
    "dirs": 2,
    "pages": 3,
    "bytes": 4,
    "pid": 5,
}
COUNTED = {"writers": ["/a"], "writers_count": 3, "busy": True, "options": "size=1k"}


def test_a_whole_reply_is_read_as_it_is() -> None:
    assert read(Frozen, {"preserved": True, "held": True}) == {"preserved": True, "held": True}
    assert read(Done, {}) == {}
    found = read(Status, STATUS | COUNTED)
    assert {key: found[key] for key in STATUS | COUNTED} == STATUS | COUNTED  # type: ignore[literal-required]
    assert (unnamed(found, "writers"), unnamed(found, "lost")) == (2, 0)


def test_sparse_files_may_add_up_to_more_than_64_bits() -> None:
    assert read(Status, STATUS | {"bytes": 3 * (2**63 - 1)})["bytes"] == 3 * (2**63 - 1)


def test_what_an_older_daemon_does_not_tell_has_the_value_of_then() -> None:
    found = read(Status, STATUS | {"writers": ["/a", "/b"]})
    assert (found["writers_count"], found["open_deleted"], found["lost_count"]) == (2, [], 0)
    assert (found["busy"], found["options"]) == (False, "")


def test_what_a_newer_daemon_tells_is_left_out() -> None:
    assert "news" not in read(Status, STATUS | {"news": 1})


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({}, "name is missing"),
        (STATUS | {"frozen": 1}, "frozen is 1, expected true or false"),
        (STATUS | {"files": -1}, "files is -1, expected a whole number"),
        (STATUS | {"lost": "all"}, "lost is 'all', expected a list"),
        (STATUS | {"writers": [3]}, r"writers\[0\] is 3"),
    ],
)
def test_a_reply_of_another_shape_names_the_field(
    monkeypatch: pytest.MonkeyPatch, reply: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(commands, "call", lambda *_, **__: reply)
    with pytest.raises(DaemonError, match=rf"^unexpected reply from the daemon \(version mismatch\?\): {reason}"):
        Commands("sock").status()


def test_a_freeze_of_unknown_shape_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Held:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.answer = {"frozen": True}

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(commands, "Held", Held)
    with pytest.raises(DaemonError, match="preserved is missing"):
        Commands("sock").freeze()
    assert closed == [True]
