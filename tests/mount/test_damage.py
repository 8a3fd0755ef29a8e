# SPDX-License-Identifier: GPL-2.0-or-later
"""Flipped bits under real mounts: refused and named, and no file that is whole is lost."""

import os
from typing import Any

import pytest

from pkramfs.kernel import running

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("damaged")]


@pytest.fixture
def preserved(lab: Any) -> bytes:
    """Two preserved trees, unmounted; what their files hold."""
    content = os.urandom(3 << 20)
    for name in ("one", "two"):
        mnt = lab.mount(name)
        (mnt / "file").write_bytes(content)
        lab.remount(mnt, "preserve,ro")
        lab.umount(mnt)
    return content


def read_back(lab: Any, content: bytes) -> None:
    for name in ("one", "two"):
        mnt = lab.mount(name)
        assert (mnt / "file").read_bytes() == content
        lab.umount(mnt)


def test_a_flipped_bit_of_the_lease_table(lab: Any, preserved: bytes) -> None:
    kernel = running.look(lab.machine)
    block = int(kernel.leases.blocks_of(kernel.store.find(b"shmem-one").tree_id).starts[-1])
    kernel.leases.ids[block] ^= 1 << 33
    for name in ("three", "one", "two"):
        done = lab.helper(lab.dir(name), f"pkram={name}")
        assert done.returncode == 32
        assert f"owner of page block {block:x} is " in done.stderr
    assert lab.run("ctl", "verify").returncode == 3
    done = lab.run("ctl", "free", "--damaged")
    assert (done.returncode, done.stdout[:20]) == (0, "mended: Lease table ")
    read_back(lab, preserved)


def test_a_flipped_bit_of_the_super_block(lab: Any, preserved: bytes) -> None:
    kernel = running.look(lab.machine)
    kernel.ram.page(kernel.info.super_pfn)[19] ^= 2
    done = lab.helper(lab.dir("three"), "pkram=three")
    assert done.returncode == 32 and "`pkramctl free --damaged`" in done.stderr
    done = lab.run("ctl", "free", "--damaged")
    assert done.returncode == 0 and "given up" not in done.stdout
    assert sorted(lab.nodes()) == ["shmem-one", "shmem-two"]
    read_back(lab, preserved)


def test_a_kernel_json_that_says_that_pkram_is_off(lab: Any, preserved: bytes) -> None:
    good = lab.machine.read_json("kernel.json")
    lab.machine.write_json("kernel.json", good | {"super_pfn": 0})
    done = lab.helper(lab.dir("three"), "pkram=three")
    assert done.returncode == 32 and "kernel.json is damaged: its checksum does not fit" in done.stderr
    lab.machine.write_json("kernel.json", good)
    read_back(lab, preserved)
