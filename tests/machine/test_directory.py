# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's directory: names, damage, and what a place that cannot be written says."""

import errno
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pkramfs.errors import MachineError, UsageError
from pkramfs.machine import directory, files
from pkramfs.machine.claims import FileClaims
from pkramfs.machine.directory import Machine, default_root
from pkramfs.machine.firmware import FirmwareMap
from pkramfs.units import MIB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("PKRAM_ROOT", str(tmp_path))
    made = Machine.locate()
    made.create(FirmwareMap.default(64 * MIB, seed=1))
    return made


def test_a_machine_is_what_it_was_made(machine: Machine) -> None:
    assert machine.exists()
    assert machine.hardware() == FirmwareMap.default(64 * MIB, seed=1)
    assert machine.ram().size == 64 * MIB
    assert sorted(os.listdir(machine.path())) == ["kexec", "lock", "machine.json", "machine.json.copy", "mounts", "ram"]
    assert os.stat(machine.path()).st_mode & 0o777 == 0o700


def test_making_it_again_changes_nothing(machine: Machine) -> None:
    machine.ram().words(5)[:] = 7
    machine.create(FirmwareMap.default(128 * MIB))
    assert machine.hardware().size == 64 * MIB
    assert machine.ram().words(5).sum() == 7 * 512


def test_two_first_mounts_make_one_machine(tmp_path: Path) -> None:
    machines = [Machine(str(tmp_path / "m")) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: machines[n].create(FirmwareMap.default((64 + n) * MIB, seed=n)), range(8)))
    made = machines[0].hardware()
    assert made == FirmwareMap.default((64 + made.seed) * MIB, seed=made.seed)
    assert machines[0].ram().size == made.size


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0", "x" * 256])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError, match="give a plain file name"):
        Machine.locate(name)


def test_where_machines_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKRAM_ROOT", "/somewhere")
    assert Machine.locate("größe").path("ram") == "/somewhere/größe/ram"
    monkeypatch.setenv("PKRAM_ROOT", "")
    assert Machine.locate().path() == f"{default_root()}/default"


@pytest.mark.parametrize("root", ["/proc/nowhere", "/dev/null/x"])
def test_a_root_that_cannot_be_written(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKRAM_ROOT", root)
    machine = Machine.locate()
    with pytest.raises(MachineError, match=f"cannot make the machine {root}/default: "):
        machine.create()
    with pytest.raises(MachineError, match="cannot lock"), machine.lifecycle(shared=True):
        pass
    with pytest.raises(MachineError, match="cannot write"):
        machine.write_text("pkram", "1")
    with pytest.raises(MachineError, match="cannot list the mounts"):
        machine.live_ids()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\0\0", "not JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "version is missing, expected 1"),
        ('{"version": 2}', "version is 2, expected 1"),
        ('{"version": 1}', "machine.json is damaged: firmware map: `map` is not a list"),
        ('{"version": 1, "map": [{"start": 0, "end": Infinity, "kind": "usable"}]}', "Infinity is no number of JSON"),
        (
            '{"version": 1, "map": [{"start": 0, "end": 9999, "kind": "usable"}, '
            '{"start": 8192, "end": 99999, "kind": "usable"}]}',
            "overlaps or precedes",
        ),
    ],
)
def test_a_damaged_description_is_named(machine: Machine, text: str, reason: str) -> None:
    Path(machine.path("machine.json")).write_text(text)
    with pytest.raises(MachineError, match=reason) as refused:
        machine.hardware()
    assert machine.path("machine.json") in str(refused.value)


def test_without_a_description_there_is_no_machine(machine: Machine) -> None:
    os.unlink(machine.path("machine.json"))
    assert not machine.exists()
    with pytest.raises(
        MachineError, match=r"machine\.json is missing, but its RAM is there: `pkramctl machine create`"
    ):
        machine.ram()
    with pytest.raises(MachineError, match="there is no machine in"):
        Machine(machine.path("other")).ram()


def test_a_directory_that_cannot_be_read_is_not_called_missing(machine: Machine) -> None:
    before = os.geteuid()
    os.chmod(machine.directory, 0)
    try:
        os.seteuid(before or 4321)
        assert machine.missing().startswith(f"cannot look into {machine.directory}: Permission denied: ")
    finally:
        os.seteuid(before)
        os.chmod(machine.directory, 0o755)


@pytest.mark.parametrize("size", [0, 4096, 64 * MIB - 1, 65 * MIB])
def test_ram_that_was_cut_or_replaced(machine: Machine, size: int) -> None:
    os.truncate(machine.path("ram"), size)
    with pytest.raises(MachineError, match=rf"\({size} bytes\), but machine.json says 64.0 MiB"):
        machine.ram()


def test_ram_that_is_gone(machine: Machine) -> None:
    os.unlink(machine.path("ram"))
    with pytest.raises(MachineError, match=r"cannot open RAM: .*ram: No such file"):
        machine.ram()
    os.mkdir(machine.path("ram"))
    with pytest.raises(MachineError, match=r"cannot open RAM: .*ram: Is a directory"):
        machine.ram()


def test_files_are_replaced_at_once(machine: Machine) -> None:
    machine.write_json("x.json", {"a": 1})
    with open(machine.path("x.json")) as old:
        machine.write_json("x.json", {"a": 2})
        assert json.load(old) == {"a": 1}
    assert machine.read_json("x.json") == {"a": 2}
    assert machine.read_json("y.json") is None
    machine.remove("x.json")
    machine.remove("x.json")
    assert [name for name in os.listdir(machine.path()) if "x.json" in name] == []


def test_text_that_is_not_unicode_comes_back(machine: Machine) -> None:
    machine.write_text("cmdline", "a=\udcff")
    assert machine.read_text("cmdline") == "a=\udcff"


def test_the_log_counts_from_the_boot(machine: Machine) -> None:
    machine.log("before any boot")
    assert machine.dmesg() == "[    0.000000] before any boot\n"
    machine.begin_log()
    machine.log("after it")
    first, second = machine.dmesg().splitlines()
    assert "boot clock" in first
    assert second.endswith("] after it")
    Path(machine.path("dmesg")).write_text("[ 0.0] clocksource: boot clock soon\n")
    machine.log("a damaged clock")
    assert "[    0.000000] a damaged clock" in machine.dmesg()


@pytest.fixture
def open_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default root of the test's own, as /dev/shm/pkram is one below a directory that is open to all."""
    monkeypatch.delenv("PKRAM_ROOT", raising=False)
    monkeypatch.setattr(directory, "default_root", lambda: str(tmp_path / "pkram"))
    return tmp_path / "pkram"


def own(path: Path, uid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stat say that a path is somebody's (only root could make it so)."""
    for name in ("stat", "lstat"):
        real = getattr(os, name)

        def see(place: object, *args: object, real: object = real, **more: object) -> object:
            found = real(place, *args, **more)  # type: ignore[operator]
            return os.stat_result((*found[:4], uid, *found[5:])) if place == str(path) else found

        monkeypatch.setattr(directory.os, name, see)


@pytest.mark.parametrize("euid", [0, 1000])
@pytest.mark.parametrize("below", [".", "default"])
def test_a_place_that_a_stranger_made_first_is_refused(
    open_place: Path, monkeypatch: pytest.MonkeyPatch, euid: int, below: str
) -> None:
    (open_place / "default").mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    for place in (open_place, open_place / "default"):
        own(place, euid, monkeypatch)
    own(open_place / below, 4242, monkeypatch)
    machine = Machine.locate()
    for use in (machine.create, machine.hardware, machine.ram, lambda: machine.lifecycle(shared=True)):
        with pytest.raises(MachineError, match=r"belongs to user 4242: set PKRAM_ROOT to a directory of your own"):
            use()
    assert os.listdir(open_place / "default") == []


def test_root_may_name_anybodys_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    own(Path(machine.path()), 4242, monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert machine.hardware().size == 64 * MIB
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MachineError, match="belongs to user 4242"):
        machine.hardware()


def test_a_place_that_others_may_write_is_refused(open_place: Path) -> None:
    machine = Machine.locate()
    machine.create(FirmwareMap.default(64 * MIB))
    assert os.stat(open_place).st_mode & 0o022 == 0
    for mode, fine in ((0o777, False), (0o775, False), (0o1777, True), (0o755, True)):
        os.chmod(open_place, mode)
        if fine:
            machine.hardware()
        else:
            with pytest.raises(MachineError, match=f"{open_place} can be written by others: chmod go-w"):
                machine.hardware()


def test_what_a_dead_maker_left_is_no_machine(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path / "m"))
    os.makedirs(machine.path())
    with open(machine.path("ram"), "wb") as file:
        file.truncate(96 * MIB)
    machine.create(FirmwareMap.default(64 * MIB))
    assert machine.ram().size == 64 * MIB


def test_a_description_that_was_lost_is_made_again_from_its_copy(tmp_path: Path) -> None:
    machine = Machine(str(tmp_path / "m"))
    odd = FirmwareMap(((0, 4 * MIB, "usable"), (5 * MIB, 80 * MIB, "usable")), ((0, 40 * MIB, 1),), seed=9)
    machine.create(odd)
    machine.ram().words(5)[:] = 7
    os.unlink(machine.path("machine.json"))
    with pytest.raises(MachineError, match="its copy says other hardware: `pkramctl machine create` without options"):
        machine.create(FirmwareMap.default(80 * MIB))
    machine.create()
    assert machine.hardware() == odd and "from its copy" in machine.dmesg()
    assert machine.ram().words(5).sum() == 7 * 512


@pytest.mark.parametrize("size", [64 * MIB, 5 << 30])
def test_memory_without_its_description_is_not_thrown_away(tmp_path: Path, size: int) -> None:
    machine = Machine(str(tmp_path / "m"))
    machine.create(FirmwareMap.default(size, seed=1))
    made = machine.ram()
    made.words(5)[:] = 7
    for name in ("machine.json", "machine.json.copy"):
        os.unlink(machine.path(name))
    for wrong in (FirmwareMap.default(80 * MIB), FirmwareMap.default(6 << 30)):
        with pytest.raises(MachineError, match=r"ram holds memory, but machine\.json is missing") as refused:
            machine.create(wrong)
        assert f"`pkramctl machine create --ram {size}`" in str(refused.value)
    assert not machine.exists() and os.stat(machine.path("ram")).st_size == made.size
    machine.create(FirmwareMap.default(size, seed=2))
    assert machine.ram().words(5).sum() == 7 * 512


def test_machines_of_earlier_versions_get_their_copy(machine: Machine) -> None:
    before = machine.hardware()
    os.unlink(machine.path("machine.json.copy"))
    machine.keep_copy()
    machine.ram().words(5)[:] = 7
    os.unlink(machine.path("machine.json"))
    Path(machine.path("machine.json")).write_text("[")
    with pytest.raises(
        MachineError, match=r"is damaged: not JSON .*; remove it, and `pkramctl machine create` makes it"
    ):
        machine.hardware()
    os.unlink(machine.path("machine.json"))
    machine.create()
    assert machine.hardware() == before


def test_a_full_host_is_one_line_and_leaves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.write_json("nvram.json", {"a": 1})
    lock = machine.claim(0x500)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(os.listdir(machine.path()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(os, "write", full)
        for use in (
            lambda: machine.write_json("nvram.json", {"a": 2}),
            lambda: lock.write_entry({"pid": 1}),
        ):
            with pytest.raises(MachineError, match=r"cannot write .*: No space left on device"):
                use()
        machine.log("hello")
        machine.begin_log()
    assert sorted({*os.listdir(machine.path())} - {"dmesg"}) == before
    assert os.listdir(machine.path("mounts")) == [f"{0x500:016x}.lock"]
    assert machine.read_json("nvram.json") == {"a": 1}
    lock.release()


def test_a_link_that_somebody_planted_is_not_followed(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    for name in ("dmesg", f"pkram.{os.getpid()}.tmp"):
        os.symlink(tmp_path / "victim", machine.path(name))
    machine.log("hello")
    with pytest.raises(MachineError, match="cannot write"):
        machine.write_text("pkram", "34f")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("what", ["directory", "fifo", "link", "dangling", "no place"])
def test_logging_never_decides(machine: Machine, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(machine.path("dmesg"))
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to("/dev/full")
    elif what == "dangling":
        path.symlink_to("/nowhere/at/all")
    else:
        path = Path(machine.path("dmesg", "x" * 300))
        machine = Machine(str(path))
    for _ in range(3):
        machine.log("a line with \udcff and \ud800")
        machine.begin_log()
    assert isinstance(machine.last_lines(5), list)
    machine.drop_log()
    said = capfd.readouterr().err
    assert said.count("\n") == said.count("pkramfs: warning: no kernel log: ") == 1


def test_temporary_files_and_claims_of_the_dead_are_cleared_away(machine: Machine) -> None:
    """A process that dies while it writes leaves a file whose lock is free; one that still writes holds it."""
    places = [machine.path(), machine.path("mounts")]
    ready, said = os.pipe()
    pid = os.fork()
    if not pid:
        for place in places:
            files.locked(os.path.join(place, "x.json.1.tmp"))
        claim = FileClaims(machine.path("claims")).take("save", b"living")
        os.write(said, b"x")
        signal.pause()
        os._exit(claim is None)
    os.read(ready, 1)
    try:
        left = [os.path.join(place, f"{name}.{os.getpid()}.tmp") for place in places for name in ("machine.json", "a")]
        for path in left:
            Path(path).write_text("half of it")
        os.makedirs(machine.path("claims"), exist_ok=True)
        Path(machine.path("claims", "save-dead")).touch()
        machine.clear_away(())
        assert not any(os.path.exists(path) for path in left)
        assert [os.path.exists(os.path.join(place, "x.json.1.tmp")) for place in places] == [True, True]
        assert len(os.listdir(machine.path("claims"))) == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    machine.clear_away(())
    assert [name for place in places for name in os.listdir(place) if name.endswith(".tmp")] == []
    assert os.listdir(machine.path("claims")) == []
    assert machine.hardware().size == 64 * MIB


def test_threads_that_replace_one_file_leave_nothing(machine: Machine) -> None:
    texts = [str(number) * 5000 for number in range(4)]

    def work(text: str) -> None:
        for _ in range(50):
            machine.write_text("file", text)
            assert machine.read_text("file") in texts

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, texts))
    assert not [name for name in os.listdir(machine.path()) if name.endswith(".tmp")]
