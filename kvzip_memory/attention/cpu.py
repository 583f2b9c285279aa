"""Attention over ragged contexts with torch's fused CPU kernel: one call a KV head, shared by all rows on the context.

The kernel is torch's flash attention for CPUs, which gives the log-sum-exp beside the output and spreads a batch over
threads. A head's pairs are handed to it as a batch of equal pieces, one a thread: a strided view, nothing is copied. On
other devices plain products take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvzip_memory.attention.base import RowKV, Softmax, rows_by_parts, turned, turned_for, users_of_parts
from kvzip_memory.attention.codes import attend_codes, has_codes
from kvzip_memory.attention.fused import PIECE_PAIRS, View, attend, attend_view, divided, has_fused
from kvzip_memory.context import RaggedLayer, Window
from kvzip_memory.context.codes import numbers, turned_as

#: Logits held at one time where a mask is needed, in elements (fp32: 32 MB). Longer questions are cut into blocks.
BLOCK_ELEMENTS = 8 << 20
#: So few queries of a head over so few pairs take plain products, if there are several parts: a call each costs more than threads gain.
SMALL_ROWS, SMALL_PAIRS = 16, 1024


def attention(query: Tensor, rows: Sequence[RowKV], softmax: Softmax, window: Window | None) -> Tensor:
    """See :class:`~kvzip_memory.attention.base.AttentionBackend`."""
    batch, query_heads, n, dim = query.shape
    n_heads = rows[0].keys.shape[0]
    if batch == 1:  # no padding, nothing to put together
        merged = _attend_groups([[query.reshape(n_heads, -1, dim)]], [rows], softmax, window)[0]
        return merged.view(1, query_heads, n, -1).transpose(1, 2)
    out = query.new_zeros(batch, n, query_heads, rows[0].values.shape[2])
    groups = rows_by_parts([row.places for row in rows])
    queries = [[query[b, :, n - rows[b].n_new :].reshape(n_heads, -1, dim) for b in members] for members in groups]
    found = _attend_groups(queries, [[rows[b] for b in members] for members in groups], softmax, window)
    for members, own, merged in zip(groups, queries, found, strict=True):
        for b, part in zip(members, merged.split([q.shape[1] for q in own], 1), strict=True):
            out[b, n - rows[b].n_new :] = part.reshape(query_heads, rows[b].n_new, -1).transpose(0, 1)
    return out


def _attend_groups(queries: list[list[Tensor]], groups: Sequence[Sequence[RowKV]], softmax: Softmax, window: Window | None) -> list[Tensor]:
    """Attention of groups of rows on the same parts, each row with queries ``[H, G * n_new, D]``: of a group's rows, one behind another in
    dimension 1. A part is read once for all groups that have it."""
    together = [_cat(own) for own in queries]
    # pieces [H, P, R, D] and [H, P, R] over the rows' queries, R of them a head
    pieces = [
        [_joined([_attend_tail(q, row, softmax, window) for q, row in zip(own, rows, strict=True)])]
        for own, rows in zip(queries, groups, strict=True)
    ]
    if len(groups) == 1:
        row, first_seen = groups[0][0], _first_of(groups[0], queries[0], window)
        turns = row.turns or [None] * len(row.parts)
        asked = [(q, part) for q, part in zip(turned_for(together[0], turns), row.parts, strict=True) if any(part.lengths)]
        are_small = [window is None and _is_small(q, part, softmax) for q, part in asked]
        if sum(are_small) > 1:
            pieces[0].append(_attend_small([*compress(asked, are_small)], softmax))
            asked = [one for one, is_small in zip(asked, are_small, strict=True) if not is_small]
        pieces[0] += [_attend_part(q, part, softmax, first_seen) for q, part in asked]
    else:
        seen = [_first_of(rows, own, window) for rows, own in zip(groups, queries, strict=True)]
        for part, users in users_of_parts([rows[0] for rows in groups]):
            first_seen = None if window is None else torch.cat([first for group, _ in users if (first := seen[group]) is not None])
            outs, lses = _attend_part(_cat([turned(together[group], turn) for group, turn in users]), part, softmax, first_seen)
            sizes = [together[group].shape[1] for group, _ in users]
            for (group, _), out, lse in zip(users, outs.split(sizes, 2), lses.split(sizes, 2), strict=True):
                pieces[group].append((out, lse))
    return [_merged(found, rows, softmax).to(together[0].dtype) for found, rows in zip(pieces, groups, strict=True)]


def _merged(pieces: list[tuple[Tensor, Tensor]], rows: Sequence[RowKV], softmax: Softmax) -> Tensor:
    """Pieces ``[H, P, R, D]`` and ``[H, P, R]`` as one: ``[H, R, D]``, fp32."""
    outs, lses = _cat([out for out, _ in pieces]), _cat([lse for _, lse in pieces])
    merged = (outs * lses.softmax(1).unsqueeze(-1)).sum(1) if outs.shape[1] > 1 else outs[:, 0]
    sinks = [found for row in rows if (found := softmax.sinks_of(len(merged), row.n_new)) is not None]
    return beside_sinks(merged, lses.logsumexp(1), _cat(sinks))[0] if sinks else merged


def beside_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention ``[H, R, D]`` and log-sum-exp ``[H, R]``, with one more logit ``[H, R]`` beside that has no value."""
    if sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, sinks)
    return out * (lse - whole).exp().unsqueeze(-1), whole


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


def _joined(tails: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tail attention of several rows as one part: ``[H, 1, R, D]`` and ``[H, 1, R]``."""
    return _cat([out for out, _ in tails]).unsqueeze(1), _cat([lse for _, lse in tails]).unsqueeze(1)


def _attend_tail(query: Tensor, row: RowKV, softmax: Softmax, window: Window | None) -> tuple[Tensor, Tensor]:
    """Causal attention of one row's ``query [H, G * n_new, D]`` over its tail: fp32 of that shape, and ``[H, G * n_new]``."""
    keys, values = row.keys, row.values
    if row.n_new == 1:
        if window is not None:
            first = max(0, window.first(row.context_tokens + keys.shape[1] - 1) - row.context_tokens)
            keys, values = keys[:, first:], values[:, first:]
        out, lse = attend(query[None], keys[None], values[None], softmax)
        return out[0].float(), lse[0]
    if window is not None:
        return _causal_masked(query, keys, values, row.n_new, softmax, _first_seen(row, window, query.device) - row.context_tokens)
    return causal(query, keys, values, row.n_new, softmax)


def causal(query: Tensor, keys: Tensor, values: Tensor, n_new: int, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention of the last ``n_new`` tokens over all so far. Those before them are seen by all and need no mask.

    Args:
        query: ``[H, G * n_new, D]``.
        keys, values: ``[H, m, D]`` and ``[H, m, DV]``, the new tokens' last.

    Returns:
        fp32 ``[H, G * n_new, DV]``, and log-sum-exp ``[H, G * n_new]``.
    """
    if not has_fused(query, values, softmax):
        return _causal_masked(query, keys, values, n_new, softmax, None)
    past = keys.shape[1] - n_new
    own = (query.unflatten(1, (-1, n_new)), keys[:, None, past:], values[:, None, past:])
    shape = own[0].shape
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.expand(shape) for x in own), is_causal=True, scale=softmax.scaling
    )
    out, lse = out.flatten(1, 2).float(), lse.flatten(1, 2).float()
    if not past:
        return out, lse
    before, before_lse = attend(query[None], keys[None, :, :past], values[None, :, :past], softmax)
    share = (before_lse[0] - lse).sigmoid_()  # of what came before
    return out.lerp_(before[0].float(), share.unsqueeze(-1)), torch.logaddexp(lse, before_lse[0])


def with_context(out: Tensor, lse: Tensor, query: Tensor, context: RaggedLayer, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """What :func:`causal` gave for a query, with the pairs of a context beside those that it has seen; full attention only."""
    outs, lses = _attend_part(query, context, softmax, None)
    lses = torch.cat([lse.unsqueeze(1), lses], 1)
    return (torch.cat([out.unsqueeze(1), outs], 1) * lses.softmax(1).unsqueeze(-1)).sum(1), lses.logsumexp(1)


def _causal_masked(
    query: Tensor, keys: Tensor, values: Tensor, n_new: int, softmax: Softmax, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`causal` with a mask, in blocks; each new token sees only what stands from ``first [n_new]`` on, if that is given."""
    n_heads, n_tail, _ = keys.shape
    query = (query * softmax.scaling).unflatten(1, (-1, n_new))  # before the products, which overflow float16 otherwise
    key_index = torch.arange(n_tail, device=query.device)
    query_index = torch.arange(n_tail - n_new, n_tail, device=query.device)
    step = max(1, BLOCK_ELEMENTS // (n_heads * query.shape[1] * n_tail))
    outs, lses = [], []
    for start in range(0, n_new, step):
        block = query[:, :, start : start + step].flatten(1, 2)
        index = query_index[start : start + step, None]
        hidden = key_index > index
        if first is not None:
            hidden |= key_index < first[start : start + step, None]
        logits = softmax.capped(torch.matmul(block, keys.mT).float()).unflatten(1, (-1, len(index)))
        logits.masked_fill_(hidden, float("-inf"))
        lse = logits.logsumexp(-1)
        weights = logits.sub_(lse.unsqueeze(-1)).exp_().flatten(1, 2).to(values.dtype)
        outs.append(torch.matmul(weights, values).float().unflatten(1, (-1, len(index))))
        lses.append(lse)
    return torch.cat(outs, 2).flatten(1, 2), torch.cat(lses, 2).flatten(1, 2)


def _first_of(rows: Sequence[RowKV], queries: Sequence[Tensor], window: Window | None) -> Tensor | None:
    """``[R]``: the first position that each query of several rows sees; None if all see all."""
    if window is None:
        return None
    return torch.cat([_first_seen(row, window, q.device).repeat(q.shape[1] // row.n_new) for row, q in zip(rows, queries, strict=True)])


def _first_seen(row: RowKV, window: Window, device: torch.device) -> Tensor:
    """``[n_new]``: the first position that each new token sees."""
    end = row.context_tokens + row.keys.shape[1]
    return window.first(torch.arange(end - row.n_new, end, device=device))


def _attend_part(query: Tensor, part: RaggedLayer, softmax: Softmax, first_seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of ``query [H, R, D]`` over a part, in P pieces to be merged: ``[H, P, R, D]`` and ``[H, P, R]``, fp32."""
    if first_seen is not None:
        return _attend_sliding(query, part, softmax, first_seen)
    if has_codes(part):
        return attend_codes(query, part, softmax)
    views = _views(part, torch.get_num_threads() if has_fused(query, part.values, softmax) else 1)
    queries = query.expand(views[0].pieces, -1, -1, -1).split(len(query) // len(views), 1)
    found = [attend_view(q, view, softmax) for q, view in zip(queries, views, strict=True)]
    return _cat([out for out, _ in found]).transpose(0, 1).float(), _cat([lse for _, lse in found]).transpose(0, 1)


def _is_small(query: Tensor, part: RaggedLayer, softmax: Softmax) -> bool:
    """Whether a part is one of those that are not worth a call of the fused kernel each."""
    few = query.shape[1] <= SMALL_ROWS and query.dtype == torch.float32
    return few and max(part.lengths) < SMALL_PAIRS and has_fused(query, part.values, softmax) and not has_codes(part)


def _attend_small(asked: Sequence[tuple[Tensor, RaggedLayer]], softmax: Softmax) -> tuple[Tensor, Tensor]:
    """:func:`_attend_part` of several parts, each with its queries, in one piece: plain products, and a softmax a head."""
    n_heads, n_queries, _ = asked[0][0].shape
    scaled = torch.stack([query for query, _ in asked]).mul_(softmax.scaling).unbind(1)
    heads = [_pairs(part) for _, part in asked]
    outs, lses = [], []
    for head in range(n_heads):
        pairs, lengths = [of_part[head] for of_part in heads], [part.lengths[head] for _, part in asked]
        logits = scaled[head].new_empty(n_queries, sum(lengths))
        for query, (keys, _), found in zip(scaled[head].unbind(), pairs, logits.split(lengths, 1), strict=True):
            torch.mm(query, keys.to(query.dtype), out=found)
        lse = logits.logsumexp(-1)
        out = logits.new_zeros(n_queries, pairs[0][1].shape[1])
        for (_, values), weights in zip(pairs, logits.softmax(-1).split(lengths, 1), strict=True):
            out.addmm_(weights, values.to(out.dtype))
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs).unsqueeze(1), torch.stack(lses).unsqueeze(1)


#: As of ``_VIEWS``: each head's keys ``[D, n]`` and values ``[n, D]``.
_PAIRS: WeakKeyDictionary[RaggedLayer, list[tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def _pairs(part: RaggedLayer) -> list[tuple[Tensor, Tensor]]:
    known = _PAIRS.get(part)
    if known is None:
        known = _PAIRS[part] = [(keys.T, values) for keys, values in _heads(part)]
    return known


def _heads(part: RaggedLayer) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each head: views."""
    keys, values = part.pairs
    rows = [slice(start, start + length) for start, length in zip(part.offsets, part.lengths, strict=False)]
    return [(keys[some], values[some]) for some in rows]


#: Views of the layers in use. They cost a third of a decode step when they are made anew for each.
_VIEWS: WeakKeyDictionary[RaggedLayer, dict[int, list[View]]] = WeakKeyDictionary()


def _views(part: RaggedLayer, threads: int) -> list[View]:
    known = _VIEWS.setdefault(part, {})
    if threads not in known:
        pieces = max(1, min(threads, max(part.lengths) // PIECE_PAIRS))
        if len({*part.lengths}) == 1 and not part.gaps:  # one call
            keys, values = part.pairs
            heads = [(keys.unflatten(0, (part.n_heads, -1)), values.unflatten(0, (part.n_heads, -1)))]
        else:
            heads = [(keys[None], values[None]) for keys, values in _heads(part)]
        known[threads] = [divided(keys, values, pieces) for keys, values in heads]
    return known[threads]


def _attend_sliding(query: Tensor, part: RaggedLayer, softmax: Softmax, first_seen: Tensor) -> tuple[Tensor, Tensor]:
    query, found = turned_as(part.keys, query), []
    for head in range(part.n_heads):
        keys, values = (numbers(pairs, query.dtype) for pairs in part.head(head))
        found.append(_attend_masked(query[head], keys, values, part.positions_of(head), softmax, first_seen))
    return turned_as(part.values, torch.stack([out for out, _ in found])), torch.stack([lse for _, lse in found])


def _attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, softmax: Softmax, first_seen: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of ``query [R, D]`` over the pairs of one head that each query sees: ``[1, R, D]`` and ``[1, R]``."""
    query = query * softmax.scaling
    out = query.new_empty(1, len(query), values.shape[1], dtype=torch.float32)
    lse = query.new_empty(1, len(query), dtype=torch.float32)
    step = max(1, BLOCK_ELEMENTS // max(1, len(keys)))
    for start in range(0, len(query), step):
        block = slice(start, start + step)
        logits = softmax.capped(torch.matmul(query[block], keys.T).float())
        logits.masked_fill_(positions < first_seen[block, None], float("-inf"))
        lse[0, block] = logits.logsumexp(-1)
        # A query that sees nothing here has lse = -inf: subtract 0 in its place, its weights are exp(-inf) = 0.
        shift = lse[0, block, None].clamp_min(torch.finfo(torch.float32).min)
        weights = logits.sub_(shift).exp_().to(values.dtype)
        out[0, block] = torch.matmul(weights, values).float()
    return out, lse
