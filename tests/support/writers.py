# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that write and check every byte until told to stop; they print how many steps they made.

python -m tests.support.writers STOP SEED KIND DIRECTORY
"""

import fcntl
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

SIZE = 200_000


def names(at: Path, choice: random.Random) -> Iterator[None]:
    """Make, link, rename and remove names, and compare the listing with what must be there."""
    there: dict[str, int] = {}
    number = 0
    while True:
        number += 1
        name, other = f"n{choice.randrange(30)}", f"n{choice.randrange(30)}"
        kind = choice.choice(["make", "make", "remove", "rename", "link", "directory"])
        if kind == "make" and name not in there:
            fd = os.open(at / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(fd, b"%d" % number)
            os.close(fd)
            there[name] = number
        elif kind == "remove" and name in there:
            os.unlink(at / name)
            del there[name]
        elif kind == "rename" and name in there and name != other and there.get(other) != there[name]:
            os.rename(at / name, at / other)
            there[other] = there.pop(name)
        elif kind == "link" and name in there and other not in there:
            os.link(at / name, at / other)
            there[other] = there[name]
        elif kind == "directory":
            os.mkdir(at / "d")
            os.rename(at / "d", at / "e")
            os.rmdir(at / "e")
        if number % 10 == 0:
            assert sorted(os.listdir(at)) == sorted(there)
            for one, content in there.items():
                assert (at / one).read_bytes() == b"%d" % content, one
        yield


def appends(at: Path, choice: random.Random) -> Iterator[None]:
    """Append lines, and read all of them."""
    with open(at / "log", "ab", buffering=0) as log:
        count = 0
        while True:
            log.write(b"%09d\n" % count)
            count += 1
            if count % 50 == 0:
                lines = (at / "log").read_bytes()
                assert lines == b"".join(b"%09d\n" % number for number in range(count))
                os.posix_fadvise(log.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if count == 5000:
                os.truncate(at / "log", 0)
                count = 0
            yield


def maps(at: Path, choice: random.Random) -> Iterator[None]:
    """Write through a map."""
    with open(at / "map", "wb+") as file:
        file.truncate(SIZE)
        view, model = mmap.mmap(file.fileno(), SIZE), bytearray(SIZE)
        while True:
            place = choice.randrange(SIZE - 100)
            data = choice.randbytes(100)
            view[place : place + 100] = model[place : place + 100] = data
            if choice.random() < 0.05:
                view.flush()
                view.madvise(mmap.MADV_DONTNEED)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert view[:] == model
            yield


def at_random(at: Path, choice: random.Random) -> Iterator[None]:
    """Write, cut, punch, allocate and read at random, as fsx does."""
    fd, model = os.open(at / "file", os.O_CREAT | os.O_RDWR), bytearray()
    while True:
        place, size = choice.randrange(SIZE), choice.randrange(1, 30_000)
        kind = choice.choice(["write", "write", "cut", "read", "read", "allocate", "sync"])
        if kind == "write":
            data = choice.randbytes(size)
            assert os.pwrite(fd, data, place) == size
            model.extend(bytes(max(0, place + size - len(model))))
            model[place : place + size] = data
        elif kind == "cut":
            os.ftruncate(fd, place)
            model[place:] = b""
            model.extend(bytes(place - len(model)))
        elif kind == "allocate":
            os.posix_fallocate(fd, place, size)
            model.extend(bytes(max(0, place + size - len(model))))
        elif kind == "sync":
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            assert os.pread(fd, size, place) == model[place : place + size]
        assert os.fstat(fd).st_size == len(model)
        yield


def locks(at: Path, choice: random.Random) -> Iterator[None]:
    """Count under a lock, with another process."""
    (at / "count").write_bytes(b"0")
    child = os.fork()
    count = 0
    with open(at / "count", "rb+", buffering=0) as file:
        while True:
            fcntl.lockf(file, fcntl.LOCK_EX)
            value = int(os.pread(file.fileno(), 20, 0))
            os.pwrite(file.fileno(), b"%d" % (value + 1), 0)
            fcntl.lockf(file, fcntl.LOCK_UN)
            count += 1
            try:
                yield
            finally:
                pass
            if STOP.exists():
                break
        (at / ("child" if not child else "parent")).write_bytes(b"%d" % count)
        if not child:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert int((at / "count").read_bytes()) == count + int((at / "child").read_bytes())


def deleted(at: Path, choice: random.Random) -> Iterator[None]:
    """Write and read files that have no name any more, or never had one."""
    files: list[tuple[int, bytes]] = []
    while True:
        data = choice.randbytes(choice.randrange(1, 50_000))
        if choice.random() < 0.5:
            fd = os.open(at / "name", os.O_CREAT | os.O_EXCL | os.O_RDWR)
            os.write(fd, data)
            os.unlink(at / "name")
        else:
            fd = os.open(at, os.O_TMPFILE | os.O_RDWR)
            os.write(fd, data)
        files.append((fd, data))
        if len(files) > 10:
            fd, data = files.pop(choice.randrange(len(files)))
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 60_000, 0) == data
            os.close(fd)
        assert os.listdir(at) == []
        yield


KINDS: dict[str, Callable[[Path, random.Random], Iterator[None]]] = {
    "names": names,
    "appends": appends,
    "maps": maps,
    "random": at_random,
    "locks": locks,
    "deleted": deleted,
}
STOP = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def main() -> None:
    _, _, seed, kind, directory = sys.argv
    steps = 0
    for _ in KINDS[kind](Path(directory), random.Random(int(seed))):
        steps += 1
        if kind != "locks" and STOP.exists():
            break
    print(steps)


if __name__ == "__main__":
    main()
