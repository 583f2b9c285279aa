"""Values by ridge regression towards those that the model computed.

For a block of the context, with queries ``Q`` of its repeat: ``Y = softmax(Q K^T) V`` over the protected head and all pairs of the block,
``A`` the attention of the same queries over the head and the kept pairs alone. The kept values become ``V + X`` with

    X = argmin |Y - A V - A X|^2 + (lambda m + prior r / v) |X|^2

``m`` is the mean diagonal of ``A^T A``, ``r`` and ``v`` the mean squares of a residual and a value: a head that keeps a few pairs must not
make giants of them. ``lambda`` is chosen for each head and block, and with it whether anything is changed, by queries that the fit has not
seen. That values can be fitted to attention's output is shown by Attention Matching (arXiv 2602.16284), which chooses pairs otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvzip_memory.compression.refit.base import LayerPairs
from kvzip_memory.compression.rows import Block

_RUN, _HELD_OUT = 8, 4  # rows in a run, and of so many runs one is held out


@dataclass(frozen=True)
class RidgeRefit:
    """The default.

    Attributes:
        every: of the repeated tokens, each how many-th's queries are fitted to.
        lambdas: tried for each head and block.
        prior: see above.
    """

    every: int = 16
    lambdas: tuple[float, ...] = (0.1, 0.003)
    prior: float = 10.0

    def identity(self) -> dict[str, Any]:
        return {"name": "ridge", "version": 1, "every": self.every, "lambdas": list(self.lambdas), "prior": self.prior}

    def values(self, pairs: LayerPairs) -> Tensor:
        values = pairs.values.clone()
        for block in _joined(pairs.blocks, pairs.ratio):
            self._fit(block, pairs, values)
        return values

    def _fit(self, block: list[Block], pairs: LayerPairs, values: Tensor) -> None:
        """Change ``values`` in a block."""
        start, end, p = block[0].start - pairs.start, block[-1].end - pairs.start, pairs.head[0].shape[1]
        keep = pairs.keep[:, start:end]
        fitted = keep & ~pairs.pinned[start:end]
        m = int(fitted.sum(1).max())
        if m == 0 or bool(keep.all()):
            return
        keys, original = (
            torch.cat([head, own[:, start:end]], 1).float() for head, own in zip(pairs.head, (pairs.keys, pairs.values), strict=True)
        )
        queries = torch.cat([part.queries for part in block], 1).float() * block[0].scaling
        logits = queries @ keys.mT  # [H, R, p + T]
        wanted = logits.softmax(-1) @ original
        kept = torch.cat([keep.new_ones(len(keep), p), keep], 1)
        attention = logits.masked_fill_(~kept.unsqueeze(1), -torch.inf).softmax(-1)
        missing = wanted - attention @ original
        # the fitted columns of each head, in front; heads with fewer have zeros behind them, which get zeros
        there, columns = fitted.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        there, columns = there[:, :m].bool(), columns[:, :m]
        attention = attention.gather(2, (p + columns).unsqueeze(1).expand(-1, attention.shape[1], -1)) * there.unsqueeze(1)
        change = self._solve(attention, missing, original[:, p:].square().sum(2).mean(1))
        heads, places = there.nonzero(as_tuple=True)
        columns = start + columns[heads, places]
        values[heads, columns] = (values[heads, columns].float() + change[heads, places]).to(values.dtype)

    def _solve(self, attention: Tensor, missing: Tensor, value: Tensor) -> Tensor:
        """``X [H, m, D]`` for ``A [H, R, m]`` and residuals ``[H, R, D]``; zeros where nothing is better on rows that are held out.

        There are fewer rows than pairs more often than not, so ``X = A^T (A A^T + weight)^-1 residual``.

        Args:
            value: ``[H]``, mean squared norm of the values.
        """
        run = torch.arange(attention.shape[1], device=attention.device) // _RUN
        seen = run % _HELD_OUT != _HELD_OUT - 1
        products = attention @ attention.mT
        columns = attention.amax(1).count_nonzero(1).clamp(min=1)
        mean = products.diagonal(dim1=1, dim2=2).sum(1) / columns  # of the diagonal of A^T A
        weights = torch.tensor(self.lambdas, device=attention.device).unsqueeze(1) * mean
        weights = weights + self.prior * missing.square().sum(2).mean(1) / value  # [L, H]
        tried = products[:, ~seen][:, :, seen] @ _solved(products[:, seen][:, :, seen], missing[:, seen], weights)
        errors = (missing[:, ~seen] - tried).square().sum((2, 3)).nan_to_num(nan=torch.inf)  # [L, H]
        least, best = errors.min(0)
        change = attention.mT @ _solved(products, missing, weights.gather(0, best.unsqueeze(0)))[0]
        better = (least < missing[:, ~seen].square().sum((1, 2))) & change.isfinite().all(2).all(1)
        return torch.where(better[:, None, None], change, 0.0)


def _solved(products: Tensor, missing: Tensor, weights: Tensor) -> Tensor:
    """``(products [H, R, R] + weights [L, H] I)^-1 missing [H, R, D]``: ``[L, H, R, D]``; NaN where the matrix has no factor."""
    shape = (*weights.shape, *products.shape[1:])
    matrix = products.expand(shape).clone()
    matrix.diagonal(dim1=2, dim2=3).add_(weights.unsqueeze(2))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(missing.expand(len(weights), *missing.shape), factor)
    return solution.masked_fill((failed > 0)[..., None, None], torch.nan)


def _joined(blocks: list[Block], ratio: float) -> Iterator[list[Block]]:
    """Neighbouring blocks that are fitted as one: where few pairs are kept there have to be more of them for a fit, at the same cost."""
    count = max(1, round(0.3 / ratio))
    for i in range(0, len(blocks), count):
        yield blocks[i : i + count]
