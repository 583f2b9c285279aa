"""The last step of a build: of a layer's pairs only those that are kept."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_memory.compression.codecs import Codec
from kvzip_memory.compression.prefill import Prefilled
from kvzip_memory.context import RaggedLayer, Window
from kvzip_memory.context.codes import Vectors, are_alike, decoded, each, joined


def gathered(
    prefilled: Prefilled,
    layer: int,
    keep: Tensor,
    scores: Tensor | None,
    fitted: tuple[Tensor, Tensor] | None,
    codec: Codec,
    asked: Tensor | None = None,
) -> RaggedLayer:
    """The kept pairs of a layer with full attention, a parent's of each head before the others.

    Args:
        keep: ``[H, n]`` bool, false where the parent's pair is gone.
        scores: ``[H, n]`` fp16 to be stored beside the pairs, or None.
        fitted: keys, as they will be read, and values ``[H, n - first, D]`` of pairs from ``prefilled.first`` on; None: as they are.
        codec: writes the pairs that no parent has.
        asked: ``[H, D, D]``, what it may know of queries.
    """
    keys, values = prefilled.dense[layer]
    parent = prefilled.parent[layer] if prefilled.parent else None
    keep, scores = keep.to(keys.device), None if scores is None else scores.to(keys.device)
    if parent is None and bool(keep.all()) and fitted is None:
        written = codec.keys(keys, asked)
        return _whole(written, written if values is keys else codec.values(values), scores)
    start, first, pinned = prefilled.start, prefilled.first, prefilled.pinned.to(keys.device)
    pieces = list[_Piece]()
    if parent is not None:
        wanted = keep[parent.heads(), parent.positions.long()]
        if fitted is not None and first < start:
            old = parent.positions.long()
            wanted &= (old < first) | pinned[old]
            fresh = keep[:, first:start] & ~pinned[first:start]
            old_keys, old_values = (pairs[:, : start - first] for pairs in fitted)
            pieces.append(_piece(fresh, first, old_keys, old_values, codec, asked))
        heads, rows = parent.heads()[wanted], wanted.nonzero().squeeze(1)
        pieces.append(_Piece(heads, parent.positions[rows].long(), *parent.pick(rows)))
    if fitted is not None:
        keys, values = (_put(own, pairs, first - start, ~pinned[start:]) for own, pairs in zip((keys, values), fitted, strict=True))
    pieces.append(_piece(keep[:, start:], start, keys, values, codec, asked))
    heads, positions = (torch.cat(some) for some in zip(*((piece.heads, piece.positions) for piece in pieces), strict=True))
    order = (heads * len(prefilled.token_ids) + positions).argsort() if len(pieces) > 1 else slice(None)
    heads, positions = heads[order], positions[order]
    all_keys = in_one([piece.keys for piece in pieces], codec.keys, keys.dtype)[order]
    return RaggedLayer(
        keys=all_keys,
        values=all_keys if values is keys else in_one([piece.values for piece in pieces], codec.values, keys.dtype)[order],
        lengths=tuple(keep.sum(1).tolist()),
        positions=positions.to(torch.int32),
        scores=None if scores is None else scores[heads, positions],
    )


class _Piece(NamedTuple):
    """Some kept pairs, with the head ``[m]`` and the position ``[m]`` of each."""

    heads: Tensor
    positions: Tensor
    keys: Vectors
    values: Vectors


def _piece(keep: Tensor, start: int, keys: Tensor, values: Tensor, codec: Codec, asked: Tensor | None) -> _Piece:
    """Of pairs ``[H, m, D]`` from a position on those that are kept."""
    heads, columns = keep.nonzero(as_tuple=True)
    some = codec.keys(keys[heads, columns]) if asked is None else codec.keys(keys, asked)[heads, columns]
    return _Piece(heads, columns + start, some, some if values is keys else codec.values(values[heads, columns]))


def _put(own: Tensor, fitted: Tensor, behind: int, free: Tensor) -> Tensor:
    """Pairs ``[H, m, D]`` with fitted ones, which begin so many behind them or before, in the columns ``[m]`` that are free."""
    own, free = own.clone(), free.clone()
    free[: max(0, behind)] = False
    own[:, free] = fitted[:, free.nonzero().squeeze(1) - behind]
    return own


def in_one(pieces: Sequence[Vectors], write: Callable[[Tensor], Vectors], dtype: torch.dtype, dim: int = 0) -> Vectors:
    """Pieces one behind another. Those that are written in several ways are written anew."""
    if len(pieces) == 1:
        return pieces[0]
    return joined(pieces, dim) if are_alike(pieces) else write(torch.cat([decoded(piece, dtype) for piece in pieces], dim))


def visible(prefilled: Prefilled, layer: int, window: Window, codec: Codec) -> RaggedLayer:
    """The pairs of a layer with a window that the next token can still see, as a codec writes them."""
    keys, values = prefilled.dense[layer]
    n, n_heads = len(prefilled.token_ids), len(keys)
    n_kept, parent = window.left(n), prefilled.parent[layer] if prefilled.parent else None
    new = min(n_kept, keys.shape[1])
    last = slice(keys.shape[1] - new, None)
    own_keys, own_values = (pairs[:, last].clone(memory_format=torch.contiguous_format) for pairs in (keys, values))  # no view of all
    all_keys, all_values = [codec.keys(own_keys)], [codec.values(own_values)]
    if parent is not None and new < n_kept:
        old = parent.lengths[0] - (n_kept - new)
        before = (each(pairs, lambda x: x.unflatten(0, (n_heads, -1))[:, old:]) for pairs in (parent.keys, parent.values))
        for pieces, some in zip((all_keys, all_values), before, strict=True):
            pieces.insert(0, some)
    return RaggedLayer(
        keys=each(in_one(all_keys, codec.keys, keys.dtype, 1), lambda x: x.flatten(0, 1)),
        values=each(in_one(all_values, codec.values, keys.dtype, 1), lambda x: x.flatten(0, 1)),
        lengths=(n_kept,) * n_heads,
        positions=torch.arange(n - n_kept, n, dtype=torch.int32, device=keys.device).repeat(n_heads),
        window=window,
    )


def _whole(keys: Vectors, values: Vectors, scores: Tensor | None) -> RaggedLayer:
    """All pairs ``[H, n, D]``, without copying them if possible."""
    n_heads, n = keys.shape[:2]
    flat = each(keys, lambda x: x.flatten(0, 1))
    return RaggedLayer(
        keys=flat,
        values=flat if values is keys else each(values, lambda x: x.flatten(0, 1)),
        lengths=(n,) * n_heads,
        positions=torch.arange(n, dtype=torch.int32, device=keys.device).repeat(n_heads),
        scores=None if scores is None else scores.flatten().clone(),  # not a view of all layers'
    )


def return_freed_pages() -> None:
    """Give the dense cache's pages back to the system. Kept layers lie between them, so glibc would hold on to them:
    resident memory grew by 0.8 of the dense caches without this, by 0.3 (what is kept) with it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
