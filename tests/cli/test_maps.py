# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl map and timeline: RAM and kernels as pictures, in a terminal, as JSON and as SVG."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pkramfs.cli import drawing, generations, ramview, timesheet
from tests.support.lab import Boots

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def lab(machine) -> Boots:
    """The machine, with trees of patterned pages."""
    return Boots(machine)


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def tips(svg: str) -> set[str]:
    return {one.text or "" for one in ElementTree.fromstring(svg).findall(f"{SVG}rect/{SVG}title")}


def test_a_map_is_as_wide_as_the_terminal(lab, ctl, monkeypatch):
    lab.preserve("one", 700)
    lab.load()
    for columns in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        status, out, err = ctl("map")
        assert (status, err) == (0, "")
        head, *rows = out.partition("\n\n")[0].splitlines()
        assert head.startswith("a character is ")
        assert max(map(len, rows)) <= columns and len(rows) <= ramview.ROWS
        cells = "".join(row[9:] for row in rows if row[0] != " ")
        assert {"A", "#", "%", "*", "."} <= set(cells)
    legend = [line.split() for line in out.partition("\n\n")[2].splitlines()]
    assert ["A", "preserved", "one"] in [words[:3] for words in legend]
    assert ["*", "destination", "of", "builtin:4M", "4.0", "MiB"] in [words[:6] for words in legend]


def test_a_map_as_json_has_each_page_once(lab, ctl):
    lab.preserve("one", 700)
    found = json.loads(ctl("--json", "map")[1])
    assert found["generation"] == 1
    assert all(set(part) == {"kind", "owner", "pages", "ranges"} for part in found["parts"])
    ranges = sorted(tuple(one) for part in found["parts"] for one in part["ranges"])
    assert ranges[0][0] == 0 and ranges[-1][1] == (256 << 20) >> 12
    assert all(one[1] == other[0] for one, other in pairwise(ranges))


def test_a_map_as_a_picture(lab, ctl, tmp_path):
    lab.preserve("<one> & \x1b[31m\udcff", 700)
    path = tmp_path / "map.svg"
    assert ctl("map", "--svg", str(path)) == (0, "", "")
    svg = path.read_text(encoding="ascii")
    assert ctl("map", "--svg", "-") == (0, svg, "")
    assert ctl("map", "--svg", "/dev/full") == (1, "", "pkramctl: /dev/full: No space left on device\n")
    assert ctl("timeline", "--svg", "")[0] == 2
    name = "<one> & \\x1b[31m\\xff"  # XML has no control characters
    assert any(tip.startswith(f"preserved {name}, 2.8 MiB") for tip in tips(svg))
    assert {f"preserved {name}", "Kernel image", "PKRAM reserve", "free", "no memory"} <= set(texts(svg))
    assert ctl("map", "--svg", "-")[1] == svg
    status, out, err = ctl("map", "--svg", "/nowhere/map.svg")
    assert (status, out, err) == (1, "", "pkramctl: /nowhere/map.svg: No such file or directory\n")


def test_a_pair_needs_a_kexec(machine, ctl, kexec):
    lab = Boots(machine)
    lab.preserve("one", 700)
    status, _, err = ctl("map", "--before-after")
    assert status == 8 and err.startswith("pkramctl: there is no picture of RAM before a kexec")
    assert kexec("-le", "builtin:2M", "--reuse-cmdline")[0] == 0
    status, out, _ = ctl("map", "--before-after")
    assert status == 0 and "before the kexec, kernel 1, " in out and "\nnow, kernel 2\n" in out
    assert "stayed   one: " in out and "moved   Kernel image: another kernel, from pfn " in out
    found = json.loads(ctl("--json", "map", "--before-after")[1])
    assert found["before"]["generation"] == 1
    assert {move["owner"]: move["what"] for move in found["moves"]}["one"] == "stayed"
    svg = ctl("map", "--before-after", "--svg", "-")[1]
    assert {"What moved, and why", "now, kernel 2", "①"} <= set(texts(svg))
    assert any(text.startswith("① Kernel image: another kernel") for text in texts(svg))


def test_a_map_without_a_kernel_or_with_nodes_that_cannot_be_read(machine, ctl, damaged):
    assert ctl("map")[2].startswith("pkramctl: no kernel is running in ")
    lab = Boots(machine)
    lab.preserve("one", 700)
    (node,) = lab.up().store.nodes()
    lab.up().ram.words(node.pfn)[:] = 7
    status, out, err = ctl("map")
    assert status == 0 and err.startswith("pkramctl: warning: the nodes cannot be read") and err.count("\n") == 1
    assert "whose mount has ended" in out and "preserved" not in out


def test_a_timeline_without_a_kernel(machine, ctl):
    assert ctl("timeline") == (8, "", "pkramctl: no kernel has run here yet: mount a tree first\n")


def test_a_timeline_of_two_kernels(machine, ctl, kexec):
    Boots(machine).preserve("one", 700)
    assert kexec("-le", "builtin:2M", "--reuse-cmdline")[0] == 0
    status, out, err = ctl("timeline")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert [row[:3] for row in rows[1:3]] == [["1", "cold", "builtin"], ["2", "kexec", "builtin:2M"]]
    assert rows[2][-2:] == ["1", "0"]
    first, second = json.loads(ctl("--json", "timeline")[1])
    assert (first["by"], second["ended"]) == ("kexec", None) and second["pause"] > 0
    said = texts(ctl("timeline", "--svg", "-")[1])
    assert {"builtin", "builtin:2M", "cold boot", "by kexec"} <= set(said)
    assert any(text.startswith("pause ") for text in said)


@pytest.mark.mount
def test_a_death_is_on_the_timeline(machine, ctl, place):
    from pkramfs.cli.mount import main as mount
    from tests.support.places import wait_gone

    directory = place()
    assert mount(["none", directory, "-o", "mode=755"]) == 0  # without a name: nobody takes over
    Path(directory, "file").write_text("x")
    assert "leased by" in ctl("map")[1]
    (entry,) = machine.mounts()
    os.kill(entry.pid, signal.SIGKILL)
    assert wait_gone(entry.pid, 10)
    second = place()
    assert mount(["none", second, "-o", "pkram=two"]) == 0  # the next mount finds the dead
    dead = f"pkramfs: daemon of tree {entry.tree_id:016x} (pid {entry.pid}, {entry.mountpoint}) has died"
    assert dead in ctl("timeline")[1]
    assert any(text.endswith(dead) for text in texts(ctl("timeline", "--svg", "-")[1]))
    (entry,) = machine.mounts()
    os.kill(entry.pid, signal.SIGKILL)
    os.listdir(second)  # waits for the daemon that takes over
    (kernel_,) = json.loads(ctl("--json", "timeline")[1])
    assert [event["kind"] for event in kernel_["events"]][-2:] == ["died", "taken"]
    assert {"a daemon or kernel died", "another daemon took over"} <= {*texts(ctl("timeline", "--svg", "-")[1])}
    measured = ctl("metrics")[1]
    assert "pkramfs_daemon_deaths_total 2.0" in measured
    assert f'pkramfs_mount_takeovers_total{{mountpoint="{second}",name="two"}} 1.0' in measured


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.714, "0.71 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (86400 * 3 + 7300, "3 d 2 h"), (12, "12 s")],
)
def test_durations(seconds, said):
    assert generations.lasting(seconds) == said


def kernel(number: int, booted: float, ended: float | None, **more: object) -> dict[str, object]:
    plain = {"generation": number, "kind": "kexec", "image": "builtin", "booted": booted, "ended": ended, "by": "kexec"}
    return plain | {"pause": 0.5, "nodes": [], "lost": [], "events": []} | more


def test_a_timeline_of_many_kernels_stays_on_the_sheet():
    """Also of kernels that lived for no time, of clocks that were set back, and of names that fill a line."""
    now = time.time()
    event = {"at": 1e9, "kind": "died", "text": "pkramfs: daemon of tree 0 " + "x" * 200}
    known = [kernel(n, now - 900 * (30 - n), now - 900 * (30 - n) + n % 3 * 100, events=[event]) for n in range(30)]
    known.append(kernel(30, now + 60, None, image="/boot/" + "v" * 300, kind="unheard of"))
    for kernels in (known, known[:1], known[-1:]):
        sheet = timesheet.draw("x", kernels, now)
        for box in sheet._root.iter("rect"):
            x, wide = float(box.get("x", 0)), box.get("width", "")
            assert wide == "100%" or (x >= 0 and x + float(wide) <= sheet.width + timesheet._LEAST)
        assert all(0 <= float(one.get("x", 0)) <= sheet.width for one in sheet._root.iter("text"))


def test_text_is_broken_where_it_does_not_fit():
    assert drawing.broken("ab cd ab cd", 4.5) == ["ab cd", "   ab cd"]
    long = drawing.broken("x" * 100, 7)
    assert "".join(long).replace(" ", "") == "x" * 100 and all(drawing.wide(line) <= 7 for line in long)
    assert drawing.cut("abcdefgh", 3) == "ab…" and drawing.cut("ab", 3) == "ab"


def test_colours_differ():
    kinds = ("hole", "free", "ended", "leased", "preserved", "reserve", "kernel", "destination")
    assert len({drawing.colour(kind) for kind in kinds}) == len(kinds)
    assert len({drawing.colour("preserved", number) for number in range(3)}) == 3
