"""Recurrent and convolution states in one forward: read from rows that are never written to, given back when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from kvzip_memory.context import States


class StateCache(Cache):
    """A transformers cache of no layers, but for the states of those without attention.

    Args:
        rows: what each row of the batch remembers; the same states of each, or none of any.
    """

    def __init__(self, rows: Sequence[States]) -> None:
        super().__init__(layers=[])
        self._states = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}  # copies, which may be written to

    def states(self) -> list[States]:
        """Of each row, as they are now; copies where there are several."""
        batch = len(next(iter(self._states.values()), ()))
        return [{name: state[b : b + 1].clone() if batch > 1 else state for name, state in self._states.items()} for b in range(batch)]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.get(f"{layer_idx}.conv.{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._states.get(f"{layer_idx}.recurrent.{state_idx}")

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        return any(layer_idx is None or name.startswith(f"{layer_idx}.") for name in self._states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Remember the last columns; what a convolution sees: the new ones behind those before, or at the beginning behind zeros."""
        before = self.get_conv_state(layer_idx, state_idx)
        if before is None:
            size = conv_kernel_size or conv_states.shape[-1]
            seen = pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            size, seen = before.shape[-1], torch.cat([before, conv_states], -1)
        self._states[f"{layer_idx}.conv.{state_idx}"] = seen[..., -size:].clone()
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self._states[f"{layer_idx}.recurrent.{state_idx}"] = recurrent_states
        return recurrent_states
