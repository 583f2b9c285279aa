"""The same number of pairs for every head of every layer."""

from __future__ import annotations

from torch import Tensor

from kvzip_memory.compression.allocators import per_layer


def allocate(scores: Tensor, budget: int) -> Tensor:
    return per_layer.allocate(scores.flatten(0, 1).unsqueeze(1), budget).view_as(scores)
