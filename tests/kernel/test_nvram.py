# SPDX-License-Identifier: GPL-2.0-or-later
"""What crosses a kexec beside RAM."""

from typing import Any

import pytest

from pkramfs.errors import MachineError
from pkramfs.kernel import nvram
from pkramfs.kernel.nvram import ImageInfo, Pending
from pkramfs.kernel.segments import Segment

BOOT = Pending(
    nvram.KEXEC,
    7,
    "ro pkram=3",
    ImageInfo("builtin", "builtin", "1", 4096, 4096, 0, True),
    (Segment("kernel", "kernel.1", 10, 1, 512, 77, "00"),),
    True,
    False,
    (("a", 5),),
    (("b", 6), ("c", 7)),
    (512, 1024),
    None,
    {"generation": 6, "super_pfn": 3, "lease_table_pfn": 4, "cmdline": "ro", "dmesg": ["a\0b"]},
)
MOUNT = {"name": "a", "mountpoint": "/mnt"}


def test_a_pending_boot_is_read_as_it_was_written(lab: Any) -> None:
    nvram.set_pending(lab.machine, BOOT, [MOUNT])
    assert nvram.pending(lab.machine) == BOOT
    assert nvram.mounts(lab.machine) == [MOUNT]
    nvram.finished(lab.machine, 7)
    assert nvram.pending(lab.machine) is None
    assert nvram.next_generation(lab.machine) == 8
    nvram.clear_mounts(lab.machine)
    assert nvram.read(lab.machine) == {"boot_count": 7, "pending": None, "mounts": []}


def test_cancelling_keeps_the_count_and_the_mounts(lab: Any) -> None:
    nvram.finished(lab.machine, 3)
    nvram.set_pending(lab.machine, BOOT, [MOUNT])
    nvram.cancel(lab.machine)
    assert nvram.read(lab.machine) == {"boot_count": 3, "pending": None, "mounts": [MOUNT]}


@pytest.mark.parametrize("damage", [{"pending": {"kind": "kexec"}}, {"boot_count": "many"}])
def test_damage_is_named(lab: Any, damage: dict[str, Any]) -> None:
    lab.machine.write_json(nvram.NAME, damage)
    with pytest.raises(MachineError, match=r"nvram\.json"):
        nvram.pending(lab.machine)


@pytest.mark.parametrize(
    "mounts",
    [
        [{"name": "a", "mountpoint": "/m", "options": {"pkram": "a", "ro": True}}],
        [
            {
                "name": "a",
                "mountpoint": "/m\udce9",
                "options": {},
                "tree": "00ff",
                "order": 3,
                "on": {"dev": 5, "ino": 6},
                "binds": [
                    {
                        "mountpoint": "/b",
                        "root": "/r",
                        "inode": None,
                        "options": ["ro"],
                        "order": 4,
                        "on": {"tree": "1"},
                    }
                ],
            }
        ],
    ],
)
def test_the_list_of_mounts_is_read_as_it_was_written(lab: Any, mounts: list[Any]) -> None:
    nvram.set_pending(lab.machine, BOOT, mounts)
    assert nvram.mounts(lab.machine) == mounts


BIND = {"mountpoint": "/b", "root": "/r", "inode": None, "options": [], "order": 4, "on": {}}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"name": 5}, "name is 5"),
        ({"mountpoint": "relative"}, "mountpoint is 'relative'"),
        ({"options": []}, r"options is \[\]"),
        ({"options": {"ro": 1}}, r"options\.ro is 1"),
        ({"tree": "../x"}, r"tree is '\.\./x'"),
        ({"tree": 7}, "tree is 7"),
        ({"order": True}, "order is True"),
        ({"order": "1"}, "order is '1'"),
        ({"on": 3}, "on is 3"),
        ({"on": {"dev": "x"}}, "dev is 'x'"),
        ({"on": {"tree": "zz"}}, "tree is 'zz'"),
        ({"binds": {}}, "binds is"),
        ({"binds": [7]}, "7"),
        ({"binds": [{"mountpoint": "/b"}]}, "is missing"),
        ({"binds": [BIND | {"inode": "x"}]}, "inode is 'x'"),
        ({"binds": [BIND | {"options": [1]}]}, r"options is \[1\]"),
    ],
)
def test_a_damaged_list_of_mounts_is_named(lab: Any, damage: dict[str, Any], named: str) -> None:
    whole = {"name": "a", "mountpoint": "/m", "options": {}}
    lab.machine.write_json(nvram.NAME, {"mounts": [whole, whole | damage]})
    with pytest.raises(MachineError, match=rf"nvram\.json is damaged: mounts.*{named}"):
        nvram.mounts(lab.machine)


@pytest.mark.parametrize("damage", [{}, 3, "x", [3], [{"name": "a"}], None])
def test_what_is_no_list_of_mounts_is_refused(lab: Any, damage: Any) -> None:
    lab.machine.write_json(nvram.NAME, {"mounts": damage})
    with pytest.raises(MachineError, match=r"nvram\.json is damaged: mounts"):
        nvram.mounts(lab.machine)
