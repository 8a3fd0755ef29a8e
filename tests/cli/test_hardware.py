# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl machine: any hardware that can be described, and nothing destroyed by mistake."""

import json
import os
import shutil

import pytest

from pkramfs.machine import conf
from pkramfs.machine.directory import Machine
from pkramfs.machine.host import Host


def test_create_shows_what_it_made(root, ctl):
    status, out, _ = ctl("machine", "create", "--ram", "1G", "--nodes", "2", "--seed", "7")
    assert status == 0
    assert "NUMA nodes   2" in out
    assert out.splitlines()[-2:] == [
        "0x000000000000-0x00001fffffff   512 MiB           0",
        "0x000020000000-0x00003fffffff   512 MiB           1",
    ]
    assert os.path.exists(f"{root}/default/ram")
    hardware = Machine.locate().hardware()
    assert (hardware.size, hardware.seed) == (1 << 30, 7)


def test_machines_have_names_and_roots_of_their_own(root, ctl, tmp_path):
    assert ctl("--machine", "a", "machine", "create", "--ram", "64M")[0] == 0
    assert ctl("machine", "create", "--ram", "64M", "--root", str(tmp_path))[0] == 0
    assert os.path.exists(f"{root}/a/ram")
    assert os.path.exists(tmp_path / "default" / "ram")


def test_a_map_comes_back_as_it_was_given(root, ctl, tmp_path):
    given = tmp_path / "map.json"
    entries = [
        {"start": 0, "end": 0x80000, "kind": "usable"},
        {"start": 0x80000, "end": 0x100000, "kind": "acpi"},
        {"start": 0x100000, "end": 0x8000000, "kind": "usable"},
    ]
    given.write_text(json.dumps({"map": entries, "nodes": []}))
    assert ctl("machine", "create", "--map", str(given))[0] == 0
    _, out, _ = ctl("--json", "machine", "show")
    assert json.loads(out)["map"] == entries


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--ram", "1K"], 2, "invalid RAM size 1.0 KiB"),
        (["--ram", "0"], 2, "invalid RAM size 0 B"),
        (["--ram", "lots"], 2, "not a size"),
        (["--nodes", "9000"], 2, "invalid number of NUMA nodes 9000"),
        (["--map", "/nowhere/map"], 2, "cannot read the map: /nowhere/map: No such file or directory"),
        (["--map", "/dev/null"], 2, "/dev/null: a device, not a regular file"),
        (["--map", "/dev/null", "--ram", "1G"], 2, "leave --ram and --nodes out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(root, ctl, words, status, message):
    found, _, err = ctl("machine", "create", *words)
    assert (found, err.count("\n")) == (status, 1)
    assert message in err
    assert not os.path.exists(f"{root}/default")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "firmware map: `map` is not a list of {start, end, kind}"),
        ({"map": [{"start": 0, "end": 4096}]}, "firmware map: entry 0 of `map` has no 'kind'"),
        ({"map": [{"start": 0, "end": "1G", "kind": "usable"}]}, "is not a range ('1G' is not a whole number)"),
        ({"map": [{"start": 0, "end": 4096, "kind": "lost"}]}, "0x0-0x1000 is 'lost', expected one of usable, res"),
        ({"map": [{"start": 0, "end": 4096, "kind": "usable"}]}, "there is no usable memory in it"),
        ({"map": [7]}, "entry 0 of `map` is not a range ("),
    ],
)
def test_a_map_that_cannot_be_is_refused_naming_file_entry_and_field(root, ctl, tmp_path, given, message):
    path = tmp_path / "map.json"
    path.write_text(json.dumps(given))
    status, _, err = ctl("machine", "create", "--map", str(path))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"pkramctl: {path}: firmware map: ") and message in err


def test_create_leaves_a_machine_alone(root, ctl):
    ctl("machine", "create", "--ram", "64M")
    status, _, err = ctl("machine", "create", "--ram", "128M")
    assert status == 8
    assert "exists already" in err
    assert Machine.locate().hardware().size == 64 << 20


@pytest.mark.parametrize("words", [["status"], ["machine", "destroy"], ["dmesg"], ["free", "--all"], ["verify"]])
def test_looking_makes_no_machine(root, ctl, words):
    status, _, err = ctl(*words)
    assert status == 8
    assert "there is no machine" in err
    assert os.listdir(root) == []


def test_destroy_removes_the_directory(root, ctl):
    ctl("machine", "create", "--ram", "64M")
    assert ctl("machine", "destroy")[0] == 0
    assert os.listdir(root) == []


def test_two_machines_get_no_memory_in_common(root, ctl):
    conf.write(f"{root}/one.conf", conf.Conf("/dev/mem:1G@4G", "5" * 32))
    status, _, err = ctl("machine", "create", "--ram", "/dev/mem:2G@3G", "--force")
    assert status == 8 and "/dev/mem:1G@4G is the memory of machine one: take another range, or" in err
    assert "`pkramctl machine destroy --machine one` first" in err


def test_memory_in_use_is_not_given_back(root, ctl, monkeypatch):
    assert ctl("machine", "create", "--ram", f"{root}/memory:64M")[0] == 0
    shutil.rmtree(f"{root}/default")
    monkeypatch.setattr(Host, "users", lambda *_: [4242])
    status, _, err = ctl("machine", "destroy", "--force")
    assert status == 8 and f"{root}/memory is open in process 4242: end it first" in err
    monkeypatch.setattr(Host, "users", lambda *_: [])
    assert ctl("machine", "destroy")[0] == 0 and not os.path.exists(f"{root}/default.conf")


def test_a_name_that_no_command_line_can_say(root, ctl):
    for name in ('a"b', "a\nb"):
        status, _, err = ctl("machine", "create", "--machine", name, "--ram", f"{root}/memory:64M")
        assert (
            status == 2
            and "a kernel's command line cannot have this word" in err
            and not os.path.exists(f"{root}/memory")
        )
