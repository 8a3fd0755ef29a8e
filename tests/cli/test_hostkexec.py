# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec on memory of the host: what it checks, and what it then tells kexec(8) and systemd (fakes here)."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pkramfs.cli import daemons
from pkramfs.cli.daemons import Seen
from pkramfs.kernel import boot, hostload, running, succession
from pkramfs.machine.directory import Machine
from pkramfs.machine.mounts import MountEntry
from tests.support.host import FakeHost

LINE = "root=/dev/sda1 memmap=1G!4G quiet"


class Real:
    """A machine that is up, a kernel file, and programs that only say what they were told."""

    def __init__(self, machine: Machine, host: FakeHost, place: Path) -> None:
        self.machine, self.host, self.place = machine, host, place
        self.image = str(place / "vmlinuz")
        Path(self.image).write_bytes(b"kernel")
        self.program(
            "kexec", f'case "$*" in *-l*) l=1;; *) l=0;; esac; echo $l > {host.path("sys/kernel/kexec_loaded")}'
        )
        self.program("systemctl", f'[ "$1" != is-active ] || [ -e {place}/active ]')

    def program(self, name: str, more: str) -> None:
        path = self.place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.place}/told\n{more}\n')
        path.chmod(0o755)

    @property
    def told(self) -> list[str]:
        """Return the commands that were given, less those that only ask."""
        told = self.place / "told"
        lines = told.read_text().splitlines() if told.exists() else []
        return [line for line in lines if "is-active" not in line]

    @property
    def pkram(self) -> str:
        return "pkram=" + (self.machine.read_text("pkram") or "").strip()


@pytest.fixture
def real(root: str, ctl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Real:
    host = FakeHost(tmp_path / "host", monkeypatch)
    host.boot(LINE)
    host.write("sys/kernel/kexec_loaded", "0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert ctl("machine", "create", "--ram", f"{root}/memory:64M")[0] == 0
    monkeypatch.setattr(succession, "start_boot", lambda machine, force=False: boot.boot(machine, force=force))
    running.attach(Machine.locate())
    return Real(Machine.locate(), host, tmp_path)


def mounted(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """Have one mount, of this state."""
    entry = MountEntry(tree_id=1 << 20, name="x", mountpoint="/mnt/x", pid=1, options={}, dev=1, socket="", alive=True)
    status: Any = {"state": state, "files": 3, "lost_count": 0, "lost": []}
    monkeypatch.setattr(daemons, "look", lambda _: [Seen(entry, status, "")])


def test_what_is_right_is_handed_over(real: Real, kexec: Any) -> None:
    words = ["-s", "-l", real.image, "--initrd=/boot/initrd", f"--append={LINE} {real.pkram}"]
    assert kexec(*words) == (0, "", "")
    assert real.told == [f"kexec -s -l {real.image} --initrd=/boot/initrd --command-line={LINE} {real.pkram}"]
    assert kexec("--status")[1] == f"kernel: {real.image}\n  command line: {LINE} {real.pkram}\n"


def test_the_running_line_can_be_used_again(real: Real, kexec: Any) -> None:
    real.host.write("proc/cmdline", f"{LINE} pkram=77\n")
    assert kexec("-l", real.image, "--reuse-cmdline", "--append", "debug")[0] == 0
    assert real.told == [f"kexec -a -l {real.image} --command-line={LINE} {real.pkram} debug"]


@pytest.mark.parametrize(
    ("append", "why"),
    [
        ("ro {pkram}", "memmap=1G!4G is missing on the new command line, and no kexec hands it on: append it"),
        ("memmap=1G!8G {pkram}", "memmap=1G!4G is missing"),
        ("memmap=1G!4G", "the new command line has no pkram=: append {pkram}"),
        ("memmap=1G!4G pkram=1", "the new command line says pkram=1: leave {pkram} only"),
        ("memmap=1G!4G -- {pkram}", "the new command line has no pkram="),
    ],
)
def test_a_line_that_would_lose_memory_is_refused(real: Real, kexec: Any, append: str, why: str) -> None:
    append, why = append.format(pkram=real.pkram), why.format(pkram=real.pkram)
    status, _, err = kexec("-l", real.image, f"--append={append}")
    assert status == 6 and why in err and "nothing was loaded: --force goes on and loses" in err
    assert real.told == [] and why in real.machine.dmesg()
    assert kexec("-l", real.image, f"--append={append}", "--dry-run")[0] == 6 and real.told == []
    status, _, err = kexec("-l", real.image, f"--append={append}", "--force")
    assert status == 0 and f"warning: {why}" in err and len(real.told) == 1


def test_a_line_that_the_kernel_would_cut_is_refused(real: Real, kexec: Any) -> None:
    for more, why in (("x" * 2048, "bytes; the kernel takes 2047"), ("a\nb", "a line break or a NUL")):
        status, _, err = kexec("-l", real.image, "--reuse-cmdline", f"--append={more}")
        assert status == 2 and why in err and real.told == []


def test_a_dry_run_says_what_is_right_and_what_would_be_typed(real: Real, kexec: Any) -> None:
    status, out, _ = kexec("-l", real.image, f"--append={LINE} {real.pkram}", "-n")
    assert status == 0 and real.told == []
    assert out.splitlines() == [
        "memmap=1G!4G is repeated",
        f"{real.pkram} is the super block of this kernel",
        f"kexec -a -l {real.image} '--command-line={LINE} {real.pkram}'",
    ]
    status, both, _ = kexec("-l", "-e", real.image, f"--append={LINE} {real.pkram}", "-n")
    assert status == 0 and both == f"{out}execute it: load it without --dry-run to see that plan\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["-l", "builtin"],
            "builtin is for the simulation, this machine is on memory of the host: give a kernel file",
        ),
        (["-l", "/nowhere/vmlinuz"], "cannot load /nowhere/vmlinuz: no such file"),
        (["-p", "/etc/passwd"], "load a crash kernel with kexec -p"),
        (["--panic"], "--panic is for the simulation"),
        (["-e", "--poison"], "--poison is for a machine of the simulation"),
        (
            ["-l", "/etc/passwd", "--mem-min=1M"],
            "kexec(8) chooses the addresses on memory of the host: leave --segment, --mem-min and --mem-max out",
        ),
    ],
)
def test_what_only_the_simulation_can_do_is_said(real: Real, kexec: Any, words: list[str], message: str) -> None:
    status, _, err = kexec(*words)
    assert status == 2 and message in err and err.count("\n") == 1


def test_nothing_is_executed_unless_a_kernel_is_loaded(real: Real, kexec: Any) -> None:
    status, _, err = kexec("-e")
    assert status == 8 and "no kernel is loaded: pkram-kexec -l IMAGE" in err
    assert kexec("-e", "-n")[0] == 8 and real.told == []
    assert kexec("-S")[1] == "kernel: none is loaded\n"


@pytest.mark.parametrize("systemd", [True, False])
def test_executing_goes_through_systemd_where_it_runs(real: Real, kexec: Any, systemd: bool) -> None:
    if systemd:
        real.host.write("run/systemd/system/unit", "")
    assert kexec("-l", real.image, "--reuse-cmdline")[0] == 0
    status, out, _ = kexec("-e", "--dry-run")
    assert status == 0 and "memmap=1G!4G is repeated" in out
    assert ("systemctl kexec: systemd unmounts" in out, "sync\nkexec -e\n" in out) == (systemd, not systemd)
    assert len(real.told) == 1
    assert kexec("-e")[0] == 0
    assert real.told[1] == ("systemctl kexec" if systemd else "kexec -e")


@pytest.mark.mount
def test_a_kexec_that_fails_mounts_again_what_it_stopped(
    real: Real, kexec: Any, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkramfs.cli.mount import main

    directory = Path(place())
    assert main(["none", str(directory), "-o", "pkram=x"]) == 0
    (directory / "file").write_bytes(b"text")
    assert main(["none", str(directory), "-o", "remount,preserve,ro"]) == 0
    assert kexec("-l", real.image, "--reuse-cmdline")[0] == 0
    real.program("kexec", "echo no; exit 1")
    status, _, err = kexec("-e")
    assert status == 8 and "kexec -e failed: no" in err
    assert (directory / "file").read_bytes() == b"text" and directory.is_mount()


def test_what_is_mounted_and_not_preserved_stops_it(real: Real, kexec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real.host.write("run/systemd/system/unit", "")
    kexec("-l", real.image, "--reuse-cmdline")
    mounted(monkeypatch, "live")
    lost = "/mnt/x: 3 files would be lost (not preserved: mount -o remount,preserve,ro /mnt/x)"
    status, out, _ = kexec("-e", "-n")
    assert status == 6 and lost in out
    status, _, err = kexec("-e")
    assert status == 6 and lost in err and "nothing was changed: --force" in err and len(real.told) == 1
    assert kexec("-e", "--force")[0] == 0 and real.told[1:] == ["systemctl kexec"]
    mounted(monkeypatch, "preserved")
    status, out, _ = kexec("-e", "-n")
    assert status == 0 and "/mnt/x (x) is preserved" in out


def test_what_a_unit_will_preserve_does_not_stop_it(real: Real, kexec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("systemd-escape") is None:
        pytest.skip("systemd-escape is missing")
    real.host.write("run/systemd/system/unit", "")
    kexec("-l", real.image, "--reuse-cmdline")
    mounted(monkeypatch, "live")
    (real.place / "active").touch()
    status, out, _ = kexec("-e", "-n")
    assert status == 0 and "/mnt/x (x) will be preserved by its unit, before it is unmounted" in out
    assert kexec("-e")[0] == 0 and real.told[1:] == ["systemctl kexec"]
    assert "is-active --quiet pkramfs-preserve@mnt-x.service" in (real.place / "told").read_text()


def test_a_line_that_became_wrong_after_loading_stops_it(real: Real, kexec: Any) -> None:
    real.host.write("run/systemd/system/unit", "")
    kexec("-l", real.image, "--append=ro", "--force")
    status, _, err = kexec("-e")
    assert status == 6 and "memmap=1G!4G is missing" in err and "has no pkram=" in err and len(real.told) == 1


def test_a_kernel_that_was_loaded_by_hand_is_not_known(real: Real, kexec: Any) -> None:
    real.host.write("run/systemd/system/unit", "")
    real.host.write("sys/kernel/kexec_loaded", "1\n")
    assert "given by somebody else" in kexec("-S")[1]
    status, _, err = kexec("-e")
    assert status == 0 and "warning: the command line of the loaded kernel is unknown" in err
    assert hostload.read([real.machine]) is None


def test_unloading_is_handed_over(real: Real, kexec: Any) -> None:
    kexec("-l", real.image, "--reuse-cmdline")
    assert hostload.read([real.machine]) is not None
    assert kexec("-u", "-n")[1] == "kexec -u\n"
    assert kexec("-u")[0] == 0 and real.told[-1] == "kexec -u"
    assert hostload.read([real.machine]) is None


def test_a_program_that_fails_or_lacks_is_named(real: Real, kexec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real.program("kexec", "echo 'kexec: cannot open device' >&2; exit 1")
    status, _, err = kexec("-l", real.image, "--reuse-cmdline")
    assert status == 8 and "kexec -a failed: kexec: cannot open device" in err
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, err = kexec("-l", real.image, "--reuse-cmdline")
    assert status == 8 and "kexec is not installed (on Debian: apt-get install kexec-tools)" in err


def test_a_machine_that_is_not_up_says_how_to_bring_it_up(real: Real, kexec: Any) -> None:
    real.host.boot(LINE)
    status, _, err = kexec("-l", real.image, "--reuse-cmdline")
    assert status == 8 and "no kernel is running" in err and "the first mount boots it" in err
    assert hostload.reserving("a memmap=1G%4G-1+7 nokaslr -- memmap=1") == ["memmap=1G%4G-1+7", "nokaslr"]
    assert hostload.reserving("memmap=1G!4G nokaslr") == ["memmap=1G!4G"]


# -- several machines -------------------------------------------------------------------------------


@pytest.fixture
def two(real: Real, root: str, ctl: Any) -> Machine:
    """A second machine on memory of the same host, which is up."""
    assert ctl("machine", "create", "--machine", "my two", "--ram", f"{root}/other:64M")[0] == 0
    running.attach(Machine.locate("my two"))
    return Machine.locate("my two")


def both_words(real: Real, two: Machine) -> tuple[str, str]:
    one, other = ((each.read_text("pkram") or "").strip() for each in (real.machine, two))
    return f"pkram=default:{one}", f'pkram="my two:{other}"'


def test_the_line_names_every_machine_of_the_host(real: Real, two: Machine, kexec: Any) -> None:
    first, second = both_words(real, two)
    for words in ([], ["--machine", "my two"]):
        status, out, err = kexec("-n", "-l", real.image, "--reuse-cmdline", *words)
        assert (status, err) == (0, "")
        assert out.splitlines()[:3] == [
            "memmap=1G!4G is repeated",
            f"{first} is the super block of machine default",
            f"{second.replace(chr(34), '')} is the super block of machine my two",
        ]
        assert f"{LINE} {first} {second}" in out
    shutil.rmtree(two.path())  # it is not up in this boot, but its header says what it had
    assert f"{LINE} {first} {second}" in kexec("-n", "-l", real.image, "--reuse-cmdline")[1]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("{first}", "the new command line has no pkram= of machine my two: append {second}"),
        ("{second}", "the new command line has no pkram= of machine default: append {first}"),
        ("{first} pkram=7", "the new command line says pkram=7: for machine my two it must say {second}"),
        ("{first} {second} pkram=default:7", "says {first} pkram=default:7: for machine default it must say {first}"),
        ("", "the new command line has no pkram=: append {first}"),
    ],
)
def test_each_machine_s_number_is_looked_at(real: Real, two: Machine, kexec: Any, said: str, why: str) -> None:
    first, second = both_words(real, two)
    said, why = (text.format(first=first, second=second) for text in (said, why))
    status, _, err = kexec("-l", real.image, f"--append={LINE} {said}")
    assert status == 6 and why in err and real.told == []


def test_what_one_machine_loaded_all_know(real: Real, two: Machine, kexec: Any) -> None:
    assert kexec("-l", real.image, "--reuse-cmdline", "--append=first")[0] == 0
    assert kexec("-l", real.image, "--reuse-cmdline", "--append=second", "--machine", "my two")[0] == 0
    for words in ([], ["--machine", "my two"]):
        assert kexec("-S", *words)[1].endswith(" second\n")
    assert kexec("-u")[0] == 0 and hostload.read([real.machine, two]) is None


def test_a_copy_of_a_configuration_is_no_machine(real: Real, root: str, kexec: Any) -> None:
    shutil.copy(f"{root}/default.conf", f"{root}/backup.conf")
    os.mkdir(f"{root}/directory.conf")
    assert [one.name for one in Machine.on_host()] == ["default"]
    status, out, _ = kexec("-n", "-l", real.image, "--reuse-cmdline")
    assert status == 0 and f"{real.pkram} is the super block of this kernel" in out


def test_memory_that_is_not_there_is_a_warning(real: Real, two: Machine, root: str, kexec: Any) -> None:
    shutil.rmtree(two.path())
    os.rename(f"{root}/other", f"{root}/away")
    status, _, err = kexec("-l", real.image, "--reuse-cmdline")
    assert status == 0 and "warning: machine my two cannot be looked at: cannot open RAM" in err


@pytest.mark.mount
@pytest.mark.parametrize("systemd", [True, False])
def test_trees_of_all_machines_are_looked_at(
    real: Real, two: Machine, kexec: Any, ctl: Any, place: Any, systemd: bool
) -> None:
    from pkramfs.cli.mount import main

    if systemd:
        real.host.write("run/systemd/system/unit", "")
    here, there, simulated = (Path(place()) for _ in range(3))
    assert main(["none", str(here), "-o", "pkram=x"]) == 0
    assert main(["none", str(there), "-o", "pkram=x,machine=my two"]) == 0
    assert kexec("-l", real.image, "--reuse-cmdline")[0] == 0
    assert main(["none", str(here), "-o", "remount,preserve,ro"]) == 0
    status, _, err = kexec("-e")
    assert status == 6 and f"{there}: 0 files would be lost" in err and len(real.told) == 1
    assert main(["none", str(there), "-o", "remount,preserve,ro"]) == 0
    assert ctl("machine", "create", "--machine", "sim", "--ram", "64M")[0] == 0
    assert main(["none", str(simulated), "-o", "pkram=y,machine=sim"]) == 0
    status, out, _ = kexec("-e", "-n")
    lost = f"{simulated} would be lost: {Machine.locate('sim').path('ram')}, the RAM of machine sim, ends with the host"
    assert status == 6 and lost in out and f"{here} (x) is preserved" in out and f"{there} (x) is preserved" in out
    assert kexec("-e", "--force")[0] == 0
    assert real.told[1:] == ["systemctl kexec" if systemd else "kexec -e"]
    assert here.is_mount() is there.is_mount() is systemd
