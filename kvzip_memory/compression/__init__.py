"""Building a context: prefill -> score -> allocate -> evict."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.evict import evict
from kvzip_memory.compression.prefill import Prefilled, Progress, prefill
from kvzip_memory.compression.scorers import Scorer
from kvzip_memory.context import RaggedLayer, storage_nbytes
from kvzip_memory.errors import ModelError

__all__ = ["Compressed", "Prefilled", "Progress", "compress", "prefill"]


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` gives.

    Attributes:
        layers: the kept pairs.
        dense_nbytes: storage of the dense cache before eviction.
        ms: milliseconds of ``score`` (0 at ratio 1.0) and ``evict``.
    """

    layers: tuple[RaggedLayer, ...]
    dense_nbytes: int
    ms: dict[str, float]


def compress(prefilled: Prefilled, ratio: float, scorer: Scorer, allocator: str, progress: Progress) -> Compressed:
    """Keep the most important ``round(ratio * L * H * n)`` pairs and free the rest. Empties ``prefilled.cache``.

    At ratio 1.0 everything is kept and nothing is scored.

    Raises:
        ModelError: the model gave scores that are not finite.
    """
    full, n = prefilled.full_layers, len(prefilled.token_ids)
    layers = prefilled.cache.layers
    dense_nbytes = storage_nbytes([t for layer in layers for t in (layer.keys, layer.values)])
    shape = (len(full), layers[full[0]].keys.shape[1], n)
    began = time.perf_counter()
    if ratio == 1.0:
        scores, keep = None, torch.ones(shape, dtype=torch.bool)
    else:
        # Rounded before they are compared: dropping more pairs of a stored context later keeps the same ones as
        # building at that ratio would.
        scores = scorer.score(prefilled, progress).half()
        if not bool(scores.isfinite().all()):
            raise ModelError(
                "the model's attention gave scores that are not finite (usually float16 overflow); load the model in bfloat16 or float32"
            )
        for start, end in ((0, prefilled.protected), *prefilled.keep):
            scores[:, :, start:end] = float("inf")
        keep = ALLOCATORS[allocator](scores, round(ratio * scores.numel()))
    scored = time.perf_counter()
    ragged = evict(prefilled.cache, keep, scores, prefilled.model.windows, n)
    ms = {"score": 1e3 * (scored - began), "evict": 1e3 * (time.perf_counter() - scored)}
    return Compressed(tuple(ragged), dense_nbytes, ms)
