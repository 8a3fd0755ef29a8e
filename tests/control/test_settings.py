# SPDX-License-Identifier: GPL-2.0-or-later
"""What a remount may change, over a tree that is never written."""

import errno
from typing import Any

import pytest

from pkramfs.control.settings import Settings, Words
from pkramfs.errors import ErrnoError, UsageError
from pkramfs.fs.limits import Limits
from pkramfs.fs.tree import Tree


class Frames:
    policy: Any = None


def policy(text: str | None) -> Any:
    if text == "bind:9":
        raise UsageError("there is no node 9")
    return text


class Remounted:
    """A mount's settings over its tree, and what the daemon was told of each remount."""

    def __init__(self, words: Words, limits: Limits) -> None:
        self.told: list[Words] = []
        self.tree = Tree(None, Frames(), limits)  # type: ignore[arg-type]
        self.settings = Settings(self.tree, words, policy=policy, changed=self.told.append)

    def state(self) -> tuple[Any, ...]:
        limits = self.tree.limits
        return limits.max_pages, limits.max_inodes, self.tree.huge, self.tree.frames.policy, dict(self.settings.words)


@pytest.fixture
def lab() -> Remounted:
    return Remounted({"pkram": "x", "nr_blocks": "512", "nr_inodes": "10", "rw": True}, Limits(512, 10))


def test_all_at_once(lab: Remounted) -> None:
    said: Words = {"size": "4M", "huge": "always", "mpol": "bind:1"}
    lab.settings.reconfigure(said, pages=1024)
    words = {"pkram": "x", "nr_inodes": "10", "rw": True, **said}  # size= takes the place of nr_blocks=
    assert lab.state() == (1024, 10, "always", "bind:1", words)
    assert lab.settings.shown() == "size=4096k,nr_inodes=10,huge=always,mpol=bind:1"
    assert lab.told == [said]


@pytest.mark.parametrize(
    ("said", "limits"),
    [
        ({"huge": "often"}, {}),
        ({"verify": "all"}, {}),
        ({"noswap": True}, {}),
        ({"mpol": "bind:9"}, {}),
        ({"size": "1"}, {"pages": 1}),
        ({"nr_inodes": "1"}, {"inodes": 1}),
    ],
)
def test_or_nothing(lab: Remounted, said: Words, limits: dict[str, int]) -> None:
    lab.tree.limits.pages, lab.tree.limits.inode_space = 2, 2048
    before = lab.state()
    with pytest.raises((ErrnoError, OSError, UsageError)) as caught:
        lab.settings.reconfigure({"huge": "always", "mpol": "local", **said}, **limits)
    assert isinstance(caught.value, UsageError) or caught.value.errno == errno.EINVAL  # type: ignore[union-attr]
    assert lab.state() == before
    assert lab.told == []


def test_no_limit_and_back_is_refused(lab: Remounted) -> None:
    lab.settings.reconfigure({"size": "0", "nr_inodes": "0"}, pages=0, inodes=0)
    assert lab.settings.shown() == "size=0k,nr_inodes=0"
    for limits in ({"pages": 5}, {"inodes": 5}):
        with pytest.raises(OSError, match="without a limit"):
            lab.settings.reconfigure({}, **limits)


def test_only_what_was_said_is_shown() -> None:
    assert Remounted({"pkram": "x", "rw": True}, Limits(1, 1)).settings.shown() == ""
    words: Words = {"pkram_strict": True, "mode": "700", "gid": "0", "noswap": True, "noatime": True}
    assert Remounted(words, Limits(1, 1)).settings.shown() == "mode=700,gid=0,noswap,pkram_strict"


@pytest.mark.parametrize(("said", "kept"), [("ro", {"ro": True}), ("rw", {"rw": True})])
def test_read_only_is_noted_in_the_place_of_its_opposite(lab: Remounted, said: str, kept: dict[str, bool]) -> None:
    for words in ({"ro": True}, {"rw": True}, {said: True}):
        lab.settings.reconfigure(words)
    assert {key: value for key, value in lab.settings.words.items() if key in ("ro", "rw")} == kept
    assert lab.settings.shown() == "size=2048k,nr_inodes=10"
