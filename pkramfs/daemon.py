# SPDX-License-Identifier: GPL-2.0-or-later
"""One mount, from its start to its end: the only place that builds everything.

    mount.pkramfs ──starts──▶ python -m pkramfs mount-daemon FD DIR OPTIONS [GO]

    import all this, wait for GO ◀── "go"              until then it looks at nothing: it may be prestarted
    attach the machine (first use boots it)            nobody may kexec until we serve
    claim the NAME and a tree id                       the id of its node, or a new one
    restore the tree from its node, or make a new one
    mount(2), listen, answer ──▶ FD: "serving"         or the reason why not, as one line
    … until umount, stop or SIGTERM
    a preserved tree keeps its node and its memory; a live one is freed, as tmpfs does

A save that runs when the last user leaves is completed first. A mount waits for a daemon of the same NAME that
is about to end. The output of this process goes to mounts/ID.log.

Kernel: fs/super.c (get_tree_nodev), fs/namespace.c, mm/shmem.c (shmem_fill_super, shmem_put_super)
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import trio

from pkramfs import stdio
from pkramfs.control.keeper import Keeper, drive
from pkramfs.control.server import Server
from pkramfs.control.settings import Settings, Words
from pkramfs.errors import MachineError, PkramfsError, UsageError, explain, of_memory
from pkramfs.fs import collector
from pkramfs.fs.limits import Limits
from pkramfs.fs.restore import restore
from pkramfs.fs.tree import Tree
from pkramfs.fuse.flags import MountFlags
from pkramfs.fuse.operations import Operations
from pkramfs.fuse.session import Session
from pkramfs.kernel import crash
from pkramfs.kernel.running import Running, shared
from pkramfs.machine import locks, process
from pkramfs.machine.cgroups import MemoryGroups
from pkramfs.machine.directory import Machine, host_memory
from pkramfs.machine.files import open_regular
from pkramfs.machine.frames import Frames
from pkramfs.machine.leases import new_tree_id
from pkramfs.machine.mounts import MountEntry, MountLock
from pkramfs.machine.policy import Policy
from pkramfs.mounting import syscalls
from pkramfs.mounting.names import node_name
from pkramfs.mounting.options import NO_SOURCE, Options, parse
from pkramfs.mounting.starting import ANYTHING, Expected, Reporter, wait_for_go
from pkramfs.text import printable
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE, format_size, plural

log = logging.getLogger("pkramfs")

GOING_SECONDS = 30.0
"""How long a mount waits for a daemon of the same NAME that is unmounted but has not ended."""
READY_SECONDS = 30.0
LINGER_SECONDS = 2.0
"""How long SIGTERM waits, after unmounting, for a mount that has users elsewhere."""
_POLL_SECONDS = 0.02


class AlreadyMounted(Exception):
    """The same NAME is mounted on the same directory already."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon of one mount: FD for the answer, mount point, options, FD to read GO from."""
    stdio.hold()
    fd, mountpoint, text, *go = sys.argv[1:] if argv is None else argv
    expected = wait_for_go(int(go[0])) if go else ANYTHING
    if expected is None:
        return 0
    reporter = Reporter(int(fd))
    _begin_log()
    try:
        Daemon(parse(text), mountpoint, reporter, expected).run()
    except AlreadyMounted as found:
        reporter.serving(str(found))
    except (PkramfsError, OSError) as error:
        reason = explain(error) if isinstance(error, OSError) else str(error)
        log.error("%s", reason)
        _say(text, f"pkramfs: {mountpoint} was not mounted: {reason}")
        reporter.failed(reason, error.exit_status if isinstance(error, UsageError) else 0)
        return 1
    except BaseException as error:
        log.exception("the daemon ends")
        reporter.failed(f"internal error: {type(error).__name__}: {error}; please report it")
        return 1
    return 0


def _say(options: str, message: str) -> None:
    """Write a line to the kernel log, if the options name a machine."""
    try:
        Machine.locate(parse(options).machine).log(message)
    except PkramfsError as error:
        log.warning("no line in the kernel log: %s", error)  # options that name no machine


class _OneLine(logging.Formatter):
    """A formatter that makes a record one line, below which nothing looks like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


def _begin_log() -> None:
    """Log to stderr, which `_log_to` later makes a file."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class Daemon:
    """One mount. `run` returns when it is over."""

    def __init__(self, options: Options, mountpoint: str, reporter: Reporter, expected: Expected = ANYTHING) -> None:
        self.options, self.mountpoint, self.reporter, self.expected = options, mountpoint, reporter, expected
        self.machine = Machine.locate(options.machine)
        self._starting = ExitStack()
        self._restored = False
        self._words = options.lasting()

    def run(self) -> None:
        """Build, serve, take down."""
        process.set_oom_score_adj(self.options.oom_score_adj)
        process.require(self.machine.hardware().size if self.machine.exists() else host_memory())
        crash.notice(self.machine)
        with self._starting:
            self.kernel = self._attach()
            lock = self._claim()
            try:
                self._run_claimed(lock)
            finally:
                lock.release()

    def _run_claimed(self, lock: MountLock) -> None:
        self.lock = lock
        _log_to(lock.path("log"))
        faulthandler.enable()  # an abort or a fault leaves its name in the log: panic_on_oops (kernel/crash.py)
        self.frames = Frames(self.kernel.ram, self.kernel.leases, lock.tree_id, self._policy(self.options.mpol))
        try:
            self.kernel.sweep()
            _run(self._serve_or_end)
        finally:
            self._over()

    def _over(self) -> None:
        """Free the memory of a live tree, and log the end of the mount."""
        tree = getattr(self, "tree", None)
        kept = self._restored if tree is None else tree.preserved
        if not kept:
            self.frames.release_all()
        name, fate = self.options.name or self.mountpoint, "preserved" if kept else "freed"
        self.machine.log(f"pkramfs: {name} unmounted, its tree is {fate}")
        _drop_empty(self.lock.path("log"))

    def _policy(self, mpol: str | None) -> Policy | None:
        return Policy.parse(mpol, self.machine.hardware())

    # -- the start ------------------------------------------------------------------------------

    def _attach(self) -> Running:
        """Attach to the running kernel until the mount serves; wait for a daemon of the same NAME that is ending."""
        deadline = time.monotonic() + GOING_SECONDS
        while True:
            kernel = self._starting.enter_context(shared(self.machine))
            holder = self._holder()
            if holder is None:
                return kernel
            self._refuse_mounted(holder)
            self._starting.close()  # a kexec may be what it is waiting for
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{holder.name} was mounted on {holder.mountpoint} and its daemon (pid {holder.pid}) has not ended "
                    "yet: end the programs that use it, or the daemon"
                )
            time.sleep(_POLL_SECONDS)

    def _holder(self) -> MountEntry | None:
        """Return the living mount that has our NAME."""
        if self.options.name is None:
            return None
        return next((e for e in self.machine.mounts() if e.alive and e.name == self.options.name), None)

    def _refuse_mounted(self, holder: MountEntry) -> None:
        """Raise MachineError if the NAME is mounted elsewhere, AlreadyMounted if it is mounted just here."""
        places, whose = _places(holder)
        if not places:
            return  # unmounted, or about to be mounted
        if not whose and self.mountpoint in places and self.expected.tree in (None, holder.tree_id):
            raise AlreadyMounted(f"{holder.name} is already mounted on {self.mountpoint}")
        raise MachineError(
            f"{holder.name} is mounted on {' and '.join(places)}{whose} already: a name has one mount at a time"
        )

    def _claim(self) -> MountLock:
        """Take the tree id of the NAME's node, or a new one, so that nobody else takes the NAME."""
        with locks.held(self.machine.path("lock.names"), what=f"taking a name on the machine {self.machine.path()}"):
            holder = self._holder()
            if holder is not None:
                raise MachineError(f"{holder.name} is just being mounted on {holder.mountpoint} (pid {holder.pid})")
            wanted = self.options.name and self.kernel.info.pkram  # else an ordinary tmpfs, as in a crash kernel
            node = self.kernel.store.find(self.node_name) if wanted else None
            self._restored = node is not None
            if self.expected.tree is not None and (node is None or node.tree_id != self.expected.tree):
                raise MachineError(f"{self.options.name} is no longer preserved, or another tree has that name")
            lock = self.machine.claim(new_tree_id() if node is None else node.tree_id)
            self._log_at = _size(lock.path("log"))
            lock.write_entry(self._entry(None))
        return lock

    @property
    def node_name(self) -> bytes:
        """Return the node that holds the tree while it is preserved."""
        return node_name(self.options.name or "")

    def _entry(self, dev: int | None) -> dict[str, Any]:
        return {
            "name": self.options.name,
            "mountpoint": self.mountpoint,
            "pid": os.getpid(),
            "options": self._words,
            "dev": dev,
            **({"on_dev": self.session.on[0], "on_ino": self.session.on[1]} if dev and self.session.on else {}),
            "restored": self._restored,
            "log_at": self._log_at,
        }

    async def _build(self) -> Tree:
        options, ram = self.options, self.kernel.ram
        limits = Limits(*options.limits(self.machine.hardware().pages << PAGE_SHIFT))
        if self._restored:
            return await drive(restore(self.kernel.store, self.node_name, ram, self.frames, limits))
        return Tree(
            ram,
            self.frames,
            limits,
            root_mode=0o1777 if options.mode is None else options.mode,
            uid=os.geteuid() if options.uid is None else options.uid,
            gid=os.getegid() if options.gid is None else options.gid,
        )

    # -- the life -------------------------------------------------------------------------------

    async def _serve_or_end(self) -> None:
        """Serve. When memory was short in trio itself it may never come back from its end: then the process ends."""
        try:
            await self._serve()
        except BaseException as error:
            if not of_memory(error) or not hasattr(self, "session"):
                raise
            with ExitStack() as ending:
                ending.callback(os._exit, 1)
                log.critical("the daemon ends: it may have no more memory (see prlimit --as)", exc_info=error)
                self._over()
                self.lock.release()

    async def _serve(self) -> None:
        with collector.paused():
            self.tree = tree = await self._build()
        collector.settle()
        tree.huge = self.options.huge or tree.huge
        if self.options.name is not None:
            tree.hold_for_save()  # a full RAM must not prevent preserving
        self._expect_room()
        operations = Operations(tree, _generation(self.lock.tree_id))
        operations.room = self.frames.room
        self.keeper = keeper = Keeper(
            tree,
            self.kernel.store,
            name=self.options.name,
            mountpoint=self.mountpoint,
            strict=self.options.strict,
            say=self.machine.log,
            banned=self.kernel.banned,
            settings=Settings(tree, self._words, policy=self._policy, changed=self._reconfigured),
        )
        operations.writer_gone, operations.data_lost = keeper.writer_gone, keeper.data_lost
        server = Server(self.lock.path("sock"), keeper.verbs(), keeper.undo())
        self.session = session = Session(
            operations,
            self.mountpoint,
            self.options.source or NO_SOURCE,
            dirty=MemoryGroups().dirty(),
            filtered=self.options.fuse != "pyfuse3",
        )
        if not syscalls.serve_writers():
            log.info("not an IO flusher: no CAP_SYS_RESOURCE, or a kernel before 5.6")
        session.mount(self.options.flags(), allow_other="allow_other" in self.options.words, on=self.expected.on)
        if session.dev is not None:
            tree.access = MountFlags(session.dev, self.mountpoint)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.serve)
                nursery.start_soon(self._announce)
                nursery.start_soon(keeper.watch_losses)
                nursery.start_soon(self._end_on_signal)
                nursery.start_soon(self._end_on_request, server)
                await session.serve()
                await server.idle()  # a save completes, and its command is told
                await keeper.settled()
                nursery.cancel_scope.cancel()
        finally:
            session.close()

    async def _announce(self) -> None:
        """Report that the mount is served, once the kernel has answered."""
        with trio.move_on_after(READY_SECONDS) as waiting:
            await self.session.ready.wait()
        if waiting.cancelled_caught:
            syscalls.detach_all(self.session.dev)
            raise MachineError(f"the kernel did not answer the mount of {self.mountpoint}")
        self.lock.write_entry(self._entry(self.session.dev))
        self.machine.log(f"pkramfs: {self.options.name or 'a tree'} mounted on {self.mountpoint}{self._what()}")
        self._starting.close()
        said = [line for line in (self._off().removeprefix(": "), self._scarce()) if line]
        self.reporter.serving("\n".join(f"{self.options.name or self.mountpoint}: {line}" for line in said))

    def _reconfigured(self, said: Words) -> None:
        """Write changed options to the entry, from which the tree is mounted again; a full host does not undo them."""
        try:
            self.lock.write_entry(self._entry(self.session.dev))
        except MachineError as error:
            words = ",".join(word if value is True else f"{word}={value}" for word, value in said.items())
            self.machine.log(
                f"pkramfs: a kexec will not know that {self.mountpoint} was remounted with {words}: {error}"
            )
        if "huge" in said:
            self.session.operations.drop_attributes()  # st_blksize is another

    def _expect_room(self) -> None:
        """Raise ExhaustedError if nothing could be written; a restored tree can at least be read."""
        if not self._restored:
            self.kernel.ram.check_room(PAGE_SIZE)

    def _scarce(self) -> str:
        """Return a notice if size= is more than the host can ever back."""
        size, most = self.tree.limits.max_pages << PAGE_SHIFT, self.kernel.ram.most
        if size <= most:
            return ""
        return (
            f"size={format_size(size)} is more than can be had: the file system behind RAM, or the memory cgroup, has "
            f"{format_size(most)}"
        )

    def _off(self) -> str:
        """Return the notice for a `pkram=NAME` mount when PKRAM is off and only a plain tmpfs is possible."""
        if not self.options.name or self.kernel.info.pkram:
            return ""
        kind = "this is a crash kernel" if self.kernel.info.crash else "pkram=off"
        return f": PKRAM is off in this kernel ({kind}): nothing of it can be preserved"

    def _what(self) -> str:
        if self._off():
            return self._off()
        if not self._restored:
            return ""
        counts = self.tree.counts()
        return f" (restored {plural(counts.files, 'file')}, {format_size(counts.pages << PAGE_SHIFT)})"

    # -- the end --------------------------------------------------------------------------------

    async def _end_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                log.info("signal %d: unmounting", number)
                await self._unmount()
                return

    async def _unmount(self) -> None:
        """Flush and unmount; detach what is still in use, which then gets ENOTCONN."""
        try:
            await _in_thread(partial(syscalls.detach_all, self.session.dev, lazy=False))
            # Now the session ends, and this task with it, unless the mount is used in another mount namespace.
            await trio.sleep(LINGER_SECONDS)
        except OSError as error:
            log.info("%s", explain(error))
            await self._flush()
        await self._leave()

    async def _flush(self) -> None:
        """Have the kernel send what is dirty, through a place where the mount can still be reached."""
        for place in syscalls.places(self.session.dev)[:1]:
            try:
                await _in_thread(partial(syscalls.syncfs, place, self.session.dev))
            except OSError as error:
                log.warning("not all was written back: %s", explain(error))

    async def _end_on_request(self, server: Server) -> None:
        await self.keeper.stopping.wait()
        await server.idle()
        await self._leave()

    async def _leave(self) -> None:
        """Detach now, even if the mount is in use."""
        try:
            await _in_thread(partial(syscalls.detach_all, self.session.dev))
        except OSError as error:
            log.warning("cannot detach: %s", explain(error))
        await self.session.operations.cache.close()
        self.session.terminate()


def _generation(tree_id: int) -> int:
    """Return 32 bits that tell file handles of one tree from those of another, and stay the same over a kexec."""
    return (tree_id ^ tree_id >> 32) & 0xFFFF_FFFF


def _places(holder: MountEntry) -> tuple[list[str], str]:
    """Return where a living daemon's tree is mounted, and whose mount namespace that is in if it is not ours."""
    found = [one.mountpoint for one in syscalls.mounts() if one.dev == holder.dev]
    if found:
        return found, ""
    try:
        there = syscalls.mounts(holder.pid)
    except OSError:
        return [], ""  # it has ended, or is not ours to look at
    return [one.mountpoint for one in there if one.dev == holder.dev], f" in the mount namespace of pid {holder.pid}"


async def _in_thread(work: Callable[[], None]) -> None:
    """Run a call that may wait for our own mount in a thread, so that we can answer meanwhile."""
    await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def _run(function: Callable[[], Awaitable[None]]) -> None:
    """Run under trio; of several exceptions raise the first, from which the others follow."""
    try:
        trio.run(function)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _log_to(path: str) -> None:
    """Send the output of this process to a file, or nowhere if the file cannot be opened."""
    try:
        fd = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        log.warning("no log of this mount: %s", explain(error))
        return
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _size(path: str) -> int:
    """Return the size of a log, which a former daemon of the tree id may have begun."""
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError:
        return 0  # there is none


def _drop_empty(path: str) -> None:
    """Remove an empty log."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            os.unlink(path)
