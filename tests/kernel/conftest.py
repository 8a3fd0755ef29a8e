# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine in a temporary root (see Boots), and files that are kernels."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pkramfs.kernel import succession
from pkramfs.kernel.image import EHDR, PHDR, SETUP
from pkramfs.machine.directory import Machine
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.units import MIB
from tests.support.lab import Boots


@pytest.fixture
def root(pkram_root: Path) -> Path:
    """Give a PKRAM_ROOT on tmpfs that is checked and removed afterwards."""
    return pkram_root


@pytest.fixture
def make_lab(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Boots]:
    """Make machines whose boots run in this process: a boot sees no difference, and may be killed."""

    def make(ram: int = 256 * MIB, *, nodes: int = 1, seed: int = 7, name: str = "default") -> Boots:
        machine = Machine.locate(name)
        machine.create(FirmwareMap.default(ram, nodes, seed=seed))
        lab = Boots(machine)
        monkeypatch.setattr(succession, "start_boot", lab.start_boot)
        return lab

    return make


@pytest.fixture
def lab(make_lab: Callable[..., Boots]) -> Boots:
    return make_lab()


BZ = {
    "setup_sects": 4,
    "boot_flag": 0xAA55,
    "header": b"HdrS",
    "version": 0x20F,
    "kernel_version": 0x300,
    "loadflags": 1,
    "kernel_alignment": 0x200000,
    "relocatable_kernel": 1,
    "xloadflags": 1,
    "pref_address": 0x1000000,
    "init_size": 0x800000,
}


def write_bzimage(path: Path, *, payload: bytes = b"k" * 10000, **changes: object) -> str:
    """Write a file with a setup header like a real kernel's."""
    fields = BZ | {"syssize": (len(payload) + 15) // 16} | changes
    setup = bytearray((int(str(fields["setup_sects"])) + 1) * 512)
    setup[: SETUP.size] = SETUP.pack(**fields)
    setup[0x500:0x510] = b"6.1.0-13-amd64 (" if len(setup) >= 0x510 else b""
    path.write_bytes(bytes(setup) + payload)
    return str(path)


def write_elf(path: Path, loads: list[tuple[int, bytes, int]], **changes: object) -> str:
    """Write an ELF file with one PT_LOAD per (paddr, bytes, memsz)."""
    fields = {"ident": b"\x7fELF\x02\x01\x01", "type": 2, "machine": 62, "phoff": 64, "phentsize": 56}
    at = 64 + 56 * len(loads)
    table, body = b"", b""
    for paddr, data, memsz in loads:
        table += PHDR.pack(type=1, offset=at + len(body), paddr=paddr, filesz=len(data), memsz=memsz)
        body += data
    path.write_bytes(EHDR.pack(**(fields | {"phnum": len(loads)} | changes)) + table + body)
    return str(path)


@pytest.fixture
def bzimage() -> Callable[..., str]:
    """Write a bzImage and return its path."""
    return write_bzimage


@pytest.fixture
def elf() -> Callable[..., str]:
    """Write an ELF kernel and return its path."""
    return write_elf
