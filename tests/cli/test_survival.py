# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram-kexec with real mounts: what was preserved comes back, and a kexec that is refused changes nothing."""

import hashlib
import json
import os
import signal

import pytest

from tests.support.trees import snapshot

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
]


def fill(directory: str, seed: int = 1) -> None:
    """Files of many kinds."""
    for name, size in (("empty", 0), ("one", 1), ("page", 4096), ("many", 3_000_001)):
        with open(f"{directory}/{name}", "wb") as file:
            file.write(hashlib.shake_128(bytes([seed])).digest(size))
    with open(f"{directory}/sparse", "wb") as file:
        file.write(b"first")
        file.seek(1 << 40)
        file.write(b"last")
    os.mkdir(f"{directory}/dir")
    os.symlink("one", f"{directory}/dir/link")
    os.link(f"{directory}/one", f"{directory}/dir/again")


def state(ctl) -> dict[str, str]:
    """The state of each mount, by mount point."""
    return {m["mountpoint"]: m["state"] for m in json.loads(ctl("--json", "status")[1])["mounts"]}


def test_a_tree_survives_two_kexecs_with_nothing_in_between(machine, place, mount, ctl, kexec):
    mnt = place()
    mount(mnt, "pkram=one,size=64M")
    fill(mnt)
    before = snapshot(mnt)
    mount(mnt, "remount,preserve,ro")
    for generation in (2, 3):
        status, out, err = kexec("-le", "builtin:2M", "--reuse-cmdline", "--poison")
        assert (status, err) == (0, "")
        assert out.startswith(f"kernel {generation} (builtin:2M) is up in ")
        assert out.endswith(f"; mounted again: {mnt}\n")
        assert snapshot(mnt) == before
        assert 0 < json.loads(machine.read_text("nvram.json"))["pause"] < 100
    assert state(ctl) == {mnt: "preserved"}
    assert json.loads(ctl("--json", "status")[1])["next"]["remount"] == []


def test_without_remount_the_node_waits(machine, place, mount, ctl, kexec):
    mnt = place()
    mount(mnt, "pkram=one")
    fill(mnt)
    before = snapshot(mnt)
    mount(mnt, "remount,preserve,ro")
    status, out, _ = kexec("-le", "builtin:2M", "--reuse-cmdline", "--no-remount")
    assert status == 0 and "mounted" not in out
    assert state(ctl) == {}
    assert os.listdir(mnt) == []
    mount(mnt, "pkram=one")
    assert snapshot(mnt) == before


def test_a_refused_kexec_names_what_would_be_lost_and_leaves_all_as_it_was(machine, place, mount, ctl, kexec):
    one, two, three = place(), place(), place()
    mount(one, "pkram=one")
    mount(two, "pkram=two")
    mount(three, "size=1M")
    fill(one)
    mount(one, "remount,preserve,ro")
    with open(f"{two}/f", "w") as file:
        file.write("x")
    kexec("-l", "builtin:2M", "--reuse-cmdline")
    for words in (["-e", "--dry-run"], ["-e"]):
        status, out, err = kexec(*words)
        assert status == 6
        assert f"{two}: 1 file would be lost" in out + err
        assert f"{three}: 0 files would be lost (mounted without pkram=NAME" in out + err
    assert state(ctl) == {one: "preserved", two: "live", three: "live"}
    with open(f"{two}/g", "w") as file:
        file.write("still writable")


def test_forced_only_what_was_preserved_comes_back(machine, place, mount, ctl, kexec):
    one, two = place(), place()
    mount(one, "pkram=one")
    mount(two, "pkram=two")
    fill(one)
    fill(two)
    before = snapshot(one)
    mount(one, "remount,preserve,ro")
    status, out, err = kexec("-le", "builtin:2M", "--reuse-cmdline", "--force")
    assert status == 0
    assert f"{two}: " in err
    assert out.endswith(f"mounted again: {one}\n")
    assert snapshot(one) == before
    assert os.listdir(two) == []
    assert two in ctl("dmesg")[1]


def test_a_failure_before_the_point_of_no_return_mounts_again(machine, place, mount, ctl, kexec, monkeypatch):
    from pkramfs.errors import ExhaustedError
    from pkramfs.kernel import transition as planner

    mnt = place()
    mount(mnt, "pkram=one")
    fill(mnt)
    before = snapshot(mnt)
    mount(mnt, "remount,preserve,ro")

    def fail(_):
        raise ExhaustedError("no place")

    monkeypatch.setattr(planner.DecideBoot, "execute", fail)
    status, _, err = kexec("-le", "builtin:2M", "--reuse-cmdline")
    assert (status, err) == (4, "pkram-kexec: no place\n")
    assert state(ctl) == {mnt: "preserved"}
    assert snapshot(mnt) == before


def test_a_boot_that_died_is_resumed_and_mounted_again(machine, place, mount, ctl, kexec, monkeypatch):
    from pkramfs.errors import MachineError
    from pkramfs.kernel import succession

    mnt = place()
    mount(mnt, "pkram=one")
    fill(mnt)
    before = snapshot(mnt)
    mount(mnt, "remount,preserve,ro")

    def die(*_, **__):
        raise MachineError("the lights went out")

    with monkeypatch.context() as patched:
        patched.setattr(succession, "start_boot", die)
        status, _, err = kexec("-le", "builtin:2M", "--reuse-cmdline")
    assert status == 8
    assert "pkram-kexec --resume goes on from there" in err
    assert ctl("machine", "destroy")[0] == 6
    status, out, _ = kexec("--resume")
    assert status == 0
    assert out == f"kernel 2 (builtin:2M) is up again; mounted again: {mnt}\n"
    assert snapshot(mnt) == before
    assert kexec("--resume")[1] == "nothing to resume\n"


def test_files_open_for_writing_refuse_and_are_named(machine, place, mount, ctl, kexec):
    mnt = place()
    mount(mnt, "pkram=one")
    fill(mnt)
    with open(f"{mnt}/many", "a") as file:
        kexec("-l", "builtin:2M", "--reuse-cmdline")
        status, out, _ = kexec("-e", "--dry-run")
        assert status == 6
        assert f"{mnt}: /many is open for writing" in out
        assert "scratch: " in kexec("-e", "--dry-run", "-v")[1]
        assert f"(pid {os.getpid()}) uses it" not in out  # ourselves, who are not asked
        assert kexec("-e")[0] == 6
        file.write("more")
    assert state(ctl) == {mnt: "live"}


def test_a_stopped_daemon_is_named_and_killed_only_when_forced(machine, place, mount, ctl, kexec, monkeypatch):
    from pkramfs.cli import daemons

    monkeypatch.setattr(daemons, "ANSWER_SECONDS", 0.5)
    mnt = place()
    mount(mnt, "pkram=one")
    (entry,) = machine.mounts()
    os.kill(entry.pid, signal.SIGSTOP)
    kexec("-l", "builtin:2M", "--reuse-cmdline")
    status, _, err = kexec("-e")
    assert status == 7
    assert f"the daemon of {mnt} (pid {entry.pid}) does not answer" in err
    assert machine.live_ids() == {entry.tree_id}
    status, _, err = kexec("-e", "--force")
    assert status == 0
    assert f"killing the daemon of {mnt} (pid {entry.pid})" in err
    assert machine.live_ids() == set()


def test_a_crash_boots_the_crash_kernel_and_cold_leaves_it(machine, place, mount, ctl, kexec):
    mnt = place()
    mount(mnt, "pkram=one")
    assert kexec("--panic")[0] == 8
    kexec("-le", "builtin:2M", "--append=crashkernel=32M", "--force")
    assert kexec("-p", "builtin:2M", "--append=maxcpus=1")[0] == 0
    assert "crash kernel: builtin:2M" in kexec("--status")[1]
    mount(mnt, "pkram=one")
    status, out, _ = kexec("--panic")
    assert status == 0
    assert "PKRAM off" in out
    with pytest.raises(OSError):
        os.listdir(mnt)
    assert json.loads(ctl("--json", "status")[1])["kernel"]["super_pfn"] == 0
    assert kexec("--cold")[0] == 0
    mount(mnt, "pkram=one")
    assert os.listdir(mnt) == []


def test_free_refuses_a_mounted_tree(machine, place, mount, ctl):
    mnt = place()
    mount(mnt, "pkram=one")
    mount(mnt, "remount,preserve,ro")
    status, _, err = ctl("free", "one")
    assert status == 9
    assert f"shmem-one is in use by {mnt}" in err
    assert ctl("machine", "destroy", "--force")[0] == 8


def test_a_tree_that_a_forced_kexec_lost_is_not_mounted_again_empty(machine, place, mount, ctl, kexec):
    mnt = place()
    mount(mnt, "pkram=one")
    fill(mnt)
    mount(mnt, "remount,preserve,ro")
    assert " : shmem-one" in ctl("iomem")[1]
    kexec("-l", "builtin:2M", "--append=ro")
    status, out, err = kexec("-e", "--force")
    assert status == 0
    assert f"one is not mounted again on {mnt}: its tree was lost" in err
    assert "mounted again" not in out
    assert machine.live_ids() == set()
    assert " : shmem-one" not in ctl("iomem")[1]
