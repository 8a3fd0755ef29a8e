# SPDX-License-Identifier: GPL-2.0-or-later
"""A mount lives longer than the shell that made it, and without that shell's limits and priorities."""

import errno
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pkramfs.mounting.options import parse

pytestmark = pytest.mark.mount
ROOT = os.geteuid() == 0
MAY_RAISE = ROOT and bool(int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16) & 1 << 24)


def in_shell(lab: Any, setup: str, directory: Path, options: str) -> subprocess.CompletedProcess[str]:
    """mount.pkramfs as a shell has it that has done `setup`."""
    words = [sys.executable, "-m", "pkramfs", "mount", "none", str(directory), "-o", options]
    return subprocess.run(
        ["bash", "-c", f"{setup}; exec {shlex.join(words)}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def limits(pid: int) -> dict[str, str]:
    """The soft limits of a process, by their names in /proc."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:46].strip() for line in lines}


def test_soft_limits_and_priorities_stay_behind(lab: Any) -> None:
    mnt = lab.dir("one")
    setup = "ulimit -S -f 2048; ulimit -S -t 30; ulimit -S -n 30; umask 0777; trap '' CHLD TERM HUP"
    setup += "; echo 700 >/proc/self/oom_score_adj" + ("; renice -n 9 $$ >&2; chrt -i -p 0 $$" if ROOT else "")
    done = in_shell(lab, setup, mnt, "pkram=one")
    assert done.returncode == 0, done
    pid = lab.entry(mnt).pid
    mine = {
        name: resource.getrlimit(getattr(resource, number))[1]
        for name, number in (("Max file size", "RLIMIT_FSIZE"), ("Max cpu time", "RLIMIT_CPU"))
    }
    found = limits(pid)
    assert {name: found[name] for name in mine} == {n: "unlimited" if v < 0 else str(v) for n, v in mine.items()}
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == 0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert (fields[16], fields[38]) == ("0", "0"), "nice and scheduling policy"
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    (mnt / "file").write_bytes(b"x" * (4 << 20))
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    assert in_shell(lab, setup, mnt, "pkram=one").returncode == 0
    assert (mnt / "file").read_bytes() == b"x" * (4 << 20)


@pytest.mark.skipif(not ROOT, reason="a score of the whole machine")
def test_a_score_for_the_oom_killer(lab: Any) -> None:
    mnt = lab.mount("one", "pkram=one,oom_score_adj=123")
    pid = lab.entry(mnt).pid
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "123\n"
    assert lab.entry(mnt).options["oom_score_adj"] == "123", "a kexec mounts it again with that"
    lab.remount(mnt, "preserve,ro")


@pytest.mark.parametrize("value", ["1001", "-1001", "x", "1.5", "+5", "٣"])
def test_scores_that_cannot_be(lab: Any, value: str) -> None:
    done = lab.helper(lab.dir("one"), f"oom_score_adj={value}")
    assert done.returncode == 1 and "oom_score_adj" in done.stderr and done.stderr.count("\n") == 1
    assert parse("oom_score_adj=-1000").oom_score_adj == -1000


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-f 2048", "the limit of file size is 2.0 MiB, but RAM needs"),
        ("-t 900", "the limit of processor time is 900 s"),
        ("-v 20000000", "the limit of address space is 19.1 GiB, but RAM needs"),
    ],
)
@pytest.mark.skipif(MAY_RAISE, reason="who may raise hard limits does")
def test_a_hard_limit_that_ram_exceeds_is_refused(lab: Any, limit: str, words: str) -> None:
    mnt = lab.dir("one")
    lab.run("ctl", "machine", "create", "--ram", "20G")
    done = in_shell(lab, f"ulimit {limit}", mnt, "pkram=one")
    assert done.returncode == 32 and done.stderr.count("\n") == 1, done
    assert words in done.stderr and f"ulimit {limit.split()[0]}" in done.stderr
    assert not os.path.ismount(mnt) and not list(Path(lab.machine.path("mounts")).iterdir())
    lab.mount("two")


@pytest.mark.skipif(not MAY_RAISE, reason="raising hard limits needs CAP_SYS_RESOURCE")
def test_root_raises_hard_limits(lab: Any) -> None:
    mnt = lab.dir("one")
    assert in_shell(lab, "ulimit -f 2048; ulimit -t 20; ulimit -n 30", mnt, "pkram=one").returncode == 0
    found = limits(lab.entry(mnt).pid)
    assert {found["Max file size"], found["Max cpu time"]} == {"unlimited"}
    (mnt / "file").write_bytes(b"x" * (4 << 20))
    lab.remount(mnt, "preserve,ro")


def test_a_kexec_does_without_the_limits_of_its_shell(lab: Any) -> None:
    """Also the boot, and daemons that are started ahead of need."""
    mnt = lab.mount("one")
    (mnt / "file").write_bytes(b"x" * (4 << 20))
    lab.remount(mnt, "preserve,ro")
    pfn = Path(lab.machine.path("pkram")).read_text().strip()
    words = [sys.executable, "-m", "pkramfs", "kexec"]
    load = shlex.join([*words, "-s", "-l", "builtin:3M", f"--append=pkram={pfn}"])
    setup = "ulimit -S -f 1024; ulimit -S -n 30; trap '' CHLD; umask 0777"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["bash", "-c", f"{setup}; {load} && exec {shlex.join([*words, '-e'])}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done
    assert (mnt / "file").read_bytes() == b"x" * (4 << 20)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    assert limits(lab.entry(mnt).pid)["Max file size"] == ("unlimited" if hard < 0 else str(hard))


@pytest.mark.parametrize("more", [4 << 20, 0, -(4 << 20)])
def test_a_daemon_that_may_have_no_more_memory_lives_on(lab: Any, more: int) -> None:
    """What does not fit is ENOMEM, the tree stays, and goes on when there is memory again."""
    mnt = lab.mount("one")
    (mnt / "file").write_bytes(b"content")
    os.sync()
    pid, value, made = lab.entry(mnt).pid, os.urandom(30000), []
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used + more, before[1]))
    with pytest.raises(OSError) as caught:
        for number in range(2000):
            (mnt / f"{number}").mkdir()
            os.setxattr(mnt / f"{number}", "user.x", value)
            made.append(f"{number}")
    assert caught.value.errno == errno.ENOMEM
    for _ in range(20):
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOMEM):
            (mnt / "more").mkdir()
    assert (mnt / "file").read_bytes() == b"content" and {*made, "file"} <= set(os.listdir(mnt))
    assert all(os.getxattr(mnt / name, "user.x") == value for name in made)
    assert lab.status(mnt)["state"] == "live" and lab.entry(mnt).pid == pid
    resource.prlimit(pid, resource.RLIMIT_AS, before)
    (mnt / "more").mkdir()
    os.setxattr(mnt / "more", "user.x", value)
    log = Path(lab.machine.path("mounts", f"{lab.entry(mnt).tree_id:016x}.log")).read_text()
    assert log.count("out of memory") == 1, "told once"
    lab.remount(mnt, "preserve,ro")
    lab.umount(mnt)
    mnt = lab.mount("one")
    assert os.getxattr(mnt / "more", "user.x") == value
