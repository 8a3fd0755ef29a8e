# SPDX-License-Identifier: GPL-2.0-or-later
"""The conventions of mount(8) for a mount helper: its name, its exit statuses, and errors that carry them.

Kernel: util-linux, mount(8), EXIT STATUS and EXTERNAL HELPERS
"""

from pkramfs.errors import PkramfsError, UsageError, explain

PROGRAM = "mount.pkramfs"
USAGE, SYSTEM, FAILURE = 1, 2, 32


class MountError(PkramfsError):
    """The mount failed. Carries mount(8)'s exit status for it."""

    exit_status = FAILURE


class AnsweredError(MountError):
    """The daemon said why it did not start, and has logged it."""


def failure(error: Exception) -> MountError:
    """Return an error as a MountError with mount(8)'s exit status for it."""
    failed = MountError(explain(error) if isinstance(error, OSError) else str(error))
    if isinstance(error, UsageError):
        failed.exit_status = USAGE
    elif isinstance(error, OSError) and not isinstance(error, PkramfsError):
        failed.exit_status = SYSTEM
    elif isinstance(error, MountError):
        failed.exit_status = error.exit_status
    return failed
