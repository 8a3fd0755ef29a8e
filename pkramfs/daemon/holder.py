# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that holds a mount: it outlives daemons, and starts a new one when one dies.

    mount.pkramfs ──starts──▶ holder ──fork──▶ daemon        builds the tree, mounts, serves
                                │  ◀─ device, lock ─┘
                                │                 ✗          dies, of whatever
                                └──fork──▶ daemon            recovers the tree, has the kernel send again what it
                                                             did not answer, and goes on

The kernel ends a mount when the last descriptor of its connection is closed. The holder has one, so that programs
that use the mount wait a moment and go on, with their open files, locks, maps and working directories. It does
nothing else, has one thread, and has imported all that a daemon needs. So the next daemon starts at once, and shares
this memory.

    the daemon ends             the holder
    -------------------------------------------------------------------------------------------
    in order (0)                ends
    before it serves            ends with the same status: the command says why
    of a signal we passed on    ends, as with FINAL: it was told to end and did not serve yet
    FINAL                       ends: no other daemon would do better. Programs get ENOTCONN, the tree stays in RAM
    on trial, whatever of       ends, if the code before can take the mount back (trial.py)
    HANDED_OVER                 starts another: the code on disk, which it has become while that daemon served
    CROSSED                     becomes the code on disk (execve), unless it runs that already, and starts another
    otherwise                   starts another: at once, then after longer and longer (PAUSES)
    more than DEATHS in WITHIN  ends, as with FINAL

Deaths by the daemon's own fault count, and all deaths before it was *well*, that is, before it came to a request that
the dead daemons had not read. Kills from outside (SIGKILL, also by the OOM killer) of daemons that are well do not
count. After POISON_DEATHS, requests that the dead daemons did not answer are refused with EIO: one of them may be the
cause.

A holder may die, too. Its daemon notices this, and starts a new holder. That one has not forked the daemon and can only
watch it: by a pidfd, and by the message that a daemon sends when it leaves. A holder starts a daemon only after the one
before has ended, and is started only after the holder before has ended. So there are never two daemons for a tree.

For an upgrade the daemon first asks its holder to run the code on disk (execve), which takes most of the time, and
serves meanwhile. The new code of the holder knows the daemon by a pidfd, like a holder that has not forked it.

A mount without a name has no journal, and one with fuse=pyfuse3 cannot tell whether a request was done: they have no
holder and end with their daemon.

Kernel: fs/fuse/dev.c (fuse_dev_release, fuse_chan_resend), include/uapi/linux/fuse.h (FUSE_NOTIFY_RESEND)
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence

from pkramfs.daemon import code, leash, serving, trial
from pkramfs.daemon.job import CROSSED, FINAL, HANDED_OVER, Held, Job, words
from pkramfs.daemon.leash import Leash, Said
from pkramfs.daemon.standby import STALE, Second
from pkramfs.errors import PkramfsError, explain
from pkramfs.journal.layout import read_live
from pkramfs.kernel.running import look
from pkramfs.machine import process
from pkramfs.machine.directory import Machine
from pkramfs.mounting.options import parse
from pkramfs.mounting.starting import ANYTHING

PAUSES = (0.0, 0.1, 0.5, 1.0, 2.0)
"""Seconds before the next daemon is started, after one death, two, …"""
DEATHS, WITHIN = 5, 60.0
"""How many deaths in how many seconds may be."""
POISON_DEATHS = 3
"""How many of them make what was not answered suspect."""
_UNKNOWN = 1
"""The status of a daemon that we have not forked, and that has not said with which it leaves."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mount: FD for the answer, mount point, options, FD to read GO from."""
    job = serving.read_job(argv)
    return 0 if job is None else run(job)


def run(job: Job) -> int:
    """Run one mount in this process, with a holder if it is to have one."""
    return Holder(job).run() if _is_held(job.text) else serving.serve(job)


def _is_held(text: str) -> bool:
    """Return True if a mount with these options is to outlive its daemon. Wrong options are the daemon's to refuse."""
    try:
        options = parse(text)
    except PkramfsError:
        return False
    return options.name is not None and options.fuse != "pyfuse3" and process.threads() == 1


def _has_standby(text: str) -> bool:
    """Return True if a mount with these options is to have a standby."""
    try:
        return parse(text).standby
    except PkramfsError:
        return False


def again(argv: Sequence[str]) -> int:
    """Go on with a mount: mount point, options, device, lock, facts; then, if there are, the file of users (or -1), and
    the pidfd and the socket of a daemon that serves."""
    mountpoint, text, device, lock, facts, *more = argv
    users, *daemon = map(int, more or ["-1"])
    for fd in (int(device), int(lock), users, *daemon):
        if fd >= 0:
            os.set_inheritable(fd, False)
    holder = Holder(Job(-1, mountpoint, text, ANYTHING))
    holder.held = Held(int(device), int(lock), json.loads(facts), False, users)
    if reserve := holder.held.facts.pop("reserve", None):
        holder.held.facts.pop("went_back", None)
        holder.be_tried(trial.Trial(*reserve))
    if daemon:
        holder.adopt(*daemon)
    return holder.run()


class Holder:
    """The holder of one mount."""

    def __init__(self, job: Job) -> None:
        self._job = job
        code.running()
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: self._forward(number))
        self.held: Held | None = None
        self._ours: socket.socket | None = None
        self._pidfd = self._child = self._shadow = -1
        self._passed = 0
        self._renewed = False
        """True if this is the code that was on disk when a daemon was about to leave."""
        self._left: int | None = None
        """The status with which a daemon has said to leave."""
        self._well = True
        self._second = Second(wanted=_has_standby(job.text))
        self._trial = trial.Trial()
        self._went_back = False
        """True if the code on disk has failed, and was not tried again since."""
        self._deaths: deque[float] = deque(maxlen=DEATHS + 1)

    def run(self) -> int:
        """Start daemons until one ends the mount, or no other would help; return the exit status."""
        gc.freeze()
        process.adopt_orphans()
        while True:
            if self._pidfd < 0:
                self._start()
            status = self._live()
            self._end_shadow()
            if self.held is None or status == 0:
                self._second.end()
                self._trial.over()
                return status if status >= 0 else 128 - status
            if status == STALE:  # nothing has happened
                continue
            facts = self.held.facts
            self.held = self.held._replace(facts=facts | {"taken": facts.get("taken", 0) + 1})
            if status in (HANDED_OVER, CROSSED):
                self._second.end()
                self._make_room(self.held, status)
                continue
            self._try_no_longer(self.held, status)
            if self._is_hopeless(status):
                self._second.end()
                return 1
            time.sleep(PAUSES[min(self._recent(), len(PAUSES) - 1)] if not self._well else 0)
            self._well = False

    def adopt(self, pidfd: int, end: int) -> None:
        """Hold the mount of a daemon that serves and whose holder has died, or was older code in this process."""
        self._pidfd, self._ours = pidfd, socket.socket(fileno=end)
        self._child = process.child(pidfd)
        self._renewed = self._child > 0 or self._trial.runs
        Leash(self._ours, 0).well()  # it waits for that

    def be_tried(self, reserve: trial.Trial) -> None:
        """Be new code, which another process may end, to go on with the code before."""
        assert self.held is not None
        self._trial, self.held = reserve, self.held._replace(trial=reserve.fd)
        self._trial.hello()

    def _start(self) -> None:
        """Have the standby take over, or fork a daemon."""
        self._trial.began = True
        if self._second.ready and self.held is not None:
            self._child, self._pidfd, self._ours = self._second.give()
            Leash(self._ours, 0).go(self.held.facts, suspect=self.held.suspect)
            return
        self._second.end()  # it would only compete
        pid, self._ours = self._fork(standby=False)
        self._child, self._pidfd = pid, os.pidfd_open(pid)

    def _fork(self, *, standby: bool) -> tuple[int, socket.socket]:
        """Fork a daemon, or one that stands by; return its pid, and our end of the socket to it."""
        ours, theirs = leash.pair()
        holder = os.getpid()
        pid = os.fork()
        if pid:
            theirs.close()
            return pid, ours
        status = 1
        try:
            ours.close()
            for number in _FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            given = Leash(theirs, holder)
            given.on_trial = self.held is not None and self.held.trial >= 0
            if self.held is None or given.on_trial:
                process.die_with_parent()  # who gives up waiting for us kills our parent
            if not given.on_trial or os.getppid() == holder:
                status = serving.serve(self._job, given, self.held, standby=standby)
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(status)

    def _live(self) -> int:
        """Wait until a daemon has ended, take what it gives us; return its status, or minus a signal's number."""
        assert self._ours is not None
        self._left = None
        talks = True
        while self._pidfd not in (ready := self._wait([self._ours.fileno()] * talks)):
            if self._ours.fileno() in ready and not self._receive():
                talks = False  # it has closed its end, and will have ended soon
            self._second.hear(ready)
            if self.held is not None and self._second.is_due:
                self._second.began(*self._fork(standby=True))
        while self._receive():
            pass
        os.close(self._pidfd)
        self._ours.close()
        child, self._child, self._pidfd = self._child, -1, -1
        if child > 0:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return _UNKNOWN if self._left is None else self._left

    def _wait(self, others: list[int]) -> set[int]:
        """Wait for the daemon's end, for what it says, and for its standby; return the descriptors that say so."""
        poll = select.poll()
        for fd in (self._pidfd, *others, *self._second.watched):
            poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(self._second.patience)}

    def _receive(self) -> bool:
        """Take what a daemon says, if it does."""
        assert self._ours is not None
        said = leash.receive(self._ours)
        if said is None:
            return False
        if said.say == leash.WELL:
            self._well = True
        elif said.say == leash.ENDS:
            self._let_go()
        elif said.say == leash.RENEW and self.held is not None:
            self._renew(self.held, said.facts.get("patience", trial.LEAST_SECONDS))
        elif said.say == leash.PROVEN and self.held is not None:
            self._end_trial()
            self._log(f"pkramfs: the code on disk has served under {self.held.facts['name']}: the code before it ends")
        elif said.say == leash.LEAVES:
            self._left = said.status
        elif said.say == leash.ALONE:
            self._second.allowed = not said.status and _has_standby(self._job.text)
            if said.status:
                self._second.end()
        else:
            self._take(said)
        return True

    def _take(self, said: Said) -> None:
        """Take descriptors and facts."""
        held = self.held
        if said.say == leash.HELD and len(said.descriptors) == 2:
            if held is None:
                os.close(self._job.fd)  # the daemon answers the command
            else:
                _close(held)
            device, lock = said.descriptors
            self.held = Held(device, lock, said.facts, False, trial=self._trial.fd)
            self._second.allowed = _has_standby(self._job.text)
        elif said.say == leash.FACTS and held is not None:
            _close_file(held.users)
            self.held = held._replace(facts=said.facts, users=-1)
        elif said.say == leash.CROSSES and held is not None and len(said.descriptors) == 1:
            _close_file(held.users)
            self.held = held._replace(users=said.descriptors[0])
        elif said.say == leash.SHADOW and len(said.descriptors) == 1:
            _close_file(self._shadow)
            self._shadow = said.descriptors[0]

    def _let_go(self) -> None:
        """Close the connection: its end is the daemon's to give, in order."""
        self._trial.over()
        if self.held is not None:
            os.close(self.held.device)
            self.held = None

    def _forward(self, number: int) -> None:
        """Pass a signal on to the daemon; without one, end, and leave the tree to who mounts it again."""
        if self._pidfd < 0:
            os._exit(128 + number)
        self._passed = number
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _make_room(self, held: Held, status: int) -> None:
        """Go on as the code on disk, which forks the next daemon.

        Who has become that for this need not again; nor for a kexec, if the code is the same: what runs is then there
        at once. Who has just gone back from it does not.
        """
        if self._trial.began:
            self._end_trial()
        if (status == HANDED_OVER and self._went_back) or self._trial.runs:
            return
        if not ((status == CROSSED or self._renewed) and code.fingerprint() == code.running()):
            self._become_new_code(held)
        self._renewed = False

    def _renew(self, held: Held, patience: float) -> None:
        """Become the code on disk under a daemon that serves; in the process that is left behind, go on if it fails."""
        self._second.end()
        self._end_trial()
        assert self._ours is not None
        facts = held.facts
        try:
            found = trial.keep(self._pidfd, patience, lambda: self._unreadable(held))
            if isinstance(found, trial.Failed):
                self._take_back(held, found)
                return
            facts = facts | {"reserve": found}
        except OSError as error:
            self._log(f"pkramfs: {facts['name']} gets the code on disk without a way back: {explain(error)}")
        self._become_new_code(held._replace(facts=facts), self._pidfd, self._ours.fileno())

    def _unreadable(self, held: Held) -> str:
        """Return why this code cannot read the log that newer code leaves, and say so; nothing if it can."""
        try:
            read_live(look(Machine.locate(parse(self._job.text).machine)).ram, held.facts["live"])
        except (PkramfsError, OSError) as error:
            self._log(f"pkramfs: no way back to the code before under {held.facts['name']}: {error}")
            return str(error)
        return ""

    def _take_back(self, held: Held, failed: trial.Failed) -> None:
        """Hold the mount again after code that has failed; its daemon may be there still."""
        assert self._ours is not None
        for number in _FORWARDED:
            signal.signal(number, lambda number, _: self._forward(number))
        process.adopt_orphans()
        self._child, self._went_back = -1, True
        name, facts = held.facts["name"], held.facts
        if failed.serves:
            pidfd = os.pidfd_open(os.getpid())
            Leash(self._ours, 0).back(pidfd)
            os.close(pidfd)
        else:
            self._left = HANDED_OVER
            self.held = held._replace(facts=facts | {"went_back": failed.why, "taken": facts.get("taken", 0) + 1})
        self._log(f"pkramfs: the code on disk has failed under {name} ({failed.why}): the code before goes on")

    def _end_trial(self) -> None:
        """Let go of the code before."""
        self._trial.over()
        if self.held is not None:
            self.held = self.held._replace(trial=-1)

    def _try_no_longer(self, held: Held, status: int) -> None:
        """Have the code before take the mount back, which ends us, if we are on trial; return if it does not."""
        if not self._trial.began:
            return  # it was the daemon before
        if not self._trial.runs or status == -self._passed or (status < 0 and serving.panics(self._job, -status)):
            self._end_trial()
            return
        self._second.end()
        self._log(f"pkramfs: the daemon of {held.facts['name']} {_how(status)}, on trial")
        self._trial.failed(f"its daemon {_how(status)} before it had served")
        self._end_trial()

    def _become_new_code(self, held: Held, *daemon: int) -> None:
        """Become another holder in this process, with its daemon if there is one."""
        for fd in (held.device, held.lock, held.users, *daemon):
            if fd >= 0:
                os.set_inheritable(fd, True)
        os.execv(sys.executable, words(self._job, held, *daemon))

    def _recent(self) -> int:
        """Return how many deaths count."""
        return sum(1 for when in self._deaths if when > time.monotonic() - WITHIN)

    def _is_hopeless(self, status: int) -> bool:
        """Note a death; return True if no other daemon is to be started, and say so."""
        assert self.held is not None
        if not self._well or status != -signal.SIGKILL:
            self._deaths.append(time.monotonic())
        self.held = self.held._replace(suspect=self._recent() >= POISON_DEATHS)
        often = self._recent() > DEATHS
        hopeless = status in (FINAL, -self._passed) or often or (status < 0 and serving.panics(self._job, -status))
        why = f": {DEATHS + 1} deaths in {WITHIN:g} s are too many" if often else ""
        then = f", and none takes over{why}: mount it again" if hopeless else ", another takes over"
        self._log(f"pkramfs: the daemon of {self.held.facts['name']} {_how(status)}{then}")
        return hopeless

    def _end_shadow(self) -> None:
        """Kill who makes a checkpoint for a daemon that has ended, and wait for that: its frames are free now."""
        if self._shadow >= 0:
            process.end(self._shadow)
            self._shadow = _close_file(self._shadow)
        with contextlib.suppress(ChildProcessError):  # we are the parent of all whom it has left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _log(self, line: str) -> None:
        with contextlib.suppress(PkramfsError):
            Machine.locate(parse(self._job.text).machine).log(line)


def _how(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _close(held: Held) -> None:
    os.close(held.device)
    os.close(held.lock)
    _close_file(held.users)


def _close_file(fd: int) -> int:
    """Close a descriptor, if it is one; return what stands for none."""
    if fd >= 0:
        os.close(fd)
    return -1
