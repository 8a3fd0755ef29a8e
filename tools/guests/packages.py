# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages for a guest, fetched by apt with lists and a status of its own; nothing is installed, nobody is root.

What was unpacked stays in the cache, for the next run.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

SYSTEMD = ("systemd", "systemd-sysv", "udev", "kmod")
USERLAND = (
    *("python3", "python3-pyfuse3", "python3-trio", "python3-numpy", "python3-rich", "python3-xxhash", "fuse3"),
    *("kexec-tools", "busybox-static", "e2fsprogs", "mount", "util-linux", "bash", "dash", "coreutils", "sed"),
)
_CONF = """\
Dir::State "{0}/state"; Dir::State::status "{0}/status"; Dir::Cache "{0}/cache";
Dir::Etc::sourcelist "{0}/sources.list"; Dir::Etc::sourceparts "{0}/parts"; Dir::Etc::preferencesparts "{0}/parts";
APT::Architecture "amd64"; APT::Architectures {{ "amd64"; }}; APT::Install-Recommends "false"; APT::Sandbox::User "";
Acquire::Languages "none"; Debug::NoLocking "true"; Acquire::Retries "3";
"""
_LEFT_OUT = ("./usr/share/doc/", "./usr/share/man/", "./usr/share/locale/", "./dev/")


class UnavailableError(Exception):
    """Something that a guest is made of cannot be fetched or unpacked here."""


class Kernel:
    """An unpacked kernel: its version, its image, and the tree in which its modules are."""

    def __init__(self, directory: Path, version: str) -> None:
        self.directory, self.version = directory, version
        found = [*directory.glob("boot/vmlinuz-*"), *directory.glob("usr/lib/modules/*/vmlinuz")]
        self.image = found[0]


def missing() -> list[str]:
    """Return the programs that a guest needs and this host lacks."""
    needed = ("apt-get", "dpkg-deb", "cpio", "modprobe", "depmod", "mke2fs", "qemu-system-x86_64", "xz")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    lacking = [name for name in needed if shutil.which(name, path=path) is None]
    return lacking if platform.machine() == "x86_64" else [*lacking, "a computer of type x86_64"]


class Archive:
    """One suite of Debian's archive, and a cache directory."""

    def __init__(self, cache: Path, suite: str) -> None:
        self.cache, self.suite = cache, suite
        self._place = cache / f"apt-{suite}"
        if not (self._place / "ok").exists():
            self._prepare()

    def _prepare(self) -> None:
        place = self._place
        for name in ("state/lists/partial", "cache/archives/partial", "parts"):
            (place / name).mkdir(parents=True, exist_ok=True)
        (place / "status").touch()
        key = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (place / "sources.list").write_text(f"deb [signed-by={key}] {mirror()} {self.suite} main\n")
        (place / "conf").write_text(_CONF.format(place))
        self._apt("-qq", "update")
        (place / "ok").touch()

    def _apt(self, *words: str, program: str = "apt-get", cwd: Path | None = None) -> str:
        return _run([program, *words], cwd=cwd, APT_CONFIG=str(self._place / "conf"))

    def userland(self, *more: str) -> Path:
        """Return a root directory with Python, what pkramfs needs, and more packages."""
        suffix = f"{self.suite}{'-' if more else ''}{'-'.join(more[:1])}"
        root = self.cache / f"root-{suffix}"
        if (root / ".done").exists():
            return root
        shutil.rmtree(root, ignore_errors=True)
        for name in ("proc", "sys", "dev", "tmp", "run", "mnt", "boot", "guest", "etc", "root"):
            (root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):  # merged from the start: packages no longer ship the links
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        debs = self.cache / f"debs-{suffix}"
        (debs / "partial").mkdir(parents=True, exist_ok=True)
        self._apt("-y", "-q", "-o", f"Dir::Cache::archives={debs}", "--download-only", "install", *USERLAND, *more)
        for deb in sorted(debs.glob("*.deb")):
            _unpack(deb, root)
        _link(root)
        _compile(root, "/usr/lib/python3", f"/usr/lib/{_python(root)}")
        (root / ".done").touch()
        return root

    def kernel(self, package: str) -> Kernel:
        """Return an unpacked kernel; `package` may be a metapackage."""
        place = self.cache / f"kernel-{self.suite}-{package}"
        tree = place / "x"
        if not (place / "ok").exists():
            shutil.rmtree(place, ignore_errors=True)
            (tree / "usr/lib").mkdir(parents=True)
            (tree / "lib").symlink_to("usr/lib")
            debs = place / "debs"
            debs.mkdir()
            version = self._version(package)
            self._apt("-q", "download", *self._parts(version), cwd=debs)
            for deb in debs.glob("*.deb"):
                _unpack(deb, tree)
            shutil.rmtree(debs)
            _run(["depmod", "-b", str(tree), version])
            (place / "version").write_text(version)
            (place / "ok").touch()
        return Kernel(tree, (place / "version").read_text())

    def _version(self, package: str) -> str:
        """Return the version that a metapackage depends on."""
        for line in self._apt("depends", package, program="apt-cache").splitlines():
            word, _, name = line.strip().partition(" ")
            if word == "Depends:" and name.startswith("linux-image-") and name[12].isdigit():
                package = name
                break
        return package.removeprefix("linux-image-")

    def _parts(self, version: str) -> list[str]:
        """Return the packages of a kernel: one, or several since 7.x."""
        known = self._apt("pkgnames", "linux-", program="apt-cache").split()
        split = [name for part in ("base", "binary", "modules") if (name := f"linux-{part}-{version}") in known]
        return [f"linux-image-{version}", *split]


def mirror() -> str:
    """Return the mirror that this host uses, so that a proxy or a copy nearby is used here, too."""
    for line in _run(["apt-get", "indextargets", "--format", "$(REPO_URI)"]).splitlines():
        if line.rstrip("/").endswith("/debian"):
            return line
    raise UnavailableError("apt of this host knows no archive of Debian's")


def _unpack(deb: Path, root: Path) -> None:
    """Unpack a package without its scripts. Links of the root directory stay."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as packed:
        assert packed.stdout is not None
        _run(
            [
                *("tar", "-x", "-C", str(root), "--keep-directory-symlink", "--no-same-owner"),
                *(f"--exclude={name}*" for name in _LEFT_OUT),
            ],
            stdin=packed.stdout,
        )
    if packed.returncode:
        raise UnavailableError(f"{deb} cannot be unpacked")


def _python(root: Path) -> str:
    """Return the name of the interpreter."""
    names = [path.name for path in (root / "usr/bin").glob("python3.[0-9]*") if path.name.replace(".", "").isalnum()]
    return min(names, key=len)


def _link(root: Path) -> None:
    """Make the links that scripts of packages would have made."""
    (root / "usr/bin/python3").unlink(missing_ok=True)
    (root / "usr/bin/python3").symlink_to(_python(root))
    if not (root / "usr/bin/sh").exists():
        (root / "usr/bin/sh").symlink_to("dash")
    for library in [*root.glob("usr/lib/x86_64-linux-gnu/blas/lib*.so.3"), *root.glob("usr/lib/*/lapack/lib*.so.3")]:
        link = library.parent.parent / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(f"{library.parent.name}/{library.name}")
    (root / "etc/mtab").unlink(missing_ok=True)
    (root / "etc/mtab").symlink_to("../proc/self/mounts")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n")
    (root / "etc/group").write_text("root:x:0:\n")


def _compile(root: Path, *places: str) -> None:
    """Compile Python's modules: a guest would take a minute to import numpy from source."""
    inside = ["chroot", str(root)] if os.geteuid() == 0 else ["unshare", "-r", "chroot", str(root)]
    _run([*inside, "/usr/bin/python3", "-m", "compileall", "-q", "-j", "1", *places], check=False)


def compile_in(root: Path, place: str) -> None:
    """Compile a directory of a userland."""
    _compile(root, place)


def _run(command: list[str], *, cwd: Path | None = None, check: bool = True, stdin: object = None, **env: str) -> str:
    """Run a command and return its output; raise UnavailableError, with what it said, if it fails."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", **env},
        stdin=stdin,  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode:
        raise UnavailableError(f"{' '.join(command[:4])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
