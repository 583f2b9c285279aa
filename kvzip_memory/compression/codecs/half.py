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

    def keys(self, keys: Tensor) -> Tensor:
        return _stored(keys).to(keys.dtype)

    def values(self, values: Tensor) -> Tensor:
        return _stored(values).to(values.dtype)

    def nbytes(self, dtype: torch.dtype) -> int:
        return min(dtype.itemsize, 2)

    def stored(self, pairs: Tensor) -> Tensor:
        return _stored(pairs)


def _stored(pairs: Tensor) -> Tensor:
    if pairs.itemsize <= 2 or (pairs.numel() and bool(pairs.abs().max() > _MOST)):
        return pairs
    return pairs.to(torch.float16)
