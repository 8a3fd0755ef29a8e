# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl install: put the files in place that a Python package cannot, and remove them (--uninstall).

    helpers        /sbin/mount.pkramfs, /sbin/mount.fuse.pkramfs       links to this installation's helper
    pages          PREFIX/share/man/man8/pkramctl.8 …                  links to this installation's manual pages
    completions    PREFIX/share/bash-completion/completions/pkramctl … made from the parsers, likewise for zsh and fish
    units          ETC/systemd/system/, ETC/udev/rules.d/              copies, if there are any; nothing is enabled

PREFIX is /usr/local, and mount(8) looks for helpers in /sbin only. With --prefix DIR everything goes below DIR, for
packagers and for a look. With --etc DIR alone, only units are written, below DIR. A file that is there and is not ours
stays: it is named, and --force replaces it. All of it may be repeated. Where a distribution's package brought pkramfs,
that one has put all in place, and this adds nothing.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pkramfs.cli import arguments, checkup, render
from pkramfs.errors import MachineError, explain
from pkramfs.units import plural

_NEXT = """\
next, for a tree that /etc/fstab mounts on /mnt:
  none /mnt pkramfs pkram=NAME,nofail,x-systemd.requires=dev-dax0.0.device 0 0
                                                (where RAM is a file: x-systemd.requires-mounts-for=PATH)
  systemctl enable --now pkramfs-preserve@mnt.service
                                                (systemd-escape -p gives the name of another path)"""
_PREFIX, _ETC, _SBIN = "/usr/local", "/etc", "/sbin"
_PLACES = {".service": "systemd/system", ".socket": "systemd/system", ".timer": "systemd/system"}
_PLACES |= {".mount": "systemd/system", ".target": "systemd/system", ".rules": "udev/rules.d"}
_OURS = "made by pkramctl install"
_PACKAGERS = {"debian": "Debian", "rpm": "this distribution"}
"""Who installs for a distribution, as the metadata of the package have it: anybody else is pip."""
_RESOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "resources")

Parsers = Mapping[str, argparse.ArgumentParser]
"""The parser of each program."""


class Item(NamedTuple):
    """Something to put in place: a link to `target`, or a file with `text`."""

    path: str
    target: str = ""
    text: str = ""


def add(made: argparse.ArgumentParser, parsers: Callable[[], Parsers]) -> None:
    """Add the options of `install` to its parser; `parsers` makes those of all programs, for completions."""
    made.set_defaults(parsers=parsers)
    made.add_argument("--prefix", metavar="DIR", help="put all files below DIR (default: /usr/local, /sbin and /etc)")
    made.add_argument("--etc", metavar="DIR", help="write only the files for systemd and udev, below DIR")
    made.add_argument("--uninstall", action="store_true", help="remove the files that it has installed")
    made.add_argument("--force", action="store_true", help="replace files of others, too")


def act(args: argparse.Namespace) -> int:
    """Run `pkramctl install`."""
    wanted = list(items(args.prefix, args.etc, args.parsers()))
    if args.prefix is None and args.etc is None and (by := packager()):
        raise MachineError(f"{by}'s package installs and removes these files: --prefix DIR makes another copy")
    try:
        done = _remove(wanted) if args.uninstall else _put(wanted, force=args.force)
    except OSError as error:
        raise MachineError(f"cannot write {explain(error)}; be root, or give --prefix DIR") from None
    units = [item for item in done if not item.target and os.path.splitext(item.path)[1] in _PLACES]
    if units and args.etc in (None, _ETC) and args.prefix is None and os.path.isdir("/run/systemd/system"):
        _reload()
    verb = "removed" if args.uninstall else "wrote"
    if arguments.wants_json(args):
        render.emit_json({"removed" if args.uninstall else "written": [item.path for item in done]})
        return 0
    for item in done:
        render.say(f"{verb} {item.path}{f' (a link to {item.target})' if item.target else ''}")
    rest = len(wanted) - len(done)
    left = f", {rest} {'not there, or not ours' if args.uninstall else 'in place already'}" if rest else ""
    render.say(f"{plural(len(done), 'file')} {'removed' if args.uninstall else 'written'}{left}")
    for line in _NEXT.splitlines() if units and not args.uninstall else []:
        render.say(line)
    return 0


def packager() -> str:
    """Return the distribution whose package this is, empty if it is none's."""
    from importlib import metadata

    try:
        by = (metadata.distribution("pkramfs").read_text("INSTALLER") or "").strip()
    except metadata.PackageNotFoundError:
        return ""
    return _PACKAGERS.get(by, "")


def _reload() -> None:
    """Have systemd and udev read their files again."""
    import subprocess

    for command in (["systemctl", "daemon-reload"], ["udevadm", "control", "--reload"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise MachineError(f"cannot run {explain(error)}") from None
        if done.returncode:
            raise MachineError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def items(prefix: str | None, etc: str | None, parsers: Parsers) -> Iterator[Item]:
    """Yield the files to install."""
    if prefix is not None or etc is None:
        below = os.path.abspath(prefix or _PREFIX)
        yield from _helpers(os.path.join(below, "sbin") if prefix else _SBIN)
        yield from _pages(below)
        yield from _completions(below, parsers)
    yield from _units(os.path.abspath(etc or (os.path.join(prefix, "etc") if prefix else _ETC)))


def _helpers(directory: str) -> Iterator[Item]:
    ours = checkup.own_helper()
    if not os.path.exists(ours):
        raise MachineError(f"this installation has no {ours}: install the package, then run this again")
    for name in checkup.HELPERS:
        yield Item(os.path.join(directory, name), target=ours)


def _pages(prefix: str) -> Iterator[Item]:
    """Yield the manual pages that were installed with the package, unless man(1) finds them there already."""
    import sysconfig

    source = sysconfig.get_path("data")
    if os.path.realpath(source) == os.path.realpath(prefix):
        return
    for name in sorted(os.listdir(os.path.join(_RESOURCES, "man"))):
        page = name.removesuffix(".md")
        place = os.path.join("share", "man", f"man{page.rpartition('.')[2]}", page)
        if os.path.exists(os.path.join(source, place)):
            yield Item(os.path.join(prefix, place), target=os.path.join(source, place))


def _completions(prefix: str, parsers: Parsers) -> Iterator[Item]:
    from pkramfs.cli import completions

    for place, make in completions.SHELLS.values():
        for program, parser in parsers.items():
            yield Item(os.path.join(prefix, place.format(program)), text=make(program, parser))


def _units(etc: str) -> Iterator[Item]:
    """Yield the files for systemd and udev, as the package has them."""
    source = os.path.join(_RESOURCES, "systemd")
    for name in sorted(os.listdir(source)) if os.path.isdir(source) else []:
        place = _PLACES.get(os.path.splitext(name)[1])
        if place:
            with open(os.path.join(source, name), encoding="utf-8") as file:
                yield Item(os.path.join(etc, place, name), text=file.read())


def _put(wanted: list[Item], *, force: bool) -> list[Item]:
    """Put items in place; return those that were not. Raise MachineError, before any change, for files not ours."""
    missing = [item for item in wanted if not _is_there(item)]
    for item in missing:
        if os.path.lexists(item.path) and not force and not _may_replace(item):
            raise MachineError(f"{item.path} exists and is not ours: move it away, or --force replaces it")
    for item in missing:
        os.makedirs(os.path.dirname(item.path), exist_ok=True)
        new = f"{item.path}.new"
        if os.path.lexists(new):
            os.unlink(new)
        if item.target:
            os.symlink(item.target, new)
        else:
            with open(new, "x", encoding="utf-8") as file:
                file.write(item.text)
        os.replace(new, item.path)
    return missing


def _remove(wanted: list[Item]) -> list[Item]:
    """Remove items that are in place and ours; return them."""
    there = [item for item in wanted if os.path.lexists(item.path) and (_is_there(item) or _may_replace(item))]
    there = [item for item in there if not item.target or os.path.islink(item.path)]
    for item in there:
        os.unlink(item.path)
    return there


def _is_there(item: Item) -> bool:
    """Return True if an item is in place as it should be."""
    if item.target:
        return os.path.exists(item.path) and os.path.samefile(item.path, item.target)  # or it is the helper itself
    return _text(item.path) == item.text


def _may_replace(item: Item) -> bool:
    """Return True if the existing file is an earlier one of ours: a link to a file of that name, or one we wrote."""
    if item.target:
        name = os.path.basename(item.target)
        return os.path.islink(item.path) and os.path.basename(os.readlink(item.path)) == name
    return _OURS in _text(item.path)


def _text(path: str) -> str:
    """Return the text of a regular file, nothing if there is none."""
    if os.path.islink(path) or not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
