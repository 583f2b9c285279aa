"""Ragged attention by a flash attention library, for long questions: each KV head is a sequence of a variable-length batch.

Over a context every query sees every pair, so the query heads that share a KV head and the rows on the context are queries
of one sequence. Over a tail, where attention is causal, rows and KV heads are the sequences. Nothing of a context is
copied. Sliding layers, whose windows are short, capped logits and values of another
dimension than keys take plain products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from kvzip_memory.attention import cpu
from kvzip_memory.attention.base import AttentionBackend, RowKV, Softmax, turned, users_of_parts
from kvzip_memory.context import RaggedLayer, Window


class Varlen(Protocol):
    """Flash attention over a batch of sequences of variable length."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, query_lengths: list[int], key_lengths: list[int], scaling: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Attention within each sequence.

        Args:
            query: ``[sum(query_lengths), h, D]``.
            keys, values: ``[sum(key_lengths), 1, D]``.
            query_lengths, key_lengths: of each sequence, at least 1.
            scaling: factor of the logits.
            causal: a sequence's last query sees all of its keys, each one before it one key less.

        Returns:
            Output ``[sum(query_lengths), h, D]`` and log-sum-exp ``[h, sum(query_lengths)]`` fp32.
        """
        ...


def backend(varlen: Varlen) -> AttentionBackend:
    """An attention backend that computes with the given library."""

    def attention(query: Tensor, rows: Sequence[RowKV], softmax: Softmax, window: Window | None) -> Tensor:
        """See :class:`~kvzip_memory.attention.base.AttentionBackend`."""
        if window is not None or softmax.cap is not None or rows[0].values.shape[2] != query.shape[3]:
            return cpu.attention(query, rows, softmax, window)
        batch, query_heads, n, dim = query.shape
        n_heads = rows[0].keys.shape[0]
        queries = [query[b, :, n - row.n_new :].reshape(n_heads, -1, row.n_new, dim).transpose(1, 2) for b, row in enumerate(rows)]
        found = _attend_tails(varlen, queries, rows, softmax.scaling)  # each [H, n_new, G, D] and [H, n_new, G]
        out = query.new_zeros(batch, n, query_heads, dim)
        for part, users in users_of_parts(rows):
            if any(part.lengths):
                counts = [rows[b].n_new for b, _ in users]
                asking = torch.cat([turned(queries[b], turn) for b, turn in users], 1)
                theirs = _attend_part(varlen, asking, part, softmax.scaling)
                for (b, _), out_b, lse_b in zip(users, *(x.split(counts, 1) for x in theirs), strict=True):
                    own, lse = found[b]
                    # the softmax of two log-sum-exps
                    found[b] = own.lerp(out_b, torch.sigmoid(lse_b - lse).unsqueeze(-1)), torch.logaddexp(lse, lse_b)
        for b, (own, lse) in enumerate(found):
            if softmax.sinks is not None:
                own = own * torch.sigmoid(lse - softmax.sinks.float().view(n_heads, 1, -1)).unsqueeze(-1)
            out[b, n - rows[b].n_new :] = own.transpose(0, 1).flatten(1, 2).to(out.dtype)
        return out

    return attention


def _attend_tails(varlen: Varlen, queries: list[Tensor], rows: Sequence[RowKV], scaling: float) -> list[tuple[Tensor, Tensor]]:
    """Causal attention of each row's ``[H, n_new, G, D]`` over its tail: fp32 of that shape, and ``[H, n_new, G]``."""
    n_heads, _, group, dim = queries[0].shape
    keys = torch.cat([row.keys.reshape(-1, 1, dim) for row in rows])
    values = torch.cat([row.values.reshape(-1, 1, dim) for row in rows])
    query_lengths = [row.n_new for row in rows for _ in range(n_heads)]
    key_lengths = [row.keys.shape[1] for row in rows for _ in range(n_heads)]
    stacked = torch.cat([query.reshape(-1, group, dim) for query in queries])
    out, lse = varlen(stacked, keys, values, query_lengths, key_lengths, scaling, True)
    sizes = [n_heads * row.n_new for row in rows]
    parts = zip(out.float().split(sizes), lse.T.split(sizes), strict=True)
    return [(part.unflatten(0, (n_heads, -1)), part_lse.unflatten(0, (n_heads, -1))) for part, part_lse in parts]


def _attend_part(varlen: Varlen, query: Tensor, part: RaggedLayer, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of ``query [H, R, G, D]`` over a part: fp32 of that shape, and ``[H, R, G]``; -inf where a head is empty."""
    if part.gaps:  # sequences stand one behind another
        part = part.among(torch.ones_like(part.positions, dtype=torch.bool))
    heads = [head for head, length in enumerate(part.lengths) if length]
    rows = query.shape[1] * query.shape[2]
    lengths = [part.lengths[head] for head in heads]
    flat = query[heads].reshape(-1, 1, query.shape[3])
    keys, values = (pairs.unsqueeze(1) for pairs in part.pairs)
    found, found_lse = varlen(flat, keys, values, [rows] * len(heads), lengths, scaling, False)
    out = torch.zeros_like(query, dtype=torch.float32)
    lse = torch.full(query.shape[:3], float("-inf"), device=query.device)
    out[heads], lse[heads] = found.view(len(heads), *query.shape[1:]).float(), found_lse.view(len(heads), *query.shape[1:3])
    return out, lse


def load(device: torch.device) -> tuple[str, Varlen] | None:
    """The best library that is installed and knows this GPU, and its name; None if there is none.

    flash-attn 3 for Hopper GPUs under either name it is packaged by, flash-attn 2, or torch's own (2.10 and later).
    """
    if device.type != "cuda" or torch.version.hip:
        return None
    major = torch.cuda.get_device_capability(device)[0]
    three = ("flash_attn_interface", "fa3_fwd_interface") if major == 9 else ()
    for name in (*three, "flash_attn") if major >= 8 else ():
        try:
            return name, _dao(import_module(name).flash_attn_varlen_func)
        except (ImportError, OSError):  # OSError: built for another torch
            continue
    try:
        theirs = import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    return ("torch varlen", _torch(theirs)) if major >= 8 and "enable_gqa" in signature(theirs.varlen_attn).parameters else None


def _dao(function: Callable[..., Any]) -> Varlen:
    """``flash_attn_varlen_func`` of flash-attn 2 or 3. Early releases of 3 always give the log-sum-exp."""
    extra = {"return_attn_probs": True} if "return_attn_probs" in signature(function).parameters else {}

    def varlen(
        query: Tensor, keys: Tensor, values: Tensor, query_lengths: list[int], key_lengths: list[int], scaling: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        starts = _starts(query_lengths, query.device), _starts(key_lengths, query.device)
        longest = max(query_lengths), max(key_lengths)
        found = function(query, keys, values, *starts, *longest, softmax_scale=scaling, causal=causal, **extra)
        return found[0], found[1]

    return varlen


def _torch(theirs: Any) -> Varlen:
    def varlen(
        query: Tensor, keys: Tensor, values: Tensor, query_lengths: list[int], key_lengths: list[int], scaling: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        starts = _starts(query_lengths, query.device), _starts(key_lengths, query.device)
        longest = max(query_lengths), max(key_lengths)
        window = (-1, 0) if causal else (-1, -1)
        aux = theirs.AuxRequest(lse=True)
        found: tuple[Tensor, Tensor] = theirs.varlen_attn(
            query, keys, values, *starts, *longest, return_aux=aux, scale=scaling, window_size=window, enable_gqa=True
        )
        return found

    return varlen


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
