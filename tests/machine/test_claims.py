# SPDX-License-Identifier: GPL-2.0-or-later
"""Claims: alone or shared, in one process or several, and gone with whoever held them."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pkramfs.errors import MachineError
from pkramfs.machine.claims import FileClaims, LocalClaims

HOLDER = """
import sys
from pkramfs.machine.claims import FileClaims
claim = FileClaims(sys.argv[1]).take("save", b"name", shared=len(sys.argv) > 2)
print("held" if claim else "refused", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["local", "file"])
def claims(request, tmp_path):
    return LocalClaims() if request.param == "local" else FileClaims(str(tmp_path / "claims"))


def test_one_alone_or_many_together(claims):
    alone = claims.take("load", b"a")
    assert claims.held("load", b"a")
    assert claims.take("load", b"a") is None
    assert claims.take("load", b"a", shared=True) is None
    alone.release()
    assert not claims.held("load", b"a")
    together = [claims.take("load", b"a", shared=True) for _ in range(3)]
    assert all(together) and not claims.held("load", b"a")
    for claim in together:
        assert claims.take("load", b"a") is None
        claim.release()
        claim.release()  # does nothing
    last = claims.take("load", b"a")
    assert last is not None
    last.release()


def test_names_and_works_are_apart(claims):
    held = [claims.take(work, name) for work in ("save", "load") for name in (b"a", b"b", b"\xff" * 255, b"a/../b")]
    assert all(held)


def test_a_claim_ends_with_the_last_reference(claims):
    claim = claims.take("save", b"a")
    del claim
    assert not claims.held("save", b"a")
    assert claims.take("save", b"a") is not None


def test_of_many_threads_one_gets_it(claims):
    with ThreadPoolExecutor(8) as pool:
        held = list(pool.map(lambda _: claims.take("save", b"a"), range(8)))
    assert sum(claim is not None for claim in held) == 1


def test_nothing_is_left_behind(tmp_path):
    claims = FileClaims(str(tmp_path / "claims"))
    taken = [claims.take("load", b"a", shared=True), claims.take("load", b"a", shared=True), claims.take("save", b"b")]
    assert len(os.listdir(tmp_path / "claims")) == 2
    for claim in taken:
        claim.release()
    assert os.listdir(tmp_path / "claims") == []


def holder(directory, *words):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_another_process_is_in_the_way_as_long_as_it_lives(tmp_path, end):
    process = holder(tmp_path)
    claims = FileClaims(str(tmp_path))
    assert claims.held("save", b"name") and claims.take("save", b"name") is None
    if end == "killed":
        process.send_signal(signal.SIGKILL)
    process.communicate("")
    assert not claims.held("save", b"name")
    claim = claims.take("save", b"name")
    assert claim is not None, "the file that it left is nobody's"
    claim.release()
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot claim a name"):
        FileClaims(str(tmp_path / "file" / "claims")).take("save", b"a")
