# SPDX-License-Identifier: GPL-2.0-or-later
"""RAM that the user named: taken once, and found again at every boot of the host.

    take     pkramctl machine create --ram PATH    examine it, write a header and NAME.conf
    find     a first mount after a boot            NAME.conf ─▶ memory ─▶ header: the same machine as before

Memory that already holds a machine is taken as it is, with everything that is preserved in it: NAME.conf may have been
lost with a disk. Memory that holds anything else, or that could not survive, is refused without --force.

Kernel: drivers/nvdimm/claim.c (the owner of a namespace), drivers/md/md.c (assembling by UUID), in spirit
"""

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from pkramfs.errors import FormatError, MachineError
from pkramfs.machine import backing, header
from pkramfs.machine.backing import Backing
from pkramfs.machine.conf import Conf
from pkramfs.machine.header import Header
from pkramfs.machine.host import Host
from pkramfs.machine.mapped import open_ram
from pkramfs.machine.ram import Ram
from pkramfs.text import literal
from pkramfs.units import PAGE_SIZE

_DEVICE = re.compile(r"dax[0-9]+\.[0-9]+")


class Found(NamedTuple):
    """Memory, and the header in it."""

    backing: Backing
    header: Header


def find(conf: Conf, host: Host, words: str = "") -> Found:
    """Find the machine that a configuration names; raise MachineError if it is gone.

    The numbers of memory devices may change at a boot: the one with the UUID is searched among all. `words` are
    the options by which a command finds the machine, for a remedy.
    """
    spec = backing.parse(conf.ram)
    try:
        return _look(spec, conf, host, words)
    except MachineError:
        for path in _siblings(spec.path):
            with contextlib.suppress(MachineError, FormatError):
                return _look(spec._replace(path=path), conf, host, words)
        raise


def _look(spec: backing.Spec, conf: Conf, host: Host, words: str) -> Found:
    """Return the memory at a path; raise MachineError if it is not the machine of the configuration."""
    found = backing.find(spec, host)
    ram = open_ram(found)
    try:
        there = header.read(ram)
    finally:
        ram.close()
    if there is None:
        raise MachineError(
            f"{conf.ram} no longer holds a machine: it lost its contents, or this kernel did not set it aside "
            f"(memmap=); `pkramctl machine create{words} --ram {conf.ram} --force` makes a new one"
        )
    if there.uuid != conf.uuid:
        raise MachineError(
            f"{conf.ram} holds another machine, {literal(there.name)} with uuid {there.uuid}, not {conf.uuid}: "
            "name its memory in the configuration"
        )
    return Found(replace(found, size=there.size), there)


def _siblings(path: str) -> list[str]:
    """Return the other devices of memory beside one, /dev/dax1.0 beside /dev/dax0.0."""
    place = os.path.dirname(path)
    if not _DEVICE.fullmatch(os.path.basename(path)) or not os.path.isdir(place):
        return []
    names = [name for name in os.listdir(place) if _DEVICE.fullmatch(name)]
    return [other for name in sorted(names) if (other := os.path.join(place, name)) != path]


def take(name: str, spec: backing.Spec, host: Host, *, seed: int | None = None, force: bool = False) -> Found:
    """Take memory for the machine `name`: as it is if it holds the machine, otherwise with a new header."""
    backing.make_file(spec)
    found = backing.find(spec, host)
    backing.refuse_used(found, host)
    _refuse([] if force else list(backing.problems(found, host)))
    backing.allocate(found)
    ram = open_ram(found)
    try:
        there = None if force else _there(ram, name, found)
        if there is None:
            header.wipe(ram)
            made = header.new(name, found.size, secrets.randbits(63) if seed is None else seed)
            there = header.write(ram, made)
    finally:
        ram.close()
    return Found(replace(found, size=there.size), there)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise MachineError(f"{problems[0]}; --force takes it in spite of this")


def _there(ram: Ram, name: str, found: Backing) -> Header | None:
    """Return the header of this machine if the memory holds it, None if the memory is empty."""
    try:
        there = header.read(ram)
    except FormatError as error:
        error.remedy = "--force makes a new machine there, and gives up what is preserved"
        raise
    if there is not None and there.name != name:
        raise MachineError(
            f"{found.path} holds the machine {literal(there.name)}: give --machine {there.name}, or --force makes a "
            "new one of it and gives up what is preserved"
        )
    if there is None and (what := backing.contents(ram.peek(0, backing.LOOKED_AT // PAGE_SIZE))):
        raise MachineError(f"{found.path} holds {what}: --force overwrites it")
    return there
