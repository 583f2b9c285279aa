"""What the layers of a model's contexts are like; those that come from files are looked at before they are attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_memory.context import RaggedLayer, States, Window
from kvzip_memory.context.codes import Codes, Vectors
from kvzip_memory.errors import CorruptFileError, InputError
from kvzip_memory.system.printable import brief


class Made(NamedTuple):
    """
    Attributes:
        windows: what each layer sees.
        kinds: of each its KV heads and the dimensions of keys and values.
        states: shapes of what layers without attention remember.
        latent: whether keys are their own values.
        dtype: of the model.
        reads_fewer_bits: whether its attention reads pairs of fewer bits.
    """

    windows: Sequence[Window | None]
    kinds: Sequence[tuple[int, int, int]]
    states: Mapping[str, tuple[int, ...]]
    latent: bool
    dtype: torch.dtype
    reads_fewer_bits: bool

    def check(self, layers: Sequence[RaggedLayer], states: States, where: str) -> None:
        """Look whether layers and states are such.

        Raises:
            CorruptFileError: they are not.
            InputError: they have fewer bits, which the attention does not read.
        """
        if tuple(layer.window for layer in layers) != tuple(self.windows):
            raise CorruptFileError(f"{where}: its layers have other windows than the model's {len(self.windows)}")
        if (shapes := {name: tuple(state.shape) for name, state in states.items()}) != self.states:
            raise CorruptFileError(f"{where}: its states are {brief(shapes)}, and the model's {brief(self.states)}")
        for i, (layer, kind) in enumerate(zip(layers, self.kinds, strict=True)):
            if layer.shared != self.latent:
                raise CorruptFileError(
                    f"{where}: keys of layer {i} are{'' if layer.shared else ' not'} their own values, as in other models"
                )
            if (found := (layer.n_heads, layer.keys.shape[1], layer.values.shape[1])) != kind:
                raise CorruptFileError(f"{where}: heads and dimensions of layer {i} are {found}, and the model's {kind}")
            for pairs in (layer.keys, layer.values):
                if is_read(pairs, self.dtype):
                    continue
                if isinstance(pairs, Tensor) and (pairs.dtype is not torch.float16 or self.dtype.itemsize <= 2):
                    raise CorruptFileError(f"{where}: layer {i} is {pairs.dtype}, and the model {self.dtype}")
                if not self.reads_fewer_bits:
                    raise InputError(f"{where}: layer {i} is {told(pairs)}, which the attention does not read; use attention='cpu'")


def is_read(pairs: Vectors, dtype: torch.dtype) -> bool:
    """Whether any attention of a model of this dtype reads such pairs."""
    return isinstance(pairs, Tensor) and pairs.dtype == dtype


def told(pairs: Vectors) -> str:
    """How pairs are written."""
    return f"in codes of {pairs.way.bits} bits" if isinstance(pairs, Codes) else str(pairs.dtype)
