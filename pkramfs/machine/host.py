# SPDX-License-Identifier: GPL-2.0-or-later
"""The computer under the machine: facts from its kernel about itself and its devices.

    /proc/sys/kernel/random/boot_id      changes when a kernel boots
    /proc/sys/kernel/bootloader_type     whether a kernel or firmware booted this one
    /proc/cmdline                        pkram=
    /proc/vmcore                         exists in a crash kernel only
    /proc/iomem, /sys/firmware/memmap    which ranges are RAM, and their use
    /sys/dev/char/M:m                    size and alignment of a device of memory

Only machines on real memory (backing.py) need this. All of it is text, and each file may be missing, because a
container may hide it. PKRAM_HOST names a directory whose proc and sys are read in place of the host's; tests use it
to boot a host as often as they like.

Kernel: drivers/char/random.c, arch/x86/kernel/ksysfs.c, fs/proc/cmdline.c, fs/proc/vmcore.c, drivers/dax/bus.c
"""

import contextlib
import os

from pkramfs.errors import MachineError, explain

VARIABLE = "PKRAM_HOST"
_KEXEC_LOADER = 0xD
"""Type that kexec's boot loaders give themselves (LOADER_TYPE_KEXEC), above a version of 4 bits."""
_MOST = 1 << 20


class Host:
    """The host whose /proc and /sys lie below `top`."""

    def __init__(self, top: str | None = None) -> None:
        self._top = (os.environ.get(VARIABLE) or "/") if top is None else top

    def path(self, *parts: str) -> str:
        """Return the path of a file of the host."""
        return os.path.join(self._top, *parts)

    @property
    def boot_id(self) -> str:
        """Return the number that the kernel gave to this boot: 32 hexadecimal digits."""
        text = self._need("proc/sys/kernel/random/boot_id").strip().replace("-", "")
        if len(text) != 32 or not all(letter in "0123456789abcdef" for letter in text):
            raise MachineError(f"{self.path('proc/sys/kernel/random/boot_id')}: {text!r} is no boot id")
        return text

    @property
    def cmdline(self) -> str:
        """Return the command line of the host's kernel."""
        return self._need("proc/cmdline").rstrip("\n")

    @property
    def release(self) -> str:
        """Return the version of the host's kernel."""
        return self._need("proc/sys/kernel/osrelease").strip()

    @property
    def loader(self) -> int | None:
        """Return the type of the boot loader; None where the architecture has none."""
        text = (self.text("proc/sys/kernel/bootloader_type") or "").strip()
        return int(text) if text.isdecimal() else None

    @property
    def kexeced(self) -> bool | None:
        """Return True if a kernel booted this one, False if firmware did, None if that is not known."""
        loader = self.loader
        return None if loader is None else loader >> 4 == _KEXEC_LOADER

    @property
    def is_crash_kernel(self) -> bool:
        """Return True in a kernel that examines a crashed one."""
        return os.path.exists(self.path("proc/vmcore"))

    @property
    def kexec_loaded(self) -> bool:
        """Return True if kexec(8) has loaded a kernel."""
        return (self.text("sys/kernel/kexec_loaded") or "").strip() == "1"

    @property
    def has_systemd(self) -> bool:
        """Return True if systemd runs the host, as sd_booted(3) tells."""
        return os.path.isdir(self.path("run/systemd/system"))

    def memory_device(self, number: int) -> tuple[int, int] | None:
        """Return size and alignment in bytes of a devdax device, by its number; None for any other device."""
        place = f"sys/dev/char/{os.major(number)}:{os.minor(number)}"
        if os.path.basename(os.path.realpath(self.path(place, "subsystem"))) != "dax":
            return None
        size, align = (self.text(f"{place}/{name}") or "" for name in ("size", "align"))
        return (_number(size), _number(align)) if _number(size) else None

    def users(self, path: str) -> list[int]:
        """Return the other processes that have a file open; none on the fake host of a test."""
        path = os.path.realpath(path)
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
        return sorted(pid for pid in pids if path in _open_files(pid))

    def resources(self) -> list[tuple[int, int, str]]:
        """Return the outermost lines of /proc/iomem: first byte, byte behind the last, name."""
        return [(start, end, name) for depth, start, end, name in self.resources_below() if depth == 0]

    def resources_below(self) -> list[tuple[int, int, int, str]]:
        """Return all lines of /proc/iomem, with their depth. For all but root the addresses are zeros."""
        found = []
        for line in (self.text("proc/iomem") or "").splitlines():
            addresses, _, name = line.partition(" : ")
            first, _, last = addresses.partition("-")
            if name:
                found.append(((len(line) - len(line.lstrip(" "))) // 2, int(first, 16), int(last, 16) + 1, name))
        return found

    def firmware_map(self) -> list[tuple[int, int, str]]:
        """Return the firmware's memory map: first byte, byte behind the last, type; empty if it is not kept."""
        place, found = self.path("sys/firmware/memmap"), []
        for name in os.listdir(place) if os.path.isdir(place) else []:
            start, end, kind = (
                self.text(f"sys/firmware/memmap/{name}/{key}") or "" for key in ("start", "end", "type")
            )
            if kind:
                found.append((int(start, 16), int(end, 16) + 1, kind.strip()))
        return sorted(found)

    def _need(self, name: str) -> str:
        text = self.text(name)
        if text is None:
            raise MachineError(f"cannot read {self.path(name)}, by which a boot of the host is noticed")
        return text

    def text(self, name: str) -> str | None:
        """Return a file's text, None if it is missing."""
        try:
            with open(self.path(name), encoding="utf-8", errors="surrogateescape") as file:
                return file.read(_MOST)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MachineError(f"cannot read {explain(error)}") from None


def _open_files(pid: int) -> list[str]:
    """Return the paths of a process's open files, none if it has ended or is not readable."""
    found, place = [], f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(place):
            with contextlib.suppress(OSError):  # closed meanwhile
                found.append(os.readlink(f"{place}/{name}"))
    return found


def _number(text: str) -> int:
    """Return a number of sysfs, 0 where there is none."""
    try:
        return int(text.strip(), 0)
    except ValueError:
        return 0
