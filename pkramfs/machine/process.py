# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process of the machine must not inherit from the shell in which somebody typed mount.

A mount lives for months, and with it whatever its shell had set. As a service that init starts has it:

    limits      root: none on file sizes, processor time, address space and data; others: what they may have
    nice, idle  scheduling and I/O as everybody else, where it was less
    OOM         not sooner killed than others; `oom_score_adj=` is for who wants it later, or never
    signals     none blocked, no child's end unseen, none of those by which one ends a daemon ignored
    umask       022

Where a limit stays that RAM exceeds, whoever is about to use RAM refuses, because it would end in EFBIG, ENOMEM or
SIGXCPU later, in the middle of somebody's data. What is there to narrow a service on purpose stays: the processors
that it may use, its cgroup, a nice value below 0.

Kernel: kernel/sys.c (do_prlimit), fs/proc/base.c (oom_score_adj_write), systemd.exec(5)
"""

import ctypes
import logging
import os
import resource
import signal
import threading

from pkramfs.errors import MachineError, UsageError, explain
from pkramfs.units import GIB, MIB, format_size

log = logging.getLogger(__name__)

_FREE = ("FSIZE", "CPU", "AS", "DATA")
"""Limits that nobody who keeps memory for others can live with."""
_LEAST = {"NOFILE": 4096, "STACK": 8 * MIB, "NPROC": 4096}
_WORDS = {"FSIZE": ("file size", "-f"), "CPU": ("processor time", "-t"), "AS": ("address space", "-v")}
_OWN = GIB
"""Address space beside RAM: Python, numpy, stacks of threads."""
_THREAD_STACK = 2 * MIB
_HEEDED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
_OOM = "/proc/self/oom_score_adj"


def shed() -> None:
    """Put off what was inherited, as far as we may."""
    for name in _FREE:
        _raise(getattr(resource, f"RLIMIT_{name}"), resource.RLIM_INFINITY)
    for name, least in _LEAST.items():
        _raise(getattr(resource, f"RLIMIT_{name}"), least)
    threading.stack_size(_THREAD_STACK)  # else what the limit was when we started
    os.umask(0o022)
    _heed_signals()
    _run_as_others()
    set_oom_score_adj(None)


def _raise(number: int, wanted: int) -> None:
    """Raise a limit to `wanted` or, where that is not allowed, as far as it goes; never lower it."""
    soft, hard = resource.getrlimit(number)
    if _at_least(soft, wanted):
        return
    try:
        resource.setrlimit(number, (wanted, hard if _at_least(hard, wanted) else wanted))
    except (OSError, ValueError):  # raising a hard limit is root's
        resource.setrlimit(number, (hard, hard))


def _at_least(limit: int, wanted: int) -> bool:
    if resource.RLIM_INFINITY in (limit, wanted):
        return limit == resource.RLIM_INFINITY
    return limit >= wanted


def require(ram: int) -> None:
    """Refuse, naming limit and remedy, where a limit that stays would end whoever uses RAM of so many bytes."""
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
    """Scheduling class, nice and I/O priority of an ordinary process, where they are less. Others may not always."""
    try:
        if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK != os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        if os.getpriority(os.PRIO_PROCESS, 0) > 0:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
    except OSError as error:
        log.info("scheduled as it was inherited: %s", explain(error))
    call = _IOPRIO_SET.get(os.uname().machine)
    if call is not None:
        ctypes.CDLL(None).syscall(call, 1, 0, 0)  # IOPRIO_WHO_PROCESS, ourselves, as the nice value says


def set_oom_score_adj(wanted: int | None) -> None:
    """Set oom_score_adj to what is wanted, UsageError if that is refused; else to 0 where it is more, if we may."""
    try:
        with open(_OOM, "r+", encoding="ascii") as file:
            if wanted is None and int(file.read()) <= 0:
                return
            file.seek(0)
            file.write(str(wanted or 0))
    except OSError as error:
        if wanted is not None:
            raise UsageError(f"oom_score_adj={wanted} is refused ({explain(error)}): less than now is root's") from None
        log.info("sooner killed than others, as it was inherited: %s", explain(error))
