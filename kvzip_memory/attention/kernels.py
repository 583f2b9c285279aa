"""Device code of the ``triton`` backend. Its host side, :mod:`kvzip_memory.attention.triton`, says what the tables hold."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    query,  # [B, H * GROUP, n, DIM], any strides but the last
    items,  # [W, 10] int64: keys, values, positions, first, count, head, start, end, tail, rows before the queries
    entries,  # [E, 2] int32: row, how many of the row's tokens come after this one
    lengths,  # [B] int64: pairs in each row's tail, those of this call included
    positions,  # [B] int64: position of each row's last token
    out,  # [W, BLOCK_M, DIM_V] fp32
    lse,  # [W, BLOCK_M] fp32, base 2
    scale,  # of the logits, times log2(e)
    cap,  # of the logits, times log2(e)
    n,
    window,
    stride_b,
    stride_h,
    stride_n,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One item: the queries of some entries, GROUP heads each, over a run of pairs of one KV head."""
    item = tl.program_id(0)
    fields = items + item * 10
    count = tl.load(fields + 4).to(tl.int32)
    if count == 0:
        return
    dtype = query.dtype.element_ty
    keys = tl.multiple_of(tl.load(fields).to(tl.pointer_type(dtype)), 16)
    values = tl.multiple_of(tl.load(fields + 1).to(tl.pointer_type(dtype)), 16)
    key_positions = tl.load(fields + 2).to(tl.pointer_type(tl.int32))
    first = tl.load(fields + 3).to(tl.int32)
    head = tl.load(fields + 5).to(tl.int32)
    start = tl.load(fields + 6).to(tl.int32)
    end = tl.load(fields + 7).to(tl.int32)
    in_tail = tl.load(fields + 8) != 0

    offset_m = tl.arange(0, BLOCK_M)
    offset_d = tl.arange(0, BLOCK_D)
    offset_v = tl.arange(0, BLOCK_DV)
    m = start * GROUP + offset_m
    live = m < end * GROUP
    row = tl.load(entries + m // GROUP * 2, mask=live, other=0)
    behind = tl.load(entries + m // GROUP * 2 + 1, mask=live, other=0)
    q_offset = (row + tl.load(fields + 9)).to(tl.int64) * stride_b + (head * GROUP + m % GROUP) * stride_h + (n - 1 - behind) * stride_n
    q_mask = live[:, None] & (offset_d < DIM)[None, :]
    product = tl.float32 if WIDE else dtype
    q = tl.load(query + q_offset[:, None] + offset_d[None, :], mask=q_mask, other=0.0).to(product)

    # All entries of a tail's item belong to one row. What the tail does not hold yet is not there.
    length = tl.load(lengths + tl.load(entries + start * 2)).to(tl.int32)
    last = tl.load(positions + tl.load(entries + start * 2))
    stop = tl.where(in_tail, tl.minimum(count, length - first), count)
    limit = tl.where(in_tail, length - behind, 2147483647)  # a query of a tail sees entries before this one
    position_m = tl.load(positions + row, mask=live, other=0) - behind
    horizon = position_m - position_m % window if CHUNKED else position_m - window + 1  # and positions from this one on

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)
    for begin in range(0, stop, BLOCK_N):
        index = begin + tl.arange(0, BLOCK_N)
        inside = index < stop
        k_mask = inside[:, None] & (offset_d < DIM)[None, :]
        v_mask = inside[:, None] & (offset_v < DIM_V)[None, :]
        k = tl.load(keys + index[:, None] * DIM + offset_d[None, :], mask=k_mask, other=0.0)
        v = tl.load(values + index[:, None] * DIM_V + offset_v[None, :], mask=v_mask, other=0.0)
        logits = tl.dot(q, tl.trans(k.to(product)), input_precision=PRECISION)
        visible = inside[None, :] & ((first + index)[None, :] < limit[:, None])
        if WINDOWED:
            position = tl.load(key_positions + index, mask=inside & (in_tail == 0), other=0)
            position = tl.where(in_tail, last - length + 1 + first + index, position)
            visible = visible & (position[None, :] >= horizon[:, None])
        logits *= scale
        if CAPPED:
            logits = cap * (2.0 / (1.0 + tl.exp2(logits * (-2.0 * LOG2_E) / cap)) - 1.0)  # tanh
        logits = tl.where(visible, logits, float("-inf"))
        highest = tl.maximum(best, tl.max(logits, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(best - shift)
        total = total * decay + tl.sum(weights, 1)
        weights = weights.to(dtype).to(product)
        acc = acc * decay[:, None] + tl.dot(weights, v.to(product), input_precision=PRECISION)
        best = highest

    slot = item.to(tl.int64) * BLOCK_M + offset_m
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    out_mask = live[:, None] & (offset_v < DIM_V)[None, :]
    tl.store(out + slot[:, None] * DIM_V + offset_v[None, :], acc, mask=out_mask)
    tl.store(lse + slot, tl.where(seen, best + tl.log2(tl.where(seen, total, 1.0)), float("-inf")), mask=live)


@triton.jit
def _slot(items, first, entry, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where what an entry's first item gave is. Item 0's where it has none; then it is not read."""
    start = tl.load(items + first.to(tl.int64) * 10 + 6)
    return first.to(tl.int64) * BLOCK_M + (entry - start) * GROUP


@triton.jit
def merge(
    parts,  # [E, H, SLOTS, 2] int32: first item and number of items, of each part and of the tail
    items,
    entries,
    parts_out,  # what attend() wrote
    parts_lse,
    sinks,  # [H * GROUP], or None
    out,  # [B, n, H * GROUP, DIM] contiguous
    n,
    heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One entry and query head: what items gave, weighted by their log-sum-exp."""
    entry = tl.program_id(0)
    query_head = tl.program_id(1)
    row = tl.load(entries + entry * 2).to(tl.int64)
    column = n - 1 - tl.load(entries + entry * 2 + 1)
    fields = parts + (entry * (heads // GROUP) + query_head // GROUP) * SLOTS * 2
    offset_d = tl.arange(0, BLOCK_D)
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    if sinks is not None:
        best = tl.load(sinks + query_head).to(tl.float32) * LOG2_E
        total = tl.full([], 1.0, tl.float32)
    acc = tl.full([BLOCK_D], 0.0, tl.float32)
    for which in range(SLOTS):
        number = tl.load(fields + which * 2 + 1)
        first = _slot(items, tl.load(fields + which * 2), entry, GROUP, BLOCK_M) + query_head % GROUP
        for begin in range(0, number, BLOCK_P):
            item = begin + tl.arange(0, BLOCK_P)
            live = item < number
            slot = first + item * BLOCK_M
            lse = tl.load(parts_lse + slot, mask=live, other=float("-inf"))
            values = tl.load(parts_out + slot[:, None] * DIM + offset_d[None, :], mask=live[:, None] & (offset_d < DIM)[None, :], other=0.0)
            highest = tl.maximum(best, tl.max(lse, 0))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(lse - shift)
            decay = tl.exp2(best - shift)
            acc = acc * decay + tl.sum(values * weights[:, None], 0)
            total = total * decay + tl.sum(weights, 0)
            best = highest
    acc = acc / tl.where(total > 0, total, 1.0)
    target = out + ((row * n + column) * heads + query_head) * DIM + offset_d
    tl.store(target, acc.to(out.dtype.element_ty), mask=offset_d < DIM)


@triton.jit
def append(
    key,  # [B, H, n, DIM], any strides but the last
    value,  # [B, H, n, DIM_V], the same
    tails,  # [B, 3] int64: keys, values, capacity
    lengths,  # [B] int64, the new pairs included
    counts,  # [B] int64, how many of the last columns are new pairs; 0 where there is no row
    n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One row, KV head and column: its new pair, written behind those of its tail."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.program_id(2)
    behind = n - 1 - column
    if behind < tl.load(counts + row):
        fields = tails + row * 3
        offset_d = tl.arange(0, BLOCK_D)
        offset_v = tl.arange(0, BLOCK_DV)
        pointer = tl.pointer_type(key.dtype.element_ty)
        at = head * tl.load(fields + 2) + tl.load(lengths + row) - 1 - behind
        new_key = tl.load(key + row * key_stride_b + head * key_stride_h + column * key_stride_n + offset_d, mask=offset_d < DIM)
        from_value = value + row * value_stride_b + head * value_stride_h + column * value_stride_n
        new_value = tl.load(from_value + offset_v, mask=offset_v < DIM_V)
        tl.store(tl.load(fields).to(pointer) + at * DIM + offset_d, new_key, mask=offset_d < DIM)
        tl.store(tl.load(fields + 1).to(pointer) + at * DIM_V + offset_v, new_value, mask=offset_v < DIM_V)
