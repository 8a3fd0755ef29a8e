# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest boots from: an initial RAM disk for each kernel, and a disk with userland, kernels and this checkout."""

import lzma
import os
import shutil
import subprocess
from pathlib import Path

from guests.packages import Kernel, compile_in

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
MODULES = ("virtio_pci", "virtio_blk", "ext4", "fuse", "nd_e820", "nd_pmem", "device_dax", "dax_pmem")
COMMANDS = {"mount.pkramfs": "mount", "pkram-kexec": "kexec", "pkramctl": "ctl"}
DISK_MIB = 768
_NEEDLESS = (
    *("serial-getty@ttyS0.service", "getty.target", "systemd-vconsole-setup.service", "systemd-hwdb-update.service"),
    *("ldconfig.service", "systemd-journal-catalog-update.service", "apt-daily.timer", "apt-daily-upgrade.timer"),
    *("e2scrub_reap.service", "systemd-firstboot.service", "systemd-sysusers.service", "systemd-binfmt.service"),
)
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}


def initrd(kernel: Kernel, userland: Path, work: Path) -> Path:
    """Make an initial RAM disk: busybox, /init, and the modules in the order in which they are to be loaded."""
    top = work / f"initrd-{kernel.version}.d"
    for name in ("bin", "modules", "proc", "sys", "dev", "r", "tmp"):
        (top / name).mkdir(parents=True)
    shutil.copy(userland / "usr/bin/busybox", top / "bin/busybox")
    shutil.copy(HERE / "init", top / "init")
    (top / "init").chmod(0o755)
    for number, module in enumerate(_modules(kernel)):
        name = module.name.partition(".ko")[0]
        (top / "modules" / f"{number:03}-{name}.ko").write_bytes(_plain(module))
    target = work / f"initrd-{kernel.version}"
    names = "\n".join(sorted(str(path.relative_to(top)) for path in top.rglob("*")))
    with open(target, "wb") as packed:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            cwd=top,
            input=names.encode(),
            stdout=packed,
            check=True,
            env=_ENVIRONMENT,
        )
    return target


def _modules(kernel: Kernel) -> list[Path]:
    """Return the modules that are needed and not built in, in order, each once."""
    found: dict[str, None] = {}
    for name in MODULES:
        done = subprocess.run(
            ["modprobe", "-n", "-D", "-d", kernel.directory, "-S", kernel.version, name],
            capture_output=True,
            text=True,
            check=False,
            env=_ENVIRONMENT,
        )
        for line in done.stdout.splitlines():
            word, _, path = line.partition(" ")
            if word == "insmod":
                found[path.split()[0]] = None
    return [Path(path) for path in found]


def _plain(module: Path) -> bytes:
    """Return a module's bytes, decompressed."""
    data = module.read_bytes()
    if module.suffix == ".xz":
        return lzma.decompress(data)
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-qdc", module], capture_output=True, check=True, env=_ENVIRONMENT).stdout
    return data


def _write_service(top: Path) -> None:
    """Make walk.py a service, for a guest in which systemd runs (it is ignored in others)."""
    units = top / "etc/systemd/system"
    wants = units / "multi-user.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (units / "walk.service").write_text(
        "[Unit]\nAfter=local-fs.target mnt-pk.mount pkramfs-preserve@mnt-pk.service "
        "mnt-two.mount pkramfs-preserve@mnt-two.service\nDefaultDependencies=no\n"
        "Before=shutdown.target\nConflicts=shutdown.target\n"
        "[Service]\nType=oneshot\nTimeoutStartSec=infinity\nExecStart=/usr/bin/python3 /guest/walk.py\n"
        "Environment=HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin\nStandardOutput=tty\nStandardError=tty\n"
        "TTYPath=/dev/ttyS0\n"
    )
    (wants / "walk.service").symlink_to("../walk.service")
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    for name in _NEEDLESS:
        (units / name).symlink_to("/dev/null")
    generators = top / "etc/systemd/system-generators"
    generators.mkdir(exist_ok=True)
    for one in (top / "usr/lib/systemd/system-generators").glob("*"):
        if one.name != "systemd-fstab-generator":  # a busy host takes longer for all of them than systemd waits
            (generators / one.name).symlink_to("/dev/null")
    for name in ("etc/.updated", "var/.updated"):  # else a guest makes databases that nobody asks, for minutes
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).touch()
    (top / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (top / "etc/fstab").write_text("/dev/vda / ext4 rw 0 0\n")


def disk(userland: Path, kernels: list[tuple[Kernel, Path]], work: Path) -> Path:
    """Make the disk: a copy of the userland with this checkout's package, its commands, and the kernels in /boot."""
    top = work / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", str(userland), str(top)], check=True)
    shutil.copytree(CHECKOUT / "pkramfs", top / "guest/pkramfs", ignore=shutil.ignore_patterns("__pycache__", "man"))
    shutil.copy(HERE / "walk.py", top / "guest/walk.py")
    for name, module in COMMANDS.items():
        path = top / "usr/sbin" / name
        path.write_text(
            "#!/usr/bin/python3\nimport sys\nsys.path.insert(0, '/guest')\n"
            f"from pkramfs.cli.{module} import main\nsys.exit(main())\n"
        )
        path.chmod(0o755)
    (top / "usr/sbin/mount.fuse.pkramfs").symlink_to("mount.pkramfs")
    _write_service(top)
    for kernel, ramdisk in kernels:
        shutil.copy(kernel.image, top / "boot" / f"vmlinuz-{kernel.version}")
        shutil.copy(ramdisk, top / "boot" / f"initrd-{kernel.version}")
    compile_in(top, "/guest")
    target = work / "disk.img"
    subprocess.run(
        [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-E", "root_owner=0:0"),
            *("-d", str(top), str(target), f"{DISK_MIB}M"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env=_ENVIRONMENT,
    )
    shutil.rmtree(top)
    return target
