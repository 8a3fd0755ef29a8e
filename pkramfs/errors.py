# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of errors; each class has its exit status.

    PkramfsError                  exit 1   anything below
    ├─ UsageError                      2   the command line or a mount option is wrong
    ├─ FormatError                     3   a record in memory is damaged: page, record, field, found, expected
    │   ├─ VersionError                    written by another format or layout version
    │   └─ StaleError                      a super block that a later kernel has consumed
    ├─ ExhaustedError (OSError)        4   no pages left, or no room behind RAM; errno ENOMEM or ENOSPC
    ├─ ConflictError (OSError)         5   a kexec segment would overwrite preserved pages; EADDRNOTAVAIL
    ├─ NotPreservedError               6   a kexec would lose a tree, or a node
    ├─ DaemonError                     7   a mount daemon did not answer, or died
    ├─ MachineError                    8   the machine's directory cannot be used as it is
    │   └─ DamagedError                    a file of it is damaged: file, field, found, expected
    └─ PkramError (OSError)            9   an error of the PKRAM core: EEXIST, ENOENT, EBUSY, ENODEV, …

A message is one line for people: the fault, the place, and the remedy. Chapters raise these or
built-in OSErrors; only `fuse` turns them into FUSEError and only `cli` into exit statuses.
mount.pkramfs returns the statuses of mount(8) instead (1 usage, 2 system, 32 failure).

Kernel: include/uapi/asm-generic/errno-base.h
"""

import errno
import os


class PkramfsError(Exception):
    """An error that pkramfs reports to its user in one line."""

    exit_status = 1


class UsageError(PkramfsError):
    """The command line or a mount option is wrong."""

    exit_status = 2


class FormatError(PkramfsError):
    """A record in RAM is damaged.

    `pfn` is the page (None if it is not one page), `record` and `field` name the place as `format.py`
    does, `found` and `expected` are for people. A caller that knows a way out sets `remedy`.
    """

    exit_status = 3
    remedy = ""

    def __init__(
        self, record: str, field: str, *, pfn: int | None = None, found: object = None, expected: object = None
    ) -> None:
        self.record, self.field, self.pfn = record, field, pfn
        self.found, self.expected = found, expected
        where = f"{record} at pfn {pfn:x}" if pfn is not None else record
        super().__init__(f"{where}: {field} is {found}, expected {expected}")

    def __str__(self) -> str:
        return super().__str__() + (f"; {self.remedy}" if self.remedy else "")


class VersionError(FormatError):
    """A record has another format or layout version."""


class StaleError(FormatError):
    """A later kernel has consumed the super block."""


class ErrnoError(PkramfsError, OSError):
    """A PkramfsError that carries an errno, so that `except OSError` sees it too."""

    default_errno = errno.EIO

    def __init__(self, message: str, code: int | None = None) -> None:
        OSError.__init__(self, self.default_errno if code is None else code, message)

    def __str__(self) -> str:
        return str(self.strerror)


class ExhaustedError(ErrnoError):
    """No pages are left, or the host has no room behind RAM."""

    exit_status = 4
    default_errno = errno.ENOSPC


class ConflictError(ErrnoError):
    """A kexec segment would overwrite preserved pages; `conflicts` lists them for people."""

    exit_status = 5
    default_errno = errno.EADDRNOTAVAIL

    def __init__(self, message: str, conflicts: list[str] | None = None) -> None:
        super().__init__(message)
        self.conflicts = conflicts or []


class NotPreservedError(PkramfsError):
    """A kexec would lose a tree, or a node."""

    exit_status = 6


class DaemonError(PkramfsError):
    """A mount daemon did not answer, or died."""

    exit_status = 7


class MachineError(PkramfsError):
    """The machine's directory cannot be used as it is."""

    exit_status = 8


class DamagedError(MachineError):
    """A file of the machine's directory is damaged; `remedy` says what to do."""

    def __init__(
        self, path: str, what: str, remedy: str, *, field: str = "", found: str = "", expected: str = ""
    ) -> None:
        self.path, self.field, self.found, self.expected, self.remedy = path, field, found, expected, remedy
        super().__init__(f"{path} is damaged: {what}" + (f"; {remedy}" if remedy else ""))


class PkramError(ErrnoError):
    """An error of the PKRAM core, with the errno that the kernel's function would return."""

    exit_status = 9


def explain(error: OSError) -> str:
    """Return one line for an OSError without a message of its own: `/mnt/x: No such file or directory`."""
    if isinstance(error, PkramfsError):
        return str(error)
    text = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    path = error.filename2 or error.filename  # of two, as link(2) and rename(2) have, the one that was to be made
    return f"{os.fsdecode(path)}: {text}" if path else text


def of_memory(error: BaseException) -> bool:
    """Return True if memory was short, whatever else went wrong then."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(of_memory, error.exceptions))
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
