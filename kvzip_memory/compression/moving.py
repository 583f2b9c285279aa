"""What a window shows of parts that have moved: copies, as few pairs as it has, and rotated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvzip_memory.attention.base import Turn, turned
from kvzip_memory.context import RaggedLayer


class Piece(NamedTuple):
    """A layer with a window, of a part.

    Attributes:
        layer: whose heads have pairs of the same positions.
        first: pairs from this position on are taken.
        shift: how far they move.
        turn: the rotation that takes *keys* that far on, None for none.
    """

    layer: RaggedLayer
    first: int
    shift: int
    turn: Turn | None


def joined_window(pieces: Sequence[Piece], n: int) -> RaggedLayer:
    """What a window shows behind ``n`` tokens, of pieces that stand one behind another."""
    first = pieces[-1].layer
    assert first.window is not None
    keys, values, positions = [], [], []
    for layer, start, shift, turn in pieces:
        there = layer.positions[: layer.lengths[0]] if layer.n_heads else layer.positions
        taken = slice(int(torch.searchsorted(there, start)), len(there))
        own = layer.keys.unflatten(0, (layer.n_heads, -1))[:, taken]
        keys.append(turned(own, turn))
        values.append(keys[-1] if layer.shared else layer.values.unflatten(0, (layer.n_heads, -1))[:, taken])
        positions.append(there[taken] + shift)
    seen = first.window.left(n)
    all_keys, all_values, all_positions = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(positions)
    last = slice(max(0, len(all_positions) - seen), None)
    flat = all_keys[:, last].flatten(0, 1).contiguous()
    length = len(all_positions[last])
    return RaggedLayer(
        keys=flat,
        values=flat if first.shared else all_values[:, last].flatten(0, 1).contiguous(),
        lengths=(length,) * first.n_heads,
        positions=all_positions[last].repeat(first.n_heads),
        window=first.window,
    )
