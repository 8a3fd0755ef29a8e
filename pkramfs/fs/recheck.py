# SPDX-License-Identifier: GPL-2.0-or-later
"""Verify a tree once its log has been replayed: only what the log may have changed.

    asleep   the columns of the checkpoint, which were verified when it was loaded, and never change
    awake    verified here, all of it together, by the very same rules (verify)
    between  names that sleep of inodes that are awake, and directories that are awake but whose names sleep: counted
             here, so that links and sizes are compared with the truth
    frames   those of files that the log has touched, with one another and with all others; each of these was verified

Every record wakes the inodes that it changes. It also wakes the directory of each name that it changes, or amends that
directory: names that are gone from its columns do not count, names that were added are verified here, and the replay
ensures that no name is in both. So the result is the same as if the whole tree were written as columns and verified,
which takes nearly a second for a million sleeping files.

Kernel: fs/ext4/fast_commit.c (ext4_fc_replay_check_excluded) also records what a replay may touch
"""

from __future__ import annotations

import stat
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from pkramfs.errors import FormatError
from pkramfs.fs.picture import take_awake
from pkramfs.fs.save import header
from pkramfs.fs.verify import Beyond, verify_columns
from pkramfs.pkram.treeformat import Array, Columns, TreeStream
from pkramfs.spans import Spans

if TYPE_CHECKING:
    from pkramfs.fs.asleep import Snapshot
    from pkramfs.fs.tree import Tree

Touched = dict[int, list[tuple[int, int]]]
"""Of each inode whose frames have changed, those (pfn, count) that it had before."""


def recheck(tree: Tree) -> None:
    """Raise FormatError unless a tree follows the rules after records were applied, except those of frames."""
    picture = take_awake(tree)
    columns, beyond = picture.columns, None
    if tree.asleep is not None:
        snapshot = tree.asleep.snapshot()
        beyond = _beyond(snapshot, columns["inodes"]["ino"].view(np.uint64))
        columns = columns | {name: _of_awake(snapshot, columns[name]) for name in ("sums", "damaged")}
    verify_columns(TreeStream.of(header(tree, picture, 0), columns, picture.blobs), beyond, deleted=True)


def frames_of_all(tree: Tree, touched: Touched, before: Spans) -> Spans:
    """Return the frames of all files, from those `before` the replay; raise FormatError if two files share one."""
    found = [tree.inodes[ino].pages for ino in touched if ino in tree.inodes]
    raw = b"".join(chain.from_iterable(pages.leaves for pages in found if pages is not None))
    # (runs, 3): file page, frame and pages of each run of a file that was touched.
    _, pfn, count = np.frombuffer(raw, dtype=np.int64).reshape(-1, 3).T
    gone = np.array([run for runs in touched.values() for run in runs], dtype=np.int64).reshape(-1, 2)
    others, changed = before - Spans.from_runs(gone[:, 0], gone[:, 1]), Spans.from_runs(pfn, count)
    if changed.total != int(count.sum()) or others & changed:
        raise FormatError("Tree pages", "pfn", found="a frame in two files", expected="each once")
    return others | changed


def _beyond(snapshot: Snapshot, numbers: Array) -> Beyond:
    """Return the sleeping names and directories of awake inodes, by their place among `numbers`, which rise."""
    parts, asleep, folders = snapshot.packed.parts, snapshot.inodes, snapshot.folders
    known, there = parts.inodes["ino"], ~snapshot.gone
    parent, child = parts.entries["parent"][there], parts.entries["child"][there]
    is_folder = parts.inodes["mode"] & np.uint32(0o170000) == stat.S_IFDIR
    # Positions of inodes that are awake: once for each name that sleeps; and once for each directory with such names.
    named = child[folders[parent] & ~asleep[child]]
    counts, below = (np.bincount(rows, minlength=len(known)) for rows in (parent, parent[is_folder[child]]))
    above = np.flatnonzero(folders & ~asleep & (counts > 0))
    names = np.bincount(_places(numbers, known[named]), minlength=len(numbers))
    entries, inner = (np.zeros(len(numbers), dtype=np.int64) for _ in range(2))
    places = _places(numbers, known[above])
    entries[places], inner[places] = counts[above], below[above]
    return Beyond(names, entries, inner)


def _places(numbers: Array, wanted: Array) -> Array:
    """Return the places of inodes, which must be awake; raise FormatError for the first that is gone."""
    places = np.searchsorted(numbers, wanted)
    lacking = numbers[np.minimum(places, len(numbers) - 1)] != wanted
    if lacking.any():
        number = int(wanted[np.argmax(lacking)])
        raise FormatError("Tree inodes", "ino", found=f"{number} is gone", expected="there, as names sleep with it")
    return places


def _of_awake(snapshot: Snapshot, columns: Columns) -> Columns:
    """Return the rows of awake inodes; rows of sleeping inodes were verified, and have not changed."""
    known = snapshot.packed.parts.inodes["ino"]
    at = np.minimum(np.searchsorted(known, columns["ino"]), len(known) - 1)
    keep = ~((known[at] == columns["ino"]) & snapshot.inodes[at])
    return {name: column[keep] for name, column in columns.items()}
