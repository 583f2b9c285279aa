"""Who may run: so many at a time, and so many that wait for their turn, in order."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue

from kvzip_memory.errors import InputError, QueueFullError
from kvzip_memory.system.calls import Gate, has_place, pass_through
from kvzip_memory.system.forks import refuse_after_fork


@dataclass(eq=False)
class Place:
    """Where one of those runs that an :class:`Admission` lets in, or the wait for it.

    Attributes:
        entry: opened when it is its turn, or by somebody else who wants it to wait no longer.
        begin: what happens when it is its turn.
        held: whether it is one of those that run.
    """

    admission: Admission
    entry: Gate
    begin: Callable[[], object]
    held: bool = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """Another one may run while the block does. Who comes back is the next, before all that have not begun; not if the block fails."""
        admission = self.admission
        admission.part(self, away=True)
        try:
            yield
        except BaseException:
            admission.part(self)
            raise
        admission.wait(self, back=True)


class Admission:
    """How many run at once and how many may wait for their turn, first come first served.

    Raises:
        InputError: limits that let nothing run.
        QueueFullError: on entering, when ``running`` run and ``waiting`` wait, for their turn or for something else meanwhile, those that
            wait for a thread included. Who has waited for a thread is not refused any more.
    """

    _what = "answers"
    _threads: Places | None = None

    def __init__(self, running: int, waiting: float = math.inf) -> None:
        if running < 1 or waiting < 0:
            raise InputError(f"max_running is {running} and max_waiting {waiting}; at least one answer must run, and none or more may wait")
        self._limit, self._queue_limit = running, waiting
        self._lock = threading.RLock()  # collecting garbage may end an answer on the thread that holds it
        self._running = 0
        refuse_after_fork(self, "_lock")
        # Since when each waits, the oldest first: for its turn, to go on, and for something else.
        self._queue, self._back = OrderedDict[Place, float](), OrderedDict[Place, float]()
        self._away: dict[Place, float] = {}

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> list[float]:
        """Since when each answer waits, on the monotonic clock."""
        with self._lock:
            return [*self._queue.values(), *self._back.values(), *self._away.values()]

    def _waits(self) -> int:
        threads = self._threads
        return len(self._queue) + len(self._back) + len(self._away) + (0 if threads is None else len(threads._queue))

    def _full(self, waits: int) -> QueueFullError:
        return QueueFullError(
            f"{self._running} {self._what} are running and {waits} wait, which is the limit; "
            "ask again later, give a batch a max_concurrency, or make the engine with a larger max_waiting"
        )

    @contextmanager
    def admitted(self, entry: Gate | None = None) -> Iterator[Place]:
        """Runs the block when it is its turn; before that, and not as one of those that run, if somebody else opens its ``entry``."""
        gate = SimpleQueue() if entry is None else entry
        place = Place(self, gate, lambda: gate.put(None))
        try:
            self.wait(place)
            yield place
        finally:
            self.part(place)

    def wait(self, place: Place, back: bool = False) -> None:
        with self._lock:
            waits = self._waits()
            if not (back or has_place()) and self._running >= self._limit and waits >= self._queue_limit:
                raise self._full(waits)
            since = self._away.pop(place, None) or time.monotonic()
            (self._back if back else self._queue)[place] = since
            self._advance()
        try:
            pass_through(place.entry)
        finally:
            with self._lock:
                self._queue.pop(place, None)
                self._back.pop(place, None)

    def part(self, place: Place, away: bool = False) -> None:
        """It runs no longer, or waits ``away`` for something else."""
        with self._lock:
            self._away.pop(place, None)
            if away:
                self._away[place] = time.monotonic()
            if place.held:
                place.held = False
                self._running -= 1
            self._advance()

    def _advance(self) -> None:
        """Let those run whose turn it is. With the lock held, and perhaps once more within itself, when garbage is collected."""
        while self._running < self._limit:
            self._running += 1
            place = self._next()
            if place is None:
                self._running -= 1
                return
            place.held = True
            place.begin()

    def _next(self) -> Place | None:
        for waits in (self._back, self._queue):
            with suppress(KeyError):
                return waits.popitem(last=False)[0]
        return None


#: What is run in a thread; it gets its place if it may leave that to wait for memory.
Work = Callable[[Place | None], object]


class Places(Admission):
    """Runs work in threads of its own, so much of it at a time; the rest waits for its turn, without threads.

    Args:
        running: pieces of work at a time.
        waiting: pieces of work that may wait for their turn.
        away: so many threads may have left their places to wait for memory before no more begin. None has them keep their places: for
            work that holds locks meanwhile, for which others may wait in theirs.
        admission: what the threads then wait for: both have one count of what waits.
    """

    _what = "async calls"

    def __init__(self, running: int, waiting: float = math.inf, away: int | None = None, admission: Admission | None = None) -> None:
        super().__init__(running, waiting)
        self._most_away, self._admission = away, admission
        if admission is not None:
            self._lock, admission._threads = admission._lock, self
        self._served: set[Place] = set()  # whose callers have what they waited for, and which leave their places just now

    @property
    def waiting(self) -> list[float]:
        """Since when each piece of work waits, on the monotonic clock."""
        with self._lock:
            return list(self._queue.values())

    def start(self, work: Work, failed: Callable[[BaseException], object]) -> Place:
        """Have work done, which gets the place that it may leave; ``failed`` is told if no thread can be started.

        Raises:
            QueueFullError: as much runs and waits as may.
        """
        gate = SimpleQueue[None]()
        place = Place(self, gate, lambda: self._begin(place, work, failed))
        admission = self._admission or self
        with self._lock:
            most, waits = self._queue_limit + len(self._served), admission._waits() if admission is not self else len(self._queue)
            if admission is not self and admission._running >= admission._limit and waits >= most:
                raise admission._full(waits)
            self._queue[place] = time.monotonic()
            self._advance()
            if place in self._queue and waits >= most:
                del self._queue[place]
                raise self._full(waits)
        return place

    def check_takes(self, count: int) -> None:
        """Raises:
        QueueFullError: of so many pieces of work given at one time some would be refused, whoever else is there.
        """
        if count > self._limit + self._queue_limit:
            raise QueueFullError(
                f"{count:,} calls at one time are more than the {self._limit:,} that run and the {self._queue_limit:,} that may wait; give "
                "fewer, or max_concurrency, or make the engine with a larger max_waiting"
            )

    def withdraw(self, place: Place) -> None:
        """Nobody waits for work any more; if its turn has not come it never does."""
        with self._lock:
            if self._queue.pop(place, None) is None and place.held:
                self._served.add(place)

    def _begin(self, place: Place, work: Work, failed: Callable[[BaseException], object]) -> None:
        place.begin = lambda: place.entry.put(None)  # when it comes back
        try:
            threading.Thread(target=self._run, args=(place, work), name="kvzip-answer", daemon=True).start()
        except RuntimeError as error:  # no more threads, or Python ends
            place.held = False
            self._running -= 1
            failed(error)

    def _run(self, place: Place, work: Work) -> None:
        try:
            work(None if self._most_away is None else place)
        finally:
            with self._lock:
                self.part(place)
                self._served.discard(place)

    def _next(self) -> Place | None:
        return super()._next() if self._back or len(self._away) <= (self._most_away or 0) else None
