"""diskcache over connections to SQLite of which none is open while the process is forked."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import diskcache
from diskcache.core import DBNAME

from kvzip_memory.system.forks import before_fork


def connect(folder: Path, wait_s: float) -> sqlite3.Connection:
    """A connection to the database of an index, which is there: SQLite is not to make another one. Whatever thread closes it."""
    address = f"file:{quote(str(folder / DBNAME))}?mode=rw"
    return sqlite3.connect(address, wait_s, isolation_level=None, check_same_thread=False, uri=True)


class ReplacedError(Exception):
    """In the place of the database there is another one, or none."""


class Connected(diskcache.Cache):
    """A cache with a connection for each thread, all of which are closed before a fork and opened again when they are next used; not to
    another database that has come to the same place.

    SQLite keeps in memory, by file, what a process has locked, and takes it for locked in a child, too, whatever that opens: it would
    wait for a transaction of a thread that it has not got, or leave out a lock without which others delete the log it writes to.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._opened: dict[threading.Thread, sqlite3.Connection] = {}
        self._file = _inode(str(args[0]))
        self._pragmas = {key.removeprefix("sqlite_"): value for key, value in options.items() if key.startswith("sqlite_")}
        super().__init__(*args, **options)
        before_fork(self, Connected.close_all)

    @property
    def _con(self) -> sqlite3.Connection:
        thread = threading.current_thread()
        if (con := self._opened.get(thread)) is not None:
            return con
        for other in list(self._opened):
            if not other.is_alive() and (left := self._opened.pop(other, None)) is not None:
                left.close()
        try:
            con = connect(Path(self._directory), self._timeout)
        except sqlite3.OperationalError as error:
            if _inode(self._directory) != self._file:
                raise ReplacedError from error
            raise
        try:
            for name, value in self._pragmas.items():
                with suppress(sqlite3.OperationalError):  # a full disk; those that are of the file are written there
                    con.execute(f"PRAGMA {name} = {value}").fetchall()
            if _inode(self._directory) != self._file:  # now that it is open
                raise ReplacedError
        except BaseException:
            con.close()
            raise
        self._opened[thread] = con
        return con

    PAGE = 100  # rows that are read at once

    def some(self, after: int, before: int, newest_first: bool) -> list[tuple[int, Any, Any]]:
        """Number, key and whether it is as it was given, of at most a page of rows between two numbers.

        diskcache's own iteration keeps its connection from one hundred to the next.
        """
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT rowid, key, raw FROM Cache WHERE ? < rowid AND rowid < ? ORDER BY rowid {order} LIMIT {self.PAGE}"
        return list(self._sql(query, (after, before)).fetchall())

    def close(self) -> None:
        """Close the connection of this thread."""
        if (con := self._opened.pop(threading.current_thread(), None)) is not None:
            con.close()

    def close_all(self) -> None:
        """Close the connections of all threads; none is being used."""
        while self._opened:
            self._opened.popitem()[1].close()


def _inode(folder: str) -> int | None:
    try:
        return os.lstat(os.path.join(folder, DBNAME)).st_ino
    except OSError:
        return None
