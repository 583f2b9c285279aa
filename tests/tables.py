"""The tables of :mod:`kvzip_memory.attention.triton` carried out in numpy, address by address: what the kernels must do.

It shares nothing with the kernels but the tables, and is fast where Triton's interpreter takes a tenth of a second a layer.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from kvzip_memory.attention import Softmax, triton
from kvzip_memory.attention.triton import blocks, fitting_width, part_owners, plan, programs, tail_owner
from kvzip_memory.context import Window

__all__ = ["append", "attend", "blocks", "fitting_width", "part_owners", "plan", "programs", "tail_owner"]


def floats(address: int, count: int) -> Any:
    return np.frombuffer((ctypes.c_float * count).from_address(address), np.float32)


def append(key: torch.Tensor, value: torch.Tensor, tails: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> None:
    batch, n_heads, n, _ = key.shape
    for b in range(batch):
        *addresses, capacity = tails[b].tolist()
        count, length = int(counts[b]), int(lengths[b])
        for address, new in zip(addresses, (key, value), strict=True):
            dim = new.shape[3]
            if count:
                tail = floats(address, n_heads * capacity * dim).reshape(n_heads, capacity, dim)
                tail[:, length - count : length] = new[b, :, n - count :].numpy()


def attend(
    query: torch.Tensor,
    items: torch.Tensor,
    parts: torch.Tensor,
    entries: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    softmax: Softmax,
    window: Window | None,
    size: triton.Blocks,
    out: torch.Tensor,
) -> torch.Tensor:
    _, query_heads, n, dim = query.shape
    dim_v = out.shape[3]
    group = query_heads // parts.shape[1]
    for entry, (row, behind) in enumerate(entries.tolist()):
        length, position = int(lengths[row]), int(positions[row]) - behind
        for head in range(parts.shape[1]):
            seen_items = [item for first, number in parts[entry, head].tolist() for item in range(first, first + number)]
            logits, values = [np.empty((group, 0))], [np.empty((0, dim_v))]
            assert softmax.cap is None
            assert softmax.sinks is None
            heads = slice(head * group, head * group + group)
            q = query[row, heads, n - 1 - behind].numpy()
            for item in seen_items:
                keys, vals, where, first, count, item_head, start, end, in_tail, asked = items[item].tolist()
                assert asked == 0
                assert item_head == head
                assert start <= entry < end
                assert (end - start) * group <= size.m
                count = min(count, max(0, length - first)) if in_tail else count
                index = first + np.arange(count)
                seen = np.ones(count, bool)
                if in_tail:
                    seen = index < length - behind
                    key_positions = int(positions[row]) - length + 1 + index
                else:
                    key_positions = np.frombuffer((ctypes.c_int32 * count).from_address(where), np.int32)
                if window is not None:
                    seen &= key_positions >= window.first(position)
                logits.append(np.where(seen, q @ floats(keys, count * dim).reshape(count, dim).T * softmax.scaling, -np.inf))
                values.append(np.where(seen[:, None], floats(vals, count * dim_v).reshape(count, dim_v), 0.0))
            row_logits = np.concatenate(logits, 1)
            weights = np.exp(row_logits - row_logits.max(1, keepdims=True, initial=-1e30))
            result = weights @ np.concatenate(values) / np.maximum(weights.sum(1, keepdims=True), 1e-30)
            out[row, n - 1 - behind, heads] = torch.from_numpy(result).to(out.dtype)
    return out
