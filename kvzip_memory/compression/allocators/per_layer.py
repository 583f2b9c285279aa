"""The same number of pairs for every layer, heads of a layer compete (as in Ada-KV, arXiv 2407.11550)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvzip_memory.compression.allocators import global_topk


def allocate(scores: Tensor, budget: int) -> Tensor:
    edges = [round(budget * i / len(scores)) for i in range(len(scores) + 1)]
    return torch.stack([global_topk.allocate(layer, end - start) for layer, start, end in zip(scores, edges, edges[1:], strict=False)])
