"""What an attention backend is given and what it owes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
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


class Turn(NamedTuple):
    """The rotation that takes queries to where the pairs of a part stand that is seen from ``by`` positions farther on than it was made.

    Rotary embeddings make a product depend on the distance alone, so attending with queries turned back equals attending to pairs that are
    moved forward, which nobody needs to copy.

    Attributes:
        by: positions that the part has moved.
        cos, sin: ``[r]`` fp32 (``[T, 1, 1, r]`` of several turns), of each dimension that is rotated; the sine with the sign of the
            dimension that it goes to.
        start: the first of them.
        partner: ``[r]``, which one each is rotated with.
        halves: whether that is the one half of them farther on.
    """

    by: int
    cos: Tensor
    sin: Tensor
    start: int
    partner: Tensor
    halves: bool = False

    def of(self, query: Tensor) -> Tensor:
        """Queries ``[..., D]`` turned, in their dtype."""
        size = self.cos.shape[-1]
        part = query[..., self.start : self.start + size].float()
        others = part.roll(size // 2, -1) if self.halves else part[..., self.partner]
        moved = (part * self.cos).addcmul_(others, self.sin).to(query.dtype)
        if size == query.shape[-1]:
            return moved
        turned = query.expand(*moved.shape[:-1], -1).clone()
        turned[..., self.start : self.start + size] = moved
        return turned


class RowKV(NamedTuple):
    """The pairs one row of a batch may see in one layer.

    Attributes:
        parts: compressed pairs that other rows may see, too: this layer of each part of a context; none for a row without a context.
        keys, values: ``[H, t, D]`` and ``[H, t, DV]``, the row's own tail; its last ``n_new`` entries belong to this call's queries.
        n_new: how many of the batch's query columns are this row's; they are the last ones (rows are left-padded).
        context_tokens: logical length of all parts together. Entry ``i`` of the tail has position ``context_tokens + i``.
        turns: how queries are turned for each part, None for those that stand where they were made; empty if all do.
    """

    parts: tuple[RaggedLayer, ...]
    keys: Tensor
    values: Tensor
    n_new: int
    context_tokens: int
    turns: tuple[Turn | None, ...] = ()

    @property
    def turned(self) -> tuple[tuple[RaggedLayer, Turn | None], ...]:
        """Each part with its turn."""
        return tuple(zip(self.parts, self.turns or [None] * len(self.parts), strict=True))

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Which part each is, and how far it has moved: the same for rows that see the same."""
        return tuple((id(part), turn.by if turn else 0) for part, turn in self.turned)


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


def rows_by_parts(rows: Sequence[tuple[Hashable, ...]]) -> list[list[int]]:
    """Indices of the rows that have the same parts, a list each; those that begin with the same ones come one after another.

    Args:
        rows: what tells the parts of each.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    first: dict[Hashable, int] = {}
    for b, parts in enumerate(rows):
        groups.setdefault(tuple(first.setdefault(part, len(first)) for part in parts), []).append(b)
    return [groups[parts] for parts in sorted(groups)]


def users_of_parts(groups: Sequence[RowKV]) -> list[tuple[RaggedLayer, list[tuple[int, Turn | None]]]]:
    """Each part once, and the indices of the groups that have it, with their turns. A group is told by one row."""
    users: dict[int, tuple[RaggedLayer, list[tuple[int, Turn | None]]]] = {}
    for group, row in enumerate(groups):
        for part, turn in row.turned:
            users.setdefault(id(part), (part, []))[1].append((group, turn))
    return list(users.values())


def told_by(part: Sequence[RaggedLayer]) -> RaggedLayer:
    """The layer that tells a part from all others. What a window shows may be the same object in several."""
    return next((layer for layer in part if layer.window is None), part[0])


def turned(query: Tensor, turn: Turn | None) -> Tensor:
    """Queries ``[..., D]`` as a part sees them."""
    return query if turn is None else turn.of(query)


def turned_for(query: Tensor, turns: Sequence[Turn | None]) -> list[Tensor]:
    """Queries ``[H, R, D]`` of a layer as each of its parts sees them, turned at one time."""
    moved = tuple(turn for turn in turns if turn is not None)
    found = iter(_together(moved).of(query) if moved else ())
    return [query if turn is None else next(found) for turn in turns]


@lru_cache(maxsize=4096)
def _together(turns: tuple[Turn, ...]) -> Turn:
    """Turns of one layer as one that gives ``[T, H, R, D]`` of ``[H, R, D]``."""
    cos, sin = (torch.stack(values)[:, None, None] for values in ([turn.cos for turn in turns], [turn.sin for turn in turns]))
    return turns[0]._replace(cos=cos, sin=sin)
