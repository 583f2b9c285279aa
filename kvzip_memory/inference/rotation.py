"""How a model rotates its queries, found by looking at what it computes.

A single token attends to nothing but itself, so a model gives the same of it at every position, but for the rotation of its query and key.
One forward each at a few positions shows which of the model's frequencies turn which dimensions of a layer, and whether anything else
depends on the position, of which no name in a configuration tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvzip_memory.attention import BACKENDS, RowKV, Softmax
from kvzip_memory.attention.base import Turn
from kvzip_memory.errors import UnsupportedModelError
from kvzip_memory.inference.layout import Layout
from kvzip_memory.inference.states import CallCache

_PROBED = 1, 77  # positions that are looked at, beside the last of the window
#: How far a query may be from what a rotation says, as a part of its length: cosines of 16 bits, and products of large positions.
_TOLERANCE = 0.03
_CACHED = 4096  # turns that are remembered

Fill = Callable[[Sequence[int], int, "_Probe", "_Probe"], Iterator[int]]


class _Rotation(NamedTuple):
    """Of one layer.

    Attributes:
        frequencies: ``[r]`` fp64, radians a position, of each dimension that is rotated, with the sign of the sine that goes to it.
        start: the first of these dimensions.
        partner: ``[r]``, which one each is rotated with.
        halves: whether that is the one half of them farther on.
    """

    frequencies: Tensor
    start: int
    partner: Tensor
    halves: bool

    def turn(self, by: int) -> Turn:
        """That takes queries ``by`` positions back."""
        angles = -by * self.frequencies
        return Turn(by, angles.cos().float(), angles.sin().float(), self.start, self.partner, self.halves)


class Rotations:
    """Of all layers; measured when they are first wanted.

    Args:
        fill: runs the model's layers over some tokens, see :meth:`LanguageModel.fill`.
        model: whose buffers have the frequencies.
        layout: of its layers.
        window: of the model, in tokens.
    """

    def __init__(self, fill: Fill, model: PreTrainedModel, layout: Layout, window: int) -> None:
        self._fill, self._model, self._layout, self._window = fill, model, layout, window
        self._found: dict[int, _Rotation | None] | None = None
        self._turns: dict[tuple[int, int], Turn | None] = {}

    def measure(self) -> None:
        """Find them, once. Not to be called where the model computes.

        Raises:
            UnsupportedModelError: what the model computes of a token depends on its position otherwise.
        """
        if self._found is not None:
            return
        kind = self._model.config.model_type
        if self._layout.stateful:
            raise UnsupportedModelError(f"{kind!r} has layers that remember states, which cannot be put together from parts")
        positions = (*_PROBED, self._window - 1)
        origin, *others = (self._asked(position) for position in (0, *positions))
        self._found = {
            layer: self._rotation(layer, query, [(at, asked[layer]) for at, asked in zip(positions, others, strict=True)])
            for layer, query in origin.items()
        }

    def turn(self, layer: int, by: int) -> Turn | None:
        """How queries of a layer are turned for what has moved ``by`` positions; None if they stay as they are."""
        assert self._found is not None, "to be measured before"
        if by == 0 or (rotation := self._found[layer]) is None:
            return None
        if (layer, by) not in self._turns:
            for oldest in list(self._turns)[:-_CACHED]:
                self._turns.pop(oldest, None)
            self._turns[layer, by] = rotation.turn(by)
        return self._turns[layer, by]

    def _asked(self, position: int) -> dict[int, Tensor]:
        probe = _Probe(self._layout)
        for _ in self._fill([0], position, probe, probe):
            pass
        return probe.asked

    def _rotation(self, layer: int, origin: Tensor, moved: Sequence[tuple[int, Tensor]]) -> _Rotation | None:
        """What takes a query ``[H, D]`` at position 0 to what it is at others; None if it stays as it is."""
        if all(_apart(query, origin) <= _TOLERANCE for _, query in moved):
            return None
        for rotation in self._candidates(origin.shape[1]):
            if all(_apart(query, rotation.turn(-at).of(origin)) <= _TOLERANCE for at, query in moved):
                return rotation
        raise UnsupportedModelError(
            f"{self._model.config.model_type!r} tells layer {layer} where a token stands otherwise than by rotating its query, so parts "
            "cannot be moved; load their texts as one"
        )

    def _candidates(self, dim: int) -> Iterator[_Rotation]:
        """All ways in which the model's frequencies could rotate queries of so many dimensions."""
        buffers = [buffer for name, buffer in self._model.named_buffers() if name.endswith("inv_freq") and buffer.ndim == 1]
        for buffer in buffers:
            half = len(buffer)
            near, numbers = buffer.detach().double(), torch.arange(2 * half, device=buffer.device)
            for frequencies, partner, halves in (
                (torch.cat([-near, near]), numbers.roll(half), True),
                (torch.stack([-near, near], 1).flatten(), numbers ^ 1, False),
            ):
                for start in {0, dim - 2 * half} if dim >= 2 * half else ():
                    yield _Rotation(frequencies, start, partner, halves)
                    yield _Rotation(-frequencies, start, partner, halves)


class _Probe(CallCache):
    """Cache and attention of one token that sees itself alone; keeps its queries."""

    def __init__(self, layout: Layout) -> None:
        super().__init__([{}], layout.latent)
        self._layout, self._pairs = layout, dict[int, tuple[Tensor, Tensor]]()
        self.asked: dict[int, Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        place = self._layout.places[layer]
        if layer == self._layout.owners[place]:
            self._pairs[place] = key[0], value[0]
        self.asked[layer] = query[0, :, 0].float()
        return BACKENDS["cpu"](query, [RowKV((), *self._pairs[place], 1, 0)], softmax, None)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm().clamp(min=torch.finfo(one.dtype).tiny))
