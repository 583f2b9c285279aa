"""The same number of pairs for every layer, heads of a layer compete (as in Ada-KV, arXiv 2407.11550)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip_memory.compression.allocators.global_topk import largest


class PerLayer:
    nested = True

    def identity(self) -> str:
        return "per_layer"

    def allocate(self, scores: Tensor, budget: int) -> Tensor:
        return evenly(scores, budget)


def evenly(scores: Tensor, budget: int) -> Tensor:
    """The largest of each ``scores[i]``, which all have the same share of the budget, as far as it can be divided."""
    edges = [round(budget * i / len(scores)) for i in range(len(scores) + 1)]
    return torch.stack([largest(part, end - start) for part, start, end in zip(scores, edges, edges[1:], strict=False)])
