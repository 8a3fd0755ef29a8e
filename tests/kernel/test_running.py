# SPDX-License-Identifier: GPL-2.0-or-later
"""Cold boots, what is refused, what is resumed."""

import collections
import contextlib
import gc
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from pkramfs.cli import boot as cli_boot
from pkramfs.errors import MachineError
from pkramfs.kernel import boot, kernelrecord, nvram, running, succession
from pkramfs.kernel.running import Running
from pkramfs.machine import locks
from pkramfs.machine.directory import Machine
from pkramfs.machine.files import sealed
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.units import BLOCK_PAGES, GIB, TIB


def test_the_first_attach_boots(lab: Any) -> None:
    kernel = lab.up()
    assert kernel.generation == 1
    assert lab.machine.read_text("cmdline") == "BOOT_IMAGE=builtin ro\n"
    assert lab.machine.read_text("pkram") == f"{kernel.info.super_pfn:x}\n"
    assert nvram.read(lab.machine)["boot_count"] == 1
    assert nvram.pending(lab.machine) is None
    assert kernel.store.nodes() == []
    assert "Kernel image" in lab.machine.read_text("iomem")
    lab.up()
    assert lab.steps.count("publish") == 1


def test_boot_runs_in_a_fresh_process(root: Any) -> None:
    machine = Machine.locate()
    machine.create(FirmwareMap.default(GIB, seed=1))
    kernel = running.attach(machine)
    assert kernel.store.nodes() == []
    assert "pkram: super block at pfn" in machine.dmesg()


def test_looking_never_boots(lab: Any) -> None:
    with pytest.raises(MachineError, match="no kernel is running"):
        running.attach(lab.machine, boot=False)
    assert lab.steps == []
    lab.up()
    assert running.look(lab.machine).generation == 1


@pytest.mark.parametrize("step", [s.__name__ for s in boot.STEPS])
def test_a_cold_boot_that_dies_is_resumed(lab: Any, step: str) -> None:
    with lab.dies(step):
        lab.up()
    assert lab.up().generation == 1
    counts = lab.up().leases.counts()
    assert counts["tree"] == 0
    assert sum(counts.values()) == lab.up().info.blocks


def test_data_without_a_kernel_are_damage_not_a_fresh_machine(lab: Any) -> None:
    lab.up()
    for name in ("kernel.json", "nvram.json"):
        lab.machine.remove(name)
    before = lab.machine.ram().backed
    with pytest.raises(MachineError, match=r"damaged.*to start empty"):
        lab.up()
    assert lab.machine.ram().backed == before


def test_another_version_is_refused(lab: Any) -> None:
    lab.up()
    theirs = lab.machine.read_json(kernelrecord.NAME) | {"layout": 99, "version": "9.9"}
    lab.machine.write_json(kernelrecord.NAME, sealed(theirs))
    with pytest.raises(MachineError, match=r"the kernel runs pkramfs 9\.9.*upgrade the kernel by pkram-kexec"):
        lab.up()


@pytest.mark.usefixtures("damaged")
def test_a_ram_file_cut_short_is_refused(lab: Any) -> None:
    lab.up()
    with open(lab.machine.path("ram"), "r+b") as ram:
        ram.truncate(1 << 20)
    with pytest.raises(MachineError, match="cut or replaced"):
        _ = lab.up().ram


def test_the_lease_table_covers_every_block(lab: Any) -> None:
    kernel = lab.up()
    counts = kernel.leases.counts()
    assert counts["reserve"] == 1
    assert counts["hole"] == 1  # the first MiB
    assert counts["free"] + counts["kernel"] == kernel.info.blocks - 2
    assert kernel.leases.ids[kernel.info.super_pfn // BLOCK_PAGES] == 3


def test_power_cycle_forgets_everything(lab: Any) -> None:
    lab.preserve("a", 100)
    with lab.machine.lifecycle(shared=False):
        kernel = Running(lab.machine, succession.power_cycle(lab.machine))
    assert kernel.store.nodes() == []
    assert kernel.generation == 2
    assert kernel.leases.counts()["tree"] == 0


def test_booting_16_tib_touches_no_more_than_4_gib(make_lab: Any) -> None:
    backed = []
    for size in (4 * GIB, 16 * TIB):
        lab = make_lab(size, name=f"m{size}")
        kernel = lab.up()
        lab.preserve("a", 1000)
        lab.cycle(poison=False)
        assert lab.intact("a")
        backed.append(kernel.ram.backed)
    assert backed[1] < backed[0] + (1 << 20)


@contextlib.contextmanager
def calls_made() -> Iterator[collections.Counter[str]]:
    """Count the calls of functions, Python's and C's, while the block runs."""
    counted = collections.Counter[str]()
    sys.setprofile(lambda _frame, event, _: counted.update([event]))
    try:
        yield counted
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def most_memory() -> Iterator[list[int]]:
    """Measure the most bytes that Python and numpy have at once while the block runs."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_booting_16_tib_takes_less_than_twice_the_steps_of_4_gib(make_lab: Any) -> None:
    """Compare steps and memory of a whole kexec: they must not grow with RAM, whose lease table has 64 MiB."""
    calls, memory = [], []
    for size in (4 * GIB, 16 * TIB):
        gc.collect()  # seven maps of 16 TiB are all that a process can have, and closed ones wait for it
        lab = make_lab(size, name=f"m{size}")
        lab.preserve("a", 1000)
        lab.load()
        with calls_made() as counted:
            lab.execute()
        calls.append(counted["call"] + counted["c_call"])
        gc.collect()
        lab.load()
        with most_memory() as most:
            lab.execute()
        memory += most
        assert lab.intact("a")
    assert calls[1] < 2 * calls[0]
    assert memory[1] < memory[0] + (1 << 20)


def test_two_first_mounts_at_once_boot_once(root: Any) -> None:
    program = "from pkramfs.kernel.running import attach; from pkramfs.machine.directory import Machine; "
    program += "print(attach(Machine.locate()).generation)"
    Machine.locate().create(FirmwareMap.default(GIB, seed=1))
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0] for process in started] == [b"1\n"] * 3
    assert nvram.read(Machine.locate())["boot_count"] == 1


def test_a_boot_whose_parent_is_gone_does_nothing(lab: Any) -> None:
    with pytest.raises(MachineError, match="is gone"):
        cli_boot._boot_for(1 << 30, lab.machine.path(), False)
    assert kernelrecord.read(lab.machine) is None


def test_a_boot_that_outlived_its_parent_is_waited_for(lab: Any) -> None:
    succession.decide_cold(lab.machine)
    orphan = threading.Thread(target=lambda: (held.wait(), boot.boot(lab.machine), lock.close()))
    held, lock = threading.Event(), contextlib.ExitStack()
    lock.enter_context(locks.held(lab.machine.path(succession.BOOT_LOCK)))
    orphan.start()
    held.set()
    assert lab.up().generation == 1
    orphan.join()
    assert lab.steps == [], "the orphan booted, nobody else"


def test_boot_by_hand(lab: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pkramfs.cli.boot", lab.machine.path()], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert kernelrecord.read(lab.machine) is not None
    done = subprocess.run(
        [sys.executable, "-m", "pkramfs.cli.boot", "/nonexistent"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 8
    assert "there is no machine" in done.stderr
