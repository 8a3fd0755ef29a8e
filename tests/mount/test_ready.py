# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons that are started ahead of need: they know and touch nothing before they are told to mount."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pkramfs.daemon import serving
from pkramfs.mounting.forks import Forks
from pkramfs.mounting.helper import MountError
from pkramfs.mounting.starting import Answer, Expected, Starting

pytestmark = pytest.mark.mount


def test_a_daemon_that_is_given_up_leaves_nothing(lab: Any) -> None:
    starting = Starting(str(lab.dir("one")), "pkram=one")
    starting.give_up()
    assert starting._daemon.returncode == 0
    assert not lab.machine.exists()


def test_a_daemon_whose_starter_is_gone_ends(lab: Any) -> None:
    """All that is left of the starter is the end of its pipe."""
    told, go = os.pipe()
    os.close(go)
    answer, theirs = os.pipe()
    assert serving.main([str(theirs), str(lab.dir("one")), "pkram=one", str(told)]) == 0
    os.close(theirs)
    assert os.read(answer, 1) == b""
    os.close(answer)
    assert not lab.machine.exists()


def test_a_daemon_that_died_before_it_was_told_is_an_error(lab: Any) -> None:
    starting = Starting(str(lab.dir("one")), "pkram=one")
    starting._daemon.kill()
    starting._daemon.wait()
    with pytest.raises(MountError, match="died with status -9 before it served"):
        starting.serve()


def places(lab: Any, *names: str) -> list[dict[str, Any]]:
    """Entries of nvram.json's list."""
    return [{"name": name, "mountpoint": str(lab.dir(name)), "options": {"pkram": name, "rw": True}} for name in names]


def test_one_process_forks_mounts(lab: Any) -> None:
    """Each is a mount as any other, with a session of its own, and outlives that process; who is refused says why."""
    mounts = places(lab, "one", "two", "bad")
    mounts[2]["options"] |= {"size": "1", "nr_inodes": "-7"}
    with Forks() as forks:
        forks.begin(mounts)
        assert forks.serve(mounts[0]) == forks.serve(mounts[1]) == ""
        with pytest.raises(MountError, match="nr_inodes"):
            forks.serve(mounts[2])
        with pytest.raises(MountError, match="another tree has that name"):
            forks.serve(places(lab, "other")[0], Expected(tree=17))
        entries = {entry.mountpoint: entry for entry in lab.machine.mounts() if entry.alive}
    assert set(entries) == {mount["mountpoint"] for mount in mounts[:2]}
    assert all(Path(place).is_mount() and Path(place, "file").write_bytes(b"x") for place in entries)
    assert len({os.getsid(entry.holder) for entry in entries.values()}) == 2
    for entry in entries.values():
        words = Path(f"/proc/{entry.holder}/stat").read_text().rpartition(")")[2].split()
        assert int(words[1]) != os.getpid()
        os.kill(entry.pid, signal.SIGKILL)
        assert Path(entry.mountpoint, "file").read_bytes() == b"x"


def test_without_that_process_mounts_are_started_one_by_one(lab: Any) -> None:
    (mount,) = places(lab, "one")
    with Forks() as forks:
        forks.begin([mount])
        assert forks._process is not None
        forks._process.kill()
        forks._process.wait()
        assert forks.serve(mount) == ""
    assert Path(mount["mountpoint"]).is_mount()


def test_a_forked_daemon_that_dies_before_it_serves_is_an_error(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (mount,) = places(lab, "one")
    said = Answer.wait
    monkeypatch.setattr(Answer, "wait", lambda self: (os.kill(self.pid, signal.SIGKILL), said(self))[1])
    with Forks() as forks:
        forks.begin([mount])
        with pytest.raises(MountError, match="died before it served"):
            forks.serve(mount)


def test_nothing_to_mount_starts_nothing() -> None:
    with Forks() as forks:
        forks.begin([])
        assert forks._process is None
