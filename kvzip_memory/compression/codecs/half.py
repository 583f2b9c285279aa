"""Pairs of a model of 32 bits as 16: half the bytes. They are cast back where they are attended to."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = torch.finfo(torch.float16).max


class HalfCodec:
    """fp16 has 11 significant bits where bf16 has 8. A layer's keys or values with a number beyond 65,504 stay as they are, and so do those
    of 16 bits."""

    def identity(self) -> str:
        return "fp16"

    def narrows(self, dtype: torch.dtype) -> bool:
        return dtype.itemsize > 2

    def in_codes(self) -> bool:
        return False

    def asks(self) -> bool:
        return False

    def keys(self, keys: Tensor, asked: Tensor | None = None) -> Tensor:
        return self.values(keys)

    def values(self, values: Tensor) -> Tensor:
        if values.itemsize <= 2 or (values.numel() and bool(values.abs().max() > _MOST)):
            return values
        return values.to(torch.float16)

    def nbytes(self, dtype: torch.dtype, dim: int) -> tuple[float, float]:
        size = dim * min(dtype.itemsize, 2)
        return size, size
