# SPDX-License-Identifier: GPL-2.0-or-later
"""pkram=off: mounts work as any tmpfs does, and preserve says why not."""

import errno
import json

import pytest

from pkramfs.control.protocol import RefusedError

pytestmark = pytest.mark.mount


@pytest.fixture
def switched_off(lab):
    """The laboratory under a kernel without PKRAM."""
    lab.umount(lab.mount("first"))  # boots
    for words in (["-s", "-l", "builtin:4M", "--append=ro pkram=off"], ["-e"]):
        done = lab.run("kexec", *words)
        assert done.returncode == 0, done
    return lab


def test_a_mount_is_a_plain_tmpfs(switched_off):
    lab = switched_off
    path = lab.mount("one")
    (path / "file").write_bytes(b"x" * 10_000)
    assert (path / "file").read_bytes() == b"x" * 10_000
    assert "one mounted on" in lab.dmesg() and "PKRAM is off in this kernel" in lab.dmesg()
    done = lab.helper(path, "remount,preserve,ro")
    assert done.returncode != 0 and "PKRAM is switched off in this kernel" in done.stderr
    (path / "file").write_bytes(b"still writable")
    assert (path / "file").read_bytes() == b"still writable"
    lab.umount(path)
    assert lab.leased() == 0


def test_the_commands_say_so(switched_off):
    lab = switched_off
    status = lab.run("ctl", "status")
    assert status.returncode == 0 and "PKRAM is off" in status.stdout
    assert json.loads(lab.run("ctl", "--json", "status").stdout)["nodes"] == []
    for words in (["nodes"], ["free", "--all"], ["verify"], ["inspect", "superblock"]):
        done = lab.run("ctl", *words)
        assert done.returncode != 0 and "PKRAM is switched off" in done.stderr, done
        assert "Traceback" not in done.stderr


def test_a_preserve_that_fails_freezes_nothing(switched_off):
    lab = switched_off
    path = lab.mount("one")
    with pytest.raises(RefusedError, match="switched off") as caught:
        lab.call(path, "preserve")
    assert caught.value.errno == errno.ENODEV
    status = lab.status(path)
    assert (status["state"], status["frozen"]) == ("live", False)


def test_a_mount_in_a_crash_kernel_is_a_plain_tmpfs(lab):
    """Row 20: the original logs that the load failed, and the mount works."""
    lab.umount(lab.mount("first"))
    for words in (
        ["-s", "-l", "builtin:4M", "--append=ro crashkernel=64M"],
        ["-e"],
        ["-p", "builtin:8M", "--append=irqpoll"],
        ["--panic"],
    ):
        done = lab.run("kexec", *words)
        assert done.returncode == 0, done
    path = lab.mount("one")
    (path / "dump").write_bytes(b"x" * 10_000)
    assert "one mounted on" in lab.dmesg() and "PKRAM is off in this kernel (this is a crash kernel)" in lab.dmesg()
    again = lab.helper(lab.dir("two"), "pkram=two")
    assert again.stdout == "two: PKRAM is off in this kernel (this is a crash kernel): nothing of it can be preserved\n"
    done = lab.helper(path, "remount,preserve,ro")
    assert done.returncode != 0 and "PKRAM is switched off in this kernel" in done.stderr
