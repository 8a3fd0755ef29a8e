# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl status: the machine, its kernel, its mounts and its nodes.

    machine      /dev/shm/pkram/default, 64 GiB of RAM, 2.1 GiB of it backed by the host
    kernel       generation 2, builtin, up since 12:00:01, super block at pfn 34f
    next         /boot/vmlinuz-6.1 is loaded: pkram-kexec -e
    memory       free 61.9 GiB, trees 2.0 GiB, kernel 34 MiB
    node 0       free 30.9 GiB, trees 1.0 GiB, kernel 34 MiB             (several NUMA nodes only)

    MOUNTED ON   NAME      STATE       FILES   SIZE      PID    OPTIONS
    /mnt         mytmpfs   preserved       1   2.0 GiB   4242   size=4194304k

    NODE            STATE              SIZE      PAGES
    shmem-mytmpfs   held by a mount    2.0 GiB   524,288

`gather` collects plain data, which --json prints; `show` prints it for people. A part that cannot be read
(a damaged super block, a silent daemon) is shown as its error and hides none of the others, because users run this
command when something is wrong.

Kernel: /proc/meminfo, /sys/kernel/pkram, /sys/kernel/kexec_loaded
"""

import argparse
from typing import TYPE_CHECKING, Any

from pkramfs.cli import arguments, daemons, nodes, render
from pkramfs.cli.render import Column
from pkramfs.errors import PkramfsError
from pkramfs.units import BLOCK_SIZE, MIB, PAGE_SIZE, format_pfn, format_size, plural

if TYPE_CHECKING:
    from pkramfs.machine.directory import Machine
    from pkramfs.machine.mounts import MountEntry


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl status`."""
    found = gather(arguments.existing(args))
    if arguments.wants_json(args):
        render.emit_json(found)
    else:
        show(found)


def gather(machine: "Machine") -> dict[str, Any]:
    """Return all parts of the answer as plain data."""
    found: dict[str, Any] = {"machine": _machine(machine)}
    parts = {"kernel": _kernel, "next": _next, "memory": _memory, "numa": _numa, "mounts": _mounts}
    parts |= {"nodes": nodes.listing}
    problems = []
    for name, look in parts.items():
        try:
            found[name] = look(machine)
        except PkramfsError as error:
            found[name] = [] if name in ("mounts", "nodes") else None
            problems.append(f"{name}: {error}")
    return found | {"problems": problems + _super_block(machine) + _unreadable(machine)}


def _super_block(machine: "Machine") -> list[str]:
    """Return the fault of the super block, which no node need show: then nothing can be preserved."""
    from pkramfs.pkram import superblock

    try:
        running = daemons.attached(machine)
    except PkramfsError:
        return []  # other parts say so
    if running is None or not running.info.pkram:
        return []
    error = superblock.damage(running.ram, running.store.root())
    return [f"{error}; nothing can be preserved: `pkramctl free --damaged` mends it"] if error else []


def _unreadable(machine: "Machine") -> list[str]:
    """Return which entries of dead daemons cannot be read: their memory is kept, since it may be a tree."""
    try:
        found = [entry for entry in machine.mounts() if entry.damaged and not entry.alive]
    except PkramfsError:
        return []  # other parts say so
    return [
        f"a daemon has died, and {machine.path('mounts', f'{entry.tree_id:016x}.json')}, which tells where its tree "
        "is, cannot be read: nobody frees that memory until you put the file back, or remove it and mount anything"
        for entry in found
    ]


def _machine(machine: "Machine") -> dict[str, Any]:
    hardware = machine.hardware()
    backed = None
    try:
        ram = machine.ram()
        backed = ram.backed
        ram.close()
    except PkramfsError:
        pass  # the parts that need RAM report its fault
    named = machine.elsewhere()
    said = {"memory": named.spec, "kind": named.kind} if named else {}
    return {"directory": machine.path(), "ram": hardware.usable.total * PAGE_SIZE, "backed": backed, **said}


def _kernel(machine: "Machine") -> dict[str, Any] | None:
    from pkramfs.kernel import kernelrecord

    info = kernelrecord.read(machine, any_layout=True)
    if info is None:
        return None
    return {
        "generation": info.generation,
        "kind": info.kind,
        "image": info.image,
        "version": info.version,
        "booted": info.booted,
        "super_pfn": info.super_pfn,
        "cmdline": (machine.read_text("cmdline") or "").strip(),
    }


def _next(machine: "Machine") -> dict[str, Any]:
    """Return the loaded kernels, and the boot that waits to be finished."""
    from pkramfs.cli import again
    from pkramfs.kernel import kernelrecord, nvram, staging

    pending = nvram.pending(machine)
    if kernelrecord.read(machine, any_layout=True) is not None:
        pending = None  # its kexec died, or is still on its way, before the point of no return: this kernel goes on
    loaded, crash = staging.read(machine), staging.read(machine, staging.CRASH_JSON)
    return {
        "loaded": loaded.image.name if loaded else None,
        "crash": crash.image.name if crash else None,
        "pending": pending.generation if pending else None,
        "remount": [mount["mountpoint"] for mount in again.waiting(machine)],
    }


def _memory(machine: "Machine") -> dict[str, int] | None:
    """Return the bytes in page blocks of each state."""
    running = daemons.attached(machine)
    if running is None:
        return None
    return {state: blocks * BLOCK_SIZE for state, blocks in running.leases.counts().items()}


def _numa(machine: "Machine") -> dict[str, dict[str, int]] | None:
    """Return the bytes of each NUMA node by owner, if there are several nodes."""
    running = daemons.attached(machine)
    if running is None:
        return None
    from pkramfs.machine.policy import node_blocks

    parts = node_blocks(machine.hardware())
    if len(parts) == 1:
        return None
    found = running.leases.counts_in(parts)
    return {str(node): {who: n * BLOCK_SIZE for who, n in counts.items()} for node, counts in found.items()}


def _mounts(machine: "Machine") -> list[dict[str, Any]]:
    return [_mount(seen) for seen in daemons.look(machine)] + [_dead(entry) for entry in daemons.outlived(machine)]


def _dead(entry: "MountEntry") -> dict[str, Any]:
    """Return a tree that has outlived its daemon."""
    problem = f"the daemon of {entry.name} has died, its tree is in RAM: mount {entry.name} again"
    known: dict[str, Any] = {"mountpoint": entry.mountpoint, "name": entry.name, "pid": entry.pid, "places": []}
    return known | {"state": "died", "problem": problem}


def _mount(seen: daemons.Seen) -> dict[str, Any]:
    known = {"mountpoint": seen.entry.mountpoint, "name": seen.entry.name, "pid": seen.entry.pid}
    if seen.status is None:
        return known | {"state": "silent", "problem": seen.silence}
    said = "; ".join(filter(None, (daemons.lost(seen.status), daemons.damaged(seen.status))))
    problem = {"problem": f"{seen.entry.mountpoint}: {said}"} if said else {}
    return seen.status | known | {"places": list(seen.places)} | problem


def show(found: dict[str, Any]) -> None:
    """Print the result of `gather`."""
    from pkramfs.machine.directory import Machine

    render.fields(
        [
            ("machine", _machine_line(found["machine"])),
            ("kernel", _kernel_line(found["kernel"])),
            ("next", _next_line(found["next"], Machine(found["machine"]["directory"]).words)),
            ("memory", _memory_line(found["memory"])),
            *((f"node {node}", _memory_line(memory)) for node, memory in (found["numa"] or {}).items()),
        ]
    )
    for problem in found["problems"]:
        render.say(f"problem   {problem}")
    if found["mounts"]:
        render.say()
        show_mounts(found["mounts"])
    if found["nodes"]:
        render.say()
        nodes.show(found["nodes"])


def _machine_line(machine: dict[str, Any]) -> str:
    backed = machine["backed"]
    line = f"{machine['directory']}, {format_size(machine['ram'])} of RAM"
    if "memory" in machine:
        return f"{line} in {machine['memory']} ({machine['kind']})"
    return line if backed is None else f"{line}, {format_size(backed)} of it backed by the host"


def _kernel_line(kernel: dict[str, Any] | None) -> str:
    if kernel is None:
        return "none is running"
    pkram = f"super block at pfn {format_pfn(kernel['super_pfn'])}" if kernel["super_pfn"] else "PKRAM is off"
    return f"generation {kernel['generation']} ({kernel['kind']} boot of {kernel['image']}), {pkram}"


def _next_line(following: dict[str, Any] | None, words: str) -> str | None:
    if following is None:
        return None
    said = []
    if following["pending"]:
        said.append(f"the boot of generation {following['pending']} is not finished: the next mount resumes it")
    elif following["remount"]:
        said.append(f"{', '.join(following['remount'])} waits to be mounted again: pkram-kexec{words} --resume")
    if following["loaded"]:
        said.append(f"{following['loaded']} is loaded: pkram-kexec{words} -e")
    if following["crash"]:
        said.append(f"{following['crash']} is loaded as crash kernel")
    return "; ".join(said) or None


def _memory_line(memory: dict[str, int] | None) -> str | None:
    if memory is None:
        return None
    kernel = memory.get("kernel", 0) + memory.get("reserve", 0)
    shown = {"free": memory.get("free", 0), "trees": memory.get("tree", 0), "kernel": kernel}
    return ", ".join(f"{name} {format_size(size)}" for name, size in shown.items())


def show_mounts(found: list[dict[str, Any]]) -> None:
    """Print mounts as a table."""
    columns = [
        Column("MOUNTED ON"),
        Column("NAME"),
        Column("STATE"),
        Column("FILES", figures=True),
        Column("SIZE", figures=True),
        Column("PID", figures=True),
        Column("OPTIONS"),
    ]
    render.table(columns, [_mount_row(mount) for mount in found])
    for mount in found:
        if "files" in mount:
            render.say(f"survives  {mount['mountpoint']}: {_survives(mount)}")
    for mount in found:
        if "unsummed" in mount:
            render.say(f"checksums {mount['mountpoint']}: {_summed(mount)}")
    for mount in found:
        if mount.get("on_trial") or "went_back" in mount:
            render.say(f"upgrade   {mount['mountpoint']}: {_upgraded(mount)}")
    for mount in found:
        if "problem" in mount:
            render.say(f"problem   {mount['problem']}")


def _survives(mount: dict[str, Any]) -> str:
    """Describe which events a tree survives, and the length of its log."""
    preserved = mount["state"] == "preserved"
    if "log_bytes" not in mount:
        lost = "nothing: " + ("PKRAM is off in this kernel" if mount["name"] else "it was mounted without pkram=NAME")
        return "kexec, daemon crash" if preserved else lost
    held = "holder" in mount
    survives = [*(["daemon crash", "upgrade"] if held else ["daemon crash, once it is mounted again"])]
    remedy = "kexec (preserve it first, or pkram-kexec -e --keep-mounts)" if held else "kexec (preserve it first)"
    lacks = [*([] if preserved else [remedy]), "power loss of the host"]
    log = f"log {format_size(mount['log_bytes'])}, {plural(mount['log_requests'], 'request')} since its checkpoint"
    taken = f"; {plural(mount['takeovers'], 'takeover')}" if mount.get("takeovers") else ""
    return f"{', '.join(survives + ['kexec'] * preserved)}; not: {', '.join(lacks)} ({log}{taken})"


def _upgraded(mount: dict[str, Any]) -> str:
    """Return what has become of the last upgrade, unless it was a success."""
    if mount.get("on_trial"):
        return "new code serves, on trial: the code before takes over if it fails"
    return f"new code failed ({mount['went_back']}), the code before serves: pkramctl upgrade tries again"


def _summed(mount: dict[str, Any]) -> str:
    """Describe the checksums of a tree's data."""
    lacking, waiting = mount["unsummed"], mount["to_compare"]
    has = f"up to {format_size(lacking * MIB)} unchecked" if lacking else "all data have one"
    return f"{has}, up to {format_size(waiting * MIB)} to be compared" if waiting else has


def _places(mount: dict[str, Any]) -> str:
    """Return every place of a mount, or where it was if it is not in our mount namespace, or unmounted but in use."""
    found = mount.get("places", [mount["mountpoint"]])
    return ", ".join(found) or f"{mount['mountpoint']} (no longer, or in another mount namespace)"


def _mount_row(mount: dict[str, Any]) -> list[Any]:
    state = mount["state"] + (", frozen" if mount.get("frozen") and mount["state"] != "preserved" else "")
    known = "files" in mount
    return [
        _places(mount),
        mount["name"] or "-",
        state,
        f"{mount['files']:,}" if known else "?",
        format_size(mount["bytes"]) if known else "?",
        mount["pid"],
        mount.get("options", ""),
    ]
