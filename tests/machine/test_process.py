# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon does not inherit from a shell."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkramfs.machine import process
from pkramfs.units import GIB

ROOT = os.geteuid() == 0
CAP_SYS_RESOURCE = 1 << 24
MAY_RAISE = ROOT and bool(
    int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16) & CAP_SYS_RESOURCE
)
LIMITS = ("FSIZE", "CPU", "AS", "DATA", "NOFILE", "STACK")
REPORT = """
import json, os, resource, signal
from pkramfs.machine import process
{setup}
process.shed()
{then}
print(json.dumps({{
    **{{name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in {limits}}},
    "nice": os.getpriority(os.PRIO_PROCESS, 0), "policy": os.sched_getscheduler(0),
    "oom": int(open("/proc/self/oom_score_adj").read()), "umask": os.umask(0),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "ignored": [n for n in (1, 2, 15, 17) if signal.getsignal(n) == signal.SIG_IGN],
}}))
"""


def after(setup: str, then: str = "") -> subprocess.CompletedProcess[str]:
    """What a process has that has shed what `setup` did."""
    return subprocess.run(
        [sys.executable, "-c", REPORT.format(limits=LIMITS, setup=setup, then=then)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def found(setup: str, then: str = "") -> dict[str, object]:
    import json

    done = after(setup, then)
    assert done.returncode == 0, done
    return dict(json.loads(done.stdout))


BAD = """
for name, soft, hard in (("FSIZE", 1 << 20, 1 << 20), ("CPU", 20, 20), ("AS", 4 << 30, 8 << 30), ("DATA", 1 << 30, -1),
                         ("NOFILE", 20, 20), ("STACK", 1 << 20, 1 << 20)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (soft, hard))
"""
SOFT = """
for name in ("FSIZE", "CPU", "AS", "DATA", "NOFILE", "STACK"):
    number = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(number)[1]
    least = {"CPU": 30, "NOFILE": 20, "AS": 4 << 30}.get(name, 1 << 20)
    resource.setrlimit(number, (least if hard < 0 else min(hard, least), hard))
"""
ODD = """
os.nice(7)
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
open("/proc/self/oom_score_adj", "w").write("700")
os.umask(0o777)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
for number in (1, 2, 15, 17): signal.signal(number, signal.SIG_IGN)
"""


@pytest.mark.skipif(not MAY_RAISE, reason="raising hard limits needs CAP_SYS_RESOURCE")
def test_root_puts_everything_off() -> None:
    seen = found(BAD + ODD)
    assert [seen[name] for name in ("FSIZE", "CPU", "AS", "DATA")] == [[-1, -1]] * 4
    assert seen["NOFILE"][0] >= 4096 and seen["STACK"][0] >= 8 << 20  # type: ignore[index]
    assert (seen["nice"], seen["policy"], seen["oom"], seen["umask"]) == (0, os.SCHED_OTHER, 0, 0o022)
    assert (seen["blocked"], seen["ignored"]) == ([], [])


@pytest.mark.skipif(not ROOT, reason="a nice value below 0 is root's")
def test_what_is_better_than_needed_stays() -> None:
    seen = found("os.setpriority(os.PRIO_PROCESS, 0, -3)")
    assert seen["nice"] == -3
    for name in LIMITS:
        limits = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        assert seen[name][0] in (-1, *limits) or seen[name][0] > limits[0]  # type: ignore[index]


def test_what_needs_no_privilege() -> None:
    """Soft limits, and what everybody may do for himself."""
    seen = found(ODD.replace("os.nice(7)", "").replace("os.sched", "0 and os.sched") + SOFT)
    assert [seen[name][0] for name in ("FSIZE", "CPU", "AS", "DATA")] == [  # type: ignore[index]
        resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in ("FSIZE", "CPU", "AS", "DATA")
    ]
    assert seen["NOFILE"][0] >= min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])  # type: ignore[index]
    nice = 0 if ROOT else os.getpriority(os.PRIO_PROCESS, 0)  # the suite may run under nice
    assert (seen["nice"], seen["policy"], seen["oom"], seen["umask"]) == (nice, os.SCHED_OTHER, 0, 0o022)
    assert (seen["blocked"], seen["ignored"]) == ([], [])


@pytest.mark.skipif(not ROOT, reason="raising priority is root's")
def test_priority() -> None:
    seen = found(ODD)
    assert (seen["nice"], seen["policy"]) == (0, os.SCHED_OTHER)


def test_a_score_that_is_wanted() -> None:
    assert found("", "process.set_oom_score_adj(300)")["oom"] == 300
    done = after("os.setuid(1234) if os.geteuid() == 0 else 0", "process.set_oom_score_adj(-5)")
    assert done.returncode == 1 and "UsageError: oom_score_adj=-5 is refused" in done.stderr


@pytest.mark.skipif(not ROOT, reason="only root can become somebody else")
def test_others_take_what_they_may_have() -> None:
    seen = found(BAD + ODD + "os.setuid(1234)")
    assert (seen["FSIZE"], seen["AS"], seen["DATA"]) == ([1 << 20] * 2, [8 << 30] * 2, [-1, -1])
    assert (seen["umask"], seen["blocked"], seen["ignored"]) == (0o022, [], [])


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))",
            ("file size is 1.0 MiB", "64.0 GiB", "ulimit -f"),
        ),
        ("resource.setrlimit(resource.RLIMIT_CPU, (500, 500))", ("processor time is 500 s", "ulimit -t")),
        ("resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))", ("address space is 64.0 GiB", "ulimit -v")),
    ],
)
def test_a_limit_that_stays_is_named_with_its_remedy(setup: str, words: tuple[str, ...]) -> None:
    become = "os.setuid(1234)" if ROOT else ""
    then = f"""
try: process.require({64 * GIB})
except process.MachineError as error: raise SystemExit(str(error))
"""
    done = after(f"{setup}\n{become}", then)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done
    for word in words:
        assert word in done.stderr
    assert after(become, then).returncode == 0, "no limit, no refusal"


def test_this_process_is_left_alone() -> None:
    """The module does nothing when it is imported."""
    before = [resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in LIMITS], signal.getsignal(17)
    import pkramfs.machine.process

    assert pkramfs.machine.process.shed
    assert before == (
        [resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in LIMITS],
        signal.getsignal(17),
    )


def test_a_pidfd_tells_whether_a_process_is_our_child() -> None:
    """Also of one that has ended, which is left to be waited for."""
    with subprocess.Popen(["sleep", "600"]) as child:
        pidfd, parent = os.pidfd_open(child.pid), os.pidfd_open(os.getppid())
        assert (process.child(pidfd), process.child(parent)) == (child.pid, -1)
        process.end(pidfd)
        assert process.child(pidfd) == child.pid
        assert child.wait() == -signal.SIGKILL and process.child(pidfd) == -1
    os.close(pidfd)
    os.close(parent)
