"""The disk tier's index: small JSON rows in diskcache, in the order of their last use.

diskcache is used for what it is good at, many processes on one SQLite file, and kept from what it is not: rows are
text under text keys, each with a checksum of its own; a pickle, a file name or anything else found in the database is
refused and never loaded, opened or deleted; nothing is ever evicted by it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import DEFAULT_SETTINGS, MODE_RAW, UNKNOWN

from kvzip_memory.errors import ForkedError, StorageError
from kvzip_memory.registry.disk.connected import Connected, ReplacedError, connect
from kvzip_memory.registry.disk.schema import oddity
from kvzip_memory.system.checksums import PLAIN, Checksums
from kvzip_memory.system.forks import refuse_after_fork, unforked
from kvzip_memory.system.locks import QUIET_S
from kvzip_memory.system.private import open_file

Row = dict[str, Any]

# All of them are given, or those that the database holds would be set.
_SETTINGS: dict[str, Any] = {
    **DEFAULT_SETTINGS,
    "eviction_policy": "none",
    "cull_limit": 0,
    "statistics": 0,
    "tag_index": 0,
    "disk_min_file_size": 2**60,
    "sqlite_secure_delete": 1,  # what is deleted is overwritten
    "sqlite_mmap_size": 0,  # a file that is cut short while it is mapped ends the process
}

# SQLite's codes for a file that is not what it wrote. A truncated one shows as an input/output error too.
_DAMAGE = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
}


_NO_ROW = 2**63 - 1  # beyond the number of every row

#: Why nothing is looked up or stored meanwhile.
HELD = "another process holds the index locked"


class IndexDamagedError(Exception):
    """The index holds something we have not written, or SQLite says it is malformed."""


class IndexUnavailableError(StorageError):
    """The index cannot be read or written now: a full disk, a read-only folder, another process that holds it."""


class IndexHeldError(IndexUnavailableError):
    """Another process has kept the index locked for a second."""

    def __init__(self) -> None:
        super().__init__(f"{HELD}; try again when it is free, or end that process")


class IndexReplacedError(IndexUnavailableError):
    """Another process makes the index anew, or has."""

    def __init__(self) -> None:
        super().__init__("another process makes the index anew; try again")


class _Rows(diskcache.Disk):
    """Text rows only, in both directions; never a pickle, never a file."""

    def put(self, key: Any) -> tuple[str, bool]:
        if type(key) is not str:
            raise TypeError(f"an index key is a str, not {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        if not raw or type(key) is not str:
            raise IndexDamagedError("a key that is not text (perhaps a pickle)")
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, None, str]:
        if type(value) is not str or read:
            raise TypeError(f"an index row is a str, not {type(value).__name__}")
        return 0, MODE_RAW, None, value

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> str:
        if mode != MODE_RAW or filename is not None or type(value) is not str:
            raise IndexDamagedError(f"a row that is not text (mode {mode!r}, file {filename!r})")
        return value

    def filename(self, key: Any = UNKNOWN, value: Any = UNKNOWN) -> tuple[str, str]:
        raise TypeError("the index holds no files")

    def remove(self, file_path: Any) -> None:
        """Nothing: rows have no files; a planted one names somebody else's."""


class Index:
    """Rows by key; iterating goes from the least to the most recently written. Safe for threads and processes.

    Raises:
        IndexDamagedError: from any method, when the database is not what we wrote.
        IndexUnavailableError: from any method, when it cannot be used now.
    """

    def __init__(self, folder: Path, checksums: Checksums = PLAIN) -> None:
        self._lock, self._checksums = threading.RLock(), checksums
        self._open: AbstractContextManager[Any] | None = None  # the transaction of the thread that has the lock
        with _translated():
            check_plain(folder)
            if not (folder / "cache.db").exists():  # closing one that is open here would lose the locks that SQLite has on it
                with suppress(FileExistsError):
                    os.close(open_file(folder / "cache.db", os.O_RDWR | os.O_CREAT | os.O_EXCL))  # its other files get the same mode
            if not is_free(folder, QUIET_S):  # diskcache would try for a minute
                raise IndexHeldError()
            check_database(folder)
            self._rows: Any = Connected(str(folder), timeout=QUIET_S, disk=_Rows, **_SETTINGS)
        refuse_after_fork(self, "_lock", "_rows")

    def get(self, key: str) -> Row | None:
        text = self.text(key)
        return None if text is None else self.parsed(key, text)

    def parsed(self, key: str, text: str) -> Row:
        """The row of what :meth:`text` gave."""
        return self.unpacked(key, text, self._checksums)

    def text(self, key: str) -> str | None:
        """A row as it is stored. Equal texts are equal rows."""
        with _translated():
            text: str | None = self._rows.get(key)
        return text

    def set(self, key: str, row: Mapping[str, Any]) -> str:
        """Write a row in its place, or as the most recent one if it is new; its text."""
        text = self.packed(key, row, self._checksums)
        with self._lock, _translated():
            self._rows.set(key, text)
        return text

    def move_to_end(self, key: str, row: Mapping[str, Any]) -> None:
        """Write a row as the most recent one. Inside a :meth:`transaction`."""
        with self._lock, _translated():
            self._rows.delete(key)
            self._rows.set(key, self.packed(key, row, self._checksums))

    def delete(self, key: str) -> None:
        with self._lock, _translated():
            self._rows.delete(key)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside, or none; other processes wait."""
        with self._lock, unforked():
            self._roll_back(self._open)  # what an interrupt has left open
            transaction = self._open = self._rows.transact()
            try:
                with _translated():
                    transaction.__enter__()
                yield
                with _translated():
                    transaction.__exit__(None, None, None)
                self._open = None
            except BaseException:
                self._roll_back(transaction)
                raise

    def _roll_back(self, transaction: AbstractContextManager[Any] | None) -> None:
        """Whatever failed in a transaction, nothing of it is written and this thread's connection keeps nothing locked."""
        if transaction is not None and transaction is self._open:
            self._open = None
            failed = RuntimeError("rolled back")
            with suppress(Exception):
                transaction.__exit__(RuntimeError, failed, None)
            self._rows.close()

    def keys(self, prefix: str, newest_first: bool = False) -> Iterator[str]:
        """Keys that start with ``prefix``, without it, each once. A row that becomes the most recent one meanwhile comes at the end;
        of the newest first it may be missed, so that they are for who wants some of them alone.
        """
        after, before, seen = 0, _NO_ROW, set[str]()
        while True:
            with _translated():
                some = self._rows.some(after, before, newest_first)
            for _, found, raw in some:
                key = self._rows.disk.get(found, raw)
                if key.startswith(prefix) and key not in seen:
                    seen.add(key)
                    yield key[len(prefix) :]
            if not some:
                return
            after, before = (after, some[-1][0]) if newest_first else (some[-1][0], before)

    def rewrite(self) -> None:
        """Write the database anew: neither free pages nor SQLite's log hold what was deleted, by whatever version.

        Raises:
            IndexHeldError: another process reads or writes; rows are as they were.
        """
        with self._lock, _translated():
            try:
                self._rows._sql("VACUUM")
                ((busy, _, _),) = self._rows._sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except BaseException:
                self._rows.close()  # which keeps nothing locked
                raise
        if busy:
            raise IndexHeldError()

    def close(self) -> None:
        with _translated():
            self._rows.close()

    @staticmethod
    def packed(key: str, row: Mapping[str, Any], checksums: Checksums = PLAIN) -> str:
        """A row as it is stored: a checksum of key and text, then the text."""
        text = json.dumps(row, separators=(",", ":"), default=str)
        return checksums.of("row", key, "\n", text) + text

    @staticmethod
    def unpacked(key: str, packed: str, checksums: Checksums = PLAIN) -> Row:
        """The row.

        Raises:
            IndexDamagedError: its checksum is wrong.
        """
        digits = 2 * checksums.size
        checksum, text = packed[:digits], packed[digits:]
        if not checksums.same(checksums.of("row", key, "\n", text), checksum):
            raise IndexDamagedError(f"the checksum of row {key!r} is wrong")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise IndexDamagedError(f"row {key!r} is not one of ours")
        return row


def check_plain(folder: Path) -> None:
    """Raises:
    IndexDamagedError: what SQLite would open is no file of its own: it would write to wherever it leads.
    """
    for path in (folder / f"cache.db{suffix}" for suffix in ("", "-wal", "-shm", "-journal")):
        with suppress(FileNotFoundError):  # perhaps no more
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise IndexDamagedError(f"{path.name} is no file of its own")


def check_database(folder: Path) -> None:
    """Raises:
    IndexDamagedError: the database holds more than tables of ours.
    """
    with unforked(), closing(connect(folder, QUIET_S)) as database:
        if (odd := oddity(database)) is not None:
            raise IndexDamagedError(odd)


def is_free(folder: Path, wait_s: float = 0.05) -> bool:
    """Whether an index can be written, as far as locks go; waits so long for others."""
    try:
        with unforked(), closing(connect(folder, wait_s)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        return not _is_held(error)
    return True


def _is_held(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        with unforked():
            yield
    except (IndexDamagedError, IndexUnavailableError, ForkedError, UnicodeEncodeError):  # the last is what was asked for
        raise
    except ReplacedError as error:
        raise IndexReplacedError() from error
    except diskcache.Timeout as error:
        cause = error.__context__
        if isinstance(cause, sqlite3.Error) and _is_held(cause):
            raise IndexHeldError() from error
        raise IndexUnavailableError(f"SQLite: {cause}") from error
    except sqlite3.ProgrammingError as error:  # ours: it says nothing of the file
        raise IndexUnavailableError(f"SQLite: {error}") from error
    except sqlite3.Error as error:
        if _is_held(error):
            raise IndexHeldError() from error
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _DAMAGE:
            raise IndexDamagedError(f"SQLite: {error}") from error
        raise IndexUnavailableError(f"SQLite: {error}") from error
    except OSError as error:
        raise IndexUnavailableError(str(error)) from error
    except MemoryError as error:
        raise IndexUnavailableError("no memory to read it") from error
    except Exception as error:  # a damaged setting can fail in any way inside diskcache
        raise IndexDamagedError(f"{type(error).__name__}: {error}") from error
