# SPDX-License-Identifier: GPL-2.0-or-later
"""The net below request handlers: every exception becomes an errno, because nothing else may reach pyfuse3.

    OSError           its errno
    ENOSPC            tried once more, after the kernel has forgotten deleted inodes (see operations)
    MemoryError       ENOMEM, and the tree may not grow until there is more memory (memory.py)
    anything else     EIO, with the traceback in the daemon's log; the mount goes on

In every case the changes of the handler are committed before pyfuse3 answers the kernel.

Kernel: fs/fuse/dev.c (fuse_dev_do_write, which takes an errno from 0 to 511)
"""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pyfuse3 import FUSEError

from pkramfs.fs.tree import Tree
from pkramfs.fuse.memory import Spare

log = logging.getLogger(__name__)


class Forgetful(Protocol):
    """An object that can wait until the kernel has forgotten deleted inodes."""

    spare: Spare
    tree: Tree

    def may_forget(self) -> bool: ...

    async def wait_for_room(self) -> None: ...


H = TypeVar("H", bound=Forgetful)
P = ParamSpec("P")
T = TypeVar("T")


def request(
    handler: Callable[Concatenate[H, P], T],
) -> Callable[Concatenate[H, P], Coroutine[Any, Any, T]]:
    """Make a request handler of a function that raises OSError."""

    @functools.wraps(handler)
    async def answer(self: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return handler(self, *args)  # type: ignore[call-arg]  # pyfuse3 names nothing
        except FUSEError:
            raise
        except MemoryError as error:
            self.spare.let_go()
            raise FUSEError(told(error)) from None
        except OSError as error:
            if error.errno != errno.ENOSPC or not self.may_forget():
                raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s%r failed", handler.__name__, _brief(args))
            raise FUSEError(errno.EIO) from None
        finally:
            commit(self)
        await self.wait_for_room()
        return await answer(self, *args)  # type: ignore[call-arg]

    return answer


def waiting(
    handler: Callable[Concatenate[H, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[H, P], Coroutine[Any, Any, T]]:
    """Make a request handler of a coroutine that calls handlers that do not wait."""

    @functools.wraps(handler)
    async def answer(self: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except MemoryError as error:
            self.spare.let_go()
            raise FUSEError(told(error)) from None
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except Exception:
            log.exception("%s%r failed", handler.__name__, _brief(args))
            raise FUSEError(errno.EIO) from None

    return answer


def commit(operations: Forgetful) -> None:
    """Commit the changes of a handler; raise FUSEError if that fails."""
    try:
        operations.tree.commit()
        operations.tree.tell()
    except (OSError, MemoryError) as error:
        if code := commit_again(operations, error):
            raise FUSEError(code) from None


def commit_again(operations: Forgetful, error: OSError | MemoryError, number: int = 0) -> int:
    """Commit once more if memory was short, with the spare memory; return 0, or the errno if that fails, too.

    Changes that are not committed stay noted, for the next commit.
    """
    if isinstance(error, MemoryError):
        operations.spare.let_go()
        try:
            operations.tree.commit(number)
        except (OSError, MemoryError) as again:
            error = again
        else:
            return 0
    log.error("a change is not in the journal: %s", os.strerror(told(error)))
    return told(error)


def told(error: Exception) -> int:
    """Return the errno for an exception of a handler."""
    return errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None) or errno.EIO


def _brief(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments for the log, without file content."""
    return tuple(f"<{len(arg)} bytes>" if isinstance(arg, bytes) and len(arg) > 255 else arg for arg in args)
