# SPDX-License-Identifier: GPL-2.0-or-later
"""Crash kernels: in their own window, PKRAM off, the dead kernel's memory as it was."""

import errno
from typing import Any

import pytest

from pkramfs.errors import ExhaustedError, MachineError, PkramError
from pkramfs.kernel import boot, crash, loading, nvram, staging, succession
from pkramfs.kernel.loading import Request
from pkramfs.kernel.running import Running
from pkramfs.spans import Spans


def ready(lab: Any) -> None:
    """Return a kernel with a crash kernel loaded."""
    lab.cycle(append="ro crashkernel=32M")
    loading.load(lab.machine, Request("builtin:8M", append="irqpoll maxcpus=1"), panic=True)


def panic(lab: Any) -> Any:
    with lab.machine.lifecycle(shared=False):
        return crash.panic(lab.machine)


def test_the_memory_of_the_dead_kernel_stays(lab: Any) -> None:
    ready(lab)
    lab.preserve("a", 500)
    lab.grow(300, seed=9)
    kernel = lab.up()
    window = Spans([kernel.info.reserved["Crash kernel"]])
    outside = kernel.ram.data_spans() - window
    before = {start: kernel.ram.peek(start, end - start) for start, end in outside}
    dead = panic(lab)
    assert (dead.info.kind, dead.info.super_pfn, dead.info.pkram) == ("crash", 0, False)
    assert dead.ram.data_spans() - window == outside
    assert {start: dead.ram.peek(start, len(data) // 4096) for start, data in before.items()} == before
    assert not dead.info.own_pages - window
    assert dead.leases.counts()["free"] * 512 < window.total
    report = dead.info.report["dead"]
    assert report["super_pfn"] == kernel.info.super_pfn
    assert "Kernel panic - not syncing: sysrq triggered crash" in report["dmesg"][-1]
    assert lab.machine.read_text("pkram") is None


def test_pkram_is_off(lab: Any) -> None:
    ready(lab)
    dead = panic(lab)
    with pytest.raises(PkramError, match="PKRAM is switched off") as caught:
        dead.store.nodes()
    assert caught.value.errno == errno.ENODEV
    assert dead.sweep() == 0
    with pytest.raises(MachineError, match=r"a crash kernel is running: leave it with pkram-kexec --cold"):
        lab.load(append="pkram=0")
    with pytest.raises(MachineError, match="no crash kernel is loaded"):
        panic(lab)


def test_leaving_is_a_cold_boot(lab: Any) -> None:
    ready(lab)
    lab.preserve("a", 100)
    panic(lab)
    with lab.machine.lifecycle(shared=False):
        kernel = Running(lab.machine, succession.power_cycle(lab.machine))
    assert kernel.info.pkram
    assert kernel.store.nodes() == []


@pytest.mark.parametrize("step", [step.__name__ for step in boot.STEPS])
def test_a_crash_boot_that_dies_is_resumed(lab: Any, step: str) -> None:
    ready(lab)
    lab.preserve("a", 500)
    kernel = lab.up()
    window = kernel.info.reserved["Crash kernel"]
    before = {start: kernel.ram.peek(start, end - start) for start, end in kernel.store.preserved()}
    with lab.dies(step):
        panic(lab)
    dead = lab.up()
    assert (dead.info.kind, dead.info.generation, dead.info.super_pfn) == ("crash", kernel.generation + 1, 0)
    assert not dead.info.own_pages - Spans([window])
    assert dead.info.report["dead"]["super_pfn"] == kernel.info.super_pfn
    assert {start: dead.ram.peek(start, len(data) // 4096) for start, data in before.items()} == before
    assert nvram.pending(lab.machine) is None


def test_what_cannot_be_loaded(lab: Any) -> None:
    with pytest.raises(MachineError, match="boot with crashkernel=SIZE"):
        loading.load(lab.machine, Request("builtin:8M"), panic=True)
    lab.cycle(append="ro crashkernel=32M")
    with pytest.raises(ExhaustedError, match=r"no place for the kernel: .*; boot with a larger crashkernel="):
        loading.load(lab.machine, Request("builtin:64M"), panic=True)
    with pytest.raises(MachineError, match="no crash kernel is loaded"):
        panic(lab)


def test_unloading(lab: Any) -> None:
    ready(lab)
    assert staging.read(lab.machine, staging.CRASH_JSON) is not None
    assert loading.unload(lab.machine, panic=True)
    assert not loading.unload(lab.machine, panic=True)


def test_a_kexec_unloads_the_crash_kernel(lab: Any) -> None:
    ready(lab)
    lab.cycle(append="ro crashkernel=32M")
    assert staging.read(lab.machine, staging.CRASH_JSON) is None
