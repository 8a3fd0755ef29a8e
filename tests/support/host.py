# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that boots as often as a test likes: its own /proc and /sys, below a directory that PKRAM_HOST names."""

import os
import uuid
from pathlib import Path

import pytest

from pkramfs.machine.host import VARIABLE, Host

FIRMWARE, KEXEC = 0xB0, 0xD0
"""Boot loader types: of GRUB or QEMU (anything but kexec's), and of kexec."""


class FakeHost(Host):
    """Files that say what a kernel says of itself."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(str(top))
        self.top = top
        monkeypatch.setenv(VARIABLE, str(top))
        self.boot()

    def write(self, name: str, text: str) -> None:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def boot(self, cmdline: str = "BOOT_IMAGE=/vmlinuz root=/dev/sda1 quiet", loader: int | None = FIRMWARE) -> None:
        """Boot another kernel."""
        self.write("proc/sys/kernel/random/boot_id", f"{uuid.uuid4()}\n")
        self.write("proc/sys/kernel/osrelease", "6.12.9-test\n")
        self.write("proc/cmdline", f"{cmdline}\n")
        kind = self.top / "proc/sys/kernel/bootloader_type"
        kind.unlink(missing_ok=True)
        if loader is not None:
            kind.write_text(f"{loader}\n")

    def add_device(self, path: str, size: int, align: int = 2 << 20) -> None:
        """Have sysfs say that a character device is memory."""
        number = os.stat(path).st_rdev
        place = f"sys/dev/char/{os.major(number)}:{os.minor(number)}"
        self.write(f"{place}/size", f"{size}\n")
        self.write(f"{place}/align", f"{align}\n")
        bus = self.top / "sys/bus/dax"
        bus.mkdir(parents=True, exist_ok=True)
        (self.top / place / "subsystem").symlink_to(bus)
