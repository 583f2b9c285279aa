"""Which pairs are kept? One method a file: ``allocate(scores, budget) -> keep``.

Every allocator keeps exactly ``budget`` pairs (more only if the protected ones alone exceed it) and breaks ties by
position in ``[L, H, n]``, so the same scores keep the same pairs on every machine.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kvzip_memory.compression.allocators.global_topk import allocate as _global
from kvzip_memory.compression.allocators.per_layer import allocate as _per_layer
from kvzip_memory.compression.allocators.uniform import allocate as _uniform

__all__ = ["ALLOCATORS", "Allocator"]


class Allocator(Protocol):
    def __call__(self, scores: Tensor, budget: int) -> Tensor:
        """Choose pairs to keep.

        Args:
            scores: ``[L, H, n]``, higher means keep; ``inf`` marks a protected pair.
            budget: pairs to keep, over all layers and heads.

        Returns:
            ``[L, H, n]`` bool.
        """
        ...


ALLOCATORS: dict[str, Allocator] = {"global": _global, "per_layer": _per_layer, "uniform": _uniform}
