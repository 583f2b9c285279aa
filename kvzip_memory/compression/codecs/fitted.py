"""The codec that a name means for a model as it is now, whose dtype may be changed at any time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvzip_memory.compression.codecs.base import Codec
from kvzip_memory.compression.codecs.half import HalfCodec
from kvzip_memory.compression.codecs.none import NoCodec
from kvzip_memory.compression.codecs.rounded import RoundedCodec
from kvzip_memory.context.codes import Vectors
from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief

#: Codecs by name.
CODECS: dict[str, Codec] = {
    "none": NoCodec(),
    "fp16": HalfCodec(),
    "int8": RoundedCodec("int8", (8, 8)),
    "k8v4": RoundedCodec("k8v4", (8, 4)),
    "int4": RoundedCodec("int4", (4, 4)),
}


class FittedCodec:
    """
    Args:
        name: of a codec, which is none where it would leave pairs as they are; ``"auto"`` is ``"fp16"`` for float32 that is cast, else
            none.
        now: the model's dtype, and whether what attends to its pairs reads those of fewer bits.

    Raises:
        InputError: there is no such codec; or, by any of its methods, nothing reads what it writes.
    """

    def __init__(self, name: str, now: Callable[[], tuple[torch.dtype, bool]]) -> None:
        if not isinstance(name, str) or name not in ("auto", *CODECS):
            raise InputError(f"codec {brief(name)} is unknown; use one of {', '.join(sorted(('auto', *CODECS)))}")
        self._name, self._now = name, now

    def identity(self) -> str | None:
        return self._codec().identity()

    def narrows(self, dtype: torch.dtype) -> bool:
        return self._codec().narrows(dtype)

    def in_codes(self) -> bool:
        return self._codec().in_codes()

    def asks(self) -> bool:
        return self._codec().asks()

    def keys(self, keys: Tensor, asked: Tensor | None = None) -> Vectors:
        return self._codec().keys(keys, asked)

    def values(self, values: Tensor) -> Vectors:
        return self._codec().values(values)

    def nbytes(self, dtype: torch.dtype, dim: int) -> tuple[float, float]:
        return self._codec().nbytes(dtype, dim)

    def _codec(self) -> Codec:
        dtype, is_read = self._now()
        if self._name == "auto":
            return CODECS["fp16" if is_read and dtype is torch.float32 else "none"]
        codec = CODECS[self._name]
        if not codec.narrows(dtype):
            return CODECS["none"]
        if not is_read:
            raise InputError(f"codec={self._name!r} takes an attention that reads such pairs, as 'cpu' does; use that, or codec='none'")
        return codec
