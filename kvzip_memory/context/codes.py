"""Vectors in a few bits: blocks of whole numbers, each with a scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Way(NamedTuple):
    """How vectors are written. Only those that are written alike can stand in one tensor.

    Attributes:
        bits: of a number, 8 or 4.
        dim: of a vector.
        blocks: of a vector, each with a scale.
    """

    bits: int
    dim: int
    blocks: int


@dataclass(frozen=True, eq=False)
class Codes:
    """Vectors ``[..., n, D]``, which :func:`turn` has turned, and of which each has S blocks of numbers. Nobody writes to them.

    Attributes:
        codes: ``[..., n, D]`` int8; or ``[..., n, D / 2]`` uint8, of 4 bits: the low ones of a byte are a number of a vector's first half,
            the high ones that of its second half which stands as far from its start.
        scales: ``[..., n, S]`` bf16, what a code of 8 bits stands for so many of; one of 4 bits for 16 times as many.
    """

    codes: Tensor
    scales: Tensor

    @property
    def way(self) -> Way:
        bits = 8 if self.codes.dtype is torch.int8 else 4
        return Way(bits, self.codes.shape[-1] * 8 // bits, self.scales.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        *others, size = self.codes.shape
        return (*others, size if self.codes.dtype is torch.int8 else 2 * size)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What they are made of."""
        return self.codes, self.scales

    def __getitem__(self, rows: slice | Tensor | tuple[Tensor, ...]) -> Codes:
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """Codes and scales, changed alike in all dimensions but the last."""
        return Codes(change(self.codes), change(self.scales))

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Vectors ``[..., n, D]``, turned."""
        found = self.codes.new_empty(self.shape, dtype=dtype)
        if self.codes.dtype is torch.int8:
            found.copy_(self.codes)
        else:
            signed, (low, high) = self.codes.view(torch.int8), found.chunk(2, -1)
            low.copy_(signed << 4)
            high.copy_(signed & -16)
        found.unflatten(-1, (self.scales.shape[-1], -1)).mul_(self.scales.unsqueeze(-1))
        return found


#: Keys or values ``[..., n, D]``: numbers, or codes of them.
Vectors = Tensor | Codes


def numbers(vectors: Vectors, dtype: torch.dtype) -> Tensor:
    """Vectors in a dtype; those in codes turned."""
    return vectors.numbers(dtype) if isinstance(vectors, Codes) else vectors.to(dtype)


def decoded(vectors: Vectors, dtype: torch.dtype) -> Tensor:
    """Vectors in a dtype as they were before they were written, but for what rounding has taken."""
    if not isinstance(vectors, Codes):
        return vectors.to(dtype)
    return turned_as(vectors, vectors.numbers(torch.promote_types(dtype, torch.float32))).to(dtype)


def turned_as(vectors: Vectors, others: Tensor) -> Tensor:
    """Others ``[..., D]``, turned as vectors are that may be codes, or back again."""
    return turn(others) if isinstance(vectors, Codes) else others


def turn(vectors: Tensor) -> Tensor:
    """Vectors ``[..., D]`` in another basis, in which no number is much larger than others: by a Hadamard matrix, of the largest power of
    two that divides D, if that is 8 or more. To turn them twice is to leave them as they are, and products of two stay what they are
    (QuaRot, arXiv 2404.00456).
    """
    return vectors if vectors.shape[-1] % 8 else vectors @ _hadamard(vectors.shape[-1], vectors.dtype, vectors.device)


@lru_cache(maxsize=64)
def _hadamard(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[D, D]``, symmetric and orthogonal."""
    size = dim & -dim
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / size**0.5] * (dim // size)).to(device, dtype)


def are_alike(vectors: Sequence[Vectors]) -> bool:
    """Whether all can stand in one tensor, or in the same codes."""
    first, *others = vectors
    if isinstance(first, Codes):
        return all(isinstance(other, Codes) and other.way == first.way for other in others)
    return all(isinstance(other, Tensor) and other.dtype is first.dtype for other in others)


def joined(vectors: Sequence[Vectors], dim: int = 0) -> Vectors:
    """Vectors that are alike, one behind another in a dimension that is not the last."""
    first = vectors[0]
    if isinstance(first, Codes):
        codes = [one for one in vectors if isinstance(one, Codes)]
        return Codes(torch.cat([one.codes for one in codes], dim), torch.cat([one.scales for one in codes], dim))
    return torch.cat([one for one in vectors if isinstance(one, Tensor)], dim)


def each(vectors: Vectors, change: Callable[[Tensor], Tensor]) -> Vectors:
    """Vectors, changed in all dimensions but the last."""
    return vectors.each(change) if isinstance(vectors, Codes) else change(vectors)


def tensors_of(vectors: Vectors) -> tuple[Tensor, ...]:
    """What vectors are made of."""
    return vectors.tensors if isinstance(vectors, Codes) else (vectors,)
