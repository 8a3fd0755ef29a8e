# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the RAM image of the current FORMAT_VERSION: run once for each version, never again.

    python tests/data/make_image.py tests/data/format-1.ram.xz

An image is the backed pages of a small RAM, each preceded by its pfn (8 bytes), compressed. It must
load for ever: an image that is there already is not replaced.
"""

import contextlib
import lzma
import os
import random
import sys
import tempfile

from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import KERNEL, Leases
from pkramfs.machine.ram import Ram
from pkramfs.pkram import regions, superblock
from pkramfs.pkram.store import Store
from pkramfs.spans import Spans
from pkramfs.units import BLOCK_SIZE

BLOCKS, SUPER_PFN, TREE = 64, 9, 0xABCDEF
NAME, BYTES = b"shmem-golden", random.Random(1).randbytes(5000)


def build(ram: Ram) -> None:
    """One node with bytes, a contiguous run, a hole and scattered pages; and the region list."""
    leases = Leases(ram, 1, BLOCKS, contextlib.nullcontext)
    leases.ids[0] = KERNEL
    frames = Frames(ram, leases, TREE)
    superblock.create(ram, SUPER_PFN, generation=7)
    store = Store(ram, SUPER_PFN, contextlib.nullcontext)
    ((start, _),) = frames.allocate(2000)
    with store.prepare_save(NAME, tree_id=TREE, frames=frames) as saving:
        with saving.object() as writer:
            writer.write(BYTES)
        with saving.object() as writer:
            writer.save_runs([0, 5000, 5010], [start, start + 1500, start + 1700], [1024, 3, 1])
        saving.finish()
    listed = store.preserved() | Spans([(SUPER_PFN, SUPER_PFN + 1)])
    superblock.set_regions(ram, SUPER_PFN, regions.build(ram, listed, frames.allocate_pages))


def expected_pages(first: int) -> list[tuple[int, int, int]]:
    """What the page stream holds when its data begin at pfn `first`."""
    return [(0, first, 1024), (5000, first + 1500, 3), (5010, first + 1700, 1)]


def dump(ram: Ram) -> bytes:
    pages = [pfn for start, end in ram.data_spans() for pfn in range(start, end)]
    return lzma.compress(b"".join(pfn.to_bytes(8, "little") + bytes(ram.page(pfn)) for pfn in pages))


def restore(ram: Ram, image: bytes) -> None:
    raw = lzma.decompress(image)
    for at in range(0, len(raw), 4104):
        ram.page(int.from_bytes(raw[at : at + 8], "little"))[:] = raw[at + 8 : at + 4104]


def main(path: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, open(path, "xb") as file:
        ram = Ram(os.path.join(directory, "ram"), BLOCKS * BLOCK_SIZE, create=True)
        build(ram)
        file.write(dump(ram))
        ram.close()


if __name__ == "__main__":
    main(sys.argv[1])
