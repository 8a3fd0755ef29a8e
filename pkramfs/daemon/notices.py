# SPDX-License-Identifier: GPL-2.0-or-later
"""The notices at the start of a mount, for the kernel log and the user: the origin of its tree, and warnings."""

import os

from pkramfs.daemon.claim import Origin
from pkramfs.fs import handles
from pkramfs.fs.tree import Tree
from pkramfs.kernel.running import Running
from pkramfs.text import exact
from pkramfs.units import PAGE_SHIFT, format_size, plural


def off(kernel: Running, name: str | None) -> str:
    """Return the notice for a `pkram=NAME` mount when PKRAM is off and only a plain tmpfs is possible."""
    if not name or kernel.info.pkram:
        return ""
    kind = "this is a crash kernel" if kernel.info.crash else "pkram=off"
    return f"PKRAM is off in this kernel ({kind}): nothing of it can be preserved"


def scarce(kernel: Running, tree: Tree, *, given: bool) -> str:
    """Return a notice if a given size= is more than the host can ever back; nobody chose the default."""
    size, most = tree.limits.max_pages << PAGE_SHIFT, kernel.ram.most
    if not given or size <= most:
        return ""
    return (
        f"size={format_size(size)} is more than the host has: the file system behind RAM, or the memory cgroup, has "
        f"{format_size(most)}"
    )


def sheltered(origin: Origin, tree: Tree) -> str:
    """Return a notice if a failed kexec has left deleted files with names, and their users are gone."""
    if origin not in (Origin.NODE, Origin.LOG) or not handles.left_behind(tree):
        return ""
    return f"/{exact(handles.SHELTER)} has the files that were deleted but open when its mount was lost: remove it"


def whence(origin: Origin, tree: Tree, *, stood_by: bool) -> str:
    """Return the origin of a tree, to be appended to the line that names its mount."""
    if origin is Origin.NOTHING:
        return ""
    if origin is Origin.DAEMON:
        return f" again by daemon {os.getpid()}" + ", which stood by" * stood_by
    if origin is Origin.KEXEC:
        return f" still, by daemon {os.getpid()}"
    counts, did = tree.counts(), "restored" if origin is Origin.NODE else "recovered"
    return f" ({did} {plural(counts.files, 'file')}, {format_size(counts.pages << PAGE_SHIFT)})"
