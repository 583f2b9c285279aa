"""Pairs as whole numbers of 8 or 4 bits, with a scale for each block of a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip_memory.compression.codecs.rounding import bits_of, block_of, rounded
from kvzip_memory.context.codes import Vectors


class RoundedCodec:
    """Vectors are turned first, so that no number of a block is much larger than the others. Keys are rounded such that their products with
    queries change least, where these are known and the bits few.

    Args:
        name: of the codec.
        bits: of the numbers of keys and of values, 8 or 4. Odd dimensions have 8.
    """

    def __init__(self, name: str, bits: tuple[int, int]) -> None:
        self._name, self._bits = name, bits

    def identity(self) -> str:
        return self._name

    def narrows(self, dtype: torch.dtype) -> bool:
        return True

    def in_codes(self) -> bool:
        return True

    def asks(self) -> bool:
        return self._bits[0] < 8  # 8 bits are near without

    def keys(self, keys: Tensor, asked: Tensor | None = None) -> Vectors:
        return rounded(keys, self._bits[0], asked)

    def values(self, values: Tensor) -> Vectors:
        return rounded(values, self._bits[1])

    def nbytes(self, dtype: torch.dtype, dim: int) -> tuple[float, float]:
        key, value = (dim * bits / 8 + 2 * dim / block_of(bits, dim) for bits in (bits_of(bits, dim) for bits in self._bits))
        return key, value
