"""A place for machines of this test's own."""

import shutil
import tempfile

import pytest


@pytest.fixture
def root(monkeypatch):
    """PKRAM_ROOT in memory, where holes cost nothing; gone afterwards."""
    directory = tempfile.mkdtemp(prefix="pkram-test-", dir="/dev/shm")
    monkeypatch.setenv("PKRAM_ROOT", directory)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def ctl(capsys):
    """Run pkramctl in this process: (status, stdout, stderr)."""
    from pkramfs.cli.ctl import main

    def run(*words):
        status = main(list(words))
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def kexec(capsys):
    """Run pkram-kexec in this process: (status, stdout, stderr)."""
    from pkramfs.cli.kexec import main

    def run(*words):
        status = main(list(words))
        out, err = capsys.readouterr()
        return status, out, err

    return run
