"""What an allocator owes."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Allocator(Protocol):
    """Chooses the pairs to keep.

    Ours keep exactly ``budget`` pairs (more only if those that are never evicted alone exceed it) and break ties by position in
    ``[L, H, n]``, so the same scores keep the same pairs on every machine.
    """

    def identity(self) -> Any:
        """Its name, with version and parameters if it has any: whatever JSON can hold; part of the context's key."""
        ...

    def allocate(self, scores: Tensor, budget: int) -> Tensor:
        """Choose.

        Args:
            scores: ``[L, H, n]``, higher means keep; ``inf`` marks a protected pair, ``-inf`` one that is gone.
            budget: pairs to keep, over all layers and heads.

        Returns:
            ``[L, H, n]`` bool.
        """
        ...
