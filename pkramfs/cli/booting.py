# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl boot: bring a machine up without mounting anything, for services that have to come first.

Does the same as the first mount: make a machine that does not exist, boot one without a kernel, finish a boot that was
interrupted. If a kernel runs already, nothing is done. A mount from before the boot whose tree crossed it is
not mounted again, but named: as the line by which mount(8) does it.

Kernel: the work of the bootloader at power-on
"""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, render
from pkramfs.units import format_pfn

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl boot`, and say which kernel runs."""
    from pkramfs.kernel import kernelrecord, running
    from pkramfs.machine import process

    machine = arguments.machine(args)
    before = kernelrecord.read(machine, any_layout=True) if machine.exists() else None
    process.shed()  # the boot must not end by a limit of this shell
    info = running.attach(machine).info
    if arguments.wants_json(args):
        booted = before is None or before.generation != info.generation
        again = {"remount": [mount["mountpoint"] for mount in _waiting(machine)]}
        render.emit_json({"generation": info.generation, "booted": booted, "super_pfn": info.super_pfn} | again)
        return
    how = "runs already" if before is not None and before.generation == info.generation else "is up"
    pkram = f"super block at pfn {format_pfn(info.super_pfn)}" if info.pkram else "PKRAM is off"
    render.say(f"kernel {info.generation} ({info.image}) {how}, {pkram}")
    for mount in _waiting(machine):
        render.say(f"not mounted again yet: {line(mount)}")


def _waiting(machine: "Machine") -> list[dict[str, Any]]:
    """Return the mounts whose trees are there and not mounted."""
    from pkramfs.cli import again

    return again.still_there(machine, again.waiting(machine), lambda _: None)


def line(mount: dict[str, Any]) -> str:
    """Return the command line that mounts a tree again."""
    words = [word if value is True else f"{word}={value}" for word, value in mount.get("options", {}).items()]
    return f"mount -t pkramfs -o {shlex.quote(','.join(words))} none {shlex.quote(str(mount['mountpoint']))}"
