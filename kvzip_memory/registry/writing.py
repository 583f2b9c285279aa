"""What is written to disk, behind the answers."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.counts import Counts
from kvzip_memory.registry.disk.entry import latest
from kvzip_memory.registry.disk.index import IndexHeldError
from kvzip_memory.registry.disk.names import Label
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.memory import Memory, as_entry
from kvzip_memory.registry.removed import tags_left
from kvzip_memory.registry.tier import Held, Use, to_host
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.locks import Hold
from kvzip_memory.system.printable import logger_of

logger = logger_of(__name__)


class Writing:
    """Contexts, and what they have got, on their way from memory to disk.

    It owns the one thread that writes, and what could not be written yet, which is tried again.

    Attributes:
        thread: does one thing after another, in the order in which they were handed over.
        unstored: keys of contexts that could not be stored when they were built, as another process held the index.
    """

    def __init__(self, memory: Memory, backing: Backing, counts: Counts) -> None:
        self._memory, self._backing, self._counts = memory, backing, counts
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="kvzip-disk")
        self.unstored: set[str] = set()
        self._untold: dict[str, tuple[dict[str, float], dict[str, float]]] = {}  # names and tags that could not be written to the index
        refuse_after_fork(self, "thread")

    def write_behind(self, held: Held, hold: Hold | None = None) -> bool:
        """Store a context in the background. It stays in memory until that is done, and its lock is held; False after :meth:`close`."""
        use = Use()

        def write() -> None:
            try:
                self.stored_unless_there(held) if hold is None else self._store(held)
            finally:
                if hold is not None:
                    hold.release()
                self._memory.let_go(use)

        try:
            with self._memory.changed:
                use.begin(held)
            self.thread.submit(write)
        except RuntimeError:  # closed meanwhile: it stays in memory
            self._memory.let_go(use)
            return False
        except BaseException:
            self._memory.let_go(use)
            raise
        return True

    def store_later(self, unstored: Sequence[Held]) -> None:
        """Try again, in the background, to store contexts for which the index was not free."""
        for held in unstored:
            self.unstored.discard(held.key)
            self.write_behind(held)

    def _store(self, held: Held, locked: bool = True) -> bool:
        """Write a context to the disk tier; False if it was removed; a warning and a counter if that fails."""
        began = time.perf_counter()
        try:
            if (disk := self._backing.tier) is None:
                return False
            disk.check_free()  # before anything is copied
            notes = disk.notes()
            if self.is_removed(held, notes) or not self._has_parts(held):
                return False
            names = held.names if held.stored is None else self._backing.told(as_entry(held)).names  # others may have taken some
            tags, pinned = tags_left(held, notes), held.pinned
            disk.put(to_host(held.context), held.group, names=names, tags=sorted(tags), pinned=pinned, locked=locked)
            if self.is_removed(held, disk.notes()):  # meanwhile
                disk.remove(held.key)
                return False
            if held.pinned != pinned:
                disk.pin(held.key, held.pinned)
            for tag in tags.keys() - held.tags.keys():
                disk.untag(held.key, tag)
        except Exception as error:  # also if there is no memory for a copy
            self._backing.failed("store", error)
            if isinstance(error, IndexHeldError):
                self.unstored.add(held.key)
            return False
        held.stored = time.time()
        self.unstored.discard(held.key)
        self._counts.add("stored")
        self._counts.add("stored.ms", round(1e3 * (time.perf_counter() - began)))
        return True

    def is_removed(self, held: Held, notes: Notes) -> bool:
        """Whether a context that is in memory still was deleted, here or by another process, and not loaded here since."""
        return self._memory.removed.forbids(held, notes, lambda: self._backing.told(as_entry(held)).names)

    def _has_parts(self, held: Held) -> bool:
        """Whether all that a context shares is on disk, or was stored now: without it nobody could use its file."""
        for key in held.parts:
            there = [] if self._backing.has(key) else self._memory.in_memory([key])
            for part in (
                there if "shift" in held.context.identity else ()
            ):  # the head of the same text: who has loaded this has loaded it, too
                part.loaded = max(part.loaded, held.loaded)
            if not self._backing.has(key) and not any(map(self.stored_unless_there, there)):
                logger.debug("context %s is not stored: it shares the pairs of %s, which is not", held.key[:12], key[:12])
                return False
        return True

    def stored_unless_there(self, held: Held) -> bool:
        """Whether a context is on disk, or was stored now.

        Under the lock of its key if that is free. Who holds it builds or writes this context, or another one that shares the lock: to
        wait for it, perhaps with a lock of our own, could be for ever, and to write a context twice does no harm.
        """
        disk = self._backing.tier
        if disk is None:
            return False
        if disk.has(held.key):
            held.stored = held.stored or time.time()  # by another process
            self._tell_tags(held)
            return True
        hold = disk.builders.hold(held.key)
        try:
            locked = disk.read_only is None and hold.acquire()
            return disk.has(held.key) or self._store(held, locked) or disk.has(held.key)
        except OSError as error:
            self._backing.failed("store", error)
            return False
        finally:
            hold.release()

    def _tell_tags(self, held: Held) -> None:
        """Of a file that another process has built anew, and knows nothing of them."""
        entry = self._backing.attempt("read", lambda disk: disk.entry(held.key)) if held.tags else None
        if entry is not None and entry.created != held.context.created and (tags := tags_left(held, self._backing.notes())):
            self.touch_behind(held.key, tags=tags)

    def write_again(self, key: str) -> None:
        """Store a context that is in memory, if its file is not there."""
        for held in [] if self._backing.has(key) else self._memory.in_memory([key]):
            held.stored = None
            self.write_behind(held)

    def touch_behind(
        self, key: str, names: Mapping[str, float] | None = None, tags: Mapping[str, float] | None = None, label: Label | None = None
    ) -> None:
        """Tell the disk tier, behind the answer, that a context was loaded, and what names and tags it has got, and when."""

        def touch() -> None:
            if label is not None:
                self._name(label)
            entry = self._backing.attempt("read", lambda disk: disk.entry(key)) if tags else None
            if names or (tags and (entry is None or not set(tags) <= set(entry.tags))):
                self._touch(key, names or {}, tags or {})
            for held in [] if self._backing.has(key) else self._memory.in_memory([key]):  # it may have been deleted there meanwhile
                if names or tags or held.stored is not None:
                    with self._memory.using() as use:
                        with self._memory.changed:
                            use.begin(held)
                        self.stored_unless_there(held)

        if self._backing.tier is not None:
            with suppress(RuntimeError):  # closed meanwhile
                self.thread.submit(touch)

    def used_behind(self, key: str) -> None:
        """Tell the disk tier, behind the answer, that a context was read from it."""
        with suppress(RuntimeError):  # closed meanwhile
            self.thread.submit(self._touch, key, {}, {})

    def untell(self, key: str, tags: Collection[str] | None = None) -> None:
        """Of what could not be written of a context, these tags, or all, are to be written no more."""
        if tags is None:
            self._untold.pop(key, None)
        elif key in self._untold:
            names, told = self._untold[key]
            self._untold[key] = names, {tag: given for tag, given in told.items() if tag not in tags}

    def _touch(self, key: str, names: Mapping[str, float], tags: Mapping[str, float]) -> None:
        """What cannot be told now is told by the next touch or flush, unless it is forgotten before. In the writer's thread."""
        told_names, told_tags = self._untold.get(key, ({}, {}))
        self._untold[key] = names, tags = latest(told_names, names), latest(told_tags, tags)

        def tell(disk: DiskTier) -> None:
            disk.touch(key, names=names, tags=disk.notes().left(key, tags) if tags else ())
            del self._untold[key]

        self._backing.attempt("touch", tell)

    def tell(self) -> None:
        """Write down the names, and what contexts have got, that could not be written before. In the writer's thread."""
        for label in self._backing.names.unwritten():
            self._name(label)
        for key in [*self._untold]:
            self._touch(key, {}, {})

    def _name(self, label: Label) -> None:
        self._backing.attempt("name", lambda disk: disk.name(label))

    def flush(self) -> None:
        """Wait until everything built so far is on disk, as far as that can be."""
        if self._backing.tier is not None:
            with self._memory.changed:
                self.store_later([held for key in [*self.unstored] for held in self._memory.here(key)])
            with suppress(RuntimeError):  # closed meanwhile
                self.thread.submit(self.tell).result()  # one thread, in order

    def close(self) -> None:
        """Write what is still to be written, and let go of the folder."""
        if self._backing.tier is not None:
            here = self._memory.in_memory()
            self.store_later([held for held in here if held.pinned and not self._backing.has(held.key)])
            for held in here:
                if held.tags and self._backing.has(held.key):
                    self._tell_tags(held)
        self.flush()
        if self.unstored:
            logger.warning("%d contexts are not on disk, as another process holds the index", len(self.unstored))
        if (disk := self._backing.let_go("the registry was closed")) is not None:
            with suppress(RuntimeError):  # the program ends
                self.thread.submit(disk.close)  # SQLite's connections belong to their threads
            disk.close()
        self.thread.shutdown()
