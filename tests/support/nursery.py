# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that has imported what mount daemons need, and forks those of a whole run.

A Python that starts takes ten times as long as what a mount does then. So the mounts of a kexec are forked by one
process (pkramfs/daemon/forking.py), and those of most tests by this one, in the same way: from the fork on, all that
runs is the product's. What the start itself is about has daemons that start for themselves (Lab.fresh).

    a test                                           this process
    Nursery()              ── fork, exec ──▶         imports
    .child(DIR, OPTIONS)   ── environment ──▶        takes it for its own
                           ── as Forks does ──▶      fork ──▶ holder of one mount

python -P -m tests.support.nursery pkramfs FD
"""

import array
import atexit
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pkramfs.mounting import forks, starting

_MOST = 1 << 17


class Nursery:
    """The test's end."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._turn = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.support.nursery", "pkramfs", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        atexit.register(self.close)

    def child(self, directory: str, text: str, expected: starting.Expected) -> forks.Forked:
        """Have the daemon of a mount forked, in the environment of now."""
        self._socket.send(json.dumps({**os.environ}).encode())
        return forks.Forked(self._socket, self._turn, directory, text, expected)

    def close(self) -> None:
        """Have the process end; whom it has forked goes on."""
        self._socket.close()
        self._process.wait()


@functools.cache
def nursery() -> Nursery:
    """Return the nursery of this process's tests, which is started when the first mount needs it."""
    return Nursery()


class Child:
    """Stands for starting.Starting, of which nobody here sees that it starts before it is told to mount."""

    def __init__(self, directory: str, text: str) -> None:
        self._directory, self._text = directory, text

    def serve(self, expected: starting.Expected = starting.ANYTHING) -> str:
        return nursery().child(self._directory, self._text, expected).wait()


class Children(forks.Forks):
    """Stands for forks.Forks, the process that forks the mounts of a kexec."""

    def begin(self, mounts: Sequence[object]) -> None:
        if mounts:
            starting.absolute_root()

    def serve(self, mount: Mapping[str, Any], expected: starting.Expected = starting.ANYTHING) -> str:
        text = starting.option_string(mount.get("options", {}))
        return nursery().child(mount["mountpoint"], text, expected).wait()


@contextmanager
def forking() -> Iterator[None]:
    """Have the daemons of commands in this process forked by the nursery."""
    with mock.patch.object(starting, "Starting", Child), mock.patch.object(forks, "Forks", Children):
        yield


def main(fd: int) -> None:
    """Fork holders until the test's end of the socket FD is closed."""
    from pkramfs.daemon import code, forking
    from pkramfs.daemon.job import Job
    from pkramfs.machine import process

    process.shed()
    os.set_inheritable(fd, False)
    assert process.threads() == 1
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    code.running()
    gc.freeze()
    with socket.socket(fileno=fd) as test:
        while text := (received := test.recvmsg(_MOST, socket.CMSG_SPACE(4)))[0]:
            if not received[1]:
                os.environ.clear()
                os.environ.update(json.loads(text))
                continue
            answer = array.array("i", received[1][0][2][:4])[0]
            directory, options, expected = json.loads(text)
            job = Job(answer, directory, options, starting.read_expected(expected.encode()))
            if not (pid := os.fork()):
                forking._hold(job, test)
            os.close(answer)
            forking._tell(test, pid)


if __name__ == "__main__":
    main(int(sys.argv[2]))
