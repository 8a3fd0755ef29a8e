# SPDX-License-Identifier: GPL-2.0-or-later
"""The clock of files: the kernel's own, read where it stamps.

With the writeback cache the kernel stamps what is written, here everything else is stamped. If the two read
different clocks, what is newer would look older, and make and tar would misjudge:

    kernel writes a    a.mtime = …03.7 ms     the later of the coarse clock, which moves by the tick, and the last
    we make b          b.mtime = …00.0 ms     time in between that it gave to a file of any file system

That second one (the floor of multigrain time stamps, Linux 6.13) is up to a tick ahead of CLOCK_REALTIME_COARSE, and
no clock shows it. Nor would it do to note what the kernel sends us: it sends times when it writes back, and those that
utimensat gives to a file look the same. But each stamp has it. So the kernel stamps a pipe of ours, and we look: 3 µs.

Times are kept as 64-bit nanoseconds: from 1677 to 2262. What is given beyond that becomes the nearest.

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
    """Return a time that is at most a tick before `now`: enough to see whether a day has passed, and 3 µs cheaper."""
    return time.clock_gettime_ns(_COARSE)


@functools.cache
def _pipe() -> int | None:
    """Return the pipe that the kernel stamps for us; None in a sandbox whose kernel does not allow that."""
    reader, writer = os.pipe()
    os.close(writer)
    try:
        os.utime(reader)
    except OSError:
        os.close(reader)
        return None
    return reader


def clamp(time_ns: int) -> int:
    """Return the nearest time that can be kept."""
    return time_ns if _FIRST <= time_ns <= _LAST else max(_FIRST, min(time_ns, _LAST))
