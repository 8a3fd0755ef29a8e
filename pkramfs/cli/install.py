# SPDX-License-Identifier: GPL-2.0-or-later
"""pkramctl install: put the files where systemd and udev look for them, and say what is left to do.

    systemd/system/pkramfs-preserve@.service     preserves a tree at shutdown, before it is unmounted
    udev/rules.d/70-pkramfs.rules                has systemd know devices of memory

They are written below /etc, where an administrator may change them; what is there and is another text stays, unless
forced. Nothing is enabled: which trees are to be preserved is said by name.
"""

import argparse
import os

from pkramfs.cli import arguments, render
from pkramfs.errors import MachineError, explain

_FILES = {
    "pkramfs-preserve@.service": "systemd/system",
    "70-pkramfs.rules": "udev/rules.d",
}
_NEXT = """\
next, for a tree that /etc/fstab mounts on /mnt:
  none /mnt pkramfs pkram=NAME,x-systemd.requires=dev-dax0.0.device 0 0  (a file: x-systemd.requires-mounts-for=PATH)
  systemctl enable --now pkramfs-preserve@mnt.service                    (systemd-escape -p gives the name of a path)"""


def act(args: argparse.Namespace) -> None:
    """Run `pkramctl install`."""
    sources = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "resources", "systemd")
    written = [
        target
        for name, place in _FILES.items()
        if _write(os.path.join(sources, name), target := os.path.join(args.etc, place, name), force=args.force)
    ]
    if written and args.etc == "/etc" and os.path.isdir("/run/systemd/system"):
        _reload()
    if arguments.wants_json(args):
        render.emit_json({"written": written})
        return
    for target in written:
        render.say(f"wrote {target}")
    for line in _NEXT.splitlines():
        render.say(line)


def _write(source: str, target: str, *, force: bool) -> bool:
    """Write a file unless it is there already; return True if it was written."""
    with open(source, encoding="utf-8") as file:
        text = file.read()
    try:
        if os.path.exists(target):
            with open(target, encoding="utf-8", errors="replace") as file:
                if file.read() == text:
                    return False
            if not force:
                raise MachineError(f"{target} is there and says something else: --force overwrites it")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise MachineError(f"cannot write {explain(error)}") from None
    return True


def _reload() -> None:
    """Have systemd and udev read their files again."""
    import subprocess

    for command in (["systemctl", "daemon-reload"], ["udevadm", "control", "--reload"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise MachineError(f"cannot run {explain(error)}") from None
        if done.returncode:
            raise MachineError(f"{' '.join(command)} failed: {done.stderr.strip()}")
