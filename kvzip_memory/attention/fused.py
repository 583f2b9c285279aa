"""Torch's fused CPU kernel over some pairs: flash attention, which gives the log-sum-exp beside the output and spreads a batch over
threads. On other devices, and where it cannot, plain products take its place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_memory.attention.base import Softmax
from kvzip_memory.context.codes import Vectors

#: Pairs of a head that are worth a thread of their own.
PIECE_PAIRS = 256


def has_fused(query: Tensor, values: Vectors, softmax: Softmax) -> bool:
    return query.device.type == "cpu" and softmax.cap is None and query.shape[-1] == values.shape[-1]


def attend(query: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention ``[B, H, R, D]`` of every query over every pair, and log-sum-exp ``[B, H, R]``; a mask is added. Pairs of fewer bits are
    cast."""
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    if has_fused(query, values, softmax):
        found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=None if mask is None else mask.to(query.dtype), scale=softmax.scaling
        )
        return found[0], found[1].float()  # the kernel's is float64 where the queries are
    logits = softmax.capped(torch.matmul(query * softmax.scaling, keys.mT).float())
    if mask is not None:
        logits += mask
    lse = logits.logsumexp(-1)
    return torch.matmul(logits.sub_(lse.unsqueeze(-1)).exp_().to(values.dtype), values), lse


class View(NamedTuple):
    """Pairs of a head, or of all heads if they have as many, as a batch of equal pieces: strided views ``[P, H, piece, D]``, and what is
    hidden in them.

    What is left over when the pairs are divided belongs to the last piece. The others reach as far into their
    successors, so that all are of one size, and mask what they see there. A head with too few pairs to be divided,
    perhaps none, has all of them in one piece.
    """

    pieces: int
    keys: Tensor
    values: Tensor
    mask: Tensor | None


def divided(keys: Tensor, values: Tensor, pieces: int) -> View:
    step, rest = divmod(keys.shape[1], pieces)
    if not step:
        return View(pieces, keys[None], values[None], None)
    keys, values = (
        x.as_strided((pieces, len(x), step + rest, x.shape[2]), (step * x.stride(1), x.stride(0), x.stride(1), 1), x.storage_offset())
        for x in (keys, values)
    )
    mask = _mask(pieces, rest, 1 << (step + rest - 1).bit_length(), keys.dtype, keys.device)[..., -(step + rest) :] if rest else None
    return View(pieces, keys, values, mask)


@lru_cache(maxsize=256)
def _mask(pieces: int, rest: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[P, 1, 1, size]``: hides the last ``rest`` entries of every piece but the last."""
    mask = torch.zeros(pieces, 1, 1, size, dtype=dtype, device=device)
    mask[:-1, ..., size - rest :] = float("-inf")
    return mask


def attend_view(query: Tensor, view: View, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention of ``query [P, H, R, D]`` over a view: ``[P, H, R, D]`` and ``[P, H, R]``."""
    if len(view.keys) == view.pieces and view.keys.shape[2]:
        return attend(query, view.keys, view.values, softmax, view.mask)
    out = query.new_zeros(*query.shape[:3], view.values.shape[3])
    lse = torch.full(query.shape[:3], float("-inf"), device=query.device)
    if view.keys.shape[2]:
        out[:1], lse[:1] = attend(query[:1], view.keys, view.values, softmax)
    return out, lse
