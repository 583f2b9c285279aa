"""The same number of pairs for every head of every layer."""

from __future__ import annotations

from torch import Tensor

from kvzip_memory.compression.allocators.per_layer import evenly


class Uniform:
    nested = True

    def identity(self) -> str:
        return "uniform"

    def allocate(self, scores: Tensor, budget: int) -> Tensor:
        return evenly(scores.flatten(0, 1).unsqueeze(1), budget).view_as(scores)
