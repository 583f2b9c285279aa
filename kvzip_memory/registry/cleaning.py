"""The index is written anew behind those who delete contexts: once for all that are deleted in one go."""

from __future__ import annotations

import threading
import time

from kvzip_memory.registry.backing import Backing
from kvzip_memory.system.forks import refuse_after_fork

_QUIET_S, _LATEST_S = 1.0, 30.0  # seconds without a deletion, and how long the first may wait for them
_MOST = 500  # deletions behind which it is done at once: the index notes the latest thousand


class Cleaning:
    """Overwrites what a folder says of contexts that were deleted, a second after the last of them. Safe for threads.

    What could not be done is tried again at the next deletion, flush or closing. A program that ends waits for it. Of one that is killed
    the index has a note: who opens the folder next does it.
    """

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._asked, self._since = 0, 0.0  # how often it was asked for, and since when it has not been done; 0.0: it has
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._working = threading.Lock()
        refuse_after_fork(self, "_lock", "_working")

    def later(self) -> None:
        """Clean up behind what is deleted now, or was just before."""
        if self._backing.tier is None:
            return
        with self._lock:
            now = time.monotonic()
            self._asked, self._since = self._asked + 1, self._since or now
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(max(0.0, min(_QUIET_S, self._since + _LATEST_S - now)), self._in_a_thread)
            self._timer.daemon = False  # whatever the thread is that we are called in
            try:
                ended = not threading.main_thread().is_alive()
                if not ended:
                    self._timer.start()
                    if self._asked % _MOST == 0:
                        threading.Thread(target=self._in_a_thread, daemon=False).start()
            except RuntimeError:  # the program ends, and no thread can be started
                ended = True
        if ended:
            self.now()

    def now(self) -> None:
        """Do what is to be done, and wait for who does it already."""
        with self._working:
            with self._lock:
                asked, due = self._asked, self._since
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
            if due and self._backing.attempt("clean", lambda disk: disk.clean()):
                with self._lock:
                    if self._asked == asked:
                        self._since = 0.0

    def _in_a_thread(self) -> None:
        self.now()
        if (disk := self._backing.tier) is not None:
            disk.close()  # SQLite's connections belong to their threads
