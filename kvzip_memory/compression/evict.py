"""Step 4 of a build: gather the kept pairs and free the dense cache, layer by layer."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvzip_memory.context import RaggedLayer


def evict(cache: DynamicCache, keep: Tensor, scores: Tensor | None, windows: tuple[int | None, ...], n: int) -> list[RaggedLayer]:
    """Ragged layers of the kept pairs. The dense cache is emptied on the way: at most one layer exists twice.

    Args:
        cache: dense, ``[1, H, n, D]`` a layer.
        keep: ``[L, H, n]`` bool, over the layers with full attention.
        scores: ``[L, H, n]`` fp16 to be stored beside the pairs, or None.
        windows: sliding window of each layer, None for full attention.
        n: tokens of the context.
    """
    layers, full = [], 0
    for layer, window in zip(cache.layers, windows, strict=True):
        if window is not None:
            layers.append(dense_layer(layer, n, window))
        elif bool(keep[full].all()):
            layers.append(dense_layer(layer, n, None, None if scores is None else scores[full]))
            full += 1
        else:
            layers.append(_gather(layer, keep[full], None if scores is None else scores[full]))
            full += 1
        layer.keys = layer.values = None
    _return_freed_pages()
    return layers


def dense_layer(layer: DynamicLayer, n: int, window: int | None, scores: Tensor | None = None) -> RaggedLayer:
    """All pairs of a dense layer (of a sliding one: those the next token can see), without copying them if possible."""
    keys, values = layer.keys[0], layer.values[0]
    n_heads, n_kept, dim = keys.shape
    return RaggedLayer(
        keys=keys.reshape(-1, dim),
        values=values.reshape(-1, dim),
        lengths=(n_kept,) * n_heads,
        positions=torch.arange(n - n_kept, n, dtype=torch.int32, device=keys.device).repeat(n_heads),
        scores=None if scores is None else scores.flatten().to(keys.device),
        window=window,
    )


def _gather(layer: DynamicLayer, keep: Tensor, scores: Tensor | None) -> RaggedLayer:
    keys, values = layer.keys[0], layer.values[0]
    keep = keep.to(keys.device)
    heads, positions = keep.nonzero(as_tuple=True)
    return RaggedLayer(
        keys=keys[heads, positions],
        values=values[heads, positions],
        lengths=tuple(keep.sum(1).tolist()),
        positions=positions.to(torch.int32),
        scores=None if scores is None else scores.to(keys.device)[heads, positions],
    )


def _return_freed_pages() -> None:
    """Give the dense cache's pages back to the system. Kept layers lie between them, so glibc would hold on to them:
    resident memory grew by 0.8 of the dense caches without this, by 0.3 (what is kept) with it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
