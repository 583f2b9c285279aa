"""The pairs that one layer has kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

#: What layers without attention remember at a context's end, whole: tensors ``[1, ...]`` by ``"<layer>.conv.<i>"`` or
#: ``"<layer>.recurrent.<i>"``, <i> counting the states of a layer. Nobody writes to them.
States = Mapping[str, Tensor]
NO_STATES: States = MappingProxyType({})

N = TypeVar("N", int, Tensor)


class Window(NamedTuple):
    """What a layer without full attention sees.

    Attributes:
        size: in tokens.
        chunked: whether the text is cut into chunks of so many, of which a token sees its own up to itself; otherwise it sees the last
            ``size`` tokens, itself included.
    """

    size: int
    chunked: bool = False

    def first(self, position: N) -> N:
        """The first position that a token at ``position`` sees; below 0 where it sees all before it."""
        return position - position % self.size if self.chunked else position - self.size + 1

    def left(self, n: int, far: int = 0) -> int:
        """How many of ``n`` tokens one that stands ``far`` behind the next one still sees."""
        return max(0, n - max(0, self.first(n + far)))


@dataclass(frozen=True, eq=False)
class RaggedLayer:
    """The kept pairs of one layer, heads one after another, each head's pairs in the order of their positions.

    Attributes:
        keys: ``[sum(lengths), D]``, post-RoPE at their original positions, dtype of the model.
        values: ``[sum(lengths), DV]``, dtype of the model; DV is D in most models. The keys themselves where these are their own values.
        lengths: pairs kept by each KV head.
        positions: ``[sum(lengths)]`` int32, position of each pair in the context.
        scores: ``[sum(lengths)]`` fp16 importance in the same order (``inf``: protected), or None if never scored.
        window: what the layer sees, None for full attention. A layer with one keeps exactly the pairs the next token can
            still see and is never compressed.
        gap: pairs in front of each head's that are in the tensors and not of the layer.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    scores: Tensor | None = None
    window: Window | None = None
    gap: int = 0
    offsets: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(accumulate((length + self.gap for length in self.lengths), initial=self.gap)))

    @property
    def n_heads(self) -> int:
        return len(self.lengths)

    def head(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one KV head, ``[lengths[index], D]`` and ``[lengths[index], DV]``: views, nothing is copied."""
        rows = slice(self.offsets[index], self.offsets[index] + self.lengths[index])
        return self.keys[rows], self.values[rows]

    def positions_of(self, index: int) -> Tensor:
        """Positions of one KV head's pairs, ``[lengths[index]]``: a view."""
        return self.positions[self.offsets[index] : self.offsets[index] + self.lengths[index]]

    def heads(self) -> Tensor:
        """``[sum(lengths)]``, the KV head of each pair."""
        lengths = torch.tensor(self.lengths, device=self.positions.device) + self.gap
        return torch.repeat_interleave(torch.arange(self.n_heads, device=lengths.device), lengths)

    def among(self, wanted: Tensor) -> RaggedLayer:
        """The pairs of which ``wanted [sum(lengths)]`` bool is true, without scores; of a layer with a gap its pairs are counted, too."""
        if self.gap:
            starts = torch.tensor(self.offsets[:-1], device=wanted.device) - self.gap
            wanted = wanted.index_fill(0, (starts.unsqueeze(1) + torch.arange(self.gap, device=wanted.device)).flatten(), False)
        heads = self.heads()[wanted]
        lengths = tuple(torch.bincount(heads, minlength=self.n_heads).tolist())
        keys, values = self.pick(wanted)
        return RaggedLayer(keys, values, lengths, self.positions[wanted], window=self.window)

    def behind(self, gap: int) -> RaggedLayer:
        """The layer without so many pairs at the beginning of each head: a view, the same object at every call. Whoever has it sees no less
        when that one has gone."""
        known = _BEHIND.setdefault(self, {})
        if gap not in known:
            known[gap] = replace(self, lengths=tuple(length - gap for length in self.lengths), gap=self.gap + gap)
        return known[gap]

    def none(self) -> RaggedLayer:
        """A layer like this one without a pair, nor scores."""
        keys, values = self.pick(torch.arange(0))
        return RaggedLayer(keys, values, (0,) * self.n_heads, self.positions[:0].clone(), window=self.window)

    @property
    def shared(self) -> bool:
        """Whether keys are their own values."""
        return self.values is self.keys

    def pick(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of some keys and values, one tensor if they are shared."""
        keys = self.keys[rows]
        return keys, keys if self.shared else self.values[rows]

    def dense_scores(self, n: int) -> Tensor:
        """``[H, n]`` fp16 on the host, ``-inf`` where the pair is gone. The layer has scores."""
        assert self.scores is not None
        scores = torch.full((self.n_heads, n), float("-inf"), dtype=self.scores.dtype)
        scores[self.heads().cpu(), self.positions.long().cpu()] = self.scores.cpu()
        return scores

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors this layer owns."""
        values = () if self.shared else (self.values,)
        scores = () if self.scores is None else (self.scores,)
        return (self.keys, *values, self.positions, *scores)

    def having(self, tensors: Sequence[Tensor]) -> RaggedLayer:
        """The same layer with its :meth:`tensors` elsewhere."""
        keys, *others = tensors
        values = keys if self.shared else others.pop(0)
        positions, *scores = others
        return replace(self, keys=keys, values=values, positions=positions, scores=scores[0] if scores else None)


_BEHIND: WeakKeyDictionary[RaggedLayer, dict[int, RaggedLayer]] = WeakKeyDictionary()


def storage_nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage counted once, whole."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
