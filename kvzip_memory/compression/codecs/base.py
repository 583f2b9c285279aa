"""What a codec owes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvzip_memory.context.codes import Vectors


class Codec(Protocol):
    """Writes pairs in fewer bits. Keys first, so that a refit can fit values to keys as they will be read; then values."""

    def identity(self) -> str | None:
        """What it is, for keys; None for none."""
        ...

    def narrows(self, dtype: torch.dtype) -> bool:
        """Whether it writes numbers of this dtype in fewer bits."""
        ...

    def in_codes(self) -> bool:
        """Whether it writes :class:`~kvzip_memory.context.codes.Codes`."""
        ...

    def asks(self) -> bool:
        """Whether it wants to know what is asked of keys."""
        ...

    def keys(self, keys: Tensor, asked: Tensor | None = None) -> Vectors:
        """Keys ``[..., n, D]`` as they are stored. Those that were stored, read in 32 bits and are stored again stay what they were.

        Args:
            asked: ``[H, D, D]`` fp32 for keys ``[H, n, D]``, the mean outer product of queries with themselves; None if none are known.
        """
        ...

    def values(self, values: Tensor) -> Vectors:
        """Values ``[..., n, DV]`` of kept pairs, as they are stored."""
        ...

    def nbytes(self, dtype: torch.dtype, dim: int) -> tuple[float, float]:
        """Bytes that a key, and that a value, of so many numbers of this dtype takes."""
        ...
