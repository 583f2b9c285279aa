"""Answers of many threads, decoded together.

There is no worker thread. Whoever needs a step while nobody computes one computes it for all who wait (flat combining,
Hendler et al. 2010): nothing to start, to stop, or to die, and a lone caller pays nothing. Rows join and leave with
every step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from kvzip_memory.cache import Row
from kvzip_memory.errors import QueueFullError

#: Longest wait for the rows of the last step to come back with their next token, before a step goes without them.
GATHER_S = 0.004


class FairLock:
    """A lock that goes to who has waited longest. Python's may be taken again and again by one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> FairLock:
        with self._lock:
            if not self._held:
                self._held = True
                return self
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # it stays held, by the next one
            else:
                self._held = False


class Admission:
    """How many answers run at once and how many may wait for their turn, first come first served.

    Raises:
        QueueFullError: on entering, when ``running`` answers run and ``waiting`` wait.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._limit, self._queue_limit = running, waiting
        self._lock = threading.Lock()
        self._running = 0
        self._queue: deque[threading.Event] = deque()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Runs the block when it is its turn."""
        turn = None
        with self._lock:
            if self._running < self._limit:
                self._running += 1
            elif len(self._queue) < self._queue_limit:
                turn = threading.Event()
                self._queue.append(turn)
            else:
                raise QueueFullError(
                    f"{self._running} answers are running and {len(self._queue)} wait, which is the limit; "
                    "ask again later, or make the engine with a larger max_waiting"
                )
        if turn is not None:
            turn.wait()
        try:
            yield
        finally:
            with self._lock:
                if self._queue:
                    self._queue.popleft().set()
                else:
                    self._running -= 1


class _Request:
    """Tokens to be fed to a row; done when there are logits or an error."""

    def __init__(self, row: Row, ids: Sequence[int]) -> None:
        self.row, self.ids = row, ids
        self.logits: Tensor | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.logits is not None or self.error is not None


class Batcher:
    """Merges the steps that threads ask for at one time into one forward.

    Args:
        forward: feeds rows their ids, ``forward(rows, ids)``, and gives logits a row.
        padded_tokens: limit of rows times longest row in one forward of questions.
    """

    def __init__(self, forward: Callable[[Sequence[Row], Sequence[Sequence[int]]], list[Tensor]], padded_tokens: int) -> None:
        self._forward, self._padded_tokens = forward, padded_tokens
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._leading = False
        self._expected = 0  # rows of the last step that have not come back
        self._questions_turn = True

    def step(self, row: Row, ids: Sequence[int]) -> Tensor:
        """Feed a row its next tokens, together with whoever else waits; logits ``[vocab]`` fp32 of the last one."""
        request = _Request(row, ids)
        with self._changed:
            self._waiting.append(request)
            self._expected -= 1
            self._changed.notify_all()
            try:
                while not request.done:
                    if self._leading:
                        self._changed.wait()
                    else:
                        self._lead()
            except BaseException:  # KeyboardInterrupt: leave the queue; if under way, let that end, it writes into the row
                if request in self._waiting:
                    self._waiting.remove(request)
                while self._leading and not request.done:
                    self._changed.wait()
                raise
        if request.error is not None:
            raise request.error
        assert request.logits is not None
        return request.logits

    def _lead(self) -> None:
        """Compute one step for all who wait. With the lock held, but for the computing itself."""
        self._leading = True
        batch: list[_Request] = []
        try:
            self._gather()
            batch = self._taken()
            self._changed.release()
            try:
                self._run(batch)
            finally:
                self._changed.acquire()
        finally:
            self._waiting[:0] = [request for request in batch if not request.done]  # after a KeyboardInterrupt
            self._expected, self._leading = len(batch), False
            self._changed.notify_all()

    def leave(self) -> None:
        """An answer has ended: its row will not come back, nobody need wait for it."""
        with self._changed:
            self._expected -= 1
            self._changed.notify_all()

    def _gather(self) -> None:
        """Give the rows of the last step a moment to come back. With the lock held."""
        deadline = time.monotonic() + GATHER_S
        while self._expected > 0 and (remaining := deadline - time.monotonic()) > 0:
            self._changed.wait(remaining)

    def _taken(self) -> list[_Request]:
        """The next batch: all rows that decode, or questions, in turn. With the lock held."""
        decoding = [r for r in self._waiting if len(r.ids) == 1]
        questions = [r for r in self._waiting if len(r.ids) > 1]
        batch: list[_Request] = []
        if questions and (self._questions_turn or not decoding):
            width = 0
            for request in questions:  # in the order they came
                width = max(width, len(request.ids))
                if batch and width * (len(batch) + 1) > self._padded_tokens:
                    break
                batch.append(request)
        else:
            batch = decoding
        self._questions_turn = batch is decoding
        taken = {id(request) for request in batch}
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        return batch

    def _run(self, batch: list[_Request]) -> None:
        try:
            logits = self._forward([r.row for r in batch], [r.ids for r in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            for request in batch:  # whoever fails, fails alone
                self._run([request])
            return
        for request, row_logits in zip(batch, logits, strict=True):
            request.logits = row_logits[0]
