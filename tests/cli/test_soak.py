# SPDX-License-Identifier: GPL-2.0-or-later
"""tools/soak: a short run of it, and that it would notice."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "soaking.py"


@pytest.fixture
def soaking(monkeypatch):
    """The module behind the tool; what it patches is put back."""
    from pkramfs.kernel import succession

    monkeypatch.setattr(succession, "start_boot", succession.start_boot)
    spec = importlib.util.spec_from_file_location("soaking", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(3))
def test_generations_of_everything_random(soaking, root, seed):
    soak = soaking.Soak(root, seed)
    for _ in range(6):
        soak.generation()


def test_one_changed_byte_is_noticed(soaking, root):
    soak = soaking.Soak(root, 5)
    while not any(isinstance(seen[-1], tuple) for tree in soak.trees.values() for seen in tree.values()):
        soak.generation()
    kernel = soaking.running.attach(soak.machine)
    for name in soak.trees:
        mounted = soaking.Mounted(kernel, name, None)
        mounted.tree.wake()
        for inode in mounted.tree.inodes.values():
            for _, pfn, _ in inode.pages or ():
                kernel.ram.bytes[pfn * 4096] ^= 1
        mounted.lock.release()
    with pytest.raises(soaking.Difference, match="expected"):
        soak.generation()


def test_a_lost_node_is_noticed(soaking, root):
    soak = soaking.Soak(root, 6)
    while not soak.trees:
        soak.generation()
    kernel = soaking.running.attach(soak.machine)
    kernel.store.withdraw(next(iter(soak.trees)))
    with pytest.raises(soaking.Difference, match=r"nodes \["):
        soak.generation()


def test_the_command_prints_its_seed(root):
    words = [sys.executable, str(TOOL), "--seconds", "0.5", "--seed", "17", "--keep", root]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(TOOL.parents[1])})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("soak: seed 17\nsoak: ")
    assert done.stdout.endswith("generations, no difference\n")


# -- with real processes -------------------------------------------------------------------------------------------


@pytest.mark.mount
def test_a_killed_boot_loses_nothing_and_what_would_be_lost_is_noticed(soaking, root):
    rig = soaking.killing.Rig(root, 7)
    try:
        name = rig.fresh()
        (rig.root / name / "file").write_bytes(b"y" * 5000)
        rig.trees[name] = soaking.killing.picture(rig.root / name)
        rig.run("mount", *rig.remount(name, "preserve,ro"))
        rig.load()
        rig.kexec(soaking.killing.BOOT)
        rig.count()
        kernel = soaking.running.attach(rig.machine)
        ((start, end),) = [s for s in kernel.ram.data_spans() if b"y" * 4096 in kernel.ram.peek(s[0], s[1] - s[0])]
        kernel.ram.bytes[start * 4096 + kernel.ram.peek(start, end - start).find(b"y" * 4096)] ^= 1
        with pytest.raises(soaking.killing.Difference, match=f"{name}: file: "):
            rig.compare(name)
        rig.unmount(name)
        kernel.store.withdraw(b"shmem-" + name.encode())
        with pytest.raises(soaking.killing.Difference, match=f"expected .*{name}"):
            rig.count()
        rig.free += 1
        rig.trees.clear()
        with pytest.raises(soaking.killing.Difference, match="free page blocks with nothing preserved"):
            rig.finish()
    finally:
        rig.stop(kept=True)
