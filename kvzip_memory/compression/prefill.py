"""Step 1 of a build: dense pairs in chunks, of a whole prefix or of what follows a compressed one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvzip_memory.attention import RowKV
from kvzip_memory.attention.base import Turn
from kvzip_memory.compression.fading import Fading
from kvzip_memory.compression.rows import Rows
from kvzip_memory.context import NO_STATES, Layers, RaggedLayer, States
from kvzip_memory.context.codes import Vectors, decoded
from kvzip_memory.inference.cache import LastLayerSeen, Row, Tail, turned_by
from kvzip_memory.inference.modeling import LanguageModel

V = TypeVar("V", bound=Vectors)

Progress = Callable[[str, int], None]
#: Keys and values ``[H, m, D]`` of every layer (a sliding layer: of its last ``window - 1`` tokens at least).
DensePairs = list[tuple[Tensor, Tensor]]


class Seen(NamedTuple):
    """A layer of what is compressed already.

    Attributes:
        layer: whose positions are those of where it was made.
        shift: how far its tokens have moved since.
        by: how far queries turn back for it.
    """

    layer: RaggedLayer
    shift: int
    by: int


@dataclass(frozen=True)
class Prefilled:
    """A prefix and its pairs, ready to be scored: dense, but for a compressed parent it may begin with.

    Attributes:
        model: the model.
        dense: pairs of the tokens behind the parent, of all without one. Eviction empties it.
        token_ids: the prefix, n ids, the parent's included.
        protected: the first so many positions are never evicted and need no score.
        opening: ids that open a user's turn after the prefix.
        closing: ids that end a user's turn and open the assistant's.
        encode: tokenises plain text.
        keep: spans ``[start, end)`` that are never evicted either.
        states: what layers without attention remember at the end of the prefix.
        parent: the parent's layers, empty without one. Eviction empties it, so that layers nobody else has are freed on the way.
        start: tokens that the parent, and what it shares, stand for.
        fading: how scores of the parent's pairs fade behind more tokens; None if they do not, or there are none.
        before: layers of the parts that the context shares, which are seen and never changed. The parent's are those behind them.
        shared: tokens that these stand for.
        shifts: how far each of these, and the parent's own, have moved; empty if nothing has.
        nearer: how much nearer to the tokens behind the parent each is seen than it stands then; empty if none is.
        rows: where a scorer leaves queries of its pass over the context for a refit; None if nobody wants them.
        scored_parent: whether the parent's pairs have scores; without them it has all its pairs.
    """

    model: LanguageModel
    dense: DensePairs
    token_ids: tuple[int, ...]
    protected: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    encode: Callable[[str], list[int]]
    keep: tuple[tuple[int, int], ...] = ()
    parent: list[RaggedLayer] = field(default_factory=list)
    start: int = 0
    states: States = field(default_factory=dict)
    fading: Fading | None = None
    before: tuple[Layers, ...] = ()
    shared: int = 0
    shifts: tuple[int, ...] = ()
    nearer: tuple[int, ...] = ()
    rows: Rows | None = None
    scored_parent: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scored_parent", any(layer.scores is not None for layer in self.parent))

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers with full attention, the ones that are compressed."""
        return tuple(i for i, window in enumerate(self.model.windows) if window is None)

    @property
    def first(self) -> int:
        """The first position that needs a score."""
        return self.start if self.scored_parent else max(self.protected, self.shared)

    @property
    def position(self) -> int:
        """Of the token behind the prefix."""
        return len(self.token_ids) - (self.nearer[0] if self.nearer else 0)

    @property
    def room(self) -> int:
        """Tokens that the window has room for behind the prefix."""
        return self.model.window - self.position

    @property
    def pinned(self) -> Tensor:
        """``[n]`` bool on the host, positions that are never evicted."""
        pinned = torch.zeros(len(self.token_ids), dtype=torch.bool)
        for start, end in ((0, self.protected), *self.keep):
            pinned[start:end] = True
        return pinned

    def free(self, layer: int) -> None:
        """Let go of a layer, which nobody asks for any more, and of the parent's."""
        nothing = torch.empty(0)
        self.dense[layer] = nothing, nothing
        if self.parent:
            self.parent[layer] = RaggedLayer(nothing, nothing, (), nothing)

    def pairs(self, layer: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H, end - start, D]`` of a full layer at positions of which none was evicted; of those that are shared the
        first ones alone.
        """
        keys, values = self.dense[layer]
        dense = slice(max(start - self.start, 0), max(end - self.start, 0))
        if start >= self.start:
            return _alike(keys, values, lambda pairs: pairs[:, dense])
        shared = start < self.shared
        began, old = (0, self.before[0][layer]) if shared else (self.shared, self.parent[layer])
        end = min(end, self.shared if shared else self.start)
        rows = [slice(offset + start - began, offset + end - began) for offset in old.offsets[:-1]]  # none is missing before them
        old_keys, old_values = _alike(old.keys, old.values, lambda pairs: torch.stack([decoded(pairs[r], keys.dtype) for r in rows]))
        new_keys = torch.cat([old_keys, keys[:, dense]], 1)
        return new_keys, new_keys if values is keys else torch.cat([old_values, values[:, dense]], 1)

    def seen(self, layer: int) -> list[Seen]:
        """What is compressed already of a layer: what is shared, and the parent's. What a window shows of both is the parent's."""
        own = self.parent[layer : layer + 1]
        if self.model.windows[layer] is not None:
            return [Seen(part, 0, 0) for part in own if any(part.lengths)]
        parts = [*(part[layer] for part in self.before), *own]
        shifts = self.shifts or (0,) * len(parts)
        moved = zip(parts, shifts, turned_by(shifts, self.nearer), strict=True)
        return [Seen(part, shift, by) for part, shift, by in moved if any(part.lengths)]

    def turn(self, asks: int, by: int) -> Turn | None:
        """How queries of a layer are turned for what has moved."""
        return self.model.rotations.turn(asks, by) if by else None

    def row(self, layer: int, key: Tensor, value: Tensor, n_new: int, asks: int) -> RowKV:
        """What tokens behind the prefix see in a layer that ``asks`` for its pairs; ``key`` and ``value`` ``[H, t, D]`` are their own, the
        last ``n_new`` new."""
        keys, values = self.dense[layer]
        position = len(self.token_ids) - keys.shape[1]
        both = torch.cat([keys, key], 1)
        seen = self.seen(layer)
        parts, turns = tuple(part.layer for part in seen), tuple(self.turn(asks, part.by) for part in seen)
        return RowKV(parts, both, both if values is keys else torch.cat([values, value], 1), n_new, position, turns)


def _alike(keys: V, values: V, change: Callable[[V], Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values, changed alike; one tensor if they are."""
    changed = change(keys)
    return changed, changed if values is keys else change(values)


class _Preallocated(DynamicLayer):
    """A layer with room for all its tokens from the start: nothing is copied when it grows."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        keys, values = (new.new_empty(*new.shape[:2], self._n, new.shape[3]) for new in (key_states, value_states))
        self._buffers = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


class _PairsOnly(DynamicCache):
    """Ends the forward when the last layer's pairs are there: nobody needs what would be made of them."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pairs = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            raise LastLayerSeen
        return pairs


def prefill(model: LanguageModel, token_ids: Sequence[int], progress: Progress) -> tuple[DensePairs, States]:
    """The pairs of ``token_ids`` and the states behind them, by the model's own attention. On a CPU ours is faster, which needs no masks
    and no copies of pairs.
    """
    ours = model.device.type == "cpu" and not any(model.windows)  # what a window hides is not kept there
    if ours or model.layout.stateful or model.layout.latent:
        return read_behind(model, Row((), 0, Tail(len(token_ids))), token_ids, progress)
    cache = _PairsOnly(config=model.model.config)
    cache.layers = [
        _Preallocated(len(token_ids)) if window is None else layer for layer, window in zip(cache.layers, model.windows, strict=False)
    ]
    for count in model.fill(token_ids, 0, cache):
        progress("prefill", count)
    pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    for i, window in enumerate(model.windows):
        if window is not None:  # a slice of all it has seen; keep no more than the window
            pairs[i] = (pairs[i][0].clone(), pairs[i][1].clone())
    return pairs, NO_STATES


def read_behind(model: LanguageModel, row: Row, token_ids: Sequence[int], progress: Progress) -> tuple[DensePairs, States]:
    """The pairs of ``token_ids`` and the states behind them, behind a row without a tail, of which the context is only read."""
    for count in model.append(row, token_ids):
        progress("prefill", count)
    return row.tail.pairs(len(token_ids)), row.remembered
