# SPDX-License-Identifier: GPL-2.0-or-later
"""Every JSON file of a machine, damaged in thousands of ways: what is read is as declared, or refused in one line."""

import copy
import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from pkramfs.errors import DamagedError, PkramfsError
from pkramfs.kernel import kernelrecord, loading, nvram, staging
from pkramfs.machine.directory import Machine
from pkramfs.machine.files import LIMIT
from pkramfs.units import BLOCK_PAGES, PAGE_SIZE
from tests.support.damage import FILES, places

pytestmark = pytest.mark.usefixtures("damaged")

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, -0.0, 1e308, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**400, 4096, 255),
    *("", "x", "a\0b", "../../etc/passwd", "\ud800", "\udcff", "é", "\n", "x" * 70000, "NaN", "7", "/"),
    *([], {}, [[]], [0], [0, 0], [1, 0], [0, 2**70], ["a", "b"], [None, None], {"": None}, {"x": 1}, [1, 2, 3]),
]
TEXTS = [
    *(
        "",
        " ",
        "{",
        "}",
        "[",
        "[]",
        "0",
        "null",
        '"x"',
        "{}",
        "{]",
        "NaN",
        "[NaN]",
        '{"a": 1, "a": 2}',
        "\0",
        "\ufeff{}",
    ),
    *("[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900, "1" * 5000, '{"a": ' + "9" * 5000 + "}", "1e999"),
    *(
        '{"version": 1e999}',
        '{"version": Infinity}',
        '{"pending": -Infinity}',
        '{"boot_count": NaN}',
        "{" + " " * 100_000,
    ),
]


def damaged(sound: dict[str, Any], rng: random.Random) -> bytes:
    """Return one text that is nearly `sound`."""
    value = copy.deepcopy(sound)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = list(places(value))
        if not known:
            break
        *above, key = rng.choice(known)
        holder = value
        for step in above:
            holder = holder[step]
        what = rng.random()
        if what < 0.15:
            del holder[key]
        elif what < 0.25 and isinstance(holder, dict):
            holder[rng.choice(["more", "", "\udc80", "pfn", "name", "x" * 300])] = rng.choice(VALUES)
        elif what < 0.3 and isinstance(holder, list):
            holder.append(copy.deepcopy(rng.choice(VALUES)))
        elif what < 0.4 and type(holder[key]) is int:
            holder[key] = rng.choice(
                (holder[key] + 1, -holder[key], holder[key] << 40, float(holder[key]), str(holder[key]))
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(value).encode()
    what = rng.random()
    if what < 0.1:
        return text[: rng.randrange(len(text) + 1)]
    if what < 0.2:
        at = rng.randrange(len(text))
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    return text


@pytest.fixture
def machine(lab: Any, tmp_path: Path) -> Machine:
    """Make a machine with every file that it can have: a node, loaded kernels, one mount, a pending boot."""
    running = lab.up()
    lab.preserve("kept", 5)
    loading.load(lab.machine, loading.Request("builtin:1M", append=f"ro pkram={running.info.super_pfn:x}"))
    loaded = staging.read(lab.machine)
    assert loaded is not None
    lab.machine.write_json(staging.CRASH_JSON, loaded.to_json() | {"mode": "crash"})
    dead = {"generation": 1, "super_pfn": 3, "lease_table_pfn": 4, "cmdline": "ro", "dmesg": ["[    0.000000] a"]}
    pending = nvram.Pending(
        nvram.KEXEC, 2, "ro", loaded.image, loaded.segments, nodes=(("kept", 5),), scratch=(512, 1024), dead=dead
    )
    entry = {"name": "kept", "mountpoint": str(tmp_path), "options": {"pkram": "kept", "ro": True}, "pid": 4000000}
    nvram.set_pending(lab.machine, pending, [entry])
    lab.machine.write_json("mounts/00000000000000ff.json", entry | {"dev": 5, "log_at": 0, "restored": False})
    return lab.machine


def look(machine: Machine) -> None:
    """Read all that anybody reads from these files, and use it as its first reader does."""
    frames = machine.hardware().size // PAGE_SIZE
    assert machine.hardware().node_spans()
    info = kernelrecord.read(machine, any_layout=True)
    if info is not None:
        assert all(start < end for start, end in [*info.reserved.values(), *info.stale, *info.initmem])
        assert info.own_pages.total + info.reserve_pages.total <= len(info.reserved) * frames + frames
        assert 0 <= info.booted < 1e300 and json.dumps(info.to_json())
        assert info.lease_table_pfn + info.blocks * 8 // PAGE_SIZE < frames <= info.blocks * BLOCK_PAGES
    pending = nvram.pending(machine)
    for loaded in (pending, staging.read(machine), staging.read(machine, staging.CRASH_JSON)):
        for segment in loaded.segments if loaded else ():
            assert 0 <= segment.pfn < segment.end <= frames and "/" not in segment.file
            assert segment.describe() and os.fsencode(segment.source) is not None
        assert loaded is None or (json.dumps([loaded.to_json()]) and os.fsencode(loaded.cmdline) is not None)
    for mount in nvram.mounts(machine):
        assert os.fsencode(mount["mountpoint"]) is not None
        assert mount["name"] is None or os.fsencode(mount["name"]) is not None
    nvram.next_generation(machine)
    nvram.pause(machine)
    for entry in machine.mounts():
        assert os.fsencode(entry.mountpoint) and entry.pid >= 0 and isinstance(entry.options, dict)
        assert not entry.damaged or "\n" not in entry.damaged


@pytest.mark.parametrize("name", FILES)
def test_whatever_is_in_a_file_is_as_declared_or_refused(
    machine: Machine, name: str, seed: int, request: pytest.FixtureRequest
) -> None:
    path = Path(machine.path(name))
    sound, refused = json.loads(path.read_text()), 0
    count = 5000 if request.config.getoption("--long") else 100
    rng = random.Random(f"{seed} {name}")
    look(machine)
    for text in [
        *(text.encode("utf-8", "surrogatepass") for text in TEXTS),
        *(damaged(sound, rng) for _ in range(count)),
    ]:
        path.write_bytes(text)
        try:
            look(machine)
        except PkramfsError as error:
            refused += 1
            assert "\n" not in str(error), text
            named = machine.path() if name == "machine.json" else str(path)  # a smaller RAM makes others' pfns wrong
            assert named in str(error), f"{error} does not name the file; {text!r}"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {name} holding {text[:2000]!r} made {error!r}") from error
    path.write_text(json.dumps(sound))
    look(machine)
    assert name.startswith("mounts") or refused > count // 4, "most of these are damage, and must be seen as such"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))


def make_directory(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def make_large(path: Path) -> None:
    path.write_bytes(b"[" + b" " * LIMIT + b"]")


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def make_empty(path: Path) -> None:
    path.touch()


THINGS = [make_fifo, make_zero, make_directory, make_loop, make_huge, make_large, make_socket, make_empty]


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(machine: Machine, name: str) -> None:
    path = Path(machine.path(name))
    for thing in [*THINGS, *([make_device] if os.geteuid() == 0 else [])]:
        path.unlink()
        thing(path)
        try:
            said = refusal(machine, name)
        finally:
            path.rmdir() if thing is make_directory else path.unlink()
            path.touch()
        assert said.startswith(f"{path} is damaged: ") and "\n" not in said, thing


def refusal(machine: Machine, name: str) -> str:
    """Return the refusal of a damaged file."""
    if name.startswith("mounts"):
        (entry,) = machine.mounts()
        return entry.damaged
    with pytest.raises(DamagedError) as refused:
        look(machine)
    assert refused.value.path == machine.path(name) and refused.value.remedy
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kernel.json", {"super_pfn": True}, "super_pfn is True, expected a whole number from 0 to 65535"),
        ("kernel.json", {"reserved": {"x": [5, 5]}}, "reserved.x is [5, 5], expected [start, end) in pages"),
        ("kernel.json", {"blocks": 129}, "blocks is 129, expected a whole number from 128 to 128"),
        ("nvram.json", {"boot_count": 1.0}, "boot_count is 1.0, expected a whole number"),
        ("nvram.json", {"mounts": [{"name": "a"}]}, "mounts[0].mountpoint is missing, expected text"),
        ("kexec/kexec.json", {"segments": []}, "segments is empty, expected a list of segments with kernel, cmdline"),
        ("kexec/kexec.json", {"image": {}}, "image.kind is missing, expected text"),
    ],
)
def test_damage_names_file_field_what_was_found_and_expected(
    machine: Machine, name: str, change: dict[str, Any], message: str
) -> None:
    machine.write_json(name, json.loads(Path(machine.path(name)).read_text()) | change)
    with pytest.raises(DamagedError) as refused:
        look(machine)
    assert f"{machine.path(name)} is damaged: {message}" in str(refused.value)
    assert refused.value.field in message and "; " in str(refused.value)


def test_what_could_not_be_read_again_is_not_written(machine: Machine) -> None:
    before = Path(machine.path(nvram.NAME)).read_bytes()
    pending = nvram.pending(machine)
    assert pending is not None
    with pytest.raises(PkramfsError, match=r"nvram\.json cannot hold this: mounts\[0\]\.mountpoint is 5"):
        nvram.set_pending(machine, pending, [{"name": "a", "mountpoint": 5}])
    assert Path(machine.path(nvram.NAME)).read_bytes() == before
