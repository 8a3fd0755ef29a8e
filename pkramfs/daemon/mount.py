# SPDX-License-Identifier: GPL-2.0-or-later
"""One mount, from its start to its end: the only place that builds everything.

    mount.pkramfs ──starts──▶ python -m pkramfs mount-daemon FD DIR OPTIONS [GO]

    import all this, wait for GO ◀── "go"              until then it reads nothing: it may be started early
    attach the machine (first use boots it)            no kexec is possible until it serves
    claim the NAME and a tree id                       the id of its node, or a new one
    restore the tree from its node, or make a new one
    mount(2), listen, answer ──▶ FD: "serving"         or the reason why not, as one line
    … until umount, stop or SIGTERM
    a preserved tree keeps its node and its memory; a live one is freed, as tmpfs does

A save that runs when the last user leaves is completed first. A mount waits for a daemon of the same NAME that
is about to end. The output of this process goes to mounts/ID.log.

Kernel: fs/super.c (get_tree_nodev), fs/namespace.c, mm/shmem.c (shmem_fill_super, shmem_put_super)
"""

import faulthandler
import logging
import os
import signal
from contextlib import ExitStack
from functools import partial
from typing import Any

import trio

from pkramfs.control.keeper import Keeper, drive
from pkramfs.control.server import Server
from pkramfs.control.settings import Settings, Words
from pkramfs.daemon import notices
from pkramfs.daemon.claim import Claimed, Claiming, Origin
from pkramfs.daemon.crossing import Passage, read_users
from pkramfs.daemon.holding import Holding
from pkramfs.daemon.job import LASTING, Held
from pkramfs.daemon.mountlog import drop_empty, log_to
from pkramfs.daemon.shadow import Checkpoints
from pkramfs.daemon.standby import Standing
from pkramfs.daemon.summing import Background
from pkramfs.daemon.tasks import flush, in_thread, run
from pkramfs.errors import MachineError, explain, of_memory
from pkramfs.fs import collector
from pkramfs.fs.handles import reopen, unshelter
from pkramfs.fs.limits import Limits
from pkramfs.fs.recover import Rebuilt, begin, recover
from pkramfs.fs.restore import restore
from pkramfs.fs.tree import Tree
from pkramfs.fuse.again import resume
from pkramfs.fuse.flags import MountFlags
from pkramfs.fuse.handshake import Init
from pkramfs.fuse.operations import Operations
from pkramfs.fuse.session import Session
from pkramfs.kernel import crash
from pkramfs.machine import process
from pkramfs.machine.cgroups import MemoryGroups
from pkramfs.machine.directory import Machine, host_memory
from pkramfs.machine.frames import Frames
from pkramfs.machine.mounts import MountLock
from pkramfs.machine.policy import Policy
from pkramfs.mounting import syscalls
from pkramfs.mounting.names import node_name
from pkramfs.mounting.options import NO_SOURCE, Options
from pkramfs.mounting.starting import ANYTHING, Expected, Reporter
from pkramfs.units import PAGE_SHIFT, PAGE_SIZE

log = logging.getLogger("pkramfs")

_NODES = (Origin.NODE, Origin.KEXEC)
READY_SECONDS = 30.0
WELL_SECONDS = 0.2
"""How long the requests that a dead daemon has left may take."""
LINGER_SECONDS = 2.0
"""How long SIGTERM waits, after unmounting, for a mount that has users elsewhere."""


class Daemon:
    """One mount. `run` returns when it is over."""

    def __init__(self, options: Options, mountpoint: str, reporter: Reporter, expected: Expected = ANYTHING) -> None:
        self.options, self.mountpoint, self.reporter, self.expected = options, mountpoint, reporter, expected
        self.machine = Machine.locate(options.machine)
        self._starting = ExitStack()
        self._words = options.lasting()
        self._live: int | None = None
        """The live page of the tree's log."""
        self._served = self._ended = False
        self.holding: Holding | None = None
        self.held: Held | None = None
        self._stood_by = False
        self.standing: Standing | None = None
        """What this process has of the tree already, if it stood by."""
        self.checkpoints: Checkpoints | None = None

    def run(self) -> None:
        """Build, serve, take down."""
        process.set_oom_score_adj(self.options.oom_score_adj)
        process.require(self.machine.hardware().size if self.machine.exists() else host_memory())
        if self.held is None:
            crash.notice(self.machine)
        with self._starting:
            claiming = Claiming(self.machine, self.options, self.mountpoint, self.expected)
            if self.held is None:
                self.kernel = claiming.attach(self._starting)
                self.claimed = claiming.claim(self.kernel, self._entry)
            else:
                self.kernel = claiming.attach_again(self._starting)
                if self.standing is not None and self.kernel.generation == self.standing.kernel.generation:
                    self.kernel = self.standing.kernel
                self.claimed = claiming.inherit(self.kernel, self.held.lock, **self.held.facts)
            self._live = self.claimed.live
            try:
                self._run_claimed(self.claimed.lock)
            finally:
                self._let_go()

    def _run_claimed(self, lock: MountLock) -> None:
        self.lock = lock
        log_to(lock.path("log"))
        faulthandler.enable()  # an abort or a fault leaves its name in the log: panic_on_oops (kernel/crash.py)
        self.frames = Frames(self.kernel.ram, self.kernel.leases, lock.tree_id, self._policy(self.options.mpol))
        if self.standing is not None and self.kernel is self.standing.kernel:
            self.frames = self.standing.frames
        try:
            if self.held is None:
                self.kernel.sweep()
            run(self._serve_or_end)
            self._ended = True
        finally:
            self._over()

    @property
    def _outlives(self) -> bool:
        """Return True if the tree shall outlive this process in its log, though no node holds it.

        That is so if the end is not orderly, and the mount was served, or the tree outlived another daemon before.
        """
        recovering = self.claimed.origin in (Origin.LOG, Origin.DAEMON)
        return self._live is not None and not self._ended and (self._served or recovering)

    def _over(self) -> None:
        """Free the memory of a live tree whose mount was ended, and log the end."""
        tree = getattr(self, "tree", None)
        kept = self.claimed.origin in _NODES if tree is None else tree.preserved
        name, fate = self.options.name or self.mountpoint, "preserved" if kept else "freed"
        if self._outlives and not kept:
            self.machine.log(f"pkramfs: the daemon of {name} ends, its tree is in RAM: mount {name} again")
            return
        if not kept:
            self._forget_log()
            self.frames.release_all()
        self.machine.log(f"pkramfs: {name} unmounted, its tree is {fate}")
        drop_empty(self.lock.path("log"))

    def _forget_log(self) -> None:
        """Remove the log from the entry: if this process dies while it frees the tree, nothing is to be recovered."""
        self._live, self.claimed = None, self.claimed._replace(live=None)
        try:
            self._write_entry()
        except MachineError as error:
            log.warning("the entry names a log that is being freed: %s", error)

    def _let_go(self) -> None:
        """Release the tree id, or leave it to the next mount of the NAME."""
        tree = getattr(self, "tree", None)
        if self._outlives and (tree is None or not tree.preserved):
            self.claimed.lock.abandon()
        else:
            self.claimed.lock.release()

    def _policy(self, mpol: str | None) -> Policy | None:
        return Policy.parse(mpol, self.machine.hardware())

    # -- the start ------------------------------------------------------------------------------

    @property
    def node_name(self) -> bytes:
        """Return the node that holds the tree while it is preserved."""
        return node_name(self.options.name or "")

    def _entry(self, claimed: Claimed, dev: int | None = None) -> dict[str, Any]:
        return {
            "name": self.options.name,
            "mountpoint": self.mountpoint,
            "pid": os.getpid(),
            "options": self._words,
            "dev": dev,
            **({"on_dev": self.session.on[0], "on_ino": self.session.on[1]} if dev and self.session.on else {}),
            "restored": claimed.origin in _NODES,
            "log_at": claimed.log_at,
            **({"journal": self._live or claimed.live} if self._live or claimed.live else {}),
            **({"holder": self.holding.pid} if self.holding is not None and self.holding.pid else {}),
        }

    def _write_entry(self) -> None:
        """Write the entry of this mount, by which it is mounted again and its log is found."""
        self.lock.write_entry(self._entry(self.claimed, self.session.dev if self._served else None))

    async def _build(self) -> Tree:
        options, ram = self.options, self.kernel.ram
        limits = Limits(*options.limits(self.machine.hardware().pages << PAGE_SHIFT))
        store, origin = self.kernel.store, self.claimed.origin
        if origin in _NODES:
            return await drive(restore(store, self.node_name, ram, self.frames, limits))
        if self.claimed.live is not None:
            taken = self.node_name if origin is Origin.DAEMON else None
            generation, rebuilt = self.kernel.generation, self._copied(limits)
            return await drive(recover(store, self.claimed.live, ram, self.frames, limits, generation, taken, rebuilt))
        return Tree(
            ram,
            self.frames,
            limits,
            root_mode=0o1777 if options.mode is None else options.mode,
            uid=os.geteuid() if options.uid is None else options.uid,
            gid=os.getegid() if options.gid is None else options.gid,
        )

    def _copied(self, limits: Limits) -> Rebuilt | None:
        """Return the tree of a standby, with the present limits; None if this process was none."""
        if self.standing is None or self.frames is not self.standing.frames:
            return None
        rebuilt = self.standing.taken(limits)
        self._stood_by = rebuilt is not None
        return rebuilt

    # -- the life -------------------------------------------------------------------------------

    async def _serve_or_end(self) -> None:
        """Serve. If memory was short in trio itself it may never return from its end; then the process ends."""
        try:
            await self._serve()
        except BaseException as error:
            if not of_memory(error) or not hasattr(self, "session"):
                raise
            with ExitStack() as ending:
                ending.callback(os._exit, 1)
                log.critical("the daemon ends: it may have no more memory (see prlimit --as)", exc_info=error)
                self._over()
                self._let_go()

    async def _serve(self) -> None:
        with collector.paused():
            self.tree = tree = await self._build()
        collector.settle()
        tree.huge = self.options.huge or tree.huge
        if self.options.name is not None:
            tree.ledger.copies = 2 if self.kernel.info.pkram else 1
            tree.hold_for_save()  # a full RAM must not prevent preserving
            self._begin_journal(tree)
        self.sums = Background(tree, self.mountpoint, self.machine.log)
        self.sums.switch(on=self._verifies)
        if tree.journal is not None:
            self.checkpoints = Checkpoints(tree, self.machine, self.node_name, self.machine.log, self.holding)
        self._expect_room()
        self._prepare(tree)
        if not syscalls.serve_writers():
            log.info("not an IO flusher: no CAP_SYS_RESOURCE, or a kernel before 5.6")
        if self.held is None:
            flags, others = self.options.flags(), "allow_other" in self.options.words
            self.session.mount(flags, allow_other=others, on=self.expected.on)
            self._served = True
            self._be_held()
        else:
            self._take_over(self.held)
        if self.session.dev is not None:
            tree.access = MountFlags(self.session.dev, self.mountpoint)
        try:
            await self._live_on(tree)
        finally:
            self.session.close()

    def _prepare(self, tree: Tree) -> None:
        """Make the objects that serve the kernel and the commands."""
        operations = Operations(tree, _generation(self.lock.tree_id))
        operations.room, operations.cache.write_back = self.frames.room, lambda: flush(self.session.dev)
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
        keeper.summed = self.sums.status
        if self.holding is not None:
            keeper.keeps = self.holding.kept
        keeper.sum_all, keeper.doubt_all = self.sums.sum_all, self.sums.compare
        operations.writer_gone, operations.data_lost = keeper.writer_gone, keeper.data_lost
        self.session = Session(
            operations,
            self.mountpoint,
            self.options.source or NO_SOURCE,
            dirty=MemoryGroups().dirty(),
            filtered=self.options.fuse != "pyfuse3",
        )
        if self.checkpoints is not None:
            self.checkpoints.instead = keeper.log_is_long
        self.passage = Passage(keeper, self.session, self.checkpoints, self.holding, self.held, self.machine.log)
        keeper.outlives = self.passage.outliving

    async def _live_on(self, tree: Tree) -> None:
        """Serve kernel and commands until the mount ends."""
        keeper = self.keeper
        verbs, undo = self.passage.verbs(), keeper.undo() | self.passage.crossing.undo()
        server = Server(self.lock.path("sock"), verbs, undo, patient=self.held is not None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            nursery.start_soon(self._announce)
            nursery.start_soon(keeper.watch_losses)
            nursery.start_soon(keeper.shorten_logs)
            nursery.start_soon(self.sums.serve)
            nursery.start_soon(self._end_on_signal)
            nursery.start_soon(self._end_on_request, server)
            nursery.start_soon(self.passage.make_room_on_request, server)
            nursery.start_soon(self.passage.depart_on_request, server)
            nursery.start_soon(self.passage.arrive)
            nursery.start_soon(self.passage.be_proven)
            if self.holding is not None and self._live is not None:
                nursery.start_soon(self._watch_holder, self.holding)
            if self.held is not None:
                nursery.start_soon(self._be_well)
            if self.checkpoints is not None:
                nursery.start_soon(self.checkpoints.serve)
            await self.session.serve()
            await server.idle()  # a save completes, and its command gets the answer
            await keeper.settled()
            nursery.cancel_scope.cancel()

    @property
    def _verifies(self) -> bool:
        """Return True if data get checksums: those of a tree that can be preserved."""
        return self._words.get("verify") == "data" and self.options.name is not None and self.kernel.info.pkram

    def _be_held(self) -> None:
        """Give the holder all that it needs to start another daemon when this one dies."""
        if self.holding is None or self._live is None:
            return
        facts = {
            "name": self.options.name,
            "tree_id": self.lock.tree_id,
            "generation": self.kernel.generation,
            "live": self._live,
            "log_at": self.claimed.log_at,
            "init": self.session.init,
            "dev": self.session.dev,
            "on": self.session.on,
            **({name: self.held.facts[name] for name in LASTING if name in self.held.facts} if self.held else {}),
        }
        self.holding.hold(self.session.descriptor, self.lock.fileno(), facts)

    def _take_over(self, held: Held) -> None:
        """Take over the mount of a daemon that has died, or that has ended for a kexec."""
        facts, tree = held.facts, self.tree
        self._served = True
        self.session.take_over(
            os.dup(held.device), Init(*facts["init"]), facts["dev"], tuple(facts["on"]) if facts["on"] else None
        )
        if self.claimed.origin is Origin.KEXEC:
            self.passage.users = read_users(held.users)
            reopen(tree, self.passage.users.open)
        self._be_held()  # the tree may be changed from now on
        if facts.get("sheltered"):
            unshelter(tree)
        kept = facts.get("kept", syscalls.is_read_only(self.session.dev))  # a former version does not tell
        if tree.preserved and self.claimed.origin is Origin.DAEMON and kept:
            self.keeper.keep_frozen()
        self.session.connected = partial(self._resend, suspect=held.suspect)

    async def _watch_holder(self, holding: Holding) -> None:
        await self.session.ready.wait()
        holding.served_by(self.session.descriptor)
        await holding.watch()

    def held_by_another(self) -> None:
        """Note the pids of the present holder and daemon in the entry."""
        try:
            self._write_entry()
        except MachineError as error:
            log.warning("the entry names a process that has died: %s", error)

    async def _be_well(self) -> None:
        """Tell the holder that the requests that were sent again did no harm."""
        await trio.sleep(WELL_SECONDS)
        self._tell_well()

    def _tell_well(self, *, answered: bool = False) -> None:
        if self.holding is not None and self.holding.leash is not None:
            self.holding.leash.well()
        if answered and self.checkpoints is not None:
            self.checkpoints.all_answered(self.kernel.store)

    def _resend(self, *, suspect: bool) -> None:
        """Make the kernel send unanswered requests again; find out which inodes it has forgotten meanwhile."""
        assert self.session.filter is not None and self.tree.journal is not None
        self.session.filter.resume(
            self.tree.journal.done, suspect=suspect, well=partial(self._tell_well, answered=True)
        )
        resume(self.session.operations)

    async def _announce(self) -> None:
        """Report that the mount serves, once the kernel has answered."""
        with trio.move_on_after(READY_SECONDS) as waiting:
            await self.session.ready.wait()
        if waiting.cancelled_caught:
            syscalls.detach_all(self.session.dev)
            raise MachineError(f"the kernel did not answer the mount of {self.mountpoint}")
        self._write_entry() if self.held is None else self.held_by_another()  # programs wait, whatever the host lacks
        off = notices.off(self.kernel, self.options.name)
        whence = f": {off}" if off else notices.whence(self.claimed.origin, self.tree, stood_by=self._stood_by)
        self.machine.log(f"pkramfs: {self.options.name or 'a tree'} mounted on {self.mountpoint}{whence}")
        self._starting.close()
        scarce = notices.scarce(self.kernel, self.tree, given=bool(self.options.size))
        said = [line for line in (off, scarce, notices.sheltered(self.claimed.origin, self.tree)) if line]
        self.reporter.serving("\n".join(f"{self.options.name or self.mountpoint}: {line}" for line in said))

    def _reconfigured(self, said: Words) -> None:
        """Write changed options to the entry, by which the tree is mounted again; a full host does not undo them."""
        try:
            self._write_entry()
        except MachineError as error:
            words = ",".join(word if value is True else f"{word}={value}" for word, value in said.items())
            self.machine.log(
                f"pkramfs: a kexec will not know that {self.mountpoint} was remounted with {words}: {error}"
            )
        self.sums.switch(on=self._verifies)
        if "huge" in said:
            self.session.operations.drop_attributes()  # st_blksize is another

    def _begin_journal(self, tree: Tree) -> None:
        """Begin the log, by which the tree outlives this process, unless the tree could not be preserved anyway."""
        if not self.kernel.info.pkram:
            return
        if tree.journal is None:
            node = self.kernel.store.find(self.node_name) if tree.preserved else None
            begin(tree, os.fsencode(self.options.name or ""), self.kernel.generation, 0 if node is None else node.pfn)
        assert tree.journal is not None
        if self._live != tree.journal.log.live:
            self._live = tree.journal.log.live
            self._write_entry()

    def _expect_room(self) -> None:
        """Raise ExhaustedError if nothing could be written; a restored tree can at least be read."""
        if self.claimed.origin is Origin.NOTHING:
            self.kernel.ram.check_room(PAGE_SIZE)

    # -- the end --------------------------------------------------------------------------------

    async def _end_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                log.info("signal %d: unmounting", number)
                await self._unmount()
                return

    async def _unmount(self) -> None:
        """Flush and unmount; detach a mount that is still in use, whose users then get ENOTCONN."""
        try:
            await in_thread(partial(syscalls.detach_all, self.session.dev, lazy=False))
            # Now the session ends, and this task with it, unless the mount is used in another mount namespace.
            await trio.sleep(LINGER_SECONDS)
        except OSError as error:
            log.info("%s", explain(error))
            await flush(self.session.dev)
        await self._leave()

    async def _end_on_request(self, server: Server) -> None:
        await self.keeper.stopping.wait()
        await server.idle()
        await self._leave()

    async def _leave(self) -> None:
        """Detach now, even if the mount is in use."""
        try:
            await in_thread(partial(syscalls.detach_all, self.session.dev))
        except OSError as error:
            log.warning("cannot detach: %s", explain(error))
        await self.session.operations.cache.close()
        self._ended = True
        if self.holding is not None and self.holding.leash is not None:
            self.holding.leash.ends()
        self.session.terminate()


def _generation(tree_id: int) -> int:
    """Return 32 bits that tell file handles of one tree from those of another, and stay the same over a kexec."""
    return (tree_id ^ tree_id >> 32) & 0xFFFF_FFFF
