# SPDX-License-Identifier: GPL-2.0-or-later
"""A program with a cache: all primes up to a limit, which take a while to find, and are there at once after a kexec.

    python primes.py LIMIT

It uses pkramfs as a library, without a mount: see pkramfs-library(3). `tools/examples/cache` runs it twice.
"""

import sys
import time

import numpy as np

from pkramfs.library import open_machine


def sieve(limit: int) -> np.ndarray:
    """Return all primes up to a limit (Eratosthenes)."""
    prime = np.ones(limit + 1, dtype=bool)
    prime[:2] = False
    for number in range(2, int(limit**0.5) + 1):
        if prime[number]:
            prime[number * number :: number] = False
    return np.flatnonzero(prime)


def main(limit: int) -> None:
    began, name = time.monotonic(), f"primes-{limit}"
    with open_machine() as machine:
        found = machine.load(name)
        if found is None:
            machine.save(name, {"primes": sieve(limit)}, state=b"up to %d" % limit)
            found = machine.load(name)
            how = "cold: computed and preserved"
        else:
            how = "warm: found in memory"
    primes = found["primes"]  # lies in the machine's RAM: nothing was copied
    took, what = time.monotonic() - began, found.state.decode()
    print(f"{how} in {took:.3f} s: {len(primes)} primes {what}, the last is {primes[-1]}")


main(int(sys.argv[1]))
