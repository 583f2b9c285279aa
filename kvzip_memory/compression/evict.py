"""Step 4 of a build: gather the kept pairs and free the dense ones, layer by layer."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvzip_memory.compression.prefill import Prefilled
from kvzip_memory.compression.refit.base import LayerPairs, Refit
from kvzip_memory.context import RaggedLayer


def evict(prefilled: Prefilled, keep: Tensor, scores: Tensor | None, refit: Refit | None = None, ratio: float = 1.0) -> list[RaggedLayer]:
    """Ragged layers of the kept pairs. The dense ones are freed on the way: at most one layer exists twice.

    Args:
        prefilled: its ``dense`` and ``parent`` are empty afterwards.
        keep: ``[L, H, n]`` bool, over the layers with full attention; false where the parent's pair is gone.
        scores: ``[L, H, n]`` fp16 to be stored beside the pairs, or None.
        refit: gives the kept pairs their values; None for those the model computed.
        ratio: as of the refit's pairs.
    """
    layers, full, first = [], 0, prefilled.first
    pinned = torch.zeros(keep.shape[2], dtype=torch.bool)
    for start, end in ((0, prefilled.protected), *prefilled.keep):
        pinned[start:end] = True
    for number, window in enumerate(prefilled.model.windows):
        blocks = prefilled.rows.pop(number) if prefilled.rows else []
        fitted: Tensor | None = None
        if refit is not None and blocks:
            head, own = prefilled.pairs(0, 0, prefilled.protected), prefilled.pairs(0, first, keep.shape[2])
            kept = keep[full, :, first:].to(own[0].device)
            fitted = refit.values(LayerPairs(head, first, *own, kept, pinned[first:].to(kept.device), blocks, ratio))
        keys, values = prefilled.dense.pop(0)
        parent = prefilled.parent.pop(0) if prefilled.parent else None
        if window is not None:
            layers.append(_visible(parent, keys, values, window, len(prefilled.token_ids)))
        else:
            layer_scores = None if scores is None else scores[full].to(keys.device)
            if parent is None and bool(keep[full].all()):
                layers.append(_whole(keys, values, layer_scores))
            else:
                layer = _gathered(parent, keys, values, keep[full].to(keys.device), layer_scores)
                if fitted is not None:
                    new = layer.positions >= first
                    layer.values[new] = fitted[layer.heads()[new], layer.positions[new].long() - first]
                layers.append(layer)
            full += 1
        del keys, values, parent, fitted
        _return_freed_pages()
    return layers


def _whole(keys: Tensor, values: Tensor, scores: Tensor | None) -> RaggedLayer:
    """All pairs ``[H, n, D]``, without copying them if possible."""
    n_heads, n, dim = keys.shape
    return RaggedLayer(
        keys=keys.reshape(-1, dim),
        values=values.reshape(-1, dim),
        lengths=(n,) * n_heads,
        positions=torch.arange(n, dtype=torch.int32, device=keys.device).repeat(n_heads),
        scores=None if scores is None else scores.flatten(),
    )


def _visible(parent: RaggedLayer | None, keys: Tensor, values: Tensor, window: int, n: int) -> RaggedLayer:
    """The pairs of a sliding layer that the next token can still see."""
    if parent is not None:
        keys = torch.cat([parent.keys.unflatten(0, (parent.n_heads, -1)), keys], 1)
        values = torch.cat([parent.values.unflatten(0, (parent.n_heads, -1)), values], 1)
    keys, values = keys[:, 1 - window :].contiguous(), values[:, 1 - window :].contiguous()
    n_heads, n_kept, dim = keys.shape
    return RaggedLayer(
        keys=keys.view(-1, dim),
        values=values.view(-1, dim),
        lengths=(n_kept,) * n_heads,
        positions=torch.arange(n - n_kept, n, dtype=torch.int32, device=keys.device).repeat(n_heads),
        window=window,
    )


def _gathered(parent: RaggedLayer | None, keys: Tensor, values: Tensor, keep: Tensor, scores: Tensor | None) -> RaggedLayer:
    """The kept pairs ``keep [H, n]`` of a layer, the parent's of each head before the dense ones."""
    start = keep.shape[1] - keys.shape[1]
    heads, columns = keep[:, start:].nonzero(as_tuple=True)
    keys, values, positions = keys[heads, columns], values[heads, columns], columns + start
    if parent is not None:
        rows = keep[parent.heads(), parent.positions.long()].nonzero().squeeze(1)
        heads, order = torch.cat([parent.heads()[rows], heads]).sort(stable=True)
        keys = torch.cat([parent.keys[rows], keys])[order]
        values = torch.cat([parent.values[rows], values])[order]
        positions = torch.cat([parent.positions[rows].long(), positions])[order]
    return RaggedLayer(
        keys=keys,
        values=values,
        lengths=tuple(keep.sum(1).tolist()),
        positions=positions.to(torch.int32),
        scores=None if scores is None else scores[heads, positions],
    )


def _return_freed_pages() -> None:
    """Give the dense cache's pages back to the system. Kept layers lie between them, so glibc would hold on to them:
    resident memory grew by 0.8 of the dense caches without this, by 0.3 (what is kept) with it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
