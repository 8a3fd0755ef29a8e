# SPDX-License-Identifier: GPL-2.0-or-later
"""What may lie behind RAM: found by what it is, refused for what it must not be."""

import os
from pathlib import Path

import pytest

from pkramfs.errors import DamagedError, FormatError, MachineError, UsageError
from pkramfs.machine import backing, conf, header, named
from pkramfs.machine.backing import BLOCK, DEVDAX, DEVMEM, FILE, KINDS, Backing, Spec
from pkramfs.machine.conf import Conf
from pkramfs.machine.directory import Machine
from pkramfs.machine.host import Host
from pkramfs.machine.mapped import open_ram
from pkramfs.units import GIB, MIB
from tests.support.host import KEXEC, FakeHost


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    return FakeHost(tmp_path / "host", monkeypatch)


@pytest.fixture
def place(ram_path: str) -> Path:
    """Where a file in memory may be made."""
    return Path(ram_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/dev/dax0.0", Spec("/dev/dax0.0")),
        ("/pm/ram:64G", Spec("/pm/ram", 64 * GIB)),
        ("/dev/mem:1G@0x20000000", Spec("/dev/mem", GIB, 0x20000000)),
        ("/odd:name/ram", Spec("/odd:name/ram")),
        ("/odd@1/ram:1G", Spec("/odd@1/ram", GIB)),
    ],
)
def test_memory_is_named_by_its_path(text: str, found: Spec) -> None:
    assert backing.parse(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ram/x", "invalid memory 'ram/x': write /PATH"),
        ("/x:lots", "not a size: 'lots'"),
        ("/x:", "cannot open RAM: /x:"),
    ],
)
def test_what_names_no_memory_is_refused(text: str, message: str) -> None:
    with pytest.raises((UsageError, MachineError), match=message):
        backing.find(backing.parse(text), Host())


def test_a_file_is_made_where_it_is_given_a_size(place: Path, host: FakeHost) -> None:
    spec = Spec(str(place), 257 * MIB)  # whole page blocks are used
    backing.make_file(spec)
    found = backing.find(spec, host)
    assert found == Backing(FILE, str(place), 256 * MIB) and found.spec == str(place)
    assert place.stat().st_mode & 0o777 == 0o600 and place.stat().st_blocks == 0
    assert list(backing.problems(found, host)) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("{}"), "{} does not exist; {}:SIZE makes it"),
        (Spec("{}", MIB), "1.0 MiB is too small, 64.0 MiB is the least"),
        (Spec("/dev/mem1", GIB, GIB), "/dev/mem1 does not exist"),
        (Spec("/dev/dax9.9", GIB), "/dev/dax9.9 does not exist"),
    ],
)
def test_nothing_else_is_made(place: Path, spec: Spec, message: str) -> None:
    spec = spec._replace(path=spec.path.format(place))
    with pytest.raises(MachineError, match=message.replace("{}", str(place))):
        backing.make_file(spec)
    assert not os.path.lexists(spec.path)


def test_a_memory_device_has_the_size_that_sysfs_says(host: FakeHost) -> None:
    host.add_device("/dev/zero", 512 * MIB + 4096, align=4096)
    assert backing.find(Spec("/dev/zero"), host) == Backing(DEVDAX, "/dev/zero", 512 * MIB)
    host.add_device("/dev/full", GIB + 512 * MIB, align=GIB)
    assert backing.find(Spec("/dev/full"), host).size == GIB


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/null", "/dev/null is not a device of memory: give /dev/daxN.M"),
        ("/dev", "Is a directory"),
        ("/nowhere/ram", "cannot open RAM: /nowhere/ram: No such file or directory"),
    ],
)
def test_what_is_no_memory_is_refused_even_if_forced(host: FakeHost, path: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        backing.find(Spec(path), host)


def test_small_memory_and_a_wrong_size_are_refused(place: Path, host: FakeHost) -> None:
    place.write_bytes(bytes(MIB))
    with pytest.raises(MachineError, match="too small: it has 0 B"):
        backing.find(Spec(str(place)), host)
    os.truncate(place, 128 * MIB)
    with pytest.raises(MachineError, match=r"has 128 MiB, not 1.0 GiB"):
        backing.find(Spec(str(place), GIB), host)
    with pytest.raises(UsageError, match="only of /dev/mem a range"):
        backing.find(Spec(str(place), None, GIB), host)


def test_a_file_of_others_is_named(place: Path, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    backing.make_file(Spec(str(place), 64 * MIB))
    place.chmod(0o622)
    found = Backing(FILE, str(place), 64 * MIB)
    assert list(backing.problems(found, host)) == [f"{place} can be written by others: chmod go-w"]
    place.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert list(backing.problems(found, host)) == [f"{place} belongs to user {place.stat().st_uid}: chown it"]


def test_memory_that_somebody_has_open_is_not_taken(
    place: Path, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing.make_file(Spec(str(place), 64 * MIB))
    monkeypatch.setattr(Host, "users", lambda *_: [4242])
    for force in (False, True):
        with pytest.raises(MachineError, match=f"{place} is open in process 4242: end it first"):
            named.take("one", Spec(str(place), 64 * MIB), host, force=force)
    assert not any(place.read_bytes()[:4096])


def test_a_block_device_is_not_its_memory(place: Path, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write_bytes(b"")
    found = Backing(BLOCK, str(place), 64 * MIB)
    assert "stores go to the page cache" in next(iter(backing.problems(found, host)))
    monkeypatch.setattr(backing, "_is_claimed", lambda _: True)
    assert "is in use: it is mounted, swap" in next(iter(backing.problems(found, host)))


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        (0x20000000, ""),
        (0x30000000, "0x30000000-0x4fffffff is not set aside in /proc/iomem, not Reserved: boot with memmap=512M$768M"),
        (0x80000000, "0x80000000-0x9fffffff is System RAM in /proc/iomem, not Reserved: boot with memmap=512M$2048M"),
    ],
)
def test_physical_memory_must_be_set_aside(place: Path, host: FakeHost, start: int, problem: str) -> None:
    place.write_bytes(b"")
    host.write(
        "proc/iomem",
        "00001000-0009fbff : System RAM\n20000000-3fffffff : Reserved\n  20000000-20000fff : mine\n"
        "40000000-dfffffff : System RAM\n  41000000-41ffffff : Kernel code\n",
    )
    found = Backing(DEVMEM, str(place), 512 * MIB, start)
    assert "".join(backing.problems(found, host)) == problem
    assert found.spec == f"{place}:0x20000000@{start:#x}"


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ("/dev/mem:1G@4G", True),
        ("/dev/mem:64M@4992M", True),
        ("/dev/mem:8G@1G", True),
        ("/dev/mem:1G@5G", False),
        ("/dev/mem:1G@3G", False),
        ("/dev/dax0.0", False),
        ("/dev/mem2:1G@4G", False),
    ],
)
def test_ranges_that_overlap_are_known(other: str, found: bool) -> None:
    one, two = backing.parse("/dev/mem:1G@4G"), backing.parse(other)
    assert backing.overlap(one, two) is backing.overlap(two, one) is found


@pytest.mark.parametrize(("at", "sign", "what"), backing._SIGNS)
def test_what_lies_there_is_named(at: int, sign: bytes, what: str) -> None:
    page = bytearray(backing.LOOKED_AT)
    page[at : at + len(sign)] = sign
    assert backing.contents(bytes(page)) == what


def test_what_is_empty_holds_nothing() -> None:
    assert backing.contents(bytes(backing.LOOKED_AT)) == ""
    assert backing.contents(bytes(backing.LOOKED_AT - 1) + b"x") == "data of somebody"


def test_every_kind_says_what_it_is() -> None:
    assert set(KINDS) == {"file", "fsdax", "devdax", "devmem", "block"}
    assert [name for name, kind in KINDS.items() if kind.sparse] == ["file"]
    assert [name for name, kind in KINDS.items() if not kind.pinnable] == ["devmem"]
    assert {name for name, kind in KINDS.items() if "memmap=" in kind.survives} == {"fsdax", "devdax", "devmem"}


# -- taking it, and finding it again ---------------------------------------------------------------


def test_memory_is_taken_once_and_found_again(place: Path, host: FakeHost) -> None:
    spec = Spec(str(place), 64 * MIB)
    taken = named.take("one", spec, host, seed=5)
    said = Conf(taken.backing.spec, taken.header.uuid)
    assert named.find(said, host) == taken == named.take("one", spec, host, seed=6)
    assert (taken.header.seed, taken.header.generation, taken.header.size) == (5, 0, 64 * MIB)


def test_memory_that_holds_something_is_not_taken(place: Path, host: FakeHost) -> None:
    spec = Spec(str(place), 64 * MIB)
    taken = named.take("one", spec, host)
    with pytest.raises(MachineError, match="holds the machine 'one': give --machine one, or --force makes a new one"):
        named.take("two", spec, host)
    forced = named.take("two", spec, host, force=True)
    assert forced.header.uuid != taken.header.uuid
    with pytest.raises(MachineError, match=f"holds another machine, 'two' with uuid {forced.header.uuid}, not"):
        named.find(Conf(str(place), taken.header.uuid), host)
    with open(place, "r+b") as file:
        file.write(bytes(1080) + b"\x53\xef" + bytes(3000))
    with pytest.raises(MachineError, match="holds an ext2, ext3 or ext4 file system: --force overwrites it"):
        named.take("two", spec, host)
    with pytest.raises(MachineError, match=r"no longer holds a machine: .* --force` makes a new one"):
        named.find(Conf(str(place), forced.header.uuid), host)


def test_a_device_that_got_another_number_is_found_by_its_uuid(place: Path, host: FakeHost) -> None:
    old, new, other = (str(place.parent / name) for name in ("dax0.0", "dax1.0", "dax2.0"))
    taken = named.take("one", Spec(old, 64 * MIB), host)
    said = Conf(old, taken.header.uuid)
    os.rename(old, new)
    assert named.find(said, host).backing.path == new
    named.take("two", Spec(old, 64 * MIB), host)
    (place.parent / "dax9.0x").write_bytes(b"")
    Path(other).write_bytes(b"")
    assert named.find(said, host).backing.path == new
    os.unlink(new)
    with pytest.raises(MachineError, match=r"dax0\.0 holds another machine, 'two'"):
        named.find(said, host)


def test_memory_of_a_later_version_is_not_overwritten(place: Path, host: FakeHost) -> None:
    spec = Spec(str(place), 64 * MIB)
    taken = named.take("one", spec, host)
    data = bytearray(header.encoded(taken.header))
    data[header.HEADER.offset("version")] = 9
    data[8:16] = header._checksum(bytes(data), taken.header.slot).to_bytes(8, "little")
    ram = open_ram(taken.backing)
    ram.bytes[: len(data)] = bytes(data)
    ram.close()
    with pytest.raises(FormatError, match="version is 9, expected 1; --force makes a new machine"):
        named.take("one", spec, host)
    assert named.take("one", spec, host, force=True).header.uuid != taken.header.uuid


# -- the configuration -----------------------------------------------------------------------------


def test_a_configuration_comes_back(tmp_path: Path) -> None:
    path, said = str(tmp_path / "etc" / "one.conf"), Conf("/dev/dax0.0", "5" * 32)
    assert conf.read(path) is None
    conf.write(path, said)
    assert conf.read(path) == said
    Path(path).write_text("  ram=/dev/mem:1G@4G\n# comment\n\nuuid = 5AB00000-0000-0000-0000-000000000000\n")
    assert conf.read(path) == Conf("/dev/mem:1G@4G", "5ab0" + "0" * 28)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ram = /x\n", "uuid is missing"),
        ("uuid = 12\nram = /x\n", "uuid is '12'"),
        ("rom = /x\n", "line 1 is 'rom = /x'"),
        ("ram\n", "line 1 is 'ram'"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "one.conf"
    path.write_text(text)
    with pytest.raises(DamagedError, match=f"{path} is damaged: {message}; write `ram = PATH`"):
        conf.read(str(path))


def test_only_root_s_machines_have_theirs_in_etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PKRAM_ROOT")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert Machine.locate("one").conf_path == "/etc/pkramfs/one.conf"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert Machine.locate("one").conf_path == "/dev/shm/pkram-1000/one.conf"
    monkeypatch.setenv("PKRAM_ROOT", str(tmp_path))
    assert Machine.locate("one").conf_path == f"{tmp_path}/one.conf"


# -- the host --------------------------------------------------------------------------------------


def test_the_host_says_how_it_was_booted(host: FakeHost) -> None:
    host.boot("a b", KEXEC)
    assert (host.kexeced, host.cmdline, host.release, host.is_crash_kernel) == (True, "a b", "6.12.9-test", False)
    first = host.boot_id
    host.boot(loader=0x72)
    assert host.kexeced is False and host.boot_id != first
    host.boot(loader=None)
    assert host.kexeced is None
    host.write("proc/vmcore", "")
    assert host.is_crash_kernel


def test_a_host_without_a_boot_id_is_refused(host: FakeHost) -> None:
    host.write("proc/sys/kernel/random/boot_id", "zero\n")
    with pytest.raises(MachineError, match="'zero' is no boot id"):
        _ = host.boot_id
    os.unlink(host.path("proc/sys/kernel/random/boot_id"))
    with pytest.raises(MachineError, match="by which a boot of the host is noticed"):
        _ = host.boot_id


def test_this_host_has_a_boot_id() -> None:
    assert len(Host("/").boot_id) == 32


def test_processes_that_have_memory_open_are_found(place: Path, host: FakeHost) -> None:
    place.write_bytes(b"")
    assert host.users(str(place)) == []
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(write)
            with open(place, "rb"):
                os.read(read, 1)
        finally:
            os._exit(0)
    os.close(read)
    try:
        deadline = 1000
        while host.users(str(place)) != [pid] and deadline:
            deadline -= 1
        assert host.users(str(place)) == [pid]
    finally:
        os.close(write)
        os.waitpid(pid, 0)
