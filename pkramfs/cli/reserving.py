# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl doctor --reserve SIZE: can this host keep trees over its own kexec, and the line for its boot loader.

    lacks of this kernel       its configuration, lockdown, kexec(8)
    where                      RAM above 4 GiB in one NUMA node, at a multiple of 1 GiB if that fits, else of 2 MiB
    the line                   memmap=SIZE!ADDRESS, quoted as GRUB's file or grubby take it
    after the reboot           how the range becomes a device, and the device a machine

The range is looked for in the firmware's map, less what /proc/iomem says is used for something else: an earlier
memmap=, a crash kernel. Only root may read /proc/iomem. Nothing is changed.

Kernel: arch/x86/kernel/e820.c (parse_memmap_one), drivers/firmware/memmap.c, drivers/base/node.c
"""

import argparse
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pkramfs.cli import arguments, render
from pkramfs.cli.checkup import ERROR, NOTE, OK, WARNING, Finding
from pkramfs.errors import UsageError
from pkramfs.units import BLOCK_SIZE, GIB, MIB, format_size, round_up

if TYPE_CHECKING:
    from pkramfs.machine.host import Host
    from pkramfs.spans import Spans

_LEAST = 64 * MIB
_HIGH = 4 * GIB
_FIRST = 16 * MIB
"""Below 4 GiB nothing is taken under this: the kernel's own lowest memory."""
_OTHERS = GIB
"""What the host keeps at least, beside its own data about the pages that are set aside (one in 64)."""
_NEEDED = (("KEXEC_FILE", "KEXEC"), ("X86_PMEM_LEGACY",), ("BLK_DEV_PMEM",), ("DEV_DAX_PMEM", "FS_DAX"), ("FUSE_FS",))
"""Options of a kernel's configuration; one of each group is enough."""
_GRUB = "/etc/default/grub"
_GRUB_LINE = re.compile(r"""^\s*GRUB_CMDLINE_LINUX=(?:"([^"]*)"|'([^']*)'|(\S*))\s*(?:#.*)?$""", re.MULTILINE)


class Place(NamedTuple):
    """A range of RAM to be set aside, in bytes, and its NUMA node."""

    start: int
    size: int
    node: int

    def memmap(self, sign: str = "!") -> str:
        """Return the word of the command line: ! makes a device of it, $ takes it from everybody."""
        return f"memmap={_amount(self.size)}{sign}{_amount(self.start)}"


class Boot(NamedTuple):
    """A boot loader, and the lines that make it say one more word."""

    loader: str
    lines: tuple[str, ...]
    raw: str
    """The word for /dev/mem, quoted for this loader."""


def act(args: argparse.Namespace, host: "Host") -> list[Finding]:
    """Print the steps, and return the findings."""
    size = round_up(args.reserve, BLOCK_SIZE)
    if size < _LEAST:
        raise UsageError(f"--reserve {format_size(args.reserve)} is too small: give at least {format_size(_LEAST)}")
    findings = list(lacking(host))
    place, found = choose(host, size)
    findings += found
    if arguments.wants_json(args):
        said = place._asdict() | {"memmap": place.memmap()} if place else None
        steps = [list(lines) for _, lines in steps_for(host, place)] if place else []
        render.emit_json({"reserve": said, "steps": steps, "findings": [one._asdict() for one in findings]})
        return findings
    for one in findings:
        render.say(f"{one.level:8} {one.found}")
        if one.remedy:
            render.say(f"{'':8} → {one.remedy}")
    for title, lines in steps_for(host, place) if place else []:
        render.say()
        render.say(title)
        for line in lines:
            render.say(f"    {line}")
    return findings


def steps_for(host: "Host", place: Place) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the steps: title and lines of each."""
    boot = loader(host, place)
    yield f"1. Have {boot.loader} set it aside, at every boot, and reboot:", boot.lines
    number = len(_names(host, "sys/bus/nd/devices", r"region\d+"))
    made = f"ndctl create-namespace -f -e namespace{number}.0 -m devdax -M mem"
    yield (
        "2. Make a device of it, and a machine on the device (pkramfs-real(7)):",
        (made, f"pkramctl machine create --ram /dev/dax{number}.0"),
    )
    yield (
        "Or, without a device and where /dev/mem is open, the same range as Reserved memory:",
        (boot.raw, f"pkramctl machine create --ram /dev/mem:{_amount(place.size)}@{_amount(place.start)}"),
    )


# -- what this host can, and lacks ------------------------------------------------------------------


def summary(host: "Host") -> Iterator[Finding]:
    """Yield findings about surviving this host's own kexec, if memory is set aside."""
    from pkramfs.kernel import hostload

    words = hostload.reserving(host.cmdline)
    if not words:
        found = "no memory is set aside: trees survive a kexec of the simulation, not one of this computer"
        yield Finding("kexec", OK, f"{found} (pkramctl doctor --reserve SIZE says how)")
        return
    devices = _names(host, "sys/bus/dax/devices", r"dax\d+\.\d+") + _names(host, "sys/block", r"pmem\d+")
    there = f": {', '.join(devices)}" if devices else ""
    yield Finding("kexec", OK, f"{' '.join(words)} sets memory aside{there}")
    yield from (one for one in lacking(host) if one.level != OK)


def lacking(host: "Host", arch: str = "") -> Iterator[Finding]:
    """Yield the lacks of this kernel and this host."""
    import shutil

    arch = arch or os.uname().machine
    if arch not in ("x86_64", "i686"):
        yield Finding("kexec", ERROR, f"memmap= is an option of x86 kernels, this is {arch}")
    yield from _configured(host)
    if shutil.which("kexec") is None:
        yield Finding("kexec", WARNING, "kexec(8) is not installed", "apt-get install kexec-tools, or dnf")
    if (host.text("proc/sys/kernel/kexec_load_disabled") or "0").strip() != "0":
        yield Finding("kexec", ERROR, "kexec is switched off until the next boot (kernel.kexec_load_disabled)")
    lockdown = re.search(r"\[(\w+)\]", host.text("sys/kernel/security/lockdown") or "")
    if lockdown and lockdown[1] != "none":
        found = f"the kernel is locked down ({lockdown[1]}): /dev/mem is closed, and kexec takes signed kernels only"
        yield Finding("kexec", NOTE, found, "use a device (devdax), and pkram-kexec -s")
    if _hibernates(host):
        found = "this host may hibernate, which memory set aside does not survive, and nobody notices"
        targets = "hibernate.target hybrid-sleep.target suspend-then-hibernate.target"
        yield Finding("kexec", WARNING, found, f"systemctl mask {targets}")


def _hibernates(host: "Host") -> bool:
    """Return True if this host may hibernate: it can, has a place for its image, and systemd was not told not to."""
    if "disk" not in (host.text("sys/power/state") or "").split():
        return False
    if (host.text("sys/power/resume") or "0:0").strip() == "0:0":
        return False
    return os.path.realpath(host.path("etc/systemd/system/hibernate.target")) != "/dev/null"


def _configured(host: "Host") -> Iterator[Finding]:
    """Yield the options that the kernel was built without."""
    config = _config(host)
    if config is None:
        yield Finding(
            "kexec", NOTE, f"the configuration of Linux {host.release} cannot be read: nobody knows what it can"
        )
        return
    on = set(re.findall(r"^CONFIG_(\w+)=[ym]$", config, re.MULTILINE))
    if missing := [" or ".join(group) for group in _NEEDED if not on & set(group)]:
        yield Finding(
            "kexec", ERROR, f"Linux {host.release} was built without {', '.join(missing)}", "boot another kernel"
        )
    else:
        yield Finding("kexec", OK, f"Linux {host.release} can boot another kernel, and make a device of RAM set aside")
    luo = [name for name in ("KEXEC_HANDOVER", "LIVEUPDATE") if name not in on]
    if luo:
        yield Finding("kexec", OK, f"it has no live update ({', '.join(luo)} off), which pkramfs does not need")


def _config(host: "Host") -> str | None:
    """Return the configuration of the running kernel, None if it is nowhere."""
    import gzip
    import zlib

    for name in (f"boot/config-{host.release}", f"usr/lib/modules/{host.release}/config"):
        if (text := host.text(name)) is not None:
            return text
    try:
        with gzip.open(host.path("proc/config.gz"), "rt") as file:
            return file.read()
    except (OSError, EOFError, zlib.error):
        return None  # which is a finding


# -- where ------------------------------------------------------------------------------------------


def choose(host: "Host", size: int) -> tuple[Place | None, list[Finding]]:
    """Return the range to take, None if there is none, and findings about it."""
    free, findings = _free(host), list[Finding]()
    whole = free.total * BLOCK_SIZE
    if not _knows_uses(host):
        findings.append(Finding("room", NOTE, "/proc/iomem is for root: a range may be in use for a crash kernel"))
    place = _fitting(host, free, size) if size + size // 64 + _OTHERS <= whole else None
    if place is None:
        high = _HIGH // BLOCK_SIZE
        parts = [part & blocks for _, blocks in _nodes(host) for part in (free.clip(0, high), free.clip(high, 1 << 40))]
        pieces = [(end - start) * BLOCK_SIZE for part in parts for start, end in part]
        most = min(max(pieces, default=0), (whole - _OTHERS) * 64 // 65) // BLOCK_SIZE * BLOCK_SIZE
        found = (
            f"no {format_size(size)} of RAM in one piece can be set aside and leave {format_size(_OTHERS)} to the host"
        )
        remedy = f"give at most --reserve {most // MIB}M" if most >= _LEAST else ""
        return None, [*findings, Finding("room", ERROR, found, remedy)]
    where = f"{place.start:#x}-{place.start + place.size - 1:#x} in NUMA node {place.node}"
    costs = f"the kernel's data about its pages take {format_size(size // 64)} of the remaining memory"
    if place.start < _HIGH:
        low = f"{where} is below 4 GiB, where kernels, their initial RAM disks and crash kernels are placed"
        findings.append(Finding("room", WARNING, low, "see that crashkernel= does not overlap it"))
    else:
        findings.append(Finding("room", OK, f"{format_size(size)} can be set aside: {where}; {costs}"))
    return place, findings


def _fitting(host: "Host", free: "Spans", size: int) -> Place | None:
    """Return the lowest range above 4 GiB, else the highest one below; at multiples of 1 GiB before 2 MiB."""
    count, high, end = size // BLOCK_SIZE, _HIGH // BLOCK_SIZE, 1 << 40
    for part, top_down in ((free.clip(high, end), False), (free.clip(0, high), True)):
        for align in (GIB // BLOCK_SIZE, 1) if size % GIB == 0 else (1,):
            for node, blocks in _nodes(host):
                at = (part & blocks).first_fit(count, align, top_down=top_down)
                if at is not None:
                    return Place(at * BLOCK_SIZE, size, node)
    return None


def _free(host: "Host") -> "Spans":
    """Return the 2 MiB blocks that are RAM, and not used for something that stays where it is."""
    from pkramfs.spans import Spans

    found = host.firmware_map()
    ram = Spans((start, end) for start, end, name in found if name == "System RAM")
    if _knows_uses(host):
        now = Spans((start, end) for _, start, end, name in host.resources_below() if name == "System RAM")
        crash = Spans((start, end) for _, start, end, name in host.resources_below() if name == "Crash kernel")
        ram = (ram & now if found else now) - crash
    return ram.clip(_FIRST, 1 << 62).inward(BLOCK_SIZE)


def _knows_uses(host: "Host") -> bool:
    """Return True if /proc/iomem has its addresses, which are zeros for all but root."""
    return any(start for _, start, _, _ in host.resources_below())


def _nodes(host: "Host") -> "list[tuple[int, Spans]]":
    """Return the 2 MiB blocks of each NUMA node; all of them for node 0 where there are no nodes."""
    from pkramfs.spans import Spans

    unit = int(host.text("sys/devices/system/memory/block_size_bytes") or "0", 16)
    found = []
    for name in _names(host, "sys/devices/system/node", r"node\d+"):
        blocks = [int(one[6:]) for one in _names(host, f"sys/devices/system/node/{name}", r"memory\d+")]
        if unit and blocks:
            spans = Spans((number * unit, (number + 1) * unit) for number in blocks)
            found.append((int(name[4:]), spans.inward(BLOCK_SIZE)))
    return sorted(found, key=lambda one: one[0]) or [(0, Spans([(0, 1 << 40)]))]


# -- the boot loader --------------------------------------------------------------------------------


def loader(host: "Host", place: Place) -> Boot:
    """Return the boot loader of this host, and how it takes the word."""
    word, raw = place.memmap(), place.memmap("$")
    if os.path.exists(host.path("usr/sbin/grubby")) or os.path.exists(host.path("sbin/grubby")):
        escaped = raw.replace("$", "\\$")
        return Boot(
            "grubby", (f"grubby --update-kernel=ALL --args='{word}'",), f"grubby --update-kernel=ALL --args='{escaped}'"
        )
    grub = host.text(_GRUB.lstrip("/"))
    if grub is not None:
        new, raw_line = _grub_line(grub, word), _grub_line(grub, raw)
        return Boot(f"GRUB ({_GRUB})", (new, _grub_update(host)), raw_line)
    if host.text("etc/kernel/cmdline") is not None:
        return Boot(
            "kernel-install (/etc/kernel/cmdline)", (f"append {word}", "kernel-install add-all"), f"append {raw}"
        )
    return Boot("the boot loader", (f"append {word} to the kernel's command line",), f"append {raw}")


def _grub_line(text: str, word: str) -> str:
    """Return the line of GRUB's file with one more word. A shell reads the file, then GRUB what it was made into."""
    double, single, bare = ([("", "", ""), *_GRUB_LINE.findall(text)])[-1]
    quote = "'" if single else '"'
    escaped = word.replace("$", "\\$" if single else "\\\\\\$")
    return f"GRUB_CMDLINE_LINUX={quote}{f'{double or single or bare} {escaped}'.strip()}{quote}"


def _grub_update(host: "Host") -> str:
    """Return the command by which GRUB's file takes effect."""
    for name in ("usr/sbin/update-grub", "sbin/update-grub"):
        if os.path.exists(host.path(name)):
            return "update-grub"
    two = os.path.isdir(host.path("boot/grub2"))
    return "grub2-mkconfig -o /boot/grub2/grub.cfg" if two else "grub-mkconfig -o /boot/grub/grub.cfg"


def _names(host: "Host", directory: str, pattern: str) -> list[str]:
    """Return the names in a directory of the host that a pattern matches, none if it is missing."""
    place = host.path(directory)
    return sorted(name for name in os.listdir(place) if re.fullmatch(pattern, name)) if os.path.isdir(place) else []


def _amount(size: int) -> str:
    """Return a size as memmap= takes it."""
    return f"{size // GIB}G" if size % GIB == 0 else f"{size // MIB}M"
