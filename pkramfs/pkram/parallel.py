# SPDX-License-Identifier: GPL-2.0-or-later
"""All CPUs on one object: positions that workers take one by one, and the first error that stops them.

numpy releases the interpreter lock while it works on memory, so threads are enough (a checksum of one
page does not release it: see streams/linkreader). The caller is one of the workers, so there is always
at least one (D16: with one CPU the original starts none, and waits for it). All state is local to a call
(D23), and after an error no worker begins anything new (D24).

    positions  0 1 2 3 4 5 6 …      worker A takes 0, B takes 1, A is done first and takes 2, …

Kernel: mm/shmem_pkram.c (shmem_pkram_max_threads, shmem_get_chunk), patches 32 and 34
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from pkramfs.units import round_down

T = TypeVar("T")

MAX_WORKERS = 16
CHUNK_PAGES = 1 << 18
"""Pages of one chunk of a file: 1 GiB (row 32)."""


def workers(cpus: int | None = None) -> int:
    """Return the number of threads that work on one object: one for each CPU, 1 to 16."""
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) if cpus is None else cpus))


def chunks(start: int, end: int, size: int = CHUNK_PAGES) -> Iterator[tuple[int, int]]:
    """Cut [start, end) where an index is a multiple of `size`, so that workers never share a chunk."""
    while start < end:
        stop = min(end, round_down(start, size) + size)
        yield start, stop
        start = stop


class Workbenches(Generic[T]):
    """Buffers for threads, as many as work at once; they are freed with this object.

    Fresh memory for each step can cost more than the work: the allocator returns it after each step, and the
    kernel clears it again.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._idle = make, list[T]()

    @contextmanager
    def lend(self) -> Iterator[T]:
        """Lend a bench for the time of a `with`."""
        try:
            bench = self._idle.pop()
        except IndexError:
            bench = self._make()
        yield bench
        self._idle.append(bench)


def each(work: Callable[[int], T], count: int, *, threads: int | None = None) -> list[T]:
    """Do work(0) … work(count - 1) on several threads; return the results, or raise the first error when all ended."""
    threads = min(workers() if threads is None else threads, count)
    if threads <= 1:
        return [work(position) for position in range(count)]
    cursor, results, errors = itertools.count(), dict[int, T](), list[BaseException]()

    def run() -> None:
        try:
            while not errors and (position := next(cursor)) < count:
                results[position] = work(position)
        except BaseException as error:  # kept for the caller, who raises it
            errors.append(error)

    helpers = [threading.Thread(target=run, name=f"pkram{number}") for number in range(1, threads)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    return [results[position] for position in range(count)]
