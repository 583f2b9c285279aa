"""A session's private pairs, and the cache of one forward over a batch of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import Cache

from kvzip_memory.attention import AttentionBackend, RowKV, Softmax
from kvzip_memory.context import RaggedLayer


class Tail:
    """Private dense pairs of one session: per layer keys and values ``[H, capacity, D]``, of which ``length`` count.

    Buffers double when full, so a token costs no copy of the earlier ones; :meth:`crop` is O(1).

    Attributes:
        length: pairs a head that count.
        capacity: pairs a head there is room for, the same in every layer.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.length = 0
        self.capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[H, n, D]`` behind the counted entries and return views of all of them, ``[H, length + n, D]``.

        The entries count only after :meth:`advance`: a forward that fails half way leaves the tail as it was.
        """
        end = self.length + keys.shape[1]
        self.reserve(end)
        if layer not in self._layers:
            shapes = ((len(new), self.capacity, new.shape[2]) for new in (keys, values))
            self._layers[layer] = tuple(keys.new_empty(shape) for shape in shapes)  # type: ignore[assignment]
        tail_keys, tail_values = self._layers[layer]
        tail_keys[:, self.length : end] = keys
        tail_values[:, self.length : end] = values
        return tail_keys[:, :end], tail_values[:, :end]

    def seen(self, layer: int, n: int) -> tuple[Tensor, Tensor]:
        """What :meth:`append` has returned for the last ``n`` entries of a layer, which do not count yet."""
        keys, values = self._layers[layer]
        return keys[:, : self.length + n], values[:, : self.length + n]

    def reserve(self, entries: int) -> None:
        """Make room for so many entries in every layer."""
        if entries > self.capacity:
            capacity = max(64, 1 << (entries - 1).bit_length())
            self._layers = {i: (self._grown(keys, capacity), self._grown(values, capacity)) for i, (keys, values) in self._layers.items()}
            self.capacity = capacity

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = old.new_empty(old.shape[0], capacity, old.shape[2])
        new[:, : self.length] = old[:, : self.length]
        return new

    def advance(self, n: int) -> None:
        """Count the ``n`` entries every layer has just been given."""
        self.length += n

    def crop(self, length: int) -> None:
        """Forget everything after the first ``length`` entries."""
        self.length = min(self.length, length)

    def clear(self) -> None:
        """Forget everything, also what the entries are made of."""
        self.length, self.capacity, self._layers = 0, 0, {}

    def pairs(self, end: int) -> list[tuple[Tensor, Tensor]]:
        """Views of the first ``end`` entries, keys and values ``[H, end, D]`` of every layer."""
        return [(keys[:, :end], values[:, :end]) for _, (keys, values) in sorted(self._layers.items())]

    def copy(self, start: int = 0) -> Tail:
        """An independent tail with the same entries from ``start`` on."""
        twin = Tail()
        twin.length, twin.capacity = self.length - start, self.capacity - start
        twin._layers = {i: (keys[:, start:].clone(), values[:, start:].clone()) for i, (keys, values) in self._layers.items()}
        return twin


class Row(NamedTuple):
    """One row of a batch: a shared context's layers, or none, and the tail of the session that asks.

    Attributes:
        layers: the context's, leased for the time of the call; empty without a context.
        start: tokens the context stands for.
        tail: what came after them.
    """

    layers: tuple[RaggedLayer, ...]
    start: int
    tail: Tail

    @property
    def length(self) -> int:
        """Logical length: the position of the row's next token."""
        return self.start + self.tail.length


class LastLayerSeen(Exception):
    """Ends a forward where what follows would be computed for nobody."""


class SessionCache(Cache):
    """The cache of one forward: rows with their own contexts and tails, left-padded to the same number of tokens.

    New pairs go into the tails; contexts are only read. It is also the :class:`~kvzip_memory.attention.AttentionCall`
    of that forward, which it ends when the last layer's pairs are there if nothing but ``pairs_only`` are wanted.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        counts: Sequence[int],
        windows: Sequence[int | None],
        sources: Sequence[int],
        backend: AttentionBackend,
        pairs_only: bool = False,
    ) -> None:
        super().__init__(layers=[])
        self._rows, self._counts, self._windows, self._sources, self._backend = rows, counts, windows, sources, backend
        self._last = len(windows) - 1 if pairs_only else None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Nothing: :meth:`attend` stores the pairs, it knows which of the columns are padding."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(row.length for row in self._rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        rows, n, source = [], query.shape[2], self._sources[layer]
        for b, (row, count) in enumerate(zip(self._rows, self._counts, strict=True)):
            if source == layer:
                keys, values = row.tail.append(layer, key[b, :, n - count :], value[b, :, n - count :])
            else:
                keys, values = row.tail.seen(source, count)
            # of those that reuse pairs the model may ask for the last tokens alone
            rows.append(RowKV(row.layers[source] if row.layers else None, keys, values, min(count, n), row.start))
        if layer == self._last:
            raise LastLayerSeen
        return self._backend(query, rows, softmax, self._windows[source])
