# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl report and what pkramctl says in a crash kernel."""

import json

import pytest

from pkramfs.units import PAGE_SIZE

from .test_nodes import machine, save  # noqa: F401


@pytest.fixture
def crashed(machine, ctl, kexec):  # noqa: F811
    """A crash kernel, and the super block's pfn of the dead one, which had a node."""
    assert kexec("-le", "builtin:2M", "--append=ro crashkernel=32M")[0] == 0
    assert kexec("-p", "builtin:2M", "--append=maxcpus=1")[0] == 0
    save(machine, b"one").release()
    pfn = machine.read_text("pkram").strip()
    assert kexec("--panic")[0] == 0
    return pfn


def rows(text: str, title: str) -> list[list[str]]:
    """The lines below a title, in words, up to an empty line."""
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(title))
    below = lines[at + 1 :]
    return [line.split() for line in below[: below.index("") if "" in below else None]]


def test_both_ways_are_compared_while_a_kernel_is_loaded(machine, ctl, kexec):  # noqa: F811
    save(machine, b"one").release()
    assert json.loads(ctl("--json", "report")[1])["ways"] is None
    assert "NEXT KERNEL" not in ctl("report")[1]
    assert kexec("-l", "builtin:4M", "--reuse-cmdline")[0] == 0
    ways = json.loads(ctl("--json", "report")[1])["ways"]
    for way in ("bans", "scratch"):
        assert ways[way]["bytes"] == ways[way]["pages"] * PAGE_SIZE > 0
        assert ways[way]["copied_bytes"] == ways[way]["copies"] * PAGE_SIZE
    bans, scratch = rows(ctl("report")[1], "NEXT KERNEL")[:2]
    assert bans[:2] == ["bans", f"{ways['bans']['pages']:,}"]
    assert scratch[:2] == ["scratch", f"{ways['scratch']['pages']:,}"]
    kexec("-u")
    assert json.loads(ctl("--json", "report")[1])["ways"] is None


def test_the_report_names_nodes_segments_and_what_was_relocated(machine, ctl, kexec):  # noqa: F811
    save(machine, b"one").release()
    assert kexec("-le", "builtin:4M", "--reuse-cmdline")[0] == 0
    shown = ctl("report")[1]
    assert "found      1 node, " in shown and "lost       nothing" in shown
    assert rows(shown, "NODE")[0][0] == "one"
    assert rows(shown, "NODE")[0][-2:] == ["0", "-"]
    assert [row[0] for row in rows(shown, "LOADED SEGMENT")] == ["kernel", "cmdline", "params", "purgatory"]
    title, row = ctl("nodes")[1].splitlines()
    assert title.split() == ["NODE", "STATE", "SIZE", "PAGES", "RELOCATED", "UNCHECKED", "PFN"]
    assert row.split()[5] == "0"


def test_a_crash_kernel_says_enodev_in_words_wherever_pkram_is_needed(crashed, ctl, kexec):
    for words in (["nodes"], ["free", "--all"], ["verify"]):
        status, out, err = ctl(*words)
        assert (status, out) == (9, "")
        assert err == "pkramctl: no such device: PKRAM is switched off in this kernel\n"
    for way in ("-l", "-p"):
        status, _, err = kexec(way, "builtin:2M")
        assert (status, err) == (8, "pkram-kexec: a crash kernel is running: leave it with pkram-kexec --cold\n")


def test_the_dead_kernel_can_be_looked_at(crashed, ctl):
    shown = ctl("report")[1]
    assert f"died       generation 2, super block at pfn {crashed}, " in shown
    assert "its line   ro crashkernel=32M" in shown
    assert "Kernel panic - not syncing: sysrq triggered crash" in shown
    status, out, _ = ctl("inspect", "superblock")
    assert status == 0 and out.startswith(f"Super at pfn {crashed}\n")
    found = json.loads(ctl("--json", "inspect", "node")[1])
    assert found["problems"] == []
    assert "one" in str([field["value"] for field in found["fields"] if field["name"] == "name"])


def test_memory_outside_of_a_crash_kernels_window_is_nobodys(crashed, ctl):
    found = json.loads(ctl("--json", "status")[1])
    assert sum(found["memory"][who] for who in ("free", "tree", "kernel")) == 32 << 20


def test_what_was_predicted_of_the_kexec_stands_beside_what_was_seen(machine, ctl, kexec):  # noqa: F811
    save(machine, b"one").release()
    save(machine, b"two").release()
    assert "LAST KEXEC" not in ctl("report")[1]
    assert json.loads(ctl("--json", "report")[1])["prediction"] is None
    assert kexec("-le", "builtin:4M", "--reuse-cmdline")[0] == 0
    found = json.loads(ctl("--json", "report")[1])["prediction"]
    foreseen, seen = found["foreseen"], found["seen"]
    assert foreseen["pause"] > 0 and seen["pause"] > 0
    assert foreseen | {"pause": 0, "names": sorted(foreseen["names"])} == seen | {"pause": 0, "names": ["one", "two"]}
    assert (seen["nodes"], seen["lost"], seen["mounts"]) == (2, 0, 0) and seen["pages"] > 0
    shown = rows(ctl("report")[1], "LAST KEXEC")
    assert [row[0] for row in shown] == ["pause", "nodes", "preserved", "relocated", "lost", "mounted"]
    assert shown[1] == ["nodes", "2", "2"]


def test_a_loss_that_was_forced_was_predicted_and_one_that_was_not_is_named(machine, ctl, kexec):  # noqa: F811
    save(machine, b"one").release()
    assert kexec("-l", "builtin:4M", "--append=ro")[0] == 0
    assert kexec("-e", "--force")[0] == 0
    assert rows(ctl("report")[1], "LAST KEXEC")[1:5:3] == [["nodes", "0", "0"], ["lost", "1", "1"]]
    data = machine.read_json("history.json")
    data["kexec"]["foreseen"] |= {"nodes": 1, "names": ["one"]}
    machine.write_json("history.json", data)
    assert "one was predicted, and is not there" in ctl("report")[1]
