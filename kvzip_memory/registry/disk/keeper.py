"""Keeps a disk tier's index: opens it, waits for who holds it, makes a damaged one anew, and mends what failures have left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from filelock import FileLock, Timeout

from kvzip_memory.registry.disk import layout
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.folder import Folder
from kvzip_memory.registry.disk.frozen import FrozenIndex
from kvzip_memory.registry.disk.index import (
    HELD,
    Index,
    IndexDamagedError,
    IndexHeldError,
    IndexReplacedError,
    IndexUnavailableError,
    is_free,
)
from kvzip_memory.registry.disk.names import Names
from kvzip_memory.registry.disk.rows import Rows
from kvzip_memory.registry.disk.tidying import Tidying, moved, remove_index
from kvzip_memory.registry.forgotten import Notes, when_deleted
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.locks import QUIET_S, held
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.private import make_folder

logger = logger_of(__name__)

_TRIES = 20  # to use an index that others make anew again and again

P = ParamSpec("P")
T = TypeVar("T")


class Keeper:
    """The index of a folder. It owns the open index, which has a lock of its own, and knows what is still to be mended.

    Args:
        folder: in which the index lies.
        tidying: makes rows and files agree.
        names: what names mean, for an index that is made anew.

    Attributes:
        made_anew: whether this process has found the index damaged.
        owed: keys of files of ours that were not written, and for which bytes are counted still.
    """

    def __init__(self, folder: Folder, tidying: Tidying, names: Names) -> None:
        self._folder, self._tidying, self._names = folder, tidying, names
        self.made_anew = False
        self.owed: set[str] = set()
        self._rows: Rows | None = None
        self._opened_file: int | None = None
        self._held = False  # by another process, when last looked at
        self._mending = False
        self._opening = threading.RLock()  # held while the index is opened, also anew
        refuse_after_fork(self, "_opening")

    def sound(self, use: Callable[[], T]) -> T:
        """Use the index; make a damaged one anew from the blobs and try again, once. One that is held is left alone until it is free.

        Raises:
            IndexUnavailableError: it cannot be used now.
        """
        try:
            for _ in range(_TRIES):
                with suppress(IndexReplacedError):
                    return use()
                self._wait()
            return use()
        except IndexHeldError:
            self._note_held()
            raise
        except IndexDamagedError as error:
            try:
                with self._opening:
                    self._replace(str(error))
                return use()
            except IndexDamagedError as again:
                raise IndexUnavailableError(f"the index cannot be made anew: {self._folder.told(str(again))}") from again

    def close(self) -> None:
        if self._rows is not None:
            self._rows.index.close()

    def check_free(self) -> None:
        """Raises:
        IndexUnavailableError: another process held the index when it was last used, and holds it still.
        """
        if self._held:
            if not is_free(self._folder.root / "index"):
                raise IndexHeldError()
            self._held = False
            logger.warning("the index of %s is free again", self._folder.root)

    def check_changeable(self) -> None:
        """Raises:
        IndexUnavailableError: the index cannot be changed now; a process that holds it is waited for a second.
        """

        def check() -> None:
            self._folder.check_writable()
            self.opened()
            if not is_free(self._folder.root / "index", QUIET_S):
                raise IndexHeldError

        self.sound(check)

    def opened(self) -> Rows:
        """The rows, as they are. What was left half done before is mended first.

        Raises:
            IndexUnavailableError: they cannot be used now.
        """
        if self._folder.read_only is not None:
            if self._rows is None:
                self._rows = self._frozen()
            return self._rows
        self.check_free()
        with self._opening:
            if self._rows is not None and self._index_file() is None:
                self._wait()
            if self._rows is not None and self._index_file() not in (None, self._opened_file):  # another process has made it anew
                with suppress(IndexUnavailableError):
                    self._rows.index.close()
                self._rows = None
            if self._rows is None:
                self._open()
            rows = self._rows
        if rows is None:
            raise IndexUnavailableError("the index could not be opened")
        if (self.owed or self._tidying.doubtful) and not self._mending:
            self._mending = True
            try:
                with suppress(OSError):
                    self._mend()
            finally:
                self._mending = False
            rows = self._rows or rows
        return rows

    @contextmanager
    def changing(self) -> Iterator[Rows]:
        """A transaction that deletes or moves files. If it fails the rows are as before and the files are not: they are mended later."""
        self._folder.check_writable()
        rows = self.opened()
        try:
            with rows.transaction():
                yield rows
        except BaseException:
            self._tidying.doubtful = True
            raise

    def _frozen(self) -> Rows:
        """The rows of a folder that cannot be written; from the files what has none."""
        rows = Rows(FrozenIndex(self._folder.root / "index", self._folder.checksums))
        listed, blobs = set(rows.contexts()), {path.stem: path for path in self._folder.blobs()}
        for key in listed - blobs.keys():
            rows.drop(key)
        for key in blobs.keys() - listed:
            if (entry := self._folder.entry_of_file(blobs[key])) is not None:
                rows.add(entry)
        rows.set_totals(sum(path.lstat().st_size for path in blobs.values()), {})
        return rows

    @property
    def is_held(self) -> bool:
        """Whether another process held the index when it was last used."""
        return self._held

    def _note_held(self) -> None:
        if not self._held:
            self._held = True
            logger.warning("%s for a second: %s; until it is free contexts are stored in memory only", HELD, self._folder.root / "index")

    def _open(self) -> None:
        self._opened_file = self._index_file()
        try:
            self._rows = Rows(Index(self._folder.root / "index", self._folder.checksums))
            self._opened_file = self._index_file()
            if not self._rows.have_totals():
                with self._making_anew(QUIET_S):  # who does so knows what the one before has said
                    self._fill({}, {})
        except IndexDamagedError as error:
            self._replace(str(error))
        except IndexUnavailableError as error:
            if self._index_file() == self._opened_file:
                raise
            raise IndexReplacedError from error

    def _fill(self, salvaged: Mapping[str, Entry], notes: Mapping[str, Notes]) -> None:
        """Give a new index its rows, see :meth:`Tidying.fill`."""
        rows = self._rows
        assert rows is not None
        if rows.have_totals():
            return
        with rows.transaction():
            if rows.are_new():
                self._tidying.fill(rows, self._names, salvaged)
                rows.set_notes(notes)

    def _replace(self, reason: str) -> None:
        """Set a damaged index aside and make it anew; one process does, the others open what it made."""
        with self._making_anew():
            salvaged, notes = self._salvaged()
            with suppress(Exception):
                if self._rows is not None:
                    self._rows.index.close()
            self._rows = None
            if self._index_file() == self._opened_file:
                logger.warning(
                    "the index of %s is damaged (%s); made anew from the stored contexts, with the pins and later names of %d",
                    self._folder.root,
                    self._folder.told(reason),
                    len(salvaged),
                )
                moved(self._folder.root / "index", self._folder.root / "quarantine" / f"index.{time.time_ns()}")
                make_folder(self._folder.root / "index")
                for older in layout.old_indexes(self._folder.root)[:-1]:
                    remove_index(older)
                self.made_anew = True
            self._opened_file = self._index_file()
            self._rows = Rows(Index(self._folder.root / "index", self._folder.checksums))
            self._fill(salvaged, notes)

    @contextmanager
    def _making_anew(self, timeout: float = -1) -> Iterator[None]:
        """The block makes the index anew, and no other process does.

        Raises:
            IndexHeldError: another process does for so many seconds.
        """
        lock = FileLock(self._folder.root / "locks" / "index.lock", thread_local=False, mode=0o600)
        with ExitStack() as stack:
            try:
                stack.enter_context(held(lock, "making a damaged index anew", timeout))
            except Timeout:
                raise IndexHeldError from None
            yield

    def _wait(self) -> None:
        """Wait for another process that makes the index anew."""
        with self._making_anew(QUIET_S):
            pass

    def _salvaged(self) -> tuple[dict[str, Entry], dict[str, Notes]]:
        """The contexts' rows of a damaged index that are sound, and its notes of what was forgotten."""
        rows, found, notes = self._rows, dict[str, Entry](), dict[str, Notes]()
        if rows is None:
            return found, notes
        with suppress(Exception):
            notes = rows.all_notes()
        with suppress(Exception):  # SQLite may fail in any way
            for key in rows.contexts():
                with suppress(IndexDamagedError):
                    if (entry := rows.entry(key)) is not None:
                        found[key] = entry
        return found, notes

    def _index_file(self) -> int | None:
        """The inode of the index: another one means that another process has made it anew."""
        try:
            return (self._folder.root / "index" / "cache.db").lstat().st_ino
        except OSError:
            return None

    # -- what killed processes and failures have left ------------------------------------------------------------

    def tidy(self) -> None:
        """Free and mend what killed processes have left."""
        self.collect_dead_writers()
        self.reconcile()

    def collect_dead_writers(self) -> None:
        """Free what was reserved by processes that no longer hold their lock."""
        for key in self.sound(lambda: self.opened().totals()[1]):
            with suppress(Timeout, OSError), self._folder.lock(key).acquire(timeout=0):
                for path in self._folder.temporaries():
                    if path.name.startswith(key):
                        path.unlink(missing_ok=True)
                self.unreserve(key)

    def reconcile(self) -> int:
        """Make rows and files agree, see :meth:`Tidying.reconcile`."""

        def agree() -> int:
            with self.changing() as rows:
                return self._tidying.reconcile(rows)

        return self.sound(agree)

    def set_aside(self, key: str, reason: str) -> bool:
        """Take a file out of use, see :meth:`Tidying.set_aside`."""

        def move() -> bool:
            with self.changing() as rows:
                return self._tidying.set_aside(rows, key, reason)

        return self.sound(move)

    def empty_quarantine(self) -> int:
        """Delete what was taken out of use, but not another tenant's: how many files, and indexes that were set aside."""

        def empty() -> int:
            with self.changing() as rows:
                count, others = self._tidying.empty_quarantine(rows)
            return count + self._tidying.sweep_quarantine(others)

        return self.sound(empty)

    def is_unclean(self) -> bool:
        """Whether something was forgotten since the index was last written anew."""
        return self.sound(lambda: self.opened().unclean() is not None)

    def rewrite(self, done: bool) -> bool:
        """Write the index anew, so that its free pages hold nothing of what was forgotten; False where another process reads it, which
        leaves it to the next who forgets something or opens the folder. So does what else is not ``done``."""

        def overwrite() -> None:
            rows = self.opened()
            found = rows.unclean()
            rows.index.rewrite()
            with rows.transaction():
                if done and rows.unclean() == found:  # nothing was forgotten meanwhile
                    rows.set_clean()

        try:
            self.sound(overwrite)
            return done
        except IndexHeldError:
            logger.warning(
                "another process reads the index of %s: until that is written anew, free pages of it may hold tags", self._folder.root
            )
            return False

    def drop_deleted(self) -> Callable[[str], float]:
        """Delete what there is of contexts that were deleted since in quarantine, in rows without a file and in indexes that were set
        aside; what tells when a context was deleted."""

        def drop() -> Callable[[str], float]:
            with self.changing() as rows:
                when = when_deleted(rows.all_notes().values())
                self._tidying.drop_bad(rows, when)
                self._tidying.drop_lost(rows, when)
            self._tidying.sweep_indexes()
            return when

        return self.sound(drop)

    def unreserve(self, key: str) -> None:
        """Give back what is counted for a file that is not being written any more."""

        def give_back() -> None:
            rows = self.opened()
            with rows.transaction():
                stored, writing = rows.totals()
                writing.pop(key, None)
                rows.set_totals(stored, writing)

        self.sound(give_back)

    def _mend(self) -> None:
        """After a failure: give back what is counted for files that were not written, and make rows and files agree.

        If that fails too it is tried again at the next use.
        """
        while self.owed:
            key = next(iter(self.owed))
            self.unreserve(key)
            self.owed.discard(key)
        if self._tidying.doubtful:
            self.reconcile()
            self._tidying.doubtful = False


class Kept(Protocol):
    """What uses an index."""

    _keeper: Keeper


K = TypeVar("K", bound=Kept)


def needs_index(method: Callable[Concatenate[K, P], T]) -> Callable[Concatenate[K, P], T]:
    """A method that uses the index, see :meth:`Keeper.sound`."""

    @wraps(method)
    def guarded(self: K, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._keeper.sound(lambda: method(self, *args, **kwargs))

    return guarded
