"""Linear layers whose weights stay 4 or 8 bits in memory, and are multiplied as such by torch's kernel for CPUs.

A token of a small model on a CPU costs what it takes to read the weights: with a sixth of the bytes a third. The kernel
takes and gives bfloat16 and sums in float32. It computes each row by itself, with no scale shared between rows, so an answer does not
depend on who is decoded beside it; and prompts are read by the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvzip_memory.errors import InputError, UnsupportedModelError
from kvzip_memory.system.printable import brief, logger_of

logger = logger_of(__name__)

#: ``auto`` is 4 bits for a layer that had no more before, and 8 for others.
Weights = Literal["auto", "int8", "int4"]

#: Weights along a row that have a scale and an offset of their own; as in llama.cpp's Q4_0 and Q4_1, which so lose nothing.
BLOCK = 32
# Rows that the kernel multiplies at a time.
_ROWS = 16
# What torch has a fast kernel for.
_FAST = ("AVX2", "AVX512")
# How many codes from the least to the largest weight of a block are tried, on how many weights at a time, which then stay in a cache; and
# the part of a block's squares that 16 bits of its scale and offset lose alone.
_RANGES, _AT_A_TIME, _EXACT = range(15, 7, -1), 1 << 16, 3e-5
# Of all squares of a layer, what 4 bits may lose where they are said to lose nothing.
_LOST = 1e-4


class PackedLinear(nn.Module):
    """A linear layer of weights in 4 bits, or in 8: twice 4, the second of what the first has left.

    The codes are laid out as this processor's kernel wants them and are no parameters: a packed layer is for answers, not for training or
    saving. What tells two of them apart is their ``digest``, which is the same on every processor.

    Args:
        linear: what it is made of.
        weights: in how many bits.

    Attributes:
        digest: sha256 of codes and scales, ``[32]`` uint8.
        bias: ``[out]``, as it was.
    """

    digest: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, weights: Weights) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._parts: list[tuple[Tensor, Tensor]] = []
        whole, left = hashlib.sha256(), linear.weight.float()
        lost = _LOST * left.square().sum() if weights == "auto" else float("inf")
        while len(self._parts) < (2 if weights == "int8" or left.square().sum() > lost else 1):
            codes, scales = _in_four_bits(left)
            left = left - _decoded(codes, scales)
            self._parts.append((torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2), scales))
            for part in (codes, scales):
                whole.update(part.flatten().view(torch.uint8).numpy().tobytes())
        self.register_buffer("digest", torch.tensor([*whole.digest()], dtype=torch.uint8))
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        rows = x.reshape(-1, self.in_features).bfloat16()
        first, *more = (torch._weight_int4pack_mm_for_cpu(rows, codes, BLOCK, scales).to(x.dtype) for codes, scales in self._parts)
        out = sum(more, first).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={4 * len(self._parts)}"
        )


def checked_weights(weights: Any) -> Weights | None:
    """Raises:
    InputError: nothing that weights can be packed as.
    """
    if weights is not None and weights not in get_args(Weights):
        raise InputError(f"weights is {brief(weights)}; give 'auto', 'int8' or 'int4', or None to leave them as they are")
    return cast(Weights | None, weights)


def is_packed(model: nn.Module) -> bool:
    """Whether layers of a model compute in bfloat16, whatever its dtype."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _not_saved(*_: Any, **__: Any) -> None:
    raise UnsupportedModelError("a model whose weights were packed cannot be saved; save the one that it was read from")


def _packable(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Layers whose shape the kernel takes, under each of their names."""
    linears = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear]
    return [(name, linear) for name, linear in linears if linear.in_features % BLOCK == 0 and linear.out_features % _ROWS == 0]


@torch.inference_mode(False)
@torch.no_grad()
def pack(model: PreTrainedModel, weights: Weights, done: Callable[[str, int, int], None]) -> None:
    """Exchange the linear layers of a model that is nobody else's for packed ones; the layer that gives logits has 8 bits.

    Layers whose shape the kernel does not take stay as they are, and so do embeddings and whatever else is no linear layer.

    Args:
        done: told the name of a layer, and how many of how many weights are packed.

    Raises:
        UnsupportedModelError: there is nothing to pack.
    """
    if not (found := _packable(model)):
        raise UnsupportedModelError(f"a {type(model).__name__} has no linear layers that could be packed; leave weights out")
    if torch.backends.cpu.get_cpu_capability() not in _FAST:
        logger.warning("torch has no fast kernel for weights of few bits on this processor; answers may take longer than without")
    head, total, packed = model.get_output_embeddings(), sum(linear.weight.numel() for _, linear in found), dict[nn.Linear, PackedLinear]()
    so_far = 0
    for name, linear in found:
        if linear not in packed:
            packed[linear] = PackedLinear(linear, "int8" if linear is head else weights)
        model.set_submodule(name, packed[linear])
        so_far += linear.weight.numel()
        done(name, so_far, total)
    model.save_pretrained = _not_saved


def _in_four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` uint8, and scales with offsets ``[in / BLOCK, out, 2]`` bfloat16, offsets being the weight of code 8."""
    rows = max(1, _AT_A_TIME // weight.shape[1])
    parts = [_nearest(some.unflatten(1, (-1, BLOCK))) for some in weight.split(rows)]
    codes, scales = (torch.cat(some) for some in zip(*parts, strict=True))
    return codes.flatten(1), scales.transpose(0, 1).contiguous()


def _nearest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of some codes ``[out, n, BLOCK]`` and scales ``[out, n, 2]``: from its least weight to its largest in some steps,
    or in steps of an eighth of the one farthest from zero. So blocks that had 4 bits before are found again.
    """
    least, most = blocks.amin(2), blocks.amax(2)
    farthest = torch.where(most > -least, most, least)
    codes, scales, error = _coded(blocks, farthest / -8, farthest)
    for steps in _RANGES:
        tried = _coded(blocks, (most - least) / steps, least)
        nearer = tried[2] < error
        codes, scales = (torch.where(nearer[..., None], new, old) for new, old in zip(tried, (codes, scales), strict=False))
        error = torch.where(nearer, tried[2], error)
        if bool((error <= _EXACT * blocks.square().sum(2)).all()):
            break
    return codes, scales


def _coded(blocks: Tensor, step: Tensor, first: Tensor) -> tuple[Tensor, ...]:
    """Codes ``[out, n, BLOCK]``, scales and offsets ``[out, n, 2]``, and each block's squared error, where code 0 is ``first``."""
    codes = (blocks - first[..., None]).div_(torch.where(step == 0, 1, step)[..., None]).round_().clamp_(0, 15)
    scales = torch.stack([step, first + 8 * step], -1).bfloat16()
    error = ((codes - 8) * scales[..., :1] + scales[..., 1:] - blocks).square_().sum(2)
    return codes.to(torch.uint8), scales, error


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """Weights ``[out, in]`` fp32."""
    wide = scales.transpose(0, 1).float()
    return ((codes.unflatten(1, (-1, BLOCK)) - 8.0) * wide[..., :1] + wide[..., 1:]).flatten(1)
