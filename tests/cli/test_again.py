# SPDX-License-Identifier: GPL-2.0-or-later
"""What is mounted again: planned from a mount table, done in an order, several at once."""

import os
import threading
import types

import pytest

from pkramfs.cli import again
from pkramfs.cli.daemons import Seen
from pkramfs.control.replies import Status, read
from pkramfs.errors import MachineError
from pkramfs.machine.mounts import MountEntry
from pkramfs.mounting import options as o
from pkramfs.mounting import syscalls
from pkramfs.mounting.forks import Forks
from pkramfs.mounting.syscalls import FSTYPE, Mounted

ROOT = Mounted(1, "/", "ext4", 0, id=1)


def tree(name, dev, at=None, *, preserved=True, options=None, on=None):
    """A daemon that has answered, or (preserved is None) has not."""
    entry = MountEntry(dev, name, at or f"/{name}", 0, options or {"pkram": name}, dev, True, "", on)
    said = {
        "name": name,
        "mountpoint": entry.mountpoint,
        "state": "preserved" if preserved else "live",
        "frozen": False,
    }
    figures = {"files": 0, "dirs": 0, "pages": 0, "bytes": 0, "pid": 1}
    return Seen(entry, None if preserved is None else read(Status, said | figures), "")


def at(number, parent, place, dev, flags=o.MS_RELATIME, own=None, **more):
    own = flags if own is None else own
    return Mounted(dev, place, more.pop("fstype", FSTYPE), flags | own, own, number, parent, **more)


@pytest.fixture
def plan(monkeypatch):
    """Plan with a mount table, by somebody who may not look below mounts."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(again, "namespaces", lambda: iter(()))
    monkeypatch.setattr("pkramfs.mounting.binds.covered", lambda one, table: None)

    def made(seen, *table):
        monkeypatch.setattr(syscalls, "mounts", lambda pid=None: [ROOT, *table])
        return again.plan(seen)

    return made


def test_flags_and_places_are_those_of_the_table(plan):
    one = tree("one", 40, "/old", options={"pkram": "one", "size": "1G", "suid": True, "noatime": True}, on=(7, 8))
    found = plan(
        [one],
        at(10, 1, "/new", 40, o.MS_RELATIME | o.MS_NOSUID | o.MS_NOEXEC),
        at(11, 1, "/b", 40, o.MS_RELATIME, o.MS_RELATIME | o.MS_RDONLY, root="/sub"),
    )
    (mount,) = found.mounts
    assert mount["mountpoint"] == "/new"
    assert mount["options"] == {"pkram": "one", "size": "1G", "nosuid": True, "noexec": True}
    assert mount["tree"] == f"{40:016x}"
    assert mount["on"] == {}, "what was noted is of another place"
    (bind,) = mount["binds"]
    assert (bind["mountpoint"], bind["root"], bind["options"]) == ("/b", "/sub", ["ro"])
    assert found.notes == []


def test_the_directory_that_was_noted_is_expected_where_nobody_may_look_now(plan):
    found = plan([tree("one", 40, "/m", on=(7, 8))], at(10, 1, "/m", 40))
    assert found.mounts[0]["on"] == {"dev": 7, "ino": 8}


def test_what_lies_on_a_tree_names_the_tree(plan):
    found = plan([tree("two", 41, "/m/x"), tree("one", 40, "/m")], at(11, 10, "/m/x", 41), at(10, 1, "/m", 40))
    assert [mount["name"] for mount in found.mounts] == ["one", "two"]
    assert found.mounts[1]["on"] == {"tree": f"{40:016x}"}


def test_a_stack_is_mounted_from_below_whatever_the_table_says(plan):
    found = plan(
        [tree("a", 40, "/m"), tree("b", 41, "/m"), tree("c", 42, "/m")],
        at(12, 11, "/m", 40),
        at(11, 10, "/m", 41),
        at(10, 1, "/m", 42),
    )
    assert [mount["name"] for mount in found.mounts] == ["c", "b", "a"]


def test_a_bind_mount_comes_after_its_tree_though_it_lies_higher(plan):
    found = plan(
        [tree("one", 40, "/m"), tree("two", 41, "/m/x"), tree("three", 42, "/b/y")],
        at(10, 1, "/m", 40),
        at(11, 10, "/m/x", 41),
        at(12, 1, "/b", 41),
        at(13, 12, "/b/y", 42),
    )
    steps = again._steps(found.mounts)
    assert [step.place for step in steps] == ["/m", "/m/x", "/b", "/b/y"]
    assert [again._needs(step, steps[:number]) for number, step in enumerate(steps)] == [[], [0], [1], [2]]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "one: it was unmounted from /one and is still in use, so it is not mounted again; it stays preserved"),
        ([at(10, 1, "/b", 40, root="/sub")], "one: only /sub of it is mounted, on /b, so it is not mounted again"),
        (
            [at(10, 1, "/one", 40), at(11, 10, "/one", 50, fstype="tmpfs")],
            "one: /one is covered by another mount (tmpfs)",
        ),
        ([at(10, 1, "/a/one", 40), at(11, 1, "/a", 50, fstype="xfs")], "one: /a/one is hidden by a mount on /a (xfs)"),
        ([at(10, 1, "/l", 41), at(11, 10, "/l/one", 40)], "one: it lies in /l, which is not mounted again"),
        (
            [at(10, 1, "/k", 42), at(11, 10, "/k/t", 50, fstype="tmpfs"), at(12, 11, "/k/t/one", 40)],
            "one: it lies on /k/t (tmpfs), which is mounted inside a tree; it stays preserved",
        ),
        (
            [at(10, 11, "/b/in", 40), at(11, 1, "/b", 40, root="/part")],
            "one: /b/in lies on a bind mount of itself; it stays preserved",
        ),
    ],
    ids=["unmounted", "part", "covered", "hidden", "in-a-live-one", "on-a-foreign-one", "on-itself"],
)
def test_what_is_not_reached_by_its_path_stays_preserved(plan, table, said):
    found = plan([tree("one", 40), tree("live", 41, preserved=False), tree("kept", 42)], *table)
    assert "one" not in [mount["name"] for mount in found.mounts]
    assert any(note.startswith(said) for note in found.notes), found.notes


def test_what_is_preserved_and_covered_by_a_tree_comes_back_below_it(plan):
    found = plan([tree("one", 40), tree("two", 41, "/one")], at(10, 1, "/one", 40), at(11, 10, "/one", 41))
    assert [mount["name"] for mount in found.mounts] == ["one", "two"]
    assert found.notes == []


def test_other_namespaces_are_named_unless_they_follow_ours(plan, monkeypatch):
    copies = [
        (5, [at(90, 1, "/one", 40, groups=frozenset([b"7"]))]),
        *((pid, [at(90, 1, "/data", 40)]) for pid in (6, 7, 8, 9)),
    ]
    monkeypatch.setattr(again, "namespaces", lambda: iter(copies))
    found = plan([tree("one", 40)], at(10, 1, "/one", 40, groups=frozenset([b"7"])))
    assert found.notes == [
        "one is mounted in other mount namespaces, too, and not mounted again there: "
        "on /data in that of pid 6, on /data in that of pid 7, on /data in that of pid 8 and 1 more"
    ]


def test_a_mount_of_another_namespace_is_none_of_ours(plan, monkeypatch):
    monkeypatch.setattr(again, "namespaces", lambda: iter([(6, [at(90, 1, "/one", 40)])]))
    found = plan([tree("one", 40)])
    assert found.mounts == []
    assert found.notes == [
        "one: it is mounted on /one in the mount namespace of pid 6, not in ours, so it is not mounted again; "
        "it stays preserved"
    ]


# -- doing it -----------------------------------------------------------------------------------------


def listed(*places, order=None):
    """Entries of nvram.json for places, in order."""
    return [
        {"name": place, "mountpoint": place, "options": {}, "order": number, "binds": []}
        for number, place in enumerate(places)
    ]


def test_independent_mounts_come_back_at_once_and_not_too_many():
    most, running, peak = len(os.sched_getaffinity(0)) + 1, 0, 0
    lock, meet = threading.Lock(), threading.Barrier(most)

    def work(step):
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        meet.wait(60)  # as many as may must come together
        with lock:
            running -= 1

    assert again._run(again._steps(listed(*(f"/m{n}" for n in range(3 * most)))), work) == []
    assert peak == most


def test_what_lies_on_another_waits_for_it():
    done = []
    steps = again._steps(listed("/a", "/a/b", "/a/b", "/a/b/c", "/ab"))
    again._run(steps, lambda step: done.append(step.mount["order"]))
    assert [n for n in done if n != 4] == [0, 1, 2, 3]


def test_what_lies_on_a_failed_one_is_not_tried():
    tried = []

    def work(step):
        tried.append(step.place)
        if step.place == "/a":
            raise MachineError("no")

    failures = again._run(again._steps(listed("/a", "/a/b", "/c")), work)
    assert sorted(tried) == ["/a", "/c"]
    assert [(step.place, str(error)) for step, error in failures] == [
        ("/a", "no"),
        ("/a/b", "/a was not, and it is needed"),
    ]


def test_an_internal_error_is_not_taken_for_a_refusal():
    def work(step):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        again._run(again._steps(listed("/a")), work)


def test_an_old_list_is_done_in_its_order():
    old = [{"name": name, "mountpoint": "/m", "options": {"pkram": name}} for name in ("z", "a")]
    steps = again._steps(old)
    assert [step.mount["name"] for step in steps] == ["z", "a"]
    assert again._needs(steps[1], steps[:1]) == [0]


def test_a_failure_is_said_and_counted(monkeypatch):
    said: list[str] = []
    machine = types.SimpleNamespace(exists=lambda: False, mounts=list)
    mount = listed("/nowhere/at/all")[0] | {"on": {"tree": "1"}}
    with Forks() as ready:
        assert again.restart(machine, [mount], said.append, ready) == 1
    assert said == [
        "/nowhere/at/all was not mounted again: mount point /nowhere/at/all does not exist",
        "1 tree stays preserved: mount them by hand when the reason is gone",
    ]
