# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a node that is being read is still preserved, asked after each piece.

    read a piece ──▶ is the node still published? ──yes──▶ the piece is the preserved one
                                          └─no───▶ ChangedError: its mount took it back, or it was freed

A withdrawal marks the node's page before anything that the node names may change, and a page that is used again has
another checksum. So two loads tell, and no reader has to keep a mount from its tree.

Kernel: include/linux/seqlock.h (read_seqretry)
"""

import errno

from pkramfs.errors import PkramError
from pkramfs.machine.ram import Ram
from pkramfs.pkram.format import NODE_MAGIC
from pkramfs.pkram.node import Node, shown
from pkramfs.units import PAGE_SHIFT


class ChangedError(PkramError):
    """The node was withdrawn while it was read; the last piece may contain anything."""

    default_errno = errno.ESTALE


class Standing:
    """One node at the moment at which it was opened."""

    def __init__(self, ram: Ram, node: Node) -> None:
        self._ram, self._name = ram, node.name
        self._magic = node.pfn << PAGE_SHIFT
        self._sum = ram.load(self._magic + 8)

    def expect(self) -> None:
        """Raise ChangedError unless the node is still published as it was."""
        if self._ram.load(self._magic) != NODE_MAGIC or self._ram.load(self._magic + 8) != self._sum:
            raise ChangedError(
                f"{shown(self._name)} is no longer preserved as it was: it was changed, freed or written anew while it "
                "was read; preserve it (`mount -o remount,preserve,ro`) and try again"
            )
