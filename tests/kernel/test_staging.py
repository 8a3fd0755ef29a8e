# SPDX-License-Identifier: GPL-2.0-or-later
"""Segments on their way into RAM."""

import os
from typing import Any

import pytest

from pkramfs.errors import MachineError
from pkramfs.kernel import image, segments, staging
from pkramfs.kernel.nvram import ImageInfo
from pkramfs.kernel.staging import Loaded, Stage


def stage_all(machine: Any, initrd: str) -> Loaded:
    kernel = image.load_image("builtin:1M")
    with Stage(machine) as stage:
        found = [stage.kernel(kernel), stage.copy("initrd", initrd), stage.data("cmdline", b"ro quiet\0")]
        found += stage.reserve(len(found) + 1)
        placed = segments.place_all(found, [machine.hardware().usable])
        loaded = Loaded("test", ImageInfo.of(kernel), "ro quiet", stage.seal(placed, image.setup_header(kernel)))
        staging.write(machine, loaded)
    return loaded


@pytest.fixture
def initrd(tmp_path: Any) -> str:
    (tmp_path / "initrd").write_bytes(b"i" * 5000)
    return str(tmp_path / "initrd")


def test_segments_reach_ram_and_are_checked_there(lab: Any, initrd: str) -> None:
    loaded, ram = stage_all(lab.machine, initrd), lab.machine.ram()
    staging.copy_into_ram(lab.machine, ram, loaded.segments)
    staging.verify_in_ram(ram, loaded.segments)
    found = loaded.segment("initrd")
    assert found is not None
    assert bytes(ram.page(found.pfn, 2)) == b"i" * 5000 + bytes(8192 - 5000)
    purgatory = loaded.segment("purgatory")
    assert purgatory is not None
    listed = bytes(ram.page(purgatory.pfn)[: purgatory.size]).decode().splitlines()
    assert [line.split()[-1] for line in listed] == ["kernel", "initrd", "cmdline", "params"]
    ram.page(found.pfn)[0] = 0
    with pytest.raises(MachineError, match="purgatory: the initrd at pfn"):
        staging.verify_in_ram(ram, loaded.segments)


def test_boot_parameters_name_command_line_and_initrd(lab: Any, initrd: str) -> None:
    loaded = stage_all(lab.machine, initrd)
    by_name = {s.name: s for s in loaded.segments}
    with open(lab.machine.path("kexec", by_name["params"].file), "rb") as file:
        params = file.read()
    assert staging.cmdline_address(params) == by_name["cmdline"].pfn << 12
    assert int.from_bytes(params[0x218:0x21C], "little") == by_name["initrd"].pfn << 12
    assert int.from_bytes(params[0x21C:0x220], "little") == 5000
    assert params[0x202:0x206] == b"HdrS"


def test_sealing_again_follows_new_destinations(lab: Any, initrd: str) -> None:
    loaded = stage_all(lab.machine, initrd)
    with Stage(lab.machine) as stage:
        again = stage.seal(loaded.segments, staging.header_of(lab.machine, loaded))
    assert [s.sha256 for s in again] == [s.sha256 for s in loaded.segments]


def test_a_load_that_fails_leaves_nothing(lab: Any) -> None:
    with pytest.raises(RuntimeError), Stage(lab.machine) as stage:
        stage.data("cmdline", b"x")
        raise RuntimeError
    assert os.listdir(lab.machine.path("kexec")) == []


def test_a_staged_file_cut_short_is_noticed(lab: Any, initrd: str) -> None:
    loaded = stage_all(lab.machine, initrd)
    found = loaded.segment("initrd")
    assert found is not None
    os.truncate(lab.machine.path("kexec", found.file), 100)
    with pytest.raises(MachineError, match="initrd has 100 bytes, expected 5000"):
        staging.copy_into_ram(lab.machine, lab.machine.ram(), loaded.segments)


def test_damage_is_named(lab: Any) -> None:
    lab.machine.write_json(staging.KEXEC_JSON, {"mode": "x"})
    with pytest.raises(
        MachineError,
        match=r"kexec\.json is damaged: mode is 'x', expected 'kexec_file_load' or .*load the kernel again",
    ):
        staging.read(lab.machine)
