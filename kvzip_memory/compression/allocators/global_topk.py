"""One ranking over all layers, heads and positions: heads and layers that matter more keep more (the paper's)."""

from __future__ import annotations

import torch
from torch import Tensor


class GlobalTopK:
    nested = True

    def identity(self) -> str:
        return "global"

    def allocate(self, scores: Tensor, budget: int) -> Tensor:
        return largest(scores, budget)


def largest(scores: Tensor, budget: int) -> Tensor:
    """The ``budget`` largest of all scores, and all protected ones."""
    flat = scores.flatten()
    budget = max(budget, int(torch.isposinf(flat).sum()))
    order = torch.sort(flat, descending=True, stable=True).indices
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[order[:budget]] = True
    return keep.view_as(scores)
