# SPDX-License-Identifier: GPL-2.0-or-later
"""All mounts at once: what `-e` freezes it can thaw, a silent daemon stops it, and what lives is found."""

import errno
import os

import pytest

from pkramfs.cli import daemons, freezer
from pkramfs.cli.freezer import Freezer
from pkramfs.cli.users import processes, users
from pkramfs.control import commands
from pkramfs.errors import DaemonError
from pkramfs.machine.directory import Machine
from pkramfs.machine.mounts import MountEntry


class Daemon:
    """A mount daemon as far as the control socket shows it."""

    def __init__(self, name, *, preserved=True, frozen=False, silent=False):
        self.name, self.preserved, self.kept, self.silent = name, preserved, frozen, silent
        self.alive, self.deaf, self.heard, self.holders, self.refused = True, False, [], 0, 0
        self.tree_id = 0x1000 + len(name) * 7 + sum(map(ord, name))
        self.entry = MountEntry(self.tree_id, name, f"/nowhere/{name}", 0, {"pkram": name}, None, True, f"{name}.sock")

    @property
    def frozen(self):
        return self.kept or self.holders > 0

    def answer(self, verb):
        self.heard.append(verb)
        if self.silent:
            raise DaemonError("timed out")
        if verb == "stop":
            self.alive = self.deaf
        if verb == "freeze":
            self.holders += 1
        if verb == "stop":
            return {}
        if verb == "freeze":
            return {"preserved": self.preserved}
        state = "preserved" if self.preserved else "live"
        figures = {"files": 3, "dirs": 1, "pages": 1, "bytes": 4096, "refused": self.refused}
        known = {"name": self.name, "mountpoint": self.entry.mountpoint, "pid": 1}
        return {"state": state, "frozen": self.frozen, **figures, **known}


class FakeHeld:
    """A verb that is in force until it is released."""

    def __init__(self, daemon, verb):
        self.daemon, self.answer = daemon, daemon.answer(verb)

    def release(self, timeout):
        self.close()

    def close(self):
        self.daemon.holders -= 1


class FakeMachine(Machine):
    def __init__(self, daemons):
        super().__init__("/nowhere")
        self.daemons = daemons

    def mounts(self):
        return [d.entry for d in self.daemons if d.alive]

    def live_ids(self):
        return {d.tree_id for d in self.daemons if d.alive}


@pytest.fixture
def machine(monkeypatch):
    made = FakeMachine([])

    def find(socket):
        return next(d for d in made.daemons if d.entry.socket == socket)

    monkeypatch.setattr(commands, "call", lambda socket, verb, timeout=None: find(socket).answer(verb))
    monkeypatch.setattr(commands, "Held", lambda socket, verb, undo, timeout: FakeHeld(find(socket), verb))
    return made


def test_looking_freezes_nothing_and_reports_a_silent_daemon(machine):
    machine.daemons = [Daemon("a"), Daemon("b", silent=True), Daemon("c", preserved=False)]
    a, b, c = daemons.look(machine)
    assert (a.report.preserved, a.report.files, a.report.reason) == (True, 3, "")
    assert b.report.preserved is False
    assert "does not answer" in b.report.reason and "/nowhere/b" in b.report.reason
    assert c.report.reason == "not preserved: mount -o remount,preserve,ro /nowhere/c"
    assert not any(d.frozen for d in machine.daemons)


def test_a_mount_without_a_name_cannot_be_preserved(machine):
    daemon = Daemon("x", preserved=False)
    daemon.entry = MountEntry(**{**vars(daemon.entry), "name": None})
    machine.daemons = [daemon]
    assert "without pkram=NAME" in daemons.look(machine)[0].report.reason


def test_thaw_takes_back_what_freeze_did_and_no_more(machine):
    machine.daemons = [Daemon("a", preserved=False), Daemon("b", frozen=True)]
    going = Freezer(machine)
    assert [seen.report.preserved for seen in going.freeze()] == [False, True]
    assert all(d.frozen for d in machine.daemons)
    going.thaw()
    assert [d.frozen for d in machine.daemons] == [False, True]


def test_a_silent_daemon_stops_the_freeze_and_thaws_the_others(machine):
    machine.daemons = [Daemon("a"), Daemon("b", silent=True)]
    with pytest.raises(DaemonError, match=r"/nowhere/b.*pid.*--force"):
        Freezer(machine).freeze()
    assert not machine.daemons[0].frozen


def test_forced_a_silent_daemon_is_a_warning(machine):
    machine.daemons = [Daemon("a"), Daemon("b", silent=True)]
    said = []
    seen = Freezer(machine, force=True, warn=said.append).freeze()
    assert [s.report.preserved for s in seen] == [True, False]
    assert "does not answer" in said[0]


def failing(monkeypatch, error):
    def sync(entry, _):
        raise error

    monkeypatch.setattr(freezer, "_sync", sync)


def test_what_the_kernel_could_not_write_back_stops_the_freeze(machine, monkeypatch):
    machine.daemons = [Daemon("good"), Daemon("odd")]
    failing(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(DaemonError, match="data that were written may be lost: the kernel could not write back: Input"):
        Freezer(machine).freeze()
    assert not any(d.frozen for d in machine.daemons)
    said = []
    assert len(Freezer(machine, force=True, warn=said.append).freeze()) == 2
    assert [line.partition(": ")[0] for line in said] == ["/nowhere/good", "/nowhere/odd"]


def test_an_error_that_the_daemon_caused_is_its_own_to_tell(machine, monkeypatch):
    machine.daemons = [Daemon("full")]
    machine.daemons[0].refused = 3
    failing(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert [seen.report.preserved for seen in Freezer(machine).freeze()] == [True]


def test_stop_waits_until_all_are_gone(machine):
    machine.daemons = [Daemon("a"), Daemon("b")]
    going = Freezer(machine)
    going.stop()
    assert machine.live_ids() == set()
    assert going.stopped


def test_stop_names_a_daemon_that_stays(machine, monkeypatch):
    monkeypatch.setattr(freezer, "STOP_SECONDS", 0.05)
    daemon = Daemon("a")
    daemon.deaf = True
    machine.daemons = [daemon]
    with pytest.raises(DaemonError, match=r"/nowhere/a .* does not end"):
        Freezer(machine).stop()


def test_a_lock_without_an_entry_is_an_error(machine, monkeypatch):
    monkeypatch.setattr(daemons, "_ENTRY_SECONDS", 0.0)
    daemon = Daemon("a")
    machine.daemons = [daemon]
    machine.mounts = list
    with pytest.raises(DaemonError, match="1 process holds a tree without an entry"):
        daemons.alive(machine)


def test_a_lock_without_an_entry_for_a_moment_is_a_mount_that_begins_or_ends(machine, monkeypatch):
    """Nor does one matter that begins between two looks."""
    machine.daemons = [Daemon("a")]
    entries = [[], list(machine.mounts())]
    begins_id = entries[1][0].tree_id
    locks = [{begins_id, 2}, {begins_id, 2}, {begins_id, 3}]
    monkeypatch.setattr(machine, "live_ids", lambda: locks.pop(0))
    monkeypatch.setattr(machine, "mounts", lambda: entries.pop(0))
    waited = []
    monkeypatch.setattr(daemons.time, "sleep", waited.append)
    assert [entry.tree_id for entry in daemons.alive(machine)] == [begins_id]
    assert (len(waited), locks, entries) == (1, [], [])


def test_kill_never_touches_a_process_that_is_no_daemon(machine, monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    for pid in (0, -1, 1, 1 << 30):
        daemons.kill(MountEntry(**{**vars(Daemon("a").entry), "pid": pid}))
    assert killed == []


def test_users_of_a_directory_are_found_without_touching_it(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    child = os.fork()
    if child == 0:
        os.chdir(inside)
        os.kill(os.getpid(), 19)  # wait here, stopped, until killed
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        assert [user.pid for user in users(str(tmp_path), processes())] == [child]
        assert users(str(tmp_path) + "x", processes()) == []
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_waiting_for_many_looks_at_their_locks_once_a_round(machine, monkeypatch):
    machine.daemons = [Daemon(f"daemon{number}" * number) for number in range(1, 30)]
    looked = []
    live_ids = machine.live_ids
    monkeypatch.setattr(machine, "live_ids", lambda: looked.append(1) or live_ids())
    Freezer(machine).stop()
    assert len(looked) <= 3


def test_a_mount_that_was_moved_is_where_the_table_has_it(machine, monkeypatch):
    from pkramfs.mounting import syscalls

    entry = Daemon("a").entry
    at = MountEntry(**{**vars(entry), "dev": 40, "mountpoint": "/old"})
    table = [syscalls.Mounted(40, "/b", "x", 0, root="/sub"), syscalls.Mounted(40, "/new", "x", 0)]
    monkeypatch.setattr(syscalls, "mounts", lambda: table)
    assert [one.mountpoint for one in daemons.located([at, entry])] == ["/new", "/nowhere/a"]
    monkeypatch.setattr(syscalls, "mounts", lambda: [*table, syscalls.Mounted(40, "/old", "x", 0)])
    assert [one.mountpoint for one in daemons.located([at])] == ["/old"]
    monkeypatch.setattr(syscalls, "mounts", list)
    assert [one.mountpoint for one in daemons.located([at])] == ["/old"]
