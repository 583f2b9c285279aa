"""Attention over compressed contexts, registered with transformers by name. Nothing of a model is patched.

A model's attention modules look their attention function up by ``config._attn_implementation``. :func:`attach`
registers a function under a name made of ours and the one the model came with, and selects it. Called with a
``kvzip=`` keyword, which travels through the model's forward to every layer, it attends as that object says; called
without, it is the attention the model came with, so the model goes on working for everybody else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvzip_memory.attention import cpu, reference
from kvzip_memory.attention.base import AttentionBackend, RowKV

__all__ = ["BACKENDS", "AttentionBackend", "AttentionCall", "RowKV", "attach"]

BACKENDS: dict[str, AttentionBackend] = {"cpu": cpu.attention, "reference": reference.attention}

_PREFIX = "kvzip:"


class AttentionCall(Protocol):
    """What travels with one forward as ``kvzip=``."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer.
            query: ``[B, H * G, n, D]``, post-RoPE.
            key, value: ``[B, H, n, D]``, this call's own pairs, post-RoPE.
            scaling: factor of the logits.

        Returns:
            ``[B, n, H * G, D]``.
        """
        ...


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
    return kvzip.attend(module.layer_idx, query, key, value, kwargs["scaling"]), None  # type: ignore[arg-type]


def _original(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name == "eager":  # not in the table: each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[name]
