# SPDX-License-Identifier: GPL-2.0-or-later
"""`mount -o remount,preserve,dryrun DIR`: a dry run of preserving the tree.

    mytmpfs on /mnt: 12 files, 3.0 GiB; about 5 ms, 148 KiB of description
    refused   /a/f: open for writing
    lost      /tmp/x (deleted)
    moved     /big, 512 pages
    unchecked up to 3.0 MiB

*Refused* files prevent the preserve, *lost* ones would not be preserved, *moved* ones would be copied because a
loaded kernel will lie there, *unchecked* data have no checksum yet (verify=data). The status is 32, mount(8)'s failure,
if anything is in the way.
"""

from typing import TYPE_CHECKING

from pkramfs.cli import render
from pkramfs.mounting.helper import MountError
from pkramfs.mounting.options import Options
from pkramfs.units import MIB, PAGE_SHIFT, format_size, plural

if TYPE_CHECKING:
    from pkramfs.control.commands import Commands
    from pkramfs.control.replies import Foreseen
    from pkramfs.machine.mounts import MountEntry


def rehearse(directory: str, entry: "MountEntry", daemon: "Commands", options: Options) -> int:
    """Print the foresight of a preserve; return the exit status."""
    from pkramfs.control.replies import unnamed

    if entry.name is None:
        raise MountError(f"{directory} was mounted without pkram=NAME, so it cannot be preserved: mount it with a name")
    found = daemon.foresee(strict=options.strict, lossy=options.lossy)
    render.say(f"{entry.name} on {directory}: {_figures(found)}")
    for what, lines in (("refused", found["refused"]), ("lost", found["lost"]), ("moved", found["moved"])):
        for line in lines:
            render.say(f"{what:7}   {line}")
        if more := unnamed(found, what):
            render.say(f"{what:7}   {plural(more, 'more file')}")
    if unsummed := found.get("unsummed"):
        render.say(f"unchecked up to {format_size(unsummed * MIB)}")
    return MountError.exit_status if found["refused_count"] else 0


def _figures(found: "Foreseen") -> str:
    size, copied = format_size(found["pages"] << PAGE_SHIFT), found["moved_pages"]
    moved = f", {format_size(copied << PAGE_SHIFT)} of it copied" if copied else ""
    took = f"about {found['microseconds'] / 1000:.0f} ms"
    return (
        f"{plural(found['files'], 'file')}, {size}{moved}; {took}, {format_size(found['description'])} of description"
    )
