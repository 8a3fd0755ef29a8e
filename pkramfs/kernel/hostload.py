# SPDX-License-Identifier: GPL-2.0-or-later
"""The conditions under which memory of the host survives a kernel that kexec(8) loads.

    memmap= …     sets memory aside. A kexec does not pass it on, so the new command line repeats it, word by word
    pkram=PFN     is the number of this kernel's super block. If several machines are on memory of this host,
                  pkram=NAME:PFN gives it for each

kexec(8) does the loading, and the host's kernel does not show the command line of a loaded kernel. So the command line
is noted in a file of the machine, which ends with this boot, and checked again before `-e`.

Kernel: arch/x86/kernel/e820.c (parse_memmap_one), kernel/kexec_core.c; kexec-tools kexec/kexec.c
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pkramfs import schema
from pkramfs.errors import FormatError, MachineError, NotPreservedError, PkramfsError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel import kernelrecord
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.machine import named
from pkramfs.machine.directory import Machine
from pkramfs.text import printable
from pkramfs.units import format_pfn

NAME = "loaded.json"
_RESERVING = ("memmap", "efi_fake_mem")
"""Options that decide which memory is set aside."""
_LOADED = schema.Object(
    {"image": schema.Text(), "cmdline": schema.Text(), "boot_id": schema.Text(32)},
    closed=True,
)


@dataclass(frozen=True)
class HostLoaded:
    """The kernel that was loaded with kexec(8)."""

    image: str
    cmdline: str
    boot_id: str


def note(machine: Machine, image: str, cmdline: str) -> None:
    """Note the loaded kernel."""
    machine.write_json(NAME, {"image": image, "cmdline": cmdline, "boot_id": machine.host.boot_id})


def forget(machine: Machine) -> None:
    """Forget the loaded kernel."""
    machine.remove(NAME)


def read(machines: Sequence[Machine]) -> HostLoaded | None:
    """Return the kernel that pkramfs loaded with kexec(8); None if none is loaded, or by another program."""
    for machine in machines:
        data = machine.read_json(NAME, _LOADED, "remove it and load the kernel again")
        if data is not None and machine.host.kexec_loaded and data["boot_id"] == machine.host.boot_id:
            return HostLoaded(**data)
    return None


class Wanted(NamedTuple):
    """The word for a machine on the next command line: pkram= with its super block's pfn."""

    machine: str
    pfn: int
    word: str
    """The word that says so: with the machine's name, if there are several machines."""

    @property
    def whose(self) -> str:
        """Return whose super block it is."""
        return "this kernel" if ":" not in self.word else f"machine {self.machine}"


def wanted(machine: Machine, info: KernelInfo) -> tuple[list[Wanted], list[str]]:
    """Return the words for the machines of this host on the next command line, and a line for each unknown one.

    A machine that is not up in this boot may have preserved trees, too: its header names the super block.
    """
    machines, unknown = Machine.on_host(), list[str]()
    pfns = {machine.name: info.super_pfn}
    for one in machines:
        try:
            pfns.setdefault(one.name, _super_pfn(one))
        except (MachineError, FormatError) as error:
            unknown.append(f"machine {printable(one.name)} cannot be looked at: {error}")
    several = len(pfns) > 1
    words_of = {name: words.pkram_word(format_pfn(pfn), name if several else "") for name, pfn in pfns.items() if pfn}
    return [Wanted(name, pfns[name], words_of[name]) for name in sorted(words_of)], unknown


def _super_pfn(machine: Machine) -> int:
    """Return the super block of a machine, 0 if it has none."""
    info = kernelrecord.read(machine, any_layout=True) if machine.exists() else None
    said = machine.configuration()
    if info is not None or said is None:
        return info.super_pfn if info is not None else 0
    return named.find(said, machine.host, machine.words).header.super_pfn


def compose(machine: Machine, needs: Sequence[Wanted], append: str | None, *, reuse: bool) -> str:
    """Compose the next command line: the running one with the current pkram=, then the appended words."""
    said = ""
    if reuse:
        pkram = " ".join(one.word for one in needs) or f"{words.PKRAM}={words.PKRAM_OFF}"
        said = words.join(words.remove(machine.host.cmdline, words.PKRAM), pkram)
    if append:
        said = words.join(said, append) if said else append.strip()
    words.check_text(said)
    return said


def reserving(cmdline: str) -> list[str]:
    """Return the words of a command line that set memory aside, and keep the kernel itself out of it."""
    found = [word for word in words.words(cmdline) if word.partition("=")[0] in _RESERVING]
    if any("%" in word for word in found):  # KASLR looks for no such word
        found += [word for word in words.words(cmdline) if word == "nokaslr"]
    return found


def problems(machine: Machine, needs: Sequence[Wanted], cmdline: str) -> Iterator[PkramfsError]:
    """Yield the faults of a command line by which the next kernel would lose preserved memory."""
    there = set(words.words(cmdline))
    for word in reserving(machine.host.cmdline):
        if word not in there:
            yield NotPreservedError(f"{word} is missing on the new command line, and no kexec hands it on: append it")
    for one in needs:
        said = words.pkram_of(cmdline, one.machine)
        if not said:
            whose = f" of {one.whose}" if any(words.values(cmdline, words.PKRAM)) else ""
            yield NotPreservedError(f"the new command line has no pkram={whose}: append {one.word}")
        elif any(not words.names(value, one.pfn) for value in said):
            wrong, several = " ".join(f"pkram={value}" for value in said), one.whose != "this kernel"
            remedy = f"for {one.whose} it must say {one.word}" if several else f"leave {one.word} only"
            yield NotPreservedError(f"the new command line says {wrong}: {remedy}")


def kept(machine: Machine, needs: Sequence[Wanted], cmdline: str) -> list[str]:
    """Return the correct words of the command line, for a plan."""
    there = words.words(cmdline)
    right = [f"{word} is repeated" for word in reserving(machine.host.cmdline) if word in there]
    for one in needs:
        said = words.pkram_of(cmdline, one.machine)
        if said and all(words.names(value, one.pfn) for value in said):
            right.append(f"pkram={said[-1]} is the super block of {one.whose}")
    return right
