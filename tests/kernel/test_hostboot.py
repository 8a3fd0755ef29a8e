# SPDX-License-Identifier: GPL-2.0-or-later
"""A boot of the host: what a machine on memory that survived it decides, and what it refuses to touch."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.errors import MachineError
from pkramfs.kernel import hostboot, kernelrecord, nvram, running, succession
from pkramfs.kernel.kernelrecord import KernelInfo
from pkramfs.machine import backing, conf, directory, header, mapped, named
from pkramfs.machine.backing import BLOCK, Backing
from pkramfs.machine.directory import Machine
from pkramfs.machine.header import Header
from pkramfs.pkram import superblock
from pkramfs.pkram.format import NEXT
from pkramfs.pkram.node import Node
from pkramfs.units import BLOCK_PAGES, MIB, PAGE_SIZE
from tests.support.host import FIRMWARE, KEXEC, FakeHost
from tests.support.lab import Boots

REAL = 'BOOT_IMAGE=/vmlinuz-6.12 root=UUID=1 ro crashkernel=1G-4G:64M,4G-:256M mem=nopentium memmap=64G!4G dyndbg="a b"'


class RealBoots(Boots):
    """A machine on memory that the host's boots leave alone, with a /run that they empty."""

    def __init__(self, machine: Machine, host: FakeHost) -> None:
        super().__init__(machine)
        self.host = host

    def reboot(self, cmdline: str, loader: int | None = KEXEC, *, volatile: bool = True) -> None:
        self.host.boot(cmdline, loader)
        if volatile:
            shutil.rmtree(self.machine.path())

    def kexec_for_real(self, words: str = "", **how: Any) -> Any:
        """What the announcement types: kexec, and the pfn of the last super block on the command line."""
        self.reboot(f"{REAL} pkram={self.pfn()} {words}".strip(), **how)
        return self.up()

    def refusal(self) -> str:
        with pytest.raises(MachineError) as caught:
            self.up()
        assert kernelrecord.read(self.machine) is None and nvram.pending(self.machine) is None
        return str(caught.value)

    @property
    def header(self) -> Header:
        said = self.machine.configuration()
        assert said is not None
        return named.find(said, self.machine.host).header


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    return FakeHost(tmp_path / "host", monkeypatch)


BOTH = pytest.mark.parametrize("lab", ["file", "mapped only"], indirect=True)


@pytest.fixture
def lab(
    request: pytest.FixtureRequest, pkram_root: Path, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RealBoots]:
    """A machine whose memory is a device, for which a file stands, or (see BOTH) a file."""
    if getattr(request, "param", "") != "file":
        for module in (directory, named):
            monkeypatch.setattr(module, "open_ram", lambda found: mapped.open_ram(as_device(found)))
    host.boot(REAL)
    machine = Machine.locate()
    found = named.take(machine.name, backing.Spec(f"{pkram_root}/memory", 256 * MIB), machine.host, seed=7)
    conf.write(machine.conf_path, conf.Conf(found.backing.spec, found.header.uuid))
    made = RealBoots(machine, host)
    monkeypatch.setattr(succession, "start_boot", made.start_boot)
    yield made


def as_device(found: Backing) -> Backing:
    return Backing(BLOCK, found.path, found.size)


@BOTH
def test_a_first_boot_finds_nothing(lab: RealBoots) -> None:
    info = lab.up().info
    assert (info.generation, info.kind, info.image) == (1, nvram.COLD, "linux 6.12.9-test")
    assert (lab.header.generation, lab.header.super_pfn) == (1, info.super_pfn)
    assert lab.header.boot_id == info.boot_id == lab.host.boot_id
    assert lab.machine.read_text("cmdline") == REAL + "\n"
    assert "cold boot of linux 6.12.9-test" in lab.dmesg() and f"Command line: {REAL}" in lab.dmesg()


@BOTH
@pytest.mark.parametrize("volatile", [True, False], ids=["directory in /run", "directory kept"])
def test_a_kexec_with_the_right_pkram_restores(lab: RealBoots, volatile: bool) -> None:
    lab.preserve("a", 3000)
    lab.preserve("b", 5, seed=2)
    for generation in (2, 3, 4):
        info = lab.kexec_for_real("crashkernel=256M,high" * (generation == 3), volatile=volatile).info
        assert (info.generation, info.kind) == (generation, nvram.KEXEC)
        assert lab.intact("a") and lab.intact("b")
        assert "kexec boot of linux 6.12.9-test" in lab.dmesg()
        lab.grow(700, seed=generation)  # a tree that is not preserved takes memory, and leaves it
    assert lab.header.generation == 4 and nvram.next_generation(lab.machine) == 5


def test_what_was_consumed_restores_nothing_twice(lab: RealBoots) -> None:
    lab.preserve("a", 10)
    first = lab.pfn()
    lab.kexec_for_real()
    lab.reboot(f"pkram={first}")
    assert f"the command line of this boot says pkram='{first}'" in lab.refusal()


@pytest.mark.parametrize(
    ("cmdline", "loader", "why"),
    [
        ("ro quiet", KEXEC, "the command line of this boot has no pkram="),
        ("ro pkram=", KEXEC, "the command line of this boot has no pkram="),
        ("ro -- pkram={pfn}", KEXEC, "the command line of this boot has no pkram="),
        ("ro pkram=7", KEXEC, "the command line of this boot says pkram='7'"),
        ("ro pkram=off", KEXEC, "the command line of this boot says pkram='off'"),
        ("ro pkram=zebra", KEXEC, "the command line of this boot says pkram='zebra'"),
        ("pkram=7 pkram={pfn}", KEXEC, "the command line of this boot says pkram='7' pkram='{pfn}'"),
        (
            "ro pkram=two:{pfn}",
            KEXEC,
            "the command line of this boot has pkram= of other machines, and none of 'default'",
        ),
        ("pkram=default:7 pkram={pfn}", KEXEC, "the command line of this boot says pkram='default:7'"),
        (
            "ro pkram={pfn}",
            FIRMWARE,
            "memory went through firmware (boot loader type 0xb0), which may have overwritten it",
        ),
    ],
)
def test_a_boot_that_would_lose_is_refused_with_both_ways_out(
    lab: RealBoots, cmdline: str, loader: int, why: str
) -> None:
    lab.preserve("a", 300)
    pfn = lab.pfn()
    lab.reboot(cmdline.format(pfn=pfn), loader)
    before = lab.header
    insists = " --force" * (loader == FIRMWARE)
    refusal = lab.refusal()
    assert re.match(rf"1 node \(a\), 1\.2 MiB, preserved at super block {pfn}: ", refusal)
    assert f": {why.format(pfn=pfn)}" in refusal and refusal.endswith(
        f"; `pkram-kexec --resume{insists} --append pkram={pfn}` restores it if it is whole, "
        "`pkram-kexec --cold --force` gives it up"
    )
    assert lab.header == before
    with lab.machine.lifecycle(shared=False):
        hostboot.decide(lab.machine, append=f"pkram={pfn}", force=loader == FIRMWARE)
        succession.bring_up(lab.machine)
    assert lab.intact("a") and lab.up().generation == 2


@BOTH
def test_giving_up_is_a_cold_boot(lab: RealBoots) -> None:
    lab.preserve("a", 300)
    lab.reboot("ro")
    lab.refusal()
    with lab.machine.lifecycle(shared=False):
        info = succession.power_cycle(lab.machine)
    assert (info.generation, info.kind, lab.up().store.nodes()) == (2, nvram.COLD, [])
    lab.preserve("b", 300, seed=3)
    lab.kexec_for_real()
    assert lab.intact("b")


@pytest.mark.parametrize("loader", [KEXEC, FIRMWARE, None])
def test_where_nothing_was_preserved_every_boot_will_do(lab: RealBoots, loader: int | None) -> None:
    lab.grow(100)
    lab.reboot("ro", loader)
    assert (lab.up().generation, lab.up().info.kind) == (2, nvram.COLD)
    assert lab.up().leases.counts()["tree"] == 0


def test_an_architecture_without_loader_types_goes_by_pkram(lab: RealBoots) -> None:
    lab.preserve("a", 10)
    lab.kexec_for_real(loader=None)
    assert lab.intact("a")


def test_a_crash_kernel_touches_nothing(lab: RealBoots) -> None:
    lab.preserve("a", 10)
    before = lab.header
    lab.host.write("proc/vmcore", "")
    lab.reboot(f"pkram={lab.pfn()}")
    assert "this is a crash kernel (/proc/vmcore is there): what was preserved is left as it is" in lab.refusal()
    for insist_on in (lambda: insist(lab), lambda: succession.power_cycle(lab.machine)):
        with pytest.raises(MachineError, match="this is a crash kernel"):
            insist_on()
    assert lab.header == before


def test_pkram_off_is_understood_where_nothing_is_lost(lab: RealBoots) -> None:
    lab.up()
    lab.reboot("ro pkram=off")
    assert not lab.up().info.pkram and lab.header.super_pfn == 0
    lab.reboot("ro")
    assert lab.up().info.pkram


@pytest.mark.parametrize("step", ["find", "release", "build_tables", "super_block", "files", "publish"])
def test_a_boot_that_died_at_any_step_is_done_again(lab: RealBoots, step: str) -> None:
    lab.preserve("a", 700)
    pfn = lab.pfn()
    lab.reboot(f"pkram={pfn}")
    with lab.dies(step):
        lab.up()
    if step != "publish":
        assert lab.header.super_pfn == int(pfn, 16)
    assert lab.up().generation == 2 and lab.intact("a")
    assert lab.header.super_pfn == lab.up().info.super_pfn


@BOTH
def test_a_host_that_died_during_a_boot_boots_again(lab: RealBoots) -> None:
    """Even after a record was published: the number on the command line is still that of the old super block."""
    lab.preserve("a", 700)
    pfn = lab.pfn()
    for step in ("build_tables", "publish"):
        for volatile in (True, False):
            lab.reboot(f"pkram={pfn}", volatile=volatile)
            with lab.dies(step):
                lab.up()
    lab.reboot(f"pkram={pfn}")
    assert lab.up().generation == 2 and lab.intact("a")


def test_a_header_is_written_before_the_old_super_block_is_consumed(
    lab: RealBoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.preserve("a", 10)
    order: list[str] = []
    consume, write = superblock.consume, header.write

    def note(name: str, call: Any) -> Any:
        return lambda *words: (order.append(name), call(*words))[1]

    monkeypatch.setattr(superblock, "consume", note("consume", consume))
    monkeypatch.setattr(header, "write", note("header", write))
    lab.kexec_for_real()
    assert order == ["header", "header", "consume"]


@pytest.mark.parametrize("slot", header.SLOTS)
def test_damage_to_one_of_the_headers_loses_nothing(lab: RealBoots, slot: int) -> None:
    lab.preserve("a", 10)
    for generation in (2, 3):
        ram = lab.machine.ram()
        ram.bytes[slot + 70] ^= 1
        ram.close()
        assert lab.kexec_for_real().generation == generation and lab.intact("a")


def insist(lab: RealBoots) -> KernelInfo:
    """pkram-kexec --resume --force."""
    with lab.machine.lifecycle(shared=False):
        hostboot.decide(lab.machine, force=True)
        return succession.bring_up(lab.machine)


@pytest.mark.usefixtures("damaged")
def test_damage_stops_a_boot_and_frees_nothing(lab: RealBoots) -> None:
    lab.preserve("a", 700)
    node = lab.up().store.nodes()[0]
    lab.up().ram.bytes[node.pfn * PAGE_SIZE + 200] ^= 1
    lab.reboot(f"pkram={lab.pfn()}")
    before = lab.header
    for _ in range(2):
        refusal = lab.refusal()
        assert (
            f"memory that cannot be read at super block {before.super_pfn:x}: Node at pfn {node.pfn:x}: chec" in refusal
        )
        assert refusal.endswith("; `pkram-kexec --cold --force` gives it up")
    assert lab.header == before
    assert insist(lab).generation == 2 and lab.up().store.nodes() == []
    assert f"pkram: a node at pfn {node.pfn:x}, which cannot be read, is lost: given up" in lab.dmesg()


def damage_page(lab: RealBoots, node: Node) -> str:
    lab.up().ram.bytes[node.pfn * PAGE_SIZE + 200] ^= 1
    return f"a node at pfn {node.pfn:x}, which cannot be read,"


def damage_table(lab: RealBoots, node: Node) -> str:
    lab.up().ram.bytes[node.table_pfn * PAGE_SIZE + 200] ^= 1
    return "node b"


@pytest.mark.usefixtures("damaged")
def test_that_nodes_behind_a_break_would_be_lost_is_said_before_they_are(lab: RealBoots) -> None:
    for seed, name in enumerate("abc"):
        lab.preserve(name, 300, seed=seed)
    second = next(node for node in lab.up().store.nodes() if node.name == b"b")
    lab.up().ram.words(second.pfn)[2] = 0xDEAD  # the word that leads to a
    lab.reboot(f"pkram={lab.pfn()}", KEXEC)
    assert "loses the rest and whatever the list of nodes named behind the break, `pkram-kexec --cold" in lab.refusal()
    assert insist(lab).generation == 2 and [node.name for node in lab.up().store.nodes()] == [b"c", b"b"]


def damage_nothing(lab: RealBoots, node: Node) -> str:
    return ""


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("damage", [damage_page, damage_table, damage_nothing])
@pytest.mark.parametrize(("cmdline", "loader"), [("", KEXEC), ("pkram=7", KEXEC), ("pkram={pfn}", FIRMWARE)])
def test_who_insists_gets_what_can_be_read(lab: RealBoots, damage: Any, cmdline: str, loader: int) -> None:
    for seed, name in enumerate("abc"):
        lab.preserve(name, 300, seed=seed)
    lost = damage(lab, next(node for node in lab.up().store.nodes() if node.name == b"b"))
    lab.reboot(cmdline.format(pfn=lab.pfn()), loader)
    refusal = lab.refusal()
    assert ("`pkram-kexec --resume --force` restores what can be read and loses the rest" in refusal) is bool(lost)
    assert ("2 nodes (c, a), 2.4 MiB, preserved beside what cannot be read at super" in refusal) is bool(lost)
    assert insist(lab).generation == 2
    assert lab.intact("a") and lab.intact("c") and (lost or lab.intact("b"))
    assert [node.name for node in lab.up().store.nodes()] == [b"c", b"a"] if lost else [b"c", b"b", b"a"]
    assert f"pkram: {lost} is lost" in lab.dmesg() or not lost


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("hit", ["super block", "first node", "last node"])
def test_a_bit_of_the_list_costs_no_node(lab: RealBoots, hit: str, some: Any) -> None:
    for seed, name in enumerate("ab"):
        lab.preserve(name, 30, seed=seed)
    for bit in some(range(64), 4):
        nodes = lab.up().store.nodes()
        at = lab.up().info.super_pfn if hit == "super block" else nodes[0 if hit == "first node" else 1].pfn
        lab.up().ram.bytes[at * PAGE_SIZE + NEXT + bit // 8] ^= 1 << bit % 8
        lab.reboot(f"pkram={lab.pfn()}")
        refusal = lab.refusal()
        assert (
            "2 nodes (b, a), " in refusal
            and f"preserved beside what cannot be read at super block {lab.header.super_pfn:x}" in refusal
        )
        insist(lab)
        assert lab.intact("a") and lab.intact("b") and "is lost" not in lab.dmesg()


@pytest.mark.usefixtures("damaged")
def test_two_bits_of_the_list_cost_what_is_behind_them(lab: RealBoots) -> None:
    for seed, name in enumerate("ab"):
        lab.preserve(name, 30, seed=seed)
    lab.up().ram.bytes[lab.up().store.nodes()[0].pfn * PAGE_SIZE + NEXT] ^= 3
    lab.reboot(f"pkram={lab.pfn()}")
    assert "1 node (b), " in lab.refusal()
    insist(lab)
    assert lab.intact("b") and "whatever the list of nodes named behind a break is lost" in lab.dmesg()


@pytest.mark.usefixtures("damaged")
def test_what_another_version_left_is_not_mended(lab: RealBoots, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 300)
    pfn, ram = int(lab.pfn(), 16), lab.up().ram
    first = superblock.check(ram, pfn).node_pfn
    with monkeypatch.context() as later:
        later.setattr(superblock, "FORMAT_VERSION", 99)
        superblock.create(ram, pfn, 1, first)
    page = ram.peek(pfn)
    lab.reboot(f"pkram={pfn:x}")
    assert "version is 99, expected 1" in lab.refusal()
    with pytest.raises(MachineError, match=r"version is 99, expected 1; `pkram-kexec --cold --force` gives it up"):
        insist(lab)
    assert lab.machine.ram().peek(pfn) == page


def test_a_directory_that_was_removed_is_not_a_boot(lab: RealBoots, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.preserve("a", 10)
    pfn = lab.pfn()
    shutil.rmtree(lab.machine.path())
    assert "its kernel runs, but the directory of the machine was removed" in lab.refusal()
    monkeypatch.setattr(FakeHost.__mro__[1], "users", lambda *_: [4242])
    assert "while its memory is in use: end process 4242 first" in lab.refusal()
    with pytest.raises(MachineError, match="end process 4242"), lab.machine.lifecycle(shared=False):
        succession.power_cycle(lab.machine)
    monkeypatch.setattr(FakeHost.__mro__[1], "users", lambda *_: [])
    with lab.machine.lifecycle(shared=False):
        hostboot.decide(lab.machine, append=f"pkram={pfn}")
        succession.bring_up(lab.machine)
    assert lab.intact("a")


@BOTH
def test_memory_that_went_away_is_named(lab: RealBoots) -> None:
    lab.preserve("a", 10)
    ram = lab.machine.ram()
    header.wipe(ram)
    lab.reboot(f"pkram={lab.pfn()}")
    with pytest.raises(MachineError, match=r"no longer holds a machine: it lost its contents, .*memmap="):
        lab.up()


def test_a_machine_of_the_simulation_knows_of_no_host(
    pkram_root: Path, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine.locate("other")
    machine.create()
    made = Boots(machine)
    monkeypatch.setattr(succession, "start_boot", made.start_boot)
    made.preserve("a", 10)
    host.boot("ro")
    assert made.up().generation == 1 and made.intact("a")
    for name in ("kernel.json", "nvram.json", "machine.json"):
        text = machine.read_text(name) or ""
        assert "boot_id" not in text and "host" not in text and "backing" not in text


@BOTH
def test_a_kexec_of_the_simulation_keeps_the_header(lab: RealBoots) -> None:
    """Nothing forbids to rehearse: the kernel of the host lives on."""
    lab.preserve("a", 1000)
    assert isinstance(lab.up().info, KernelInfo)
    assert lab.header.size == 256 * MIB and 0 not in lab.up().machine.hardware().usable
    assert lab.up().info.own_pages.outward(BLOCK_PAGES).total < 6


def test_looking_boots_nothing(lab: RealBoots) -> None:
    lab.preserve("a", 10)
    lab.reboot(f"pkram={lab.pfn()}", volatile=False)
    with pytest.raises(MachineError, match="no kernel is running"):
        running.look(lab.machine)
    assert os.path.exists(lab.machine.path("kernel.json"))


def test_what_was_mounted_is_known_after_a_boot(lab: RealBoots) -> None:
    lab.preserve("a", 10)
    lab.preserve("b", 10, seed=2)
    nodes = {b"shmem-a", b"shmem-b"}
    one, two = (header.Mount(name, f"/mnt/{name}", {"pkram": name}) for name in "ab")
    for mount in (one, two, one):
        assert hostboot.remember(lab.machine, mount, nodes)
    lab.kexec_for_real()
    assert lab.header.mounts == (two, one)
    assert [mount["mountpoint"] for mount in nvram.mounts(lab.machine)] == ["/mnt/b", "/mnt/a"]
    assert nvram.mounts(lab.machine)[0] == {"name": "b", "mountpoint": "/mnt/b", "options": {"pkram": "b"}}
    assert hostboot.remember(lab.machine, one, {b"shmem-a"}) and lab.header.mounts == (one,)
    assert not hostboot.remember(lab.machine, header.Mount("c", "/" * 4000, {}), {b"shmem-a"})
    assert lab.header.mounts == (one,)
