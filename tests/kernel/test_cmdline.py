# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from pkramfs.errors import UsageError
from pkramfs.kernel import cmdline


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ro quiet", ["ro", "quiet"]),
        ('a="b c"  d', ['a="b c"', "d"]),
        ('"a=b c" d', ['"a=b c"', "d"]),
        ("  ", []),
        ('open="never closed', ['open="never closed']),
    ],
)
def test_words(line: str, expected: list[str]) -> None:
    assert cmdline.words(line) == expected


def test_the_last_value_counts() -> None:
    assert cmdline.get("mem=1G mem=2G", "mem") == "2G"
    assert cmdline.get("xmem=1G", "mem") is None
    assert cmdline.get('"mem=3 G"', "mem") == "3 G"


def test_remove_takes_flags_and_values() -> None:
    assert cmdline.remove("ro pkram=3 pkram= quiet pkram", "pkram") == "ro quiet"
    assert cmdline.put("ro pkram=3 quiet", "pkram", "34f") == "ro quiet pkram=34f"
    assert cmdline.put("", "pkram", "1") == "pkram=1"


@pytest.mark.parametrize(
    ("line", "pfn"),
    [
        ("ro", None),
        ("pkram=", None),
        ("pkram=0", None),
        ("pkram=34f", 0x34F),
        ("pkram=0x34F", 0x34F),
        ("pkram=34f pkram=34f", 0x34F),
        ('"pkram=34f"', 0x34F),
        ("Xpkram=34f", None),
    ],
)
def test_pkram_pfn(line: str, pfn: int | None) -> None:
    assert cmdline.pkram_pfn(line) == pfn


@pytest.mark.parametrize("line", ["pkram=xyz", "pkram=-1", "pkram=1 pkram=2", "pkram=12345678901234567"])
def test_a_bad_pkram_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match="pkram="):
        cmdline.pkram_pfn(line)


def test_reservations() -> None:
    assert cmdline.reservation("crashkernel=64M", "crashkernel") == cmdline.Reservation(64 << 20)
    assert cmdline.reservation("scratch=1M@1G", "scratch") == cmdline.Reservation(1 << 20, 1 << 30)
    assert cmdline.reservation("ro", "scratch") is None
    assert cmdline.reservation("scratch=0", "scratch") is None
    for bad in ("scratch=many", "scratch=1M@", "scratch=1M@5"):
        with pytest.raises(UsageError, match="scratch="):
            cmdline.reservation(bad, "scratch")


def test_validate() -> None:
    cmdline.validate("ro quiet pkram=34f mem=4G")
    for bad in ("a\nb", "x" * 2048, "mem=lots", "crashkernel=?"):
        with pytest.raises(UsageError):
            cmdline.validate(bad)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("a=1 -- a=2", "a", "1"),
        ("-- a=2", "a", None),
        ("a=1 --", "a", "1"),
        ("a=1 --x a=2", "a", "2"),
        ("a=1 --=x a=2", "a", "2"),
        ("a=1 --- a=2", "a", "2"),
        ('a=1 "--" a=2', "a", "1"),
        ('a=1 "-- a=2"', "a", "1"),
        ('a="1 -- a=2" b', "a", "1 -- a=2"),
        ('b="x -- y" a=2 -- a=3', "a", "2"),
        ('a="1"', "a", "1"),
        ('"a=1 2"', "a", "1 2"),
        ('a=1"2"3', "a", '1"2"3'),
        ('a=1" 2"', "a", '1" 2"'),
        ('a="', "a", ""),
        ('a="1 2', "a", "1 2"),
        ("=a a=1", "a", "1"),
        ("=a=1", "=a", "1"),
        ("a==1", "a", "=1"),
        ("a_b=1", "a-b", "1"),
        ("a\x0b\x0cb=1", "b", "1"),
    ],
)
def test_words_are_cut_and_unquoted_as_the_kernel_does(line: str, name: str, value: str | None) -> None:
    assert cmdline.get(line, name) == value


def test_what_follows_two_dashes_is_init_s() -> None:
    line = "ro pkram=34f -- pkram=99 nokaslr crashkernel=64M mem=lots scratch=?"
    assert cmdline.pkram_pfn(line) == 0x34F
    cmdline.validate(line)
    assert not cmdline.has(line, "nokaslr") and cmdline.has("nokaslr -- x", "nokaslr")
    assert cmdline.memory_limit(line) is None and cmdline.reservation(line, "crashkernel") is None
    assert cmdline.pkram_pfn("ro -- pkram=34f") is None
    assert not cmdline.pkram_off("ro -- pkram=off")
    assert cmdline.words("ro -- x") == ["ro"]


def test_writers_leave_init_s_words_and_write_before_them() -> None:
    assert cmdline.put("ro pkram=3 -- single pkram=9", "pkram", "34f") == "ro pkram=34f -- single pkram=9"
    assert cmdline.put("-- single", "pkram", "1") == "pkram=1 -- single"
    assert cmdline.remove("a=1 -- a=2", "a") == "-- a=2"
    assert cmdline.remove("a=1 --", "a") == "--"
    assert cmdline.join("a -- b", "c -- d") == "a c -- b d"
    assert cmdline.join("a", 'c "--" d') == "a c -- d"
    assert cmdline.join("a -- b", "c") == "a c -- b"
    assert cmdline.join("", " c ") == "c"
    assert cmdline.join('a="--" b', "c") == 'a="--" b c'


@pytest.mark.parametrize("line", ["mem=" + "9" * 40, "mem=9999E"])
def test_more_memory_than_there_can_be_is_no_limit(line: str) -> None:
    assert cmdline.memory_limit(line) == 1 << 62


@pytest.mark.parametrize("value", ["9" * 40, "64M@" + "9" * 40])
def test_a_reservation_beyond_memory_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="beyond physical memory"):
        cmdline.validate(f"crashkernel={value}")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pkram=34f", ["34f"]),
        ("pkram=1 pkram=2", ["1", "2"]),
        ("pkram=two:34f", ["two:34f"]),
        ("pkram=1 pkram=two:34f", ["two:34f"]),
        ("pkram=1 pkram=other:34f", ["1"]),
        ("pkram=other:34f", []),
        ("pkram=1 pkram=two:", []),
        ("pkram= pkram=:34f ro -- pkram=two:1", []),
        ("pkram=two:off", ["two:off"]),
    ],
)
def test_one_of_several_machines_is_named(line: str, found: list[str]) -> None:
    assert cmdline.pkram_of(line, "two") == found
    assert cmdline.pkram_off(line, "two") is (found == ["two:off"])
    assert [cmdline.names(value, 0x34F) for value in found] == [value.endswith("34f") for value in found]


@pytest.mark.parametrize("name", ["", "two", "a b", "x:y"])
def test_the_word_for_a_machine_is_read_again(name: str) -> None:
    (value,) = cmdline.pkram_of(f"ro {cmdline.pkram_word('34f', name)} quiet", name)
    assert cmdline.names(value, 0x34F)
