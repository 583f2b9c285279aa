"""Attention over a set of pairs can be computed over parts of the set and merged by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention over the union of two disjoint sets of pairs (FlashAttention, arXiv 2205.14135, section 3.1).

    Args:
        out_a, out_b: ``[..., D]`` fp32, attention over each set.
        lse_a, lse_b: ``[...]`` fp32, log of the sum of exponentials of each set's logits; ``-inf`` for a set of
            which nothing is visible (its ``out`` must be finite). Not both may be ``-inf``.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    return out_a * (lse_a - lse).exp().unsqueeze(-1) + out_b * (lse_b - lse).exp().unsqueeze(-1)
