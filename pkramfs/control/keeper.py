# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's side of the verbs: keep one tree, and report its state.

    preserve     writers gone? ─▶ freeze ─▶ save ─▶ published          else thaw, and say why
                 with verify, all data get their checksums between freeze and save
    unpreserve   node withdrawn by one store ─▶ thaw
    freeze       writers gone? ─▶ freeze; says whether the tree is preserved; holds as long as its connection
    release      the connection of a freeze has ended: thaw, unless preserve or another freeze wants it frozen
    thaw         thaw, nothing else: a restored tree that was only frozen stays preserved
    status       figures and options
    foresee      what preserve would do now
    compare      begin to compare all data with their checksums; status says how many are left
    reconfigure  the options that a remount may change (settings)

A file that is open for writing may have dirty pages that the kernel has not sent yet. RELEASE
comes after the last of them, so `preserve` waits, bounded, until the tree counts no writers. Between
that and `freeze` nothing is awaited, so no open can slip in.

A freeze belongs to a kexec, which may be killed, so it ends with the connection that asked for it. While it holds
no other command can thaw the tree. After `stop` nothing is thawed, so that a preserved tree stays preserved.

Data that a refused write-back lost (fs/lost) would be zeros in the preserved tree. So `preserve` refuses and names
the files, until they are mended; with `lossy` it goes on, the log names the files, and the losses are forgotten.
`watch_losses` names each such file in the log once, some time after its first loss.

The lock lets one verb at a time change the state. `status` needs no lock: it runs between two steps
of a save.

fs/preservation decides which state follows an event, and when the node is withdrawn.

Kernel: fs/super.c (freeze_super), mm/shmem_pkram.c (shmem_save_pkram), patch 24
"""

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from pkramfs.control.protocol import LINE_MAX
from pkramfs.control.replies import Done, Foreseen, Frozen, Status
from pkramfs.errors import ErrnoError, FormatError, PkramfsError, explain
from pkramfs.fs.foresight import foresee
from pkramfs.fs.sealing import is_long, preserve, shorten
from pkramfs.mounting.names import node_name
from pkramfs.spans import Spans
from pkramfs.text import exact
from pkramfs.units import MIB, format_size, plural

if TYPE_CHECKING:
    from pkramfs.control.settings import Settings, Words
    from pkramfs.fs.tree import Tree
    from pkramfs.pkram.store import Store

log = logging.getLogger(__name__)

WRITERS_SECONDS = 3.0
"""How long preserve waits for files that are open for writing to be closed."""
LOSS_SECONDS = 0.5
"""How long losses are collected before the log names the files."""
_NAMED = 5
"""How many files a refusal names."""

T = TypeVar("T")


class BusyError(ErrnoError):
    """Files are open for writing, which the message names, or a kexec has the tree."""

    default_errno = errno.EBUSY


class LostError(ErrnoError):
    """Written data are lost; the message names the files."""

    default_errno = errno.EIO


class Keeper:
    """One tree with its node. `say` writes to the kernel log, `banned` returns the pages that cannot stay in place."""

    def __init__(
        self,
        tree: "Tree",
        store: "Store",
        *,
        name: str | None,
        mountpoint: str,
        strict: bool = False,
        say: Callable[[str], None],
        banned: Callable[[], Spans],
        settings: "Settings",
    ) -> None:
        self.tree, self.store, self.name, self.mountpoint, self.strict = tree, store, name, mountpoint, strict
        self._say, self._banned, self._settings = say, banned, settings
        self._lock = trio.Lock()
        self._writer_gone = trio.Event()
        self._holders = 0  # connections whose freeze holds
        self._kept = False  # frozen by preserve, and so beyond any connection
        self._long = trio.Event()
        self._data_lost = trio.Event()
        self._said: set[int] = set()  # whose loss the log has
        self.stopping, self.leaving = trio.Event(), trio.Event()
        self.outlives: Callable[[], dict[str, Any]] = dict
        """Returns the fields of a status that say how the tree outlives this process."""
        self.summed: Callable[[], dict[str, Any]] = dict
        """Returns the fields of a status that say what is known of the data's checksums."""
        self.sum_all: Callable[[], Awaitable[None]] = _nothing
        """Has all data of a frozen tree get checksums."""
        self.doubt_all: Callable[[], object] = dict
        """Has all data compared with their checksums again."""
        self.keeps: Callable[[bool], object] = bool
        """Is told whether the tree is frozen by preserve, which holds under the next daemon, too."""
        self._complete = False  # the node has a checksum for all data
        tree.preservation.on_withdrawn = self._say_withdrawn

    @property
    def node_name(self) -> bytes:
        """Return the node that holds this tree when it is preserved."""
        return node_name(self.name or "")

    def verbs(self) -> dict[str, Any]:
        """Return the verbs by name."""
        return {
            "status": self.status,
            "preserve": self.preserve,
            "foresee": self.foresee,
            "unpreserve": self.unpreserve,
            "freeze": self.freeze,
            "thaw": self.thaw,
            "compare": self.compare,
            "reconfigure": self.reconfigure,
            "stop": self.stop,
        }

    def undo(self) -> dict[str, Any]:
        """Return the functions that take a verb back when its connection ends."""
        return {"freeze": self.release}

    def writer_gone(self) -> None:
        """Note that a file that was open for writing was closed."""
        self._writer_gone.set()

    def data_lost(self) -> None:
        """Note that a write-back was refused."""
        self._data_lost.set()

    async def watch_losses(self) -> None:
        """Name the files that lose data in the kernel log, until cancelled."""
        while True:
            await self._data_lost.wait()
            self._data_lost = trio.Event()
            await trio.sleep(LOSS_SECONDS)
            self._said &= self.tree.losses.files.keys()
            fresh = [ino for ino in self.tree.losses.files if ino not in self._said]
            self._said.update(fresh)
            for ino in fresh[:_NAMED]:
                names = exact(self.tree.path(self.tree.inodes[ino]))
                reason = os.strerror(self.tree.losses.files[ino].error)
                self._say(f"pkramfs: {self.mountpoint}: data written to {names} are lost: {reason}")
            if fresh[_NAMED:]:
                more = plural(len(fresh) - _NAMED, "more file")
                self._say(f"pkramfs: {self.mountpoint}: data written to {more} are lost")

    async def shorten_logs(self) -> None:
        """Shorten the log of a preserved tree whenever it has become long, until cancelled: see sealing.

        A kexec that comes first finds the tree preserved and goes on; one that comes meanwhile waits.
        """
        while True:
            await self._long.wait()
            self._long = trio.Event()
            async with self._lock:
                busy = not self._holders and not self.stopping.is_set() and not await self._shorten()
            if busy:
                await trio.sleep(LOSS_SECONDS)
                self._long.set()

    async def _shorten(self) -> bool:
        """Shorten the log if it is long; return False if that has to be tried again because the node is being read."""
        try:
            if is_long(self.tree):
                await drive(shorten(self.tree, self.store, self.node_name, self._banned()))
        except (PkramfsError, OSError) as error:
            log.info("the log of %s stays long: %s", self.name, _reason(error))
            return getattr(error, "errno", 0) != errno.EBUSY
        return True

    def log_is_long(self) -> None:
        """Note that the log of a preserved tree may have become long."""
        self._long.set()

    # -- verbs ----------------------------------------------------------------------------------

    async def status(self) -> Status:
        """Return the state and the figures of the tree."""
        if not self._lock.locked():
            self._notice_loss()
        tree, counts = self.tree, self.tree.counts()
        return {
            "name": self.name,
            "mountpoint": self.mountpoint,
            "state": "preserved" if tree.preserved else "live",
            "frozen": tree.frozen,
            "files": counts.files,
            "dirs": counts.directories,
            "pages": counts.pages,
            "bytes": counts.bytes,
            "writers": _texts(tree.writers()),
            "writers_count": tree.writer_count,
            "open_deleted": _texts(tree.deleted()),
            "open_deleted_count": tree.deleted_count,
            "lost": _texts(tree.lost()),
            "lost_count": tree.lost_count,
            "refused": tree.losses.refused,
            "busy": self._lock.locked(),
            "options": self._settings.shown(),
            "pid": os.getpid(),
            **self.outlives(),  # type: ignore[typeddict-item]
            **self.summed(),
        }

    async def preserve(self, strict: bool = False, lossy: bool = False, verify: bool = False) -> Status:
        """Freeze the tree and publish its node, unless that is done already."""
        try:
            async with self._lock:
                return await self._preserve(strict or self.strict, lossy, verify)
        except (PkramfsError, OSError) as error:
            self._say(f"pkramfs: {self.mountpoint} was not preserved: {_reason(error)}")
            raise

    async def _preserve(self, strict: bool, lossy: bool, verify: bool) -> Status:
        if self.name is None:
            raise ErrnoError(
                f"{self.mountpoint} was mounted without pkram=NAME, so it cannot be preserved: mount it with a name",
                errno.EINVAL,
            )
        self._notice_loss()
        if self.tree.preserved and self.tree.frozen and not (verify and not self._complete):
            self._keep(yes=True)
            return await self.status()
        await self._freeze()
        try:
            self._refuse_loss(lossy)
            if verify:
                await self._sum_all()
            if not self.tree.preserved:
                await self._save(strict)
        except BaseException:
            self.tree.thaw()
            raise
        self._keep(yes=True)
        self._forget_loss()
        return await self.status()

    async def _sum_all(self) -> None:
        """Give all data checksums; withdraw a node that may lack some, so that it is saved anew."""
        self._settings.reconfigure({"verify": "data"})
        await self.sum_all()
        if self.tree.preserved and not self._complete:
            self.tree.preservation.withdraw()

    def _refuse_loss(self, lossy: bool) -> None:
        """Raise LostError if files lack data that were written to them, unless `lossy`."""
        count = self.tree.lost_count
        if count and not lossy:
            raise LostError(
                f"data written to {_names(self.tree.lost(_NAMED), count)} on {self.mountpoint} are lost: write them "
                "again, truncate or delete the files, or go on without: remount,preserve,ro,lossy"
            )

    def _forget_loss(self) -> None:
        """Forget the losses, since the tree is preserved without them; the log names the files."""
        count = self.tree.lost_count
        if count:
            self._say(
                f"pkramfs: {self.name} is preserved without data written to {_names(self.tree.lost(_NAMED), count)}"
            )
        self.tree.losses.forget()
        self.tree.commit()

    async def _save(self, strict: bool) -> None:
        """Publish the node, and write its contents and losses to the kernel log."""
        whole, banned = self._settings.whole, self._banned()
        work = preserve(self.tree, self.store, self.node_name, whole=whole, strict=strict, banned=banned)
        report = await drive(work)
        self._long.set()
        self._complete = report.unsummed == 0
        moved = f", {plural(report.moved, 'page')} relocated" if report.moved else ""
        unchecked = f", up to {format_size(report.unsummed * MIB)} unchecked" if report.unsummed else ""
        damaged = f", {plural(report.damaged, 'piece')} damaged" if report.damaged else ""
        self._say(
            f"pkramfs: {self.name} preserved: {plural(report.files, 'file')}, "
            f"{format_size(report.pages << 12)}{moved}{unchecked}{damaged}, {report.seconds * 1000:.1f} ms"
        )
        for path in report.deleted:
            self._say(f"pkramfs: {self.name}: {path} is not preserved")
        if more := report.deleted_count - len(report.deleted):
            self._say(f"pkramfs: {self.name}: nor {'is' if more == 1 else 'are'} {plural(more, 'other open file')}")

    async def foresee(self, strict: bool = False, lossy: bool = False) -> Foreseen:
        """Return the foresight of `preserve` now."""
        banned, whole = self._banned(), self._settings.whole
        found = foresee(self.tree, banned, whole=whole, strict=strict or self.strict, lossy=lossy)
        lists = {
            "refused": [f"{exact(path)}: {why}" for path, why in found.refused],
            "lost": _texts(found.lost),
            "moved": [f"{exact(path)}, {plural(pages, 'page')}" for path, pages in found.moved],
        }
        refused, lost, moved = (_first(lines) for lines in lists.values())
        return {
            "refused": refused,
            "refused_count": len(found.refused),
            "lost": lost,
            "lost_count": len(found.lost),
            "moved": moved,
            "moved_count": len(found.moved),
            "moved_pages": sum(pages for _, pages in found.moved),
            "files": found.files,
            "pages": found.pages,
            "description": found.description,
            "microseconds": round(found.seconds * 1e6),
            **{name: count for name, count in self.summed().items() if name == "unsummed"},  # type: ignore[typeddict-item]
        }

    async def compare(self) -> Done:
        """Compare all data with their checksums in the background."""
        self.doubt_all()
        return {}

    async def unpreserve(self) -> Status:
        """Withdraw the node and give the tree back to its writers."""
        async with self._lock:
            self._refuse_held()
            if self.tree.preserved:
                self.tree.preservation.withdraw()
            self._thaw()
            return await self.status()

    async def freeze(self) -> Frozen:
        """Freeze the tree if it is preserved.

        A live tree goes on: freezing would save nothing of it, and dirty pages in the kernel would be lost if the
        kexec is refused.
        """
        async with self._lock:
            if self.tree.preserved and not self.tree.frozen:
                await self._freeze()
            self._holders += self.tree.preserved
            return {"preserved": self.tree.preserved}

    async def freeze_in_use(self) -> None:
        """Freeze and preserve the tree with all open files; `release` takes the freeze back.

        The caller has seen to it that no request is read until then.
        """
        async with self._lock:
            self._notice_loss()
            self.tree.freeze()
            try:
                self._refuse_loss(lossy=False)
                if not self.tree.preserved:
                    await self._save(self.strict)
            except BaseException:
                if not self._kept:
                    self._thaw()
                raise
            self._holders += 1

    async def release(self, answer: Frozen) -> None:
        """Take back the freeze that had this answer: its connection has ended."""
        async with self._lock:
            self._holders -= answer["preserved"]
            if not self._holders and not self._kept and not self.stopping.is_set():
                self._thaw()

    async def reconfigure(self, words: "Words", pages: int | None = None, inodes: int | None = None) -> Done:
        """Change the options that a remount may change."""
        self._settings.reconfigure(words, pages, inodes)
        return {}

    async def thaw(self) -> Frozen:
        """Take a freeze back; a preserved tree keeps its node until it is changed."""
        async with self._lock:
            self._refuse_held()
            self._thaw()
            return {"preserved": self.tree.preserved}

    async def stop(self) -> Done:
        """End the daemon once this is answered."""
        self.stopping.set()
        return {}

    async def upgrade(self) -> Done:
        """Make room for a daemon that runs the code on disk, unless the mount cannot be upgraded."""
        if "holder" not in self.outlives():
            lacks = "has no holder (a new one may be starting), or Linux is older than 6.9"
            raise BusyError(f"{self.mountpoint} {lacks}: try again, or preserve, umount and mount it")
        async with self._lock:
            self._refuse_held()
            self.leaving.set()
        return {}

    def keep_frozen(self) -> None:
        """Go on with a tree that `preserve` has frozen under another daemon."""
        self.tree.freeze()
        self._keep(yes=True)

    def _keep(self, *, yes: bool) -> None:
        self._kept = yes
        self.keeps(yes)

    async def settled(self) -> None:
        """Wait until no verb is changing the state."""
        async with self._lock:
            pass

    # -- how ------------------------------------------------------------------------------------

    async def _freeze(self) -> None:
        """Freeze once no file is open for writing; raise BusyError with their names if that takes too long."""
        with trio.move_on_after(WRITERS_SECONDS):
            while self.tree.writer_count:
                self._writer_gone = trio.Event()
                await self._writer_gone.wait()
        if count := self.tree.writer_count:
            named = _list(self.tree.writers(_NAMED), count)
            raise BusyError(f"{named} open for writing on {self.mountpoint}: close the files and try again")
        self.tree.freeze()

    def _thaw(self) -> None:
        self.tree.thaw()
        self._keep(yes=False)

    def _refuse_held(self) -> None:
        if self._holders:
            raise BusyError(f"a kexec has frozen {self.mountpoint}: wait until it is over")

    def _notice_loss(self) -> None:
        """Make the tree live if its node was given up because it was damaged."""
        if not self.tree.preserved:
            return
        try:
            lost = self.store.find(self.node_name) is None
        except FormatError:
            return  # it may be there; the next reader of the list reports the damage
        if lost:
            self.tree.preservation.lose()

    def _say_withdrawn(self) -> None:
        """Note in the kernel log that the tree has withdrawn its node."""
        self._say(f"pkramfs: {self.name} is no longer preserved: it is changed again")


async def _nothing() -> None:
    """Do nothing."""


async def drive(work: Generator[Any, None, T]) -> T:
    """Run long work to its end, answering requests between its steps."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            value: T = done.value
            return value
        await trio.lowlevel.checkpoint()


def _texts(paths: list[bytes]) -> list[str]:
    return [exact(path) for path in paths]


def _first(lines: list[str]) -> list[str]:
    """Return as many lines as fit into an answer."""
    room, found = LINE_MAX // 16, list[str]()
    for line in lines:
        room -= len(line)
        if room < 0:
            break
        found.append(line)
    return found


def _list(paths: list[bytes], count: int) -> str:
    return f"{_names(paths, count)} {'is' if count == 1 else 'are'}"


def _names(paths: list[bytes], count: int) -> str:
    """Return the first of `count` files by name, and how many others there are."""
    more = f" and {count - len(paths):,} more" if count > len(paths) else ""
    return ", ".join(_texts(paths)) + more


def _reason(error: BaseException) -> str:
    return explain(error) if isinstance(error, OSError) else str(error)
