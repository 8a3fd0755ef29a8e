"""pkramctl machine: any hardware that can be described, and nothing destroyed by mistake."""

import json
import os

import pytest

from pkramfs.machine.directory import Machine


def test_create_shows_what_it_made(root, ctl):
    status, out, _ = ctl("machine", "create", "--ram", "1G", "--nodes", "2", "--seed", "7")
    assert status == 0
    assert "NUMA nodes   2" in out
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
        (["--ram", "1K"], 8, "RAM of 1.0 KiB cannot be"),
        (["--ram", "lots"], 2, "not a size"),
        (["--nodes", "9000"], 8, "9000 NUMA nodes cannot be"),
        (["--map", "/nowhere/map"], 2, "cannot read the map: /nowhere/map: No such file or directory"),
        (["--map", "/dev/null"], 2, "not JSON"),
        (["--map", "/dev/null", "--ram", "1G"], 2, "leave --ram and --nodes out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(root, ctl, words, status, message):
    found, _, err = ctl("machine", "create", *words)
    assert (found, err.count("\n")) == (status, 1)
    assert message in err
    assert not os.path.exists(f"{root}/default")


def test_create_leaves_a_machine_alone(root, ctl):
    ctl("machine", "create", "--ram", "64M")
    status, _, err = ctl("machine", "create", "--ram", "128M")
    assert status == 8
    assert "is there already" in err
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
