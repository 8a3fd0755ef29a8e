# SPDX-License-Identifier: GPL-2.0-or-later
"""Another program preserves memory with the library alone: the manual's own example, in processes of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pkramfs
from pkramfs.errors import PkramError
from pkramfs.library import Saved, open_machine

PACKAGE = Path(pkramfs.__file__).parent


def run(name: str) -> str:
    """Run one of the manual's examples in a Python of its own."""
    page = (PACKAGE / "resources" / "man" / "pkramfs-library.3.md").read_text()
    program = textwrap.dedent(page.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0])
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=60
    ).stdout


def test_memory_of_a_program_crosses_a_kexec(lab: Any) -> None:
    lab.up()
    assert run("save") == ""
    for generation in (2, 3):  # once with nobody looking at it in between
        kernel = lab.cycle()
        assert kernel.generation == generation
        assert [node.name for node in kernel.store.nodes()] == [b"guest-7"]
    assert run("load") == "cpu state\n0 1000 guest\n"
    assert lab.up().store.nodes() == []
    assert lab.up().leases.counts()["tree"] == 0


def test_what_was_not_preserved_is_not_there(lab: Any) -> None:
    lab.up()
    run("save")
    lab.up().store.withdraw(b"guest-7")
    kernel = lab.cycle()
    assert kernel.store.nodes() == []
    assert kernel.leases.counts()["tree"] == 0


def test_the_cache_of_the_manual_is_warm_after_a_kexec(lab: Any) -> None:
    assert run("cache") == "cold\n"
    lab.cycle()
    assert run("cache") == "warm 144 False made at noon\n"


ARRAYS = {
    "numbers": np.arange(200_000),
    "none": np.zeros((0, 3), "f4"),
    "one": np.array(2.5),
    "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "records": np.array([(1, 2.5, b"ab")], [("i", "<i4"), ("f", ">f8"), ("b", "S2", (1,))]),
}


def test_arrays_cross_a_kexec_without_a_copy(lab: Any) -> None:
    with open_machine() as machine:
        machine.save("arrays", ARRAYS, state=b"a\nb")
        before = machine.load("arrays")
        assert machine.nodes() == ["arrays"]
    lab.cycle(poison=True)
    with open_machine() as machine:
        after = machine.load("arrays")
    for found in (before, after):
        assert found is not None and found.state == b"a\nb" and list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            assert (found[name] == array).all() and not found[name].flags.writeable
    numbers = after["numbers"]
    (start, _), *_ = after._runs
    lab.up().ram.words(start)[:] = 7  # what no program may do; it is undone, as the node is checked in the end
    assert (numbers[:512] == 7).all() and (before["numbers"][:512] == 7).all()
    lab.up().ram.words(start)[:] = np.arange(512)
    with open_machine() as machine:
        machine.drop("arrays")
        assert machine.load("arrays") is None and lab.up().leases.counts()["tree"] == 0


def test_an_array_in_pieces_is_copied(lab: Any) -> None:
    ram = lab.up().ram
    for pfn, value in ((1000, 1), (1001, 2), (2000, 3)):
        ram.back_run(pfn, 1)
        ram.words(pfn)[:] = value
    entries = [{"name": name, "dtype": "<u8", "shape": [512 * n], "pages": n} for name, n in (("a", 1), ("b", 2))]
    neighbours = Saved(ram, b"", entries, [(2000, 1), (1000, 1), (1001, 1)])
    apart = Saved(ram, b"", entries, [(1000, 2), (2000, 1)])
    assert [len(found.parts("b")) for found in (neighbours, apart)] == [1, 2]
    assert neighbours["b"][::512].tolist() == [1, 2] and apart["b"][::512].tolist() == [2, 3]
    with pytest.raises(PkramError, match="fewer pages than its arrays"):
        Saved(ram, b"", entries, [(1000, 2)])
    ram.punch_run(1000, 1001)


def test_what_cannot_be_saved_or_loaded_is_refused(lab: Any) -> None:
    lab.up()
    lab.preserve("other", 10)
    with open_machine() as machine:
        machine.save("x", {})
        for name, arrays, reason in (
            ("x", {}, "exists already"),
            ("", {}, "invalid name ''"),
            ("shmem-x", {}, "invalid name 'shmem-x'"),
            ("y" * 256, {}, "too long"),
            ("y", {"a": np.array([None])}, "array a has Python objects"),
        ):
            with pytest.raises(PkramError, match=reason):
                machine.save(name, arrays)
        with pytest.raises(PkramError, match="node other was not saved by this module"):
            machine.load("other")
        with pytest.raises(PkramError, match="there is no node y"):
            machine.drop("y")
        assert sorted(machine.nodes()) == ["other", "x"]


def test_a_program_reads_a_preserved_tree(lab: Any) -> None:
    from tests.support.preserved import Trees, write

    Trees(lab.machine).plant("t", lambda tree: write(tree, b"f", b"content"))
    with open_machine() as machine:
        tree = machine.tree("t")
        assert b"".join(data for _, data in tree.data(tree.find(b"/f"))) == b"content"
