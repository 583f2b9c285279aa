"""Attention over pairs in codes, on a CPU: read as numbers, a few heads at a time, and attended to; never a whole context of them."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvzip_memory.attention.base import Softmax
from kvzip_memory.attention.fused import PIECE_PAIRS, View, attend_view, divided, has_fused
from kvzip_memory.context import RaggedLayer
from kvzip_memory.context.codes import Codes, Vectors, numbers, turned_as

#: Pairs that are read at a time, those of one head or of several: what comes of them are a few MB.
READ_PAIRS = 8192


def has_codes(part: RaggedLayer) -> bool:
    """Whether a layer has pairs in codes."""
    return isinstance(part.keys, Codes) or isinstance(part.values, Codes)


def attend_codes(query: Tensor, part: RaggedLayer, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention of ``query [H, R, D]`` over a part, in one piece: ``[H, 1, R, DV]`` and ``[H, 1, R]``, fp32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query = turned_as(part.keys, query.to(wide))
    threads = torch.get_num_threads() if has_fused(query, part.values, softmax) else 1
    queries = query.unsqueeze(1).split(1)  # [1, 1, R, D] of each head
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in queries]
    for run in _runs(part):
        keys = numbers(run.keys, wide)
        values = keys if part.shared else numbers(run.values, wide)
        pairs = (some[None, None].split(run.sizes, 2) for some in (keys, values))
        for head, own_keys, own_values in zip(run.heads, *pairs, strict=True):
            if head is not None:
                found[head].append(_attend_head(queries[head], own_keys, own_values, softmax, threads))
    out, lse = (torch.stack(some) for some in zip(*map(_merged, found), strict=True))
    return turned_as(part.values, out), lse


def _attend_head(query: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, threads: int) -> tuple[Tensor, Tensor]:
    """Attention ``[P, 1, R, DV]`` of ``query [1, 1, R, D]`` over ``keys [1, 1, n, D]``, in as many pieces as are worth a thread."""
    pieces = min(threads, keys.shape[2] // PIECE_PAIRS)
    if pieces > 1:
        return attend_view(query.expand(pieces, -1, -1, -1), divided(keys[0], values[0], pieces), softmax)
    return attend_view(query, View(1, keys, values, None), softmax)


def _merged(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention ``[P, 1, R, D]`` of one head over some of its pairs, and log-sum-exp ``[P, 1, R]``, as one piece."""
    outs, lses = pieces[0] if len(pieces) == 1 else (torch.cat(some) for some in zip(*pieces, strict=True))
    if len(outs) == 1:
        return outs[0], lses[0]
    return (outs * lses.softmax(0).unsqueeze(-1)).sum(0), lses.logsumexp(0)


class _Run(NamedTuple):
    """Pairs that are read together.

    Attributes:
        keys, values: views of the layer's.
        sizes: where they are cut.
        heads: whose each piece is; None for what is no head's.
    """

    keys: Vectors
    values: Vectors
    sizes: list[int]
    heads: list[int | None]


_RUNS: WeakKeyDictionary[RaggedLayer, list[_Run]] = WeakKeyDictionary()


def _runs(part: RaggedLayer) -> list[_Run]:
    """All pairs, in their order."""
    known = _RUNS.get(part)
    if known is None:
        pieces = [
            (head, start, min(start + READ_PAIRS, offset + length))
            for head, (offset, length) in enumerate(zip(part.offsets, part.lengths, strict=False))
            for start in range(offset, offset + max(1, length), READ_PAIRS)
        ]
        together: list[list[tuple[int, int, int]]] = []
        for piece in pieces:
            if not together or piece[2] - together[-1][0][1] > READ_PAIRS:
                together.append([])
            together[-1].append(piece)
        known = _RUNS[part] = [_run(part, some) for some in together]
    return known


def _run(part: RaggedLayer, pieces: list[tuple[int, int, int]]) -> _Run:
    sizes, heads, at = list[int](), list[int | None](), pieces[0][1]
    for head, start, end in pieces:
        if start > at:
            sizes, heads = [*sizes, start - at], [*heads, None]
        sizes, heads, at = [*sizes, end - start], [*heads, head], end
    rows = slice(pieces[0][1], at)
    return _Run(part.keys[rows], part.values[rows], sizes, heads)
