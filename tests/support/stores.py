# SPDX-License-Identifier: GPL-2.0-or-later
"""A RAM that notes every store, and the memories that a process would leave which dies between two of them."""

import os
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

from pkramfs.machine.ram import Ram
from pkramfs.units import PAGE_SIZE

Image = dict[int, bytes]
"""What RAM holds: pages that are not all zeros."""
_ZEROS = bytes(PAGE_SIZE)
_ALL = 4
"""Stores between two publishes of which every subset is tried; of more, each alone and all but one."""


class Store(NamedTuple):
    """One store: what pages hold after it, and whether it was a publish."""

    pages: Image
    published: bool


class Recording(Ram):
    """RAM that notes what each verb has changed; what is stored through a slice counts as a store of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stores: list[Store] | None = None
        self._image: Image = {}

    def record(self) -> Image:
        """Begin to note stores; return what RAM holds now."""
        self._image, self.stores = image(self), []
        return dict(self._image)

    def recorded(self) -> list[Store]:
        """Return the stores since `record`, in their order, and note no more."""
        self._note(published=False)
        assert self.stores is not None
        stores, self.stores = self.stores, None
        return stores

    def _note(self, *, published: bool) -> None:
        if self.stores is None:
            return
        now = image(self)
        changed = {pfn: now.get(pfn, _ZEROS) for pfn in now.keys() | self._image.keys()}
        changed = {pfn: page for pfn, page in changed.items() if page != self._image.get(pfn, _ZEROS)}
        if changed:
            self.stores.append(Store(changed, published))
            self._image = now

    def append(self, at: int, data: bytes, where: int, word: int) -> None:
        """Two stores, whose order must not be left to the processor."""
        self.overwrite(at, data)
        self.publish(where, word)


def _noting(name: str) -> Any:
    verb = getattr(Ram, name)

    def noted(self: Recording, *args: Any) -> Any:
        self._note(published=False)
        found = verb(self, *args)
        self._note(published=name == "publish")
        return found

    return noted


for _name in ("overwrite", "fill", "publish", "zero", "copy", "punch_run"):
    setattr(Recording, _name, _noting(_name))


def image(ram: Ram) -> Image:
    """What RAM holds."""
    found: Image = {}
    for start, end in ram.data_spans():
        data = ram.peek(start, end - start)
        pages = (data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE))
        found.update((start + number, page) for number, page in enumerate(pages) if page != _ZEROS)
    return found


def restore(held: Image, path: str, size: int) -> Ram:
    """A RAM that holds this."""
    with open(path, "wb") as file:
        os.ftruncate(file.fileno(), size)
        for pfn, page in held.items():
            if page != _ZEROS:
                os.pwrite(file.fileno(), page, pfn * PAGE_SIZE)
    return Ram(path, size)


def deaths(before: Image, stores: list[Store]) -> Iterator[tuple[str, Image]]:
    """Yield every memory that a death may leave: after each store, in the midst of each, and, as a processor may
    reorder what lies between two publishes, with any of those."""
    held, at = dict(before), 0
    yield "nothing", held
    while at < len(stores):
        end = next((n for n in range(at, len(stores)) if stores[n].published), len(stores))
        epoch = stores[at:end]
        for number, store in enumerate(epoch):
            yield f"half of store {at + number}", _half(_sum(held, epoch[:number]), store)
        for some in _subsets(len(epoch)):
            yield f"stores {[at + number for number in some]}", _sum(held, [epoch[number] for number in some])
        held = _sum(held, epoch)
        if end < len(stores):
            held = _sum(held, [stores[end]])
            yield f"everything up to publish {end}", held
        at = end + 1


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    if count <= _ALL:
        for size in range(1, count + 1):
            yield from combinations(range(count), size)
        return
    yield from (tuple(range(end)) for end in range(1, count + 1))
    yield from ((number,) for number in range(1, count))
    yield from (tuple(one for one in range(count) if one != number) for number in range(count - 1))


def _sum(held: Image, stores: list[Store]) -> Image:
    found = dict(held)
    for store in stores:
        found.update(store.pages)
    return found


def _half(held: Image, store: Store) -> Image:
    """The first half of the bytes that a store changes."""
    found = dict(held)
    pages = sorted(store.pages)
    if len(pages) > 1:
        found.update((pfn, store.pages[pfn]) for pfn in pages[: len(pages) // 2])
        return found
    (pfn,) = pages
    old, new = held.get(pfn, _ZEROS), store.pages[pfn]
    changed = [at for at in range(PAGE_SIZE) if old[at] != new[at]]
    middle = changed[len(changed) // 2] & ~7  # a word is not torn
    found[pfn] = new[:middle] + old[middle:]
    return found
