# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot of the host, noticed by a machine on memory that may have survived it.

    boot id of            event                                  decision
    host = kernel.json    nothing                                this kernel goes on
    host = pending        the boot of now was interrupted        go on with it
    host = header         the directory was lost meanwhile       refuse; a user may give pkram= by hand
    another one           the host was booted                    see below

The machine's kernel ends with the host's. RAM and its header (machine/header.py) stay if both kernels set them aside,
and the command line may name the super block, as in the series. So the next mount decides:

    nothing was preserved                      boot, and find nothing
    in a crash kernel (/proc/vmcore)           refuse: its command line is a copy of the dead kernel's
    through firmware                           refuse: it may have overwritten memory
    by kexec, with the current pkram=          boot, and restore
    by kexec, without it or with another       refuse, and name both ways out
    metadata are damaged                       refuse, and name what can be read

With --force pkram= is not needed, because the header has it, and readable trees are restored: damaged nodes leave the
list (`_salvage`), as in a forced kexec of the simulation (salvage.py). That kexec also searches for nodes behind a
break of the list; here this is impossible, because the lease table that tells them from file contents is gone. A break
by one flipped bit is repaired.

A refusal changes nothing. Of the command line only pkram= is for pkramfs; all other words are for the host's kernel,
which has understood it. Where several machines are on memory of one host, `pkram=NAME:PFN` is for one of them alone; a
number without a name is for all machines that are not named. Each decides for itself.

What comes back after a boot may be mounted again by /etc/fstab, or by --resume: the header has the list that a machine
of the simulation keeps in nvram.json.

Kernel: drivers/char/random.c (boot_id), arch/x86/kernel/ksysfs.c, mm/pkram.c (pkram_reserve), patches 8 and 13
"""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from pkramfs.errors import FormatError, MachineError, StaleError, VersionError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import incoming, kernelrecord, nvram
from pkramfs.kernel.image import BUILTIN, load_image
from pkramfs.kernel.incoming import IncomingNode
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.kernel.nvram import ImageInfo, NodePages, Pending
from pkramfs.machine import header
from pkramfs.machine.directory import Machine
from pkramfs.machine.header import Header
from pkramfs.machine.ram import Ram
from pkramfs.mounting.names import node_name
from pkramfs.pkram import superblock
from pkramfs.pkram.rescue import Survey
from pkramfs.pkram.store import Store
from pkramfs.text import exact, literal
from pkramfs.units import BLOCK_SIZE, PAGE_SIZE, format_pfn, format_size, plural

_MOST_NAMED = 5
_FIRMWARE = "memory went through firmware"


def is_noticed(machine: Machine, pending: Pending | None) -> bool:
    """Return True if `decide` has to choose, because no boot of the machine was decided in this boot of the host."""
    if machine.elsewhere() is None:
        return False
    return pending is None or pending.host.get("boot_id") != machine.host.boot_id


def decide(machine: Machine, *, append: str = "", force: bool = False) -> None:
    """Make the boot that is due the pending one, or refuse.

    `append` holds words that the command line lacks; `force` goes on without them, after a boot through firmware, and
    without what cannot be read.
    """
    _refuse_in_crash_kernel(machine)
    ram = machine.ram()
    there = _header(machine, ram)
    _refuse_users(machine, there)
    found = _look(ram, there)
    if not found.nodes and not found.problems:
        cold(machine)
        return
    why = _refusal(machine, there, append, force)
    if why or (found.problems and not (force and found.readable)):
        refusal = MachineError(_ways_out(machine, there, found, why))
        if found.problems:
            refusal.exit_status = found.problems[0].exit_status
        raise refusal
    lost = tuple(_salvage(machine, ram, there)) if found.problems else ()
    pkram = f"pkram={format_pfn(there.super_pfn)}"
    back = [{"name": one.name, "mountpoint": one.directory, "options": one.options} for one in there.mounts]
    image, host = _image(machine), facts(machine)
    nvram.set_pending(machine, Pending(nvram.KEXEC, there.generation + 1, pkram, image, lost=lost, host=host), back)


def _ways_out(machine: Machine, there: Header, found: "_Found", why: str) -> str:
    """Return the reason for a refused boot, and the remedy."""
    pfn, command = format_pfn(there.super_pfn), f"pkram-kexec{machine.words}"
    gives_up = f"`{command} --cold --force` gives it up"
    if found.problems:
        why = f"{why}, and {found.problems[0]}" if why else str(found.problems[0])
        rest = "the rest and whatever the list of nodes named behind the break" if found.broken else "the rest"
        some = f"`{command} --resume --force` restores what can be read and loses {rest}, " * bool(found.nodes)
        return f"{found} at super block {pfn}: {why}; {some}{gives_up}"
    insists = " --force" * why.startswith(_FIRMWARE)
    again = f"`{command} --resume{insists} --append pkram={pfn}` restores it if it is whole"
    return f"{found} at super block {pfn}: {why}; {again}, {gives_up}"


def waiting(machine: Machine) -> str:
    """Describe what is preserved in the memory of a machine that is not up; empty if nothing is."""
    if machine.elsewhere() is None or kernelrecord.read(machine, any_layout=True) is not None:
        return ""
    ram = machine.ram()
    found = _look(ram, _header(machine, ram))
    return str(found) if found.nodes or found.problems else ""


def _refusal(machine: Machine, there: Header, append: str, force: bool) -> str:
    """Return why this boot must not restore preserved trees, empty if it may."""
    host = machine.host
    if there.boot_id == host.boot_id and not append and not force:
        return "its kernel runs, but the directory of the machine was removed"
    if there.boot_id != host.boot_id and host.kexeced is False and not force:
        return f"{_FIRMWARE} (boot loader type {host.loader:#x}), which may have overwritten it"
    if force and not append:
        return ""
    cmdline = append or host.cmdline
    said = words.pkram_of(cmdline, machine.name)
    if not said and any(words.values(cmdline, words.PKRAM)):
        return f"the command line of this boot has pkram= of other machines, and none of {literal(machine.name)}"
    if not said:
        return "the command line of this boot has no pkram="
    if any(not words.names(value, there.super_pfn) for value in said):
        return f"the command line of this boot says {' '.join(f'pkram={literal(value)}' for value in said)}"
    return ""


def _refuse_users(machine: Machine, there: Header) -> None:
    """Raise MachineError while daemons of this boot have the memory open, although the directory was removed."""
    found = machine.elsewhere()
    if found is None or there.boot_id != machine.host.boot_id or kernelrecord.read(machine, any_layout=True):
        return
    if pids := machine.host.users(found.path):
        raise MachineError(f"{machine.path()} was removed while its memory is in use: end process {pids[0]} first")


def _refuse_in_crash_kernel(machine: Machine) -> None:
    """Raise MachineError in a kernel that examines a dead one, even with --force."""
    if machine.host.is_crash_kernel:
        raise MachineError("this is a crash kernel (/proc/vmcore is there): what was preserved is left as it is")


def cold(machine: Machine) -> None:
    """Make a boot that finds nothing the pending one."""
    _refuse_in_crash_kernel(machine)
    there = _header(machine, machine.ram())
    _refuse_users(machine, there)
    off = words.pkram_off(machine.host.cmdline, machine.name)
    said = f"{words.PKRAM}={words.PKRAM_OFF}" if off else ""
    nvram.set_pending(machine, Pending(nvram.COLD, there.generation + 1, said, _image(machine), host=facts(machine)))


def _header(machine: Machine, ram: Ram) -> Header:
    """Return the header, which was there when the directory was made."""
    there = header.read(ram)
    if there is None:
        raise MachineError(f"the memory of {machine.path()} no longer has a header: it was overwritten")
    said = machine.configuration()
    if said is not None and there.uuid != said.uuid:
        raise MachineError(f"{said.ram} holds another machine than {machine.conf_path} says: {literal(there.name)}")
    return there


def facts(machine: Machine) -> dict[str, Any]:
    """Return the facts of the host that a boot needs; none for a machine of the simulation."""
    if machine.elsewhere() is None:
        return {}
    host = machine.host
    return {"boot_id": host.boot_id, "cmdline": host.cmdline, "release": host.release}


def _image(machine: Machine) -> ImageInfo:
    """Return the host's kernel, which is somewhere else, as an image of ours: it needs only a place for its tables."""
    builtin = ImageInfo.of(load_image(BUILTIN))
    name = f"linux {machine.host.release}"
    return replace(builtin, kind="linux", name=name, version="", init_size=BLOCK_SIZE, align=BLOCK_SIZE)


class _Found(NamedTuple):
    """The preserved nodes that can be read, and the faults of the others."""

    nodes: list[IncomingNode]
    problems: list[FormatError]
    broken: bool = False
    """The list of nodes ends in a word that cannot be read: nobody knows what it named behind it."""

    @property
    def readable(self) -> bool:
        """Return False for data of another version, or that a later kernel took over: they must not be mended."""
        return not any(isinstance(error, StaleError | VersionError) for error in self.problems)

    def __str__(self) -> str:
        if not self.nodes:
            return "memory that cannot be read"
        names = ", ".join([node.name for node in self.nodes[:_MOST_NAMED]] + ["…"] * (len(self.nodes) > _MOST_NAMED))
        size = format_size(sum(node.spans.total for node in self.nodes) * PAGE_SIZE)
        found = f"{plural(len(self.nodes), 'node')} ({names}), {size}, preserved"
        return f"{found} beside what cannot be read" if self.problems else found


def _look(ram: Ram, there: Header) -> _Found:
    """Read all that is preserved, and change nothing."""
    found = _Found([], [])
    if not there.super_pfn:
        return found
    if error := superblock.damage(ram, there.super_pfn):
        found.problems.append(error)
        if not found.readable:
            return found
    survey = Store(ram, there.super_pfn, nullcontext).survey()
    found.problems.extend(error for error in survey.problems if str(error) not in map(str, found.problems))
    for node in survey.nodes:
        try:
            found.nodes.append(incoming.described(ram, node))
        except FormatError as error:
            found.problems.append(error)
    return found._replace(broken=bool(survey.broken))


def _salvage(machine: Machine, ram: Ram, there: Header) -> list[NodePages]:
    """Take unreadable nodes out of the list; return the losses. May be repeated."""
    store, lost = Store(ram, there.super_pfn, machine.tables), list[NodePages]()

    def tell(survey: Survey) -> None:
        for error in survey.damaged:
            lost.append((f"a node at pfn {format_pfn(error.pfn or 0)}, which cannot be read,", 0))
        lost.extend([("whatever the list of nodes named behind a break", 0)] * survey.cut)

    store.mend(generation=there.generation, before=tell)
    for node in store.nodes():
        try:
            incoming.described(ram, node)
        except FormatError:
            lost.append((f"node {exact(node.name)}", node.pages))
            store.withdraw(node.name)
    return lost


def remember(machine: Machine, mount: header.Mount, nodes: Collection[bytes]) -> bool:
    """Note in the header how a tree was mounted that is preserved now; False if the header has no room for it.

    Trees that are in none of the `nodes` any more are forgotten. The machine lock may be held shared.
    """
    if machine.elsewhere() is None:
        return True
    ram = machine.ram()
    with machine.tables():  # one at a time
        there = _header(machine, ram)
        others = (one for one in there.mounts if one.name != mount.name and node_name(one.name) in nodes)
        mounts = header.fitting([*others, mount])
        if mounts != there.mounts:
            header.write(ram, replace(there, mounts=mounts))
    return mount in mounts


def note(machine: Machine, ram: Ram, info: KernelInfo) -> None:
    """Write into the header which kernel runs now; before its predecessor's super block is consumed."""
    if machine.elsewhere() is None:
        return
    there = _header(machine, ram)
    now = replace(there, generation=info.generation, super_pfn=info.super_pfn, boot_id=info.boot_id)
    if now != there or header.is_alone(ram, now):
        header.write_both(ram, now)
