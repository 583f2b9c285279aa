"""Decode steps over tensors that stay where they are, so that a GPU can replay one as a CUDA graph.

A graph is captured once for every number of rows and of tokens a row, rounded up to powers of two. What it must not bake
in, which contexts and tails the rows have, is in tables its kernels read (:mod:`kvzip_memory.attention.triton`). Rows come
and go, contexts change and tails grow by rewriting the tables; lengths, positions and token ids are written before every
step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvzip_memory.attention.base import Softmax, rows_by_parts, told_by
from kvzip_memory.context import RaggedLayer, Window
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.system.modes import evaluation_copy, in_evaluation
from kvzip_memory.system.printable import logger_of

logger = logger_of(__name__)

#: Rows times tokens of a step in which rows have several.
MOST_TOKENS = 64


class CaptureError(RuntimeError):
    """A function that cannot be captured as a CUDA graph."""


class Step:
    """A function of no arguments over static tensors: called, or on a GPU captured the first time and replayed ever after.

    Args:
        function: reads and writes tensors that stay where they are. It may run more than once for one step.
        device: where.
        pool: memory shared with other steps, of which one runs at a time (``torch.cuda.graph_pool_handle()``); its own if None.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device, pool: Any = None) -> None:
        self._function, self._device, self._pool = function, device, pool
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
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._output = self._function()
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        self._graph = graph


class DecodeSteps:
    """Runs decode steps: one token a row, or some, where guesses are checked. Not locked.

    Args:
        model: with our attention attached.
        windows: what each layer sees, None for full attention.
        kernels: :mod:`kvzip_memory.attention.triton`.

    Attributes:
        captured: rows and tokens a row there are steps for; each has been captured once.
    """

    def __init__(self, model: PreTrainedModel, windows: Sequence[Window | None], kernels: ModuleType) -> None:
        self._model, self._windows, self._kernels = model, windows, kernels
        self._batches: dict[tuple[int, int, int], _Batch] = {}  # by rows, tokens a row and parts a row
        self._weights: list[int] = []
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self._usable = len(set(getattr(model, "hf_device_map", {}).values())) < 2

    @property
    def captured(self) -> list[tuple[int, int]]:
        return sorted({(rows, tokens) for rows, tokens, _ in self._batches})

    def forget(self) -> None:
        """Let go of all graphs: weights lie elsewhere, or another adapter is active."""
        self._batches.clear()

    def run(self, rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> Tensor | None:
        """Feed each row its tokens and append their pairs to its tail, uncounted; logits ``[B, n_logits, vocab]`` fp32 after the last.

        None if that has to be done without graphs: parts that have moved, many tokens, a tail that has never been written, adapters, whose
        switches a graph would miss, or a model that cannot be captured.
        """
        width = max(map(len, ids))
        shape = _power(len(rows)), _power(width), _power(1 + max(len(row.before) for row in rows))
        if any(row.moved for row in rows):  # whose queries are turned for each part
            return None
        if not self._usable or (width > 1 and shape[0] * shape[1] > MOST_TOKENS) or getattr(self._model, "_hf_peft_config_loaded", False):
            return None
        for row, row_ids in zip(rows, ids, strict=True):
            row.tail.reserve(row.tail.length + len(row_ids))
        batch = self._batches.get(shape)
        if batch is None or not batch.holds(rows):
            if any(len(row.tail.pairs(row.tail.capacity)) != len(self._windows) for row in rows):
                return None
            weights = [parameter.data_ptr() for parameter in self._model.parameters()]
            if weights != self._weights:  # replaced, or moved: graphs read the old ones
                self._batches.clear()
                self._weights, batch = weights, None
            if batch is None:
                like = rows[0].tail.pairs(1)[0]
                batch = self._batches[shape] = _Batch(self._model, self._windows, self._kernels, *shape, like, self._pool)
            batch.place(rows)
        try:
            return batch.run(rows, ids, n_logits)
        except CaptureError as error:
            logger.warning("decode steps of this model run without CUDA graphs: %s", error)
            self._batches.clear()
            self._usable = False
            return None


class _Batch:
    """The step of up to ``size`` rows of up to ``width`` tokens, and its tables. The rest of it is padding, never written to a tail."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[Window | None],
        kernels: ModuleType,
        size: int,
        width: int,
        parts: int,
        pair: tuple[Tensor, Tensor],
        pool: Any,
    ) -> None:
        like, n_heads = pair[0], len(pair[0])
        self._kernels, self._windows, self._size, self._width = kernels, windows, size, width
        dims = pair[0].shape[2], pair[1].shape[2]
        self._dim_v, self._nbytes = dims[1], tuple(dim * like.element_size() for dim in dims)
        self._blocks = kernels.blocks(size * width, model.config.num_attention_heads // n_heads, dims, like.element_size())
        self._programs = kernels.programs(like.device)
        self._slots = parts + 1  # and its tail
        n_items = kernels.fitting_width(self._slots * size * -(-width // self._blocks.entries) * n_heads, self._programs)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        self._inputs = zeros(size * (2 * width + 3))  # written as a whole before every step
        tokens, positions, self._lengths, self._last, self._counts = self._inputs.split([size * width] * 2 + [size] * 3)
        self._tokens, self._positions = tokens.view(size, width), positions.view(size, width)
        self._tails = zeros(len(windows), size, 3)
        self._items = zeros(len(windows), n_items, 10)
        self._parts = zeros(len(windows), size * width, n_heads, self._slots, 2, dtype=torch.int32)
        self._entries = zeros(size * width, 2, dtype=torch.int32)
        self._placed: list[tuple[weakref.ref[Tail], int, list[weakref.ref[RaggedLayer]]]] = []
        self._step = Step(lambda: self._forward(model), like.device, pool)

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether the tables are those of these rows, and no tail has grown."""
        return len(rows) == len(self._placed) and all(
            tail() is row.tail
            and capacity == row.tail.capacity
            and len(parts) == len(row.parts)
            and all(part() is told_by(layers) for part, layers in zip(parts, row.parts, strict=True))
            for row, (tail, capacity, parts) in zip(rows, self._placed, strict=True)
        )

    def place(self, rows: Sequence[Row]) -> None:
        """Write the tables for these rows."""
        kernels, width = self._kernels, self._width
        self._placed = []  # until all is written
        order = [b for members in rows_by_parts([tuple(id(told_by(part)) for part in row.parts) for row in rows]) for b in members]
        starts = [width * i for i in range(len(order) + 1)]
        owners = kernels.part_owners([rows[b].parts for b in order], starts)
        for b, start in zip(order, starts, strict=False):
            tail = rows[b].tail
            owners.append(kernels.tail_owner(tail.pairs(tail.capacity), tail.capacity, (start, start + width)))
        shape = self._size * width, self._blocks.entries, self._nbytes, self._programs, self._items.shape[1], self._slots
        made = kernels.plan(owners, *shape)
        self._items.copy_(torch.from_numpy(made.items))
        self._parts.copy_(torch.from_numpy(made.parts))
        order += range(len(rows), self._size)
        self._entries.copy_(torch.tensor([(b, behind) for b in order for behind in reversed(range(width))], dtype=torch.int32))
        tables = torch.zeros_like(self._tails, device="cpu")
        for b, row in enumerate(rows):
            capacity = row.tail.capacity
            tables[:, b] = torch.tensor([(keys.data_ptr(), values.data_ptr(), capacity) for keys, values in row.tail.pairs(capacity)])
        self._tails.copy_(tables)
        self._placed = [(weakref.ref(row.tail), row.tail.capacity, [weakref.ref(told_by(part)) for part in row.parts]) for row in rows]

    def run(self, rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> Tensor:
        tokens, positions = torch.zeros(2, self._size, self._width, dtype=torch.int64)
        lengths, last, counts = torch.zeros(3, self._size, dtype=torch.int64)
        for b, (row, row_ids) in enumerate(zip(rows, ids, strict=True)):
            count = len(row_ids)
            tokens[b, -count:] = torch.as_tensor(row_ids)
            positions[b, -count:] = torch.arange(row.length, row.length + count)
            lengths[b], last[b], counts[b] = row.tail.length + count, row.length + count - 1, count
        self._inputs.copy_(torch.cat([tokens.flatten(), positions.flatten(), lengths, last, counts]))
        return self._step.run()[: len(rows), -n_logits:].to(torch.float32, copy=True)

    def _forward(self, model: PreTrainedModel) -> Tensor:
        call = _Call(self)
        evaluating = model if in_evaluation(model) else evaluation_copy(model)
        output = evaluating(
            input_ids=self._tokens,
            position_ids=self._positions,
            attention_mask=torch.empty(1, 1, 0, 0),  # four-dimensional masks are handed through; ours is in the tables
            past_key_values=call,
            use_cache=True,
            logits_to_keep=self._width,
            kvzip=call,
        )
        logits: Tensor = output.logits
        return logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        kernels = self._kernels
        kernels.append(key, value, self._tails[layer], self._lengths, self._counts)
        out = query.new_empty(self._size, self._width, query.shape[1], self._dim_v)
        tables = self._items[layer], self._parts[layer], self._entries
        attended: Tensor = kernels.attend(query, *tables, self._lengths, self._last, softmax, self._windows[layer], self._blocks, out)
        return attended


class _Call(Cache):
    """Cache and attention of a step; see :class:`~kvzip_memory.inference.cache.SessionCache`."""

    def __init__(self, batch: _Batch) -> None:
        super().__init__(layers=[])
        self.attend, self.positions, self.latents = batch.attend, batch._positions, dict[int, Tensor]()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # of no use: positions are given


def _power(n: int) -> int:
    """The power of two from ``n`` on."""
    return 1 << (n - 1).bit_length()
