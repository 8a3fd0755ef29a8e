"""The clock of files: the kernel's own, which moves by the tick.

With the writeback cache the kernel stamps writes, by its coarse clock; here everything else is stamped.
If the two read different clocks, a file that is written at once after its creation would look older
than its name, by up to a tick.

Times are kept as 64-bit nanoseconds: from 1677 to 2262. What is given beyond that becomes the nearest.

Kernel: fs/inode.c (current_time, timestamp_truncate), kernel/time/timekeeping.c (ktime_get_coarse_real_ts64)
"""

import time

_COARSE = getattr(time, "CLOCK_REALTIME_COARSE", 5)  # not named by Python
_FIRST, _LAST = -(1 << 63), (1 << 63) - 1


def now() -> int:
    """Nanoseconds since the epoch, as of the last tick."""
    return time.clock_gettime_ns(_COARSE)


def clamp(time_ns: int) -> int:
    """The nearest time that can be kept."""
    return time_ns if _FIRST <= time_ns <= _LAST else max(_FIRST, min(time_ns, _LAST))
