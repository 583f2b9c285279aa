"""Locks between processes, and waits that say after a second what they wait for."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from filelock import FileLock, Timeout

from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.private import check_file, make_folder, open_file, usable

logger = logger_of(__name__)

#: Who waits longer than that is told what for.
QUIET_S = 1.0
_POLL_S = 0.005  # of a lock that is held for a write


class Notice:
    """A warning, once, when a wait has lasted for more than :data:`QUIET_S`."""

    def __init__(self, text: str, *values: object) -> None:
        self._text, self._values = text, values
        self._due: float | None = time.monotonic() + QUIET_S

    def look(self) -> None:
        """To be called now and then while waiting."""
        if self._due is not None and time.monotonic() >= self._due:
            self._due = None
            logger.warning(self._text, *self._values)


def lock_in(cache_dir: Path, name: str) -> FileLock:
    """The lock of that name in a folder, for threads and processes alike. It goes with the process that holds it, however that ends."""
    folder = cache_dir / "locks"
    make_folder(folder)
    return FileLock(folder / f"{name}.lock", thread_local=False, mode=0o600)


@contextmanager
def held(lock: FileLock | SharedLock, doing: str, timeout: float = -1) -> Iterator[None]:
    """Runs the block with a file lock; says so if another process holds it for more than a second.

    Args:
        doing: what that process is likely to do with it.
        timeout: seconds to wait for it; below 0 for ever.

    Raises:
        Timeout: it is still held.
        StorageError: what is in its place is no file of ours, or one that we may not lock.
    """
    check_file(Path(lock.lock_file))
    quiet = QUIET_S if timeout < 0 else min(QUIET_S, timeout)
    with usable(Path(lock.lock_file)):
        try:
            lock.acquire(timeout=quiet, poll_interval=_POLL_S)
        except Timeout:
            if quiet == timeout:
                raise
            logger.warning("waiting for another process, which is %s (it holds %s)", doing, lock.lock_file)
            lock.acquire(timeout=timeout if timeout < 0 else timeout - quiet, poll_interval=_POLL_S)
    try:
        yield
    finally:
        lock.release()


class SharedLock:
    """A file lock that any number hold together, who only read. They wait for whoever has a :class:`FileLock` of the file, and it for them.

    Args:
        path: of the file, which is made if it is not there.
    """

    def __init__(self, path: str) -> None:
        self.lock_file, self._descriptor = path, -1

    def acquire(self, timeout: float = -1, poll_interval: float = 0.05) -> None:
        """Raises:
        Timeout: another process has it.
        """
        deadline, descriptor = time.monotonic() + timeout, open_file(Path(self.lock_file), os.O_RDWR | os.O_CREAT)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    self._descriptor = descriptor
                    return
                except BlockingIOError:
                    if timeout >= 0 and time.monotonic() >= deadline:
                        raise Timeout(self.lock_file) from None
                    time.sleep(poll_interval)
        except BaseException:
            os.close(descriptor)
            raise

    def release(self) -> None:
        os.close(self._descriptor)


class Together:
    """A file lock that the threads of one process hold together: the first takes it, the last gives it back."""

    def __init__(self, lock: FileLock) -> None:
        self._lock, self._mutex, self._holds = lock, threading.Lock(), WeakSet[Hold]()
        refuse_after_fork(self, "_mutex")

    def take(self, hold: Hold) -> bool:
        with self._mutex:
            if not self._lock.is_locked:
                check_file(Path(self._lock.lock_file))
                try:
                    self._lock.acquire(timeout=0)
                except Timeout:
                    return False
            self._holds.add(hold)
            return True

    def give_back(self, hold: Hold) -> None:
        with self._mutex:
            self._holds.discard(hold)
            if not self._holds and self._lock.is_locked:
                self._lock.release()


class Hold:
    """One thread's part in a lock held :class:`Together`; it goes with the object, if nobody gives it back."""

    def __init__(self, lock: Together) -> None:
        self._lock = lock
        self.mine = False

    def acquire(self) -> bool:
        """Take part if no other process has the lock.

        Raises:
            OSError: the file system does not lock.
        """
        self.mine = self._lock.take(self)
        return self.mine

    def release(self) -> None:
        self.mine = False
        self._lock.give_back(self)
