"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over latents as they are cached: one for all heads of a layer.

A model caches ``c``, from which each head makes its keys and values by a matrix of its own, and ``r``, a rotated key that all share.
With ``W_k`` and ``W_v`` of a head, ``q (W_k c) = (q W_k) c``, and what its weights ``p`` give is ``W_v (p c)``. So attention has one KV
head, with keys ``[c, r]``, which are their own values, and all query heads are its group: nothing is expanded for any token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def absorbed(module: Any, query: Tensor) -> Tensor:
    """Queries for latents: ``[B, H, n, nope + rope]`` becomes ``[B, H, n, R + rope]``.

    Args:
        module: attention of transformers, with ``kv_b_proj``, ``qk_nope_head_dim`` and ``v_head_dim``.
    """
    nope: int = module.qk_nope_head_dim
    keys, _ = _weights(module, query.shape[1], query)
    return torch.cat([query[..., :nope] @ keys, query[..., nope:]], -1)


def expanded(module: Any, attended: Tensor) -> Tensor:
    """What attention over latents ``[B, n, H, R + rope]`` says: ``[B, n, H, DV]``."""
    _, values = _weights(module, attended.shape[2], attended)
    return torch.einsum("bnhr,hvr->bnhv", attended[..., : values.shape[2]], values)


def _weights(module: Any, n_heads: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Of each head ``[H, nope, R]`` for keys and ``[H, DV, R]`` for values."""
    projection = module.kv_b_proj
    if type(projection) is nn.Linear and not hasattr(projection, "_hf_hook"):
        weight = projection.weight
    else:  # quantised, with an adapter, or brought from elsewhere: what it makes of each unit vector
        weight = projection(torch.eye(module.kv_lora_rank, dtype=like.dtype, device=like.device)).T
    both = weight.unflatten(0, (n_heads, -1))
    return both[:, : module.qk_nope_head_dim], both[:, module.qk_nope_head_dim :]
