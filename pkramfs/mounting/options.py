# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount options (`-o`): tmpfs's, ours, and the words that mount(8) and the kernel add.

    size=2G  nr_inodes=1m  mode=1777 …      tmpfs's own
    pkram=NAME  preserve  nopreserve        the announcement's
    pkram_strict  format=1  lossy  dryrun  machine=NAME  oom_score_adj=N  fuse=PATH  standby    ours
    verify=data  verify                     ours: checksums of data; with preserve, wait until all have one
    ro  nosuid  noatime …                   mount flags: a bit that is set or cleared
    fsname=SOURCE                           FUSE's own: what the mount table shows as source
    user_id=0  max_read=…  x-systemd.…      words of other programs: known and ignored

Any other word is a UsageError that names it. A remount through mount(8) arrives merged with the mount's current
options and reordered, so the order means nothing and the kernel's words must pass.

Only the standard library is imported: the commands read options before they import anything.

Kernel: mm/shmem.c (shmem_fs_parameters, shmem_parse_options), fs/fs_context.c
"""

import os
import re
from dataclasses import dataclass, field

from pkramfs.errors import UsageError
from pkramfs.mounting.names import expect_name
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

NO_SOURCE = "none"

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_REMOUNT, MS_DIRSYNC, MS_NOSYMFOLLOW = 32, 128, 256
MS_NOATIME, MS_NODIRATIME, MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1024, 2048, 1 << 21, 1 << 24, 1 << 25

_SET = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS,
    "dirsync": MS_DIRSYNC,
    "nosymfollow": MS_NOSYMFOLLOW,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
    "strictatime": MS_STRICTATIME,
    "lazytime": MS_LAZYTIME,
}
_CLEAR = {
    "rw": MS_RDONLY,
    "suid": MS_NOSUID,
    "dev": MS_NODEV,
    "exec": MS_NOEXEC,
    "async": MS_SYNCHRONOUS,
    "symfollow": MS_NOSYMFOLLOW,
    "atime": MS_NOATIME,
    "diratime": MS_NODIRATIME,
    "norelatime": MS_RELATIME,
    "nostrictatime": MS_STRICTATIME,
    "nolazytime": MS_LAZYTIME,
}
_ATIME = MS_NOATIME | MS_RELATIME | MS_STRICTATIME
_IGNORED = re.compile(
    "auto|noauto|defaults|(no)?users?|owner|group|nofail|_netdev|silent|loud|(no)?mand|(no)?iversion|seclabel|"
    "inode32|inode64|noswap|default_permissions|allow_other|r?bind"
)
_IGNORED_KEYS = re.compile(
    "user_id|group_id|rootmode|fd|blksize|max_read|subtype|(fs|def|root)?context|comment|user|u?helper"
)
_WORD = re.compile(r"fsname=(?:\\.|[^,\\]|\\$)*|(?:[^,]|,(?=\d))+", re.DOTALL)
_HUGE = ("never", "always", "within_size", "advise")
_PATHS = ("filter", "pyfuse3")
_FORMATS = ("1", "2")
_VERIFY = ("data", "none")
_NODES = r"\d+(-\d+)?(,\d+(-\d+)?)*"
_FLAGS = "(=static|=relative)"
_MPOL = re.compile(
    rf"default(=\w*)?|local|prefer({_FLAGS}?:\d+)?|bind{_FLAGS}?:{_NODES}"
    rf"|(weighted )?interleave{_FLAGS}?(:{_NODES})?"
)
_NUMBER = re.compile("(0x[0-9a-f]+|[1-9][0-9]*|0[0-7]*)([kmgtpe]?)", re.IGNORECASE)
_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_LONG_MAX = (1 << 63) - 1
_MODE_MAX = _ID_MAX = (1 << 32) - 1
_OOM_MAX = 1000
_SOURCE_MAX = 4095
_INODES_MAX = (1 << 64) // 1024 - 1
"""nr_inodes in bytes of inode space must fit 64 bits."""


@dataclass(frozen=True)
class Amount:
    """A size= as written: bytes, or a share of RAM."""

    value: int
    percent: bool = False

    def bytes_of(self, ram: int) -> int:
        """Return the bytes for a given size of RAM."""
        return ram * self.value // 100 if self.percent else self.value


@dataclass
class Options:
    """One -o string, parsed. None means: not given."""

    words: list[str] = field(default_factory=list)
    name: str | None = None
    size: Amount | None = None
    nr_inodes: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    huge: str | None = None
    mpol: str | None = None
    strict: bool = False
    standby: bool = False
    lossy: bool = False
    dryrun: bool = False
    machine: str | None = None
    oom_score_adj: int | None = None
    source: str | None = None
    fuse: str | None = None
    format: int | None = None
    verify: str | None = None
    sum_all: bool = False
    remount: bool = False
    preserve: bool | None = None
    set_flags: int = 0
    clear_flags: int = 0

    @property
    def read_only(self) -> bool | None:
        """Return True if ro was given, False if rw was, None if neither."""
        if self.set_flags & MS_RDONLY:
            return True
        return False if self.clear_flags & MS_RDONLY else None

    def flags(self, current: int = 0) -> int:
        """Return the mount flags after these options, from the `current` ones."""
        if self.set_flags & _ATIME:
            current &= ~_ATIME
        return current & ~self.clear_flags | self.set_flags

    def limits(self, ram: int) -> tuple[int, int]:
        """Return (pages, inodes) that the mount may use; tmpfs's default is half of RAM, 0 means no limit."""
        half = (ram >> PAGE_SHIFT) // 2
        pages = half if self.size is None else -(-self.size.bytes_of(ram) // PAGE_SIZE)
        return pages, half if self.nr_inodes is None else self.nr_inodes

    def lasting(self) -> dict[str, str | bool]:
        """Return the options that give the same mount again: `{"pkram": "x", "ro": True}`."""
        found: dict[str, str | bool] = {}
        for word in self.words:
            key, equals, value = word.partition("=")
            if key not in ("remount", "preserve", "nopreserve", "lossy", "dryrun") and word != "verify":
                found[key] = value if equals else True
        return found


def words_of(flags: int) -> list[str]:
    """Return the words that give a mount the flags that the mount table shows; where it shows neither noatime nor
    relatime, that is strictatime."""
    words = [word for word, bit in _SET.items() if flags & bit and bit not in (MS_RELATIME, MS_STRICTATIME)]
    return words if flags & (MS_NOATIME | MS_RELATIME) else [*words, "strictatime"]


def with_flags(said: dict[str, str | bool], flags: int) -> dict[str, str | bool]:
    """Return options that were given (`lasting`), with the flags that the mount has by now.

    The ro that preserving brings does not last: the result is ro only if ro was given and still holds.
    """
    found = {key: value for key, value in said.items() if key not in _SET and key not in _CLEAR}
    return found | {word: True for word in words_of(flags) if word != "ro" or said.get("ro")}


def parse(text: str) -> Options:
    """Parse an -o string; raise UsageError for a word that is unknown or malformed."""
    found = Options()
    for word in split(text):
        found.words.append(word)
        _take(found, word)
    if found.lossy and not found.preserve:
        raise UsageError("mount option lossy goes with preserve: mount -o remount,preserve,ro,lossy DIR")
    if found.sum_all and not found.preserve:
        raise UsageError(
            "mount option verify goes with preserve: mount -o remount,preserve,ro,verify DIR; for checksums of data "
            "write verify=data"
        )
    if found.dryrun and not (found.remount and found.preserve):
        raise UsageError("mount option dryrun goes with preserve: mount -o remount,preserve,dryrun DIR")
    return found


def split(text: str) -> list[str]:
    """Split an -o string into its words.

    As in tmpfs a comma before a digit goes on with a list of nodes (mpol=); as in fusermount3 one behind a
    backslash belongs to fsname=.
    """
    return _WORD.findall(text)


def source_word(source: str) -> str:
    """Return the source as an option, with special characters escaped."""
    return "fsname=" + re.sub(r"([\\,])", r"\\\1", source)


def _take(found: Options, word: str) -> None:
    key, equals, value = word.partition("=")
    if key in _SET or key in _CLEAR:
        _no_value(word, equals)
        _take_flag(found, key)
    elif key in _WORDS and not (equals and key in _VALUES):
        _no_value(word, equals)
        _WORDS[key](found)
    elif key in _VALUES:
        if not value:
            raise UsageError(f"mount option {key} needs a value: {key}=…")
        _VALUES[key](found, value)
    elif not (_is_foreign(key) or (_IGNORED_KEYS if equals else _IGNORED).fullmatch(key)):
        raise UsageError(f"unknown mount option {word!r}")


def _is_foreign(key: str) -> bool:
    """Return True for an option of programs of user space."""
    return key.startswith(("x-", "X-"))


def _no_value(word: str, equals: str) -> None:
    if equals:
        raise UsageError(f"mount option {word!r} takes no value")


def _take_flag(found: Options, key: str) -> None:
    """Set or clear the bit of a flag: the last of two that contradict each other counts."""
    if key in _SET:
        bit = _SET[key]
        found.set_flags, found.clear_flags = found.set_flags | bit, found.clear_flags & ~bit
    else:
        bit = _CLEAR[key]
        found.set_flags, found.clear_flags = found.set_flags & ~bit, found.clear_flags | bit


def _name(found: Options, value: str) -> None:
    if value:
        expect_name(value, "pkram=")
    if found.name not in (None, value):
        raise UsageError(f"pkram= is given twice: {found.name!r} and {value!r}")
    found.name = value


def _size(found: Options, value: str) -> None:
    percent = value.endswith("%")
    found.size = Amount(_number("size", value, value.removesuffix("%")), percent)


def _blocks(found: Options, value: str) -> None:
    found.size = Amount(_number("nr_blocks", value, value) * PAGE_SIZE)


def _inodes(found: Options, value: str) -> None:
    found.nr_inodes = _number("nr_inodes", value, value, _INODES_MAX)


def _number(key: str, value: str, text: str, most: int = _LONG_MAX) -> int:
    """Parse a number as the kernel reads it: decimal, 0x… or 0…, with k to e. Too large ones are refused, not cut.

    Kernel: memparse()
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        percent = ", or a percentage" if key == "size" else ""
        raise UsageError(f"mount option {key}={value}: write a number, perhaps with k, m, g or t{percent}")
    number = _integer(match[1]) << _SHIFTS[match[2].lower()]
    if number > most:
        raise UsageError(f"mount option {key}={value}: write at most {most}")
    return number


def _integer(text: str) -> int:
    """Convert digits in the base of their prefix: 0x10, 010, 10."""
    if text[:2].lower() == "0x":
        return int(text, 16)
    return int(text, 8 if text.startswith("0") else 10)


def _mode(found: Options, value: str) -> None:
    if not re.fullmatch("[0-7]{1,11}", value) or int(value, 8) > _MODE_MAX:
        raise UsageError(f"mount option mode={value}: write octal permissions, as in 1777")
    found.mode = int(value, 8) & 0o7777


def _uid(found: Options, value: str) -> None:
    found.uid = _account("uid", value)


def _gid(found: Options, value: str) -> None:
    found.gid = _account("gid", value)


def _account(key: str, value: str) -> int:
    match = _NUMBER.fullmatch(value)
    if match and not match[2] and _integer(value) < _ID_MAX:
        return _integer(value)
    import grp
    import pwd

    try:
        return pwd.getpwnam(value).pw_uid if key == "uid" else grp.getgrnam(value).gr_gid
    except KeyError:
        raise UsageError(f"mount option {key}={value}: write a number or the name of an account on this host") from None


def _huge(found: Options, value: str) -> None:
    if value not in _HUGE:
        raise UsageError(f"mount option huge={value}: write one of {', '.join(_HUGE)}")
    found.huge = value


def _mpol(found: Options, value: str) -> None:
    if not _MPOL.fullmatch(value):
        raise UsageError(f"mount option mpol={value}: write default, local, prefer:N, bind:LIST or interleave:LIST")
    found.mpol = value


def _machine(found: Options, value: str) -> None:
    found.machine = value


def _source(found: Options, value: str) -> None:
    if len(os.fsencode(value)) > _SOURCE_MAX:
        raise UsageError(f"the source is {len(os.fsencode(value))} bytes long: the kernel takes {_SOURCE_MAX} at most")
    found.source = re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)


def _oom_score_adj(found: Options, value: str) -> None:
    if not re.fullmatch("-?[0-9]{1,4}", value) or abs(int(value)) > _OOM_MAX:
        raise UsageError(f"mount option oom_score_adj={value}: write a number from -{_OOM_MAX} to {_OOM_MAX}")
    found.oom_score_adj = int(value)


def _fuse(found: Options, value: str) -> None:
    if value not in _PATHS:
        raise UsageError(f"mount option fuse={value}: write one of {', '.join(_PATHS)}")
    found.fuse = value


def _format(found: Options, value: str) -> None:
    if value not in _FORMATS:
        raise UsageError(f"mount option format={value}: write one of {', '.join(_FORMATS)}")
    found.format = int(value)


def _verify(found: Options, value: str) -> None:
    if value not in _VERIFY:
        raise UsageError(f"mount option verify={value}: write one of {', '.join(_VERIFY)}")
    found.verify = value


def _sum_all(found: Options) -> None:
    found.sum_all = True


def _preserve(found: Options) -> None:
    found.preserve = True


def _nopreserve(found: Options) -> None:
    found.preserve = False


def _strict(found: Options) -> None:
    found.strict = True


def _standby(found: Options) -> None:
    found.standby = True


def _lossy(found: Options) -> None:
    found.lossy = True


def _remount(found: Options) -> None:
    found.remount = True


def _dryrun(found: Options) -> None:
    found.dryrun = True


_WORDS = {
    "preserve": _preserve,
    "nopreserve": _nopreserve,
    "lossy": _lossy,
    "dryrun": _dryrun,
    "pkram_strict": _strict,
    "standby": _standby,
    "verify": _sum_all,
    "remount": _remount,
}
_VALUES = {
    "pkram": _name,
    "size": _size,
    "nr_blocks": _blocks,
    "nr_inodes": _inodes,
    "mode": _mode,
    "uid": _uid,
    "gid": _gid,
    "huge": _huge,
    "mpol": _mpol,
    "machine": _machine,
    "fsname": _source,
    "oom_score_adj": _oom_score_adj,
    "fuse": _fuse,
    "format": _format,
    "verify": _verify,
}
