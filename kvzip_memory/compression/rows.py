"""Queries that a scorer's pass over the context has made, kept for a refit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """A part of the context and what one layer asks of it while it is repeated.

    Attributes:
        start, end: its positions ``[start, end)`` in the context.
        queries: ``[H, R, D]``, post-RoPE, of all query heads of each KV head.
        scaling: of the attention's logits.
    """

    start: int
    end: int
    queries: Tensor
    scaling: float


class Rows:
    """Some queries of a repeat pass: all of its instruction, and of the repeated tokens every few, other ones for each query head of a
    group. Chosen by position, so the same build takes the same.

    Those of models in float32 are kept in float16: a tenth of the dense cache's bytes.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._taken: dict[int, dict[tuple[int, int], list[tuple[Tensor, float]]]] = {}

    def take(self, layer: int, start: int, end: int, queries: Tensor, scaling: float, first: int, lead: int = 0) -> None:
        """Queries ``[H, G, T, D]`` of consecutive tokens of the repeat of ``[start, end)``.

        Args:
            first: which of the repeated tokens the first of them stands for; below zero for those of the instruction.
            lead: so many between instruction and block repeat what stands before the block, and ask nothing of it.
        """
        _, n_group, n_rows, _ = queries.shape
        row = torch.arange(first, first + n_rows)
        shift = torch.arange(n_group).unsqueeze(1) * self._every // n_group
        wanted = (row < -lead) | ((row >= 0) & ((row - shift) % self._every == 0))
        taken = queries.transpose(1, 2)[:, wanted.T.to(queries.device)]  # token by token, so that pieces of any size give one order
        if taken.dtype == torch.float32:
            taken = taken.half()
        self._taken.setdefault(layer, {}).setdefault((start, end), []).append((taken, scaling))

    def pop(self, layer: int) -> list[Block]:
        """Those of a layer, in the order of their blocks; they are let go."""
        blocks = sorted(self._taken.pop(layer, {}).items())
        return [Block(start, end, torch.cat([q for q, _ in pieces], 1), pieces[0][1]) for (start, end), pieces in blocks]
