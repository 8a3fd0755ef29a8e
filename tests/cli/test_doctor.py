# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl doctor: each finding on a host that lacks something, with its remedy, and the worst as exit status."""

import json
import os
import resource
import signal
import subprocess
import sys
from importlib import metadata

import pytest
import xxhash

from pkramfs.cli import checkup, doctor
from pkramfs.cli.checkup import ERROR, NOTE, OK, WARNING, Finding, Host
from pkramfs.machine.directory import Machine


@pytest.fixture
def top(tmp_path):
    """A host that lacks nothing: its device, its capabilities, its helpers."""
    for name in ("dev", "proc/self", "sbin", "usr/bin", "run/systemd/system", "etc/systemd"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dev/fuse").touch()
    (tmp_path / "proc/self/status").write_text("Name:\tx\nCapEff:\t000001ffffffffff\n")
    helper = tmp_path / "usr/bin/mount.pkramfs"
    for path in (helper, tmp_path / "usr/bin/fusermount3"):
        path.write_text("")
        path.chmod(0o4755)
    for name in checkup.HELPERS:
        (tmp_path / "sbin" / name).symlink_to(helper)
    return tmp_path


def levels(found) -> list[str]:
    return [one.level for one in found]


def only(found) -> Finding:
    (one,) = (one for one in found if one.level != OK)
    return one


def test_nothing_is_lacking(top):
    host = Host(str(top), uid=0)
    assert set(levels(checkup.fuse(host))) == {OK}
    assert levels(checkup.helpers(host, str(top / "usr/bin/mount.pkramfs"))) == [OK, OK]
    assert levels(checkup.versions(host)) == [OK]


def test_no_device(top):
    (top / "dev/fuse").unlink()
    found = only(checkup.fuse(Host(str(top), uid=0)))
    assert (found.level, found.found) == (ERROR, f"{top}/dev/fuse is missing: nothing can be mounted")
    assert "modprobe fuse" in found.remedy


def test_a_root_that_may_not_mount(top):
    (top / "proc/self/status").write_text("CapEff:\t00000000a80425fb\n")  # a container's
    found = only(checkup.fuse(Host(str(top), uid=0)))
    assert "CAP_SYS_ADMIN" in found.found and "--cap-add" in found.remedy


def test_a_user_needs_fusermount3(top):
    host, program = Host(str(top), uid=1000), top / "usr/bin/fusermount3"
    if os.geteuid() == 0:
        assert set(levels(checkup.fuse(host))) == {OK}
    program.chmod(0o755)
    assert "not setuid root" in only(checkup.fuse(host)).found
    program.unlink()
    assert only(checkup.fuse(host)).remedy == "apt-get install fuse3"


def test_helpers_that_are_missing_dangling_or_another_s(top):
    ours, link = str(top / "usr/bin/mount.pkramfs"), top / "sbin/mount.fuse.pkramfs"
    link.unlink()
    found = only(checkup.helpers(Host(str(top), uid=0), ours))
    assert (found.level, found.remedy) == (ERROR, f"pkramctl install, or ln -sfn {ours} {link}")
    assert found.found == f"{link} is missing: `mount -o remount` does not work"
    assert only(checkup.helpers(Host(str(top), uid=1000), ours)).level == NOTE
    link.symlink_to("/nowhere/mount.pkramfs")
    assert only(checkup.helpers(Host(str(top), uid=0), ours)).found.endswith(
        "leads to nothing (/nowhere/mount.pkramfs)"
    )
    link.unlink()
    link.symlink_to(top / "usr/bin/fusermount3")
    found = only(checkup.helpers(Host(str(top), uid=0), ours))
    assert (found.level, "another installation's" in found.found) == (WARNING, True)


def test_a_package_that_is_missing_or_too_old(top, monkeypatch):
    monkeypatch.setattr(checkup, "_requirements", lambda: [("no_such_package", ""), ("trio", "99.1")])
    missing, old, said = checkup.versions(Host(str(top), uid=0))
    assert missing.level == old.level == ERROR and said.level == OK
    assert missing.remedy == f"{sys.executable} -m pip install no_such_package"
    assert old.found.endswith("is too old: trio>=99.1 is needed")


def test_a_package_that_was_built_without_its_version_says_it_itself(top, monkeypatch):
    monkeypatch.setattr(checkup, "_requirements", lambda: [("xxhash", "3.0")])
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.0")
    (said,) = checkup.versions(Host(str(top), uid=0))
    assert said.level == OK and said.found.endswith(f"xxhash {xxhash.VERSION}")


def test_what_this_package_needs_is_known():
    assert {"numpy", "pyfuse3", "trio"} <= {name for name, _ in checkup._requirements()}
    assert checkup._number("3.10.1") > checkup._number("3.9")


def test_a_limit_that_ram_exceeds(top):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert levels(checkup.limits(1 << 30)) == [OK]
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, hard)  # ours stay
    code = "from pkramfs.cli import checkup; print(*checkup.limits(1 << 30), sep='\\n')"
    words = ["prlimit", "--fsize=1048576:1048576", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    if os.geteuid() != 0:  # root's daemon puts it off, where it may
        assert "level='error'" in done.stdout
    if "level='error'" in done.stdout:
        assert "the limit of file size is 1.0 MiB, but RAM needs 1.0 GiB: a daemon refuses to start" in done.stdout
        assert "ulimit -f unlimited" in done.stdout


@pytest.mark.parametrize(
    ("room", "limit", "level"), [(None, None, OK), (0, 1 << 30, ERROR), (1 << 20, 1 << 30, NOTE), (5, 1 << 40, OK)]
)
def test_a_memory_cgroup(monkeypatch, room, limit, level):
    from pkramfs.machine.cgroups import MemoryGroups

    monkeypatch.setattr(MemoryGroups, "room", lambda _: room)
    monkeypatch.setattr(MemoryGroups, "limit", lambda _: limit)
    assert levels(checkup.cgroup(1 << 35)) == [level]


def test_a_user_who_does_not_linger(top):
    host, ram = Host(str(top), uid=1000, user="ann"), "/dev/shm/pkram-1000/default"
    assert levels(checkup.logind(Host(str(top), uid=0), ram)) == [OK]
    assert levels(checkup.logind(host, "/srv/pkram")) == [OK]
    (found,) = checkup.logind(host, ram)
    assert (found.level, found.remedy.partition(",")[0]) == (WARNING, "loginctl enable-linger ann")
    (top / "etc/systemd/logind.conf").write_text("[Login]\n#RemoveIPC=yes\nRemoveIPC=no\n")
    assert levels(checkup.logind(host, ram)) == [OK]
    (top / "etc/systemd/logind.conf.d").mkdir()
    (top / "etc/systemd/logind.conf.d/50-x.conf").write_text("[Login]\nRemoveIPC=yes\n")
    assert levels(checkup.logind(host, ram)) == [WARNING]
    (top / "var/lib/systemd/linger").mkdir(parents=True)
    (top / "var/lib/systemd/linger/ann").touch()
    assert levels(checkup.logind(host, ram)) == [OK]


def test_a_check_that_fails_hides_no_other():
    def broken():
        yield Finding("x", OK, "fine")
        raise PermissionError(13, "Permission denied", "/proc/x")

    assert [one.found for one in checkup.guarded("x", broken())] == [
        "fine",
        "cannot be checked: /proc/x: Permission denied",
    ]


def test_a_machine_and_none(root, ctl, monkeypatch):
    monkeypatch.setattr(checkup, "helpers", lambda _host: iter(()))
    status, out, err = ctl("doctor")
    assert (status, err) == (0, "") and f"{root}/default is made by the first mount" in out
    assert not os.listdir(root)  # looking makes nothing
    assert ctl("machine", "create", "--ram", "128M")[0] == 0
    status, out, _ = ctl("--json", "doctor")
    found = json.loads(out)
    assert status == 0 and found["worst"] in (OK, NOTE)
    assert set(found["findings"][0]) == {"check", "level", "found", "remedy"}
    os.unlink(f"{root}/default/ram")
    status, out, _ = ctl("doctor")
    assert status == 11 and f"{root}/default/ram is missing" in out
    assert out.splitlines()[-1].startswith("1 error")


def test_the_room_behind_ram(host, ctl, monkeypatch):
    """On a tmpfs of 64 MiB for RAM of 256 MiB: worth to know; full: an error."""
    monkeypatch.setenv("PKRAM_ROOT", str(host.directory))
    assert ctl("machine", "create", "--ram", "256M")[0] == 0
    (found,) = doctor._room(Machine.locate(), 256 << 20)
    assert found.level == WARNING
    assert f"RAM has 256 MiB, {host.directory} (tmpfs) holds 64.0 MiB" in found.found
    assert found.remedy == f"mount -o remount,size=2G {host.directory}"
    host.fill()
    (found,) = doctor._room(Machine.locate(), 256 << 20)
    assert found.level == ERROR and found.found.endswith("0 B of it may still be used: writes fail with ENOSPC")


def test_a_message_is_parted_from_its_remedy():
    assert doctor._parted("nodes: /x is damaged: y; remove it") == ("nodes: /x is damaged: y", "remove it")
    assert doctor._parted("silent: look at it") == ("silent", "look at it")
    assert doctor._parted("no such file: /x") == ("no such file: /x", "")


@pytest.mark.mount
def test_a_mount_whose_daemon_answers_or_does_not(machine, ctl, place, monkeypatch):
    from pkramfs.cli import daemons
    from pkramfs.cli.mount import main as mount

    assert mount(["none", place(), "-o", "pkram=one"]) == 0
    assert "1 daemon answers; no data are lost" in ctl("doctor")[1]
    (entry,) = machine.mounts()
    monkeypatch.setattr(daemons, "ANSWER_SECONDS", 0.1)
    os.kill(entry.pid, signal.SIGSTOP)
    try:
        status, out, _ = ctl("doctor")
    finally:
        os.kill(entry.pid, signal.SIGCONT)
    assert status == 11 and f"(pid {entry.pid}) does not answer" in out
