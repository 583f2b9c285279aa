"""What a codec owes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Rounds pairs to what fewer bits can say. Keys first, so that a refit can fit values to keys that are stored; then values."""

    def keys(self, keys: Tensor) -> Tensor:
        """Keys ``[H, m, D]`` as they will be read."""
        ...

    def values(self, values: Tensor) -> Tensor:
        """Values ``[n, D]`` of the kept pairs as they will be read."""
        ...
