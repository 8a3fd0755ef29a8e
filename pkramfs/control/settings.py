# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of a mounted tree: what a remount may change, and how they are shown.

    size=  nr_blocks=  nr_inodes=    limits, with tmpfs's refusals
    huge=  mpol=                     where the pages of later writes come from; those that are there stay
    format=                          1: preserve so that older releases can restore it
    verify=data  verify=none         whether data get checksums; the daemon begins with all that is there
    ro  rw                           noted only: the kernel enforces them, and preserve makes the mount ro besides

A remount changes all that it asks for, or nothing. The new options belong to the mount from then on:
pkram-kexec -e mounts the tree again with them. mode=, uid= and gid= were for the root of a new tree, so a
remount ignores them.

Kernel: mm/shmem.c (shmem_reconfigure, shmem_show_options)
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pkramfs.errors import ErrnoError
from pkramfs.fs.filling import HUGE

if TYPE_CHECKING:
    from pkramfs.fs.tree import Tree
    from pkramfs.machine.policy import Policy

Words = dict[str, str | bool]
"""Mount options as they were given: `{"size": "1G", "ro": True}`."""

_SAME = {"size": "nr_blocks", "nr_blocks": "size", "ro": "rw", "rw": "ro"}
_SHOWN = ("mode", "uid", "gid", "huge", "mpol", "verify", "noswap", "pkram_strict", "format", "standby")
_VERIFY = ("data", "none")


class Settings:
    """The options of one mount. `words` are kept up to date; `changed` is called after a change, with the new words."""

    def __init__(
        self,
        tree: "Tree",
        words: Words,
        *,
        policy: Callable[[str | None], "Policy | None"],
        changed: Callable[[Words], None] = lambda _: None,
    ) -> None:
        self._tree, self.words, self._policy, self._changed = tree, words, policy, changed

    def reconfigure(self, words: Words, pages: int | None = None, inodes: int | None = None) -> None:
        """Apply the options of a remount; `pages` and `inodes` are its size= and nr_inodes= as numbers.

        Raise EINVAL where tmpfs refuses, UsageError for a NUMA node that the machine does not have.
        """
        huge, mpol = words.get("huge"), words.get("mpol")
        if huge is not None and huge not in HUGE:
            raise ErrnoError(f"invalid huge={huge}: write one of {', '.join(HUGE)}", errno.EINVAL)
        if words.get("verify", "none") not in _VERIFY:
            raise ErrnoError(f"invalid verify={words['verify']}: write one of {', '.join(_VERIFY)}", errno.EINVAL)
        if "noswap" in words and "noswap" not in self.words:
            raise ErrnoError("noswap is only for the first mount, not for a remount", errno.EINVAL)
        policy = None if mpol is None else self._policy(str(mpol))
        self._tree.limits.resize(pages, inodes)
        if mpol is not None:
            self._tree.frames.policy = policy
        if huge is not None:
            self._tree.huge = str(huge)
        for key in ("size", "nr_blocks", "nr_inodes", "huge", "mpol", "format", "verify", "ro", "rw"):
            if key in words:
                self.words.pop(_SAME.get(key, key), None)
                self.words[key] = words[key]
        self._changed(words)

    @property
    def whole(self) -> bool:
        """Return True if the tree is to be preserved whole, not by its log."""
        return self.words.get("format") == "1"

    def shown(self) -> str:
        """Return the options that are not tmpfs's defaults, as /proc/mounts shows those of a tmpfs."""
        limits, shown = self._tree.limits, []
        if self.words.keys() & {"size", "nr_blocks"}:
            shown.append(f"size={limits.max_pages << 2}k")
        if "nr_inodes" in self.words:
            shown.append(f"nr_inodes={limits.max_inodes}")
        shown += [_said(key, self.words[key]) for key in _SHOWN if key in self.words]
        return ",".join(shown)


def _said(key: str, value: Any) -> str:
    return key if value is True else f"{key}={value}"
