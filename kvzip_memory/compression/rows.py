"""Queries that a scorer's pass over the context has made, kept for a refit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_memory.attention import Softmax


class Block(NamedTuple):
    """A part of the context and what one layer asks of it while it is repeated.

    Attributes:
        start, end: its positions ``[start, end)`` in the context.
        queries: ``[H, R, D]``, post-RoPE, of all query heads of each KV head.
        scaling: of products with keys; that makes logits of them.
        cap: of the logits, as in :class:`~kvzip_memory.attention.Softmax`; None if there is none.
        sinks: ``[H, R]`` fp32, a logit without a value beside those of each query; None if there are none.
    """

    start: int
    end: int
    queries: Tensor
    scaling: float
    cap: float | None = None
    sinks: Tensor | None = None


class Rows:
    """Some queries of a repeat pass: all of its instruction, and of the repeated tokens every few, other ones for each query head of a
    group. Chosen by position, so the same build takes the same.

    Those of models in float32 are kept in float16: a tenth of the dense cache's bytes.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._taken: dict[int, dict[tuple[int, int], dict[int, list[Block]]]] = {}

    def take(self, layer: int, start: int, end: int, queries: Tensor, softmax: Softmax, first: int, lead: int = 0, asks: int = 0) -> None:
        """Queries ``[H, G, T, D]`` of consecutive tokens of the repeat of ``[start, end)``.

        Args:
            first: which of the repeated tokens the first of them stands for; below zero for those of the instruction.
            asks: the layer whose queries they are, which may be another than the one whose pairs they ask.
            lead: so many between instruction and block repeat what stands before the block, and ask nothing of it.
        """
        _, n_group, n_rows, _ = queries.shape
        row = torch.arange(first, first + n_rows)
        shift = torch.arange(n_group).unsqueeze(1) * self._every // n_group
        wanted = (row < -lead) | ((row >= 0) & ((row - shift) % self._every == 0))
        wanted = wanted.T.to(queries.device)
        taken = queries.transpose(1, 2)[:, wanted]  # token by token, so that pieces of any size give one order
        if taken.dtype == torch.float32:
            taken = taken.half()
        sinks = softmax.sinks_of(len(queries), n_rows)
        if sinks is not None:
            sinks = sinks.unflatten(1, (n_group, n_rows)).mT[:, wanted]
        block = Block(start, end, taken, softmax.scaling, softmax.cap, sinks)
        self._taken.setdefault(layer, {}).setdefault((start, end), {}).setdefault(asks, []).append(block)

    def pop(self, layer: int) -> list[Block]:
        """Those of a layer, in the order of their blocks; they are let go."""
        blocks = sorted(self._taken.pop(layer, {}).items())
        return [_joined([piece for _, pieces in sorted(asked.items()) for piece in pieces]) for _, asked in blocks]


def _joined(pieces: list[Block]) -> Block:
    """The queries of one block, which were taken in pieces."""
    queries, sinks = torch.cat([piece.queries for piece in pieces], 1), [piece.sinks for piece in pieces if piece.sinks is not None]
    return pieces[0]._replace(queries=queries, sinks=torch.cat(sinks, 1) if sinks else None)
