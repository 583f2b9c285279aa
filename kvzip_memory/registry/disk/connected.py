"""diskcache over connections to SQLite of which none is open while the process is forked."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import DBNAME

from kvzip_memory.system.forks import before_fork


class Connected(diskcache.Cache):
    """A cache with a connection for each thread, all of which are closed before a fork and opened again when they are next used.

    SQLite keeps in memory, by file, what a process has locked, and takes it for locked in a child, too, whatever that opens: it would
    wait for a transaction of a thread that it has not got, or leave out a lock without which others delete the log it writes to.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._opened: dict[threading.Thread, sqlite3.Connection] = {}
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
        path = Path(self._directory, DBNAME)
        con = self._opened[thread] = sqlite3.connect(path, self._timeout, isolation_level=None, check_same_thread=False)
        with suppress(sqlite3.OperationalError):  # it has no settings yet
            for key, value in con.execute("SELECT key, value FROM Settings").fetchall():
                if key.startswith("sqlite_"):
                    self.reset(key, value, update=False)
        return con

    def close(self) -> None:
        """Close the connection of this thread."""
        if (con := self._opened.pop(threading.current_thread(), None)) is not None:
            con.close()

    def close_all(self) -> None:
        """Close the connections of all threads; none is being used."""
        while self._opened:
            self._opened.popitem()[1].close()
