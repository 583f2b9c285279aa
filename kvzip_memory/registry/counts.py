"""What has happened since a registry was made."""

from __future__ import annotations

import threading
from collections import Counter

from kvzip_memory.system.forks import refuse_after_fork


class Counts:
    """Numbers by name, under a lock of their own: it is taken last, and nothing is waited for with it held."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()
        refuse_after_fork(self, "_lock")

    def add(self, what: str, n: int = 1) -> None:
        with self._lock:
            self._numbers[what] += n

    def now(self) -> Counter[str]:
        """All of them, of one moment."""
        with self._lock:
            return Counter(self._numbers)
