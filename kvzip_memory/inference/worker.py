"""The thread that computes.

Everything a model computes is computed by one thread of its own, first come first served. Two forwards at once would only fight for the
same cores, and every thread that computes has threads of its own, see :mod:`kvzip_memory.system.threads`.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, ClassVar, TypeVar

from kvzip_memory.errors import KVzipError
from kvzip_memory.system.threads import release

T = TypeVar("T")


class Worker:
    """One thread that does what it is given, in order. Another engine's lets its OpenMP threads go when this one begins.

    An executor would refuse new work as soon as the main thread has ended, although others still wait for their answers.
    """

    _last: ClassVar[weakref.ref[Worker] | None] = None  # the one that was given something last
    _queues: ClassVar[weakref.WeakKeyDictionary[threading.Thread, SimpleQueue[Any]]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work_through, args=(self._queue,), name="kvzip", daemon=True)
        self._thread.start()
        Worker._queues[self._thread] = self._queue
        weakref.finalize(self, self._queue.put, None)

    def check(self) -> None:
        """Raises:
        KVzipError: Python ends.
        """
        if not self._thread.is_alive():
            raise KVzipError("Python is ending, and the thread that computes has ended; wait for answers before")

    def submit(self, work: Callable[[], T]) -> Future[T]:
        self.check()
        last, Worker._last = Worker._last() if Worker._last else None, weakref.ref(self)
        if last is not None and last is not self:
            last._queue.put((Future(), release))
        future: Future[T] = Future()
        self._queue.put((future, work))
        return future

    def run(self, work: Callable[[], T]) -> T:
        """What ``work`` gives or raises. An interrupted caller waits until what has begun has ended."""
        release()
        future = self.submit(work)
        try:
            return future.result()
        finally:
            if not future.cancel():
                wait([future])


def _work_through(queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := queue.get()) is not None:
        future, work = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
        del item, future, work  # they may hold on to an engine


@atexit.register
def _end_workers() -> None:
    """Let what is computed end before torch is taken down. Threads that might wait for it have ended by then."""
    for thread, queue in [*Worker._queues.items()]:
        queue.put(None)
        thread.join()
