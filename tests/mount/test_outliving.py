# SPDX-License-Identifier: GPL-2.0-or-later
"""What programs keep when daemons die, and how holder, daemon and mount end in any order."""

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pkramfs.control import client
from pkramfs.fuse.wire import Op
from pkramfs.kernel.running import look
from tests.support.mortal import Held, held, shadows
from tests.support.places import ROOT
from tests.support.waiting import until

pytestmark = pytest.mark.mount
UMOUNT = ["umount"] if ROOT else ["fusermount3", "-u"]
LAZY = ["umount", "-l"] if ROOT else ["fusermount3", "-uz"]

SLOW = """
import time
from pkramfs.daemon import mount
def slowly(*args, work=mount.recover):
    open(orders + ".begun", "w").close()
    while not os.path.exists(orders + ".go"):
        yield time.sleep(0.001)
    return (yield from work(*args))
mount.recover = slowly
"""
"""A daemon that recovers only when a file appears."""
POISON = """
from pkramfs.fs.tree import Tree
def mkdir(self, parent, name, *args, work=Tree.mkdir):
    if name == b"poison":
        os._exit(3)
    return work(self, parent, name, *args)
Tree.mkdir = mkdir
"""
BY_FUSERMOUNT3 = """
from pkramfs.fuse import session
session._mount_as_root = lambda place, held, flags, source: session._mount_as_user(place, flags, True, source)
"""
LOCKER = """
import fcntl, sys
with open(sys.argv[1], "rb+") as file:
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("held", end=" ")
"""


def leased(lab: Any) -> int:
    """Blocks of RAM that trees hold."""
    return int(look(lab.machine).leases.trees().total)


def kill(mount: Held) -> None:
    """Kill the daemon, and wait for the next."""
    entry = mount.lab.entry(mount.directory)
    os.kill(entry.pid, signal.SIGKILL)
    os.statvfs(mount.directory)
    until(lambda: mount.pid != entry.pid)


def test_programs_keep_what_they_have(lab: Any) -> None:
    """Files open, deleted, mapped, locked; a working directory that is gone; a pipe and an append."""
    with held(lab) as mount:
        at = mount.directory
        (at / "gone").mkdir()
        (at / "locked").write_bytes(b"l")
        with (
            open(at / "deleted", "wb+", buffering=0) as deleted,
            open(at / "mapped", "wb+", buffering=0) as mapped,
            open(at / "log", "ab", buffering=0) as log,
            open(at / "locked", "rb+") as locked,
            subprocess.Popen(["sleep", "60"], cwd=at / "gone") as inside,
        ):
            try:
                deleted.write(b"x" * 100_000)
                (at / "deleted").unlink()
                mapped.truncate(40_000)
                view = mmap.mmap(mapped.fileno(), 40_000)
                fcntl.flock(locked, fcntl.LOCK_EX)
                fcntl.lockf(locked, fcntl.LOCK_EX)
                (at / "gone").rmdir()
                for number in range(4):
                    view[number * 9000 : number * 9000 + 5] = b"%05d" % number
                    log.write(b"%05d\n" % number)
                    deleted.seek(number * 20_000)
                    deleted.write(b"%05d" % number)
                    kill(mount)
                    assert os.pread(deleted.fileno(), 5, number * 20_000) == b"%05d" % number
                    assert os.fstat(deleted.fileno()).st_nlink == 0
                    assert view[number * 9000 : number * 9000 + 5] == b"%05d" % number
                    assert os.listdir(f"/proc/{inside.pid}/cwd") == []
                    words = [sys.executable, "-c", LOCKER, str(at / "locked")]
                    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "held held "
                view.flush()
                view.close()
                assert (at / "log").read_bytes() == b"".join(b"%05d\n" % number for number in range(4))
                status = lab.status(at)
                assert status["files"] == 3 + 1, status
            finally:
                inside.kill()
        until(lambda: lab.status(at)["files"] == 3)  # the deleted one is freed, and its name
        expected = {name: (at / name).read_bytes() for name in ("mapped", "log", "locked")}
        lab.remount(at, "preserve,ro")
    again = lab.mount("one")
    assert {name: (again / name).read_bytes() for name in os.listdir(again)} == expected


def test_a_checkpoint_does_not_outlive_its_daemon(lab: Any) -> None:
    """Its frames are free once another daemon serves: who is still writing there would destroy files."""
    with held(lab, extra="journal.REQUESTS = 100") as mount:
        at, entry = mount.directory, mount.lab.entry(mount.directory)
        for number in range(120):
            (at / f"{number}").write_bytes(b"%d" % number * 1000)
        os.sync()
        until(lambda: shadows(entry.pid))
        (shadow,) = shadows(entry.pid)
        os.kill(shadow, signal.SIGSTOP)  # it would be done too soon
        kill(mount)
        assert not Path(f"/proc/{shadow}").exists()
        for number in range(120):
            assert (at / f"{number}").read_bytes() == b"%d" % number * 1000


def test_a_mount_by_fusermount3_is_taken_over(lab: Any) -> None:
    with held(lab, extra=BY_FUSERMOUNT3) as mount:
        at = mount.directory
        with open(at / "file", "wb", buffering=0) as file:
            for number in range(3):
                file.write(b"%d" % number)
                kill(mount)
        assert (at / "file").read_bytes() == b"012"


def test_who_takes_over_dies_too(lab: Any) -> None:
    """Before it asks for what was not answered, after that, and while it serves it."""
    with held(lab) as mount:
        at = mount.directory
        (at / "file").write_bytes(b"x")
        mount.die((Op.UNLINK, "after"), (0, "resume"), (0, "resent"), (0, "resume"))
        (at / "file").unlink()
        assert mount.died
        assert os.listdir(at) == []


def test_what_kills_every_daemon_is_refused(lab: Any) -> None:
    with held(lab, extra=POISON) as mount:
        at = mount.directory
        (at / "before").touch()
        with pytest.raises(OSError, match="Input/output") as caught:
            (at / "poison").mkdir()
        assert caught.value.errno == errno.EIO
        (at / "after").mkdir()
        assert sorted(os.listdir(at)) == ["after", "before"]


@pytest.mark.parametrize("first", ["holder", "daemon"])
def test_both_die_and_the_name_is_mounted_again(lab: Any, first: str) -> None:
    """Everything is there but what the kernel had not sent, and files without a name."""
    mount = Held(lab, lab.dir("one"))
    at, before = mount.directory, leased(lab)
    (at / "sub").mkdir()
    (at / "sub" / "file").write_bytes(b"x" * 100_000)
    os.sync()
    entry = lab.entry(at)
    pids = [entry.holder, entry.pid] if first == "holder" else [entry.pid, entry.holder]
    assert entry.holder == mount.process.pid
    os.kill(pids[1], signal.SIGSTOP)  # either would replace the other
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    mount.process.wait(60)
    lab.gone(entry)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(at)
    assert leased(lab) >= before
    lab.mount("one")
    assert (at / "sub" / "file").read_bytes() == b"x" * 100_000
    assert os.listdir(at) == ["sub"]


def test_a_holder_that_dies_is_replaced(lab: Any) -> None:
    """So is its daemon, in any order: one of the two is enough. There are never two daemons, nor two holders."""
    at = lab.mount("one")
    first = lab.entry(at)
    with open(at / "gone", "wb+", buffering=0) as gone:
        gone.write(b"gone")
        (at / "gone").unlink()
        for number, victims in enumerate(("holder", "pid", "holder", "pid pid", "holder holder", "pid holder")):
            for victim in victims.split():
                entry = replaced(lab, at, victim)
                (at / f"{number}").write_bytes(b"%d" % number)
            assert os.pread(gone.fileno(), 9, 0) == b"gone"
            assert len(holders_and_daemons(entry)) == 2
    assert "holder of" in lab.dmesg() and lab.run("ctl", "verify").returncode == 0
    assert {lab.entry(at).holder, lab.entry(at).pid}.isdisjoint({first.holder, first.pid})
    lab.umount(at)
    until(lambda: not holders_and_daemons(entry))


def replaced(lab: Any, at: Path, victim: str) -> Any:
    """Kill the holder or the daemon, wait until there is another; return the entry of before."""
    until(lambda: lab.status(at).get("holder"))
    entry = lab.entry(at)
    os.kill(getattr(entry, victim), signal.SIGKILL)
    if victim == "holder":
        until(lambda: lab.status(at).get("holder", entry.holder) != entry.holder)
        assert lab.entry(at).pid == entry.pid
    else:
        os.statvfs(at)
        until(lambda: lab.entry(at).pid != entry.pid)
    return entry


def holders_and_daemons(entry: Any) -> list[str]:
    """Processes that have the lock of a tree open."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(fd).startswith(entry.socket.removesuffix("sock") + "lock"):
                found.append(fd.parts[2])
    return found


def test_without_a_holder_status_says_so(lab: Any) -> None:
    """While no other can be started the tree would be lost to its programs with its daemon; the name brings it back."""
    with contextlib.ExitStack() as stack:
        mount = Held(lab, lab.dir("one"), extra="from pkramfs.daemon import holding\nholding.PAUSES = (9.0,)")
        stack.callback(mount.process.kill)
        at, entry = mount.directory, lab.entry(mount.directory)
        assert "survives" in lab.run("ctl", "status").stdout
        os.kill(entry.holder, signal.SIGKILL)
        mount.process.wait(60)
        until(lambda: "holder" not in lab.status(at))
        assert "daemon crash, once it is mounted again" in lab.run("ctl", "status").stdout
        (at / "file").write_bytes(b"x")
        os.sync()
        os.kill(entry.pid, signal.SIGKILL)
        lab.gone(entry)
        lab.mount("one")
        assert (at / "file").read_bytes() == b"x"


def test_a_takeover_that_fails_frees_nothing(lab: Any) -> None:
    """The log is damaged: programs get ENOTCONN. Once it is whole the name can be mounted."""
    mount = Held(lab, lab.dir("one"))
    at = mount.directory
    (at / "file").write_bytes(b"x" * 100_000)
    os.sync()
    entry, before, ram = lab.entry(at), leased(lab), look(lab.machine).ram
    os.kill(entry.holder, signal.SIGSTOP)
    os.kill(entry.pid, signal.SIGKILL)
    ram.page(entry.journal)[200] ^= 1
    os.kill(entry.holder, signal.SIGCONT)
    assert mount.process.wait(60) == 1
    with pytest.raises(OSError, match="not connected"):
        os.listdir(at)
    assert leased(lab) == before
    assert "checksum" in lab.helper(at, "pkram=one").stderr
    assert leased(lab) == before
    ram.page(entry.journal)[200] ^= 1
    lab.mount("one")
    assert (at / "file").read_bytes() == b"x" * 100_000


OLD_KERNEL = """
from pkramfs.fuse import handshake, session, wire
wire.RESEND = wire.RESEND[:4] + (99).to_bytes(4, "little") + wire.RESEND[8:]
session.HAS_RESEND = 0
"""
"""What a kernel before 6.9 does: it knows no such notification, and does not offer it."""


def test_a_kernel_that_cannot_send_again(lab: Any) -> None:
    """Its death ends the mount, in order: programs are told, and the name brings all back. Status says so before."""
    mount = Held(lab, lab.dir("one"), extra=OLD_KERNEL)
    at = mount.directory
    (at / "file").write_bytes(b"x" * 100_000)
    os.sync()
    entry = lab.entry(at)
    said = lab.run("ctl", "status").stdout
    assert "survives" in said and "daemon crash, once it is mounted again" in said and "upgrade" not in said
    assert "Linux is older than 6.9" in lab.run("ctl", "upgrade", "one").stderr
    os.kill(entry.pid, signal.SIGKILL)
    assert mount.process.wait(60) == 1
    with pytest.raises(OSError, match="not connected"):
        os.listdir(at)
    assert "Linux 6.9 can send requests again, this kernel cannot" in lab.dmesg()
    lab.mount("one")
    assert (at / "file").read_bytes() == b"x" * 100_000


@pytest.mark.parametrize("how", ["umount", "lazy", "SIGTERM", "another mount"])
def test_during_a_takeover(lab: Any, how: str) -> None:
    with contextlib.ExitStack() as stack:
        mount = Held(lab, lab.dir("one"), extra=SLOW)
        stack.callback(mount.process.kill)
        at, entry = mount.directory, mount.lab.entry(mount.directory)
        (at / "file").write_bytes(b"x")
        os.sync()
        os.kill(entry.pid, signal.SIGKILL)
        until(Path(f"{mount.orders}.begun").exists)
        if how == "another mount":
            done = lab.helper(lab.dir("two"), "pkram=one")
            assert done.returncode != 0
            assert "one" in done.stderr
            Path(f"{mount.orders}.go").touch()
            assert (at / "file").read_bytes() == b"x"
            assert mount.end() == 0
            return
        if how == "SIGTERM":
            os.kill(mount.process.pid, signal.SIGTERM)
            assert mount.process.wait(60) != 0
            lab.gone(entry)
            lab.mount("one")
            assert (at / "file").read_bytes() == b"x"
            return
        with subprocess.Popen([*(LAZY if how == "lazy" else UMOUNT), str(at)]) as unmounting:
            if how == "lazy":
                assert unmounting.wait(60) == 0
            Path(f"{mount.orders}.go").touch()
            assert unmounting.wait(60) == 0
        assert mount.process.wait(60) == 0
        lab.gone(entry)
        assert not os.path.ismount(at)
        assert leased(lab) == 0


def test_a_preserved_tree_stays_frozen_where_the_kernel_does_not_refuse_changes(lab: Any) -> None:
    """As the mount of an ordinary user, whom fusermount3 makes nothing read-only. Until it is made live again."""
    with held(lab, extra=BY_FUSERMOUNT3) as mount:
        at, entry = mount.directory, mount.lab.entry(mount.directory)
        (at / "file").write_bytes(b"x")
        os.sync()
        assert lab.call(at, "preserve")["frozen"] is True
        for frozen in (True, True, False):
            if not frozen:
                lab.call(at, "unpreserve")
            os.kill(entry.pid, signal.SIGKILL)
            os.statvfs(at)
            until(lambda before=entry.pid: mount.pid != before)
            entry = mount.lab.entry(at)
            status = lab.status(at)
            assert (status["frozen"], status["state"]) == (frozen, "preserved" if frozen else "live")
            if frozen:
                with pytest.raises(OSError, match="Read-only"):
                    (at / "more").mkdir()
        (at / "more").mkdir()


def test_commands_wait_for_the_daemon_that_takes_over(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(lab, extra=SLOW) as mount:
        (mount.directory / "file").write_bytes(b"x")
        os.sync()
        os.kill(mount.pid, signal.SIGKILL)
        until(Path(f"{mount.orders}.begun").exists)
        wait = time.sleep
        monkeypatch.setattr(client.time, "sleep", lambda seconds: Path(f"{mount.orders}.go").touch() or wait(seconds))
        lab.remount(mount.directory, "preserve,ro")
        assert Path(f"{mount.orders}.go").exists()


NO_SHADOW = """
from pkramfs.daemon import shadow
async def never(self):
    pass
shadow.REQUESTS, shadow.Checkpoints._make = 50, never
"""
"""Daemons that die too soon for another process to have made a checkpoint."""


def test_a_log_that_no_checkpoint_has_shortened(lab: Any) -> None:
    """Who takes over makes one itself, or each takeover would take longer than the one before."""
    with held(lab, extra=NO_SHADOW) as mount:
        at = mount.directory
        for number in range(60):
            (at / f"{number}").write_bytes(b"%d" % number)
        assert lab.status(at)["log_requests"] > 100
        kill(mount)
        until(lambda: lab.status(at)["checkpoints"] == 1)
        assert lab.status(at)["log_requests"] < 50
        (at / "more").touch()
        kill(mount)
        assert sorted(os.listdir(at)) == sorted([*map(str, range(60)), "more"])
        assert all((at / f"{number}").read_bytes() == b"%d" % number for number in range(60))
