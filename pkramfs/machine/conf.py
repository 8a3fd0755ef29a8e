# SPDX-License-Identifier: GPL-2.0-or-later
"""NAME.conf: which memory is the RAM of a machine. It is the only file on disk of a machine on real memory.

    # /etc/pkramfs/default.conf
    ram = /dev/dax0.0
    uuid = 5ab0…

`pkramctl machine create --ram PATH` writes it. `uuid` is the uuid of the header in the memory: it tells the device from
one that got its number at this boot, or that holds another machine. The files of root's machines are in /etc/pkramfs.
If PKRAM_ROOT names the directory of the machines, NAME.conf is there, beside the machine NAME.

Kernel: /etc/mdadm.conf (ARRAY … uuid=…), in spirit
"""

import os
import re
from dataclasses import dataclass

from pkramfs.errors import DamagedError, MachineError, explain
from pkramfs.machine.files import read_file, replace_file

DIRECTORY = "/etc/pkramfs"
SUFFIX = ".conf"
_LINE = re.compile(r"\s*(?P<key>[A-Za-z_]+)\s*=\s*(?P<value>.*?)\s*")
_UUID = re.compile(r"[0-9a-f]{32}")
_REMEDY = "write `ram = PATH` and `uuid = UUID`, or remove it and `pkramctl machine create --ram PATH` writes it again"


@dataclass(frozen=True)
class Conf:
    """The content of the file: the words that name memory (backing.parse), and the machine's UUID."""

    ram: str
    uuid: str


def files(place: str) -> list[str]:
    """Return the names of the files in a directory that may name memory, none if there is no such directory."""
    try:
        return [name for name in os.listdir(place) if name.endswith(SUFFIX) and name != SUFFIX]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MachineError(f"cannot read {explain(error)}") from None


def read(path: str) -> Conf | None:
    """Read a file; return None if it is missing, raise DamagedError if its content is invalid."""
    try:
        data = read_file(path, 1 << 16)
    except OSError as error:
        raise MachineError(f"cannot read {explain(error)}") from None
    if data is None:
        return None
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "surrogateescape").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or match["key"] not in Conf.__dataclass_fields__:
            raise DamagedError(path, f"line {number} is {line.strip()!r}", _REMEDY)
        found[match["key"]] = match["value"]
    if missing := [key for key in Conf.__dataclass_fields__ if not found.get(key)]:
        raise DamagedError(path, f"{missing[0]} is missing", _REMEDY)
    uuid = found["uuid"].replace("-", "").lower()
    if not _UUID.fullmatch(uuid):
        raise DamagedError(path, f"uuid is {found['uuid']!r}", _REMEDY)
    return Conf(found["ram"], uuid)


def write(path: str, conf: Conf) -> None:
    """Write a file, and the directory in which it lies."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make {explain(error)}") from None
    text = "# The memory of a pkramfs machine, written by pkramctl machine create; see pkramfs-real(7).\n"
    replace_file(path, f"{text}ram = {conf.ram}\nuuid = {conf.uuid}\n")
