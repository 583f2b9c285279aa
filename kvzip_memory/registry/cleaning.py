"""The index is written anew behind those who delete contexts: once for all that are deleted in one go."""

from __future__ import annotations

import threading
import time

from kvzip_memory.registry.backing import Backing
from kvzip_memory.system.forks import refuse_after_fork

_QUIET_S, _LATEST_S = 1.0, 30.0  # seconds without a deletion, and how long the first may wait for them


class Cleaning:
    """Overwrites what a folder says of contexts that were deleted, a second after the last of them. Safe for threads.

    A program that ends waits for it. Of one that is killed the index has a note: who opens the folder next does it.
    """

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._removed: dict[str, float] = {}  # by key, when
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._working = threading.Lock()
        refuse_after_fork(self, "_lock", "_working")

    def later(self, key: str) -> None:
        """Clean up behind a context that was just deleted."""
        if self._backing.tier is None:
            return
        self._backing.attempt("clean", lambda disk: disk.builders.unreport(key))
        with self._lock:
            now = self._removed[key] = time.time()
            if self._timer is not None:
                self._timer.cancel()
            first = min(self._removed.values())
            self._timer = threading.Timer(max(0.0, min(_QUIET_S, first + _LATEST_S - now)), self._in_a_thread)
            self._timer.start()

    def now(self) -> None:
        """Do what is to be done, and wait for who does it already."""
        with self._working:
            with self._lock:
                removed, self._removed = self._removed, {}
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            if removed:
                self._backing.attempt("clean", lambda disk: disk.clean(removed))

    def _in_a_thread(self) -> None:
        self.now()
        if (disk := self._backing.tier) is not None:
            disk.close()  # SQLite's connections belong to their threads
