# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl doctor --reserve: the range, the word for it as each boot loader takes it, and what a kernel lacks."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pkramfs.cli import reserving
from pkramfs.cli.checkup import ERROR, NOTE, OK, WARNING
from pkramfs.cli.reserving import Place
from pkramfs.units import GIB, MIB
from tests.support.host import FakeHost

GOOD = "CONFIG_KEXEC_FILE=y\nCONFIG_X86_PMEM_LEGACY=m\nCONFIG_BLK_DEV_PMEM=m\nCONFIG_DEV_DAX_PMEM=m\nCONFIG_FUSE_FS=y\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """3 GiB of RAM below 4 GiB and 20 GiB above, in two nodes of which the second begins at 12 GiB."""
    made = FakeHost(tmp_path / "host", monkeypatch)
    ram(made, (1 << 20, 3 * GIB), (4 * GIB, 24 * GIB))
    made.write("boot/config-6.12.9-test", GOOD)
    made.write("sys/devices/system/memory/block_size_bytes", f"{GIB:x}\n")
    for number in [0, 1, 2, *range(4, 24)]:
        made.write(f"sys/devices/system/node/node{int(number >= 12)}/memory{number}/online", "1\n")
    program = made.top / "bin/kexec"
    made.write("bin/kexec", "#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return made


def ram(host: FakeHost, *ranges: tuple[int, int], inside: str = "") -> None:
    """Have firmware and the kernel say what is RAM."""
    for number, (start, end) in enumerate(ranges):
        for key, value in (("start", f"{start:#x}"), ("end", f"{end - 1:#x}"), ("type", "System RAM")):
            host.write(f"sys/firmware/memmap/{number}/{key}", f"{value}\n")
    host.write("proc/iomem", "".join(f"{start:08x}-{end - 1:08x} : System RAM\n" for start, end in ranges) + inside)


@pytest.mark.parametrize(
    ("size", "word"),
    [
        ("8G", "memmap=8G!4G"),
        ("10G", "memmap=10G!12G"),  # one node has it, from 4 GiB on there would be two
        ("512M", "memmap=512M!4G"),
        ("65M", "memmap=66M!4G"),
    ],
)
def test_a_range_in_one_node_is_chosen(host: FakeHost, size: str, word: str) -> None:
    from pkramfs.units import parse_size, round_up

    place, found = reserving.choose(host, round_up(parse_size(size), 2 * MIB))
    assert place is not None and place.memmap() == word and [one.level for one in found] == [OK]


def test_what_is_in_use_is_left_alone(host: FakeHost) -> None:
    crash = f"  {5 * GIB:x}-{5 * GIB + 256 * MIB - 1:x} : Crash kernel\n"
    pmem = f"{8 * GIB:x}-{12 * GIB - 1:x} : Persistent Memory (legacy)\n"
    ram(host, (1 << 20, 3 * GIB), (4 * GIB, 24 * GIB))
    host.write(
        "proc/iomem",
        f"00100000-bfffffff : System RAM\n{4 * GIB:x}-{8 * GIB - 1:x} : System RAM\n{crash}{pmem}"
        f"{12 * GIB:x}-{24 * GIB - 1:x} : System RAM\n",
    )
    for size, start in ((GIB, 4 * GIB), (2 * GIB, 6 * GIB), (4 * GIB, 12 * GIB)):
        place, _ = reserving.choose(host, size)
        assert place is not None and place.start == start
    host.write("proc/iomem", "00000000-00000000 : System RAM\n")
    place, found = reserving.choose(host, 2 * GIB)
    assert place is not None and place.start == 4 * GIB and found[0].level == NOTE and "is for root" in found[0].found


def test_a_small_host_gives_what_is_below_4_gib(host: FakeHost) -> None:
    for name in ("sys/firmware/memmap", "sys/devices/system/node"):
        subprocess.run(["rm", "-r", host.path(name)], check=True)
    ram(host, (1 << 20, 3 * GIB))
    place, found = reserving.choose(host, GIB)
    assert place == Place(2 * GIB, GIB, 0) and [one.level for one in found] == [WARNING]


def test_more_than_there_is_is_refused_with_the_most(host: FakeHost, ctl: Any) -> None:
    status, out, _ = ctl("doctor", "--reserve", "13G")
    assert status == 11 and "→ give at most --reserve 12288M" in out and "memmap" not in out
    assert ctl("doctor", "--reserve", "12288M")[0] == 0
    ram(host, (1 << 20, 3 * GIB), (4 * GIB, 5 * GIB))
    status, out, _ = ctl("doctor", "--reserve", "20G")
    most = int(out.partition("→ give at most --reserve ")[2].partition("M")[0])
    assert status == 11 and most == 3008
    assert ctl("doctor", "--reserve", f"{most}M")[0] == 10 and ctl("doctor", "--reserve", f"{most + 2}M")[0] == 11
    status, _, err = ctl("doctor", "--reserve", "1M")
    assert status == 2 and "give at least 64.0 MiB" in err


def in_grub(line: str) -> str:
    """What the kernel gets: a shell reads the file, then GRUB reads what grub-mkconfig wrote from it."""
    printed = subprocess.run(
        ["sh", "-c", f'{line}\nprintf %s "$GRUB_CMDLINE_LINUX"'], capture_output=True, text=True, check=True
    )
    return " ".join(shlex.split(printed.stdout))


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ('GRUB_CMDLINE_LINUX=""', ""),
        ('GRUB_CMDLINE_LINUX="quiet crashkernel=1G-:256M"  # ours', "quiet crashkernel=1G-:256M "),
        ("GRUB_CMDLINE_LINUX='quiet'", "quiet "),
        ("GRUB_CMDLINE_LINUX=quiet\nGRUB_CMDLINE_LINUX=ro", "ro "),
        ('#GRUB_CMDLINE_LINUX="no"\nGRUB_CMDLINE_LINUX_DEFAULT="no"', ""),
    ],
)
def test_grub_s_line_means_what_it_should(host: FakeHost, before: str, words: str) -> None:
    host.write("etc/default/grub", f"GRUB_TIMEOUT=5\n{before}\n")
    boot = reserving.loader(host, Place(64 * GIB, 64 * GIB, 0))
    assert in_grub(boot.lines[0]) == f"{words}memmap=64G!64G"
    assert in_grub(boot.raw) == f"{words}memmap=64G$64G"
    assert boot.lines[1] == "grub-mkconfig -o /boot/grub/grub.cfg"


def test_each_boot_loader_has_its_line(host: FakeHost) -> None:
    place = Place(64 * GIB, 64 * GIB, 0)
    assert reserving.loader(host, place).lines == ("append memmap=64G!64G to the kernel's command line",)
    host.write("etc/kernel/cmdline", "ro\n")
    assert reserving.loader(host, place).lines == ("append memmap=64G!64G", "kernel-install add-all")
    host.write("etc/default/grub", "")
    host.write("usr/sbin/update-grub", "")
    assert reserving.loader(host, place).lines == ('GRUB_CMDLINE_LINUX="memmap=64G!64G"', "update-grub")
    host.write("usr/sbin/grubby", "")
    boot = reserving.loader(host, place)
    assert boot.lines == ("grubby --update-kernel=ALL --args='memmap=64G!64G'",)
    assert boot.raw == "grubby --update-kernel=ALL --args='memmap=64G\\$64G'"


def test_what_a_kernel_lacks_is_named(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {one.level for one in reserving.lacking(host)} == {OK}
    host.write(
        "boot/config-6.12.9-test", GOOD.replace("CONFIG_X86_PMEM_LEGACY=m", "# CONFIG_X86_PMEM_LEGACY is not set")
    )
    host.write("proc/sys/kernel/kexec_load_disabled", "1\n")
    host.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    monkeypatch.setenv("PATH", "/nowhere")
    found = {one.level: one.found for one in reserving.lacking(host)}
    assert "Linux 6.12.9-test was built without X86_PMEM_LEGACY" in [one.found for one in reserving.lacking(host)]
    assert "kernel.kexec_load_disabled" in found[ERROR] and "kexec(8)" in found[WARNING] and "integrity" in found[NOTE]
    assert any("this is aarch64" in one.found for one in reserving.lacking(host, "aarch64"))
    (host.top / "boot/config-6.12.9-test").unlink()
    assert any("cannot be read" in one.found for one in reserving.lacking(host))


def test_a_host_that_may_hibernate_is_named(host: FakeHost) -> None:
    def warned() -> bool:
        return any("may hibernate" in one.found for one in reserving.lacking(host))

    host.write("sys/power/state", "freeze mem disk\n")
    assert not warned()
    host.write("sys/power/resume", "0:0\n")
    assert not warned()
    host.write("sys/power/resume", "254:1\n")
    assert warned()
    host.write("etc/systemd/system/x", "")
    (host.top / "etc/systemd/system/hibernate.target").symlink_to("/dev/null")
    assert not warned()


def test_it_is_all_in_json(host: FakeHost, ctl: Any) -> None:
    host.write("sys/bus/nd/devices/region0/x", "")
    status, out, _ = ctl("--json", "doctor", "--reserve", "8G")
    found = json.loads(out)
    assert status == 0 and found["reserve"] == {"start": 4 * GIB, "size": 8 * GIB, "node": 0, "memmap": "memmap=8G!4G"}
    assert found["steps"][1] == [
        "ndctl create-namespace -f -e namespace1.0 -m devdax -M mem",
        "pkramctl machine create --ram /dev/dax1.0",
    ]


def test_doctor_says_in_a_line_what_can_survive(host: FakeHost, root: str, ctl: Any) -> None:
    assert "no memory is set aside: trees survive a kexec of the simulation" in ctl("doctor")[1]
    host.boot("ro memmap=64G!64G")
    host.write("sys/bus/dax/devices/dax0.0/size", "1\n")
    assert ctl("machine", "create", "--ram", f"{root}/memory:64M")[0] == 0
    out = ctl("doctor")[1]
    assert "memmap=64G!64G sets memory aside: dax0.0" in out
    assert f"RAM is {root}/memory (file); it survives" in out and "is missing" not in out.partition("machine")[2]
