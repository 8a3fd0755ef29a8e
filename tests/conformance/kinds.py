# SPDX-License-Identifier: GPL-2.0-or-later
"""One of every kind of thing that a name can mean."""

import os
import socket
import stat

KINDS = ("none", "file", "dir", "full", "link", "dangling", "fifo", "socket")
"""`full` is a directory that is not empty; `link` points to a file, `dangling` to nothing."""
DEVICES = ("chr", "blk") if os.geteuid() == 0 else ()


def make(kind: str, name: str) -> None:
    """Make it; unlike the calls of a case this is not recorded."""
    match kind:
        case "none":
            pass
        case "file":
            write(name, f"content of {name}".encode())
        case "dir":
            os.mkdir(name)
        case "full":
            os.mkdir(name)
            write(f"{name}/inner", b"x")
            os.mkdir(f"{name}/sub")
        case "link":
            write(f"{name}.target", b"target")
            os.symlink(f"{os.path.basename(name)}.target", name)
        case "dangling":
            os.symlink("nowhere", name)
        case "fifo":
            os.mkfifo(name)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
        case "chr":
            os.mknod(name, stat.S_IFCHR | 0o644, os.makedev(1, 3))
        case "blk":
            os.mknod(name, stat.S_IFBLK | 0o600, os.makedev(240, 77))
        case "loop":
            os.symlink(name, name)


def write(name: str | bytes, content: bytes = b"", mode: int | None = None) -> None:
    with open(name, "wb") as file:
        file.write(content)
    if mode is not None:
        os.chmod(name, mode)
