# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGINT, SIGTERM and SIGHUP: what was begun is taken back, and where that is too late they wait."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from pkramfs.cli import signals
from pkramfs.cli.arguments import Parser, run
from pkramfs.control.client import call
from tests.support.waiting import until

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def heeded():
    """What the suite's own shell ignores, as one does for what runs in its background, a user's does not."""
    ignored = [number for number in NUMBERS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_an_exception_and_a_status(number):
    undone = []

    def act(_):
        try:
            send(number)
        finally:
            undone.append(number)
            send(number)  # the second one does not interrupt the undoing
            undone.append("all of it")

    before = signal.getsignal(number)
    assert run(Parser(prog="x"), act, []) == 128 + number
    assert undone == [number, "all of it"]
    assert signal.getsignal(number) == before


def test_a_command_that_begins_is_ended_without_a_word():
    """Before it hears signals, and when code in C makes another error of one."""
    began = "m.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)"
    line = f"import os, signal, pkramfs.__main__ as m; {began}; m.pkramctl()"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_an_error_that_a_signal_makes_is_the_signal(capsys):
    def act(_):
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("a long text that tells how to install numpy") from None

    assert run(Parser(prog="x"), act, []) == 128 + signal.SIGTERM
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_waits_for_what_must_not_be_interrupted(number):
    done = []

    def act(_):
        with signals.Deferral() as waiting:
            done.append("before")
            waiting.begin()
            send(number)
            with signals.deferred():
                send(number)
            done.append("the block")
        done.append("never")

    assert run(Parser(prog="x"), act, []) == 128 + number
    assert done == ["before", "the block"]


def test_an_error_in_the_block_is_not_hidden(capsys):
    def act(_):
        with signals.deferred():
            send(signal.SIGTERM)
            raise FileNotFoundError(2, "No such file", "/x")

    assert run(Parser(prog="x"), act, []) == 1
    assert capsys.readouterr().err == "x: /x: No such file\n"
    assert run(Parser(prog="x"), lambda _: 0, []) == 0, "what came then is over"


def test_a_signal_that_was_ignored_stays_ignored():
    program = "from pkramfs.cli.arguments import *; import signal\n"
    program += "act = lambda _: os.kill(os.getpid(), signal.SIGHUP)\nsys.exit(run(Parser(prog='x'), act, []))"
    done = subprocess.run(["nohup", sys.executable, "-c", program], stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0


# -- with real mounts --------------------------------------------------------------------------------

mounted = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened")


def entry_of(machine, directory):
    return next(e for e in machine.mounts() if e.mountpoint == directory and e.alive)


def restored(mount, machine, directory, name):
    """A tree that was preserved and mounted again: preserved, and writable until somebody freezes it."""
    mount(directory, f"pkram={name}")
    with open(f"{directory}/file", "w") as file:
        file.write(name)
    mount(directory, "remount,preserve,ro")
    entry = entry_of(machine, directory)
    subprocess.run([*(["fusermount3", "-u"] if os.geteuid() else ["umount"]), directory], check=True)
    until(lambda: entry.tree_id not in machine.live_ids())
    mount(directory, f"pkram={name}")


@mounted
@pytest.mark.mount
@pytest.mark.few(1, each="how")
@pytest.mark.parametrize(
    ("how", "number"), [("killed", signal.SIGKILL), *(("asked", number) for number in NUMBERS)], ids=str
)
def test_whoever_ends_between_freezing_and_stopping_leaves_nothing_frozen(machine, place, mount, kexec, how, number):
    one, two = sorted([place(), place()])
    restored(mount, machine, one, "one")
    restored(mount, machine, two, "two")
    assert kexec("-l", "builtin:2M", "--reuse-cmdline")[0] == 0
    first, second = entry_of(machine, one), entry_of(machine, two)
    os.kill(second.pid, signal.SIGSTOP)  # -e asks it after it has frozen the first
    try:
        command = subprocess.Popen([sys.executable, "-m", "pkramfs", "kexec", "-e"])
        until(lambda: call(first.socket, "status")["frozen"], "-e freezes nothing")
        command.send_signal(number)
        status = command.wait(60)
    finally:
        os.kill(second.pid, signal.SIGCONT)
    assert status == (-number if how == "killed" else 128 + number)
    until(lambda: not call(first.socket, "status")["frozen"], "it stays frozen")
    for directory in (one, two):
        with open(f"{directory}/file", "a") as file:
            file.write("still writable")


@mounted
@pytest.mark.mount
@pytest.mark.few(1, each="more")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: signal.Signals(n).name)
@pytest.mark.parametrize("more", [[], ["--no-remount"]], ids=["remount", "no-remount"])
def test_a_signal_before_the_point_of_no_return_mounts_again(
    machine, place, mount, kexec, ctl, monkeypatch, number, more
):
    from pkramfs.kernel import transition as planner

    mnt = place()
    restored(mount, machine, mnt, "one")
    monkeypatch.setattr(planner.DecideBoot, "execute", lambda _: send(number))
    assert kexec("-le", "builtin:2M", "--reuse-cmdline", *more)[0] == 128 + number
    found = json.loads(ctl("--json", "status")[1])
    assert [(m["mountpoint"], m["state"], m["frozen"]) for m in found["mounts"]] == [(mnt, "preserved", False)]
    assert (found["kernel"]["generation"], found["next"]["pending"], found["next"]["remount"]) == (1, None, [])
    with open(f"{mnt}/file") as file:
        assert file.read() == "one"


@mounted
@pytest.mark.mount
@pytest.mark.few(1)
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: signal.Signals(n).name)
def test_a_signal_past_the_point_of_no_return_waits(machine, place, mount, kexec, ctl, monkeypatch, number):
    from pkramfs.kernel import succession

    mnt = place()
    restored(mount, machine, mnt, "one")
    start_boot = succession.start_boot

    def boot(*args, **words):
        send(number)
        start_boot(*args, **words)

    monkeypatch.setattr(succession, "start_boot", boot)
    status, out, _ = kexec("-le", "builtin:2M", "--reuse-cmdline")
    assert status == 128 + number
    assert f"mounted again: {mnt}" in out
    found = json.loads(ctl("--json", "status")[1])
    assert (found["kernel"]["generation"], found["next"]["remount"]) == (2, [])
    with open(f"{mnt}/file") as file:
        assert file.read() == "one"


@mounted
@pytest.mark.mount
def test_who_is_killed_after_stopping_has_noted_what_to_mount_again(machine, place, mount, kexec, ctl):
    mnt = place()
    restored(mount, machine, mnt, "one")
    program = (
        "import os\nfrom pkramfs.kernel import transition as planner\nfrom pkramfs.cli.kexec import main\n"
        "planner.LastLook.execute = lambda _: os.kill(os.getpid(), 9)\n"
        "main(['-le', 'builtin:2M', '--reuse-cmdline'])"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert machine.live_ids() == set()
    assert f"{mnt} waits to be mounted again: pkram-kexec --resume" in ctl("status")[1]
    assert kexec("--resume")[0] == 0
    found = json.loads(ctl("--json", "status")[1])
    assert (found["mounts"][0]["mountpoint"], found["mounts"][0]["state"]) == (mnt, "preserved")
    assert found["next"]["remount"] == []


@mounted
@pytest.mark.mount
def test_a_kexec_mounts_again_what_another_one_stopped(machine, place, mount, kexec, ctl):
    mnt = place()
    restored(mount, machine, mnt, "one")
    killed = (
        "import os\nfrom pkramfs.kernel import transition as planner\nfrom pkramfs.cli.kexec import main\n"
        "planner.LastLook.execute = lambda _: os.kill(os.getpid(), 9)\n"
        "main(['-le', 'builtin:2M', '--reuse-cmdline'])"
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert f"mount one again on {mnt}" in kexec("-e", "-n")[1]
    status, out, _ = kexec("-e")
    assert status == 0
    assert f"mounted again: {mnt}" in out
    found = json.loads(ctl("--json", "status")[1])
    assert [(one["mountpoint"], one["state"]) for one in found["mounts"]] == [(mnt, "preserved")]
    assert found["next"]["remount"] == []


@mounted
@pytest.mark.mount
def test_nothing_waits_after_a_failure_that_was_undone(machine, place, mount, kexec, ctl, monkeypatch):
    from pkramfs.kernel import nvram
    from pkramfs.kernel import transition as planner

    mnt = place()
    restored(mount, machine, mnt, "one")

    def refused(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(planner.PointOfNoReturn, "execute", refused)
    assert kexec("-le", "builtin:2M", "--reuse-cmdline")[0] != 0
    found = json.loads(ctl("--json", "status")[1])
    assert [(one["mountpoint"], one["state"]) for one in found["mounts"]] == [(mnt, "preserved")]
    assert found["next"]["remount"] == []
    assert nvram.mounts(machine) == []


def test_a_boot_does_not_hear_signals(root, ctl):
    """It runs past the point of no return; whoever ends its whole group must not end it."""
    program = (
        "import os, signal, sys\nfrom pkramfs.kernel import boot as chapter\nfrom pkramfs.cli import boot\n"
        "step, *rest = chapter.STEPS\n"
        "def first(started):\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n        os.kill(os.getpid(), number)\n"
        "    step(started)\n"
        "first.__name__ = step.__name__\nchapter.STEPS = (first, *rest)\n"
        "sys.exit(boot.main([sys.argv[1], '--parent', str(os.getppid())]))"
    )
    assert ctl("machine", "create", "--ram", "256M", "--seed", "5")[0] == 0
    from pkramfs.kernel import succession
    from pkramfs.machine.directory import Machine

    machine = Machine.locate()
    succession.decide_cold(machine)
    assert subprocess.run([sys.executable, "-c", program, machine.path()], check=False).returncode == 0
    assert machine.read_text("kernel.json") is not None


@mounted
@pytest.mark.mount
@pytest.mark.few(1, each="when")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: signal.Signals(n).name)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_preserve_that_is_ended_is_taken_back(machine, place, mount, monkeypatch, number, when):
    from pkramfs.cli import mount as helper
    from pkramfs.control import commands

    mnt = place()
    mount(mnt, "pkram=one")
    ask = commands.call_long

    def interrupted(socket, verb, **words):
        if verb == "preserve" and when == "before":
            send(number)
        answer = ask(socket, verb, **words)
        if verb == "preserve":
            send(number)
        return answer

    monkeypatch.setattr(commands, "call_long", interrupted)
    assert helper.main(["none", mnt, "-o", "remount,preserve,ro"]) == 128 + number
    with open(f"{mnt}/file", "w") as file:
        file.write("writable")
    assert call(entry_of(machine, mnt).socket, "status")["state"] == "live"
