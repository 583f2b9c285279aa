"""What a refit owes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kvzip_memory.compression.rows import Block


@dataclass(frozen=True)
class LayerPairs:
    """A layer's pairs as a refit sees them: all of them, and which are kept. They are copies, which it may change and give back.

    Attributes:
        head: keys and values ``[H, p, D]`` of the protected head of the context, which are always kept, as they are.
        start: position of the first of the others.
        keys: ``[H, m, D]`` **as they will be stored**.
        values: ``[H, m, D]`` as the model computed them.
        keep: ``[H, m]`` bool.
        pinned: ``[m]`` bool, kept as they are.
        blocks: parts of ``[start, start + m)``, and the queries to fit to.
        ratio: of the pairs that are kept, over all layers and heads.
        stored: other keys ``[H, k, D]``, in the dtype of these, as they will be stored.
    """

    head: tuple[Tensor, Tensor]
    start: int
    keys: Tensor
    values: Tensor
    keep: Tensor
    pinned: Tensor
    blocks: list[Block]
    ratio: float
    stored: Callable[[Tensor], Tensor]


class Refit(Protocol):
    """Changes kept pairs such that attention over them says what attention over all pairs said. A refit is never refitted."""

    @property
    def every(self) -> int:
        """Of the repeated tokens, each how many-th's queries it wants; 0 for none."""
        ...

    def identity(self) -> dict[str, Any] | None:
        """Name, version and every parameter that changes a pair; part of the context's key. None leaves pairs as they are."""
        ...

    def fit(self, pairs: LayerPairs) -> tuple[Tensor, Tensor]:
        """Keys, as they will be stored, and values ``[H, m, D]`` in the dtype of the model's. Those of pairs that are not kept may be
        anything; those of pinned ones are not used."""
        ...
