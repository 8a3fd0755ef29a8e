# SPDX-License-Identifier: GPL-2.0-or-later
"""The measures of a machine, as families of metrics for Prometheus.

    machine    memory by owner, RAM behind it and the room left, NUMA nodes
    kernel     generation, when it was booted, phases of the boot, the pause of the last kexec
    nodes      size, relocated pages, when preserved
    mounts     state, files, bytes, lost data, the last preserve and restore; the log, takeovers, deaths of daemons
    requests   by kind, with latencies, as each daemon counts them (fuse/counters.py)

Names follow Prometheus' rules: base units (bytes, seconds), `_total` for counters that only grow. A part that cannot be
read counts in pkramfs_problems and hides no other. Labels that are names are escaped as for a terminal: they must be
UTF-8.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pkramfs.cli import status
from pkramfs.errors import PkramfsError
from pkramfs.text import printable
from pkramfs.units import PAGE_SIZE

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from pkramfs.fuse.counters import Snapshot
    from pkramfs.machine.directory import Machine

_LINE = re.compile(r"\[ *([0-9.]+)\] pkramfs: (.*)")
_PRESERVED = re.compile(r"(.*) preserved: .*?([0-9][0-9.,]*) ms")
_RESTORED = re.compile(r"(.*) mounted on .* \(restored .*\)")
_MOUNT = ("name", "mountpoint")


class Measures:
    """A collector of prometheus-client: each scrape looks at the machine anew."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine

    def collect(self) -> "Iterator[Metric]":
        """Yield all families of metrics."""
        from pkramfs import __version__

        found = status.gather(self.machine) if self.machine.exists() else None
        yield _info("pkramfs", "Version of pkramfs.", version=__version__)
        yield _gauge("pkramfs_up", "Whether a kernel is running.", int(bool(found and found["kernel"])))
        if found is None:
            return
        problems = len(found["problems"]) + sum("problem" in mount for mount in found["mounts"])
        yield _gauge("pkramfs_problems", "Problems that pkramctl status shows.", problems)
        yield from _memory(self.machine, found)
        yield from self._kernel(found)
        yield from _nodes(found["nodes"])
        yield from _mounts(found["mounts"])
        yield from _logs(found["mounts"])
        yield from self._last(found)
        yield from _requests(found["mounts"])

    def _kernel(self, found: dict[str, Any]) -> "Iterator[Metric]":
        from pkramfs.kernel import kernelrecord, nvram

        kernel = found["kernel"]
        if kernel is None:
            return
        yield _gauge("pkramfs_kernel_generation", "Kernels that the machine has had.", kernel["generation"])
        yield _gauge("pkramfs_kernel_boot_timestamp_seconds", "When the kernel was booted.", kernel["booted"])
        yield _info("pkramfs_kernel", "The running kernel.", kind=kernel["kind"], image=printable(kernel["image"]))
        loaded = int(bool((found["next"] or {}).get("loaded")))
        yield _gauge("pkramfs_kexec_loaded", "Whether a kernel is loaded.", loaded)
        try:
            info, pause = kernelrecord.read(self.machine, any_layout=True), nvram.pause(self.machine)
        except PkramfsError:
            return  # counted as a problem
        if info is not None:
            phases = _family("gauge", "pkramfs_boot_phase_seconds", "Duration of a phase of the last boot.", ("phase",))
            for name, seconds in (info.report.get("phases") or {}).items():
                phases.add_metric([name], seconds)
            yield phases
            lost = len(info.report.get("lost") or [])
            yield _gauge("pkramfs_boot_lost_nodes", "Nodes and mounts that the last boot lost.", lost)
        if pause is not None:
            yield _gauge("pkramfs_kexec_pause_seconds", "Pause of the last kexec, without copying.", pause)

    def _last(self, found: dict[str, Any]) -> "Iterator[Metric]":
        """Yield the last preserve and restore of each name, from the kernel log."""
        from pkramfs.kernel import history

        if found["kernel"] is None:
            return
        log = self.machine.dmesg()
        died = _family("counter", "pkramfs_daemon_deaths", "Daemons that died since the boot, by the kernel log.", ())
        died.add_metric([], history.deaths(log))
        yield died
        took = _family("gauge", "pkramfs_last_preserve_seconds", "Duration of the last preserve.", ("name",))
        when = _family("gauge", "pkramfs_last_restore_timestamp_seconds", "When it was restored.", ("name",))
        preserves: dict[str, float] = {}
        restores: dict[str, float] = {}
        for line in log.splitlines():
            if match := _LINE.fullmatch(line):
                if said := _PRESERVED.fullmatch(match[2]):
                    preserves[said[1]] = float(said[2].replace(",", "")) / 1000
                elif said := _RESTORED.fullmatch(match[2]):
                    restores[said[1]] = found["kernel"]["booted"] + float(match[1])
        for family, values in ((took, preserves), (when, restores)):
            for name, value in values.items():
                family.add_metric([printable(name)], value)
            yield family


def _memory(machine: "Machine", found: dict[str, Any]) -> "Iterator[Metric]":
    yield _gauge("pkramfs_ram_bytes", "RAM of the machine.", found["machine"]["ram"])
    if found["machine"]["backed"] is not None:
        yield _gauge("pkramfs_ram_backed_bytes", "Host memory behind RAM.", found["machine"]["backed"])
        ram = machine.ram()
        yield _gauge("pkramfs_ram_room_bytes", "Host memory that may still be used.", max(ram.room(), 0))
        ram.close()
    owners = _family("gauge", "pkramfs_memory_bytes", "RAM in page blocks, by owner.", ("owner",))
    for owner, size in (found["memory"] or {}).items():
        owners.add_metric([owner], size)
    yield owners
    numa = _family("gauge", "pkramfs_numa_memory_bytes", "The same by NUMA node.", ("node", "owner"))
    for node, parts in (found["numa"] or {}).items():
        for owner, size in parts.items():
            numa.add_metric([node, owner], size)
    yield numa


def _nodes(nodes: list[dict[str, Any]]) -> "Iterator[Metric]":
    size = _family("gauge", "pkramfs_node_bytes", "Memory that a node preserves.", ("node", "state"))
    moved = _family("gauge", "pkramfs_node_relocated_bytes", "What of it was relocated when saved.", ("node",))
    when = _family("gauge", "pkramfs_node_preserved_timestamp_seconds", "When it was preserved.", ("node",))
    for node in nodes:
        name = printable(node["name"])
        size.add_metric([name, node["state"]], node["bytes"])
        moved.add_metric([name], node["moved"] * PAGE_SIZE)
        when.add_metric([name], node["created_ns"] / 1e9)
    yield from (size, moved, when)


def _mounts(mounts: list[dict[str, Any]]) -> "Iterator[Metric]":
    gauges = {
        "files": ("pkramfs_mount_files", "Files of a mount."),
        "dirs": ("pkramfs_mount_directories", "Directories of a mount."),
        "bytes": ("pkramfs_mount_bytes", "Bytes of its files."),
        "writers_count": ("pkramfs_mount_writers", "Files that are open for writing."),
        "open_deleted_count": ("pkramfs_mount_open_deleted_files", "Deleted files that are in use."),
        "lost_count": ("pkramfs_mount_lost_files", "Files that have lost data."),
        "unsummed": ("pkramfs_mount_unchecked_pieces", "Pieces of files, of 1 MiB at most, without a checksum."),
        "damaged_count": ("pkramfs_mount_damaged_ranges", "Ranges of files that are not what their checksums say."),
    }
    up = _family("gauge", "pkramfs_mount_up", "Whether the daemon answers.", _MOUNT)
    preserved = _family("gauge", "pkramfs_mount_preserved", "Whether the tree would survive a kexec.", _MOUNT)
    refused = _family("counter", "pkramfs_mount_refused_writebacks", "Write-backs that were refused.", _MOUNT)
    families = {key: _family("gauge", name, text, _MOUNT) for key, (name, text) in gauges.items()}
    for mount in mounts:
        labels = _labels(mount)
        up.add_metric(labels, int("files" in mount))
        if "files" not in mount:  # its daemon does not answer, or has died
            continue
        preserved.add_metric(labels, int(mount["state"] == "preserved"))
        refused.add_metric(labels, mount["refused"])
        for key, family in families.items():
            if key in mount:  # of checksums only with verify=data
                family.add_metric(labels, mount[key])
    yield from (up, preserved, refused, *families.values())


def _logs(mounts: list[dict[str, Any]]) -> "Iterator[Metric]":
    """Yield the logs of trees that outlive their daemons, and how often that was needed."""
    known = {
        "log_bytes": ("gauge", "pkramfs_journal_bytes", "Memory of the log of a tree."),
        "log_requests": ("gauge", "pkramfs_journal_requests", "Requests in the log since the last checkpoint."),
        "log_age": ("gauge", "pkramfs_journal_age_seconds", "Time since the daemon began or made a checkpoint."),
        "checkpoints": ("counter", "pkramfs_journal_checkpoints", "Checkpoints that the daemon has made."),
        "takeovers": ("counter", "pkramfs_mount_takeovers", "How often another daemon went on with a mount."),
    }
    for key, (kind, name, text) in known.items():
        family = _family(kind, name, text, _MOUNT)
        for mount in mounts:
            if key in mount:
                family.add_metric(_labels(mount), mount[key])
        yield family


def _requests(mounts: list[dict[str, Any]]) -> "Iterator[Metric]":
    from pkramfs.fuse import counters
    from pkramfs.fuse.wire import Op

    names = {int(op): op.name.lower() for op in Op}
    total = _family("counter", "pkramfs_requests", "Requests of the kernel.", (*_MOUNT, "kind"))
    moved = _family("counter", "pkramfs_device_bytes", "Bytes of a page or more at once.", (*_MOUNT, "direction"))
    timed = "Time to answer the first request of a turn; see pkramctl(8)."
    times = _family("histogram", "pkramfs_request_seconds", timed, (*_MOUNT, "kind"))
    for mount in mounts:
        found, labels = counters.read(mount["pid"]), _labels(mount)
        if found is None:
            continue
        moved.add_metric([*labels, "received"], found.received)
        moved.add_metric([*labels, "sent"], found.sent)
        for kind, count in found.requests.items():
            total.add_metric([*labels, names.get(kind, str(kind))], count)
            _add_times(times, [*labels, names.get(kind, str(kind))], found, kind)
    yield from (total, moved, times)


_FIRST, _LAST = 10, 30
"""Buckets that are shown, each four times the one before: 2^10 ns, about a microsecond, to 2^30 ns, about a second."""


def _add_times(family: Any, labels: list[str], found: "Snapshot", kind: int) -> None:
    """Add the histogram of one kind: cumulative, as Prometheus wants it."""
    nanoseconds, counts = found.times[kind]
    if not any(counts):
        return
    buckets = [(str(2**bit / 1e9), float(sum(counts[:bit]))) for bit in range(_FIRST, _LAST + 1, 2)]
    family.add_metric(labels, [*buckets, ("+Inf", float(sum(counts)))], nanoseconds / 1e9)


def _labels(mount: dict[str, Any]) -> list[str]:
    return [printable(mount["name"] or ""), printable(mount["mountpoint"])]


def _family(kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client import core

    kinds = {"gauge": core.GaugeMetricFamily, "counter": core.CounterMetricFamily}
    return kinds.get(kind, core.HistogramMetricFamily)(name, text, labels=labels)


def _gauge(name: str, text: str, value: float) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, text, value)


def _info(name: str, text: str, **labels: str) -> Any:
    from prometheus_client.core import InfoMetricFamily

    return InfoMetricFamily(name, text, labels)
