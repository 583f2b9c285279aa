"""Pairs in the model's own dtype."""

from __future__ import annotations

import torch
from torch import Tensor


class NoCodec:
    def identity(self) -> None:
        return None

    def narrows(self, dtype: torch.dtype) -> bool:
        return False

    def in_codes(self) -> bool:
        return False

    def asks(self) -> bool:
        return False

    def keys(self, keys: Tensor, asked: Tensor | None = None) -> Tensor:
        return keys

    def values(self, values: Tensor) -> Tensor:
        return values

    def nbytes(self, dtype: torch.dtype, dim: int) -> tuple[float, float]:
        return dim * dtype.itemsize, dim * dtype.itemsize
