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

from kvzip_memory.context.codes import Vectors, each, tensors_of

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
        keys: ``[sum(lengths), D]``, post-RoPE at their original positions, in the model's dtype or as a codec has written them.
        values: ``[sum(lengths), DV]``, written as such; DV is D in most models. The keys themselves where these are their own values.
        lengths: pairs kept by each KV head.
        positions: ``[sum(lengths)]`` int32, position of each pair in the context.
        scores: ``[sum(lengths)]`` fp16 importance in the same order (``inf``: protected), or None if never scored.
        window: what the layer sees, None for full attention. A layer with one keeps exactly the pairs the next token can
            still see and is never compressed.
        gaps: pairs in front of each head's that are in the tensors and not of the layer; empty without any.
    """

    keys: Vectors
    values: Vectors
    lengths: tuple[int, ...]
    positions: Tensor
    scores: Tensor | None = None
    window: Window | None = None
    gaps: tuple[int, ...] = ()
    offsets: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gaps, ends = self.gaps or (0,) * self.n_heads, [0, *accumulate(self._sizes)]
        object.__setattr__(self, "offsets", (*(end + gap for end, gap in zip(ends, gaps, strict=False)), ends[-1]))

    @property
    def n_heads(self) -> int:
        return len(self.lengths)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Of each head the pairs in the tensors."""
        return tuple(map(sum, zip(self.lengths, self.gaps, strict=True))) if self.gaps else self.lengths

    def head(self, index: int) -> tuple[Vectors, Vectors]:
        """Keys and values of one KV head, ``[lengths[index], D]`` and ``[lengths[index], DV]``: views, nothing is copied."""
        rows = slice(self.offsets[index], self.offsets[index] + self.lengths[index])
        return self.keys[rows], self.values[rows]

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Keys and values, which are no codes."""
        assert isinstance(self.keys, Tensor)
        assert isinstance(self.values, Tensor)
        return self.keys, self.values

    def positions_of(self, index: int) -> Tensor:
        """Positions of one KV head's pairs, ``[lengths[index]]``: a view."""
        return self.positions[self.offsets[index] : self.offsets[index] + self.lengths[index]]

    def heads(self) -> Tensor:
        """``[sum(lengths)]``, the KV head of each pair."""
        sizes = torch.tensor(self._sizes, device=self.positions.device)
        return torch.repeat_interleave(torch.arange(self.n_heads, device=sizes.device), sizes)

    def among(self, wanted: Tensor) -> RaggedLayer:
        """The pairs of which ``wanted [sum(lengths)]`` bool is true, without scores; those in gaps are counted, too."""
        if self.gaps:
            wanted = wanted.clone()
            for offset, gap in zip(self.offsets, self.gaps, strict=False):
                wanted[offset - gap : offset] = False
        heads = self.heads()[wanted]
        lengths = tuple(torch.bincount(heads, minlength=self.n_heads).tolist())
        keys, values = self.pick(wanted)
        return RaggedLayer(keys, values, lengths, self.positions[wanted], window=self.window)

    def seen_from(self, first: int) -> RaggedLayer:
        """The layer without pairs at positions below ``first``, and with those in its gaps that are not: a view, the same object at every
        call. Whoever has it sees no less when that one has gone."""
        if first <= 0 and not self.gaps:
            return self
        known = _SEEN_FROM.setdefault(self, {})
        if first not in known:
            gaps = [int((positions < first).sum()) for positions in self.positions.split(self._sizes)]
            lengths = tuple(size - gap for size, gap in zip(self._sizes, gaps, strict=True))
            known[first] = replace(self, lengths=lengths, gaps=tuple(gaps) if any(gaps) else ())
        return known[first]

    def none(self) -> RaggedLayer:
        """A layer like this one without a pair, nor scores."""
        keys, values = self.pick(torch.arange(0))
        return RaggedLayer(keys, values, (0,) * self.n_heads, self.positions[:0].clone(), window=self.window)

    @property
    def shared(self) -> bool:
        """Whether keys are their own values."""
        return self.values is self.keys

    def pick(self, rows: Tensor) -> tuple[Vectors, Vectors]:
        """Copies of some keys and values, one and the same if they are shared."""
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
        values = () if self.shared else tensors_of(self.values)
        scores = () if self.scores is None else (self.scores,)
        return (*tensors_of(self.keys), *values, self.positions, *scores)

    def having(self, tensors: Sequence[Tensor]) -> RaggedLayer:
        """The same layer with its :meth:`tensors` elsewhere."""
        others = iter(tensors)
        keys = each(self.keys, lambda _: next(others))
        values = keys if self.shared else each(self.values, lambda _: next(others))
        positions, *scores = others
        return replace(self, keys=keys, values=values, positions=positions, scores=scores[0] if scores else None)


_SEEN_FROM: WeakKeyDictionary[RaggedLayer, dict[int, RaggedLayer]] = WeakKeyDictionary()


def storage_nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage counted once, whole."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
