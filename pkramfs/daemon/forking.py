# SPDX-License-Identifier: GPL-2.0-or-later
"""The mounts of a kexec, started by one process: `python -m pkramfs mount-daemons FD`.

    command                                          this process
    Forks()             ── fork, exec ──▶            imports all that a daemon needs, once
    .start(DIR, OPTIONS)                             reads nothing
    .serve(expected)    ── JSON, a pipe ──▶          fork ──▶ holder of one mount, which answers through the pipe
                        ◀── pid, pidfd ──
    .give_up()          ── closes the socket ──▶     ends; forked holders stay

Starting Python takes ten times as long as mounting. With a process for each of many mounts, each would wait for the
imports of the others. Each mount also reads the page tables of all preserved trees, whose memory it must not lease:
this process reads them once, before it forks, and its children only compare checksums.

Kernel: kernel/fork.c (copy_process)
"""

import array
import contextlib
import gc
import json
import os
import signal
import socket
from collections.abc import Sequence

from pkramfs.daemon import code, holder
from pkramfs.daemon.job import Job
from pkramfs.errors import PkramfsError
from pkramfs.kernel import nvram
from pkramfs.kernel.running import look
from pkramfs.machine import process
from pkramfs.machine.directory import Machine
from pkramfs.mounting.options import parse
from pkramfs.mounting.starting import read_expected

_MOST = 1 << 17


def main(argv: Sequence[str]) -> int:
    """Fork holders until the command closes its end of the socket FD."""
    (fd,) = argv
    os.set_inheritable(int(fd), False)
    if process.threads() > 1:
        return 1
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # their exit status is not needed
    code.running()
    gc.freeze()
    looked = False
    with socket.socket(fileno=int(fd)) as command:
        while (order := _next(command)) is not None:
            answer, directory, text, expected = order
            if not looked:
                looked = _look_ahead(text)
            job = Job(answer, directory, text, read_expected(expected.encode()))
            if not (pid := os.fork()):
                _hold(job, command)
            os.close(answer)
            _tell(command, pid)
    return 0


def _next(command: socket.socket) -> tuple[int, str, str, str] | None:
    """Return the descriptor for the answer, directory, options, and the expected directory; None at the end."""
    text, extra, _, _ = command.recvmsg(_MOST, socket.CMSG_SPACE(4))
    if not text:
        return None
    answer = array.array("i", extra[0][2][:4])[0]
    directory, options, expected = json.loads(text)
    return answer, directory, options, expected


def _look_ahead(text: str) -> bool:
    """Read what all mounts will read; what cannot be read they report. Return True."""
    with contextlib.suppress(PkramfsError, OSError):
        machine = Machine.locate(parse(text).machine)
        nvram.read(machine)
        look(machine).ownership.guarded()
    return True


def _hold(job: Job, command: socket.socket) -> None:
    """Be the holder of one mount; never return."""
    status = 1
    try:
        command.close()
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.set_inheritable(job.fd, False)
        status = holder.run(job)
    finally:
        os._exit(status)


def _tell(command: socket.socket, pid: int) -> None:
    """Tell the command the pid of the forked holder, with a pidfd unless it has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        command.send(b"%d" % pid)
        return
    passed = array.array("i", [pidfd]).tobytes()
    command.sendmsg([b"%d" % pid], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
    os.close(pidfd)
