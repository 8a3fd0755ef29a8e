# SPDX-License-Identifier: GPL-2.0-or-later
"""history.json: the past kernels of a machine, for people. No decision depends on it.

    kernels    the last 32 kernels that have ended: when, how, the nodes they found, and events of their logs
    before     the owners of all pages when the last kexec was decided (memorymap.py)
    kexec      the prediction of the last kexec, and how long it took

A kexec drops the kernel log and kernel.json, as a real one drops dmesg; so their facts are noted on the way. What
cannot be noted is only logged: no kernel lives longer for it. Lists and texts are bounded, because the file is written
where memory may be scarce.

Kernel: fs/pstore, /sys/fs/pstore/dmesg-*
"""

import re
import time
from typing import TYPE_CHECKING, Any

from pkramfs import schema
from pkramfs.errors import MachineError
from pkramfs.kernel import kernelrecord, nvram

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine

NAME = "history.json"
MOST_KERNELS, MOST_EVENTS, MOST_NODES, _MOST_TEXT = 32, 32, 32, 160
RUNS, DIED, TAKEN, REFUSED, LOST = "runs", "died", "taken", "refused", "lost"
_REMEDY = "remove it: it is only shown"
_LINE = re.compile(r"\[ *([0-9]+\.[0-9]+)\] (.*)")
_EVENTS = (
    (re.compile(r"pkramfs: daemon of tree .*(?:has died|Fatal Python error)"), DIED),
    (re.compile(r"pkramfs: the daemon of .*, (?:another takes|and none takes) over"), DIED),
    (re.compile(r"pkramfs: the code on disk has failed under "), DIED),
    (re.compile(r"pkramfs: .* mounted on .* again by daemon [0-9]+"), TAKEN),
    (re.compile(r"(?:Kernel panic|kernel panic) "), DIED),
    (re.compile(r"(?:kexec: refused|kexec: died|mount\.pkramfs: )"), REFUSED),
    (re.compile(r"pkram: .* is lost|pkram: gave up a node"), LOST),
    (re.compile(r"pkramfs: .* (?:mounted on|preserved:|unmounted,|makes room for another)|pkram: freed node"), RUNS),
)
_DEATH = re.compile(
    r"pkramfs: (?:daemon of tree .* has died|the daemon of .*, (?:another takes|and none takes) over"
    r"|the code on disk has failed under .* \(its daemon )"
)
_COUNT = schema.Whole()
_FACTS: dict[str, schema.Kind] = {name: _COUNT for name in ("mounts", "nodes", "pages", "moved", "lost")}
_FORESEEN = schema.Object(_FACTS | {"pause": schema.Number(0), "names": schema.ListOf(schema.Text())})
_KEXEC = schema.Object(
    {"generation": schema.Whole(1), "foreseen": _FORESEEN, "pause": schema.Maybe(schema.Number(0))},
    others=schema.Anything(),
)
_NODES = schema.ListOf(schema.Object({"name": schema.Text(), "pages": _COUNT}, others=schema.Anything()))
_EVENT = schema.Object({"at": schema.Number(0), "kind": schema.Text(), "text": schema.Text()})
_KERNEL = schema.Object(
    {
        "generation": schema.Whole(1),
        "kind": schema.Text(),
        "image": schema.Text(),
        "booted": schema.Number(0),
        "ended": schema.Maybe(schema.Number(0)),
        "by": schema.Maybe(schema.Text()),
        "pause": schema.Maybe(schema.Number(0)),
        "nodes": _NODES,
        "lost": _NODES,
        "events": schema.ListOf(_EVENT),
    },
    others=schema.Anything(),
)


def _declared(machine: "Machine") -> schema.Object:
    """Declare history.json for this machine."""
    frames = machine.hardware().size >> 12
    part = schema.Object(
        {"kind": schema.Text(), "owner": schema.Text(), "pages": _COUNT, "ranges": schema.ListOf(schema.Range(frames))}
    )
    before = schema.Object({"generation": schema.Whole(1), "taken": schema.Number(0), "parts": schema.ListOf(part)})
    known: dict[str, schema.Kind] = {"kernels": schema.ListOf(_KERNEL), "before": schema.Maybe(before)}
    return schema.Object({}, optional=known | {"kexec": schema.Maybe(_KEXEC)}, others=schema.Anything())


def read(machine: "Machine") -> dict[str, Any]:
    """Return `kernels`, oldest first, `before` and `kexec`, or None; raise MachineError if the file is damaged."""
    data = (machine.read_json(NAME, _declared(machine), _REMEDY) or {}) if machine.has(NAME) else {}
    return {"kernels": [], "before": None, "kexec": None} | data


def events(log: str) -> list[dict[str, Any]]:
    """Return the lines of a kernel log that a timeline shows: seconds since the boot, kind and text; the last ones."""
    found = []
    for line in log.splitlines():
        if match := _LINE.fullmatch(line):
            kind = next((kind for pattern, kind in _EVENTS if pattern.match(match[2])), None)
            if kind is not None:
                found.append({"at": float(match[1]), "kind": kind, "text": match[2][:_MOST_TEXT]})
    return found[-MOST_EVENTS:]


def deaths(log: str) -> int:
    """Return how many daemons died, as a kernel log tells."""
    lines = (match[2] for line in log.splitlines() if (match := _LINE.fullmatch(line)))
    return sum(_DEATH.match(line) is not None for line in lines)


def current(machine: "Machine") -> dict[str, Any] | None:
    """Return the running kernel as `kernels` would have it, None without one."""
    info = kernelrecord.read(machine, any_layout=True)
    if info is None:
        return None
    return {
        "generation": info.generation,
        "kind": info.kind,
        "image": info.image,
        "booted": info.booted,
        "ended": None,
        "by": None,
        "pause": nvram.pause(machine) if info.kind == nvram.KEXEC else None,
        "nodes": (info.report.get("nodes") or [])[:MOST_NODES],
        "lost": (info.report.get("lost") or [])[:MOST_NODES],
        "events": events(machine.dmesg()),
    }


def note_end(machine: "Machine") -> None:
    """Note that the running kernel ends, by the boot that is pending; one that cannot be noted ends all the same."""
    try:
        found = current(machine)
        if found is None:
            return  # it was noted already
        pending = nvram.pending(machine)
        found |= {"ended": time.time(), "by": pending.kind if pending else None}
        data = _kept(machine)
        data["kernels"] = [*data["kernels"], found][-MOST_KERNELS:]
        machine.write_json(NAME, data)
    except MachineError as error:
        machine.log(f"history: kernel is not noted: {error}")


def note_before(machine: "Machine", generation: int, parts: list[dict[str, Any]]) -> None:
    """Note the owners of all pages of a kernel that is about to end; raise MachineError if that cannot be written."""
    data = _kept(machine)
    data["before"] = {"generation": generation, "taken": time.time(), "parts": parts}
    machine.write_json(NAME, data)


def note_foreseen(machine: "Machine", generation: int, facts: dict[str, Any]) -> None:
    """Note the prediction of the kexec that boots the kernel of this generation."""
    _note_kexec(machine, {"generation": generation, "foreseen": facts, "pause": None})


def note_pause(machine: "Machine", generation: int, seconds: float) -> None:
    """Note beside it how long the kexec took; all else that was seen is in the report of the boot."""
    found = _kept(machine)["kexec"]
    if found is not None and found["generation"] == generation:
        _note_kexec(machine, found | {"pause": round(seconds, 3)})


def _note_kexec(machine: "Machine", what: dict[str, Any]) -> None:
    try:
        machine.write_json(NAME, _kept(machine) | {"kexec": what})
    except MachineError as error:
        machine.log(f"history: kexec is not noted: {error}")


def _kept(machine: "Machine") -> dict[str, Any]:
    """Return the earlier notes, none if they are damaged: they are only shown, and begin anew."""
    try:
        return read(machine)
    except MachineError as error:
        machine.log(f"history: begun anew: {error}")
        return {"kernels": [], "before": None, "kexec": None}
