"""Files and rows changed together: deleted, moved to quarantine, counted, made to agree."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvzip_memory.errors import BudgetError, CorruptFileError
from kvzip_memory.registry.disk import layout
from kvzip_memory.registry.disk.entry import Entry, completed, latest
from kvzip_memory.registry.disk.files import UnreadableHereError
from kvzip_memory.registry.disk.folder import Folder
from kvzip_memory.registry.disk.names import Names
from kvzip_memory.registry.disk.rows import Rows
from kvzip_memory.registry.identity import EVERYONE, is_whose
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.private import delete, is_file, is_folder

logger = logger_of(__name__)


class Tidying:
    """Changes files and their rows, inside a transaction of who calls: see :meth:`~kvzip_memory.registry.disk.keeper.Keeper.changing`.

    Args:
        folder: of the files.
        budget: bytes that blobs, files being written and quarantined files may take together; None for no limit.

    Attributes:
        quarantined: files, by this process.
        doubtful: whether files were changed and their rows, after a failure, were not.
    """

    def __init__(self, folder: Folder, budget: int | None) -> None:
        self._folder, self.budget = folder, budget
        self.quarantined = 0
        self.doubtful = False

    # -- deleting ------------------------------------------------------------------------------------------------

    def drop(self, rows: Rows, entry: Entry) -> None:
        """Delete a context: first the file, so that bytes are never free before they are free."""
        self._unlink(entry)
        rows.remove(entry)

    def _unlink(self, entry: Entry) -> None:
        path = self._folder.path(entry.key)
        if self._folder.inside(path) and is_file(path):
            self.doubtful |= path.lstat().st_size != entry.file_nbytes  # somebody has changed it; what was counted for it is not known
            delete(path)

    def _drop_bad(self, rows: Rows, row: Mapping[str, Any]) -> None:
        delete(self._folder.root / "quarantine" / row["file"])
        rows.remove_bad(row)

    def fits(self, rows: Rows, new: Entry) -> bool:
        """Whether a file has room beside all that is there."""
        return self.budget is None or rows.usage() + new.file_nbytes <= self.budget

    def make_room(self, rows: Rows, new: Entry, replaced: int) -> None:
        """Delete what was used longest ago until ``new`` fits in place of ``replaced`` bytes; nothing if it cannot."""
        if self.budget is None:
            return
        nbytes = new.file_nbytes
        if nbytes > self.budget:
            raise BudgetError(
                f"the context takes {nbytes:,} bytes on disk; disk_bytes is {self.budget:,}: raise it or keep a smaller ratio"
            )
        stored, writing = rows.totals()
        usage = stored + sum(nbytes for key, nbytes in writing.items() if key != new.key) - replaced
        victims: list[Callable[[], None]] = []
        for name in rows.bad_names() if usage + nbytes > self.budget else ():  # what is in quarantine goes first
            if usage + nbytes > self.budget and (bad := rows.bad(name)) is not None and bad["nbytes"]:
                victims.append(partial(self._drop_bad, rows, bad))
                usage -= bad["nbytes"]
        for entry in self._by_use(rows, new) if usage + nbytes > self.budget else ():
            victims.append(partial(self.drop, rows, entry))
            usage -= entry.file_nbytes
            if usage + nbytes <= self.budget:
                break
        if usage + nbytes > self.budget:
            raise BudgetError(
                f"no room for {nbytes:,} bytes on disk: pinned contexts and files being written take {usage:,} of "
                f"disk_bytes={self.budget:,}; unpin some or raise disk_bytes"
            )
        for drop in victims:
            drop()

    def _by_use(self, rows: Rows, new: Entry) -> Iterator[Entry]:
        """What may be deleted for a new file, in the order of its use; what others share behind the last one that shares it."""
        needed, gone, shared = {new.key, *new.parts}, set[str](), dict[str, Entry]()
        for key in rows.contexts():
            entry = rows.entry(key)
            if entry is None or entry.pinned or key in needed:
                continue
            if set(rows.sharing(key)) - gone:
                shared[key] = entry
                continue
            free = [entry]
            while free:
                gone.add(free[0].key)
                yield free[0]
                free += [shared.pop(key) for key in free.pop(0).parts[::-1] if key in shared and not set(rows.sharing(key)) - gone]

    # -- quarantine ----------------------------------------------------------------------------------------------

    def set_aside(self, rows: Rows, key: str, reason: str) -> bool:
        """Take a file out of use and remember why; False if another process has done it, or it may not be done."""
        path, entry = self._folder.path(key), rows.entry(key)
        counted = entry.file_nbytes if entry is not None else 0
        try:
            size = path.lstat().st_size
            nbytes = self._bury(rows, path, reason, rows.usage() - counted, self._folder.tenant if entry is None else entry.tenant)
        except OSError:
            return False
        if entry is not None:
            self.doubtful |= entry.file_nbytes != size
            self.drop(rows, entry)
            rows.remember_lost(entry)
        rows.count(nbytes)
        return True

    def _bury(self, rows: Rows, path: Path, reason: str, usage: int, tenant: str | None) -> int:
        """Move a file to quarantine and note the reason; it is deleted where it does not fit into the budget beside what is used.

        Returns:
            Bytes that it takes there.

        Raises:
            OSError: it cannot be moved, or is there no more.
        """
        name, nbytes = f"{path.stem}.{time.time_ns()}.safetensors", path.lstat().st_size
        if self.budget is not None and usage + nbytes > self.budget:  # it has grown, or never had a row
            path.unlink()
            nbytes = 0
        elif not moved(path, self._folder.root / "quarantine" / name):
            nbytes = 0
        rows.set_bad({"key": path.stem, "file": name, "nbytes": nbytes, "reason": reason, "time": time.time(), "tenant": tenant})
        self.quarantined += 1
        logger.warning("%s; moved to quarantine", self._folder.told(reason, tenant))
        return nbytes

    def empty_quarantine(self, rows: Rows) -> tuple[int, set[str]]:
        """Delete what was taken out of use, but not another tenant's: how many files, and the names of those that stay."""
        count, others = 0, set[str]()
        for row in rows.all_bad():
            if row["tenant"] == EVERYONE or is_whose(row, self._folder.tenant):
                self._drop_bad(rows, row)
                count += 1
            else:
                others.add(row["file"])
        return count, others

    def sweep_quarantine(self, others: set[str]) -> int:
        """Delete what lies there without a row, and indexes that were set aside: how many. Outside a transaction."""
        count = 0
        for path in self._folder.quarantined():
            if path.name not in others:
                path.unlink(missing_ok=True)
                count += 1
        return count + self.sweep_indexes()

    def sweep_indexes(self) -> int:
        """Delete the indexes that were set aside: how many. Outside a transaction."""
        old = layout.old_indexes(self._folder.root)
        for folder in old:
            remove_index(folder)
        return len(old)

    def drop_bad(self, rows: Rows, deleted: Callable[[str], float]) -> None:
        """Delete what was taken out of use of contexts that were ``deleted`` since then."""
        for row in rows.all_bad():
            if row["time"] < deleted(row["key"]):
                self._drop_bad(rows, row)

    def drop_lost(self, rows: Rows, deleted: Callable[[str], float]) -> None:
        """Delete the rows of contexts whose files are gone since they were ``deleted``."""
        for key in rows.contexts():
            if deleted(key) and not self._folder.has(key) and (entry := rows.entry(key)) is not None:
                self.drop(rows, entry)

    # -- making them agree ---------------------------------------------------------------------------------------

    def reconcile(self, rows: Rows) -> int:
        """Make rows and files agree after a process was killed: a row whose file is gone goes too, a whole file without
        a row gets one, a broken one goes to quarantine, and bytes are counted anew from the files. What cannot be read now stays.

        Returns:
            Files deleted.
        """
        deleted = 0
        _, writing = rows.totals()
        listed, blobs = set(rows.contexts()), {path.stem: path for path in self._folder.blobs()}
        for key in listed - blobs.keys() - writing.keys():
            if (entry := rows.entry(key)) is not None:
                self.drop(rows, entry)
                if rows.sharing(key):  # what shares it goes when it is forgotten
                    rows.remember_lost(entry)
                rows.set_unclean()  # it may have been deleted by who could not finish that
        stored = sum(self._measured_bad(rows, row) for row in rows.all_bad())
        stored += sum(path.lstat().st_size for key, path in blobs.items() if key in listed)
        for key in blobs.keys() - listed - writing.keys():
            usage = stored + sum(writing.values())
            with suppress(FileNotFoundError):
                entry, nbytes = self._entry_or_buried(rows, blobs[key], usage)
                if entry is not None and self.budget is not None and usage + nbytes > self.budget:
                    delete(blobs[key])
                    deleted += 1
                    continue
                if entry is not None:
                    rows.add(completed(entry, rows.lost(key)))
                    rows.forget_lost(key)
                stored += nbytes
        for path in self._folder.temporaries():
            if path.name[:64] not in writing and (".catalog." not in path.name or self._folder.delete_dead(path)):
                path.unlink(missing_ok=True)
                deleted += 1
        stored += self._listed_as_bad(rows, stored, writing)
        rows.set_totals(stored, writing)
        return deleted

    def fill(self, rows: Rows, names: Names, salvaged: Mapping[str, Entry]) -> None:
        """Rows of a new index from the files; of an empty folder, none.

        Args:
            names: what names mean.
            salvaged: what was known of some contexts and is not in their files.
        """
        stored = 0
        found: list[Entry] = []
        for path in [*self._folder.blobs()]:
            with suppress(FileNotFoundError):
                entry, nbytes = self._entry_or_buried(rows, path, stored)
                found += [entry] if entry is not None else []
                stored += nbytes
        entries = [completed(entry, salvaged.get(entry.key)) for entry in found]
        given: dict[str, dict[str, float]] = {}
        for label in names.all():
            given.setdefault(label.key, {})[label.name] = label.loaded
        entries = [replace(entry, names=latest(entry.names, given.get(entry.key, {}))) for entry in entries]
        for entry in sorted(entries, key=lambda entry: entry.used):
            rows.add(entry)
        writing = {path.name[:64]: path.lstat().st_size for path in self._folder.temporaries() if not self._folder.delete_dead(path)}
        rows.set_totals(stored + self._listed_as_bad(rows, stored, writing), writing)

    def _entry_or_buried(self, rows: Rows, path: Path, usage: int) -> tuple[Entry | None, int]:
        """The entry of a file without a row, None of one that is of no use, and its bytes; a broken one goes to quarantine.

        Raises:
            FileNotFoundError: it is there no more.
        """
        try:
            entry = self._folder.read_entry(path)
            return entry, entry.file_nbytes
        except FileNotFoundError:
            raise
        except CorruptFileError as error:
            if not isinstance(error, UnreadableHereError):
                with suppress(OSError):
                    return None, self._bury(rows, path, str(error), usage, EVERYONE)
        except OSError as error:
            logger.warning("%s", self._folder.told(f"cannot read stored context {path.stem[:12]}: {error}"))
        return None, path.lstat().st_size

    def _measured_bad(self, rows: Rows, row: Mapping[str, Any]) -> int:
        """Bytes that a file in quarantine takes; one that has grown there is deleted, and its reason stays."""
        path = self._folder.root / "quarantine" / row["file"]
        nbytes = path.lstat().st_size if is_file(path) else 0
        if nbytes > row["nbytes"]:
            delete(path)
            nbytes = 0
        if nbytes != row["nbytes"]:
            rows.set_bad({**row, "nbytes": nbytes})
        return nbytes

    def _listed_as_bad(self, rows: Rows, stored: int, writing: Mapping[str, int]) -> int:
        """Give files in quarantine that have none a row, for whoever moved them was killed, or the index is new; their bytes. What there
        is no room for beside the others is deleted."""
        listed, bad = {*rows.bad_names()}, 0
        for path in self._folder.quarantined():
            if path.name in listed:
                continue
            nbytes = path.lstat().st_size
            if self.budget is not None and stored + bad + sum(writing.values()) + nbytes > self.budget:
                path.unlink(missing_ok=True)
                continue
            rows.set_bad({"key": path.name[:64], "file": path.name, "nbytes": nbytes, "reason": "unknown", "time": 0.0})
            bad += nbytes
        return bad


def moved(path: Path, target: Path) -> bool:
    """Move a file or folder that is of no more use; False if it had to be deleted, as it lies on another file system.

    Raises:
        OSError: neither is possible.
    """
    try:
        os.replace(path, target)
        return True
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
    for each in layout.files_of_index(path) if is_folder(path) else [path]:
        delete(each)
    return False


def remove_index(folder: Path) -> None:
    """Delete an index that was set aside; what else is in it stays."""
    for path in layout.files_of_index(folder):
        delete(path)
    with suppress(OSError):
        folder.rmdir()
