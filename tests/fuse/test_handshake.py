# SPDX-License-Identifier: GPL-2.0-or-later
"""INIT on a socket instead of /dev/fuse: what we ask for, and what libfuse is told."""

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from pkramfs.errors import MachineError
from pkramfs.fuse import handshake as h

EVERYTHING = (1 << 32) - 1


def _kernel_init(flags: int = EVERYTHING, opcode: int = h.FUSE_INIT, major: int = 7) -> bytes:
    body = struct.pack("<IIII", major, 45, 131072, flags) + bytes(48)
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, 2, 0, 0, 0, 0, 0, 0) + body


@pytest.fixture
def device() -> Iterator[tuple[int, socket.socket]]:
    """(our end, the kernel's end)"""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel:
        yield ours.detach(), kernel


def test_sizes_are_the_kernels() -> None:
    init = h.Init(2, 45, 131072, EVERYTHING)
    assert len(h.answer(init)) == 16 + 64
    assert len(h.request(init)) == 40 + 64


def test_what_is_chosen() -> None:
    handle_killpriv = 1 << 19  # never: with it the kernel would say nothing when set-id bits are to go
    assert h.choose(EVERYTHING) & h.HANDLE_KILLPRIV_V2 and not h.choose(EVERYTHING) & handle_killpriv
    old = EVERYTHING & ~h.HANDLE_KILLPRIV_V2
    assert not h.choose(old) & (handle_killpriv | h.HANDLE_KILLPRIV_V2)
    assert h.choose(h.NEEDED) == h.NEEDED  # nothing that was not offered
    async_dio = 1 << 15  # never: nobody would drop what was cached while such a write was under way
    assert not h.choose(EVERYTHING) & async_dio


def test_a_whole_handshake(device: tuple[int, socket.socket]) -> None:
    ours, kernel = device
    kernel.send(_kernel_init())
    shake = h.Handshake(ours)
    length, error, unique, major, minor, readahead, flags = struct.unpack_from("<IiQIIII", kernel.recv(4096))
    assert (length, error, unique, major, minor, readahead) == (80, 0, 2, 7, h.MINOR, 131072)
    assert flags == h.choose(EVERYTHING)
    told = os.read(shake.fd, 4096)
    opcode, told_flags = struct.unpack_from("<I", told, 4)[0], struct.unpack_from("<I", told, 52)[0]
    assert opcode == h.FUSE_INIT and told_flags == EVERYTHING & ~h.INIT_EXT
    shake.complete()
    kernel.send(b"the first request")
    assert os.read(shake.fd, 4096) == b"the first request"
    os.write(shake.fd, b"an answer")
    assert kernel.recv(4096) == b"an answer"
    os.close(shake.fd)
    assert kernel.recv(4096) == b""  # nobody else holds the connection


@pytest.mark.parametrize("bad", [{"opcode": 1}, {"major": 8}, {"flags": 0}])
def test_a_kernel_that_is_too_strange(device: tuple[int, socket.socket], bad: dict[str, int]) -> None:
    ours, kernel = device
    kernel.send(_kernel_init(**bad))
    with pytest.raises(MachineError):
        h.read_init(ours)
    os.close(ours)
