# SPDX-License-Identifier: GPL-2.0-or-later
"""What must be true of a kernel that kexec(8) loads, if memory of the host is to survive it.

    memmap= …     sets memory aside. No kexec hands it on, so the new command line repeats it, word by word
    pkram=PFN     is the number of this kernel's super block

kexec(8) does the loading, and nobody can ask the host's kernel for the command line of what was loaded. So what we had
it load is noted in a file of the machine, which ends with this boot, and looked at again before `-e`.

Kernel: arch/x86/kernel/e820.c (parse_memmap_one), kernel/kexec_core.c; kexec-tools kexec/kexec.c
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pkramfs import schema
from pkramfs.errors import MachineError, NotPreservedError, PkramfsError
from pkramfs.kernel import cmdline as words
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.machine.directory import Machine
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
    """What kexec(8) was given."""

    image: str
    cmdline: str
    boot_id: str


def note(machine: Machine, image: str, cmdline: str) -> None:
    """Note what was loaded."""
    machine.write_json(NAME, {"image": image, "cmdline": cmdline, "boot_id": machine.host.boot_id})


def forget(machine: Machine) -> None:
    """Forget what was loaded."""
    machine.remove(NAME)


def read(machine: Machine) -> HostLoaded | None:
    """Return what we had kexec(8) load; None if nothing is loaded, or somebody else had it loaded."""
    data = machine.read_json(NAME, _LOADED, "remove it and load the kernel again")
    if data is None or not machine.host.kexec_loaded or data["boot_id"] != machine.host.boot_id:
        return None
    return HostLoaded(**data)


def compose(machine: Machine, info: KernelInfo, append: str | None, *, reuse: bool) -> str:
    """Compose the next command line: the running one's with the current pkram=, then what is appended."""
    said = ""
    if reuse:
        pkram = format_pfn(info.super_pfn) if info.pkram else words.PKRAM_OFF
        said = words.put(machine.host.cmdline, words.PKRAM, pkram)
    if append:
        said = words.join(said, append) if said else append.strip()
    if "\n" in said or "\0" in said:
        raise MachineError("the command line has a line break or a NUL in it")
    return said


def reserving(cmdline: str) -> list[str]:
    """Return the words of a command line that set memory aside, and keep the kernel itself out of it."""
    found = [word for word in words.words(cmdline) if word.partition("=")[0] in _RESERVING]
    if any("%" in word for word in found):  # KASLR looks for no such word
        found += [word for word in words.words(cmdline) if word == "nokaslr"]
    return found


def problems(machine: Machine, info: KernelInfo, cmdline: str) -> Iterator[PkramfsError]:
    """Yield what would lose preserved memory if this command line were the next kernel's."""
    there = set(words.words(cmdline))
    for word in reserving(machine.host.cmdline):
        if word not in there:
            yield NotPreservedError(f"{word} is missing on the new command line, and no kexec hands it on: append it")
    if not info.pkram:
        return
    said = [value for value in words.values(cmdline, words.PKRAM) if value]
    right = f"pkram={format_pfn(info.super_pfn)}"
    if not said:
        yield NotPreservedError(f"the new command line has no pkram=: append {right}")
    elif any(not words.names(value, info.super_pfn) for value in said):
        wrong = " ".join(f"pkram={value}" for value in said)
        yield NotPreservedError(f"the new command line says {wrong}: leave {right} only")


def kept(machine: Machine, info: KernelInfo, cmdline: str) -> list[str]:
    """Return the words that do what they must, for a plan."""
    there = words.words(cmdline)
    right = [f"{word} is repeated" for word in reserving(machine.host.cmdline) if word in there]
    said = words.values(cmdline, words.PKRAM)
    if info.pkram and said and all(words.names(value, info.super_pfn) for value in said if value):
        right.append(f"pkram={said[-1]} is the super block of this kernel")
    return right
