"""A session's private pairs, and the cache of one forward over a batch of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvzip_memory.attention import AttentionBackend, RowKV, Softmax
from kvzip_memory.attention.base import Turn
from kvzip_memory.context import NO_STATES, Layers, RaggedLayer, States
from kvzip_memory.inference.layout import Layout
from kvzip_memory.inference.rotation import Rotations
from kvzip_memory.inference.states import CallCache


class Tail:
    """Private dense pairs of one session: per layer keys and values ``[H, capacity, D]``, of which ``length`` count.

    Buffers double when full, so a token costs no copy of the earlier ones; :meth:`crop` is O(1).

    Attributes:
        length: pairs a head that count.
        capacity: pairs a head there is room for, the same in every layer.
        states: what layers without attention remember behind them; None for what they did before.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.length = 0
        self.capacity = capacity
        self.states: States | None = None
        self._marks: dict[int, States] = {}  # states behind fewer pairs, by their number
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[H, n, D]`` behind the counted entries and return views of all of them, ``[H, length + n, D]``.

        The entries count only after :meth:`advance`: a forward that fails half way leaves the tail as it was.
        """
        end = self.length + keys.shape[1]
        self.reserve(end)
        if layer not in self._layers:
            room = keys.new_empty(len(keys), self.capacity, keys.shape[2])
            self._layers[layer] = room, room if values is keys else values.new_empty(len(values), self.capacity, values.shape[2])
        tail_keys, tail_values = self._layers[layer]
        tail_keys[:, self.length : end] = keys
        if tail_values is not tail_keys:
            tail_values[:, self.length : end] = values
        return self._views(layer, end)

    def seen(self, layer: int, n: int) -> tuple[Tensor, Tensor]:
        """What :meth:`append` has returned for the last ``n`` entries of a layer, which do not count yet."""
        return self._views(layer, self.length + n)

    def _views(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = self._layers[layer]
        seen = keys[:, :end]
        return seen, seen if values is keys else values[:, :end]

    def reserve(self, entries: int) -> None:
        """Make room for so many entries in every layer."""
        if entries > self.capacity:
            capacity = max(64, 1 << (entries - 1).bit_length())
            for layer, (keys, values) in self._layers.items():
                grown = self._grown(keys, capacity)
                self._layers[layer] = grown, grown if values is keys else self._grown(values, capacity)
            self.capacity = capacity

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = old.new_empty(old.shape[0], capacity, old.shape[2])
        new[:, : self.length] = old[:, : self.length]
        return new

    def advance(self, n: int, states: States | None = None) -> None:
        """Count the ``n`` entries every layer has just been given, behind which layers without attention remember ``states``."""
        self.length, self.states = self.length + n, states

    def mark(self) -> None:
        """Remember the states here, so that :meth:`crop` can go back to them. Only the last mark is kept."""
        self._marks = {} if self.states is None else {self.length: self.states}

    def crop(self, length: int) -> None:
        """Forget everything after the first ``length`` entries; where there are states, everything after the last mark before that."""
        if length >= self.length:
            return
        if self.states is not None:
            self._marks = {at: states for at, states in self._marks.items() if at <= length}
            length = max(self._marks, default=0)
            self.states = self._marks.get(length)
        self.length = length

    def clear(self) -> None:
        """Forget everything, also what the entries are made of."""
        self.length, self.capacity, self.states, self._marks, self._layers = 0, 0, None, {}, {}

    def pairs(self, end: int) -> list[tuple[Tensor, Tensor]]:
        """Views of the first ``end`` entries, keys and values ``[H, end, D]`` of every layer."""
        return [self._views(layer, end) for layer in sorted(self._layers)]

    def copy(self, end: int | None = None) -> Tail:
        """An independent tail with the same entries, or the first ``end`` of them, which only a tail without states can be cut to."""
        twin = Tail()
        twin.length, twin.capacity = (self.length, self.capacity) if end is None else (end, end)
        twin.states, twin._marks = self.states, {**self._marks}
        for layer in self._layers:
            keys, values = self._views(layer, twin.capacity)
            own = keys.clone()
            twin._layers[layer] = own, own if values is keys else values.clone()
        return twin


class Row(NamedTuple):
    """One row of a batch: a shared context's layers, or none, and the tail of the session that asks.

    Attributes:
        layers: the context's own, leased for the time of the call; empty without a context.
        start: tokens the context stands for.
        tail: what came after them.
        states: the context's.
        before: layers of the parts that the context shares with others, which stand before its own, in their order.
        shifts: how far each part, its own included, has moved from where it was made; empty if none has.
        nearer: how much nearer to the tail each is seen than it stands then; empty if none is.
    """

    layers: Layers
    start: int
    tail: Tail
    states: States = NO_STATES
    before: tuple[Layers, ...] = ()
    shifts: tuple[int, ...] = ()
    nearer: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that the row stands for."""
        return self.start + self.tail.length

    @property
    def saved(self) -> int:
        """How many of these take no position for themselves."""
        return self.nearer[0] if self.nearer else 0

    @property
    def position(self) -> int:
        """Of the row's next token, in the model's window."""
        return self.length - self.saved

    @property
    def parts(self) -> tuple[Layers, ...]:
        """Layers of all parts."""
        return (*self.before, self.layers) if self.layers else ()

    def pairs(self, place: int) -> tuple[RaggedLayer, ...]:
        """Of one layer what its queries may see: of all parts, or of the last one, which has all that is in its window."""
        if not self.before or self.layers[place].window is not None:
            return self.layers[place : place + 1]
        return tuple(part[place] for part in self.parts)

    def turns(self, place: int, layer: int, rotations: Rotations) -> tuple[Turn | None, ...]:
        """How queries are turned for :meth:`pairs`; empty if nothing has moved. What a window shows is where it is."""
        if not self.moved or self.layers[place].window is not None:
            return ()
        return tuple(rotations.turn(layer, by) for by in turned_by(self.shifts, self.nearer))

    @property
    def moved(self) -> bool:
        """Whether any part is seen elsewhere than where it was made."""
        return any(self.shifts) or bool(self.nearer)

    @property
    def remembered(self) -> States:
        """What layers without attention remember at its end."""
        return self.states if self.tail.states is None else self.tail.states


def turned_by(shifts: Sequence[int], nearer: Sequence[int]) -> list[int]:
    """How far parts have moved, for queries at the positions that are left: the first part stands where it is."""
    if not nearer:
        return [*shifts]
    return [shift + near - nearer[0] for shift, near in zip(shifts or (0,) * len(nearer), nearer, strict=True)]


class LastLayerSeen(Exception):
    """Ends a forward where what follows would be computed for nobody."""


class SessionCache(CallCache):
    """The cache of one forward: rows with their own contexts and tails, left-padded to the same number of tokens.

    New pairs go into the tails; contexts are only read. It is also the :class:`~kvzip_memory.attention.AttentionCall`
    of that forward, which it ends when the last layer's pairs are there if nothing but ``pairs_only`` are wanted.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        counts: Sequence[int],
        layout: Layout,
        backend: AttentionBackend,
        rotations: Rotations,
        pairs_only: bool = False,
    ) -> None:
        super().__init__([row.remembered for row in rows], layout.latent)
        self._rows, self._counts, self._layout, self._backend, self._rotations = rows, counts, layout, backend, rotations
        self._last = layout.owners[-1] if pairs_only and not layout.stateful else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(row.length for row in self._rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        rows, n, place = [], query.shape[2], self._layout.places[layer]
        for b, (row, count) in enumerate(zip(self._rows, self._counts, strict=True)):
            if layer == self._layout.owners[place]:
                new = key[b, :, n - count :]
                keys, values = row.tail.append(place, new, new if value is key else value[b, :, n - count :])
            else:
                keys, values = row.tail.seen(place, count)
            # of those that reuse pairs the model may ask for the last tokens alone
            rows.append(RowKV(row.pairs(place), keys, values, min(count, n), row.start, row.turns(place, layer, self._rotations)))
        if layer == self._last:
            raise LastLayerSeen
        return self._backend(query, rows, softmax, self._layout.windows[place])

    def advance(self) -> None:
        """Count what the forward has computed."""
        states = self.states() if self._layout.stateful else [None] * len(self._rows)
        for row, count, remembered in zip(self._rows, self._counts, states, strict=True):
            row.tail.advance(count, remembered)
