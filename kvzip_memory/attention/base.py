"""What an attention backend is given and what it owes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from kvzip_memory.context import RaggedLayer, Window


class Softmax(NamedTuple):
    """How a layer makes weights of what queries and keys give.

    Attributes:
        scaling: factor of their products; that makes logits of them.
        cap: logits ``x`` become ``cap * tanh(x / cap)``, before any is masked; None if they do not.
        sinks: ``[H * G]``, one more logit for each query head, which is without a value; None if there is none.
    """

    scaling: float
    cap: float | None = None
    sinks: Tensor | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """Logits with the cap applied, in place."""
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def sinks_of(self, n_heads: int, n_tokens: int) -> Tensor | None:
        """The sink of each query of so many tokens, in the order of ``[H, G * n_tokens]``; fp32, None if there is none."""
        return None if self.sinks is None else self.sinks.float().view(n_heads, -1).repeat_interleave(n_tokens, 1)


class RowKV(NamedTuple):
    """The pairs one row of a batch may see in one layer.

    Attributes:
        parts: compressed pairs that other rows may see, too: this layer of each part of a context; none for a row without a context.
        keys, values: ``[H, t, D]`` and ``[H, t, DV]``, the row's own tail; its last ``n_new`` entries belong to this call's queries.
        n_new: how many of the batch's query columns are this row's; they are the last ones (rows are left-padded).
        context_tokens: logical length of all parts together. Entry ``i`` of the tail has position ``context_tokens + i``.
    """

    parts: tuple[RaggedLayer, ...]
    keys: Tensor
    values: Tensor
    n_new: int
    context_tokens: int


class AttentionBackend(Protocol):
    def __call__(self, query: Tensor, rows: Sequence[RowKV], softmax: Softmax, window: Window | None) -> Tensor:
        """Attention of every row's new tokens over its context and, causally, its tail.

        Args:
            query: ``[B, H * G, n, D]``, post-RoPE; G query heads share a KV head.
            rows: one entry a row of the batch. Several rows may share parts.
            softmax: of the layer.
            window: what a token of the layer sees, None for all before it.

        Returns:
            ``[B, n, H * G, DV]`` in the dtype of ``query``; zero where a row has no query.
        """
        ...


def rows_by_parts(rows: Sequence[tuple[object, ...]]) -> list[list[int]]:
    """Indices of the rows that have the same parts, a list each; those that begin with the same ones come one after another."""
    groups: dict[tuple[int, ...], list[int]] = {}
    first: dict[int, int] = {}
    for b, parts in enumerate(rows):
        groups.setdefault(tuple(first.setdefault(id(part), len(first)) for part in parts), []).append(b)
    return [groups[parts] for parts in sorted(groups)]


def users_of_parts(groups: Sequence[tuple[RaggedLayer, ...]]) -> list[tuple[RaggedLayer, list[int]]]:
    """Each part once, and the indices of the groups that have it."""
    users: dict[int, tuple[RaggedLayer, list[int]]] = {}
    for group, parts in enumerate(groups):
        for part in parts:
            users.setdefault(id(part), (part, []))[1].append(group)
    return list(users.values())
