"""Plain-torch attention over ragged contexts: a matrix product a KV head, shared by all rows on the same context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvzip_memory.attention.base import RowKV
from kvzip_memory.attention.merge import merge
from kvzip_memory.context import RaggedLayer

# Logits held at one time, in elements (fp32: 32 MB). Longer question prefills are cut into blocks of rows.
BLOCK_ELEMENTS = 8 << 20


def attention(query: Tensor, rows: Sequence[RowKV], scaling: float, window: int | None) -> Tensor:
    """See :class:`~kvzip_memory.attention.base.AttentionBackend`."""
    batch, query_heads, n, dim = query.shape
    query = query * scaling  # before the products, which overflow float16 otherwise
    out = query.new_zeros(batch, n, query_heads, dim)
    tails = [_attend_tail(query[b], row, window) for b, row in enumerate(rows)]
    for members in _rows_by_context(rows):
        context = rows[members[0]].context
        merged = [tails[b][0] for b in members] if context is None else _merge_context(query, rows, members, context, tails, window)
        for b, rows_out in zip(members, merged, strict=True):  # rows_out: [H, G, n_new, D]
            n_new = rows[b].n_new
            out[b, n - n_new :] = rows_out.flatten(0, 1).transpose(0, 1).to(out.dtype)
    return out


def _rows_by_context(rows: Sequence[RowKV]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for b, row in enumerate(rows):
        groups.setdefault(id(row.context), []).append(b)
    return list(groups.values())


def _attend_tail(query: Tensor, row: RowKV, window: int | None) -> tuple[Tensor, Tensor]:
    """Causal attention of one row over its tail: ``[H, G, n_new, D]`` fp32 and log-sum-exp ``[H, G, n_new]``."""
    n_heads, n_tail, dim = row.keys.shape
    q = query[:, query.shape[1] - row.n_new :].reshape(n_heads, -1, row.n_new, dim)
    key_index = torch.arange(n_tail, device=q.device)
    query_index = torch.arange(n_tail - row.n_new, n_tail, device=q.device)
    step = max(1, BLOCK_ELEMENTS // (query.shape[0] * n_tail))
    outs, lses = [], []
    for start in range(0, row.n_new, step):
        block = q[:, :, start : start + step].flatten(1, 2)
        index = query_index[start : start + step, None]
        hidden = key_index > index
        if window is not None:
            hidden |= key_index <= index - window
        logits = torch.matmul(block, row.keys.mT).float().unflatten(1, (-1, len(index)))
        logits.masked_fill_(hidden, float("-inf"))
        lse = logits.logsumexp(-1)
        weights = logits.sub_(lse.unsqueeze(-1)).exp_().flatten(1, 2).to(row.values.dtype)
        outs.append(torch.matmul(weights, row.values).float().unflatten(1, (-1, len(index))))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _merge_context(
    query: Tensor,
    rows: Sequence[RowKV],
    members: list[int],
    context: RaggedLayer,
    tails: list[tuple[Tensor, Tensor]],
    window: int | None,
) -> list[Tensor]:
    """Tail attention of the member rows merged with their attention over the one context they share."""
    n_heads, n, dim = context.n_heads, query.shape[2], query.shape[3]
    counts = [rows[b].n_new for b in members]
    queries = [query[b, :, n - count :].reshape(n_heads, -1, dim) for b, count in zip(members, counts, strict=True)]
    stacked = queries[0] if len(queries) == 1 else torch.cat(queries, 1)  # [H, rows * G * n_new, D]
    sizes = [q.shape[1] for q in queries]
    first_seen = None
    if window is not None:  # a query at position p sees the positions after p - window
        group = sizes[0] // counts[0]
        starts = [
            (rows[b].context_tokens + rows[b].keys.shape[1] - count - window + torch.arange(count)).repeat(group)
            for b, count in zip(members, counts, strict=True)
        ]
        first_seen = torch.cat(starts).to(query.device)
    out = stacked.new_empty(stacked.shape, dtype=torch.float32)
    lse = stacked.new_empty(stacked.shape[:2], dtype=torch.float32)
    for head in range(n_heads):
        positions = context.positions[context.offsets[head] : context.offsets[head + 1]]
        _attend_head(stacked[head], *context.head(head), positions, first_seen, out[head], lse[head])
    merged = []
    for b, count, part_out, part_lse in zip(members, counts, out.split(sizes, 1), lse.split(sizes, 1), strict=True):
        shape = (-1, count)
        tail_out, tail_lse = tails[b]
        merged.append(merge(part_out.unflatten(1, shape), part_lse.unflatten(1, shape), tail_out, tail_lse))
    return merged


def _attend_head(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    first_seen: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention of ``query [R, D]`` over one head's pairs, written into ``out [R, D]`` and ``lse [R]``.

    ``first_seen [R]``: each query sees only positions after this one (sliding window), all if None.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, len(keys)))
    for start in range(0, len(query), step):
        block = slice(start, start + step)
        logits = torch.matmul(query[block], keys.T).float()
        if first_seen is not None:
            logits.masked_fill_(positions <= first_seen[block, None], float("-inf"))
        lse[block] = logits.logsumexp(-1)
        # A query that sees nothing here has lse = -inf: subtract 0 in its place, its weights are exp(-inf) = 0.
        shift = lse[block, None].clamp_min(torch.finfo(torch.float32).min)
        weights = logits.sub_(shift).exp_().to(values.dtype)
        out[block] = torch.matmul(weights, values).float()
