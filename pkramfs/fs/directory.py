# SPDX-License-Identifier: GPL-2.0-or-later
"""Names to inodes, and a listing whose places stay valid while entries come and go.

Every entry has a *cookie*, a number that only rises. The entry gets it when the name appears, and keeps it for as
long as it exists. Listing is newest first, "the entries whose cookie is less than c": a program in
the middle of a listing sees each entry that stays exactly once, whatever is created or removed
meanwhile (seekdir too). New entries are out of reach, so a program that creates a name for each
one it lists comes to an end.

Callers see *places* of a listing (d_off, telldir), which rise while cookies fall, so that every place before
the end is less than the end, and fit 31 bits:

    0  1  2 … LAST - cookie …  LAST       `.`, `..`, the entries, the end, which is tmpfs's own number

    entries   {name: (inode, cookie)}             the truth; one dict look-up for a name
    _cookies  3  4  5  6  7        ascending      the order, searched by bisection
    _names    a  b  -  d  -        - removed      squeezed out when more than half are dead

An inode that a rename moves becomes a new entry, the newest: in the same directory, in place of
another inode, and both inodes of an exchange.

Kernel: fs/libfs.c (simple_offset_add, offset_iterate_dir), which tmpfs uses since 6.6
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import compress
from typing import TYPE_CHECKING

from pkramfs.fs.inode import Inode
from pkramfs.fs.rules import FIRST_COOKIE

if TYPE_CHECKING:
    from pkramfs.fs.asleep import Asleep

LAST = 0x7FFFFFFF
"""The place behind every listing's last entry."""
MOST_COOKIE = LAST - FIRST_COOKIE
"""The highest number that an entry gets."""
_BATCH = 256


class Directory:
    """The entries of one directory. `parent` is what `..` means; the root is its own parent."""

    __slots__ = ("_cookies", "_dead", "_names", "bed", "entries", "next_cookie", "parent")
    asleep = False
    bed: tuple[Inode, Asleep]
    """Only of a directory that sleeps: see asleep."""

    def __init__(self, parent: Inode) -> None:
        self.parent = parent
        self.entries: dict[bytes, tuple[Inode, int]] = {}
        self.next_cookie = FIRST_COOKIE
        self._cookies: array[int] = array("q")
        self._names: list[bytes | None] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, name: bytes) -> Inode | None:
        """Return the inode of a name, or None."""
        entry = self.entries.get(name)
        return None if entry is None else entry[0]

    def holds(self, name: bytes) -> bool:
        """Return True if there is such a name."""
        return name in self.entries

    def add(self, name: bytes, inode: Inode, cookie: int = 0) -> int:
        """Add a new name with `cookie`, or with the next one if `cookie` is not the highest; return the cookie."""
        if self.next_cookie > MOST_COOKIE:
            self._renumber()
        if not self.next_cookie <= cookie <= MOST_COOKIE:
            cookie = self.next_cookie
        self.next_cookie = cookie + 1
        self.entries[name] = (inode, cookie)
        self._cookies.append(cookie)
        self._names.append(name)
        return cookie

    def remove(self, name: bytes) -> None:
        """Remove an existing name."""
        self._names[bisect_left(self._cookies, self.entries.pop(name)[1])] = None
        self._dead += 1
        if self._dead > 32 and self._dead * 2 > len(self._names):
            self._squeeze()

    def after(self, place: int) -> Iterator[tuple[bytes, Inode, int]]:
        """Yield (name, inode, place behind it) of the entries from `place` on, newest first.

        It looks one entry ahead: the place behind the last entry is LAST.
        """
        cookie, held = min(LAST + 1 - place, self.next_cookie), None
        while True:  # removals between two entries are fine; a rename is seen by the next call
            end = bisect_left(self._cookies, cookie)
            start = max(end - _BATCH, 0)
            if start == end:
                break
            top, cookie = cookie, self._cookies[start]
            for name in reversed(self._names[start:end]):
                entry = self.entries.get(name) if name is not None else None
                if name is not None and entry is not None and entry[1] < top:
                    if held is not None:
                        yield held
                    held = name, entry[0], LAST + 1 - entry[1]
        if held is not None:
            yield held[0], held[1], LAST

    def columns(self) -> tuple[list[bytes], tuple[Inode, ...], tuple[int, ...]]:
        """Return the names, inodes and cookies, oldest first, for saving: the order in which a dict was filled."""
        inodes, cookies = zip(*self.entries.values(), strict=True) if self.entries else ((), ())
        return list(self.entries), inodes, cookies

    def fill(self, names: list[bytes], inodes: list[Inode], cookies: list[int]) -> None:
        """Set all entries of a directory at once, cookies ascending."""
        if cookies and cookies[-1] > MOST_COOKIE:
            cookies = list(range(FIRST_COOKIE, FIRST_COOKIE + len(names)))
        self.entries = dict(zip(names, zip(inodes, cookies, strict=True), strict=True))
        self._names = list(names)
        self._cookies = array("q", cookies)
        self.next_cookie = cookies[-1] + 1 if cookies else FIRST_COOKIE
        self._dead = 0

    def append(self, other: Directory) -> None:
        """Add the entries of another directory, whose cookies are higher than ours."""
        for name, (inode, cookie) in other.entries.items():
            self.add(name, inode, cookie)
        self.next_cookie = max(self.next_cookie, other.next_cookie)

    def _renumber(self) -> None:
        """Begin again with the lowest cookies, once in two thousand million names. A listing that is under way then
        may show an entry twice, but misses none."""
        names, inodes, _ = self.columns()
        self.fill(names, list(inodes), list(range(FIRST_COOKIE, FIRST_COOKIE + len(names))))

    def _squeeze(self) -> None:
        alive = [name is not None for name in self._names]
        self._cookies = array("q", compress(self._cookies, alive))
        self._names = list(compress(self._names, alive))
        self._dead = 0
