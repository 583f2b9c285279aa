"""What a forward keeps for our attention: recurrent and convolution states, which are read from rows that are never written to and given
back when it has ended, and latents, which are attended to as they are cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from kvzip_memory.context import States


class CallCache(Cache):
    """A transformers cache of no layers: pairs are stored where they are attended to, which knows which of the columns are padding.

    Args:
        rows: what each row of the batch remembers; the same states of each, or none of any.
        latent: whether the model caches latents.

    Attributes:
        latents, positions: see :class:`~kvzip_memory.attention.AttentionCall`.
    """

    positions: Tensor

    def __init__(self, rows: Sequence[States], latent: bool) -> None:
        super().__init__(layers=[])
        self._latent, self.latents = latent, dict[int, Tensor]()
        self._states = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}  # copies, which may be written to

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New pairs as they are; of latents and rotated keys the first alone, so that hardly anything is expanded."""
        if not self._latent:
            return key_states, value_states
        self.latents[layer_idx] = torch.cat([key_states, value_states], -1)
        return key_states[:, :, :1], value_states[:, :, :1]

    def states(self) -> list[States]:
        """Of each row, as they are now, each in a storage of its own."""
        batch = len(next(iter(self._states.values()), ()))
        return [{name: _own(state[b : b + 1]) for name, state in self._states.items()} for b in range(batch)]

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


def _own(tensor: Tensor) -> Tensor:
    """It, if its storage holds nothing else, or a copy."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous() else tensor.clone()
