# SPDX-License-Identifier: GPL-2.0-or-later
"""Chroots of a Debian suite: made once by debootstrap, copied for each use, entered apart from everything else.

Whoever is in one has processes, mounts, /dev, /run and /dev/shm of its own: what is left running or mounted in there
ends with it. Only root can make and enter one.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from guests.packages import UnavailableError, mirror

from releasing.sources import BuildError

_ENTER = """\
root=$1; shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount -t tmpfs -o mode=755 dev "$root/dev"
for name in null zero full random urandom tty fuse; do
    [ -e "/dev/$name" ] || continue
    : >"$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
for name in dev/shm run tmp; do mount -t tmpfs -o mode=1777 tmpfs "$root/$name"; done
exec chroot "$root" /usr/bin/env -i HOME=/root LC_ALL=C.UTF-8 TERM=dumb DEBIAN_FRONTEND=noninteractive \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
"""
_CONF = {
    "etc/dpkg/dpkg.cfg.d/unsafe-io": "force-unsafe-io\n",
    "etc/apt/apt.conf.d/snapshot": 'Acquire::Check-Valid-Until "false";\n',  # the mirror may be a snapshot
    "usr/sbin/policy-rc.d": "#!/bin/sh\nexit 101\n",  # no service starts
}
_APT = "apt-get -qq -o Dpkg::Use-Pty=0"


class Chroot:
    """A directory with a Debian system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, script: str, *words: str, shown: bool = False) -> str:
        """Run a shell script in it and return what it printed; BuildError, with that, if it fails."""
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        command = [*apart, "sh", "-ec", _ENTER, "sh", str(self.root), "sh", "-ec", script, "sh", *words]
        lines = []
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as ran:
            assert ran.stdout is not None
            for raw in ran.stdout:
                lines.append(raw.decode("utf-8", "replace"))
                if shown:
                    sys.stderr.write(lines[-1])
        if ran.returncode:
            raise BuildError(f"status {ran.returncode} in a chroot of {self.root}:\n{''.join(lines[-40:])}")
        return "".join(lines)

    def install(self, *packages: str) -> None:
        """Install Debian packages and what they need."""
        self.run(f'{_APT} update; {_APT} install -y --no-install-recommends "$@"', *packages)

    def copy(self, place: Path) -> "Chroot":
        """Return a copy of it."""
        subprocess.run(["cp", "-a", "--reflink=auto", str(self.root), str(place)], check=True)
        return Chroot(place)


def base(cache: Path, suite: str) -> Chroot:
    """Return a system with nothing but what every Debian system has, for copying."""
    return _kept(cache / f"chroot-{suite}", lambda place: _debootstrap(place, suite))


def builder(cache: Path, suite: str, control: Path) -> Chroot:
    """Return a system in which a source package with this debian/control can be built and examined, for copying."""

    def fill(place: Path) -> None:
        made = base(cache, suite).copy(place)
        (made.root / "root/wanted/debian").mkdir(parents=True)
        (made.root / "root/wanted/debian/control").write_bytes(control.read_bytes())
        made.install("build-essential", "lintian")
        made.run(f"{_APT} build-dep -y --no-install-recommends /root/wanted")

    mark = hashlib.sha256(control.read_bytes()).hexdigest()[:8]  # other needs, another chroot
    for old in cache.glob(f"chroot-{suite}-build-*"):
        if not old.name.endswith(mark):
            shutil.rmtree(old)
    return _kept(cache / f"chroot-{suite}-build-{mark}", fill)


def _kept(place: Path, fill: Callable[[Path], None]) -> Chroot:
    """Return a chroot of the cache; if it is not there, have it filled, and named when it is whole."""
    if not place.exists():
        new = place.with_name(f"{place.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        fill(new)
        new.rename(place)
    return Chroot(place)


def _debootstrap(place: Path, suite: str) -> None:
    if os.geteuid() != 0:
        raise BuildError("only root can make a chroot: run this as root, or build sdist and wheel alone")
    if shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        raise BuildError("debootstrap is missing: apt-get install debootstrap")
    print(f"package: making a chroot of {suite} in {place.parent}", file=sys.stderr)
    try:
        command = ["debootstrap", "--variant=minbase", suite, str(place), mirror()]
    except UnavailableError as error:
        raise BuildError(str(error)) from None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"debootstrap of {suite} failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    for name, text in _CONF.items():
        (place / name).write_text(text)
    (place / "usr/sbin/policy-rc.d").chmod(0o755)
