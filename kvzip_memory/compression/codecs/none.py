"""Pairs in the model's own dtype."""

from __future__ import annotations

import torch
from torch import Tensor


class NoCodec:
    def identity(self) -> None:
        return None

    def keys(self, keys: Tensor) -> Tensor:
        return keys

    def values(self, values: Tensor) -> Tensor:
        return values

    def nbytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize

    def stored(self, pairs: Tensor) -> Tensor:
        return pairs
