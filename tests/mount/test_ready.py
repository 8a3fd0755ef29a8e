# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons that are started ahead of need: they know and touch nothing before they are told to mount."""

import os
from pathlib import Path
from typing import Any

import pytest

from pkramfs.daemon import serving
from pkramfs.mounting.helper import MountError
from pkramfs.mounting.starting import PrestartedDaemons, Starting

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


def test_daemons_are_taken_or_given_up(lab: Any) -> None:
    """As many as there are CPUs are started, one of them is used, the last one only when it is taken."""
    cpus = len(os.sched_getaffinity(0))
    names = [f"mount{number}" for number in range(cpus + 1)]
    places: list[dict[str, Any]] = [
        {"name": name, "mountpoint": str(lab.dir(name)), "options": {"pkram": name, "rw": True}} for name in names
    ]
    with PrestartedDaemons() as ready:
        ready.start(places)
        started = list(ready._started.values())
        assert len(started) == cpus
        ready.take(places[0]).serve()
        ready.take(places[-1]).serve()
    assert [one._daemon.returncode for one in started] == [0] * cpus
    served = {entry.mountpoint for entry in lab.machine.mounts() if entry.alive}
    assert served == {places[0]["mountpoint"], places[-1]["mountpoint"]}
    assert all(Path(place).is_mount() for place in served)
