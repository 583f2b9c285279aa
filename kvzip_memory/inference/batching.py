"""Answers of many threads, decoded together.

Everything a model computes is computed by one thread of its own, first come first served: steps of answers, a forward for
all of them that wait, and chunks of builds in turn. Two forwards at once would only fight for the same cores, and every
thread that computes has threads of its own, see :mod:`kvzip_memory.system.threads`.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from kvzip_memory.errors import InputError, KVzipError, QueueFullError
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.system.calls import Gate, has_place, pass_through
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.threads import release

T = TypeVar("T")

#: A step waits for the rows of the last one to come back with their next token, at most so many seconds, or this
#: fraction of the time that step took.
GATHER_S, GATHER_FRACTION = 0.004, 0.1


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


#: From a row's logits ``[n, vocab]`` fp32 to its next tokens; runs on the model's thread.
Choose = Callable[[Tensor], list[int]]


@dataclass(eq=False)
class _Request:
    """Tokens to be fed to a row; the logits after the last ``n_logits`` of them are wanted."""

    row: Row
    ids: Sequence[int]
    n_logits: int
    choose: Choose
    chosen: Future[list[int]] = field(default_factory=Future)

    @property
    def decodes(self) -> bool:
        """Whether it is a step of an answer, not a part of a question."""
        return len(self.ids) == self.n_logits


#: Feeds rows their ids and gives logits ``[n_logits, vocab]`` of each, as many as the row that wants most.
Forward = Callable[[Sequence[Row], Sequence[Sequence[int]], int], list[Tensor]]


class Batcher:
    """Merges the steps that threads ask for at one time into one forward. Rows join and leave with every step.

    Args:
        forward: see :data:`Forward`.
        worker: where forwards run.
        padded_tokens: limit of rows times longest row in one forward of questions.
    """

    def __init__(self, forward: Forward, worker: Worker, padded_tokens: int) -> None:
        self._forward, self._worker, self._padded_tokens = forward, worker, padded_tokens
        self._changed = threading.Condition()
        refuse_after_fork(self, "_changed", "_worker")
        self._waiting: list[_Request] = []
        self._scheduled = False
        self._expected: set[Tail] = set()  # of the rows of the last forwards, those that have not come back
        self._patience = GATHER_S

    def step(self, row: Row, ids: Sequence[int], n_logits: int, choose: Choose) -> list[int]:
        """Feed a row its next tokens, together with whoever else waits; what ``choose`` makes of its logits."""
        self._worker.check()
        request = _Request(row, ids, n_logits, choose)
        release()
        with self._changed:
            self._waiting.append(request)
            self._expected.discard(row.tail)
            self._schedule()
            self._changed.notify()
        try:
            return request.chosen.result()
        except BaseException:  # KeyboardInterrupt: leave the queue; if under way, let that end, it writes into the row
            with self._changed:
                under_way = request not in self._waiting
                if not under_way:
                    self._waiting.remove(request)
            if under_way:
                wait([request.chosen])
            raise

    def leave(self, tail: Tail) -> None:
        """An answer has ended: its row will not come back, nobody need wait for it."""
        with self._changed:
            self._expected.discard(tail)
            self._changed.notify()

    def _schedule(self) -> None:
        """Have what waits computed. With the lock held."""
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._worker.submit(self._work)

    def _work(self) -> None:
        """One step of all answers and then as many questions as fit into one forward, on the worker.

        In this order rows have the time of the questions to come back for the next step. Between two steps there is at most
        one forward of questions and, in the worker's queue, one chunk of a build.
        """
        with self._changed:
            self._gather()
            self._expected.clear()
            answers = self._taken([request for request in self._waiting if request.decodes])
        began = time.monotonic()
        self._compute(answers)
        with self._changed:
            questions = self._taken(self._fitting([request for request in self._waiting if not request.decodes]))
        self._compute(questions)
        with self._changed:
            self._patience = max(GATHER_S, GATHER_FRACTION * (time.monotonic() - began))
            self._scheduled = False
            self._schedule()

    def _gather(self) -> None:
        """Give the rows of the last forwards a moment to come back. With the lock held."""
        deadline = time.monotonic() + self._patience
        while self._expected and (remaining := deadline - time.monotonic()) > 0:
            self._changed.wait(remaining)

    def _taken(self, batch: list[_Request]) -> list[_Request]:
        """The batch, which waits no longer. With the lock held."""
        self._waiting = [request for request in self._waiting if request not in batch]
        return batch

    def _fitting(self, questions: list[_Request]) -> list[_Request]:
        """Those that came first, as many as fit."""
        width = 0
        for n, request in enumerate(questions):
            width = max(width, len(request.ids))
            if n and width * (n + 1) > self._padded_tokens:
                return questions[:n]
        return questions

    def _compute(self, batch: list[_Request]) -> None:
        """One forward for a batch, whose threads go on with what comes of it."""
        results = self._computed(batch)
        with self._changed:
            self._expected.update(request.row.tail for request in batch)
        for request, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                request.chosen.set_exception(result)
            else:
                request.chosen.set_result(result)

    def _computed(self, batch: list[_Request]) -> list[list[int] | Exception]:
        """Next tokens of each row, or what went wrong with it."""
        if not batch:
            return []
        try:
            n_logits = max(request.n_logits for request in batch)
            logits = self._forward([r.row for r in batch], [r.ids for r in batch], n_logits)
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [result for request in batch for result in self._computed([request])]  # whoever fails, fails alone
        return [_chosen(request, row_logits) for request, row_logits in zip(batch, logits, strict=True)]


def _chosen(request: _Request, logits: Tensor) -> list[int] | Exception:
    try:
        return request.choose(logits[-request.n_logits :])
    except Exception as error:
        return error
