# SPDX-License-Identifier: GPL-2.0-or-later
"""Publish or never: whoever dies at any store of a save or a withdrawal leaves the old state or the new one."""

import contextlib
import os

import pytest

from pkramfs.machine.ram import Ram
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans

from .conftest import SUPER_PFN, TREE


class Camera:
    """Takes a picture of RAM before and after every published word."""

    def __init__(self, ram: Ram, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ram, self.pictures = ram, []
        publish = Ram.publish

        def watched(self_: Ram, address: int, value: int) -> None:
            self.take()
            publish(self_, address, value)
            self.take()

        monkeypatch.setattr(Ram, "publish", watched)

    def take(self) -> None:
        spans = self.ram.data_spans()
        self.pictures.append([(start, bytes(self.ram.page(start, end - start))) for start, end in spans])


def develop(picture, path, size) -> Store:
    """A machine that was left as the picture shows."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    ram = Ram(path, size, create=True)
    for start, content in picture:
        ram.page(start, len(content) // 4096)[:] = content
    return Store(ram, SUPER_PFN, contextlib.nullcontext)


def state(store: Store):
    """Every node with all that it holds, checked."""
    found = {}
    for node in store.nodes():
        store.pages_of(node)
        with store.prepare_load(node.name) as load:
            found[node.name] = [(r.read(), Spans.from_runs(*r.load_runs()[1:])) for r in load]
    return found


def save(store, frames, name, data, runs):
    with store.prepare_save(name, tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.write(data)
        with saving.object() as writer:
            index = 0
            for pfn, count in runs:
                writer.save_runs([index], [pfn], [count])
                index += count + 1
        saving.finish()


@pytest.mark.parametrize("work", ["save", "withdraw newest", "withdraw oldest"])
def test_dying_at_any_store_leaves_old_or_new(ram, frames, store, tmp_path, monkeypatch, work):
    save(store, frames, b"first", b"1" * 5000, frames.allocate(700))
    save(store, frames, b"second", b"2", [])
    runs = [(start, 3) for start, _ in (frames.allocate(5)[0] for _ in range(3))]
    old = state(store)
    camera = Camera(ram, monkeypatch)
    if work == "save":
        save(store, frames, b"third", b"3" * 9000, runs)
    else:
        store.withdraw(b"second" if work == "withdraw newest" else b"first")
    monkeypatch.undo()
    new = state(store)
    assert new != old and len(camera.pictures) >= 2
    seen = [state(develop(picture, str(tmp_path / "ram"), ram.size)) for picture in camera.pictures]
    assert all(found in (old, new) for found in seen)
    turned = [found == new for found in seen]
    assert turned == sorted(turned) and turned[-1] and not turned[0], "from old to new, once"


def test_discarding_is_never_seen(ram, frames, store, tmp_path, monkeypatch):
    save(store, frames, b"first", b"1", [])
    old, used = state(store), frames.used_pages
    camera = Camera(ram, monkeypatch)
    with store.prepare_save(b"second", tree_id=TREE, frames=frames) as saving, saving.object() as writer:
        writer.write(b"2" * 10_000)
    monkeypatch.undo()
    camera.take()
    assert all(state(develop(p, str(tmp_path / "ram"), ram.size)) == old for p in camera.pictures)
    assert frames.used_pages == used
