# SPDX-License-Identifier: GPL-2.0-or-later
"""A user at the keyboard: mounts, remounts and kexecs with the real commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
DEADLINE = 120


class User:
    """Types commands; every one is bounded in time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machine = root / "default"

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """The result of a command, whatever it is."""
        return subprocess.run(
            [str(BIN / str(words[0])) if (BIN / str(words[0])).exists() else str(words[0]), *map(str, words[1:])],
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=DEADLINE,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def ok(self, *words: object) -> str:
        """The output of a command that must succeed."""
        result = self.run(*words)
        assert result.returncode == 0, f"{words}: {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout

    def refused(self, status: int, *words: object) -> str:
        """The one clear line of a command that must fail so."""
        result = self.run(*words)
        assert result.returncode == status, f"{words}: {result.returncode}\n{result.stdout}{result.stderr}"
        assert "Traceback" not in result.stderr and result.stderr.strip(), result.stderr
        return result.stderr

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
        self.ok(*(["umount", path] if os.geteuid() == 0 else ["fusermount3", "-u", path]))

    def pfn(self) -> str:
        return (self.machine / "pkram").read_text().strip()

    def load(self, append: str | None = None) -> str:
        append = f"ro pkram={self.pfn()}" if append is None else append
        return self.ok("pkram-kexec", "-s", "-l", "builtin", f"--append={append}")

    def kexec(self, *options: str) -> str:
        self.load()
        return self.ok("pkram-kexec", "-e", "--poison", *options)

    def dmesg(self) -> str:
        return (self.machine / "dmesg").read_text()


@pytest.fixture
def user(pkram_root: Path) -> Iterator[User]:
    yield User(pkram_root)


def snapshot(top: Path) -> dict[str, tuple[object, ...]]:
    """Every path with what must survive: type, mode, owner, links, times, contents."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted([top, *top.rglob("*")]):
        info = path.lstat()
        body: object = None
        if path.is_symlink():
            body = os.readlink(path)
        elif path.is_file() and info.st_size < 1 << 28:
            body = path.read_bytes()
        found[str(path.relative_to(top))] = (
            oct(info.st_mode), info.st_uid, info.st_gid, info.st_nlink, info.st_ino, info.st_mtime_ns, info.st_ctime_ns,
            info.st_size if not path.is_dir() else None, info.st_blocks, body,
        )  # fmt: skip
    return found


def fill(top: Path) -> None:
    """The awkward files: empty, one byte, sparse of 1 TiB with two pages, deep, linked."""
    (top / "empty").touch()
    (top / "one").write_bytes(b"x")
    with open(top / "sparse", "wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"begin", 4096 * 3)
        os.pwrite(file.fileno(), b"end", (1 << 39) + 5)
    deep = top / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "data").write_bytes(os.urandom(3_000_001))
    os.link(deep / "data", top / "second name")
    os.symlink("a/b", top / "way")
    os.chmod(top / "one", 0o640)
    os.utime(top / "one", ns=(1_617_139_699_000_000_001, 1_617_139_699_123_456_789))
    shutil.copytree("/etc", top / "etc", symlinks=True, ignore=_not_for_us)


def _not_for_us(directory: str, names: list[str]) -> list[str]:
    """What is left out of a copy of /etc: certificates, for their number, and what this user may not read."""
    if "ssl" in directory:
        return names
    places = {name: os.path.join(directory, name) for name in names}
    return [name for name, place in places.items() if not os.path.islink(place) and not os.access(place, os.R_OK)]
