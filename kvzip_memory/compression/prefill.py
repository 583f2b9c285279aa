"""Step 1 of a build: the dense cache, by the model's own attention, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvzip_memory.modeling import LanguageModel, LastLayerSeen

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Prefilled:
    """A prefix and its dense cache, ready to be scored.

    Attributes:
        model: the model.
        cache: dense, ``[1, H, n, D]`` a layer (a sliding layer: its last ``window - 1`` tokens).
        token_ids: the prefix, n ids.
        protected: the first so many positions are never evicted and need no score.
        keep: spans ``[start, end)`` that are never evicted either.
        opening: ids that open a user's turn after the prefix.
        closing: ids that end a user's turn and open the assistant's.
        encode: tokenises plain text.
    """

    model: LanguageModel
    cache: DynamicCache
    token_ids: tuple[int, ...]
    protected: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    encode: Callable[[str], list[int]]
    keep: tuple[tuple[int, int], ...] = ()

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers with full attention, the ones that are compressed."""
        return tuple(i for i, window in enumerate(self.model.windows) if window is None)


class _PairsOnly(DynamicCache):
    """Ends the forward when the last layer's pairs are there: nobody needs what would be made of them."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pairs = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            raise LastLayerSeen
        return pairs


def prefill(model: LanguageModel, token_ids: Sequence[int], progress: Progress) -> DynamicCache:
    """The dense cache of ``token_ids``."""
    cache = _PairsOnly(config=model.model.config)
    for count in model.fill(token_ids, 0, cache):
        progress("prefill", count)
    for layer, window in zip(cache.layers, model.windows, strict=True):
        if window is not None:  # a slice of all it has seen; keep no more than the window
            layer.keys, layer.values = (t.clone(memory_format=torch.contiguous_format) for t in (layer.keys, layer.values))
    return cache
