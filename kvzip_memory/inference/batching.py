"""Answers of many threads, decoded together: a forward for the steps of all that wait, on the thread that computes, and between two of
them chunks of questions and of builds in turn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from torch import Tensor

from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.worker import Worker
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.threads import release

#: A step waits for the rows of the last one to come back with their next token, at most so many seconds, or this
#: fraction of the time that step took.
GATHER_S, GATHER_FRACTION = 0.004, 0.1

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
