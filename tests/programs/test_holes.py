# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that allocate, punch, look for holes, copy and set flags, on a tmpfs and on pkramfs side by side."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Pairs

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.environ.get("PKRAM_TEST_FUSE") == "pyfuse3", reason="pyfuse3 does not know these requests"),
]

_WRITER = """
import os
fd = os.open("source", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 8 << 20)
for at in (0, 5, 6, 7, 300, 1000, 1001, 2047):
    os.pwrite(fd, b"x" * 3000, at * 4096 + 100)
os.system("{command}")
"""

SCRIPTS = {
    "fallocate": "fallocate -l 3M f; fallocate -n -o 10M -l 1M f; fallocate -p -o 1M -l 512K f; fallocate -x -l 4M g",
    "fallocate-dig": "head -c 1M /dev/zero > f; echo end >> f; fallocate -d f",
    "fallocate-refused": "echo x > f; for way in -z -c -i; do fallocate $way -o 0 -l 4096 f; echo $?; done",
    "cp-auto": "truncate -s 10M s; echo x | dd of=s bs=1 seek=5M conv=notrunc; cp --sparse=auto s c",
    "cp-always": "head -c 3M /dev/zero > s; echo x >> s; cp --sparse=always s c",
    "cp-never": "truncate -s 3M s; echo x >> s; cp --sparse=never s c",
    "cp-being-written": f"{sys.executable} -c '{_WRITER.format(command='cp --sparse=auto source copy')}'",
    "tar": "truncate -s 9M s; echo x | dd of=s bs=1 seek=4M conv=notrunc; tar -cSf a.tar s; mkdir o; "
    "tar -xSf a.tar -C o",
    "rsync": "truncate -s 9M s; echo x | dd of=s bs=1 seek=4M conv=notrunc; rsync -S s o",
    "chattr": "touch a; mkdir d; chattr +dA a d; lsattr -d a d; touch d/in; lsattr d/in; chattr = a; lsattr a",
    "chattr-root": "echo x > a; chattr +i a; lsattr a; rm -f a; echo y > a; chattr -i +a a; echo y >> a; mv a b; "
    "lsattr a; chattr -a a; rm a",
    "birth": "touch a; stat -c %w a | cut -c1-4; mv a b; chmod 700 b; stat -c %w b | cut -c1-4",
    "xfs_io": "xfs_io -f -c 'falloc 0 1m' -c 'pwrite 0 64k' -c 'fpunch 4k 8k' -c 'seek -a -r 0' f | grep -v ops",
    "qemu-img": "qemu-img create -f raw -o preallocation=falloc r 4M; qemu-img map --output=json r; "
    "qemu-img convert -f raw -O raw r c; qemu-img map --output=json c",
    "stress-ng": "stress-ng --fallocate 1 --seek 1 --copy-file 1 --fpunch 1 --timeout 3 --verify --temp-path . -q; "
    "echo $?",
}
PROGRAMS = {"fallocate": "fallocate", "cp": "cp", "tar": "tar", "rsync": "rsync", "chattr": "chattr"}
PROGRAMS |= {name: name for name in ("xfs_io", "qemu-img", "stress-ng")}


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Path, Path]]:
    lab = Pairs()
    try:
        yield lab.pair("holes", "size=2G,mode=777")
    finally:
        lab.close()


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_do_the_same(pair: tuple[Path, Path], name: str) -> None:
    program = PROGRAMS.get(name, PROGRAMS.get(name.partition("-")[0], "sh"))
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing")
    if name == "chattr-root" and os.geteuid() != 0:
        pytest.skip("needs root")
    theirs, ours = (_done(side / name, SCRIPTS[name]) for side in pair)
    assert ours == theirs


def _done(directory: Path, script: str) -> list[str]:
    """What a script says, and the files that it leaves: sizes, blocks and contents."""
    directory.mkdir()
    done = subprocess.run(
        ["sh", "-c", f"PATH=$PATH:/usr/sbin:/sbin; {script}"],
        cwd=directory,
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if "copied" not in line and "records" not in line
    ]
    for path in sorted(directory.rglob("*")):
        info, digest = path.lstat(), ""
        if path.is_file():
            digest = hashlib.sha1(path.read_bytes()).hexdigest()[:10] if path.suffix != ".tar" else ""
        blocks = info.st_blocks if path.is_file() else 0
        lines.append(f"{path.relative_to(directory)} {info.st_mode:o} {info.st_size} {blocks} {digest}")
    return lines
