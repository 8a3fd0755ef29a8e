# SPDX-License-Identifier: GPL-2.0-or-later
"""The clock of files: the kernel's own, read where it stamps.

With the writeback cache the kernel stamps writes, and the daemon stamps everything else. If the two read
different clocks, a newer file could look older, and mislead make and tar:

    kernel writes a    a.mtime = …03.7 ms     the later of the coarse clock, which moves by the tick, and the last
    we make b          b.mtime = …00.0 ms     time in between that it gave to a file of any file system

That second one (the floor of multigrain time stamps, Linux 6.13) is up to a tick ahead of CLOCK_REALTIME_COARSE, and
no clock shows it. The times in the kernel's requests do not show it either: they come at the write-back, and times set
by utimensat look the same. But every stamp of the kernel uses it. So the daemon lets the kernel stamp a pipe, and reads
that time: 3 µs.

Times are kept as 64-bit nanoseconds: from 1677 to 2262. A time outside becomes the nearest one.

Kernel: fs/inode.c (current_time, timestamp_truncate), kernel/time/timekeeping.c (ktime_get_coarse_real_ts64_mg)
"""

import functools
import os
import time

_COARSE = getattr(time, "CLOCK_REALTIME_COARSE", 5)  # not named by Python
_FIRST, _LAST = -(1 << 63), (1 << 63) - 1


def now() -> int:
    """Return nanoseconds since the epoch, not before any time that the kernel has given to a file."""
    pipe = _pipe()
    if pipe is None:
        return coarse()
    os.utime(pipe)
    return os.fstat(pipe).st_mtime_ns


def coarse() -> int:
    """Return a time at most a tick before `now`: enough to see whether a day has passed, and 3 µs faster."""
    return time.clock_gettime_ns(_COARSE)


@functools.cache
def _pipe() -> int | None:
    """Return the pipe that the kernel stamps; None in a sandbox whose kernel does not allow that."""
    reader, writer = os.pipe()
    os.close(writer)
    try:
        os.utime(reader)
    except OSError:
        os.close(reader)
        return None
    return reader


def clamp(time_ns: int) -> int:
    """Return the nearest time, in ns since the epoch, that fits into 64 bits."""
    return time_ns if _FIRST <= time_ns <= _LAST else max(_FIRST, min(time_ns, _LAST))
