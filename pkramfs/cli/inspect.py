"""pkramctl inspect: a record that crosses a kexec, field by field, as it lies in memory."""

import argparse

KINDS = ("superblock", "node", "object", "link", "pagetable", "regions")


def act(args: argparse.Namespace) -> int:
    """pkramctl inspect WHAT [PFN]."""
    raise NotImplementedError


def act_format(args: argparse.Namespace) -> None:
    """pkramctl format."""
    raise NotImplementedError
