"""What a refit owes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kvzip_memory.compression.rows import Block


@dataclass(frozen=True)
class LayerPairs:
    """A layer's pairs as a refit sees them: all of them, and which are kept.

    Attributes:
        head: keys and values ``[H, p, D]`` of the protected head of the context, which are always kept, as they are.
        start: position of the first of the others.
        keys: ``[H, m, D]`` **as they will be stored**.
        values: ``[H, m, D]`` as the model computed them.
        keep: ``[H, m]`` bool.
        pinned: ``[m]`` bool, kept as they are.
        blocks: parts of ``[start, start + m)``, and the queries to fit to.
        ratio: of the pairs that are kept, over all layers and heads.
    """

    head: tuple[Tensor, Tensor]
    start: int
    keys: Tensor
    values: Tensor
    keep: Tensor
    pinned: Tensor
    blocks: list[Block]
    ratio: float


class Refit(Protocol):
    """Gives kept pairs other values, such that attention over them says what attention over all pairs said. A refit is never refitted."""

    @property
    def every(self) -> int:
        """Of the repeated tokens, each how many-th's queries it wants; 0 for none."""
        ...

    def identity(self) -> dict[str, Any] | None:
        """Name, version and every parameter that changes a value; part of the context's key. None leaves values as they are."""
        ...

    def values(self, pairs: LayerPairs) -> Tensor:
        """Values ``[H, m, D]`` in the dtype of the model's; those of pairs that are not kept may be anything."""
        ...
