"""Which parts of a context a question is about: told by the attention it pays them, and by its words.

A head pays most of its attention to the same few positions whatever is asked. So its shares of the parts are compared with
those it has when :data:`NEUTRAL` is asked, as in-context re-ranking (arXiv 2410.02642) does. A part's score is its term of the
divergence between the two, and heads that diverge much, since they look for what is asked, weigh more than others.
Why this and not another: ``docs/benchmarks.md``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvzip_memory.attention import BACKENDS, RowKV, Softmax
from kvzip_memory.attention.base import turned
from kvzip_memory.context.codes import numbers, turned_as
from kvzip_memory.inference.cache import Row
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.inference.states import CallCache
from kvzip_memory.system.modes import plain

#: Asked of every context, to know where heads look when they look for nothing.
NEUTRAL = "N/A"

#: Tokens of a context, ``[start, end)``.
Span = tuple[int, int]

_FLOOR = 1e-4  # added to shares before they are compared, so that a head that saw nothing of a part does not decide
_BLOCK_ELEMENTS = 1 << 22  # attention probabilities held at one time, 16 MB


def attention_mass(model: LanguageModel, row: Row, ids: Sequence[int], spans: Sequence[Span], first: int = 0) -> Tensor:
    """Attention that ``ids``, from the one numbered ``first`` on, pay to spans of the row's context.

    Returns:
        ``[L, H, len(spans)]`` fp32 on the host, of the L layers with full attention: probabilities, summed over the pairs that are left
        of each span, the mean over those ids and over each KV head's queries. The row's tail holds the ids' pairs afterwards.
    """
    watch = _Watch(model, row, spans, row.tail.length + first)
    for count in model.fill(ids, row.position, watch, watch):
        row.tail.advance(count)
    return torch.stack([watch.mass[layer] for layer in sorted(watch.mass)]).cpu() / (len(ids) - first)


def compared(asked: Tensor, neutral: Tensor) -> Tensor:
    """Scores ``[n]`` of n parts from the masses ``[L, H, n]`` of a question and of :data:`NEUTRAL`."""
    p, q = (mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny) for mass in (asked, neutral))
    terms = p * ((p + _FLOOR) / (q + _FLOOR)).log()
    return (terms * terms.sum(-1, keepdim=True).clamp(min=0)).mean((0, 1))


class _Watch(CallCache):
    """Cache and attention of one forward over a context, fed in pieces; adds up what every head pays to the spans."""

    def __init__(self, model: LanguageModel, row: Row, spans: Sequence[Span], first: int) -> None:
        super().__init__([row.remembered], model.layout.latent)
        self._row, self._first, self._layout, self._rotations = row, first, model.layout, model.rotations
        self._edges = torch.tensor(spans, dtype=torch.int32, device=model.device).view(-1, 2).T.contiguous()  # [2, spans]
        self.mass: dict[int, Tensor] = {}  # [H, spans] of each layer with full attention

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._row.length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        row, n, place = self._row, query.shape[2], self._layout.places[layer]
        own, window = layer == self._layout.owners[place], self._layout.windows[place]
        new = key[0]
        keys, values = row.tail.append(place, new, new if value is key else value[0]) if own else row.tail.seen(place, n)
        if window is None:
            mass = self._mass(place, layer, query[0].unflatten(0, (len(keys), -1)) * softmax.scaling, keys, softmax)
            self.mass[layer] = self.mass[layer] + mass if layer in self.mass else mass
        return BACKENDS["cpu"](
            query, [RowKV(row.pairs(place), keys, values, n, row.start, row.turns(place, layer, self._rotations))], softmax, window
        )

    def _mass(self, place: int, layer: int, query: Tensor, tail_keys: Tensor, softmax: Softmax) -> Tensor:
        """``[H, spans]`` fp32: what the rows of scaled ``query [H, G, n, D]`` that count pay to the spans, summed over them."""
        parts, (n_heads, group, n, _) = self._row.pairs(place), query.shape
        turns = self._row.turns(place, layer, self._rotations) or (None,) * len(parts)
        shifts = self._row.shifts or (0,) * len(parts)
        past = self._row.tail.length
        sinks = None if softmax.sinks is None else softmax.sinks.float().view(n_heads, group, 1, 1)
        mass = query.new_zeros(n_heads, group, self._edges.shape[1], dtype=torch.float32)
        for head in range(n_heads):
            positions = torch.cat([part.positions_of(head) + shift for part, shift in zip(parts, shifts, strict=True)])
            at, n_before = torch.searchsorted(positions, self._edges), len(positions)
            step = max(1, _BLOCK_ELEMENTS // (group * (n_before + past + n)))
            for start in range(max(0, self._first - past), n, step):
                rows = query[head, :, start : start + step]
                own = rows @ tail_keys[head].T
                positions = torch.arange(past + n, device=own.device)
                later = positions > positions[past + start : past + start + rows.shape[1], None]
                asked = [(part.head(head)[0], turned(rows, turn)) for part, turn in zip(parts, turns, strict=True)]
                before = [turned_as(keys, query) @ numbers(keys, query.dtype).T for keys, query in asked]
                logits = softmax.capped(torch.cat([*before, own], -1).float())
                logits[..., n_before:].masked_fill_(later, float("-inf"))
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head].expand(-1, rows.shape[1], 1)], -1)
                paid = pad(logits.softmax(-1)[..., :n_before].sum(1).cumsum(-1), (1, 0))
                mass[head] += paid[:, at[1]] - paid[:, at[0]]
        return mass.mean(1)


def blend(*kinds: Tensor) -> Tensor:
    """Mean of several kinds of scores ``[n]``, each as a share of its best."""
    shares = [scores.clamp(min=0) / scores.max().clamp(min=torch.finfo(scores.dtype).tiny) for scores in kinds]
    return torch.stack(shares).mean(0)


@plain()
def bm25(query: str, texts: Sequence[str]) -> Tensor:
    """Okapi BM25 scores ``[len(texts)]`` of the words of a query."""
    counts = [Counter(_words(text)) for text in texts]
    lengths = torch.tensor([float(count.total()) for count in counts])
    scores = torch.zeros(len(texts))
    for word in _words(query):
        times = torch.tensor([float(count[word]) for count in counts])
        having = int((times > 0).sum())
        rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        scores += rarity * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * lengths / lengths.mean().clamp(min=1)))
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
