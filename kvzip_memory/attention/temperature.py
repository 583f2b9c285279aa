"""Llama 4's temperature of layers without rotation: queries are scaled by how far they stand (arXiv 2501.19399).

Its code counts positions from the length of the cache, one for all rows of a batch. Here each query gets that of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_tempered(module: Any) -> bool:
    """Whether a layer's attention has scaled the queries."""
    fields = vars(module)  # asked of every layer in every step, and modules are slow to say that they lack one
    return bool(fields.get("attn_temperature_tuning")) and not fields.get("use_rope", True)


def tempered(module: Any, query: Tensor, cached: int, positions: Tensor) -> Tensor:
    """Queries scaled by their own positions.

    Args:
        module: the layer's attention.
        query: ``[B, H * G, n, D]``, scaled as if each row had begun behind ``cached`` tokens.
        positions: ``[B, n]``.
    """

    def scale(positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1) / module.floor_scale)) * module.attn_scale + 1

    was = scale(torch.arange(cached, cached + query.shape[2], device=query.device))
    return (query * (scale(positions) / was)[:, None, :, None]).to(query.dtype)
