"""Attention over compressed contexts, registered with transformers by name. Nothing of a model is patched.

A model's attention modules look their attention function up by ``config._attn_implementation``. :func:`attach`
registers a function under a name made of ours and the one the model came with, and selects it. Called with a
``kvzip=`` keyword, which travels through the model's forward to every layer, it attends as that object says; called
without, it is the attention the model came with, so the model goes on working for everybody else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvzip_memory.attention import cpu, flash, reference
from kvzip_memory.attention.base import AttentionBackend, RowKV, Softmax
from kvzip_memory.attention.latent import absorbed, expanded
from kvzip_memory.attention.temperature import is_tempered, tempered
from kvzip_memory.context import Window
from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief

__all__ = ["BACKENDS", "NAMES", "AttentionBackend", "AttentionCall", "Chosen", "RowKV", "Softmax", "attach", "choose"]

#: Those in plain torch; they compute on every device.
BACKENDS: dict[str, AttentionBackend] = {"cpu": cpu.attention, "reference": reference.attention}
#: What :func:`choose` knows.
NAMES = ("auto", *BACKENDS, "flash", "triton")
#: Question tokens up to which the ``triton`` kernel, which cuts a context into many parts, is used before a flash attention library.
FEW_TOKENS = 16

_PREFIX = "kvzip:"


class AttentionCall(Protocol):
    """What travels with one forward as ``kvzip=``.

    Attributes:
        latents: what a layer with latent attention caches, ``[B, 1, n, R + rope]``, from its call of the cache to its attention.
        positions: ``[B, n]``, those of the queries.
    """

    latents: dict[int, Tensor]
    positions: Tensor

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What a model that does not go by the positions takes for the first of them."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer.
            query: ``[B, H * G, n, D]``, post-RoPE.
            key, value: ``[B, H, n, D]`` and ``[B, H, n, DV]``, this call's own pairs, keys post-RoPE. One tensor if keys are their own
                values, see :mod:`~kvzip_memory.attention.latent`.
            softmax: of the layer.

        Returns:
            ``[B, n, H * G, DV]``, DV the dimension of the values.
        """
        ...


class Chosen(NamedTuple):
    """An attention backend.

    Attributes:
        name: what computes, such as ``"triton, flash_attn"``.
        attend: the backend.
        kernels: :mod:`kvzip_memory.attention.triton` if it decodes, for steps that are captured as CUDA graphs.
    """

    name: str
    attend: AttentionBackend
    kernels: ModuleType | None = None


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Chosen:
    """The attention for a model's device and dtype.

    Args:
        name: one of :data:`NAMES`. ``"auto"`` is ``"cpu"`` but on NVIDIA GPUs, where ``"triton"`` decodes and
            ``"flash"`` reads long questions, as far as there are.

    Raises:
        InputError: an unknown name, or one that cannot compute on this device or in this dtype.
    """
    if name not in NAMES:
        raise InputError(f"attention {brief(name)} is unknown; use one of {', '.join(NAMES)}")
    if name in BACKENDS:
        return Chosen(name, BACKENDS[name])
    wide = device.type == "cuda" and dtype is torch.float64  # which the kernels do not know
    if name == "triton":
        kernels = None if wide else _kernels(device)
        if kernels is None:
            raise InputError(
                f"attention 'triton' needs a CUDA GPU, at most 32 bits and the package triton; the model is {dtype} on {device}. Use 'auto'"
            )
        return Chosen(name, kernels.attention, kernels)
    library = flash.load(device) if dtype in (torch.float16, torch.bfloat16) else None
    if name == "flash":
        if library is None:
            raise InputError(
                f"attention 'flash' needs an NVIDIA GPU (Ampere or later), float16 or bfloat16, and flash-attn or torch 2.10; "
                f"the model is {dtype} on {device}. Use 'auto', or pip install 'kvzip-memory[flash]'"
            )
        return Chosen(library[0], flash.backend(library[1]))
    kernels = _kernels(device) if device.type == "cuda" and not wide else None
    decode = Chosen("cpu", cpu.attention) if kernels is None else Chosen("triton", kernels.attention, kernels)
    if library is None:
        return decode
    return Chosen(f"{decode.name}, {library[0]}", _by_length(decode.attend, flash.backend(library[1])), decode.kernels)


def _kernels(device: torch.device) -> ModuleType | None:
    """The ``triton`` backend where it can run: on GPUs, and on CPUs in Triton's interpreter."""
    try:
        kernels = import_module("kvzip_memory.attention.triton")
    except ImportError:
        return None
    return kernels if device.type == "cuda" or (kernels.INTERPRETED and device.type == "cpu") else None


def _by_length(decode: AttentionBackend, read: AttentionBackend) -> AttentionBackend:
    def attention(query: Tensor, rows: Sequence[RowKV], softmax: Softmax, window: Window | None) -> Tensor:
        tokens, dim = query.shape[2:]
        library = tokens > FEW_TOKENS and dim <= 256 and dim % 8 == 0 and softmax.cap is None and rows[0].values.shape[2] == dim
        return (read if library else decode)(query, rows, softmax, window)

    return attention


def attach(model: PreTrainedModel) -> None:
    """Let ``model`` answer to ``kvzip=``. Attaching twice changes nothing."""
    original: str = model.config._attn_implementation
    if original.startswith(_PREFIX):
        return
    if "flash" in original:  # transformers picks its flash library by the configured name, which will be ours
        original = "sdpa"
    name = _PREFIX + original
    AttentionInterface.register(name, partial(_attention, original))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[original])
    model.set_attn_implementation(name)


def _attention(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kvzip: AttentionCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if kvzip is None:
        return _original(original, module)(module, query, key, value, attention_mask, **kwargs)
    layer: int = module.layer_idx  # type: ignore[assignment]
    softmax = Softmax(kwargs["scaling"], kwargs.get("softcap"), kwargs.get("s_aux"))
    if is_tempered(module):
        query = tempered(module, query, kvzip.get_seq_length(layer), kvzip.positions)
    latent = kvzip.latents.pop(layer, None)
    if latent is None:
        return kvzip.attend(layer, query, key, value, softmax).contiguous(), None
    return expanded(module, kvzip.attend(layer, absorbed(module, query), latent, latent, softmax)).contiguous(), None


def _original(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "eager":  # not in the table: each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[name]
