# SPDX-License-Identifier: GPL-2.0-or-later
"""The replies of a daemon to each verb: declared once, written by the keeper, checked when a command reads them.

    status preserve unpreserve    Status
    foresee                       Foreseen
    freeze thaw                   Frozen
    compare reconfigure stop      Done

A reply of another version may have fields that this version does not know, which are dropped, or lack those of
ADDED, which get their former implied value. Any other missing field, or one of another type, makes the reply
unexpected: `read` raises a DaemonError that names the field. Standard library only.
"""

from typing import Any, NotRequired, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints

from pkramfs.errors import DaemonError
from pkramfs.schema import Flag, Invalid, Kind, ListOf, Maybe, Object, Text, Whole


class Status(TypedDict):
    """The state of a tree and its figures. Of a long list only the first few paths are named (`unnamed`)."""

    name: str | None
    mountpoint: str
    state: str
    """`live` or `preserved`."""
    frozen: bool
    files: int
    dirs: int
    pages: int
    bytes: int
    writers: list[str]
    writers_count: int
    open_deleted: list[str]
    open_deleted_count: int
    lost: list[str]
    lost_count: int
    refused: int
    """Write-backs that the daemon has refused so far."""
    busy: bool
    """Whether a verb is changing the state."""
    options: str
    pid: int
    holder: NotRequired[int]
    """The process that starts another daemon when this one dies; absent without one."""
    log_bytes: NotRequired[int]
    log_requests: NotRequired[int]
    """Requests since the last checkpoint."""
    log_age: NotRequired[int]
    """Seconds since this daemon began, or made a checkpoint."""
    checkpoints: NotRequired[int]
    """Checkpoints that this daemon has made."""
    takeovers: NotRequired[int]
    """How often a daemon of this mount was replaced."""
    on_trial: NotRequired[bool]
    """True while an upgrade may still go back to the code before."""
    went_back: NotRequired[str]
    """Why the last upgrade went back; absent if it did not."""
    unsummed: NotRequired[int]
    """Pieces of files, of 1 MiB at most, that have no checksum yet; absent without verify=data."""
    to_compare: NotRequired[int]
    """Pieces that were not compared with their checksum yet since the tree was restored."""
    damaged: NotRequired[list[str]]
    """Where data are damaged: path and bytes."""
    damaged_count: NotRequired[int]


class Frozen(TypedDict):
    """Whether the tree is preserved; `held` says that a freeze ends with its connection."""

    preserved: bool
    held: NotRequired[bool]


class Foreseen(TypedDict):
    """The foresight of a preserve (fs/foresight). Long lists are cut; the counts are complete."""

    refused: list[str]
    refused_count: int
    lost: list[str]
    lost_count: int
    moved: list[str]
    moved_count: int
    moved_pages: int
    files: int
    pages: int
    description: int
    microseconds: int
    unsummed: NotRequired[int]
    """As in a status."""


class Done(TypedDict):
    """A reply without content."""


Reply = Status | Foreseen | Frozen | Done
LISTS = ("writers", "open_deleted", "lost")
LOG = ("holder", "log_bytes", "log_requests", "log_age", "checkpoints", "takeovers")
UPGRADE = ("on_trial", "went_back")
SUMS = ("unsummed", "to_compare", "damaged", "damaged_count")
ADDED = frozenset(
    (*LISTS, *(f"{name}_count" for name in LISTS), "refused", "busy", "options", "held", *LOG, *UPGRADE, *SUMS)
)
"""Fields that replies of older versions lack."""

_MOST = 1 << 127
"""Most of anything that is counted: 2**64 sparse files of the largest size."""

_KINDS: dict[Any, Kind] = {
    bool: Flag(),
    int: Whole(0, _MOST),
    str: Text(),
    str | None: Maybe(Text()),
    list[str]: ListOf(Text()),
}

R = TypeVar("R", Status, Foreseen, Frozen, Done)


def read(kind: type[R], reply: dict[str, Any]) -> R:
    """Return a reply as its kind, complete; raise DaemonError if it is something else."""
    try:
        found = _DECLARED[kind].read(reply)
    except Invalid as error:
        raise DaemonError(f"unexpected reply from the daemon (version mismatch?): {error}") from None
    if kind is Status:
        for name in LISTS:
            found.setdefault(name, [])
            found.setdefault(f"{name}_count", len(found[name]))
        found = {"refused": 0, "busy": False, "options": ""} | found
    return cast(R, found)


def _declared(kind: type[Any]) -> Object:
    """Return the declaration of a reply, made from its annotations."""
    fields = {name: _KINDS[_plain(hint)] for name, hint in get_type_hints(kind).items()}
    return Object(
        {name: field for name, field in fields.items() if name not in ADDED},
        optional={name: field for name, field in fields.items() if name in ADDED},
    )


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is NotRequired else hint


_DECLARED: dict[object, Object] = {kind: _declared(kind) for kind in (Status, Foreseen, Frozen, Done)}


def unnamed(status: Status | Foreseen, what: str) -> int:
    """Return the number of entries that a status does not name; `what` is one of its lists."""
    counted = cast(dict[str, Any], status)
    return max(int(counted[f"{what}_count"]) - len(counted[what]), 0)
