# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of a host: can it serve mounts, and will it keep preserved trees? Each finding has its remedy.

    versions     pkramfs, Python, Linux, and the packages that it needs
    fuse         /dev/fuse, and the right to mount
    helpers      the helpers that mount(8) runs: /sbin/mount.pkramfs, /sbin/mount.fuse.pkramfs
    limits       limits of this shell that a daemon started here would keep
    cgroup       the memory that this process's cgroup allows
    logind       whether an ordinary user's files stay after the logout

A check changes nothing. It reads a Host, which a test makes of a directory of its own.

Kernel: fs/fuse/dev.c, mm/memcontrol.c; systemd: logind.conf(5), RemoveIPC=
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pkramfs.errors import PkramfsError, explain
from pkramfs.units import format_size

OK, NOTE, WARNING, ERROR = LEVELS = ("ok", "note", "warning", "error")
"""What a finding means: all is well; worth to know; something is lacking or may be lost; something does not work."""
HELPERS = ("mount.pkramfs", "mount.fuse.pkramfs")
"""What mount(8) runs: by the type that the user wrote, and, for a remount, by the kernel's type."""
_SYS_ADMIN = 21
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?")
_IPC = re.compile(r"^\s*RemoveIPC\s*=\s*(\w+)", re.MULTILINE)
_OFF = ("no", "false", "off", "0", "n", "f")
_SECONDS = 60


class Finding(NamedTuple):
    """The result of one check: its name, one of LEVELS, the finding, and the remedy."""

    check: str
    level: str
    found: str
    remedy: str = ""


class Host(NamedTuple):
    """Where to look: the top of the file system, and for whom."""

    top: str
    uid: int
    user: str = ""

    def path(self, name: str) -> str:
        """Return where a file of this host is."""
        return os.path.join(self.top, name.lstrip("/"))

    def text(self, name: str) -> str:
        """Return a file's text, nothing if it cannot be read."""
        try:
            with open(self.path(name), encoding="utf-8", errors="surrogateescape") as file:
                return file.read()
        except OSError:
            return ""


def versions(host: Host) -> Iterator[Finding]:
    """Check that the packages that pkramfs needs can be imported, and are new enough."""
    from importlib import import_module, metadata

    from pkramfs import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    said = [f"pkramfs {__version__}", f"Python {python}", f"Linux {os.uname().release}"]
    for name, least in _requirements():
        try:
            module = import_module(name)
            found = metadata.version(name)
        except (ImportError, metadata.PackageNotFoundError) as error:
            yield Finding(
                "versions", ERROR, f"{name} cannot be used: {error}", f"{sys.executable} -m pip install {name}"
            )
            continue
        if not any(_number(found)):  # as Debian's xxhash: built away from the tags that its version comes from
            found = str(getattr(module, "VERSION", least))
        if _number(found) < _number(least):
            wanted = f"{name}>={least}"
            remedy = f"{sys.executable} -m pip install '{wanted}'"
            yield Finding("versions", ERROR, f"{name} {found} is too old: {wanted} is needed", remedy)
        said.append(f"{name} {found}")
    yield Finding("versions", OK, ", ".join(said))


def _requirements() -> list[tuple[str, str]]:
    """Return the packages that this one needs, each with the least version; nothing where it is not installed."""
    from importlib import metadata

    try:
        wanted = metadata.requires("pkramfs") or []
    except metadata.PackageNotFoundError:
        wanted = []
    found = [_REQUIREMENT.match(line) for line in wanted if "extra ==" not in line]
    return [(match[1].replace("-", "_"), match[2] or "") for match in found if match]


def _number(version: str) -> list[int]:
    """Return a version as numbers, as far as it has them."""
    return [int(part) for part in re.findall(r"\d+", version)]


def fuse(host: Host) -> Iterator[Finding]:
    """Check the device, and the right to mount."""
    device = host.path("/dev/fuse")
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        remedy = "modprobe fuse; start a container with --device /dev/fuse"
        yield Finding("fuse", ERROR, f"{device} is missing: nothing can be mounted", remedy)
    except OSError as error:
        remedy = f"chmod 666 {device}, as udev does; start a container with --device /dev/fuse"
        yield Finding("fuse", ERROR, f"{explain(error)}: nothing can be mounted", remedy)
    else:
        yield Finding("fuse", OK, f"{device} can be opened")
    yield _may_mount(host)


def _may_mount(host: Host) -> Finding:
    import shutil

    if host.uid == 0:
        if _has_capability(host, _SYS_ADMIN):
            return Finding("fuse", OK, "root may mount")
        remedy = "start the container with --cap-add SYS_ADMIN, and a security profile that allows mount(2)"
        return Finding("fuse", ERROR, "this root may not mount: CAP_SYS_ADMIN was taken away", remedy)
    program = shutil.which("fusermount3", path=os.pathsep.join(map(host.path, ("/usr/bin", "/bin", "/usr/local/bin"))))
    if program is None:
        return Finding("fuse", ERROR, "fusermount3 is missing: only root can mount", "apt-get install fuse3")
    mode = os.stat(program)
    if mode.st_uid != 0 or not mode.st_mode & 0o4000:
        remedy = f"chown root {program}; chmod u+s {program}"
        return Finding("fuse", ERROR, f"{program} is not setuid root: only root can mount", remedy)
    return Finding("fuse", OK, f"{program} mounts for an ordinary user")


def _has_capability(host: Host, number: int) -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", host.text("/proc/self/status"), re.MULTILINE)
    return match is None or bool(int(match[1], 16) >> number & 1)


def own_helper() -> str:
    """Return the path of this installation's mount.pkramfs."""
    import shutil
    import sysconfig

    beside = os.path.join(sysconfig.get_path("scripts"), HELPERS[0])
    return beside if os.path.exists(beside) else os.path.realpath(shutil.which(HELPERS[0]) or beside)


def helpers(host: Host, ours: str = "") -> Iterator[Finding]:
    """Check that mount(8) finds this installation's helper, by both names."""
    ours = ours or own_helper()
    for name, use in zip(HELPERS, ("mount -t pkramfs", "mount -o remount"), strict=True):
        link = host.path(f"/sbin/{name}")
        finding = _helper(link, ours, use)
        if host.uid != 0 and finding.level == ERROR:  # mount(8) is root's
            finding = finding._replace(
                level=NOTE, remedy=f"{HELPERS[0]} by its name needs no root; or as root: " + finding.remedy
            )
        yield finding


def _helper(link: str, ours: str, use: str) -> Finding:
    remedy = f"pkramctl install, or ln -sfn {ours} {link}"
    if not os.path.lexists(link):
        return Finding("helpers", ERROR, f"{link} is missing: `{use}` does not work", remedy)
    if not os.path.exists(link):
        return Finding("helpers", ERROR, f"{link} leads to nothing ({os.path.realpath(link)})", remedy)
    if not os.access(link, os.X_OK):
        return Finding("helpers", ERROR, f"{link} cannot be executed", remedy)
    if not (os.path.exists(ours) and os.path.samefile(link, ours)):
        found = f"{link} is another installation's ({os.path.realpath(link)})"
        return Finding("helpers", WARNING, found, f"{remedy}, if this one is to serve mounts")
    return Finding("helpers", OK, f"{link} is ours")


def limits(ram: int) -> Iterator[Finding]:
    """Check the limits of this shell that a daemon started here keeps, with `ram` bytes of RAM.

    It runs in a process of its own, which sheds its limits as a daemon does, because those of this process must stay.
    """
    import subprocess

    code = "import sys; from pkramfs.machine import process; process.shed(); process.require(int(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(ram)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1].partition("Error: ")
        found, _, remedy = (said[2] or said[0]).partition(": ")
        yield Finding("limits", ERROR, f"{found}: a daemon refuses to start", remedy)
    else:
        yield Finding("limits", OK, "no limit of this shell is too small for RAM")


def cgroup(ram: int) -> Iterator[Finding]:
    """Check the memory cgroups of this process, which are charged for the pages that a daemon touches."""
    from pkramfs.machine.cgroups import MemoryGroups

    groups = MemoryGroups()
    limit, room = groups.limit(), groups.room()
    if limit is None or room is None:
        yield Finding("cgroup", OK, "no limit of memory")
        return
    found = f"this cgroup may use {format_size(limit)} of memory, RAM has {format_size(ram)}"
    remedy = "raise memory.max (systemctl set-property UNIT MemoryMax=…), or mount from another cgroup"
    if room <= 0:
        yield Finding("cgroup", ERROR, f"{found}, and nothing is left: writes fail with ENOSPC", remedy)
    elif limit < ram:
        yield Finding("cgroup", NOTE, f"{found}; {format_size(room)} are left", remedy)
    else:
        yield Finding("cgroup", OK, f"{found}; {format_size(room)} are left")


def logind(host: Host, directory: str) -> Iterator[Finding]:
    """Check that systemd-logind does not remove the machine at the user's last logout."""
    if host.uid == 0 or not os.path.isdir(host.path("/run/systemd/system")):
        why = "root's files stay" if host.uid == 0 else "systemd does not run here"
        yield Finding("logind", OK, why)
    elif not directory.startswith("/dev/shm/"):
        yield Finding("logind", OK, f"{directory} is not in /dev/shm, which a logout clears")
    elif os.path.exists(host.path(f"/var/lib/systemd/linger/{_user(host)}")):
        yield Finding("logind", OK, f"{_user(host)} lingers: files and daemons stay after the logout")
    elif _keeps_ipc(host):
        yield Finding("logind", OK, "RemoveIPC=no: files in /dev/shm stay after the logout")
    else:
        found = f"at the last logout systemd-logind removes all that {_user(host)} has in /dev/shm, RAM too"
        remedy = f"loginctl enable-linger {_user(host)}, or set PKRAM_ROOT to a directory on another tmpfs"
        yield Finding("logind", WARNING, found, remedy)


def _user(host: Host) -> str:
    if host.user:
        return host.user
    import pwd

    try:
        return pwd.getpwuid(host.uid).pw_name
    except KeyError:  # a container's user without a name
        return str(host.uid)


def _keeps_ipc(host: Host) -> bool:
    """Return True if logind.conf says RemoveIPC=no; the last file that is read counts."""
    said = "yes"
    for directory in ("/usr/lib/systemd", "/etc/systemd", "/run/systemd"):
        dropins = host.path(f"{directory}/logind.conf.d")
        names = sorted(os.listdir(dropins)) if os.path.isdir(dropins) else []
        for name in ("logind.conf", *(f"logind.conf.d/{one}" for one in names if one.endswith(".conf"))):
            said = (_IPC.findall(host.text(f"{directory}/{name}")) or [said])[-1]
    return said.lower() in _OFF


def guarded(check: str, found: Iterable[Finding]) -> Iterator[Finding]:
    """Yield findings; a check that fails is a finding itself, and hides no other."""
    try:
        yield from found
    except (PkramfsError, OSError) as error:
        text = explain(error) if isinstance(error, OSError) else str(error)
        yield Finding(check, ERROR, f"cannot be checked: {text}")
