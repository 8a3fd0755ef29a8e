# SPDX-License-Identifier: GPL-2.0-or-later
"""A kexec on a host that others have filled: refused, in a dry run too, and every mount goes on as it was."""

import os

import pytest

from tests.support.lab import User
from tests.support.trees import fill, snapshot

pytestmark = pytest.mark.mount


@pytest.fixture
def user(host, monkeypatch, pkram_root):
    """His machine lives on the small host; what he mounted is gone before it is."""
    root = host.directory / "root"
    monkeypatch.setenv("PKRAM_ROOT", str(root))
    made = User(root)
    made.in_process = True
    made.directory = lambda name: _directory(pkram_root / name)
    try:
        yield made
    finally:
        for path in pkram_root.iterdir():
            while os.path.ismount(path):
                made.ok("umount", "-l", path)


def _directory(path):
    path.mkdir(exist_ok=True)
    return path


def lasting(status: str) -> list[str]:
    """A status without the lengths of logs."""
    return [line.partition("(log ")[0] for line in status.splitlines()]


def test_a_full_host_stops_no_mount(user, host):
    path = user.mount("one", "size=32M")
    fill(path)
    before = snapshot(path)
    user.preserve(path)
    user.load()
    daemon = lasting(user.run("pkramctl", "status").stdout)
    host.fill(leave=256 << 10)
    for words in (("-e", "-n"), ("-e",), ("-e",)):
        said = user.run("pkram-kexec", *words)
        assert said.returncode == 4, said
        assert "no room behind RAM" in said.stdout + said.stderr and "Traceback" not in said.stderr
        assert os.path.ismount(path) and snapshot(path) == before
    host.empty()
    assert lasting(user.run("pkramctl", "status").stdout) == daemon, "nothing was frozen, stopped or mounted again"
    assert "mounted again" in user.ok("pkram-kexec", "-e", "--poison")
    assert snapshot(path) == before
