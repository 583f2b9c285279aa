"""Which pairs are kept: the same question for a build and for a cut of what was built."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip_memory.compression.allocators import Allocator
from kvzip_memory.compression.methods import owed
from kvzip_memory.compression.ratios import pairs_kept


def choose(allocator: Allocator, scores: Tensor, ratio: float, protected: int) -> Tensor:
    """What an allocator keeps of scores ``[L, H, n]``, and all that is never evicted, whatever it says: bool of that shape.

    Args:
        protected: so many positions are the head, which is outside the budget.

    Raises:
        ModelError: the allocator gave something else.
    """
    n_layers, n_heads, n = scores.shape
    given = allocator.allocate(scores.clone(), pairs_kept(ratio, n, protected, n_layers * n_heads))
    return owed(allocator, "its choice", given, scores.shape, torch.bool).to(scores.device) | scores.isposinf()
