"""The clock of files: the kernel's own, which moves by the tick.

With the writeback cache the kernel stamps writes, by its coarse clock; here everything else is stamped.
If the two read different clocks, a file that is written at once after its creation would look older
than its name, by up to a tick.

Kernel: fs/inode.c (current_time), kernel/time/timekeeping.c (ktime_get_coarse_real_ts64)
"""

import time

_COARSE = getattr(time, "CLOCK_REALTIME_COARSE", 5)  # not named by Python


def now() -> int:
    """Nanoseconds since the epoch, as of the last tick."""
    return time.clock_gettime_ns(_COARSE)
