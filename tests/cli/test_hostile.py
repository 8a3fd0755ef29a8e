# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands on a machine whose files are not what they should be: one line and the right status, at once."""

import json
import os
import random
from pathlib import Path

import pytest

from tests.support.damage import FILES, places

pytestmark = pytest.mark.usefixtures("damaged")

LOOKS = [
    *(("ctl", *words.split()) for words in ("status", "--json status", "nodes", "verify", "report", "iomem", "dmesg")),
    *(("ctl", *words.split()) for words in ("inspect superblock", "machine show", "free nothing")),
    *(("kexec", *words.split()) for words in ("-S", "-e -n", "-u -n", "-l builtin -n", "--cold -n", "--panic -n")),
]
VALUES = [None, True, -1, 0, 1.5, 2**70, "", "x", "\ud800", "a\0", [], {}, [[]], {"x": 1}, [1, 0], 2**40, "../x", 4096]
KNOWN = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}


@pytest.fixture
def commands(capsys):
    """Run a command in this process: (status, stderr)."""
    from pkramfs.cli import ctl, kexec

    programs = {"ctl": ctl.main, "kexec": kexec.main}

    def run(program, *words):
        status = programs[program](words)
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def machine(root, ctl, kexec, tmp_path):
    """A machine that is up, with a kernel loaded, and one that waits to be finished, and a mount that is dead."""
    from pkramfs.kernel import nvram, staging
    from pkramfs.machine.directory import Machine

    assert ctl("machine", "create", "--ram", "128M", "--seed", "3")[0] == 0
    assert kexec("-l", "builtin:1M", "--reuse-cmdline")[0] == 0
    made = Machine.locate()
    loaded = staging.read(made)
    made.write_json(staging.CRASH_JSON, loaded.to_json() | {"mode": "crash"})
    entry = {"name": "kept", "mountpoint": str(tmp_path), "options": {"pkram": "kept"}, "pid": 4000000}
    made.write_json("mounts/00000000000000ff.json", entry | {"dev": 5, "log_at": 0})
    nvram.set_pending(made, nvram.Pending(nvram.KEXEC, 2, "ro", loaded.image, loaded.segments), [entry])
    return made


@pytest.mark.parametrize("name", FILES)
def test_no_command_believes_a_file(machine, commands, name, seed, some, request):
    path, rng = Path(machine.path(name)), random.Random(f"{seed} {name}")
    sound = path.read_text()
    every = list(places(json.loads(sound)))
    for _ in range(300 if request.config.getoption("--long") else 6):
        value = holder = json.loads(sound)
        *above, key = rng.choice(every)
        for step in above:
            holder = holder[step]
        holder[key] = rng.choice(VALUES)
        path.write_text(json.dumps(value))
        for words in some(LOOKS, 8):
            check(words, commands(*words), f"seed {seed}: {name}: {(*above, key)} is {holder[key]!r}")


@pytest.mark.parametrize("name", [*FILES, "dmesg", "cmdline", "iomem", "mounts/00000000000000ff.log"])
def test_no_command_waits_for_what_is_no_file(machine, commands, name, some):
    path = Path(machine.path(name))
    make = {
        "fifo": lambda: os.mkfifo(path),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "directory": path.mkdir,
        "loop": lambda: path.symlink_to(path),
        "empty": path.touch,
        "deep": lambda: path.write_text("[" * 100_000),
        "huge": lambda: (path.touch(), os.truncate(path, 1 << 40)),
    }
    for thing, made in make.items():
        path.unlink(missing_ok=True)
        made()
        try:
            for words in some(LOOKS, 6, thing):
                check(words, commands(*words), f"{name} is {thing}")
        finally:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def check(words, found, why):
    status, err = found
    assert status in KNOWN, (words, found, why)
    assert "internal error" not in err and "Traceback" not in err, (words, found, why)
    assert all(
        line.startswith(("pkramctl: ", "pkram-kexec: ", "pkramfs: warning: no kernel log: "))
        for line in err.splitlines()
    ), (words, found, why)
    assert err.count("\n") <= 2, (words, found, why)


def test_the_remedies_that_are_named_work(machine, ctl, kexec):
    from pkramfs.kernel import nvram, running

    nvram.cancel(machine)
    Path(machine.path("kexec/kexec.json")).write_text("{}")
    status, _, err = kexec("-e")
    assert (status, err.count("\n")) == (8, 1) and "remove it and load the kernel again" in err
    os.unlink(machine.path("kexec/kexec.json"))
    assert kexec("-l", "builtin:1M", "--reuse-cmdline") == (0, "", "")

    Path(machine.path("nvram.json")).write_text('{"boot_count": -1}')
    status, _, err = kexec("-e", "-n")
    assert status == 8 and "removing it forgets only what would be mounted again" in err
    os.unlink(machine.path("nvram.json"))
    assert kexec("-e")[0] == 0
    assert running.look(machine).generation == 2

    Path(machine.path("kernel.json")).write_text("[" * 10000)
    status, _, err = ctl("nodes")
    assert status == 8 and "pkram-kexec --cold --force boots with it empty" in err
    status, _, err = kexec("--cold")
    assert status == 8 and "only --force goes on" in err
    assert kexec("--cold", "--force")[0] == 0
    assert ctl("nodes") == (0, "no nodes are preserved\n", "")
