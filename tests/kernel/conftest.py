# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine in a temporary root, its boots run in this process, and trees made of patterned pages."""

import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pkramfs.kernel import boot, kernelrecord, kexec, loading, nvram, running, succession
from pkramfs.kernel.image import EHDR, PHDR, SETUP
from pkramfs.kernel.running import Running
from pkramfs.machine.directory import Machine
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.spans import Spans
from pkramfs.units import MIB, format_pfn

Runs = Sequence[tuple[int, int]]


class Died(BaseException):
    """The process was killed."""


@dataclass
class Lab:
    """One machine, and what people do with it. `die_after` names a step at which it is killed, once."""

    machine: Machine
    die_after: str | None = None
    steps: list[str] = field(default_factory=list)

    def start_boot(self, machine: Machine, *, force: bool = False) -> None:
        boot.boot(machine, force=force, after_step=self.after)

    def after(self, step: str) -> None:
        self.steps.append(step)
        if step == self.die_after:
            self.die_after = None
            raise Died(step)

    def dies(self, step: str) -> AbstractContextManager[Any]:
        """Expect the block to end with the machine killed after this step."""
        self.die_after = step
        return pytest.raises(Died)

    def up(self) -> Running:
        return running.attach(self.machine, timeout=5)

    def load(self, image: str = "builtin:4M", append: str = "ro", **words: Any) -> Any:
        """Load a kernel with the right pkram= (or the one in `append`)."""
        if "pkram=" not in append:
            append += f" pkram={format_pfn(self.up().info.super_pfn)}"
        return loading.load(self.machine, loading.Request(image, append=append, **words))

    def execute(self, **how: Any) -> Running:
        """Do what pkram-kexec -e does, with nothing mounted."""
        with self.machine.lifecycle(shared=False, timeout=5):
            kexec.plan(self.machine, [], **how).execute()
        return running.look(self.machine)

    def cycle(self, image: str = "builtin:4M", append: str = "ro", **how: Any) -> Running:
        self.load(image, append)
        return self.execute(**how)

    def fill(self, runs: Runs, seed: int) -> int:
        """Write pages that no other seed writes; return their checksum."""
        ram, total = self.up().ram, 0
        for start, count in runs:
            words = ram.words(start, count)
            words[:] = np.random.default_rng([seed, start]).integers(0, 1 << 63, len(words), dtype=np.uint64)
            total = zlib.crc32(words, total)
        return total

    def grow(self, pages: int, seed: int = 1) -> tuple[Frames, Runs, int]:
        """Make a tree of `pages` pages that is not preserved; return its frames, runs and checksum."""
        kernel = self.up()
        frames = Frames(kernel.ram, kernel.leases, new_tree_id())
        runs = frames.allocate(pages)
        return frames, runs, self.fill(runs, seed)

    def preserve(self, name: str, pages: int, seed: int = 1) -> None:
        self.publish(name, *self.grow(pages, seed))

    def publish(self, name: str, frames: Frames, runs: Runs, total: int) -> None:
        kernel = self.up()
        counts = np.array([count for _, count in runs], np.uint64)
        index = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.uint64)
        pfns = np.array([pfn for pfn, _ in runs], np.uint64)
        banned = kernel.banned()
        with kernel.store.prepare_save(name.encode(), tree_id=frames.tree_id, frames=frames, banned=banned) as save:
            with save.object() as stream:
                stream.write(str(total).encode())
                stream.save_runs(index, pfns, counts)
            save.finish()

    def intact(self, name: str) -> bool:
        """Return True if a node's pages are as they were when it was saved."""
        kernel, total = self.up(), 0
        with kernel.store.prepare_load(name.encode()) as load:
            (stream,) = list(load)
            expected = int(stream.read())
            _, pfns, counts = stream.load_runs()
            for start, count in zip(pfns.tolist(), counts.tolist(), strict=True):
                total = zlib.crc32(kernel.ram.words(start, count), total)
            load.finish()
        return total == expected

    def facts(self) -> dict[str, Any]:
        """Return all that must be the same however often a boot was interrupted."""
        kernel = self.up()
        info = kernelrecord.read(self.machine)
        assert info is not None
        plain = info.to_json() | {"booted": 0, "report": info.report | {"phases": {}}}
        return {
            "info": plain,
            "leases": kernel.leases.counts(),
            "nvram": nvram.read(self.machine),
            "files": {name: self.machine.read_text(name) for name in ("cmdline", "pkram", "iomem")},
            "nodes": [n.name for n in kernel.store.nodes()],
            "left": sorted(os.listdir(self.machine.path("kexec"))),
            "reserved": list(self.reserved()),
        }

    def reserved(self) -> Spans:
        """Return every page that holds something: the kernel's own and the nodes'."""
        kernel = self.up()
        return kernel.info.own_pages | kernel.store.preserved()


@pytest.fixture
def root(pkram_root: Path) -> Path:
    """Give a PKRAM_ROOT on tmpfs that is checked and removed afterwards."""
    return pkram_root


@pytest.fixture
def make_lab(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Lab]:
    """Make machines whose boots run in this process: a boot sees no difference, and may be killed."""

    def make(ram: int = 256 * MIB, *, nodes: int = 1, seed: int = 7, name: str = "default") -> Lab:
        machine = Machine.locate(name)
        machine.create(FirmwareMap.default(ram, nodes, seed=seed))
        lab = Lab(machine)
        monkeypatch.setattr(succession, "start_boot", lab.start_boot)
        return lab

    return make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
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
