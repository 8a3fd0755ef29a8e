# SPDX-License-Identifier: GPL-2.0-or-later
"""Process attributes that a daemon must not inherit from the shell in which mount was typed.

A mount lives for months, and would keep all settings of its shell. `shed` sets the values of a service of init:

    limits      root: none on file size, processor time, address space and data; others: their hard limits
    nice, idle  ordinary scheduling and I/O priority, if they were lower
    OOM         not killed sooner than others; the mount option `oom_score_adj=` makes it later, or never
    signals     none blocked; SIGCHLD and the signals that end a daemon not ignored
    umask       022

If a limit stays that RAM exceeds, `require` refuses to use RAM: the daemon would meet EFBIG, ENOMEM or SIGXCPU later,
in the middle of a write. Settings that narrow a service on purpose stay: its processors, its cgroup, a nice value
below 0.

Kernel: kernel/sys.c (do_prlimit), fs/proc/base.c (oom_score_adj_write), systemd.exec(5)
"""

import contextlib
import ctypes
import logging
import os
import resource
import select
import signal
import threading

from pkramfs.errors import MachineError, UsageError, explain
from pkramfs.units import GIB, MIB, format_size

log = logging.getLogger(__name__)

_FREE = ("FSIZE", "CPU", "AS", "DATA")
"""Limits that a process which keeps memory for others must not have."""
_LEAST = {"NOFILE": 4096, "STACK": 8 * MIB, "NPROC": 4096}
_WORDS = {"FSIZE": ("file size", "-f"), "CPU": ("processor time", "-t"), "AS": ("address space", "-v")}
_OWN = GIB
"""Bytes of address space beside RAM: Python, numpy, stacks of threads."""
_THREAD_STACK = 2 * MIB
_HEEDED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
_OOM = "/proc/self/oom_score_adj"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def shed() -> None:
    """Reset inherited attributes, as far as this process may."""
    for name in _FREE:
        _raise(getattr(resource, f"RLIMIT_{name}"), resource.RLIM_INFINITY)
    for name, least in _LEAST.items():
        _raise(getattr(resource, f"RLIMIT_{name}"), least)
    threading.stack_size(_THREAD_STACK)  # the default is the stack limit of our start
    os.umask(0o022)
    _heed_signals()
    _run_as_others()
    set_oom_score_adj(None)


def threads() -> int:
    """Return the number of threads of this process; with several it must not fork."""
    return len(os.listdir("/proc/self/task"))


def die_with_parent(*, no: bool = False) -> None:
    """Make the kernel kill this process when its parent dies; `no` takes that back."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0 if no else signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of those whose parents, started by this process, die before them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def name(text: str) -> str:
    """Set the name by which ps shows this process (15 characters); return the one before."""
    with open("/proc/self/comm", "r+", encoding="utf-8") as file:
        before = file.read().strip()
        file.seek(0)
        file.write(text)
    return before


def children(pid: int) -> list[int]:
    """Return the children of a process with one thread; none where the kernel does not tell, or it has ended."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:  # CONFIG_PROC_CHILDREN
        return []


def child(pidfd: int) -> int:
    """Return the pid of a child of ours, -1 if the process is another's child."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return -1
    return pid(pidfd)


def pid(pidfd: int) -> int:
    """Return the pid of a process, -1 if somebody has waited for its end already."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def end(pidfd: int) -> None:
    """Kill a process, if it has not ended, and wait until it has."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()


def _raise(number: int, wanted: int) -> None:
    """Raise a limit to `wanted`, or as far as is allowed; never lower it."""
    soft, hard = resource.getrlimit(number)
    if _at_least(soft, wanted):
        return
    try:
        resource.setrlimit(number, (wanted, hard if _at_least(hard, wanted) else wanted))
    except (OSError, ValueError):  # only root may raise a hard limit
        resource.setrlimit(number, (hard, hard))


def _at_least(limit: int, wanted: int) -> bool:
    if resource.RLIM_INFINITY in (limit, wanted):
        return limit == resource.RLIM_INFINITY
    return limit >= wanted


def require(ram: int) -> None:
    """Raise MachineError, naming limit and remedy, if a limit would end a process that uses `ram` bytes of RAM."""
    for name, needed in (("FSIZE", ram), ("AS", ram + _OWN), ("CPU", resource.RLIM_INFINITY)):
        limit = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]
        if _at_least(limit, needed):
            continue
        what, flag = _WORDS[name]
        has = f"{limit} s" if name == "CPU" else format_size(limit)
        wants = "a mount has no end" if name == "CPU" else f"RAM needs {format_size(needed)}"
        raise MachineError(
            f"the limit of {what} is {has}, but {wants}: raise it (ulimit {flag} unlimited; /etc/security/limits.conf)"
        )


def _heed_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in _HEEDED:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _run_as_others() -> None:
    """Give this process ordinary scheduling, nice value and I/O priority, if they are lower; not everybody may."""
    try:
        if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK != os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
    except OSError as error:
        log.info("scheduling stays as inherited: %s", explain(error))
    call = _IOPRIO_SET.get(os.uname().machine)
    if call is not None:
        ctypes.CDLL(None).syscall(call, 1, 0, 0)  # IOPRIO_WHO_PROCESS, ourselves, as the nice value says


def set_oom_score_adj(wanted: int | None) -> None:
    """Set oom_score_adj to `wanted`, or raise UsageError; without it, lower a positive value to 0 if we may."""
    try:
        with open(_OOM, "r+", encoding="ascii") as file:
            if wanted is None and int(file.read()) <= 0:
                return
            file.seek(0)
            file.write(str(wanted or 0))
    except OSError as error:
        if wanted is not None:
            raise UsageError(f"oom_score_adj={wanted} is refused ({explain(error)}): only root may lower it") from None
        log.info("oom_score_adj stays as inherited: %s", explain(error))
