"""What a codec owes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Rounds pairs to what fewer bits can say. Keys first, so that a refit can fit values to keys that are stored; then values."""

    def identity(self) -> str | None:
        """What it is, for keys; None for none."""
        ...

    def keys(self, keys: Tensor) -> Tensor:
        """Keys ``[H, m, D]`` as they will be read, in their dtype."""
        ...

    def values(self, values: Tensor) -> Tensor:
        """Values ``[n, D]`` of the kept pairs as they will be read, in their dtype."""
        ...

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes that a number of this dtype takes."""
        ...

    def stored(self, pairs: Tensor) -> Tensor:
        """Keys or values that are rounded already, as they are stored."""
        ...
