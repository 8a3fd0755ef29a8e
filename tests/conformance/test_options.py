# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount options: which are taken, what they mean, and which a remount refuses, as a kernel tmpfs has it.

Which words are taken is asked of tmpfs by mount(2) and of us by our parser, hundreds of times; what they
mean is seen on real mounts, side by side. A share of RAM is a share of ours, not of the host's, so
the parser is told how much the host has.
"""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pkramfs.cli import mount as helper
from pkramfs.errors import UsageError
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.machine.policy import Policy
from pkramfs.mounting.options import MS_REMOUNT, parse
from pkramfs.units import GIB, PAGE_SHIFT
from tests.conformance import system
from tests.support.lab import Pairs

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="needs a tmpfs of its own")]

SIZES = """
1 4095 4096 4097 64k 64K 3m 3M 1g 1G 1t 1p 0 0k 00 010 08 0x10000 0X10000 0xg 1kb 1KiB 1k1 1.5m -1 +1 much
50% 0% 1% 100% 200% 5k% 0x10% 010% 5%% %5 x% 9223372036854775807
"""
BLOCKS = "0 1 2k 1m 0x10 010 -1 5% x 1.5 9223372036854775807 9223372036854775808"
INODES = "0 1 2 1k 1m 5% -1 x 010 0x10 1.5 18014398509481983 18014398509481984"
MODES = "0 700 0700 1777 01777 7777 17777 100777 777777 37777777777 47777777777 8 0o700 0x1ff rwx -1"
OWNERS = "0 1000 65534 010 0x10 08 1k 4294967294 4294967295 4294967296 -1"
HUGE = "never always within_size advise Always ALWAYS sometimes 1"
MPOL = """
default default=static default:0 default=wrong local local=static local:0 prefer prefer:0 prefer:0,0 prefer:0-0
prefer:99 prefer=static prefer=static:0 bind bind: bind:0 bind:0-0 bind:0,0 bind:1-0 bind:99 bind:x Bind:0
bind=static:0 bind=relative:0 bind=wrong:0 interleave interleave:0 interleave=static interleave=static:0 fast
"""
TOGETHER = """
size=1m,size=2m size=2m,nr_blocks=1 nr_blocks=1,size=2m mode=700,mode=755 huge=never,huge=always uid=1,uid=2
nr_inodes=5,nr_inodes=7 size=1m,,mode=700 ,size=1m size=1m, size=1m,nr_inodes=20,mode=711,uid=5,gid=6
mpol=bind:0,0,size=1m size=1m,mpol=bind:0,0 size=1m,frobnicate noswap,inode64 noswap=1 inode64=1 frobnicate
frobnicate=3 Size=5 SIZE=5 swap size= nr_blocks= nr_inodes= mode= uid= gid= huge= mpol= size huge mpol noswap inode32
"""
WORDS = [
    *(f"{key}={value}" for key, values in (("size", SIZES), ("nr_blocks", BLOCKS)) for value in values.split()),
    *(f"{key}={value}" for key, values in (("nr_inodes", INODES), ("mode", MODES)) for value in values.split()),
    *(f"{key}={value}" for key in ("uid", "gid") for value in OWNERS.split()),
    *(f"{key}={value}" for key, values in (("huge", HUGE), ("mpol", MPOL)) for value in values.split()),
    *TOGETHER.split(),
]
DELIBERATE = {
    "size=k": "tmpfs: no digits are 0, no limit at all. A slip of the finger",
    "size=%": "the same",
    "size=16e": "tmpfs: cut to 64 bits, here to 0, no limit at all",
    "size=18446744073709551616": "the same",
}
"""Taken by tmpfs, refused here."""


class Meaning(NamedTuple):
    """What a mount shows of its options."""

    blocks: int
    files: int
    mode: int
    uid: int
    gid: int


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def host_ram(place: Path) -> int:
    """Bytes of RAM that tmpfs takes its shares of."""
    meaning = _theirs(place, "size=100%")
    assert meaning is not None
    return meaning.blocks << PAGE_SHIFT


def _theirs(place: Path, words: str) -> Meaning | None:
    try:
        system.mount("none", str(place), "tmpfs", words)
    except OSError:
        return None
    try:
        return _meaning(place)
    finally:
        system.umount(str(place))


def _meaning(place: Path) -> Meaning:
    info, root = os.statvfs(place), place.stat()
    return Meaning(info.f_blocks, info.f_files, stat.S_IMODE(root.st_mode), root.st_uid, root.st_gid)


def _ours(words: str, ram: int) -> Meaning | None:
    try:
        options = parse(words)
        Policy.parse(options.mpol, FirmwareMap.default(GIB))
    except UsageError:
        return None
    pages, inodes = options.limits(ram)
    mode = 0o1777 if options.mode is None else options.mode
    return Meaning(pages, inodes, mode, options.uid or 0, options.gid or 0)


@pytest.mark.parametrize("words", WORDS)
def test_words(place: Path, host_ram: int, words: str) -> None:
    assert _ours(words, host_ram) == _theirs(place, words)


@pytest.mark.parametrize("words", DELIBERATE)
def test_words_that_only_tmpfs_takes(place: Path, host_ram: int, words: str) -> None:
    assert _theirs(place, words) is not None
    assert _ours(words, host_ram) is None


# -- real mounts ------------------------------------------------------------------------------------


def _figures(place: Path) -> list[object]:
    """All that statvfs, df and stat -f say, but for the number and type of the file system."""
    info = os.statvfs(place)
    fields = ["bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "flag", "namemax"]
    said = [subprocess.check_output([*words, place], text=True) for words in (["df", "-k"], ["df", "-i"])]
    said.append(subprocess.check_output(["stat", "-f", "-c", "%l %s %S %b %f %a %c %d", place], text=True))
    rows = [line.replace(str(place), "DIR").split() for text in said for line in text.splitlines()]
    return [*((name, getattr(info, f"f_{name}")) for name in fields), *rows, _meaning(place)]


FIGURES = {
    "size=10m,nr_inodes=100,mode=750,uid=5,gid=6,nosuid,noexec,nodev,noatime": 5000,
    "size=0,nr_inodes=0,ro,nodiratime,relatime,sync": 0,
    "nr_blocks=3,nr_inodes=1,noatime,strictatime": 0,
    "size=4097,nr_inodes=7,noatime,relatime,rw,dirsync,nosymfollow,lazytime": 8192,
}
"""Options of a mount, and bytes written to a file of it."""


@pytest.mark.parametrize("options", FIGURES)
def test_figures_and_flags(laboratory: Pairs, options: str) -> None:
    pair = laboratory.pair(f"figures-{list(FIGURES).index(options)}", options)
    for side in pair:
        if FIGURES[options]:
            (side / "file").write_bytes(bytes(FIGURES[options]))
            os.sync()
    theirs, ours = map(_figures, pair)
    assert ours == theirs


REMOUNTS = [
    "size=40k",  # 10 pages are in use
    "size=39k",
    "size=36k",
    "nr_blocks=9",
    "nr_blocks=10",
    "size=8m",
    "nr_inodes=5",
    "nr_inodes=4",
    "nr_inodes=1",
    "nr_inodes=50",
    "size=1m,nr_inodes=2",
    "size=1k,nr_inodes=90",
    "mode=700",
    "uid=7,gid=8",
    "huge=sometimes",
    "huge=never",
    "frobnicate",
    "size=much",
    "mpol=local",
    "mpol=bind:99",
    "noswap",
    "size=0",
    "size=64m",
    "nr_inodes=0",
    "nr_inodes=77",
    "size=0,nr_inodes=0",
]


@pytest.fixture(scope="module")
def in_use(laboratory: Pairs) -> Iterator[tuple[Path, Path]]:
    """A pair with 10 pages and 5 inodes in use."""
    pair = laboratory.pair("remounted", "size=4m,nr_inodes=20,mode=755")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PKRAM_ROOT", str(laboratory.root))
        for side in pair:
            (side / "file").write_bytes(b"x" * 40_000)
            (side / "directory").mkdir()
            os.link(side / "file", side / "link")
            (side / "empty").touch()
        os.sync()
        yield pair


def test_remount(in_use: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other on the same mounts: the same are refused, and the figures stay the same."""
    theirs, ours = in_use
    rows = []
    for words in REMOUNTS:
        try:
            system.mount("none", str(theirs), "tmpfs", words, MS_REMOUNT)
            expected = True
        except OSError:
            expected = False
        status = helper.main(["none", str(ours), "-o", f"remount,{words}"])
        said = capsys.readouterr().err
        rows.append((words, status == 0, _meaning(ours), os.statvfs(ours).f_bfree, os.statvfs(ours).f_ffree))
        assert rows[-1] == (words, expected, _meaning(theirs), os.statvfs(theirs).f_bfree, os.statvfs(theirs).f_ffree)
        assert (said.count("\n"), status in (1, 32)) == ((0, False) if expected else (1, True)), said
    assert {accepted for _, accepted, *_ in rows} == {True, False}


@pytest.mark.parametrize("words", ["noexec", "exec,nosuid", "noatime", "relatime", "ro", "rw,nodev", "suid,dev"])
@pytest.mark.skipif(not os.path.exists("/sbin/mount.fuse.pkramfs"), reason="the links in /sbin are not made")
def test_flags_of_a_remount(in_use: tuple[Path, Path], words: str) -> None:
    """Through mount(8), which adds the words that a mount has already."""
    theirs, ours = in_use
    for side in in_use:
        subprocess.run(["mount", "-o", f"remount,{words}", side], check=True)
    assert os.statvfs(ours).f_flag == os.statvfs(theirs).f_flag
