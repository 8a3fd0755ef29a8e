# SPDX-License-Identifier: GPL-2.0-or-later
"""The seven steps, with everything that may stand in their way, on real mounts."""

import json
import os
import re
import subprocess

import pytest

from tests.support.trees import fill, snapshot

pytestmark = pytest.mark.mount


def test_a_tree_survives(user, installed):
    path = user.mount("one")
    fill(path)
    before = snapshot(path)
    user.preserve(path)
    assert "mounted again" in user.kexec()
    assert snapshot(path) == before
    with open(path / "sparse", "rb") as file:
        assert os.pread(file.fileno(), 5, 4096 * 3) == b"begin"
        assert os.pread(file.fileno(), 3, (1 << 39) + 5) == b"end"
        assert os.pread(file.fileno(), 10, 1 << 38) == bytes(10)
    assert "already mounted" in user.ok("mount.pkramfs", "none", path, "-o", "pkram=one")


def test_twice_in_a_row_without_preserving_again(user):
    path = user.mount("one")
    fill(path)
    before = snapshot(path)
    user.preserve(path)
    for _ in range(3):
        user.kexec()
        assert snapshot(path) == before


def test_the_same_walk_twice_with_changes_between(user):
    path = user.mount("one")
    for number in range(2):
        (path / f"file{number}").write_bytes(os.urandom(500_000))
        before = snapshot(path)
        user.preserve(path)
        user.kexec()
        assert snapshot(path) == before


def test_two_names_on_one_machine(user, installed):
    paths = [user.mount("one"), user.mount("two")]
    for path in paths:
        fill(path)
    before = [snapshot(path) for path in paths]
    for path in paths:
        user.preserve(path)
    user.kexec("--no-remount")
    assert not any(os.path.ismount(path) for path in paths)
    for path in reversed(paths):
        user.mount(path.name)
    assert [snapshot(path) for path in paths] == before


def test_a_name_is_loaded_without_a_kexec_too(user, installed):
    path = user.mount("one")
    fill(path)
    before = snapshot(path)
    user.preserve(path)
    user.unmount(path)
    user.mount("one")
    assert snapshot(path) == before


def test_unmounted_without_preserve_all_is_given_back(user):
    path = user.mount("one")
    (path / "big").write_bytes(bytes(1 << 24))
    user.unmount(path)
    user.mount("one")
    assert list(path.iterdir()) == []
    assert (user.files / "ram").stat().st_blocks * 512 < 1 << 23


def test_a_change_after_the_restore_withdraws_the_node(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"old")
    user.preserve(path)
    user.kexec()
    (path / "file").write_bytes(b"new")
    user.load()
    assert str(path) in user.refused(6, "pkram-kexec", "-e")
    assert (path / "file").read_bytes() == b"new"
    user.preserve(path)
    user.ok("pkram-kexec", "-e")
    assert (path / "file").read_bytes() == b"new"


def test_rw_takes_the_preservation_back(user, installed):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.preserve(path)
    with pytest.raises(OSError, match="Read-only"):
        (path / "file").write_bytes(b"more")
    user.ok("mount.pkramfs", "none", path, "-o", "remount,rw")
    (path / "file").write_bytes(b"more")
    assert "preserved" not in user.ok("pkramctl", "status").replace("not preserved", "")


def test_refused_while_a_tree_is_not_preserved(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.load()
    said = user.refused(6, "pkram-kexec", "-e")
    assert str(path) in said and "1 file" in said
    assert (path / "file").read_bytes() == b"data"


def test_forced_the_unpreserved_tree_is_lost(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.load()
    user.ok("pkram-kexec", "-e", "--force")
    user.mount("one")
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("append", ["ro quiet", "ro pkram=1234", "ro pkram=zzz"])
def test_a_missing_or_wrong_pfn_is_refused_while_nodes_exist(user, append):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.preserve(path)
    loaded = user.run("pkram-kexec", "-s", "-l", "builtin", f"--append={append}")
    assert loaded.stderr.strip(), "loading warns"
    if loaded.returncode == 0:
        assert user.pfn() in user.refused(6, "pkram-kexec", "-e")
    assert (path / "file").read_bytes() == b"data"


def test_a_stale_pfn_is_refused_after_a_kexec(user):
    path = user.mount("one")
    user.preserve(path)
    stale = user.pfn()
    user.kexec()
    assert user.pfn() != stale
    user.load(f"pkram={stale}")
    user.refused(6, "pkram-kexec", "-e")


def test_forced_without_the_pfn_the_tree_is_gone_and_the_log_says_so(user, installed):
    path = user.mount("one")
    (path / "file").write_bytes(bytes(1 << 20))
    user.preserve(path)
    user.load("ro quiet")
    user.ok("pkram-kexec", "-e", "--force")
    assert "shmem-one" in user.dmesg() and "lost" in user.dmesg()
    if not os.path.ismount(path):
        user.mount("one")
    assert list(path.iterdir()) == []
    assert "shmem-one" not in user.ok("pkramctl", "nodes")


def test_nothing_loaded_is_one_clear_line(user):
    user.mount("one")
    assert "no kernel is loaded" in user.run("pkram-kexec", "-e").stderr


def test_unload_forgets_the_image(user):
    user.mount("one")
    user.load()
    user.ok("pkram-kexec", "-u")
    assert "no kernel is loaded" in user.run("pkram-kexec", "-e").stderr


def test_reuse_cmdline_replaces_the_pfn(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.preserve(path)
    for _ in range(2):
        user.ok("pkram-kexec", "-s", "-l", "builtin", "--reuse-cmdline")
        user.ok("pkram-kexec", "-e")
        assert (user.files / "cmdline").read_text().count("pkram=") == 1
    assert (path / "file").read_bytes() == b"data"


def test_what_follows_two_dashes_is_init_s(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.preserve(path)
    pfn = (user.files / "pkram").read_text().strip()
    user.ok("pkram-kexec", "-l", "builtin", f"--append=ro -- pkram={pfn}")
    assert "would be lost" in user.run("pkram-kexec", "-e").stderr
    user.ok("pkram-kexec", "-l", "builtin", f"--append=ro pkram={pfn} -- pkram=99 single")
    for _ in range(2):
        user.ok("pkram-kexec", "-e")
        assert (path / "file").read_bytes() == b"data"
        user.ok("pkram-kexec", "-l", "builtin", "--reuse-cmdline")
    assert (user.files / "cmdline").read_text().endswith(" -- pkram=99 single\n")


def test_the_dry_run_changes_nothing(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.preserve(path)
    user.load()
    assert str(path) in user.ok("pkram-kexec", "-e", "--dry-run")
    assert (path / "file").read_bytes() == b"data" and os.path.ismount(path)


@pytest.mark.usefixtures("damaged")
@pytest.mark.parametrize("damage", ["cut", "random"])
def test_damaged_ram_is_refused_not_restored(user, damage):
    path = user.mount("one")
    (path / "file").write_bytes(os.urandom(1 << 20))
    user.preserve(path)
    user.unmount(path)
    ram = user.files / "ram"
    if damage == "cut":
        os.truncate(ram, ram.stat().st_size // 2)
    else:
        with open(ram, "r+b") as file:
            for start, length in data_extents(ram):
                file.seek(start)
                file.write(os.urandom(length))
    said = user.refused(32, "mount.pkramfs", "none", path, "-o", "pkram=one")
    assert len(said.strip().splitlines()) == 1, said
    assert not os.path.ismount(path)


def data_extents(path):
    with open(path, "rb") as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        while at < end:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, at - start


def test_a_host_too_full_says_so_and_loses_nothing(user):
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = user.root / "small"
    small.mkdir()
    user.ok("mount", "-t", "tmpfs", "-o", "size=320m", "none", small)
    try:
        os.environ["PKRAM_ROOT"] = str(small)
        path = user.mount("one")
        (path / "file").write_bytes(b"kept")
        with pytest.raises(OSError, match="No space"), open(path / "big", "wb") as file:
            for _ in range(400):
                file.write(bytes(1 << 20))
                os.fsync(file.fileno())
        (path / "big").unlink()
        assert (path / "file").read_bytes() == b"kept"
        user.preserve(path)
        user.unmount(path)
    finally:
        subprocess.run(["umount", str(user.directory("one"))], capture_output=True, check=False)
        os.environ["PKRAM_ROOT"] = str(user.root)
        user.ok("umount", "-l", small)


def test_refusals_are_in_the_kernel_log(user):
    path = user.mount("one")
    (path / "file").write_bytes(b"data")
    user.refused(2, "pkram-kexec", "-l", "/nonexistent")
    user.refused(8, "pkram-kexec", "-e")
    user.load()
    user.refused(6, "pkram-kexec", "-e")
    user.refused(1, "mount.pkramfs", "none", path, "-o", "remount,bogus")
    log = user.dmesg()
    for part in ("/nonexistent", "no kernel is loaded", "1 file would be lost", "bogus"):
        assert part in log


def test_pages_in_the_way_of_a_loaded_kernel_are_relocated_and_everybody_says_whose(user):
    """Row 15 as a user sees it: loaded first, preserved later."""
    path = user.mount("one")
    (path / "file").write_bytes(os.urandom(5_000_000))
    os.sync()
    before = snapshot(path)
    pkram = f"--append=ro pkram={user.pfn()}"
    user.ok("pkram-kexec", "-c", "-l", "builtin:16M", "--mem-min", "2M", pkram)
    plan = user.run("pkram-kexec", "-e", "--dry-run").stdout
    (said,) = re.findall(rf"would be relocated by its preserve: up to ([\d,]+) pages of {path} \(one\)", plan)
    user.preserve(path)
    (node,) = json.loads(user.ok("pkramctl", "--json", "nodes"))
    assert 0 < node["moved"] <= int(said.replace(",", ""))
    moved = f"{node['moved']:,}"
    assert f", {moved} pages relocated" in user.dmesg()
    assert f"relocated when it was preserved: {moved} pages of node shmem-one" in user.ok("pkram-kexec", "-en", "-v")
    steps = user.ok("pkram-kexec", "-e", "-v", "--poison")
    assert f"relocated when it was preserved: {moved} pages of node shmem-one" in steps
    assert "copy 4 segments and boot\n  kernel (builtin:16M): " in steps
    assert snapshot(path) == before
    assert f"{moved} of them relocated when saved" in user.dmesg()
    report = json.loads(user.ok("pkramctl", "--json", "report"))
    (found,) = report["nodes"]
    assert found["moved"] == node["moved"]
    foreseen, seen = (report["prediction"][side] | {"pause": 0} for side in ("foreseen", "seen"))
    assert foreseen == seen and (seen["mounts"], seen["moved"]) == (1, node["moved"])
