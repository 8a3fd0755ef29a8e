# SPDX-License-Identifier: GPL-2.0-or-later
"""-o strings: what is understood, what passes, what is refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkramfs.errors import UsageError
from pkramfs.mounting import options as o
from pkramfs.mounting.options import Amount, parse, source_word, split


def test_everything_at_once() -> None:
    found = parse(
        "rw,pkram=mytmpfs,size=2G,nr_inodes=1m,mode=0750,uid=7,gid=8,huge=always,mpol=bind:0,2,pkram_strict,machine=m,noexec"
    )
    assert (found.name, found.size, found.nr_inodes) == ("mytmpfs", Amount(2 << 30), 1 << 20)
    assert (found.mode, found.uid, found.gid, found.huge, found.mpol) == (0o750, 7, 8, "always", "bind:0,2")
    assert found.strict and found.machine == "m" and found.read_only is False
    assert found.flags() == o.MS_NOEXEC


def test_nothing_said() -> None:
    found = parse("")
    assert (found.name, found.size, found.preserve, found.read_only, found.remount) == (None, None, None, None, False)
    assert found.limits(1 << 30) == (1 << 17, 1 << 17)  # half of RAM, as tmpfs


@pytest.mark.parametrize(
    ("text", "pages"),
    [("size=1", 1), ("size=4097", 2), ("size=50%", 128), ("size=200%", 512), ("nr_blocks=3", 3), ("size=0", 0)],
)
def test_sizes(text: str, pages: int) -> None:
    assert parse(text).limits(1 << 20)[0] == pages


def test_the_last_of_two_counts() -> None:
    assert parse("size=1M,nr_blocks=1").limits(1 << 30)[0] == 1
    assert parse("ro,rw").read_only is False
    assert parse("rw,ro").read_only is True


def test_words_of_kernel_and_mount_pass() -> None:
    merged = (
        "ro,nosuid,nodev,relatime,remount,user_id=0,group_id=0,default_permissions,allow_other,rootmode=40000,fd=5,"
        "blksize=4096,max_read=131072,seclabel,context=system_u:object_r:tmp_t,x-systemd.automount,nofail,_netdev,"
        "user,user=joe,uhelper=x,subtype=pkramfs,fsname=none,preserve"
    )
    found = parse(merged)
    assert found.remount and found.preserve and found.read_only
    assert found.flags() == o.MS_RDONLY | o.MS_NOSUID | o.MS_NODEV | o.MS_RELATIME


def test_flags_start_from_what_is_mounted() -> None:
    before = o.MS_NOSUID | o.MS_RDONLY | o.MS_RELATIME
    assert parse("rw,noatime").flags(before) == o.MS_NOSUID | o.MS_NOATIME
    assert parse("suid").flags(before) == o.MS_RDONLY | o.MS_RELATIME


def test_lasting_words_mount_the_same_again() -> None:
    text = "pkram=x,size=1G,mpol=bind:0,1,ro"
    lasting = parse(text + ",remount,preserve").lasting()
    assert ",".join(key if value is True else f"{key}={value}" for key, value in lasting.items()) == text


BAD = """
    frob frob=1 x fd pkram pkram= pkram=a,pkram=b size= size=x size=-1 size=x% nr_inodes=q mode=8 mode=47777777777
    uid=-1 huge=x mpol=x ro=1 preserve=1 default_permissions=1
"""


@pytest.mark.parametrize("text", BAD.split())
def test_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    word = split(text)[-1].partition("=")[0]
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 127])
def test_names(size: int) -> None:
    assert parse(f"pkram={'n' * size}").name == "n" * size


@pytest.mark.parametrize("name", ["n" * 128, "ä" * 64])
def test_names_too_long_in_bytes(name: str) -> None:
    with pytest.raises(UsageError, match="128 bytes"):
        parse(f"pkram={name}")


@given(st.text(max_size=60))
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        parse(text)
    except UsageError as error:
        assert str(error)


@pytest.mark.parametrize(
    "words",
    [
        "relatime",
        "noatime",
        "ro,nosuid,nodev,noexec,relatime",
        "nodiratime,noatime",
        "sync,dirsync,relatime,nosymfollow",
    ],
)
def test_flags_become_the_words_that_give_them(words: str) -> None:
    flags = parse(words).flags()
    assert parse(",".join(o.words_of(flags))).flags() | o.MS_RELATIME == flags | o.MS_RELATIME


def test_neither_noatime_nor_relatime_is_strictatime() -> None:
    assert o.words_of(0) == ["strictatime"]
    assert o.words_of(o.MS_RELATIME) == []


def test_options_with_the_flags_that_a_mount_has_by_now() -> None:
    said = parse("pkram=x,size=1G,exec,noatime,nosuid,ro").lasting()
    now = o.with_flags(said, o.MS_NOEXEC | o.MS_RELATIME | o.MS_RDONLY)
    assert now == {"pkram": "x", "size": "1G", "noexec": True, "ro": True}


@pytest.mark.parametrize(
    ("said", "flags", "stays"), [("ro", 1, True), ("ro", 0, False), ("rw", 1, False), ("", 1, False)]
)
def test_only_what_was_said_to_be_read_only_stays_so(said: str, flags: int, stays: bool) -> None:
    """Preserving makes a mount read-only, too."""
    assert o.with_flags(parse(said).lasting(), flags | o.MS_RELATIME).get("ro", False) is stays


SOURCES = [
    "cache1",
    "a,b",
    "a\\,b",
    "\\",
    "\\\\,",
    ",",
    "a,5",
    "tank/my data",
    "x\ny",
    "ä",
    "\udcff",
    "a=b",
    "fsname=c",
    '"q"',
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_one_word_whatever_is_in_it(source: str) -> None:
    """It stays itself through the list of options that a kexec keeps."""
    found = parse(f"{source_word(source)},size=4k,mpol=bind:0,1,ro")
    assert (found.source, found.size, found.mpol, found.read_only) == (source, Amount(4096), "bind:0,1", True)
    again = ",".join(key if value is True else f"{key}={value}" for key, value in found.lasting().items())
    assert parse(again).source == source


def test_a_source_said_as_option_counts_most() -> None:
    assert parse("fsname=a,pkram=x,fsname=b").source == "b"
    assert parse("pkram=x").source is None
    assert parse("pkram=a\\,ro").name == "a\\", "a backslash is an ordinary letter elsewhere"
    with pytest.raises(UsageError, match="4095 at most"):
        parse("fsname=" + "x" * 4096)


def test_verify_is_an_option_and_verify_alone_is_a_wish() -> None:
    found = parse("remount,preserve,ro,verify=data,verify")
    assert (found.verify, found.sum_all) == ("data", True) and found.lasting() == {"ro": True, "verify": "data"}
    assert parse("verify=none").verify == "none" and not parse("verify=data").sum_all
    for text, words in (("verify=all", "write one of data, none"), ("verify", "goes with preserve")):
        with pytest.raises(UsageError, match=words):
            parse(text)
