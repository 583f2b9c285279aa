"""Files of contexts written into the folder, under the budget."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from kvzip_memory.errors import StorageError
from kvzip_memory.registry.disk.entry import Entry, completed
from kvzip_memory.registry.disk.files import PreparedFile, replace_with
from kvzip_memory.registry.disk.folder import Folder
from kvzip_memory.registry.disk.index import IndexHeldError, IndexUnavailableError
from kvzip_memory.registry.disk.keeper import Keeper, needs_index
from kvzip_memory.registry.disk.tidying import Tidying
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.locks import QUIET_S
from kvzip_memory.system.private import check_file, delete, make_folder


class Putting:
    """Writes one file at a time: its bytes are counted before they are written, and it has a row after that.

    It owns the lock by which threads write one after another.
    """

    def __init__(self, folder: Folder, keeper: Keeper, tidying: Tidying) -> None:
        self._folder, self._keeper, self._tidying = folder, keeper, tidying
        self._one = threading.Lock()
        refuse_after_fork(self, "_one")

    def put(self, prepared: PreparedFile, entry: Entry, locked: bool) -> None:
        """Write a file, in the place of an older one.

        Args:
            locked: whether the caller holds the key's lock. Who does not leaves alone what others are writing under it.

        Raises:
            BudgetError: it does not fit, or only pinned contexts could make room.
            OSError: it cannot be written; nothing has changed.
        """
        path, temporary = self._folder.path(entry.key), self._folder.temporary(entry.key)
        if not self._folder.inside(path):
            raise StorageError(f"{path.parent} is no folder of ours; nothing is written there")
        check_file(path)
        with self._one:  # two writers of one key would have one reservation
            try:
                self._keeper.owed.discard(entry.key)
                replaces = self._reserve(entry, locked)
                for left in self._folder.temporaries() if locked else ():  # by a writer of this key that was killed
                    if left.name.startswith(f"{entry.key}."):
                        left.unlink(missing_ok=True)
                make_folder(path.parent)
                prepared.write(temporary)
                if replaces:
                    self._take_row(entry.key)
                replace_with(path, temporary)
                self._insert(entry, None if replaces else path)
            except BaseException:
                if locked:
                    self._keeper.owed.add(entry.key)
                else:  # what is counted for the key may be another writer's; that is collected once nobody has its lock
                    with suppress(OSError):
                        temporary.unlink(missing_ok=True)
                self._tidying.doubtful |= os.path.lexists(path) or os.path.lexists(temporary)
                with suppress(OSError):
                    self._keeper.opened()
                raise

    @needs_index
    def _reserve(self, entry: Entry, locked: bool) -> bool:
        """Make room for a file and count it as being written; whether it takes the place of an older one.

        That one stays until the new one is whole, unless there is room for one of them alone.
        """
        self._keeper.collect_dead_writers()
        with self._keeper.changing() as rows:
            if not locked and entry.key in rows.totals()[1]:
                raise StorageError("another process is writing it")
            old = rows.entry(entry.key)
            if old is None or self._tidying.fits(rows, entry):
                self._tidying.make_room(rows, entry, 0)
            else:
                self._tidying.make_room(rows, entry, old.file_nbytes)
                self._tidying.drop(rows, old)
                rows.remember_lost(old)
            stored, writing = rows.totals()
            rows.set_totals(stored, {**writing, entry.key: entry.file_nbytes})
        return old is not None

    @needs_index
    def _take_row(self, key: str) -> None:
        """The older file has no row from now on. It is counted with the new one, which is moved into its place."""
        with self._keeper.changing() as rows:
            if (old := rows.entry(key)) is not None:
                rows.remove(old)
                rows.remember_lost(old)
                stored, writing = rows.totals()
                rows.set_totals(stored, {**writing, key: writing.get(key, 0) + old.file_nbytes})

    def _insert(self, entry: Entry, unless: Path | None) -> None:
        """Turn the reservation into a row. The file is there, so it has some patience; where another process holds the index for longer
        it stays, and gets its row later. Any other index, as on a full disk, may have room for its rows only without the file.

        Args:
            unless: the file that goes then; None for one that stays, as something was stored in its place before.
        """
        try:
            for _ in range(9):
                with suppress(IndexHeldError):
                    return self._insert_now(entry)
                time.sleep(QUIET_S)
            self._insert_now(entry)
        except IndexHeldError:
            raise
        except IndexUnavailableError:
            if unless is not None:
                with suppress(OSError):
                    delete(unless)
            raise

    @needs_index
    def _insert_now(self, entry: Entry) -> None:
        with self._keeper.changing() as rows:
            stored, writing = rows.totals()
            if writing.pop(entry.key, None) is None:
                if rows.has(entry.key):
                    return  # the index was made anew from the blobs in between
                self._tidying.make_room(rows, entry, 0)  # another process took us for dead, and has given the room away
                stored, writing = rows.totals()
            rows.set_totals(stored + entry.file_nbytes, writing)
            rows.add(completed(entry, rows.lost(entry.key)))
            rows.forget_lost(entry.key)
