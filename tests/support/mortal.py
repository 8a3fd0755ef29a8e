# SPDX-License-Identifier: GPL-2.0-or-later
"""Daemons under a holder that kill themselves where a test wants, or in other ways are not as others."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.lab import REPOSITORY

MORTAL = """
import os, signal, sys
from pkramfs.daemon import holder
from pkramfs.fs import journal
from pkramfs.fuse import again, filter as module

orders, extra = sys.argv.pop(1), sys.argv.pop(1)
Filter, now = module.Filter, [0]

def die(when):
    try:
        with open(orders) as file:
            first, *others = file.read().splitlines()
    except FileNotFoundError:
        return
    if first != f"{now[0]} {when}":
        return
    if others:
        with open(orders + ".new", "w") as file:
            file.write("\\n".join(others))
        os.rename(orders + ".new", orders)
    else:
        os.unlink(orders)
    os.kill(os.getpid(), signal.SIGKILL)

def noted(self, header, body, work=Filter.answer):
    now[0] = header[1]
    work(self, header, body)

def dying(name, before=None, after=None):
    work = getattr(Filter, name)
    def mortal(self, *args, **named):
        if before:
            die(before)
        found = work(self, *args, **named)
        if after:
            die(after)
        return found
    setattr(Filter, name, mortal)

def made(self, *args, work=Filter.__init__):
    work(self, *args)
    commit = self._commit
    def mortal(number):
        die("before")
        commit(number)
        die("after")
    self._commit = mortal

Filter.answer = noted
Filter.__init__ = made
dying("_reply", after="replied")
dying("_reply_error", after="replied")
dying("resume", "resume", "resent")
exec(extra)
sys.exit(holder.main())
"""
"""A daemon that reads from a file of what it dies next: the number of an opcode, and when."""


class Held:
    """A mount as pkram=one whose daemons are mortal."""

    def __init__(self, lab: Any, directory: Path, extra: str = "", options: str = "pkram=one") -> None:
        self.lab, self.directory, self.orders = lab, directory, lab.root / "orders"
        ours, theirs = os.pipe()
        words = [sys.executable, "-c", MORTAL, str(self.orders), extra, str(theirs), str(directory), options]
        with open(lab.root / "daemon.log", "ab") as log:
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OPENBLAS_NUM_THREADS": "1"}
            self.process = subprocess.Popen(words, pass_fds=[theirs], env=environment, stderr=log, cwd="/")
        os.close(theirs)
        with open(ours) as pipe:
            assert json.loads(pipe.readline()) == {"ok": ""}

    def die(self, *orders: tuple[int, str]) -> None:
        """Have the daemon die at one point, and the next ones at the others."""
        new = self.orders.with_suffix(".test")
        new.write_text("\n".join(f"{number} {when}" for number, when in orders))
        new.rename(self.orders)

    @property
    def died(self) -> bool:
        """Whether all orders were carried out."""
        return not self.orders.exists()

    @property
    def pid(self) -> int:
        """The daemon, of which there may be another soon."""
        return int(self.lab.entry(self.directory).pid)

    def end(self, seconds: float = 60) -> int:
        """Unmount; return the holder's exit status."""
        self.lab.umount(self.directory)
        return self.process.wait(seconds)


@contextlib.contextmanager
def held(lab: Any, name: str = "one", extra: str = "", options: str = "pkram=one") -> Iterator[Held]:
    """A mount with mortal daemons, which is unmounted in order."""
    made = Held(lab, lab.dir(name), extra, options)
    try:
        yield made
        assert made.end() == 0
    except BaseException:
        print("\n".join(lab.dmesg().splitlines()[-5:]), (lab.root / "daemon.log").read_text())
        for log in lab.files.glob("mounts/*.log"):
            print(log.read_text())
        raise
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()


def shadows(daemon: int) -> list[int]:
    """Who makes a checkpoint for a daemon just now."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{daemon}/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found
