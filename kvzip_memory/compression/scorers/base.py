"""What a scorer owes."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from kvzip_memory.compression.prefill import Prefilled, Progress


class Scorer(Protocol):
    """Gives every pair of the layers with full attention its importance.

    One that reads the context once more may have an attribute ``has_rows`` that is true: its queries are what kept pairs are refitted to.
    One whose scores depend on how far behind the text they are taken may have a method ``fading``, which gives the
    :class:`~kvzip_memory.compression.fading.Fading` of a prefix's model: scores of a context that grows are multiplied by it.
    """

    def identity(self) -> dict[str, Any]:
        """Name, version and every parameter that changes a score; part of the context's key."""
        ...

    def cost(self, n_tokens: int) -> int:
        """Tokens the scorer will report to ``progress`` for a prefix of ``n_tokens``."""
        ...

    def score(self, prefilled: Prefilled, progress: Progress) -> Tensor:
        """Scores ``[L, H, n]`` fp32 of the L layers with full attention, higher means keep.

        The pairs are the same after the call as before. Positions before ``prefilled.first`` may hold anything: they
        are protected, or a parent's, which have their scores. If ``prefilled.rows`` is not None, and the scorer
        ``has_rows``, it leaves queries of its pass there.
        """
        ...
