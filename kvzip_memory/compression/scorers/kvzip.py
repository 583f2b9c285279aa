"""KVzip: a pair matters as much as the model looks at it while repeating the context (arXiv 2505.23416).

The context is cut into chunks; for each, one teacher-forced forward of "repeat this" and the chunk itself runs over
the dense cache. A pair's score is made of the attention probabilities the repeat's tokens pay to it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvzip_memory.attention import BACKENDS, Softmax
from kvzip_memory.attention.base import Turn, turned
from kvzip_memory.attention.cpu import beside_sinks, causal, with_context
from kvzip_memory.compression.fading import Fading
from kvzip_memory.compression.prefill import Prefilled, Progress, prefill
from kvzip_memory.context import RaggedLayer
from kvzip_memory.inference.cache import LastLayerSeen
from kvzip_memory.inference.states import CallCache

FIRST_PROMPT = "\n\nRepeat the previous context exactly."
NEXT_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8  # ids of the previous chunk that say where the next one starts
REPEATED = 200  # at least so many ids of a context that grows, also those that have their scores: a repeat of a few ranks them badly

#: What is repeated from near and from afar to see how scores fade. Another one means other curves of the same model.
PROBE = (
    "The lighthouse at the end of the pier was built in 1874 by a company of masons from the next valley, who carried the stones across "
    "the bay in flat boats. Its keeper wrote down every ship that passed, the wind and the hour, and on Sundays he read to the children of "
    "the village from these books. When the railway came, fewer ships did; the light was put out, and a baker moved in."
)
PROBE_TOKENS = 64  # of it; 128 and four texts instead of one gave the same KL

# Attention probabilities held at one time, in elements (fp32: 4 MB). Scoring 2,100 tokens with SmolLM2 on 2 cores took
# 3.9 s at 0.5M and at 1M, 4.7 s at 2M, 5.3 s at 4M and 7.4 s at 8M (means of two).
BLOCK_ELEMENTS = 1 << 20

#: Another one means other scores of the same text.
VERSION = 1


@dataclass(frozen=True)
class KVzipScorer:
    """Importance by context reconstruction.

    Attributes:
        aggregation: how a pair's probabilities over the repeat's rows and the query group become its score:
            ``"max"`` is the paper's; ``"sum_of_squares"`` about halves the KL to the full cache at
            0.3 (``docs/benchmarks.md``). The latter is stored as its root, which ranks the same and fits fp16.
        repeat: what the repeat attends to: the ``"whole"`` context as in the paper, or ``"local"``: protected head,
            its own chunk and itself. Local costs time linear in the context and scores as well.
        chunk_tokens: largest chunk. Chunks are cut equal, since a short last one would score too high. The paper's 2,000
            cost more and gave a higher KL than 500 at nearly every ratio we measured.

    The paper's score is ``KVzipScorer(aggregation="max", repeat="whole", chunk_tokens=2000)``.
    """

    aggregation: Literal["sum_of_squares", "max"] = "sum_of_squares"
    repeat: Literal["local", "whole"] = "local"
    chunk_tokens: int = 500
    has_rows: ClassVar[bool] = True

    def identity(self) -> dict[str, Any]:
        return {
            "name": "kvzip",
            "version": VERSION,
            "aggregation": self.aggregation,
            "repeat": self.repeat,
            "chunk_tokens": self.chunk_tokens,
        }

    def cost(self, n_tokens: int) -> int:
        return n_tokens

    def score(self, prefilled: Prefilled, progress: Progress) -> Tensor:
        n, layers = len(prefilled.token_ids), prefilled.full_layers
        scores = torch.zeros(len(layers), prefilled.dense[layers[0]][0].shape[0], n, dtype=torch.float32)
        for start, end in self._chunks(prefilled.first, n, prefilled.room):
            behind = prefilled.scored_parent or prefilled.shared
            lead = self._lead(prefilled, end) if behind and start == prefilled.start else 0
            repeat_ids = self._repeat_ids(prefilled, start - lead, end)
            scores[:, :, start:end] = self.score_chunk(prefilled, repeat_ids, prefilled.protected, start, end, lead=lead).cpu()
            progress("score", end - start)
        return scores

    def _lead(self, prefilled: Prefilled, end: int) -> int:
        """Tokens of the parent, and of what is shared, that are repeated before the first chunk ``[start, end)`` behind them, as far as the
        window has room.
        """
        repeated = min(REPEATED, prefilled.room - 64, end - prefilled.protected)
        return max(0, repeated - (end - prefilled.start))

    def _chunks(self, first: int, n: int, room: int) -> list[tuple[int, int]]:
        """Equal chunks of ``[first, n)``, small enough for the repeat to fit behind the prefix."""
        largest = min(self.chunk_tokens, max(room - 64, 64))
        count = max(1, math.ceil((n - first) / largest))
        edges = [first + round(i * (n - first) / count) for i in range(count + 1)]
        return [(start, end) for start, end in pairwise(edges) if start < end]

    def _repeat_ids(self, prefilled: Prefilled, start: int, end: int) -> list[int]:
        ids = prefilled.token_ids
        if start == prefilled.protected:
            prompt = prefilled.encode(FIRST_PROMPT)
        else:
            prompt = [*prefilled.encode(NEXT_PROMPT), *ids[max(0, start - OVERLAP) : start]]
        return [*prefilled.opening, *prompt, *prefilled.closing, *ids[start:end]]

    def fading(self, prefilled: Prefilled) -> Fading:
        """Measured by a text of our own behind the prefix's first tokens, repeated where it ends, 256 tokens behind that, 1,024, 4,096 ...

        Costs some 500 tokens, 100 more for a window four times as long.
        """
        model, head = prefilled.model, prefilled.token_ids[: min(prefilled.protected, PROBE_TOKENS)]
        ids = (*head, *prefilled.encode(PROBE)[:PROBE_TOKENS])
        pairs, states = prefill(model, ids, lambda *_: None)
        probe = Prefilled(model, pairs, ids, len(head), prefilled.opening, prefilled.closing, prefilled.encode, states=states)
        repeat_ids = self._repeat_ids(probe, len(head), len(ids))
        farthest = model.window - len(ids) - len(repeat_ids)
        away = sorted({0, *(256 * 4**i for i in range(20) if 512 * 4**i <= farthest), max(0, farthest)})
        scores = [self.score_chunk(_seen_from(probe, far), repeat_ids, len(head), len(head), len(ids), far=far).cpu() for far in away]
        return Fading.of([len(repeat_ids) + far for far in away], scores)

    def score_chunk(
        self, prefilled: Prefilled, repeat_ids: Sequence[int], head: int, start: int, end: int, *, lead: int = 0, far: int = 0
    ) -> Tensor:
        """Scores ``[L, H, end - start]`` fp32 of one chunk from one forward of ``repeat_ids``, ``far`` tokens behind the prefix.

        The probabilities are normalised over the first ``head`` pairs, the chunk's, and the repeat's own so far.

        Args:
            lead: so many of the repeated ids stand before the chunk's. What is kept of them is beside the chunk.
        """
        call = _RepeatCall(prefilled, self, head, start, end, len(repeat_ids) - (end - start), lead)
        deque(prefilled.model.fill(repeat_ids, prefilled.position + far, call, call), maxlen=0)
        return call.scores()


def _seen_from(prefilled: Prefilled, far: int) -> Prefilled:
    """What the first token so far behind a prefix sees of it: of a layer with a window less and less."""
    windows = prefilled.model.windows
    left = [len(prefilled.token_ids) if window is None else window.left(len(prefilled.token_ids), far) for window in windows]
    seen = []
    for n, (keys, values) in zip(left, prefilled.dense, strict=True):
        last = slice(max(0, keys.shape[1] - n), None)
        seen.append((keys[:, last], values[:, last]) if values is not keys else (keys[:, last],) * 2)
    return replace(prefilled, dense=seen)


class _RepeatCall(CallCache):
    """Cache and attention of one repeat, fed in pieces: reads the dense cache, adds nothing to it, collects scores."""

    def __init__(self, prefilled: Prefilled, scorer: KVzipScorer, head: int, start: int, end: int, opening: int, lead: int) -> None:
        super().__init__([prefilled.states], prefilled.model.layout.latent)
        self._opening, self._lead = opening, lead  # tokens before those of the chunk; how many of them are repeated, too
        self._prefilled, self._scorer = prefilled, scorer
        self._head, self._start, self._end = head, start, end
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # [H, T, D], the repeat's pairs so far
        self._scores: dict[int, Tensor] = {}  # [H, end - start] of each layer with full attention

    def scores(self) -> Tensor:
        """``[L, H, end - start]`` fp32."""
        scores = torch.stack([self._scores[layer] for layer in sorted(self._scores)])
        return scores.sqrt_() if self._scorer.aggregation == "sum_of_squares" else scores

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self._prefilled.token_ids)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        prefilled, layout = self._prefilled, self._prefilled.model.layout
        asks, layer, last = layer, layout.places[layer], layer == max(layout.places)
        window = layout.windows[layer]
        if asks == layout.owners[layer]:
            new = key[0], value[0]
            if layer in self._own:
                new = torch.cat([self._own[layer][0], new[0]], 1), torch.cat([self._own[layer][1], new[1]], 1)
            self._own[layer] = new
        own_keys, own_values = self._own[layer]
        row = partial(prefilled.row, layer, own_keys, own_values, query.shape[2], asks)
        if window is not None:
            if last:
                raise LastLayerSeen
            return BACKENDS["cpu"](query, [row()], softmax, window)
        if prefilled.rows is not None:
            grouped = query[0].unflatten(0, (len(own_keys), -1))
            first = own_keys.shape[1] - query.shape[2] - self._opening
            prefilled.rows.take(layer, self._start, self._end, grouped, softmax, first, self._lead, asks)
        beside = self._beside(layer, asks) if self._lead else ()
        before = 0 if beside else self._head
        head_keys, head_values = prefilled.pairs(layer, 0, before)
        chunk_keys, chunk_values = prefilled.pairs(layer, self._start, self._end)
        near_keys = torch.cat([head_keys, chunk_keys, own_keys], 1)
        scored = slice(before, before + self._end - self._start)
        scores = self._scores.setdefault(layer, near_keys.new_zeros(len(near_keys), self._end - self._start, dtype=torch.float32))
        local = self._scorer.repeat == "local" and not last
        # where nobody wants what attention gives, any values do that are as wide as those beside them
        near_values = torch.cat([head_values, chunk_values, own_values], 1) if local or beside else near_keys
        out = self._attend(query[0], near_keys, near_values, softmax, scored, scores, beside)[None]
        if last:
            raise LastLayerSeen
        if local:
            return out
        return BACKENDS["cpu"](query, [row()], softmax, None)

    def _beside(self, layer: int, asks: int) -> list[tuple[RaggedLayer, Turn | None]]:
        """The protected head, and what is kept of the tokens before the chunk that are repeated, with the turns of queries for them."""
        nearest, found = self._start - self._lead, []
        for part, shift, by in self._prefilled.seen(layer):
            where = part.positions + shift
            beside = part.among((where < self._head) | (where >= nearest))
            if any(beside.lengths):
                found.append((beside, self._prefilled.turn(asks, by)))
        return found

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        softmax: Softmax,
        scored: slice,
        scores: Tensor,
        beside: Sequence[tuple[RaggedLayer, Turn | None]],
    ) -> Tensor:
        """Causal attention ``[T, H * G, D]`` of ``query [H * G, T, D]`` over ``keys [H, C + T, D]``, T of them its own, and others beside.

        The probabilities of the columns ``scored``, which all rows see, are added to ``scores [H, columns]``.
        """
        n_heads, n_rows = len(keys), query.shape[1]
        grouped = query.reshape(n_heads, -1, query.shape[2])  # [H, G * T, D]
        out, lse = causal(grouped, keys, values, n_rows, softmax)
        for part, turn in beside:
            out, lse = with_context(out, lse, turned(grouped, turn), part, softmax)
        out, lse = beside_sinks(out, lse, softmax.sinks_of(n_heads, n_rows))
        self._aggregate(scores, grouped * softmax.scaling, keys[:, scored].mT, lse.unsqueeze(-1), softmax)
        return out.to(query.dtype).unflatten(1, (-1, n_rows)).flatten(0, 1).transpose(0, 1)

    def _aggregate(self, scores: Tensor, query: Tensor, keys: Tensor, lse: Tensor, softmax: Softmax) -> None:
        """Add the probabilities ``exp(query [H, R, D] @ keys [H, D, C] - lse [H, R, 1])`` to the scores ``[H, C]``, in blocks of rows.

        The logits are capped as the layer caps its own."""
        squares = self._scorer.aggregation == "sum_of_squares"
        if squares:  # the square of exp(x) is exp(2 x)
            query, lse = 2 * query, 2 * lse
            softmax = softmax._replace(cap=softmax.cap and 2 * softmax.cap)
        for block, block_lse in zip(*(x.split(max(1, BLOCK_ELEMENTS // scores.numel()), 1) for x in (query, lse)), strict=True):
            logits = softmax.capped(torch.bmm(block, keys).float()).sub_(block_lse)
            if squares:
                scores += logits.exp_().sum(1)
            else:
                torch.maximum(scores, logits.amax(1).exp_(), out=scores)
