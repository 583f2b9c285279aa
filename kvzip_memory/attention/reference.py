"""The oracle: one softmax over all pairs a query may see, written to be read, not to be fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvzip_memory.attention.base import RowKV, Softmax, turned
from kvzip_memory.context import Window
from kvzip_memory.context.codes import decoded


def attention(query: Tensor, rows: Sequence[RowKV], softmax: Softmax, window: Window | None) -> Tensor:
    """See :class:`~kvzip_memory.attention.base.AttentionBackend`. Computes in float64."""
    batch, query_heads, n, _ = query.shape
    out = query.new_zeros(batch, n, query_heads, rows[0].values.shape[2])
    for b, row in enumerate(rows):
        group = query_heads // row.keys.shape[0]
        n_tail = row.keys.shape[1]
        tail_positions = row.context_tokens + torch.arange(n_tail, device=query.device)
        for head in range(query_heads):
            kv_head = head // group
            values = torch.cat([decoded(part.head(kv_head)[1], query.dtype) for part in row.parts] + [row.values[kv_head]])
            moved = [part.positions_of(kv_head).long() + (turn.by if turn else 0) for part, turn in row.turned]
            positions = torch.cat([*moved, tail_positions])
            for i in range(row.n_new):
                position = int(tail_positions[n_tail - row.n_new + i])
                visible = positions <= position
                if window is not None:
                    visible &= positions >= window.first(position)
                q = query[b, head, n - row.n_new + i]
                products = [decoded(part.head(kv_head)[0], torch.float64) @ turned(q, turn).double() for part, turn in row.turned]
                products.append(row.keys[kv_head].double() @ q.double())
                logits = softmax.capped(torch.cat(products) * softmax.scaling).masked_fill(~visible, float("-inf"))
                if softmax.sinks is not None:
                    logits = torch.cat([logits, softmax.sinks[head : head + 1].double()])
                out[b, n - row.n_new + i, head] = (logits.softmax(0)[: len(values)] @ values.double()).to(out.dtype)
    return out
