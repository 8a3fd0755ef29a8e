# SPDX-License-Identifier: GPL-2.0-or-later
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pkramfs.errors import UsageError
from pkramfs.kernel import image


def loaded(found: image.Image) -> bytes:
    whole = bytearray(found.size)
    for offset, data in found.payload():
        whole[offset : offset + len(data)] = data
    return bytes(whole)


def test_builtin() -> None:
    assert image.load_image("builtin").init_size == 16 << 20
    found = image.load_image("builtin:5000")
    assert (found.init_size, found.relocatable, found.align) == (8192, True, 2 << 20)
    assert b"pkramfs" in b"".join(data for _, data in found.payload())
    assert image.SETUP.read(bytes(0x1F1) + image.setup_header(found)).init_size == 8192
    for bad in ("builtin:", "builtin:0", "builtin:many", "builtin:8G"):
        if bad != "builtin:":
            with pytest.raises(UsageError, match="builtin"):
                image.load_image(bad)


def test_bzimage(bzimage: Any, tmp_path: Path) -> None:
    found = image.load_image(bzimage(tmp_path / "vmlinuz"))
    assert (found.kind, found.name, found.version) == ("bzImage", "vmlinuz", "6.1.0-13-amd64")
    assert (found.size, found.init_size) == (10000, 0x800000)
    assert (found.align, found.preferred, found.relocatable) == (0x200000, 0x1000000, True)
    assert loaded(found) == b"k" * 10000
    assert image.SETUP.read(bytes(0x1F1) + image.setup_header(found)).pref_address == 0x1000000


def test_an_image_takes_at_least_its_own_size(bzimage: Any, tmp_path: Path) -> None:
    assert image.load_image(bzimage(tmp_path / "k", init_size=1)).init_size == 12288


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boot_flag": 0}, "boot flag is 0x0000"),
        ({"version": 0x0204}, "boot protocol 2.04 is too old"),
        ({"xloadflags": 0}, "no 64-bit entry"),
        ({"syssize": 5000}, "cut off: 12560 bytes, its header promises 82560"),
        ({"kernel_alignment": 0x300000}, "not a power of two"),
        ({"pref_address": 1 << 60}, "beyond physical memory"),
        ({"header": b"XXXX"}, "neither a bzImage"),
    ],
)
def test_a_bzimage_that_cannot_be_is_refused(
    bzimage: Any, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        image.load_image(bzimage(tmp_path / "k", **changes))


def test_a_bzimage_cut_anywhere_is_refused(bzimage: Any, tmp_path: Path) -> None:
    whole = Path(bzimage(tmp_path / "k")).read_bytes()
    for length in (0, 1, 0x202, 0x206, 0x210, 0x263, 0x264, 2559, 2560, len(whole) - 20):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(UsageError, match="not a kernel that can be loaded"):
            image.load_image(str(tmp_path / "cut"))


def test_elf(elf: Any, tmp_path: Path) -> None:
    found = image.load_image(elf(tmp_path / "vmlinux", [(0x1000000, b"text", 4), (0x1200000, b"data", 0x10000)]))
    assert (found.kind, found.relocatable, found.preferred) == ("elf", False, 0x1000000)
    assert (found.size, found.init_size) == (0x200004, 0x210000)
    assert loaded(found)[:4] == b"text"
    assert loaded(found)[0x200000:] == b"data"


@pytest.mark.parametrize(
    ("loads", "changes", "reason"),
    [
        ([(0x1000, b"x", 1)], {"machine": 183}, "64-bit x86"),
        ([(0x1000, b"x", 1)], {"type": 1}, "type 1"),
        ([(0x1000, b"x", 1)], {"phnum": 9}, "cut off: 9 program headers"),
        ([(0x1000, b"x", 1)], {"phoff": 1 << 40}, "cut off"),
        ([(0x1000, b"xyz", 1)], {}, "cut off"),
        ([(0x1000, b"", 0)], {}, "nothing to load"),
        ([(0x1000, b"x", 0x2000), (0x2000, b"y", 1)], {}, "overlap"),
        ([(0, b"x", 1 << 40)], {}, "wants 1.0 TiB"),
    ],
)
def test_an_elf_that_cannot_be_is_refused(
    elf: Any, tmp_path: Path, loads: list[tuple[int, bytes, int]], changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        image.load_image(elf(tmp_path / "k", loads, **changes))


def test_a_program_is_no_kernel() -> None:
    """Refuse a program, although its ELF header alone would do: 64-bit x86, something to load."""
    with pytest.raises(UsageError, match="linked dynamically: a program or a library"):
        image.load_image(shutil.which("sh") or "/bin/sh")


def kernels(tmp_path: Path) -> list[Path]:
    """Find real kernels: those of this host, else Debian's if apt can bring it."""
    found = [path for path in Path("/boot").glob("vmlinuz*") if os.access(path, os.R_OK)]
    if not found and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        depends = subprocess.run(
            ["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True, check=False
        )
        names = re.findall(r"Depends: (linux-image-\S+)", depends.stdout)
        for name in names[:1]:
            subprocess.run(["apt-get", "download", name], cwd=tmp_path, capture_output=True, timeout=120, check=False)
        for package in tmp_path.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, tmp_path], check=True)
        found = list(tmp_path.glob("boot/vmlinuz*"))
    return found


@pytest.mark.slow
def test_real_kernels_are_loaded_and_booted(lab: Any, tmp_path: Path) -> None:
    found = kernels(tmp_path)
    if not found:
        pytest.skip("no real kernel is at hand: none in /boot, none from apt")
    lab.preserve("a", 3000)
    for path in found:
        real = image.load_image(str(path))
        assert (real.kind, real.relocatable) == ("bzImage", True)
        assert real.version in path.name
        assert real.size < path.stat().st_size < real.init_size
        lab.load(str(path))
        kernel = lab.execute(poison=True)
        assert lab.intact("a")
        start, end = kernel.info.reserved["Kernel image"]
        assert (end - start) * 4096 == real.init_size
        assert bytes(kernel.ram.page(start, real.size // 4096)) == loaded(real)[: real.size // 4096 * 4096]
        whole = path.read_bytes()
        for length in (real.size // 2, len(whole) - 4096):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(UsageError, match="cut off"):
                image.load_image(str(tmp_path / "cut"))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gz").write_bytes(b"\x1f\x8b" + bytes(5000))
    (tmp_path / "pe").write_bytes(b"MZ" + bytes(5000))
    for name, reason in (
        ("gz", "gzip"),
        ("pe", "PE program"),
        ("absent", "No such file"),
        (".", "a directory, not a regular file"),
    ):
        with pytest.raises(UsageError, match=reason):
            image.load_image(str(tmp_path / name))
    with pytest.raises(UsageError, match="not a regular file"):
        image.load_image("/dev/null")
