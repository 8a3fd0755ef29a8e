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
