"""The index is written anew behind those who delete contexts: once for all that are deleted in one go."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import partial

from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.disk.names import Label
from kvzip_memory.system.forks import refuse_after_fork

_QUIET_S, _LATEST_S = 1.0, 30.0  # seconds without a deletion, and how long the first may wait for them
_SAME_CLOCK_S = 0.5  # between two looks at a clock that nobody has set


class Cleaning:
    """Overwrites what a folder says of contexts that were deleted, a second after the last of them. Safe for threads.

    What could not be done is tried again at the next deletion, flush or closing. A program that ends waits for it. Of one that is killed
    the index has a note: who opens the folder next does it.
    """

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._due: dict[str, tuple[float, float]] = {}  # by key when its removal began; the empty key: a name was taken away
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._working = threading.Lock()
        refuse_after_fork(self, "_lock", "_working")

    def later(self, key: str, began: tuple[float, float]) -> None:
        """Clean up behind a context whose removal has begun then, see :func:`clocks`; an empty key: behind a name of one that stays."""
        if self._backing.tier is None:
            return
        with self._lock:
            self._due[key] = began
            if self._timer is not None:
                self._timer.cancel()
            waited = clocks()[1] - min(steady for _, steady in self._due.values())
            self._timer = threading.Timer(max(0.0, min(_QUIET_S, _LATEST_S - waited)), self._in_a_thread)
            self._timer.daemon = False  # whatever the thread is that we are called in
            try:
                ended = not threading.main_thread().is_alive()
                if not ended:
                    self._timer.start()
            except RuntimeError:  # the program ends, and no thread can be started
                ended = True
        if ended:
            self.now()

    def now(self) -> None:
        """Do what is to be done, and wait for who does it already."""
        with self._working:
            with self._lock:
                due = dict(self._due)
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            older = partial(_is_older, due)
            if due and self._backing.attempt("clean", lambda disk: disk.clean({*due} - {""}, older)):
                with self._lock:
                    self._due = {key: began for key, began in self._due.items() if due.get(key) is not began}

    def _in_a_thread(self) -> None:
        self.now()
        if (disk := self._backing.tier) is not None:
            disk.close()  # SQLite's connections belong to their threads


def clocks() -> tuple[float, float]:
    """Seconds since the epoch, and by a clock that nobody can set."""
    return time.time(), time.monotonic()


def _is_older(due: Mapping[str, tuple[float, float]], label: Label) -> bool:
    """Whether a name was given before the removal of its context began. If the clock was set since, nobody knows."""
    (wall, steady), began = clocks(), due[label.key]
    return label.loaded < began[0] and abs((wall - steady) - (began[0] - began[1])) < _SAME_CLOCK_S
