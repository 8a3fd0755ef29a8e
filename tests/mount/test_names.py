# SPDX-License-Identifier: GPL-2.0-or-later
"""Names that would write kernel logs, talk to terminals or break JSON, at every door of a real machine."""

import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.mount

FORGED = b"[    0.000000] forged"
HOSTILE = [
    b"line\n" + FORGED,
    b"cr\r" + FORGED,
    b"esc \x1b[2J\x1b]0;x\x07",
    "c1 \x9b2J nel \x85 ls \u2028".encode(),
    "bidi \u202egnp.exe".encode(),
    b"not utf-8 \xff\xfe",
    b"\\xff [red]back[reset]",
]
NAME = os.fsdecode(HOSTILE[0].replace(b" ", b"_") + HOSTILE[3] + b"\x1b[1m\xff")


def sound(text: str) -> str:
    """What a terminal or a log may get."""
    for line in text.removesuffix("\n").split("\n"):
        assert line.isprintable(), ascii(line)
        assert not line.startswith("[    0.000000] forged"), text
    return text


def lines(lab: Any) -> list[str]:
    """The kernel log: every line has its time, and none is anybody else's."""
    found = sound(lab.dmesg()).splitlines()
    for line in found:
        assert re.match(r"\[ *\d+\.\d{6}\] ", line), ascii(line)
    return found


def ctl(lab: Any, *words: str) -> Any:
    """What a command says in JSON, after a look at what it says to people."""
    for env in ({}, {"PYTHONIOENCODING": "ascii"}):
        done = lab.run("ctl", *words, env=env)
        assert done.returncode == 0, done.stderr
        sound(done.stdout + done.stderr)
    done = lab.run("ctl", "--json", *words)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.isascii()
    return json.loads(done.stdout)


def test_names_of_files(lab: Any) -> None:
    mnt = lab.mount("one")
    paths = [os.path.join(os.fsencode(mnt), raw) for raw in HOSTILE]
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(open(path, "w"))
            os.close(os.open(path + b" gone", os.O_CREAT))
            stack.enter_context(open(path + b" gone"))
            os.unlink(path + b" gone")
        (found,) = ctl(lab, "status")["mounts"]
        names = [[os.fsencode(name) for name in found[key]] for key in ("writers", "open_deleted")]
        assert names == [[b"/" + raw for raw in HOSTILE], [b"/" + raw + b" gone (deleted)" for raw in HOSTILE]]
        assert lab.run("kexec", "-l", "builtin:2M", "--reuse-cmdline").returncode == 0
        for words in (["-e", "-n"], ["-e"]):
            done = lab.run("kexec", *words)
            assert done.returncode == 6
            sound(done.stdout + done.stderr)
        done = lab.helper(mnt, "remount,preserve,ro")
        assert done.returncode == 32
        sound(done.stderr)
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(open(path))
            os.unlink(path)
        sound(lab.helper(mnt, "remount,preserve,ro").stderr)  # root's kernel refuses; a user gets a warning
        lab.call(mnt, "preserve")  # which does nothing where that was done
    assert any("is not preserved" in line for line in lines(lab))
    assert len(ctl(lab, "dmesg")) == len(lines(lab))


def test_names_of_a_mount_and_its_place(lab: Any) -> None:
    mnt = Path(os.fsdecode(os.fsencode(lab.dir("in")) + b"/" + b"".join(HOSTILE[:6])))
    mnt.mkdir()
    lab._made.add(mnt)
    done = lab.helper(mnt, f"pkram={NAME}", "-v")
    assert (done.returncode, done.stderr) == (0, "")
    sound(done.stdout)
    done = lab.helper(mnt, f"pkram={NAME}")
    assert done.returncode == 0 and "already mounted" in sound(done.stdout)
    (mnt / "file").write_text("x")
    sound(lab.helper(mnt, "remount,preserve,ro", "-v").stdout)
    (found,) = ctl(lab, "status")["mounts"]
    assert (found["name"], found["mountpoint"]) == (NAME, str(mnt))
    (node,) = ctl(lab, "nodes")
    assert node["name"] == f"shmem-{NAME}"
    done = lab.run("kexec", "-v", "-le", "builtin:2M", "--reuse-cmdline")
    assert (done.returncode, done.stderr) == (0, "")
    sound(done.stdout)
    assert ctl(lab, "report")["nodes"][0]["name"] == f"shmem-{NAME}"
    assert any("shmem-line" in row["name"] for row in ctl(lab, "iomem"))
    sound(Path(lab.machine.path("iomem")).read_text())
    assert ctl(lab, "verify") == {"nodes": 1, "logs": 1, "problems": []}
    fields = {field["name"]: field["value"] for field in ctl(lab, "inspect", "node")["fields"]}
    assert f"shmem-{NAME}" in fields.values()
    done = lab.run("ctl", "free", NAME)
    assert done.returncode == 9 and "is in use by" in sound(done.stderr)
    done = lab.helper(lab.dir("other"), f"pkram={NAME}")
    assert done.returncode == 32 and "has one mount at a time" in sound(done.stderr)
    done = lab.helper(lab.root / "absent\n\x1b[1m", f"pkram={NAME}")
    assert done.returncode == 32 and "does not exist" in sound(done.stderr)
    lab.umount(mnt)
    freed = json.loads(lab.run("ctl", "--json", "free", NAME).stdout)
    assert [one["name"] for one in freed] == [f"shmem-{NAME}"]
    assert any("freed node" in line for line in lines(lab))


@pytest.mark.parametrize(
    "words", [["frob\x1b[1m\n"], ["--machine", "a\n\x9bb/", "status"], ["punch", "\x1b\udcff", "0", "1"]]
)
def test_words_on_the_command_line(lab: Any, words: list[str]) -> None:
    done = lab.run("ctl", *words)
    assert done.returncode in (1, 2) and sound(done.stderr).count("\n") == 1
    debugged = lab.run("ctl", "--debug", *words)
    for line in debugged.stderr.split("\n"):
        assert line.isprintable(), ascii(line)


def test_a_command_line_of_any_bytes(lab: Any) -> None:
    lab.mount("one")
    done = lab.run("kexec", "-l", "builtin:2M", "--reuse-cmdline", "--append", "x=\x1b[1m\udcff")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\x1b[1m\\xff" in sound(lab.run("kexec", "--status").stdout)
    assert lab.run("kexec", "-e", "--force").returncode == 0
    assert any("x=\\x1b[1m\\xff" in line for line in lines(lab))
    assert ctl(lab, "report")["cmdline"].endswith("x=\x1b[1m\udcff")
