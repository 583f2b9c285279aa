"""Guessing the next tokens from what has been read (prompt lookup, Saxena 2023): answers often quote their context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Tokens that must have occurred in this order before, for what followed to be a guess. transformers' candidate
#: generator goes down to one token, which is nearly always found and seldom right.
NGRAM = 3
#: Longest guess.
MOST = 16
#: What a guessed token adds to the time of a step, by device. On two cores 1, 4, 8 and 16 more tokens took 0.2, 0.6, 1.0 and 1.3
#: steps more (SmolLM2). Not measured while answering, so that an answer is the same to the last bit every time.
COST = {"cpu": 0.12}
GPU_COST = 0.05
#: How much of the answer's time may be lost by wrong guesses.
RISK = 0.05


class PromptLookup:
    """The tokens of one answer and of all it can see.

    Guesses grow while they are right and shrink while they are wrong, and are made only as long as all of them together
    have cost no more than they saved and a twentieth of the answer's steps. What a grammar forces is guessed until a
    model has spelled it otherwise once too often.

    Args:
        ids: context, conversation and question.
        device: what computes the steps, ``"cpu"`` or another.
    """

    def __init__(self, ids: NDArray[Any], device: str) -> None:
        self._ids = ids.astype(np.int64)
        self._length = len(self._ids)
        self._size = 4
        self._credit = 0.0  # steps that may be spent
        self._cost = COST.get(device, GPU_COST)

    def append(self, ids: Sequence[int]) -> None:
        """What the answer has said since."""
        end = self._length + len(ids)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids[: self._length], np.empty(end, dtype=np.int64)])
        self._ids[self._length : end] = ids
        self._length = end
        self._credit += RISK * len(ids)

    def guess(self, limit: int, forced: Sequence[int] = ()) -> list[int]:
        """What the grammar leaves to follow, or what followed the last tokens where they last occurred before; often nothing."""
        if forced and self._credit >= 0:  # a model that spells it otherwise is not asked again
            return list(forced[: min(limit, MOST)])
        size = min(self._size, limit, int(self._credit / self._cost + 1e-6))
        ids = self._ids[: self._length]
        if size < 1 or len(ids) <= NGRAM:
            return []
        found = np.ones(len(ids) - NGRAM, dtype=bool)
        for i in range(NGRAM):
            found &= ids[i : len(ids) - NGRAM + i] == ids[len(ids) - NGRAM + i]
        starts = found.nonzero()[0]
        if not len(starts):
            return []
        start = int(starts[-1]) + NGRAM
        return ids[start : start + size].tolist()

    def learn(self, guessed: int, right: int) -> None:
        """How many of the guessed tokens were right."""
        self._credit += right - self._cost * guessed
        if guessed and right == guessed:
            self._size = min(2 * self._size, MOST)
        elif guessed:
            self._size = max(self._size // 2, 1)
