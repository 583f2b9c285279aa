"""Building a context: prefill -> score -> allocate -> evict."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.evict import evict
from kvzip_memory.compression.prefill import DensePairs, Prefilled, Progress, prefill, prefill_behind
from kvzip_memory.compression.scorers import Scorer
from kvzip_memory.context import RaggedLayer
from kvzip_memory.errors import ModelError

__all__ = ["Compressed", "DensePairs", "Prefilled", "Progress", "compress", "prefill", "prefill_behind"]


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` gives.

    Attributes:
        layers: the kept pairs.
        dense_nbytes: storage of the dense pairs before eviction, without a parent's.
        ms: milliseconds of ``score`` (0 where nothing is scored) and ``evict``.
    """

    layers: tuple[RaggedLayer, ...]
    dense_nbytes: int
    ms: dict[str, float]


def compress(prefilled: Prefilled, ratio: float, scorer: Scorer, allocator: str, progress: Progress) -> Compressed:
    """Keep the most important ``round(ratio * L * H * n)`` pairs and free the rest. Empties ``prefilled.dense``.

    Pairs of a parent compete with their stored scores; what it has evicted stays evicted. At ratio 1.0 everything is kept
    and nothing is scored, unless the parent has scores.

    Raises:
        ModelError: the model gave scores that are not finite.
    """
    full, n, start = prefilled.full_layers, len(prefilled.token_ids), prefilled.start
    shape = (len(full), prefilled.dense[full[0]][0].shape[0], n)
    dense_nbytes = sum(_nbytes(*pairs, window, start, n) for pairs, window in zip(prefilled.dense, prefilled.model.windows, strict=True))
    began = time.perf_counter()
    if ratio == 1.0 and not prefilled.scored_parent:
        scores, keep = None, torch.ones(shape, dtype=torch.bool)
    else:
        # Rounded before they are compared: dropping more pairs of a stored context later keeps the same ones as
        # building at that ratio would.
        scores = scorer.score(prefilled, progress).half()
        if not bool(scores.isfinite().all()):
            raise ModelError(
                "the model's attention gave scores that are not finite (usually float16 overflow); load the model in bfloat16 or float32"
            )
        if prefilled.scored_parent:
            scores[:, :, :start] = torch.stack([prefilled.parent[i].dense_scores(start) for i in full])
        for first, end in ((0, prefilled.protected), *prefilled.keep):
            scores[:, :, first:end] = float("inf")
        keep = ALLOCATORS[allocator](scores, round(ratio * scores.numel())) & ~scores.isneginf()
    scored = time.perf_counter()
    ragged = evict(prefilled, keep, scores)
    ms = {"score": 1e3 * (scored - began), "evict": 1e3 * (time.perf_counter() - scored)}
    return Compressed(tuple(ragged), dense_nbytes, ms)


def _nbytes(keys: Tensor, values: Tensor, window: int | None, start: int, n: int) -> int:
    """Bytes that a layer's dense cache of ``n`` tokens has more than that of ``start``."""
    tokens = n - start if window is None else min(n, window - 1) - min(start, window - 1)
    return tokens * (keys.nbytes + values.nbytes) // keys.shape[1]
