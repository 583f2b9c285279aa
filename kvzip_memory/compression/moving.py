"""What a window shows of parts that have moved: copies, as few pairs as it has, and rotated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_memory.attention.base import Turn, turned
from kvzip_memory.compression.codecs import Codec
from kvzip_memory.context import RaggedLayer
from kvzip_memory.context.codes import Codes, Vectors, decoded, each


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


def joined_window(pieces: Sequence[Piece], n: int, codec: Codec, dtype: torch.dtype) -> RaggedLayer:
    """What a window shows behind ``n`` tokens, of pieces that stand one behind another. Where one is in codes, a codec writes what has
    moved.

    Args:
        dtype: of the model.
    """
    first = pieces[-1].layer
    assert first.window is not None
    keys, values, positions = list[Tensor](), list[Tensor](), list[Tensor]()
    for layer, start, shift, turn in pieces:
        there = layer.positions[: layer.lengths[0]] if layer.n_heads else layer.positions
        taken = slice(int(torch.searchsorted(there, start)), len(there))
        own, own_values = (_taken(pairs, layer.n_heads, taken, dtype) for pairs in (layer.keys, layer.values))
        keys.append(turned(own, turn))
        values.append(keys[-1] if layer.shared else own_values)
        positions.append(there[taken] + shift)
    seen = first.window.left(n)
    all_keys, all_values, all_positions = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(positions)
    last = slice(max(0, len(all_positions) - seen), None)
    kept_keys: Vectors = all_keys[:, last].contiguous()
    kept_values: Vectors = all_values[:, last].contiguous()
    if any(isinstance(piece.layer.keys, Codes) for piece in pieces):
        kept_keys, kept_values = codec.keys(all_keys[:, last]), codec.values(all_values[:, last])
    flat = each(kept_keys, lambda x: x.flatten(0, 1))
    return RaggedLayer(
        keys=flat,
        values=flat if first.shared else each(kept_values, lambda x: x.flatten(0, 1)),
        lengths=(len(all_positions[last]),) * first.n_heads,
        positions=all_positions[last].repeat(first.n_heads),
        window=first.window,
    )


def _taken(pairs: Vectors, n_heads: int, taken: slice, dtype: torch.dtype) -> Tensor:
    """``[H, m, D]`` of pairs of heads that have as many; such as are in codes in a dtype."""
    some = each(pairs, lambda x: x.unflatten(0, (n_heads, -1))[:, taken])
    return decoded(some, dtype) if isinstance(some, Codes) else some
