# SPDX-License-Identifier: GPL-2.0-or-later
"""A kexec on a host that others have filled: refused before anything is stopped, undone, or resumed; never a SIGBUS."""

from typing import Any

import pytest

from pkramfs.errors import ExhaustedError, MachineError, NotPreservedError
from pkramfs.kernel import kexec, nvram, staging
from pkramfs.kernel.transition import MountReport
from pkramfs.machine.ram import Ram
from pkramfs.pkram import superblock
from pkramfs.spans import Spans
from pkramfs.units import MIB

MOUNTS = [MountReport("/mnt", "a", True, 1)]


@pytest.fixture
def root(host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put machines on the small host."""
    monkeypatch.setenv("PKRAM_ROOT", str(host.directory / "root"))
    return host.directory / "root"


@pytest.fixture
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a check for room succeed although the room is gone when it is used."""
    monkeypatch.setattr(Ram, "check_room", lambda *_args, **_words: None)


def scatter(lab: Any, name: str, ranges: int) -> None:
    """Preserve a node in so many ranges: every second page of its tree."""
    frames, runs, _ = lab.grow(2 * ranges)
    starts = [pfn for start, count in runs for pfn in range(start, start + count)][1::2]
    frames.free(starts, [1] * len(starts))
    kept = [(start, end - start) for start, end in frames.used()]
    lab.publish(name, frames, kept, lab.fill(kept, 3))


def everything(lab: Any) -> tuple[Any, ...]:
    kernel = lab.up()
    block = superblock.check(kernel.ram, kernel.info.super_pfn)
    return (kernel.generation, block, nvram.read(lab.machine), staging.read(lab.machine), kernel.leases.counts())


@pytest.mark.parametrize("ranges", [1, 2000])
def test_room_is_part_of_the_plan(lab: Any, host: Any, ranges: int) -> None:
    scatter(lab, "a", ranges)
    lab.load()
    before = everything(lab)
    host.fill(leave=4 * MIB)
    with lab.machine.lifecycle(shared=False):
        plan = kexec.plan(lab.machine, MOUNTS, stop=lambda: pytest.fail("stopped"))
        (problem,) = plan.problems
        assert isinstance(problem, ExhaustedError) and "no room behind RAM" in str(problem)
        assert plan.describe()[0] == f"refused: {problem}"
        with pytest.raises(ExhaustedError):
            plan.execute()
    assert everything(lab) == before and lab.intact("a")
    host.empty()
    lab.execute()
    assert lab.intact("a")


@pytest.mark.usefixtures("no_reserve")
@pytest.mark.few(3)
@pytest.mark.parametrize("left", range(7))
def test_a_host_that_fills_up_under_the_plan(lab: Any, host: Any, left: int) -> None:
    """Fill the host after each page in turn: no mount is stopped, all is as it was, and another try succeeds."""
    scatter(lab, "a", 2000)
    lab.load()
    before, backed = everything(lab), lab.up().ram.backed
    with lab.machine.lifecycle(shared=False):
        plan = kexec.plan(lab.machine, MOUNTS, stop=lambda: pytest.fail("stopped"))
        assert plan.problems == []
        host.fill(leave=left * 4096)
        with pytest.raises((ExhaustedError, MachineError)):
            plan.execute()
    assert everything(lab) == before and lab.intact("a")
    assert lab.up().ram.backed <= backed + 4096
    host.empty()
    lab.execute()
    assert lab.intact("a")


def test_a_mount_that_does_not_end_leaves_everything_as_it_was(lab: Any) -> None:
    def stop() -> None:
        raise MachineError("it does not end")

    lab.preserve("a", 300)
    lab.load()
    before = everything(lab)
    with lab.machine.lifecycle(shared=False), pytest.raises(MachineError, match="does not end"):
        kexec.plan(lab.machine, MOUNTS, stop=stop, remount=[{"name": "a", "mountpoint": "/a"}]).execute()
    assert everything(lab) == before


def test_a_tree_that_was_changed_until_its_daemon_ended_is_not_lost(lab: Any) -> None:
    lab.preserve("a", 300)
    lab.preserve("b", 300, seed=2)
    lab.load()
    store = lab.up().store
    with lab.machine.lifecycle(shared=False), pytest.raises(NotPreservedError, match="node a is gone"):
        kexec.plan(lab.machine, MOUNTS, stop=lambda: store.withdraw(b"a") and None).execute()
    assert lab.up().generation == 1 and nvram.pending(lab.machine) is None and lab.intact("b")


@pytest.mark.usefixtures("no_reserve")
@pytest.mark.parametrize("left", [0, 1, 2, 3, 4])
def test_a_boot_that_finds_the_host_full_is_resumed(lab: Any, host: Any, left: int) -> None:
    """Fill the host behind the point of no return: nothing is lost, and the error says what is missing."""
    lab.preserve("a", 300)
    lab.load()
    with lab.dies("release"):
        lab.execute()
    host.fill(leave=left * 4096)
    with pytest.raises((ExhaustedError, MachineError)):
        lab.up()
    host.empty()
    assert lab.up().generation == 2 and lab.intact("a")


@pytest.mark.usefixtures("no_reserve")
def test_a_take_over_is_repeated_on_a_full_host(lab: Any, host: Any) -> None:
    """Repeat a take-over whose old super block was punched already: consuming it must take no memory."""
    lab.preserve("a", 300)
    lab.load()
    old = lab.up()
    lab.execute()
    assert not old.ram.data_spans() & Spans([(old.info.super_pfn, old.info.super_pfn + 1)])
    host.fill()
    superblock.consume(old.ram, old.info.super_pfn)
    assert lab.intact("a")
