# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl upgrade: another daemon serves, and what was open stays open."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import pkramfs
from pkramfs.control.commands import Commands
from pkramfs.errors import DaemonError
from pkramfs.machine import process
from tests.support.mortal import Held, held
from tests.support.waiting import until

pytestmark = pytest.mark.mount


def test_a_mount_in_use_gets_another_daemon(lab: Any) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    before = lab.entry(mnt)
    with open(mnt / "file") as held, open(mnt / "gone", "w+") as gone:
        gone.write("still")
        gone.flush()
        os.unlink(mnt / "gone")
        done = lab.run("ctl", "--json", "upgrade", "one")
        assert done.returncode == 0, done.stderr
        (one,) = json.loads(done.stdout)
        after = lab.entry(mnt)
        assert (one["before"], one["pid"]) == (before.pid, after.pid) and before.pid != after.pid
        assert (after.holder, after.tree_id) == (before.holder, before.tree_id)
        gone.seek(0)
        assert (held.read(), gone.read()) == ("x", "still")
    assert "survives" in lab.run("ctl", "status").stdout and "1 takeover" in lab.run("ctl", "status").stdout
    lab.remount(mnt, "preserve,ro")
    assert lab.run("ctl", "upgrade", "--all").returncode == 0
    assert (lab.status(mnt)["state"], lab.status(mnt)["frozen"]) == ("preserved", True)
    lab.remount(mnt, "rw")
    (mnt / "more").write_text("y")
    lab.umount(mnt)


def ask(socket: str) -> None:
    """Ask a daemon for the upgrade that it will not live to see."""
    with pytest.raises(DaemonError):
        Commands(socket).upgrade()


def test_a_daemon_that_dies_while_its_holder_becomes_the_new_code(lab: Any) -> None:
    """The new code finds it dead, knows of what it died, and starts another; nothing was asked for twice."""
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    before = lab.entry(mnt)
    os.kill(before.holder, signal.SIGSTOP)
    asking = threading.Thread(target=ask, args=[before.socket])
    asking.start()
    until(lambda: "is to become the code on disk" in lab.run("ctl", "dmesg").stdout)
    Commands(before.socket).status()  # and so the holder was told
    os.kill(before.pid, signal.SIGKILL)
    os.kill(before.holder, signal.SIGCONT)
    asking.join()
    (mnt / "new").touch()
    deadline = time.monotonic() + 60
    while (after := lab.entry(mnt)).pid == before.pid:
        assert time.monotonic() < deadline, "the next daemon does not write its entry"
        time.sleep(0.01)
    assert after.holder == before.holder and b"hold" in Path(f"/proc/{after.holder}/cmdline").read_bytes()
    assert "was killed by signal 9, another takes over" in lab.run("ctl", "dmesg").stdout
    assert lab.run("ctl", "upgrade", "one").returncode == 0
    (mnt / "more").write_text("y")
    until(lambda: process.children(after.holder) == [lab.entry(mnt).pid])
    lab.umount(mnt)


def broken(place: Path, module: str, function: str) -> dict[str, str]:
    """The environment in which the code on disk is a copy of ours, in which a function fails."""
    shutil.copytree(Path(pkramfs.__file__).parent, place / "pkramfs")  # ours, wherever it was installed
    with open(place / "pkramfs" / f"{module}.py", "a") as file:
        file.write(f"\n\ndef {function}(*_: object, **__: object) -> None:\n    raise RuntimeError('it is broken')\n")
    return {"PYTHONPATH": str(place)}


@pytest.mark.parametrize("module", ["fs/recover", "daemon/handover"])
def test_code_that_cannot_take_over_is_not_put_under_a_mount(lab: Any, tmp_path: Path, module: str) -> None:
    mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    before, broke = lab.entry(mnt), broken(tmp_path, module, "rebuild")
    if module == "daemon/handover":
        (tmp_path / "pkramfs" / "daemon" / "handover.py").write_text("import nothing_that_is_there\n")
    words = [sys.executable, "-P", "-m", "pkramfs", "ctl", "upgrade", "one"]
    done = subprocess.run(words, env=lab.environment | broke, capture_output=True, text=True, check=False)
    assert done.returncode in (7, 8) and done.stderr.count("\n") == 1, done.stderr
    assert "the code on disk cannot" in done.stderr and "nothing was changed" in done.stderr
    assert (lab.entry(mnt).pid, lab.entry(mnt).holder) == (before.pid, before.holder)
    (mnt / "more").write_text("y")
    lab.umount(mnt)


def test_a_holder_that_does_not_become_the_code_on_disk(lab: Any, tmp_path: Path) -> None:
    """Its daemon notices at once that it has ended, goes on, and starts another holder."""
    broke = lab.environment | broken(tmp_path, "daemon/holder", "again")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lab), "environment", property(lambda _: broke))
        mnt = lab.mount("one")
    (mnt / "file").write_text("x")
    before = lab.entry(mnt)
    done = lab.run("ctl", "upgrade", "one")
    said = f"the holder of one does not become the code on disk: daemon {before.pid} goes on"
    assert (done.returncode, done.stderr) == (7, f"pkramctl: {said}\n")
    assert said in lab.run("ctl", "dmesg").stdout
    until(lambda: (now := lab.entry(mnt)).pid == before.pid and now.holder not in (None, before.holder))
    os.kill(before.pid, signal.SIGKILL)
    (mnt / "more").write_text("y")
    lab.umount(mnt)


def test_who_has_no_holder_is_refused(lab: Any) -> None:
    mnt = lab.mount("plain", "mode=755")
    done = lab.run("ctl", "upgrade", str(mnt))
    assert done.returncode != 0 and "has no holder" in done.stderr and done.stderr.count("\n") == 1
    assert lab.run("ctl", "upgrade", "nothing").returncode == 8
    assert lab.run("ctl", "upgrade").returncode == 2


FAILS = {
    "in recovery": (
        "fs/recover",
        "def recover(*_, **__):\n    raise RuntimeError('it is broken')\n",
        "ended with status 1",
    ),
    "in its first request": ("fuse/filter", "Filter.serve = lambda *_: os._exit(3)\n", "ended with status 3"),
    "when it has served for a while": (
        "daemon/trial",
        "async def prove(*_):\n    await trio.sleep(0.2)\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
        "was killed by signal 11",
    ),
    "for ever": ("fs/recover", "def recover(*_, **__):\n    while True:\n        pass\n", "did not serve within 1 s"),
}
"""Code that takes over and fails then: the module with the fault, the fault, and what is said of it."""
DEFAULT = ("in its first request",)


def new_code(place: Path, module: str = "", fault: str = "") -> None:
    """Make the code on disk a copy of ours, with a fault or without."""
    ours = Path(pkramfs.__file__).parent  # wherever it was installed
    shutil.copytree(ours, place / "pkramfs", dirs_exist_ok=True)
    if module:
        with open(place / "pkramfs" / f"{module}.py", "a") as file:
            file.write(f"\n\n{fault}")


def test_code_that_fails_once_it_has_taken_over(lab: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The code before goes on, programs keep what they have, and another attempt is possible."""
    extra = f"os.environ['PYTHONPATH'] = {str(tmp_path)!r}\nfrom pkramfs.daemon import trial\ntrial.LEAST_SECONDS = 1\n"
    chosen = FAILS if request.config.getoption("--long") else {when: FAILS[when] for when in DEFAULT}
    mount = Held(lab, lab.dir("one"), extra)
    with open(mount.directory / "gone", "w+") as gone:
        gone.write("still")
        gone.flush()
        os.unlink(mount.directory / "gone")
        for when, (module, fault, said) in chosen.items():
            new_code(tmp_path, module, fault)
            before = mount.pid
            done = lab.run("ctl", "upgrade", "one")
            why = said if "within" in said else f"{said} before it had served"
            told = f"the code on disk failed under {mount.directory} (its daemon {why}): daemon "
            assert (done.returncode, done.stderr.count("\n")) == (7, 1) and told in done.stderr, (when, done)
            assert done.stderr.endswith(f" {mount.pid} of the code before goes on\n") and mount.pid != before
            assert f"the code on disk has failed under one (its daemon {why})" in lab.dmesg(), when
            assert f"new code failed (its daemon {why}), the code before serves" in lab.run("ctl", "status").stdout
            (mount.directory / when).touch()
        assert process.children(lab.entry(mount.directory).holder) == [mount.pid], "nobody else is left"
        new_code(tmp_path)
        assert lab.run("ctl", "upgrade", "one").returncode == 0
        until(lambda: "has served under one: the code before it ends" in lab.dmesg())
        assert "upgrade   " not in lab.run("ctl", "status").stdout
        gone.seek(0)
        assert gone.read() == "still" and sorted(os.listdir(mount.directory)) == sorted(chosen)
    lab.umount(mount.directory)
    assert mount.process.wait(60) == -signal.SIGKILL, "the first holder had become the new code, and was ended"
    for log in lab.files.glob("mounts/*.log"):
        log.unlink()  # nobody need look for the tracebacks of our faults


NEWER = """
import os
import pkramfs.journal.layout as layout
layout.VERSION = 3
def recover(*args, work=recover, **named):
    tree = yield from work(*args, **named)
    layout.renew(args[2], args[1])
    if not os.path.exists(FLAG):
        open(FLAG, "w").close()
        os._exit(3)
    return tree
"""


def test_a_log_that_the_code_before_cannot_read(lab: Any, tmp_path: Path) -> None:
    """There is no way back; nothing is touched, and the new code goes on."""
    with held(lab, extra=f"os.environ['PYTHONPATH'] = {str(tmp_path)!r}\n") as mount:
        (mount.directory / "file").write_text("x")
        new_code(
            tmp_path,
            "fs/recover",
            NEWER.replace("FLAG", repr(str(tmp_path / "flag"))).replace("\n", "\nimport os\n", 1),
        )
        before = lab.entry(mount.directory)
        assert lab.run("ctl", "upgrade", "one").returncode == 0
        said = lab.dmesg()
        assert "no way back to the code before under one: Live" in said and "version is 3, expected at most 2" in said
        assert "the daemon of one ended with status 3, another takes over" in said
        assert (mount.directory / "file").read_text() == "x"
        assert lab.entry(mount.directory).holder == before.holder
