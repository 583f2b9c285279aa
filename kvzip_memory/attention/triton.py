"""Ragged attention on GPUs in our own kernels: every pair of a context is read once, for all rows and heads that see it.

A call is cut into **items**, one program each: a run of pairs of one KV head, read by a block of **entries** (a row's
query token, all query heads of the KV head). Contexts and tails are cut alike, into runs of one size that fill the GPU
once; a second kernel merges the parts of each entry by their log-sum-exp. Items name their pairs by address, in a table the kernel reads.
So rows on several contexts, with tails of their own, are one launch, and a captured CUDA graph goes on working when the table is
rewritten for other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from math import log2
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from triton import knobs

from kvzip_memory.attention import kernels
from kvzip_memory.attention.base import RowKV, Softmax, rows_by_parts, told_by
from kvzip_memory.context import RaggedLayer, Window

Int64 = npt.NDArray[np.int64]

#: Whether kernels run in Triton's interpreter, on the CPU. It multiplies the bits of bfloat16: there products are taken in float32.
INTERPRETED: bool = knobs.runtime.interpret
#: Shortest run of pairs worth a program of its own: two tiles of loads.
SHORTEST_RUN = 128
#: Programs of ``attend`` that a multiprocessor runs at one time; its shared memory holds the tiles of two.
PROGRAMS = 2

# Columns of an item; kernels.attend lists the same.
KEYS, VALUES, POSITIONS, FIRST, COUNT, HEAD, START, END, TAIL, ASKED = range(10)


class Owner(NamedTuple):
    """Pairs seen by the same entries in every layer: a part of contexts, or a row's tail.

    Attributes:
        keys, values: address of the first pair, a layer each.
        positions: address of the first pair's position (int32), a layer each; 0 in a tail, whose positions follow from their index.
        offsets, counts: ``[L, H]``, where each head's pairs begin and how many there are.
        entries: the first entry and the one after the last.
        slot: the how many-th of their parts it is; -1: their tail.
        asked: rows of queries before those that ask it, which are turned.
    """

    keys: Sequence[int]
    values: Sequence[int]
    positions: Sequence[int]
    offsets: Int64
    counts: Int64
    entries: tuple[int, int]
    slot: int
    asked: int = 0

    @property
    def is_tail(self) -> bool:
        return self.slot < 0


class Plan(NamedTuple):
    """Who reads what.

    Attributes:
        items: ``[L, W, 10]`` int64, what each program of ``attend`` reads; rows of zeros are idle programs.
        parts: ``[L, E, H, S, 2]`` int32, first item and number of items of each entry: of each of its parts and, last, of its tail.
    """

    items: Int64
    parts: npt.NDArray[np.int32]


def part_owner(layers: Sequence[RaggedLayer], entries: tuple[int, int], slot: int, last: bool, asked: int = 0) -> Owner:
    """A part's pairs; ``layers`` are all layers or the one in question. Layers with a window see only those of the ``last`` part."""
    return Owner(
        [layer.pairs[0].data_ptr() for layer in layers],
        [layer.pairs[1].data_ptr() for layer in layers],
        [layer.positions.data_ptr() for layer in layers],
        np.array([layer.offsets[:-1] for layer in layers], np.int64),
        np.array([layer.lengths if last or layer.window is None else [0] * layer.n_heads for layer in layers], np.int64),
        entries,
        slot,
        asked,
    )


def part_owners(
    rows: Sequence[Sequence[Sequence[RaggedLayer]]], starts: Sequence[int], asked: Sequence[Sequence[int]] | None = None
) -> list[Owner]:
    """The parts of rows, each once for rows that have it in the same place and stand one behind another.

    Args:
        rows: of each row its parts, and of each part the layers.
        starts: the first entry of each row, and the one after the last.
        asked: of each part of each row, see :class:`Owner`; None where no queries are turned.
    """
    owners = []
    asked = asked or [[0] * len(parts) for parts in rows]
    for slot in range(max(map(len, rows), default=0)):
        seen = [
            (id(told_by(parts[slot])), slot + 1 == len(parts), of_row[slot]) if slot < len(parts) else None
            for parts, of_row in zip(rows, asked, strict=True)
        ]
        first = 0
        for part, run in groupby(seen):
            end = first + len([*run])
            if part is not None:
                owners.append(part_owner(rows[first][slot], (starts[first], starts[end]), slot, part[1], part[2]))
            first = end
    return owners


def tail_owner(buffers: Sequence[tuple[Tensor, Tensor]], counts: int, entries: tuple[int, int]) -> Owner:
    """The first ``counts`` pairs of each head in buffers ``[H, capacity, D]``."""
    n_heads, stride = len(buffers[0][0]), buffers[0][0].stride(0) // buffers[0][0].shape[2]
    for buffer in buffers[0]:
        dim = buffer.shape[2]
        assert buffer.stride() == (stride * dim, dim, 1), "the kernel reads pairs one behind another, of all heads alike"
    shape = (len(buffers), n_heads)
    offsets = np.broadcast_to(np.arange(n_heads, dtype=np.int64) * stride, shape)
    keys, values = [pair[0].data_ptr() for pair in buffers], [pair[1].data_ptr() for pair in buffers]
    return Owner(keys, values, [0] * len(buffers), offsets, np.full(shape, counts, np.int64), entries, -1)


def plan(
    owners: Sequence[Owner],
    n_entries: int,
    block: int,
    nbytes: tuple[int, int],
    programs: int,
    width: int | None = None,
    slots: int | None = None,
) -> Plan:
    """Cut what the owners hold into items.

    Args:
        owners: of the same layers and heads. An entry belongs to one of each slot at most.
        n_entries: entries, those included that see nothing.
        block: entries that one program takes.
        nbytes: of one key and of one value.
        programs: programs the device runs at one time.
        width: items of every layer, idle ones included; as few as are needed if None.
        slots: parts that an entry may have, and one more for its tail; as few as are needed if None.
    """
    slots = slots or 2 + max(owner.slot for owner in owners)
    n_layers, n_heads = owners[0].counts.shape
    spans: list[Int64] = []
    seen = np.full((n_entries, n_heads, slots), -1, np.int64)  # the span each entry sees
    for owner in owners:
        for start in range(owner.entries[0], owner.entries[1], block):
            end = min(start + block, owner.entries[1])
            seen[start:end, :, owner.slot] = n_heads * len(spans) + np.arange(n_heads)
            span = np.empty((n_layers, n_heads, 10), np.int64)
            for column, address, size in (
                (KEYS, owner.keys, nbytes[0]),
                (VALUES, owner.values, nbytes[1]),
                (POSITIONS, owner.positions, 0 if owner.is_tail else 4),
            ):
                span[..., column] = np.array(address, np.int64)[:, None] + owner.offsets * size
            span[..., FIRST], span[..., COUNT], span[..., HEAD] = 0, owner.counts, np.arange(n_heads)
            span[..., START], span[..., END], span[..., TAIL], span[..., ASKED] = start, end, owner.is_tail, owner.asked
            spans.append(span)
    table = np.concatenate(spans, 1)
    assert not (table[..., :2] % 16).any(), "the kernel loads 16 bytes at a time"
    most = width or fitting_width(table.shape[1], programs)
    run = _shortest_run(table[..., COUNT], most)
    numbers = -(-table[..., COUNT] // run)
    firsts = numbers.cumsum(1) - numbers
    items = np.zeros((n_layers, width or int(numbers.sum(1).max()), 10), np.int64)
    for layer in range(n_layers):
        which = np.repeat(np.arange(table.shape[1]), numbers[layer])
        skipped = (np.arange(len(which)) - firsts[layer][which]) * run[layer]
        cut = items[layer, : len(which)]
        cut[:] = table[layer][which]
        cut[:, KEYS] += skipped * nbytes[0]
        cut[:, VALUES] += skipped * nbytes[1]
        cut[:, POSITIONS] += skipped * np.where(cut[:, TAIL], 0, 4)
        cut[:, FIRST] = skipped
        cut[:, COUNT] = np.minimum(cut[:, COUNT] - skipped, run[layer])
    none = np.zeros((n_layers, 1), np.int64)  # what index -1 finds
    parts = np.stack([np.concatenate([x, none], 1)[:, seen] for x in (firsts, numbers)], -1)
    return Plan(items, parts.astype(np.int32))


def fitting_width(spans: int, programs: int) -> int:
    """Items to cut spans into: as many as run at one time, or a multiple where there are too many spans to be cut evenly."""
    return programs * -(-2 * spans // programs)


def _shortest_run(counts: Int64, most: int) -> Int64:
    """``[L, 1]``: the shortest run of pairs that cuts ``counts [L, S]`` into ``most`` items at most, so that all end together."""
    low = np.full((len(counts), 1), SHORTEST_RUN, np.int64)
    high = np.maximum(low, counts.max(1, keepdims=True))
    while (low < high).any():
        middle = (low + high) // 2
        fits = (-(-counts // middle)).sum(1, keepdims=True) <= most
        low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
    return high


@lru_cache
def programs(device: torch.device) -> int:
    """Programs of ``attend`` the device runs at one time."""
    return PROGRAMS * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)


class Blocks(NamedTuple):
    """Sizes the kernels are compiled for.

    Attributes:
        m: query vectors of one program.
        n: pairs of one tile.
        d: the head dimension, rounded up to a power of two.
        dv: the same of values.
        entries: entries of one program.
    """

    m: int
    n: int
    d: int
    dv: int
    entries: int


def blocks(n_entries: int, group: int, dims: tuple[int, int], itemsize: int) -> Blocks:
    """Sizes for so many entries that may see one context: as many in one program as its registers hold.

    Args:
        dims: of keys and of values.
    """
    d, dv = (_padded(dim) for dim in dims)
    most = max(128 if max(d, dv) <= 128 else 64, 1 << (group - 1).bit_length())
    m = min(max(16, 1 << (n_entries * group - 1).bit_length()), most)
    return Blocks(m, 64 if max(d, dv) * itemsize <= 256 else 32, d, dv, m // group)


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def attention(query: Tensor, rows: Sequence[RowKV], softmax: Softmax, window: Window | None) -> Tensor:
    """See :class:`~kvzip_memory.attention.base.AttentionBackend`."""
    batch, query_heads, n, dim = query.shape
    dims, itemsize = (dim, rows[0].values.shape[2]), query.element_size()
    groups = rows_by_parts([row.places for row in rows])
    turns = {turn.by: turn for row in rows for turn in row.turns if turn is not None}
    before = {by: (number + 1) * batch for number, by in enumerate(turns)}
    entries: list[tuple[int, int]] = []
    owners, starts = [], [0]
    for b in (b for members in groups for b in members):
        start, row = len(entries), rows[b]
        entries += [(b, row.n_new - 1 - i) for i in range(row.n_new)]
        owners.append(tail_owner([(row.keys, row.values)], row.keys.shape[1], (start, len(entries))))
        starts.append(len(entries))
    order = [rows[b] for members in groups for b in members]
    asked = [[before.get(by, 0) for _, by in row.places] for row in order]
    owners += part_owners([[[part] for part in row.parts] for row in order], starts, asked)
    group = query_heads // rows[0].keys.shape[0]
    size = blocks(max(owner.entries[1] - owner.entries[0] for owner in owners), group, dims, itemsize)
    nbytes = dims[0] * itemsize, dims[1] * itemsize
    made = plan(owners, len(entries), size.entries, nbytes, programs(query.device))
    tail_lengths = [row.keys.shape[1] for row in rows]
    last = [row.context_tokens + length - 1 for row, length in zip(rows, tail_lengths, strict=True)]
    items, parts = (torch.from_numpy(table[0]).to(query.device) for table in made)
    lengths, positions = torch.tensor([tail_lengths, last], device=query.device)
    table = torch.tensor(entries, dtype=torch.int32, device=query.device)
    out = query.new_zeros(batch, n, query_heads, dims[1])
    queries = torch.cat([query, *(turn.of(query) for turn in turns.values())]) if turns else query
    return attend(queries, items, parts, table, lengths, positions, softmax, window, size, out)


def attend(
    query: Tensor,
    items: Tensor,
    parts: Tensor,
    entries: Tensor,
    lengths: Tensor,
    positions: Tensor,
    softmax: Softmax,
    window: Window | None,
    size: Blocks,
    out: Tensor,
) -> Tensor:
    """Run one layer's items and merge their parts into ``out [B, n, H * G, DV]``, where entries say.

    Args:
        query: ``[B, H * G, n, D]``, and behind them those that are turned, as many for each turn.
        items, parts: one layer of a :class:`Plan`, on the device.
        entries: ``[E, 2]`` int32: the row of each entry, and how many of the row's tokens come after it.
        lengths: ``[B]`` int64, pairs in the tails, this call's included.
        positions: ``[B]`` int64, position of each row's last token.
        softmax, window: see :class:`~kvzip_memory.attention.base.AttentionBackend`.
        size: what the plan was made for.
    """
    _, query_heads, n, dim = query.shape
    group, dim_v = query_heads // parts.shape[1], out.shape[3]
    part_out = query.new_empty(len(items), size.m, dim_v, dtype=torch.float32)
    part_lse = query.new_empty(len(items), size.m, dtype=torch.float32)
    if query.stride(-1) != 1:
        query = query.contiguous()
    with torch.cuda.device_of(query):
        kernels.attend[(len(items),)](
            query,
            items,
            entries,
            lengths,
            positions,
            part_out,
            part_lse,
            softmax.scaling * log2(np.e),
            (softmax.cap or 0.0) * log2(np.e),
            n,
            window.size if window is not None else 1,
            *query.stride()[:3],
            GROUP=group,
            DIM=dim,
            DIM_V=dim_v,
            BLOCK_D=size.d,
            BLOCK_DV=size.dv,
            BLOCK_M=size.m,
            BLOCK_N=size.n,
            WINDOWED=window is not None,
            CHUNKED=window is not None and window.chunked,
            CAPPED=softmax.cap is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            WIDE=INTERPRETED,
            num_warps=warps(size),
            num_stages=_stages(query.device),
        )
        sizes = {"BLOCK_P": 16, "SLOTS": parts.shape[2]}
        kernels.merge[(len(entries), query_heads)](
            parts, items, entries, part_out, part_lse, softmax.sinks, out, n, query_heads, group, dim_v, size.dv, size.m, **sizes
        )
    return out


def append(key: Tensor, value: Tensor, tails: Tensor, lengths: Tensor, counts: Tensor) -> None:
    """Write each row's new pairs, the last of ``[B, H, n, D]`` and ``[B, H, n, DV]``, to the end of its tail.

    Args:
        tails: ``[B, 3]`` int64, addresses of a layer's keys and values and their capacity.
        lengths: ``[B]`` int64, the new pairs included.
        counts: ``[B]`` int64, new pairs of each row, 0 where there is no row.
    """
    batch, n_heads, n, dim = key.shape
    dim_v = value.shape[3]
    with torch.cuda.device_of(key):
        strides = (*key.stride()[:3], *value.stride()[:3])
        sizes = {"DIM": dim, "DIM_V": dim_v, "BLOCK_D": _padded(dim), "BLOCK_DV": _padded(dim_v)}
        kernels.append[(batch, n_heads, n)](key, value, tails, lengths, counts, n, *strides, **sizes)


def warps(size: Blocks) -> int:
    """Warps of a program of ``attend``."""
    return 8 if size.m > 64 else 4


@lru_cache
def _stages(device: torch.device) -> int:
    """Tiles on their way at one time: three where the shared memory holds them for two programs."""
    return 3 if device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 160 << 10 else 2
