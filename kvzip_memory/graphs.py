"""Decode steps over tensors that stay where they are, so that a GPU can replay one as a CUDA graph.

A graph is captured once for every number of rows, rounded up to a power of two. What it must not bake in, which contexts and
tails the rows have, is in tables its kernels read (:mod:`kvzip_memory.attention.triton`). Rows come and go, contexts
change and tails grow by rewriting the tables; lengths, positions and token ids are written before every step.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip_memory.attention.base import rows_by_context
from kvzip_memory.cache import Row

logger = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """A function that cannot be captured as a CUDA graph."""


class Step:
    """A function of no arguments over static tensors: called, or on a GPU captured the first time and replayed ever after.

    Args:
        function: reads and writes tensors that stay where they are. It may run more than once for one step.
        device: where.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> Tensor:
        """What the function returns. The next run overwrites it.

        Raises:
            CaptureError: the function cannot be captured.
        """
        if self._device.type != "cuda":
            return self._function()
        with torch.cuda.device(self._device):
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()
            return self._output

    def _capture(self) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and workspaces made outside of the graph
                self._function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate and copy meanwhile: contexts that are loaded.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._function()
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        self._graph = graph


class DecodeSteps:
    """Runs decode steps, one token a row. Not locked.

    Args:
        model: with our attention attached.
        windows: sliding window of each layer, None for full attention.
        kernels: :mod:`kvzip_memory.attention.triton`.

    Attributes:
        captured: numbers of rows there are steps for; each has been captured once.
    """

    def __init__(self, model: PreTrainedModel, windows: Sequence[int | None], kernels: ModuleType) -> None:
        self._model, self._windows, self._kernels = model, windows, kernels
        self._batches: dict[int, _Batch] = {}
        self._weights: list[int] = []
        self._usable = len(set(getattr(model, "hf_device_map", {}).values())) < 2

    @property
    def captured(self) -> list[int]:
        return sorted(self._batches)

    def run(self, rows: Sequence[Row], ids: Sequence[int]) -> Tensor | None:
        """Feed each row one token, append its pair to its tail, uncounted, and give the logits ``[B, vocab]`` fp32 of the next ones.

        None if that has to be done without graphs: a tail that has never been written, adapters, whose switches a graph would miss,
        or a model that cannot be captured.
        """
        if not self._usable or getattr(self._model, "_hf_peft_config_loaded", False):
            return None
        for row in rows:
            row.tail.reserve(row.tail.length + 1)
        size = 1 << (len(rows) - 1).bit_length()
        batch = self._batches.get(size)
        if batch is None or not batch.holds(rows):
            if any(len(row.tail.pairs(row.tail.capacity)) != len(self._windows) for row in rows):
                return None
            weights = [parameter.data_ptr() for parameter in self._model.parameters()]
            if weights != self._weights:  # replaced, or moved: graphs read the old ones
                self._batches.clear()
                self._weights, batch = weights, None
            if batch is None:
                batch = self._batches[size] = _Batch(self._model, self._windows, self._kernels, size, rows[0].tail.pairs(1)[0][0])
            batch.place(rows)
        try:
            return batch.run(rows, ids)
        except CaptureError as error:
            logger.warning("decode steps of this model run without CUDA graphs: %s", error)
            self._batches.clear()
            self._usable = False
            return None


class _Batch:
    """The step of up to ``size`` rows, and its tables. Rows beyond those placed compute zeros."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[int | None], kernels: ModuleType, size: int, like: Tensor) -> None:
        n_heads, _, dim = like.shape
        self._kernels, self._n_heads, self._pair_nbytes = kernels, n_heads, dim * like.element_size()
        self._blocks = kernels.blocks(size, model.config.num_attention_heads // n_heads, dim, like.element_size())
        self._programs = kernels.programs(like.device)
        # A row has at most a context and a tail of its own.
        width = kernels.fitting_width(2 * size * n_heads, self._programs)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        self._inputs = zeros(3, size)  # token, its position, pairs in the tail with it
        self._tails = zeros(len(windows), size, 3)
        self._items = zeros(len(windows), width, 9)
        self._parts = zeros(len(windows), size, n_heads, 4, dtype=torch.int32)
        self._entries = zeros(size, 2, dtype=torch.int32)
        self._windows = windows
        self._size = size
        self._placed: list[tuple[weakref.ref[object], int, weakref.ref[object] | None]] = []
        self._step = Step(lambda: self._forward(model), like.device)

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether the tables are those of these rows, and no tail has grown."""
        return len(rows) == len(self._placed) and all(
            tail() is row.tail and capacity == row.tail.capacity and (context() if context else None) is _context(row)
            for row, (tail, capacity, context) in zip(rows, self._placed, strict=True)
        )

    def place(self, rows: Sequence[Row]) -> None:
        """Write the tables for these rows."""
        kernels, device = self._kernels, self._inputs.device
        self._placed = []  # until all is written
        entries: list[tuple[int, int]] = []
        contexts, tails = [], []
        for members in rows_by_context([_context(row) for row in rows]):
            first, layers = len(entries), rows[members[0]].layers
            for b in members:
                tail = rows[b].tail
                tails.append(kernels.tail_owner(tail.pairs(tail.capacity), tail.capacity, (len(entries), len(entries) + 1)))
                entries.append((b, 0))
            if layers:
                contexts.append(kernels.context_owner(layers, (first, len(entries))))
        made = kernels.plan([*contexts, *tails], self._size, self._blocks.entries, self._pair_nbytes, self._programs, self._items.shape[1])
        self._items.copy_(torch.from_numpy(made.items))
        self._parts.copy_(torch.from_numpy(made.parts))
        entries += [(b, 0) for b in range(len(rows), self._size)]
        self._entries.copy_(torch.tensor(entries, dtype=torch.int32))
        addresses = torch.zeros_like(self._tails, device="cpu")
        for b, row in enumerate(rows):
            found = [(keys.data_ptr(), values.data_ptr(), row.tail.capacity) for keys, values in row.tail.pairs(row.tail.capacity)]
            addresses[:, b] = torch.tensor(found)
        self._tails.copy_(addresses.to(device))
        self._placed = [(weakref.ref(row.tail), row.tail.capacity, weakref.ref(row.layers[0]) if row.layers else None) for row in rows]

    def run(self, rows: Sequence[Row], ids: Sequence[int]) -> Tensor:
        count = len(rows)
        inputs = torch.zeros_like(self._inputs, device="cpu")
        inputs[:, :count] = torch.tensor([ids, [row.length for row in rows], [row.tail.length + 1 for row in rows]])
        self._inputs.copy_(inputs)
        return self._step.run()[:count].to(torch.float32, copy=True)

    def _forward(self, model: PreTrainedModel) -> Tensor:
        call = _Call(self)
        output = model(
            input_ids=self._inputs[0, :, None],
            position_ids=self._inputs[1, :, None],
            attention_mask=torch.empty(1, 1, 0, 0),  # four-dimensional masks are handed through; ours is in the tables
            past_key_values=call,
            use_cache=True,
            logits_to_keep=1,
            kvzip=call,
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        kernels, (_, positions, lengths) = self._kernels, self._inputs
        kernels.append(key, value, self._tails[layer], lengths)
        out = query.new_empty(self._size, 1, *query.shape[1::2])
        tables = self._items[layer], self._parts[layer], self._entries
        attended: Tensor = kernels.attend(query, *tables, lengths, positions, scaling, self._windows[layer], self._blocks, out)
        return attended


class _Call(Cache):
    """Cache and attention of a step; see :class:`~kvzip_memory.cache.SessionCache`."""

    def __init__(self, batch: _Batch) -> None:
        super().__init__(layers=[])
        self.attend = batch.attend

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # of no use: positions are given

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def _context(row: Row) -> object:
    return row.layers[0] if row.layers else None
