"""Pairs as the model computed them."""

from __future__ import annotations

from torch import Tensor

from kvzip_memory.compression.refit.base import LayerPairs


class NoRefit:
    every = 0

    def identity(self) -> None:
        return None

    def fit(self, pairs: LayerPairs) -> tuple[Tensor, Tensor]:
        return pairs.keys, pairs.values
