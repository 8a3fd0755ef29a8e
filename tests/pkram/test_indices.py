# SPDX-License-Identifier: GPL-2.0-or-later
"""Ranges of index: doubt where two meet, none where they only touch."""

import numpy as np
import pytest

from pkramfs.pkram.streams import link
from pkramfs.pkram.streams.indices import Indices


def single(first, count, *, dense=True):
    index = np.arange(first, first + count, dtype=np.uint64)
    return link.single_rows(index, index, dense=dense)


def blocks(*rows):
    """Rows of (index, order, repeat)."""
    index, order, repeat = (np.array(column, dtype=np.uint64) for column in zip(*rows, strict=True))
    return link.rows(index, index, order.astype(np.uint8), repeat=repeat)


NOTHING = link.single_rows(np.empty(0, np.uint64), np.empty(0, np.uint64), dense=False)


@pytest.mark.parametrize(
    ("batches", "doubtful"),
    [
        ([], False),
        ([NOTHING, NOTHING], False),
        ([single(0, 10), single(10, 5)], False),
        ([single(10, 5), single(0, 10)], False),
        ([single(0, 10), single(9, 5)], True),
        ([single(9, 5), single(0, 10)], True),
        ([single(0, 10, dense=False), single(9, 1)], True),
        ([single(0, 10, dense=False), single(10, 1)], False),
        ([single(0, 100), single(50, 1)], True),
        ([blocks((0, 0, 10)), single(10, 1)], False),
        ([blocks((0, 0, 10)), single(9, 1)], True),
        ([blocks((0, 4, 2)), single(32, 1)], False),
        ([blocks((0, 4, 2)), single(31, 1)], True),
        ([blocks((0, 4, 2), (32, 0, 1))], False),
        ([blocks((0, 4, 2), (31, 0, 1))], True),
        ([blocks((32, 0, 1), (0, 4, 2))], True),
    ],
)
def test_doubt(batches, doubtful):
    indices = Indices()
    for batch in batches:
        indices.add(batch)
    assert indices.doubtful is doubtful
