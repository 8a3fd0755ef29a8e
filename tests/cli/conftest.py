"""A place for machines of this test's own."""

import pytest


@pytest.fixture
def root(pkram_root):
    """PKRAM_ROOT in memory, where holes cost nothing; sound and gone afterwards."""
    return str(pkram_root)


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
