"""What an allocator owes."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Allocator(Protocol):
    """Chooses the pairs to keep.

    Ours keep exactly ``budget`` pairs (more only if those that are never evicted alone exceed it) and break ties by position in
    ``[L, H, n]``, so the same scores keep the same pairs on every machine.

    One may have an attribute ``nested`` that is true: for a smaller budget it keeps a part of what it keeps for a larger one, and the
    scores of what it leaves change nothing about that. Only by such a one, registered under the name in its identity, a context is cut.
    """

    def identity(self) -> Any:
        """Its name, or a mapping with ``name``, ``version`` and parameters, as JSON can hold it; part of the context's key."""
        ...

    def allocate(self, scores: Tensor, budget: int) -> Tensor:
        """Choose.

        Args:
            scores: ``[L, H, n]`` fp16, a copy, higher means keep; ``inf`` marks a pair that is never evicted, and is kept whatever comes
                back, ``-inf`` one that is gone.
            budget: pairs to keep, over all layers and heads.

        Returns:
            ``[L, H, n]`` bool.
        """
        ...
