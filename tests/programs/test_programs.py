# SPDX-License-Identifier: GPL-2.0-or-later
"""Real programs on the mount: git, sqlite, tar, rsync, gcc and Python's own tests of files."""

import importlib.util
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.record import picture
from tests.support.lab import Pairs

pytestmark = pytest.mark.mount


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is missing")


@pytest.fixture(scope="module")
def mount() -> Iterator[Path]:
    lab = Pairs()
    try:
        yield lab.pair("programs", "size=2G,mode=777")[1]
    finally:
        lab.close()


@pytest.fixture
def top(mount: Path, request: pytest.FixtureRequest) -> Path:
    path = mount / request.node.name.replace("[", "-").strip("]")
    path.mkdir()
    return path


def run(directory: Path, *words: str, seconds: int = 100, **environment: str) -> str:
    done = subprocess.run(
        words,
        cwd=directory,
        env={**os.environ, "HOME": str(directory), "LC_ALL": "C", **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def awkward(top: Path) -> None:
    """A tree with everything that an archive can carry."""
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "file").write_bytes(os.urandom(100_001))
    os.link(top / "file", top / "sub" / "hard")
    os.symlink("../file", top / "sub" / "soft")
    os.mkfifo(top / "fifo")
    with open(top / "sparse", "wb") as file:
        file.truncate(50 << 20)
        file.seek(20 << 20)
        file.write(b"in the middle" * 1000)
    for number in range(200):
        (top / "sub" / "deep" / f"n{number}").write_text(f"{number}")
    os.chmod(top / "file", 0o2751)
    if os.geteuid() == 0:
        os.setxattr(top / "file", "user.note", b"kept")
        os.mknod(top / "device", 0o020600, os.makedev(1, 3))
        os.chown(top / "sub", 1234, 4321)
        if shutil.which("setfacl"):
            run(top, "setfacl", "-m", "u:77:rw", "file")
            run(top, "setfacl", "-d", "-m", "g:88:rx", "sub")
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(1, 1_400_000_000_123_456_789), follow_symlinks=False)


def tree(top: Path) -> list[str]:
    """Everything but the top itself and how the pages lie."""
    return [
        row.partition(" blocks=")[0] + row.partition(" blocks=")[2].partition(" ")[2] for row in picture(str(top))[1:]
    ]


@needs("git")
def test_git(top: Path) -> None:
    def git(directory: str, *words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "gc.auto=0", "-c", "init.defaultBranch=main")
        return run(top / directory, "git", *identity, *words)

    (top / "one").mkdir()
    git("one", "init", "-q")
    for number in range(5):
        for name in range(100):
            (top / "one" / f"file{name}").write_text(f"{number} {name}\n" * 50)
        git("one", "add", "-A")
        git("one", "commit", "-q", "-m", f"{number}")
    git("one", "gc", "-q")
    git(".", "clone", "-q", "one", "two")
    git(".", "clone", "-q", "--no-local", "one", "three")
    for directory in ("one", "two", "three"):
        git(directory, "fsck", "--full", "--strict")
        assert git(directory, "status", "--porcelain") == ""
    git("two", "checkout", "-q", "HEAD~2")
    assert git("two", "rev-parse", "HEAD") == git("one", "rev-parse", "HEAD~2")


INSERT = """
import os, sqlite3, sys
path, writer, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with sqlite3.connect(path, timeout=60) as database:
    for number in range(rows):
        database.execute("insert into t values (?, ?, ?)", (writer, number, os.urandom(500)))
        database.commit()
database.close()
"""


@pytest.mark.parametrize("mode", ["wal", "delete", "truncate", "persist"])
def test_sqlite(top: Path, mode: str) -> None:
    path = str(top / "database")
    database = sqlite3.connect(path)
    assert database.execute(f"pragma journal_mode={mode}").fetchone() == (mode,)
    database.execute("create table t (writer, number, data)")
    database.commit()
    writers = [subprocess.Popen([sys.executable, "-c", INSERT, path, str(writer), "60"]) for writer in range(4)]
    assert [writer.wait(100) for writer in writers] == [0] * 4
    assert database.execute("select count(*), count(distinct writer) from t").fetchone() == (240, 4)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.execute("delete from t where number % 2")
    database.commit()
    database.execute("vacuum")
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()


@needs("tar")
@pytest.mark.parametrize("options", [("--sparse",), ()], ids=["sparse", "plain"])
def test_tar(top: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    (top / "from").mkdir()
    (top / "to").mkdir()
    awkward(top / "from")
    words = ("--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--format=posix", *options)
    run(top / "from", "tar", "-c", *words, "-f", str(tmp_path / "archive"), ".")
    run(top / "to", "tar", "-x", "-p", *words, "-f", str(tmp_path / "archive"))
    assert tree(top / "to") == tree(top / "from")


@needs("rsync")
def test_rsync(top: Path) -> None:
    (top / "from").mkdir()
    awkward(top / "from")
    options = "-aHAXS" if os.geteuid() == 0 else "-aHS"
    run(top, "rsync", options, "from/", "to/")
    assert tree(top / "to") == tree(top / "from")
    assert run(top, "rsync", options, "-ni", "--delete", "from/", "to/") == ""
    assert (top / "to" / "sparse").stat().st_blocks <= 64
    (top / "from" / "file").unlink()
    run(top, "rsync", options, "--delete", "from/", "to/")
    assert not (top / "to" / "file").exists()


@needs("cp", "cmp")
def test_cp(top: Path) -> None:
    (top / "from").mkdir()
    awkward(top / "from")
    run(top, "cp", "-a", "--sparse=always", "from", "to")
    assert tree(top / "to") == tree(top / "from")
    assert (top / "to" / "sparse").stat().st_blocks <= 64
    run(top, "cmp", "from/sparse", "to/sparse")


@needs("gcc", "make")
def test_compile_and_run(top: Path) -> None:
    (top / "part.c").write_text('#include "part.h"\nint part(int x) { return x * 2; }\n')
    (top / "part.h").write_text("int part(int);\n")
    (top / "main.c").write_text(
        '#include <stdio.h>\n#include "part.h"\nint main(void) { printf("%d\\n", part(21)); return 0; }\n'
    )
    (top / "Makefile").write_text("main: main.o part.o\n\tgcc -o $@ $^\nmain.o part.o: part.h\n")
    run(top, "make", "-j2")
    assert run(top, "./main") == "42\n"
    assert "up to date" in run(top, "make")
    (top / "part.c").write_text('#include "part.h"\nint part(int x) { return x * 3; }\n')
    run(top, "make")
    assert run(top, "./main") == "63\n"


@pytest.mark.skipif(importlib.util.find_spec("test.test_os") is None, reason="Python's own tests are not installed")
@pytest.mark.parametrize(
    "module", ["test_os", "test_shutil", "test_mmap", "test_tempfile", "test_posix", "test_fileio"]
)
def test_python(top: Path, module: str) -> None:
    # Terminals are no files, and missing in some containers.
    run(top, sys.executable, "-m", "test", "-q", "--tempdir", str(top), "-i=*pty*", module, TMPDIR=str(top))
