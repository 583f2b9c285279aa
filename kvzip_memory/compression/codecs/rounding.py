"""From vectors to codes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip_memory.context.codes import Codes, turn

#: Numbers of a block at most, by their bits.
_BLOCK = {8: 64, 4: 32}
_LEAST = 8  # a block of fewer is the whole vector
_ROWS = 1 << 14  # vectors of a head that are rounded at a time
_DAMPED = 0.1  # how much of what is asked is taken to be the same in all directions


def block_of(bits: int, dim: int) -> int:
    """Numbers that have one scale."""
    size = dim & -dim
    return dim if size < _LEAST else min(_BLOCK[bits], size)


def bits_of(bits: int, dim: int) -> int:
    """Bits of the numbers of vectors for which so many are wanted: two of 4 bits make a byte."""
    return 8 if dim % 2 else bits


def rounded(vectors: Tensor, bits: int, asked: Tensor | None = None) -> Codes:
    """Vectors ``[..., n, D]`` as codes.

    Args:
        asked: ``[H, D, D]`` of vectors ``[H, n, D]``: the mean outer product of what they will be multiplied with. Numbers are rounded
            one after another, and those that follow make good as far as they can what that changes in the products (GPTQ,
            arXiv 2210.17323).
    """
    dim = vectors.shape[-1]
    bits = bits_of(bits, dim)
    block = block_of(bits, dim)
    feedback = None if asked is None else _feedback(turn(turn(asked).mT))
    codes, scales = [], []
    for some in vectors.split(_ROWS, -2):
        numbers = turn(some.float().clone())
        found = _plain(numbers, bits, block) if feedback is None else _fed(numbers, bits, block, feedback)
        codes.append(_packed(found[0], bits))
        scales.append(found[1])
    return Codes(torch.cat(codes, -2), torch.cat(scales, -2))


def _scales(largest: Tensor, bits: int) -> Tensor:
    """In fp32 what bf16 can say: such that the largest number of a block, which is given for each, is the largest code."""
    # of 16 codes one more is below zero than above: it is for the largest, whichever sign that has
    return _of_codes(largest.abs() / 127 if bits == 8 else largest / -8, bits).float() * _STEPS[bits]


#: Codes of 4 bits are read as the high half of a byte: 16 times what they are.
_STEPS = {8: 1, 4: 16}


def _of_codes(scales: Tensor, bits: int) -> Tensor:
    return (scales / _STEPS[bits]).bfloat16()


def _nearest(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes, as numbers."""
    least = -127 if bits == 8 else -8
    return (numbers / torch.where(scales == 0, 1.0, scales)).round_().clamp_(least, 127 if bits == 8 else 7)


def _plain(numbers: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes ``[..., n, D]`` int8 and scales ``[..., n, S]`` bf16."""
    blocks = numbers.unflatten(-1, (-1, block))
    scales = _scales(blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)), bits)
    return _nearest(blocks, scales, bits).flatten(-2).to(torch.int8), _of_codes(scales, bits).squeeze(-1)


def _fed(numbers: Tensor, bits: int, block: int, feedback: Tensor) -> tuple[Tensor, Tensor]:
    """The same, where the numbers that follow make good what rounding has changed; changes the ones that are given. What was the largest of
    a block stays the largest, so that what is rounded is rounded to itself.

    Args:
        feedback: ``[H, D, D]``, of :func:`_feedback`.
    """
    codes, scales = torch.empty_like(numbers, dtype=torch.int8), []
    for start in range(0, numbers.shape[-1], block):
        own, missing = numbers[..., start : start + block], torch.empty_like(numbers[..., :block])
        at = own.abs().argmax(-1, keepdim=True)
        largest = own.gather(-1, at)
        scale = _scales(largest, bits)
        most = _nearest(largest, scale, bits)[..., 0]
        for i in range(block):
            code = torch.where(at[..., 0] == i, most, _nearest(own[..., i], scale[..., 0], bits))
            codes[..., start + i] = code.to(torch.int8)
            missing[..., i] = own[..., i] - code * scale[..., 0]
            own[..., i + 1 :] -= missing[..., i, None] * feedback[:, None, start + i, start + i + 1 : start + block]
        numbers[..., start + block :] -= missing @ feedback[:, start : start + block, start + block :]
        scales.append(_of_codes(scale, bits))
    return codes, torch.cat(scales, -1)


def _feedback(asked: Tensor) -> Tensor:
    """``[H, D, D]``, above the diagonal of what follows: how much each number that follows makes up for what one has lost."""
    dim = asked.shape[-1]
    mean = asked.diagonal(dim1=1, dim2=2).mean(1)
    damped = asked + torch.diag_embed((_DAMPED * mean).unsqueeze(1).expand(-1, dim))
    damped = torch.where((mean > 0)[:, None, None], damped, torch.eye(dim, device=asked.device))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor / factor.diagonal(dim1=1, dim2=2).unsqueeze(2)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[..., D]`` int8, as :class:`~kvzip_memory.context.codes.Codes` has them."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return (low & 15 | high << 4).view(torch.uint8)
