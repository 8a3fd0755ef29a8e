# SPDX-License-Identifier: GPL-2.0-or-later
"""Facts 10.10: who may do what while a node is being saved or loaded, by another thread or another process."""

import contextlib
import errno
import subprocess
import sys

import pytest

from pkramfs.errors import FormatError, PkramError
from pkramfs.machine.claims import FileClaims, LocalClaims
from pkramfs.pkram.store import Store

from .conftest import SUPER_PFN, TREE

LOADER = """
import contextlib, sys
from pkramfs.machine.claims import FileClaims
from pkramfs.machine.ram import Ram
from pkramfs.pkram.store import Store
ram = Ram(sys.argv[1], int(sys.argv[2]))
store = Store(ram, int(sys.argv[3]), contextlib.nullcontext, FileClaims(sys.argv[4]))
with store.prepare_load(b"a") as load:
    print(next(iter(load)).read().decode(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["threads", "processes"])
def stores(request, ram, store, tmp_path):
    """Two doors to the same nodes."""
    if request.param == "threads":
        claims = LocalClaims()
        return tuple(Store(ram, SUPER_PFN, contextlib.nullcontext, claims) for _ in range(2))
    return tuple(Store(ram, SUPER_PFN, contextlib.nullcontext, FileClaims(str(tmp_path / "claims"))) for _ in range(2))


def save(store, frames, name=b"a"):
    with store.prepare_save(name, tree_id=TREE + len(name), frames=frames) as saving:
        with saving.object() as writer:
            writer.write(b"hello")
        saving.finish()


def refused(code, work, *args, **more):
    with pytest.raises(PkramError) as caught:
        work(*args, **more)
    assert caught.value.errno == code


def test_while_a_node_is_being_saved(stores, frames):
    mine, other = stores
    with mine.prepare_save(b"a", tree_id=TREE, frames=frames) as saving:
        refused(errno.EEXIST, other.prepare_save, b"a", tree_id=TREE, frames=frames)
        refused(errno.EBUSY, other.prepare_load, b"a")
        refused(errno.EBUSY, other.withdraw, b"a")
        refused(errno.ENOENT, other.prepare_load, b"bb")
        save(other, frames, b"bb")
        assert other.free() > 0, "bb, which nobody saves"
        saving.finish()
    with other.prepare_load(b"a") as load:
        assert len(list(load)) == 0
    refused(errno.EEXIST, other.prepare_save, b"a", tree_id=TREE, frames=frames)


def test_while_a_node_is_being_loaded(stores, frames):
    mine, other = stores
    save(mine, frames)
    save(mine, frames, b"bb")
    with mine.prepare_load(b"a"), other.prepare_load(b"a") as load:
        assert next(iter(load)).read() == b"hello"
        for store in stores:
            refused(errno.EBUSY, store.withdraw, b"a")
            refused(errno.EBUSY, store.withdraw, TREE + 1)
            refused(errno.EBUSY, store.free, [b"a"])
            refused(errno.EEXIST, store.prepare_save, b"a", tree_id=TREE, frames=frames)
        assert other.free() > 0
        assert [node.name for node in mine.nodes()] == [b"a"]
    other.withdraw(b"a")
    refused(errno.ENOENT, mine.withdraw, b"a")


def test_pkram_s_own_load_frees_the_name_at_once(stores, frames):
    """Facts 10.10, 3 and 4: a second load finds nothing, a save of the name is allowed."""
    mine, other = stores
    save(mine, frames)
    with mine.prepare_load(b"a", consume=True) as load:
        refused(errno.ENOENT, other.prepare_load, b"a")
        save(other, frames)
        assert next(iter(load)).read() == b"hello"


@pytest.mark.parametrize("how", ["finished", "left", "failed"])
def test_a_name_is_free_again_however_it_ends(stores, frames, how):
    mine, other = stores
    with contextlib.suppress(ZeroDivisionError), mine.prepare_save(b"a", tree_id=TREE, frames=frames) as saving:
        if how == "finished":
            saving.finish()
        if how == "failed":
            _ = 1 / 0
    if how == "finished":
        other.withdraw(b"a")
    save(other, frames)
    other.withdraw(b"a")


def test_a_load_that_fails_keeps_nothing_busy(stores, frames, ram, damaged):
    mine, other = stores
    save(mine, frames)
    node = mine.find(b"a")
    ram.bytes[(node.object_pfn << 12) + 100] ^= 1
    with pytest.raises(FormatError, match="Object"):
        mine.prepare_load(b"a")
    ram.bytes[(node.object_pfn << 12) + 100] ^= 1
    other.withdraw(b"a")


def test_a_process_that_loads_and_dies(ram, store, frames, tmp_path):
    claims = str(tmp_path / "claims")
    mine = Store(ram, SUPER_PFN, contextlib.nullcontext, FileClaims(claims))
    save(mine, frames)
    words = [sys.executable, "-c", LOADER, ram.path, str(ram.size), str(SUPER_PFN), claims]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "hello\n"
    refused(errno.EBUSY, mine.withdraw, b"a")
    process.kill()
    process.communicate()
    mine.withdraw(b"a")
