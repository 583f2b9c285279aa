"""Pairs in the model's own dtype."""

from __future__ import annotations

from torch import Tensor


class NoCodec:
    def keys(self, keys: Tensor) -> Tensor:
        return keys

    def values(self, values: Tensor) -> Tensor:
        return values
