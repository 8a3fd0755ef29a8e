# SPDX-License-Identifier: GPL-2.0-or-later
"""Real mounts on memory that outlives a boot of the host: the walk of pkramfs-real(7), with a host of the test's own.

The guests of tools/real-kexec boot real kernels. Here the processes of the old kernel are killed, its /run is emptied,
and files say that another kernel was booted.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkramfs.kernel import running
from pkramfs.machine.directory import Machine
from pkramfs.machine.mounts import kill
from tests.support.host import KEXEC, FakeHost
from tests.support.lab import Mounts
from tests.support.places import ROOT, memory_directory
from tests.support.trees import snapshot
from tests.support.waiting import until

pytestmark = pytest.mark.mount


class HostBoots(Mounts):
    """Mounts that end with the host's kernel."""

    host: FakeHost

    def boot(self, cmdline: str, loader: int = KEXEC) -> None:
        machines = [machine for machine in Machine.on_host() if machine.exists()]
        for machine in machines:
            entries = machine.mounts()
            for entry in entries:
                kill(entry)
            until(lambda machine=machine: not machine.live_ids(), "daemons stay")
        self.clean()
        for machine in machines:
            shutil.rmtree(machine.path())
        self.host.boot(cmdline, loader)


@pytest.fixture
def real(pkram_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostBoots]:
    host = FakeHost(tmp_path / "host", monkeypatch)
    laboratory = HostBoots(tmp_path, Machine.locate())
    laboratory.host = host
    try:
        yield laboratory
    finally:
        laboratory.clean()


@pytest.fixture
def device() -> Iterator[str]:
    """A block device, which can be mapped and is never to be read or written by its descriptor. It outlives `real`."""
    if not ROOT:
        pytest.skip("needs root for a loop device")
    place = memory_directory()
    with open(place / "image", "wb") as file:
        file.truncate(128 << 20)
    made = subprocess.run(["losetup", "-f", "--show", place / "image"], capture_output=True, text=True, check=False)
    try:
        if made.returncode:
            pytest.skip(f"no loop device here: {made.stderr.strip()}")
        yield made.stdout.strip()
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)
    finally:
        shutil.rmtree(place)


def populate(mnt: Path) -> Any:
    (mnt / "dir").mkdir()
    for number in range(30):
        (mnt / "dir" / f"file-{number}").write_bytes(os.urandom(number * 700))
    (mnt / "large").write_bytes(os.urandom(3 << 20))
    os.link(mnt / "large", mnt / "hard")
    os.symlink("dir/file-1", mnt / "link")
    os.setxattr(mnt / "dir", "user.colour", b"grey")
    return snapshot(mnt)


def test_a_tree_survives_kexecs_of_the_host(device: str, real: HostBoots) -> None:
    real.refused(8, "ctl", "machine", "create", "--ram", device)
    real.ok("ctl", "machine", "create", "--ram", device, "--force")
    mnt = real.mount("tree")
    tree = populate(mnt)
    for generation in (2, 3):
        real.remount(mnt, "preserve,ro")
        real.boot(f"root=/dev/sda1 crashkernel=1G-4G:64M pkram={real.pfn()}")
        assert real.mount("tree") == mnt and snapshot(mnt) == tree
        (mnt / f"more-{generation}").write_bytes(os.urandom(50_000))
        tree = snapshot(mnt)
    assert "kexec boot of linux 6.12.9-test" in real.dmesg()
    assert "restored" in real.dmesg()
    real.ok("ctl", "verify")


def test_what_a_user_is_told_after_a_boot_without_pkram(real: HostBoots, pkram_root: Path) -> None:
    real.ok("ctl", "machine", "create", "--ram", f"{pkram_root}/memory:128M")
    assert "(file), as" in real.ok("ctl", "machine", "show")
    mnt = real.mount("tree")
    tree = populate(mnt)
    real.remount(mnt, "preserve,ro")
    pfn = real.pfn()
    real.boot("root=/dev/sda1")
    refused = real.helper(mnt, "pkram=tree")
    assert refused.returncode == 32 and refused.stderr.count("\n") == 1
    remedy = f"`pkram-kexec --resume --append pkram={pfn}`"
    assert "(shmem-tree)" in refused.stderr and remedy in refused.stderr
    status = real.ok("ctl", "status")
    assert "none is running" in status and f"128 MiB of RAM in {pkram_root}/memory (file)" in status
    for command in (["kexec", "--cold"], ["ctl", "machine", "destroy"]):
        lost = real.refused(6, *command)
        assert "1 node (shmem-tree), 3." in lost and "preserved, would be lost: pkram-kexec --resume says how" in lost
    assert "kernel 2 (linux 6.12.9-test) is up" in real.ok("kexec", "--resume", "--append", f"pkram={pfn}")
    real.refused(2, "kexec", "--resume", "--append", f"pkram={pfn}")
    real.mount("tree")
    assert snapshot(mnt) == tree


@pytest.mark.usefixtures("damaged")
def test_what_can_be_read_comes_back_by_force(real: HostBoots, pkram_root: Path) -> None:
    real.ok("ctl", "machine", "create", "--ram", f"{pkram_root}/memory:128M")
    first, second = real.mount("one"), real.mount("two")
    tree = populate(first)
    populate(second)
    for mnt in (first, second):
        real.remount(mnt, "preserve,ro")
    kernel = running.look(real.machine)
    (node,) = (node for node in kernel.store.nodes() if node.name == b"shmem-two")
    kernel.ram.bytes[node.pfn * 4096 + 200] ^= 1
    kernel.ram.close()
    real.boot(f"root=/dev/sda1 pkram={real.pfn()}")
    refused = real.helper(first, "pkram=one")
    assert refused.returncode == 32 and "`pkram-kexec --resume --force` restores what can be read" in refused.stderr
    assert "1 node (shmem-one)" in real.refused(3, "kexec", "--resume")
    done = real.run("kexec", "--resume", "--force")
    assert done.returncode == 0, done.stderr
    assert f"two is not mounted again on {second}: its tree was lost" in done.stderr
    assert f"mounted again: {first}" in done.stdout + done.stderr and snapshot(first) == tree


def test_what_was_mounted_is_mounted_again(real: HostBoots, pkram_root: Path) -> None:
    """Without an fstab, and with /run emptied: the header in memory knows what was where."""
    real.ok("ctl", "machine", "create", "--ram", f"{pkram_root}/memory:128M")
    first, second = real.mount("one", "pkram=one,size=40M,noexec"), real.mount("two")
    trees = []
    for mnt in (first, second):
        trees.append(populate(mnt))
        real.remount(mnt, "preserve,ro")
    real.boot(f"root=/dev/sda1 pkram={real.pfn()}")
    said = real.ok("ctl", "boot").splitlines()
    assert said[0].startswith("kernel 2 (linux 6.12.9-test) is up, super block at pfn ")
    lines = [line.removeprefix("not mounted again yet: ") for line in said[1:]]
    assert lines == [
        f"mount -t pkramfs -o pkram=one,size=40M,noexec none {first}",
        f"mount -t pkramfs -o pkram=two none {second}",
    ]
    assert f"{first}, {second} waits to be mounted again: pkram-kexec --resume" in real.ok("ctl", "status")
    options = shlex.split(lines[1])[4]
    assert real.helper(second, options).returncode == 0
    assert f"mounted again: {first}" in real.ok("kexec", "--resume")
    assert [snapshot(mnt) for mnt in (first, second)] == trees
    with pytest.raises(OSError, match="No space left"):
        (first / "too much").write_bytes(bytes(41 << 20))


def test_two_machines_decide_each_for_itself(real: HostBoots, pkram_root: Path) -> None:
    two = Machine.locate("two")
    for name in ("default", "two"):
        real.ok("ctl", "machine", "create", "--machine", name, "--ram", f"{pkram_root}/memory-{name}:64M")
    options = {"one": "pkram=tree", "other": "pkram=tree,machine=two,size=9M"}
    mounts = [real.mount(name, said) for name, said in options.items()]
    trees = []
    for number, mnt in enumerate(mounts):
        (mnt / f"file-{number}").write_bytes(os.urandom(50_000))
        trees.append(snapshot(mnt))
        real.remount(mnt, "preserve,ro")
    pfn = (two.read_text("pkram") or "").strip()
    real.boot(f"ro pkram=two:77 pkram=default:{real.pfn()}")
    real.mount("one", options["one"])
    assert snapshot(mounts[0]) == trees[0]
    refused, resume = real.helper(mounts[1], options["other"]), "pkram-kexec --machine two --resume --append pkram="
    assert refused.returncode == 32 and "says pkram='two:77'" in refused.stderr
    assert f"`{resume}{pfn}` restores" in refused.stderr
    real.remount(mounts[0], "preserve,ro")
    assert f"mounted again: {mounts[1]}" in real.ok(*shlex.split(f"{resume}{pfn}".removeprefix("pkram-")))
    assert snapshot(mounts[1]) == trees[1] and os.statvfs(mounts[1]).f_blocks * 4096 == 9 << 20
    real.remount(mounts[1], "preserve,ro")
    pfn = (two.read_text("pkram") or "").strip()
    real.boot(f"pkram=two:{pfn} pkram={real.pfn()}")
    for name, said in options.items():
        real.mount(name, said)
    assert [snapshot(mnt) for mnt in mounts] == trees


def test_a_machine_is_taken_again_and_given_back(real: HostBoots, pkram_root: Path) -> None:
    memory = f"{pkram_root}/memory"
    real.ok("ctl", "machine", "create", "--ram", f"{memory}:128M", "--seed", "5")
    conf = Path(real.machine.conf_path)
    said = conf.read_text()
    assert "kernel 1 (linux 6.12.9-test) is up" in real.ok("kexec", "--cold", "--force")
    real.boot("root=/dev/sda1")
    conf.unlink()
    assert "it has had 1 kernel, nothing was changed" in real.ok("ctl", "machine", "create", "--ram", memory)
    assert conf.read_text() == said
    real.refused(2, "ctl", "machine", "create", "--ram", memory, "--machine", "b", "--nodes", "2")
    other = real.refused(8, "ctl", "machine", "create", "--ram", memory, "--machine", "b")
    assert "holds the machine 'default': give --machine default" in other
    real.ok("ctl", "machine", "destroy")
    assert not conf.exists() and os.path.getsize(memory) == 128 << 20
    with open(memory, "rb") as file:
        assert not any(file.read(4096))
