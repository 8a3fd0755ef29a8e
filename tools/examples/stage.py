# SPDX-License-Identifier: GPL-2.0-or-later
"""What the examples share: a machine of their own, commands shown as they are typed, times side by side, an end.

A script says in a function `walk(stage, args)` what is done, and ends with `play(walk, …)`. Whatever happens, also at
Ctrl-C, the programs that it started are ended, its mount is taken down, its machine removed; the last line is OK, or
FAIL with the reason. Status 0 or 1, 2 for wrong usage, 77 where something is missing.

With --kill-daemons the daemon of the mount is killed again and again while the programs work: another takes its place
(Linux 6.9), and they notice nothing but a pause.

Nothing is installed or left behind. As root the programs run as the user nobody; without root as you, and fusermount3
mounts.
"""

import argparse
import contextlib
import glob
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
CANNOT = 77
SECONDS = 120.0
"""What anything may take; only a hang takes so long."""
Option = tuple[str, int, str]
"""An option of a script: its name, the default (False for a switch), what it means."""


class Failure(Exception):
    """Something went otherwise than it should; one line."""


class MissingError(Exception):
    """Something that an example needs is not to be had here."""


class Stage:
    """The place where a walk happens: a machine, a mount, a scratch directory on no mount of ours."""

    def __init__(self, name: str, *, kill_daemons: bool) -> None:
        self.name = name
        self.top = Path(tempfile.mkdtemp(prefix=f"pkram-{name}-", dir=_memory()))
        self.top.chmod(0o755)
        self.mnt, self.scratch, self.machines = (self.top / part for part in ("mnt", "scratch", "machines"))
        for path in (self.mnt, self.scratch):
            path.mkdir()
        os.environ["PKRAM_ROOT"] = str(self.machines)
        self.killer = Killer(self.machines if kill_daemons else None)
        self.root = os.geteuid() == 0
        self.programs: list[subprocess.Popen[bytes]] = []
        self.times: list[tuple[str, float, str]] = []
        self.at_end: list[Callable[[], object]] = []
        """What else is to be done when everything is taken down."""
        if self.root:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self.scratch, nobody.pw_uid, nobody.pw_gid)
        else:
            self._user = {}
        self.say(f"DIR={self.top}; machines: PKRAM_ROOT=$DIR/machines")

    # -- what is typed ---------------------------------------------------------------------------

    def say(self, text: str) -> None:
        print(text, flush=True)

    def title(self, text: str) -> None:
        self.say(f"\n{text}")

    def sh(self, command: str, *, ours: bool = False) -> str:
        """Type a command, show what it answers, and return that; `ours` for those of pkramfs and for root's."""
        self._show("#" if self.root and ours else "$", command)
        began = time.monotonic()
        done = self._run(command, ours)
        for line in done.splitlines():
            self._show(" ", line)
        if (took := time.monotonic() - began) > 0.1:
            self.say(f"  ({took:.2f} s)")
        return done

    def _show(self, before: str, text: str) -> None:
        """Show a line, with $DIR for the long name of the directory."""
        self.say(f"{before} {text.replace(str(self.top), '$DIR')}")

    def quiet(self, command: str) -> str:
        """Run a program's command and return what it answers, without showing it."""
        return self._run(command, ours=False)

    def _run(self, command: str, ours: bool) -> str:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.scratch,
            timeout=SECONDS,
            check=False,
            **({} if ours else self._user),  # type: ignore[call-overload]
        )
        if done.returncode:
            raise Failure(f"status {done.returncode} of {command}: {done.stdout.strip()[-2000:]}")
        return done.stdout

    def mount(self, *options: str) -> None:
        words = ",".join([f"pkram={self.name}", *options, "mode=1777"])
        self.sh(f"mount.pkramfs none {self.mnt} -o {words}", ours=True)
        self.killer.resume()

    def kexec(self, *, preserve: bool = True) -> None:
        """Preserve the tree, load a kernel and boot it."""
        self.killer.pause()
        if preserve:
            self.sh(f"mount.pkramfs none {self.mnt} -o remount,preserve,ro", ours=True)
        self.sh("pkram-kexec -s -l builtin --reuse-cmdline", ours=True)
        self.sh("pkram-kexec -e --poison", ours=True)
        self.killer.resume()

    # -- programs --------------------------------------------------------------------------------

    def start(self, command: str, log: str = "log", **how: object) -> "subprocess.Popen[bytes]":
        """Start a program in the background, with its messages in a file of the scratch directory."""
        self._show("$", f"{command} &")
        with open(self.scratch / log, "ab") as output:
            how = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output} | self._user | how
            program = subprocess.Popen(shlex.split(command), cwd=self.scratch, **how)  # type: ignore[call-overload]
        self.programs.append(program)
        return program

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait, with a deadline, until a condition holds; or fail, with what the programs said last."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise Failure(f"{what}: not within {SECONDS:.0f} s; {self.last_words()}")
            time.sleep(0.005)

    def last_words(self) -> str:
        logs = [path for path in self.scratch.glob("log*") if path.is_file()]
        return " / ".join(f"{path.name}: {path.read_text(errors='replace')[-800:].strip()}" for path in logs)

    def ended(self, program: "subprocess.Popen[bytes]") -> None:
        """Wait until a program has ended by itself."""
        self.wait(lambda: program.poll() is not None, f"the end of {program.args}")

    def kill(self, program: "subprocess.Popen[bytes]") -> None:
        """Kill a program with all its children, as a crash or the OOM killer does: nobody can say farewell."""
        if program.poll() is not None:
            return
        os.kill(program.pid, signal.SIGSTOP)  # no more children while they are counted
        for pid in [program.pid, *_descendants(program.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.wait(SECONDS)

    # -- judgement -------------------------------------------------------------------------------

    def check(self, true: object, what: str) -> None:
        if not true:
            raise Failure(f"this is not so: {what}")
        self.say(f"  ok: {what}")

    def took(self, what: str, seconds: float, meaning: str) -> None:
        """Note a time for the table at the end."""
        self.times.append((what, seconds, meaning))

    def table(self) -> None:
        self.title("Times")
        for what, seconds, meaning in self.times:
            self.say(f"  {what:<6} {seconds:7.2f} s  {meaning}")
        if self.killer.killed:
            self.say(f"\n  the daemon of the mount was killed {self.killer.killed} times meanwhile")

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Take everything down: programs, mount, daemon, machine."""
        self.killer.pause()
        for step in reversed(self.at_end):
            step()
        for program in reversed(self.programs):
            self.kill(program)
        undo = ["umount"] if self.root else ["fusermount3", "-u"]
        for lazy in ([], ["-l"] if self.root else ["-z"]):
            if not os.path.ismount(self.mnt):
                break
            subprocess.run([*undo, *lazy, self.mnt], check=False, capture_output=True)
        deadline = time.monotonic() + SECONDS / 4
        while glob.glob(f"{self.machines}/*/mounts/*.lock") and time.monotonic() < deadline:
            time.sleep(0.01)  # the daemon is about to end
        shutil.rmtree(self.top, ignore_errors=True)


class Killer:
    """Who kills the daemon of the mount once a second, if that is wanted, but not during a kexec."""

    def __init__(self, machines: Path | None) -> None:
        self.killed = 0
        self._machines, self._may = machines, threading.Lock()
        self._paused = self._may.acquire()
        if machines is not None:
            threading.Thread(target=self._kill, daemon=True).start()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._may.release()

    def pause(self) -> None:
        """Let nobody be killed from now on; who was killed last has a successor, which the next command waits for."""
        self._paused = self._paused or self._may.acquire(timeout=SECONDS)

    def _kill(self) -> None:
        last = 0
        while True:
            time.sleep(1)
            with self._may:
                for path in glob.glob(f"{self._machines}/*/mounts/*.json"):
                    with contextlib.suppress(OSError, ValueError, KeyError):
                        pid = int(json.loads(Path(path).read_text())["pid"])
                        if pid != last and b"pkramfs" in Path(f"/proc/{pid}/cmdline").read_bytes():
                            os.kill(pid, signal.SIGKILL)
                            self.killed, last = self.killed + 1, pid


def ask(path: Path, question: bytes, answer: bytes) -> bool:
    """Return True if the program behind a socket answers a question so."""
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(SECONDS)
            peer.connect(str(path))
            peer.sendall(question)
            return peer.recv(4096).startswith(answer)
    except OSError:
        return False


def play(
    walk: Callable[[Stage, argparse.Namespace], None],
    name: str,
    about: str,
    needs: dict[str, str],
    options: Sequence[Option] = (),
) -> None:
    """Run a walk as the program `name` and exit; `needs` maps programs to the Debian packages that have them."""
    args = _parse(name, about, options)
    lacking = sorted({package for program, package in needs.items() if shutil.which(program) is None})
    if lacking:
        print(f"{name}: cannot run here: missing: apt-get install {' '.join(lacking)}", file=sys.stderr)
        sys.exit(CANNOT)
    _find_pkramfs()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    sys.exit(_perform(walk, Stage(name, kill_daemons=args.kill_daemons), args))


def _perform(walk: Callable[[Stage, argparse.Namespace], None], stage: Stage, args: argparse.Namespace) -> int:
    """Do what a walk says, take everything down, say how it went, and return the status."""
    status, verdict = 1, "FAIL: a bug of this script"
    try:
        walk(stage, args)
        stage.table()
        status, verdict = 0, "OK"
    except MissingError as error:
        status, verdict = CANNOT, f"{stage.name}: cannot run here: {error}"
    except KeyboardInterrupt:
        status, verdict = 128 + signal.SIGINT, "FAIL: interrupted"
    except (Failure, OSError, subprocess.SubprocessError) as error:
        verdict = f"FAIL: {error}"
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stage.close()
        print(f"\n{verdict}", flush=True)
    return status


def _parse(name: str, about: str, options: Sequence[Option]) -> argparse.Namespace:
    summary, _, more = about.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=name, description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default, what in options:
        if default is False:
            parser.add_argument(option, action="store_true", help=what)
        else:
            parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--kill-daemons", action="store_true", help="kill the mount's daemon every second meanwhile")
    return parser.parse_args()


def _find_pkramfs() -> None:
    """Have the commands of pkramfs in PATH: those that are there, or this checkout's, which are made if need be."""
    if shutil.which("pkram-kexec") is None:
        if subprocess.run([TOP / "tools" / "setup", "--no-links"], check=False).returncode:
            sys.exit(1)
        os.environ["PATH"] = f"{TOP / '.venv' / 'bin'}:{os.environ['PATH']}"


def _stop(number: int, frame: object) -> None:
    raise Failure(f"ended by {signal.Signals(number).name}")


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _descendants(pid: int) -> list[int]:
    """Return the pids of all children of a process, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found = Path(path).read_text(errors="replace")
            parents.setdefault(int(found.rpartition(")")[2].split()[1]), []).append(int(found.split()[0]))
    found_pids, new = [], [pid]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        found_pids += new
    return found_pids
