# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl boot: bring a machine up without mounting anything, for services that have to come first.

What the first mount does: a machine that is not there is made, one without a kernel is booted, a boot that was
interrupted is finished. If a kernel runs already, nothing is done.

Kernel: what the bootloader does at power-on
"""

import argparse

from pkramfs.cli import arguments, render
from pkramfs.units import format_pfn


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl boot`, and say which kernel runs."""
    from pkramfs.kernel import kernelrecord, running
    from pkramfs.machine import process

    machine = arguments.machine(args)
    before = kernelrecord.read(machine, any_layout=True) if machine.exists() else None
    process.shed()  # what boots must not end by a limit of this shell
    info = running.attach(machine).info
    if arguments.wants_json(args):
        booted = before is None or before.generation != info.generation
        render.emit_json({"generation": info.generation, "booted": booted, "super_pfn": info.super_pfn})
        return
    how = "runs already" if before is not None and before.generation == info.generation else "is up"
    pkram = f"super block at pfn {format_pfn(info.super_pfn)}" if info.pkram else "PKRAM is off"
    render.say(f"kernel {info.generation} ({info.image}) {how}, {pkram}")
