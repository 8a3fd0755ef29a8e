# SPDX-License-Identifier: GPL-2.0-or-later
"""A laboratory for machines: Lab, and the layers that the chapters lay on it."""

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pkramfs.control.client import call
from pkramfs.kernel import boot, kernelrecord, kexec, loading, nvram, running
from pkramfs.kernel.running import Running
from pkramfs.machine.directory import Machine
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.machine.mounts import MountEntry, kill
from pkramfs.mounting import syscalls
from pkramfs.spans import Spans
from pkramfs.units import format_pfn
from tests.support import here
from tests.support.places import ROOT, memory_directory, unmounting

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FUSE_PATH = os.environ.get("PKRAM_TEST_FUSE")
"""Who answers requests: see mount.pkramfs(8), fuse="""

Runs = Sequence[tuple[int, int]]


class Died(BaseException):
    """The process was killed."""


class Lab:
    """One machine, and the commands that are typed there; each is bounded in time."""

    seconds = 60
    in_process = False
    """Whether commands may run in this process, where it makes no difference."""
    fresh = False
    """Whether commands that mount are processes of their own, nevertheless, and so are their daemons."""
    verbs: ClassVar = {"ctl": "ctl", "kexec": "kexec", "mount": "mount"}
    """What `run` calls a command, and what `python -m pkramfs` calls it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def command(self, *words: object) -> list[str]:
        """Return the words with which a command of ours begins."""
        return [sys.executable, "-m", "pkramfs", *map(str, words)]

    def run(self, *words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Return the result of a command, whatever it is."""
        verb, *more = map(str, words)
        given = [self.verbs.get(verb, ""), *more]
        if self.in_process and not env and not self._is_fresh(*given) and here.may_run_here(given):
            return here.run_here(given, self.environment, self.seconds)
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=self.seconds,
            stdin=subprocess.DEVNULL,
            env=self.environment | (env or {}),
        )

    def _is_fresh(self, verb: str, *words: str) -> bool:
        return self.fresh and verb == "mount" and "remount" not in ",".join(words).split(",")

    def ok(self, *words: object) -> str:
        """Return the output of a command that must succeed."""
        return self._ended(0, *words).stdout

    def refused(self, status: int, *words: object) -> str:
        """Return the one clear line of a command that must fail so."""
        said = self._ended(status, *words).stderr
        assert "Traceback" not in said and said.strip(), said
        return said

    def _ended(self, status: int, *words: object) -> subprocess.CompletedProcess[str]:
        done = self.run(*words)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def dmesg(self) -> str:
        return self.machine.dmesg()

    @property
    def files(self) -> Path:
        """Return the directory that is the machine."""
        return Path(self.machine.path())

    def pfn(self) -> str:
        """Return the pfn that a command line says in pkram=."""
        return (self.files / "pkram").read_text().strip()


class Boots(Lab):
    """A machine whose boots run in this process, with trees of patterned pages.

    `die_after` names a step after which the machine is killed, once.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.die_after: str | None = None
        self.steps: list[str] = []

    def start_boot(self, machine: Machine, *, force: bool = False) -> None:
        boot.boot(machine, force=force, after_step=self.after)

    def after(self, step: str) -> None:
        self.steps.append(step)
        if step == self.die_after:
            self.die_after = None
            raise Died(step)

    def dies(self, step: str) -> AbstractContextManager[Any]:
        """The block ends with the machine killed after this step."""
        self.die_after = step
        return pytest.raises(Died)

    def up(self) -> Running:
        return running.attach(self.machine, timeout=5)

    def load(self, image: str = "builtin:4M", append: str = "ro", **words: Any) -> Any:
        """Load a kernel with the right pkram= (or the one in `append`)."""
        if "pkram=" not in append:
            append += f" pkram={format_pfn(self.up().info.super_pfn)}"
        return loading.load(self.machine, loading.Request(image, append=append, **words))

    def execute(self, **how: Any) -> Running:
        """What pkram-kexec -e does, with nothing mounted."""
        with self.machine.lifecycle(shared=False, timeout=5):
            kexec.plan(self.machine, [], **how).execute()
        return running.look(self.machine)

    def cycle(self, image: str = "builtin:4M", append: str = "ro", **how: Any) -> Running:
        self.load(image, append)
        return self.execute(**how)

    def fill(self, runs: Runs, seed: int) -> int:
        """Write pages that no other seed writes; their checksum."""
        ram, total = self.up().ram, 0
        for start, count in runs:
            words = ram.words(start, count)
            first = np.random.default_rng([seed, start]).integers(1 << 63, dtype=np.uint64)
            words[:] = np.arange(len(words), dtype=np.uint64)  # where, and who: a random word for each is slow
            words += first
            total = zlib.crc32(words.data, total)
        return total

    def grow(self, pages: int, seed: int = 1) -> tuple[Frames, Runs, int]:
        """A tree of `pages` pages that is not preserved: its frames, runs and checksum."""
        kernel = self.up()
        frames = Frames(kernel.ram, kernel.leases, new_tree_id())
        runs = frames.allocate(pages)
        return frames, runs, self.fill(runs, seed)

    def preserve(self, name: str, pages: int, seed: int = 1) -> None:
        self.publish(name, *self.grow(pages, seed))

    def publish(self, name: str, frames: Frames, runs: Runs, total: int) -> None:
        kernel = self.up()
        counts = np.array([count for _, count in runs], np.uint64)
        index = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.uint64)
        pfns = np.array([pfn for pfn, _ in runs], np.uint64)
        banned = kernel.banned()
        with kernel.store.prepare_save(os.fsencode(name), tree_id=frames.tree_id, frames=frames, banned=banned) as save:
            with save.object() as stream:
                stream.write(str(total).encode())
                stream.save_runs(index, pfns, counts)
            save.finish()

    def intact(self, name: str) -> bool:
        """Whether a node's pages are as they were when it was saved."""
        kernel, total = self.up(), 0
        with kernel.store.prepare_load(name.encode()) as load:
            (stream,) = list(load)
            expected = int(stream.read())
            _, pfns, counts = stream.load_runs()
            for start, count in zip(pfns.tolist(), counts.tolist(), strict=True):
                total = zlib.crc32(kernel.ram.words(start, count).data, total)
            load.finish()
        return total == expected

    def facts(self) -> dict[str, Any]:
        """What must be the same however often a boot was interrupted."""
        kernel = self.up()
        info = kernelrecord.read(self.machine)
        assert info is not None
        plain = info.to_json() | {"booted": 0, "report": info.report | {"phases": {}}}
        return {
            "info": plain,
            "leases": kernel.leases.counts(),
            "nvram": nvram.read(self.machine),
            "files": {name: self.machine.read_text(name) for name in ("cmdline", "pkram", "iomem")},
            "nodes": [n.name for n in kernel.store.nodes()],
            "left": sorted(os.listdir(self.machine.path("kexec"))),
            "reserved": list(self.reserved()),
        }

    def reserved(self) -> Spans:
        """Every page that means anything: the kernel's own and the nodes'."""
        kernel = self.up()
        return kernel.info.own_pages | kernel.store.preserved()


class Mounts(Lab):
    """Real mounts. Mount points are not below the machine's directory, so that a dead one hides nothing of it."""

    in_process = True

    def __init__(self, root: Path, machine: Machine) -> None:
        super().__init__(machine)
        self.root = root
        """Where the mount points are."""
        self._made: set[Path] = set()

    def helper(self, directory: Path | str, options: str = "", *more: str) -> subprocess.CompletedProcess[str]:
        """mount.pkramfs none DIR -o OPTIONS."""
        return self.run("mount", "none", str(directory), *(["-o", options] if options else []), *more)

    def start(self, directory: Path, options: str) -> subprocess.Popen[bytes]:
        """mount.pkramfs in the background."""
        words = self.command("mount", "none", directory, "-o", options)
        return subprocess.Popen(words, env=self.environment)

    def mount(self, name: str, options: str | None = None) -> Path:
        """Mount on a directory called `name`, as pkram=name unless options are given; it must succeed."""
        directory = self.dir(name)
        here.bring_up(self.machine)
        words = [f"pkram={name}" if options is None else options, *([f"fuse={FUSE_PATH}"] if FUSE_PATH else [])]
        done = self.helper(directory, ",".join(word for word in words if word))
        assert (done.returncode, done.stderr) == (0, ""), done
        return directory

    def dir(self, name: str) -> Path:
        directory = self.root / name
        if directory not in self._made:  # asking the directory may be asking a dead daemon
            directory.mkdir()
            self._made.add(directory)
        return directory

    def admit_others(self) -> None:
        """Let other users come to the mount points: pytest's directories are its user's alone."""
        for above in (self.root, *self.root.parents):
            found = above.stat()
            if found.st_uid == os.geteuid() and found.st_mode & 0o055 != 0o055:
                above.chmod(0o755)

    def clean(self) -> None:
        """Take down what is mounted, dead or alive."""
        mounted = {mounted.mountpoint for mounted in syscalls.mounts()}
        for directory in sorted(self._made, reverse=True):
            while str(directory) in mounted:
                syscalls.detach(str(directory))
                mounted = {mounted.mountpoint for mounted in syscalls.mounts()}

    def remount(self, directory: Path, options: str) -> None:
        """A remount that must succeed."""
        done = self.helper(directory, f"remount,{options}")
        assert (done.returncode, done.stderr) == (0, ""), done

    def umount(self, directory: Path) -> None:
        """Unmount and wait for the daemon."""
        entry = self.entry(directory)
        subprocess.run(unmounting(directory), check=True)
        self.gone(entry)

    def kill(self, entry: MountEntry) -> None:
        """Kill a daemon and whoever would start another, and wait until both are gone."""
        kill(entry)
        self.gone(entry)

    def gone(self, entry: MountEntry) -> None:
        """Wait, with a deadline, until a daemon has let go of its tree."""
        deadline = time.monotonic() + 60
        while entry.tree_id in self.machine.live_ids():
            assert time.monotonic() < deadline, f"the daemon of {entry.mountpoint} stays"
            time.sleep(0.005)

    def entry(self, directory: Path) -> MountEntry:
        return next(e for e in self.machine.mounts() if e.mountpoint == str(directory) and e.alive)

    def call(self, directory: Path, verb: str, **args: Any) -> dict[str, Any]:
        return call(self.entry(directory).socket, verb, **args)

    def status(self, directory: Path) -> dict[str, Any]:
        return self.call(directory, "status")

    def nodes(self) -> list[str]:
        """Names of the preserved nodes."""
        found = json.loads(self.run("ctl", "--json", "nodes").stdout or "[]")
        return [node["name"] for node in (found["nodes"] if isinstance(found, dict) else found)]

    def leased(self) -> int:
        """Bytes of RAM that trees hold."""
        found = json.loads(self.run("ctl", "--json", "status").stdout)
        return int(found["memory"]["tree"])


class Pairs(Lab):
    """Pairs of mounts with the same options, on a machine that lives as long as the object."""

    in_process = True

    def __init__(self) -> None:
        self.root, self.places = memory_directory(), memory_directory()
        super().__init__(Machine(str(self.root / "default")))
        self._mounted: list[Path] = []

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"PKRAM_ROOT": str(self.root)}

    def pair(self, name: str, options: str) -> tuple[Path, Path]:
        """Mount a tmpfs and a pkramfs: (tmpfs, pkramfs)."""
        theirs, ours = self.places / f"{name}-theirs", self.places / f"{name}-ours"
        theirs.mkdir()
        ours.mkdir()
        if ROOT:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", theirs], check=True)
            self._mounted.append(theirs)
        self.ok("mount", "none", ours, "-o", f"pkram={name},fuse={FUSE_PATH or 'filter'},{options}")
        self._mounted.append(ours)
        return theirs, ours

    def close(self) -> None:
        for place in self._mounted:
            for lazy in (False, True):
                if subprocess.run(unmounting(place, lazy=lazy), check=False, capture_output=True).returncode == 0:
                    break
        deadline = time.monotonic() + 60
        while any(self.root.glob("*/mounts/*.lock")) and time.monotonic() < deadline:
            time.sleep(0.01)
        shutil.rmtree(self.places, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)


class User(Lab):
    """A user at the keyboard, who mounts, remounts and kexecs with the programs that are installed."""

    seconds = 120
    verbs: ClassVar = {"pkramctl": "ctl", "pkram-kexec": "kexec", "mount.pkramfs": "mount"}

    def __init__(self, root: Path) -> None:
        super().__init__(Machine(str(root / "default")))
        self.root = root

    def command(self, *words: object) -> list[str]:
        """Return the words; the first is a program of ours, or of the system."""
        program, *more = map(str, words)
        return [str(BIN / program) if (BIN / program).exists() else program, *more]

    def directory(self, name: str) -> Path:
        path = self.root / "at" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def mount(self, name: str, options: str = "") -> Path:
        """Mount NAME on a directory of the same name."""
        path = self.directory(name)
        self.ok("mount.pkramfs", "none", path, "-o", f"pkram={name}" + (f",{options}" if options else ""))
        return path

    def preserve(self, path: Path) -> None:
        self.ok("mount.pkramfs", "none", path, "-o", "remount,preserve,ro")

    def unmount(self, path: Path) -> None:
        self.ok(*unmounting(path))

    def load(self, append: str | None = None) -> str:
        append = f"ro pkram={self.pfn()}" if append is None else append
        return self.ok("pkram-kexec", "-s", "-l", "builtin", f"--append={append}")

    def kexec(self, *options: str) -> str:
        self.load()
        return self.ok("pkram-kexec", "-e", "--poison", *options)
