# SPDX-License-Identifier: GPL-2.0-or-later
"""A forced kexec over a list of nodes that is damaged: whole nodes cross, and what is lost is named before."""

from pathlib import Path
from typing import Any

import pytest

from pkramfs.errors import FormatError, MachineError
from pkramfs.kernel import kexec, succession
from pkramfs.pkram.format import NEXT


@pytest.fixture
def three(lab: Any) -> Any:
    for seed, name in enumerate("abc"):
        lab.preserve(name, 40, seed=seed)
    lab.load()
    return lab


def execute(lab: Any) -> list[str]:
    """A forced kexec; what it warned of."""
    with lab.machine.lifecycle(shared=False):
        plan = kexec.plan(lab.machine, [], force=True)
        assert plan.problems == []
        plan.execute(lambda _: None)
    return plan.warnings


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("hit", ["super", "c", "a"])
def test_whole_nodes_cross_a_broken_list(three: Any, hit: str) -> None:
    kernel = three.up()
    pfn = kernel.info.super_pfn if hit == "super" else kernel.store.find(hit.encode()).pfn
    kernel.ram.page(pfn)[NEXT] ^= 1
    with three.machine.lifecycle(shared=False):
        (refusal,) = kexec.plan(three.machine, []).problems
    assert isinstance(refusal, FormatError) and "free --damaged" in str(refusal)
    (warning,) = execute(three)
    assert f"at pfn {pfn:x}: " in warning
    assert sorted(node.name for node in three.up().store.nodes()) == [b"a", b"b", b"c"]
    assert all(three.intact(name) for name in "abc")


@pytest.mark.usefixtures("damaged")
def test_a_node_that_cannot_be_read_is_named_and_the_others_cross(three: Any) -> None:
    kernel = three.up()
    pfn = kernel.store.find(b"b").pfn
    kernel.ram.page(pfn)[40] ^= 1
    assert f"Node at pfn {pfn:x}: " in execute(three)[0]
    assert sorted(node.name for node in three.up().store.nodes()) == [b"a", b"c"]
    assert all(three.intact(name) for name in "ac")
    assert f"pkram: a node at pfn {pfn:x}, which cannot be read, is lost" in three.machine.dmesg()


@pytest.mark.usefixtures("damaged")
def test_a_node_whose_page_table_cannot_be_read_is_named_and_the_others_cross(three: Any) -> None:
    kernel = three.up()
    node = kernel.store.find(b"b")
    kernel.ram.page(node.table_pfn)[100] ^= 1
    assert len(execute(three)) == 1
    assert sorted(node.name for node in three.up().store.nodes()) == [b"a", b"c"]
    assert all(three.intact(name) for name in "ac")
    assert "pkram: node b is lost" in three.machine.dmesg()


@pytest.mark.parametrize("name", ["cmdline", "pkram", "iomem"])
def test_a_directory_in_the_place_of_an_exported_file_refuses_in_time(three: Any, name: str) -> None:
    path = Path(three.machine.path(name))
    text = path.read_text()
    path.unlink()
    path.mkdir()
    with three.machine.lifecycle(shared=False):
        (refusal,) = kexec.plan(three.machine, []).problems
        assert str(refusal).startswith(f"{path} is a directory")
        with pytest.raises(MachineError, match="is a directory"):
            succession.retire(three.machine)
    assert three.up().generation == 1
    path.rmdir()
    three.machine.write_text(name, text)
