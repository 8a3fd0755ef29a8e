# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of the two pipes between a command that mounts and the daemon that it starts.

    command                                            daemon
    Starting(DIR, OPTIONS)   ── fork, exec ──▶         imports its modules, then wait_for_go()
    .serve(expected)         ── "go " + JSON ──▶       looks at the machine, mounts, serves
      returns its message    ◀── one line of JSON ──   Reporter.serving(message) or Reporter.failed(reason)
    .give_up()               ── closes the pipe ──▶    ends without a trace

Importing takes longer than most trees take to be restored, so a daemon may be started before it is told to mount. If
the command dies, the daemon that waits ends. Those of a kexec have a process that forks them: forks.py.

Kernel: pipe(7)
"""

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from pkramfs.mounting import patience
from pkramfs.mounting.helper import FAILURE, USAGE, AnsweredError, MountError
from pkramfs.schema import Invalid, Maybe, Object, Row, Text, Whole, parse

SERVE_SECONDS = 600.0
"""How long a daemon may take until it serves: it may boot, and read the description of a large tree."""
_END_SECONDS = 10.0
_GO = b"go "
_ANSWER_MOST = 1 << 20
"""Bytes of a daemon's answer."""
_ANSWER = Object({}, optional={"ok": Text(), "error": Text(), "status": Whole(0, 255)})
_NUMBER = Whole(0, (1 << 64) - 1)
_EXPECTED = Object({}, optional={"tree": Maybe(_NUMBER), "on": Maybe(Row((_NUMBER, Maybe(_NUMBER))))})

log = logging.getLogger(__name__)


class Expected(NamedTuple):
    """The tree and the directory that a daemon must find when it mounts again; None where any will do."""

    tree: int | None = None
    on: tuple[int, int | None] | None = None
    """Device and inode number of the directory; without the inode number, any directory of the device."""


ANYTHING = Expected()


# -- the command's end ----------------------------------------------------------------------------


class Answer:
    """The end of the pipe on which a daemon says that it serves, or why not."""

    def __init__(self) -> None:
        self._answer, self._theirs = os.pipe()
        self.pid = 0

    def wait(self) -> str:
        """Wait until the daemon serves, and return its message; raise MountError with its reason."""
        line = self._line()
        if not line:
            raise MountError(f"the mount daemon (pid {self.pid}) died{self.end()} before it served")
        answer = self._understand(line)
        if "error" in answer:
            self.end()
            failed = AnsweredError(answer["error"])
            failed.exit_status = USAGE if answer.get("status") else FAILURE
            raise failed
        return str(answer.get("ok", ""))

    def end(self) -> str:
        """Wait until the daemon has ended, kill it if it does not, and return its exit status in words."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill the daemon."""
        raise NotImplementedError

    def _understand(self, line: bytes) -> dict[str, Any]:
        """Parse the daemon's answer: it serves, or why it does not."""
        try:
            return _ANSWER.read(parse(line))
        except Invalid as error:
            raise MountError(f"unexpected answer from the mount daemon (pid {self.pid}): {error}") from None

    def _line(self) -> bytes:
        """Read the daemon's answer; kill the daemon and raise MountError if nothing comes for too long."""
        deadline, line, ready = time.monotonic() + SERVE_SECONDS, b"", select.poll()
        ready.register(self._answer, select.POLLIN)
        try:
            while not line.endswith(b"\n") and len(line) < _ANSWER_MOST:
                if not patience.is_ready(ready, deadline):
                    self.kill()
                    raise MountError(
                        f"the mount daemon (pid {self.pid}) did not serve within {SERVE_SECONDS:g} s and was "
                        "killed; preserved trees stay preserved"
                    )
                part = os.read(self._answer, 1 << 16)
                if not part:
                    break
                line += part
        finally:
            os.close(self._answer)
        return line


class Starting(Answer):
    """A daemon that is being started. It waits for `serve` or `give_up`, and ends if we die before."""

    def __init__(self, directory: str, text: str) -> None:
        super().__init__()
        told, self._go = os.pipe()
        try:
            words = ["mount-daemon", str(self._theirs), directory, text, str(told)]
            self._daemon = start(*words, fds=[self._theirs, told])
        except BaseException:
            os.close(self._answer)
            os.close(self._go)
            raise
        finally:
            os.close(self._theirs)
            os.close(told)
        self.pid = self._daemon.pid

    def serve(self, expected: Expected = ANYTHING) -> str:
        """Let the daemon mount, wait until it serves, and return its message; raise MountError with its reason."""
        with suppress(BrokenPipeError):  # it died already, and the line that it does not send says so
            os.write(self._go, _GO + json.dumps(expected._asdict()).encode())
        os.close(self._go)
        message = self.wait()
        self._daemon.returncode = 0  # it lives on; no warning that it does
        return message

    def end(self) -> str:
        """Wait until the daemon has ended, kill it if it does not, and return its exit status in words."""
        try:
            status = self._daemon.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            status = self._daemon.wait(_END_SECONDS)
        return f" with status {status}"

    def kill(self) -> None:
        """Kill the daemon."""
        self._daemon.kill()

    def give_up(self) -> None:
        """Have the daemon end without a trace."""
        os.close(self._go)
        os.close(self._answer)
        self.end()


def start(*words: str, fds: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Start a process of ours that outlives us, with these descriptors."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pkramfs", *words],
        env=environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        start_new_session=True,
    )


def option_string(options: Mapping[str, Any]) -> str:
    """Return the -o string for the options of a mount's entry."""
    return ",".join(key if value is True else f"{key}={value}" for key, value in options.items() if value is not False)


def environment() -> dict[str, str]:
    """Return the environment in which another process finds this very package."""
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))}


def absolute_root() -> None:
    """Make $PKRAM_ROOT absolute: a daemon works in /."""
    if os.environ.get("PKRAM_ROOT"):
        os.environ["PKRAM_ROOT"] = os.path.abspath(os.environ["PKRAM_ROOT"])


# -- the daemon's end -----------------------------------------------------------------------------


def wait_for_go(fd: int) -> Expected | None:
    """Wait for the command's word to mount; return None if the command died or needs no mount after all."""
    with open(fd, "rb") as pipe:
        _, told, expected = pipe.read().partition(b" ")
    return read_expected(expected) if told else None


def read_expected(text: bytes) -> Expected:
    """Return the directory that a command expects a daemon to find."""
    return Expected(**_EXPECTED.read(parse(text)))


class Reporter:
    """The pipe to the command that started this daemon: one line, once. With -1 no command waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        if fd >= 0:
            os.set_inheritable(fd, False)

    def serving(self, message: str = "") -> None:
        """Report that the mount is served, with a message for the user."""
        self._send({"ok": message})

    def failed(self, reason: str, status: int = 0) -> None:
        """Report why the daemon ends; `status` is not 0 where the options were wrong."""
        self._send({"error": reason, "status": status})

    def _send(self, answer: dict[str, Any]) -> None:
        """Send the line, unless one was sent or the command is gone."""
        if self._fd < 0:
            return
        try:
            os.write(self._fd, json.dumps(answer).encode() + b"\n")
        except BrokenPipeError:
            log.info("the mount command is gone")
        os.close(self._fd)
        self._fd = -1
