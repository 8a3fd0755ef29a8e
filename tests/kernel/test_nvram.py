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
