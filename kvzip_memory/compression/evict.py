"""The last step of a build: of a layer's pairs only those that are kept."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvzip_memory.compression.codecs import Codec
from kvzip_memory.compression.prefill import Prefilled
from kvzip_memory.context import RaggedLayer, Window


def gathered(
    prefilled: Prefilled, layer: int, keep: Tensor, scores: Tensor | None, fitted: tuple[Tensor, Tensor] | None, codec: Codec
) -> RaggedLayer:
    """The kept pairs of a layer with full attention, a parent's of each head before the others.

    Args:
        keep: ``[H, n]`` bool, false where the parent's pair is gone.
        scores: ``[H, n]`` fp16 to be stored beside the pairs, or None.
        fitted: keys, as they will be stored, and values ``[H, n - first, D]`` of pairs from ``prefilled.first`` on; None: as they are.
        codec: rounds the pairs that no parent has.
    """
    keys, values = prefilled.dense[layer]
    parent = prefilled.parent[layer] if prefilled.parent else None
    keep, scores = keep.to(keys.device), None if scores is None else scores.to(keys.device)
    shared = values is keys  # then nothing is fitted
    if parent is None and bool(keep.all()):
        keys = codec.stored(codec.keys(keys))
        return _whole(keys, keys if shared else codec.stored(codec.values(values)), scores)
    start, first = prefilled.start, prefilled.first
    heads, columns = keep[:, start:].nonzero(as_tuple=True)
    keys, positions = codec.keys(keys)[heads, columns], columns + start
    values = keys if shared else values[heads, columns]
    if parent is not None:
        rows = keep[parent.heads(), parent.positions.long()].nonzero().squeeze(1)
        heads, order = torch.cat([parent.heads()[rows], heads]).sort(stable=True)
        keys = torch.cat([parent.keys[rows], keys])[order]
        values = keys if shared else torch.cat([parent.values[rows], values])[order]
        positions = torch.cat([parent.positions[rows].long(), positions])[order]
    if fitted is not None:
        new = (positions >= first) & ~prefilled.pinned.to(positions.device)[positions]
        keys[new], values[new] = (x[heads[new], positions[new] - first] for x in fitted)
    keys = codec.stored(keys)
    return RaggedLayer(
        keys=keys,
        values=keys if shared else codec.stored(codec.values(values)),
        lengths=tuple(keep.sum(1).tolist()),
        positions=positions.to(torch.int32),
        scores=None if scores is None else scores[heads, positions],
    )


def visible(prefilled: Prefilled, layer: int, window: Window, codec: Codec) -> RaggedLayer:
    """The pairs of a layer with a window that the next token can still see, rounded by a codec."""
    keys, values = prefilled.dense[layer]
    if prefilled.parent:
        parent = prefilled.parent[layer]
        keys = torch.cat([parent.keys.unflatten(0, (parent.n_heads, -1)), keys], 1)
        values = torch.cat([parent.values.unflatten(0, (parent.n_heads, -1)), values], 1)
    n, n_heads = len(prefilled.token_ids), len(keys)
    n_kept = window.left(n)
    keys, values = (pairs[:, pairs.shape[1] - n_kept :].contiguous() for pairs in (keys, values))
    keys, values = codec.stored(codec.keys(keys)), codec.stored(codec.values(values))
    return RaggedLayer(
        keys=keys.flatten(0, 1),
        values=values.flatten(0, 1),
        lengths=(n_kept,) * n_heads,
        positions=torch.arange(n - n_kept, n, dtype=torch.int32, device=keys.device).repeat(n_heads),
        window=window,
    )


def _whole(keys: Tensor, values: Tensor, scores: Tensor | None) -> RaggedLayer:
    """All pairs ``[H, n, D]``, without copying them if possible."""
    n_heads, n = keys.shape[:2]
    flat = keys.flatten(0, 1)
    return RaggedLayer(
        keys=flat,
        values=flat if values is keys else values.flatten(0, 1),
        lengths=(n,) * n_heads,
        positions=torch.arange(n, dtype=torch.int32, device=keys.device).repeat(n_heads),
        scores=None if scores is None else scores.flatten(),
    )


def return_freed_pages() -> None:
    """Give the dense cache's pages back to the system. Kept layers lie between them, so glibc would hold on to them:
    resident memory grew by 0.8 of the dense caches without this, by 0.3 (what is kept) with it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
