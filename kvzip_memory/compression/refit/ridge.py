"""Kept pairs by ridge regression: keys that weigh what all pairs did, and values that say what all did.

For a block of the context, with queries ``Q`` of its repeat (scaled): what is evicted takes weight from the block, and what it said.

*Keys.* ``lost`` is how much the logarithm of the block's weight, the sum of ``exp(q k)`` over its pairs, has become smaller for a query.
To first order, keys ``k + d`` change it by ``a d^T q``, ``a`` the attention of ``q`` among the kept pairs alone. So a step is

    d = argmin |w (step lost - a d^T q)|^2 + mu m |d|^2

over all queries, ``w^2`` the share of the block in the attention of a query, ``m`` the mean squared row; some steps, of a part of what is
lost each, since it is no line. A key's step is then made shorter if it changes a logit of these queries by more than ``most``, or is longer
than the head's keys are: a head that hardly looks at anything must not make giants of them. Bias and pair in one, at no byte: Attention
Matching (arXiv 2602.16284) gives each pair a bias of its own.

*Values.* ``Y = softmax(Q K^T) V`` over the protected head and all pairs of the block, ``A`` the attention of the same queries over the head
and the kept pairs alone, with their new keys. The kept values become ``V + X`` with

    X = argmin |Y - A V - A X|^2 + (lambda m + prior r / v) |X|^2

``m`` is the mean diagonal of ``A^T A``, ``r`` and ``v`` the mean squares of a residual and a value: a head that keeps a few pairs must not
make giants of them. That values can be fitted to attention's output is shown by Attention Matching, too, which chooses pairs otherwise.

``lambda`` is chosen for each head and block, and with it whether values are changed, by queries that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvzip_memory.attention import Softmax
from kvzip_memory.compression.refit.base import LayerPairs
from kvzip_memory.compression.rows import Block

_RUN, _HELD_OUT = 8, 4  # rows in a run, and of so many runs one is held out
_MOST_JOINED = 4


@dataclass(frozen=True)
class RidgeRefit:
    """The default.

    Attributes:
        every: of the repeated tokens, each how many-th's queries are fitted to.
        steps: of the keys.
        step: part of the lost weight that one of them gives back. All of it is too much where few pairs are kept.
        mu, most: see above.
        lambdas: tried for the values of each head and block.
        prior: see above.
    """

    every: int = 16
    steps: int = 2
    step: float = 0.6
    mu: float = 0.1
    most: float = 1.0
    lambdas: tuple[float, ...] = (0.1, 0.003)
    prior: float = 10.0

    def identity(self) -> dict[str, Any]:
        return {
            "name": "ridge",
            "version": 2,
            "every": self.every,
            "steps": self.steps,
            "step": self.step,
            "mu": self.mu,
            "most": self.most,
            "lambdas": list(self.lambdas),
            "prior": self.prior,
        }

    def fit(self, pairs: LayerPairs) -> tuple[Tensor, Tensor]:
        for block in _joined(pairs.blocks, pairs.ratio):
            self._fit(block, pairs)
        return pairs.keys, pairs.values

    def _fit(self, block: list[Block], pairs: LayerPairs) -> None:
        """Change keys and values of a block, which no other one looks at."""
        start, end, p = block[0].start - pairs.start, block[-1].end - pairs.start, pairs.head[0].shape[1]
        keep = pairs.keep[:, start:end]
        m = int(keep.sum(1).max())
        if m == 0 or bool(keep.all()):
            return
        # the kept columns of each head, in front; heads with fewer have others behind them, which are hidden
        there, columns = keep.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        there, columns = there[:, :m].bool(), columns[:, :m]
        hidden, free = ~there.unsqueeze(1), there & ~pairs.pinned[start:end][columns]
        heads, places = free.nonzero(as_tuple=True)
        of_all_heads = torch.arange(len(keep), device=keep.device).unsqueeze(1)

        softmax = Softmax(block[0].scaling, block[0].cap)
        queries = torch.cat([part.queries for part in block], 1).float() * softmax.scaling
        (head_keys, all_keys), (head_values, all_values) = (
            (head.float(), own[:, start:end].float()) for head, own in zip(pairs.head, (pairs.keys, pairs.values), strict=True)
        )
        before, logits = (softmax.capped(queries @ keys.mT) for keys in (head_keys, all_keys))  # [H, R, p], [H, R, T]
        sinks = [part.sinks for part in block if part.sinks is not None]
        if sinks:  # one more pair of the head, without a value
            before, p = torch.cat([before, torch.cat(sinks, 1).unsqueeze(2)], 2), p + 1
            head_values = pad(head_values, (0, 0, 0, 1))
        wanted = torch.cat([before, logits], 2).softmax(2) @ torch.cat([head_values, all_values], 1)
        mass = logits.logsumexp(2)
        share = (mass - torch.logaddexp(before.logsumexp(2), mass)).exp()
        kept_keys, kept_values = pairs.keys[:, start:end][of_all_heads, columns], all_values[of_all_heads, columns]  # [H, m, D]
        logits = logits.gather(2, columns.unsqueeze(1).expand(-1, logits.shape[1], -1)).masked_fill_(hidden, -torch.inf)
        shift = self._shift(queries, logits, kept_keys.float(), softmax, mass, share, free, all_keys.square().sum(2).mean(1).sqrt())
        kept_keys = pairs.stored(_added(kept_keys, shift))
        logits = softmax.capped(queries @ kept_keys.float().mT).masked_fill_(hidden, -torch.inf)
        attention = torch.cat([before, logits], 2).softmax(2)
        missing = wanted - attention @ torch.cat([head_values, kept_values], 1)
        change = self._change(attention[:, :, p:] * free.unsqueeze(1), missing, all_values.square().sum(2).mean(1))
        columns = start + columns[heads, places]
        pairs.keys[heads, columns] = kept_keys[heads, places]
        pairs.values[heads, columns] = _added(pairs.values[heads, columns], change[heads, places])

    def _shift(
        self, queries: Tensor, logits: Tensor, keys: Tensor, softmax: Softmax, mass: Tensor, share: Tensor, free: Tensor, length: Tensor
    ) -> Tensor:
        """Of the keys ``[H, m, D]``; zeros where it cannot be computed.

        Args:
            queries: ``[H, R, D]``, scaled.
            logits: ``[H, R, m]`` of the kept pairs; -inf where there is none.
            keys: ``[H, m, D]`` of the kept pairs, fp32.
            softmax: of the layer, without its sinks.
            mass: ``[H, R]``, log-sum-exp of the logits of all pairs of the block.
            share: ``[H, R]``, of the block in the attention.
            free: ``[H, m]`` bool, which may be changed.
            length: ``[H]``, of the keys, the root of the mean square.
        """
        weights = share.sqrt().unsqueeze(2)
        weighed = weights * queries
        alike = weighed @ weighed.mT
        total = queries.new_zeros(*free.shape, queries.shape[2])
        for _ in range(self.steps):
            kept = logits.logsumexp(2)
            attention = (logits - kept.unsqueeze(2)).exp_() * free.unsqueeze(1)
            if softmax.cap is not None:  # a logit follows its key the less the closer it is to the cap
                attention *= 1 - (logits / softmax.cap).clamp(min=-1).square()
            products = (attention @ attention.mT).mul_(alike)
            ridge = self.mu * products.diagonal(dim1=1, dim2=2).mean(1)
            solution = _solved(products, weights * (self.step * (mass - kept)).unsqueeze(2), ridge.unsqueeze(0))[0]
            shift = attention.mT @ (solution * weighed)
            change = queries @ shift.mT
            scale = torch.minimum(self.most / change.abs().amax(1), length.unsqueeze(1) / shift.norm(dim=2)).clamp(max=1.0)
            total += shift * scale.unsqueeze(2)
            if softmax.cap is None:
                logits = logits + change * scale.unsqueeze(1)
            else:
                logits = softmax.capped(queries @ (keys + total).mT).masked_fill_(logits.isneginf(), -torch.inf)
        return torch.where(total.isfinite().all(2).all(1)[:, None, None], total, 0.0)

    def _change(self, attention: Tensor, missing: Tensor, value: Tensor) -> Tensor:
        """Of the values ``[H, m, D]`` for ``A [H, R, m]`` and residuals ``[H, R, D]``.

        Args:
            value: ``[H]``, mean squared norm of the values.
        """
        products = attention @ attention.mT
        columns = attention.amax(1).count_nonzero(1).clamp(min=1)
        mean = products.diagonal(dim1=1, dim2=2).sum(1) / columns  # of the diagonal of A^T A
        weights = mean.new_tensor(self.lambdas).unsqueeze(1) * mean
        weights = weights + self.prior * missing.square().sum(2).mean(1) / value  # [L, H]
        solution, better = _solution(products, missing, weights)
        return torch.where(better[:, None, None], attention.mT @ solution, 0.0)


def _solution(products: Tensor, missing: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A ridge regression in its dual form, as there are fewer rows than unknowns more often than not, with the best weight.

    Args:
        products: ``[H, R, R]``, inner products of the rows.
        missing: ``[H, R, D]``.
        weights: ``[L, H]`` to try.

    Returns:
        ``(products + weight I)^-1 missing``; and ``[H]`` bool, whether it exists and is better than zeros on rows that are held out.
    """
    run = torch.arange(products.shape[1], device=products.device) // _RUN
    seen = run % _HELD_OUT != _HELD_OUT - 1
    tried = products[:, ~seen][:, :, seen] @ _solved(products[:, seen][:, :, seen], missing[:, seen], weights)
    errors = (missing[:, ~seen] - tried).square().sum((2, 3)).nan_to_num(nan=torch.inf)  # [L, H]
    least, best = errors.min(0)
    solution = _solved(products, missing, weights.gather(0, best.unsqueeze(0)))[0]
    return solution, (least < missing[:, ~seen].square().sum((1, 2))) & solution.isfinite().all(2).all(1)


def _solved(products: Tensor, missing: Tensor, weights: Tensor) -> Tensor:
    """``(products [H, R, R] + weights [L, H] I)^-1 missing [H, R, D]``: ``[L, H, R, D]``; NaN where the matrix has no factor."""
    shape = (*weights.shape, *products.shape[1:])
    matrix = products.expand(shape).clone()
    matrix.diagonal(dim1=2, dim2=3).add_(weights.unsqueeze(2))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(missing.expand(len(weights), *missing.shape), factor)
    return solution.masked_fill((failed > 0)[..., None, None], torch.nan)


def _added(pairs: Tensor, change: Tensor) -> Tensor:
    """In their dtype. Those that zeros are added to stay as they are, and so do those that would leave the dtype's range."""
    changed = (pairs.to(torch.promote_types(pairs.dtype, change.dtype)) + change).to(pairs.dtype)
    return torch.where(changed.isfinite().all(-1, keepdim=True), changed, pairs)


def _joined(blocks: list[Block], ratio: float) -> Iterator[list[Block]]:
    """Neighbouring blocks that are fitted as one: where few pairs are kept there have to be more of them for a fit. It costs time in
    proportion to the square of their number, and more, so they are not many.
    """
    count = min(_MOST_JOINED, max(1, round(0.3 / ratio)))
    for i in range(0, len(blocks), count):
        yield blocks[i : i + count]
