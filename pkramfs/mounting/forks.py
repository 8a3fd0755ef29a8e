# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounts started by a process that has imported their modules: the command's end of daemon/forking.

A kexec starts that process while the old kernel goes and the new one boots. It looks at nothing and touches nothing
until it is told to fork. If it cannot be had, daemons are started one by one.

Kernel: kernel/fork.c
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pkramfs.mounting.starting import ANYTHING, Answer, Expected, Starting, absolute_root, option_string, start

_END_MS = 10_000


class Forks:
    """A process that forks daemons; it ends with the block. Until `begin` there is none."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()
            self._socket = self._process = None

    def begin(self, mounts: Sequence[object]) -> None:
        """Start the process, if there is anything to mount."""
        absolute_root()
        if not mounts or self._socket is not None:
            return
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with theirs:
            self._process = start("mount-daemons", str(theirs.fileno()), fds=[theirs.fileno()])

    def serve(self, mount: Mapping[str, Any], expected: Expected = ANYTHING) -> str:
        """Mount an entry of nvram.json's list; return the daemon's message, or raise MountError with its reason."""
        directory, text = mount["mountpoint"], option_string(mount.get("options", {}))
        if self._socket is not None:
            with contextlib.suppress(ConnectionError, BrokenPipeError):
                forked = Forked(self._socket, self._turn, directory, text, expected)
                return forked.wait()
        return Starting(directory, text).serve(expected)


class Forked(Answer):
    """A daemon that was forked for this command; raises ConnectionError if the forking process is gone."""

    def __init__(self, forks: socket.socket, turn: threading.Lock, directory: str, text: str, expected: Expected):
        super().__init__()
        self._pidfd = -1
        try:
            passed = array.array("i", [self._theirs]).tobytes()
            order = json.dumps([directory, text, json.dumps(expected._asdict())]).encode()
            with turn:
                forks.sendmsg([order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
                told, extra, _, _ = forks.recvmsg(64, socket.CMSG_SPACE(4))
            if not told:
                raise ConnectionResetError
        except BaseException:
            os.close(self._answer)
            raise
        finally:
            os.close(self._theirs)
        self.pid = int(told)
        for _, _, data in extra:
            self._pidfd = array.array("i", data[:4])[0]
            os.set_inheritable(self._pidfd, False)

    def wait(self) -> str:
        """Wait until the daemon serves, and return its message; raise MountError with its reason."""
        try:
            return super().wait()
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)

    def end(self) -> str:
        """Wait until the daemon has ended, kill it if it does not; its status is not known here."""
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(_END_MS):
                self.kill()
        return ""

    def kill(self) -> None:
        """Kill the daemon."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
