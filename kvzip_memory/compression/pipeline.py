"""From dense pairs to those that are kept: score -> allocate -> refit -> encode -> evict, in that order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvzip_memory.compression.allocators import ALLOCATORS, Allocator
from kvzip_memory.compression.choosing import choose
from kvzip_memory.compression.codecs import CODECS, Codec
from kvzip_memory.compression.evict import gathered, return_freed_pages, visible
from kvzip_memory.compression.fading import Fading
from kvzip_memory.compression.methods import owed
from kvzip_memory.compression.prefill import Prefilled, Progress
from kvzip_memory.compression.refit import REFITS, LayerPairs, Refit
from kvzip_memory.compression.rows import Block, Rows
from kvzip_memory.compression.scorers import SCORERS, Scorer
from kvzip_memory.context import RaggedLayer, Window
from kvzip_memory.context.codes import decoded
from kvzip_memory.errors import InputError, ModelError
from kvzip_memory.system.printable import brief

#: Where most layers have a window, the smallest ratio at which "auto" refits: below, the few others keep so little that it did harm.
FITS_FROM = 0.4
#: Of the repeated tokens, each how many-th's queries a codec is told of where no refit wants any.
_EVERY = 8
_LAYERS_FREED = 4  # whose pages are returned together: what a refit works with would be fetched from the system anew for each


@dataclass(frozen=True)
class Stages:
    """A method for each stage.

    Attributes:
        fits_from: the smallest ratio at which pairs are refitted.
    """

    scorer: Scorer
    allocator: Allocator
    refit: Refit
    codec: Codec
    fits_from: float = 0.0

    @classmethod
    def of(
        cls,
        scorer: Scorer | str = "kvzip",
        allocator: Allocator | str = "global",
        refit: Refit | str = "auto",
        codec: Codec = CODECS["none"],
    ) -> Stages:
        """Methods given as themselves or by their names.

        Args:
            refit: ``"auto"`` is ``"ridge"`` where the scorer gives it queries to fit to, else ``"none"``.

        Raises:
            InputError: one is neither, or lacks something that it owes; or a refit that wants queries with a scorer that has none.
        """
        ranks = SCORERS.of(scorer)
        if (fading := getattr(ranks, "fading", None)) is not None and not callable(fading):
            raise InputError(f"the fading of scorer {brief(ranks.identity())} is {brief(fading)}; it is a method, or is not there")
        has_rows = getattr(ranks, "has_rows", False)
        fits = REFITS.of(("ridge" if has_rows else "none") if isinstance(refit, str) and refit == "auto" else refit)
        if type(fits.every) is not int or fits.every < 0:
            raise InputError(f"every of refit {brief(fits.identity())} is {brief(fits.every)}; it is a whole number, 0 for no queries")
        if fits.every and not has_rows:
            raise InputError(
                f"scorer {brief(ranks.identity())} has no queries that refit {brief(fits.identity())} could fit to; use refit='none', or "
                "another scorer"
            )
        return cls(ranks, ALLOCATORS.of(allocator), fits, codec)

    def for_layers(self, windows: Sequence[Window | None], latent: bool, refit: Refit | str) -> Stages:
        """The same for the layers of a model.

        Args:
            windows: what each of them sees.
            latent: whether keys are their own values: what fits the one would change the other.
            refit: as it was given; ``"auto"`` is ``"none"`` for latents, and below :data:`FITS_FROM` where most layers have a window.

        Raises:
            InputError: it is another refit, and the model caches latents.
        """
        if not latent:
            few = refit == "auto" and 2 * sum(window is None for window in windows) < len(windows)
            return replace(self, fits_from=FITS_FROM) if few else self
        if refit != "auto" and self.refit.every:
            raise InputError(
                f"refit {brief(self.refit.identity())} fits keys and values, and this model caches latents, which are both; "
                "use refit='none'"
            )
        return replace(self, refit=REFITS.of("none"))

    def at(self, ratio: float) -> Stages:
        """The methods of a ratio."""
        return self if ratio >= self.fits_from else replace(self, refit=REFITS.of("none"), fits_from=0.0)

    @property
    def asks(self) -> bool:
        """Whether the codec wants to know what is asked of keys, and the scorer can tell it."""
        return self.codec.asks() and getattr(self.scorer, "has_rows", False)

    def identity(self, scored: bool = True) -> dict[str, Any]:
        """Its part of a context's key, as the methods say it now. Pairs as the model computed them are not mentioned, as they were not when
        there were no others.

        Args:
            scored: whether its pairs are.

        Raises:
            InputError: a method says something else than a key can hold.
        """
        codec = self.codec.identity()
        told: dict[str, Any] = {} if codec is None else {"codec": codec}
        if not scored:
            return {"scorer": None, "allocator": None, **told}
        if (refit := REFITS.identity(self.refit)) is not None:
            told["refit"] = refit
        return {"scorer": SCORERS.identity(self.scorer), "allocator": ALLOCATORS.identity(self.allocator), **told}

    def cost(self, n_tokens: int) -> int:
        """Tokens that the scorer will report for a prefix of ``n_tokens``.

        Raises:
            ModelError: it gave something else.
        """
        cost = self.scorer.cost(n_tokens)
        if type(cost) is not int or cost < 0:
            raise ModelError(f"scorer {brief(self.scorer.identity())} gave its cost as {brief(cost)}, not as a number of tokens")
        return cost

    def fading(self, prefilled: Prefilled) -> Fading | None:
        """How scores of the scorer fade, measured; None if they do not.

        Raises:
            ModelError: it gave something else.
        """
        measure = getattr(self.scorer, "fading", None)
        if measure is None:
            return None
        fading = measure(prefilled)
        if not isinstance(fading, Fading):
            raise ModelError(f"scorer {brief(self.scorer.identity())} gave its fading as {brief(fading)}, not as a Fading")
        return fading


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` gives.

    Attributes:
        layers: the kept pairs.
        dense_nbytes: storage of the dense pairs before eviction, without a parent's.
        fitted: the span of positions whose kept pairs were refitted, none or one.
        ms: milliseconds of ``score`` (0 where nothing is scored), ``refit`` and ``evict``.
    """

    layers: tuple[RaggedLayer, ...]
    dense_nbytes: int
    fitted: tuple[tuple[int, int], ...]
    ms: dict[str, float]


def compress(prefilled: Prefilled, ratio: float, stages: Stages, progress: Progress) -> Compressed:
    """Keep the protected head and the most important ``round(ratio * L * H * (n - protected))`` other pairs, and free the rest. Empties
    ``prefilled.dense``. What is shared is no part of that: neither of the pairs nor of ``n``.

    Pairs of a parent compete with their stored scores, which fade; what it has evicted stays evicted, and the others stay as they are.
    At ratio 1.0 everything is kept and nothing is scored, unless the parent has scores.

    Raises:
        ModelError: the model gave scores that are not finite, or a method something else than it owes.
    """
    stages = stages.at(ratio)
    dense_nbytes = sum(_nbytes(prefilled, *pairs, window) for pairs, window in zip(prefilled.dense, prefilled.model.windows, strict=True))
    began = time.perf_counter()
    rows = Rows(stages.refit.every or _EVERY) if stages.refit.every or stages.asks else None
    scores, keep = _chosen(replace(prefilled, rows=rows), ratio, stages, progress)
    scored = time.perf_counter()
    layers, refitted, fitted = [], 0.0, False
    for number, window in enumerate(prefilled.model.windows):
        if window is not None:
            layers.append(visible(prefilled, number, window, stages.codec))
        else:
            full = prefilled.full_layers.index(number)
            fitting = time.perf_counter()
            blocks = rows.pop(number) if rows else []
            asked = _asked(blocks) if stages.asks else None
            fit = partial(_fitted, prefilled, number, keep[full], blocks, stages, ratio, asked)
            pairs = prefilled.model.compute(fit) if stages.refit.every else None
            refitted += time.perf_counter() - fitting
            fitted |= pairs is not None
            layers.append(gathered(prefilled, number, keep[full], None if scores is None else scores[full], pairs, stages.codec, asked))
        prefilled.free(number)
        if number % _LAYERS_FREED == 0:
            return_freed_pages()
    return_freed_pages()
    prefilled.dense.clear()
    prefilled.parent.clear()
    ms = {"score": 1e3 * (scored - began), "refit": 1e3 * refitted, "evict": 1e3 * (time.perf_counter() - scored - refitted)}
    spans = ((prefilled.first, len(prefilled.token_ids)),) if fitted else ()
    return Compressed(tuple(layers), dense_nbytes, spans, ms)


def _chosen(prefilled: Prefilled, ratio: float, stages: Stages, progress: Progress) -> tuple[Tensor | None, Tensor]:
    """Scores ``[L, H, n]`` fp16, None where nothing is scored, and which pairs are kept, ``[L, H, n]`` bool, none that is shared."""
    full, n, shared = prefilled.full_layers, len(prefilled.token_ids), prefilled.shared
    shape = len(full), prefilled.dense[full[0]][0].shape[0], n
    if ratio == 1.0 and not prefilled.scored_parent:
        return None, (torch.arange(n) >= shared).expand(shape)
    # Rounded before they are compared: dropping more pairs of a stored context later keeps the same ones as
    # building at that ratio would.
    scores = owed(stages.scorer, "scores", stages.scorer.score(prefilled, progress), shape, torch.float32).half()
    if not bool(scores.isfinite().all()):
        raise ModelError(
            "the model's attention gave scores that are not finite (usually float16 overflow); load the model in bfloat16 or float32"
        )
    if prefilled.scored_parent:
        stored = torch.stack([prefilled.parent[i].dense_scores(prefilled.start) for i in full])
        fading = 1.0 if prefilled.fading is None else prefilled.fading.between(prefilled.start, n)
        scores[:, :, : prefilled.start] = torch.where(stored.isfinite(), (stored * fading).clamp(max=torch.finfo(stored.dtype).max), stored)
    scores[:, :, prefilled.pinned] = float("inf")
    own = choose(stages.allocator, scores[:, :, shared:], ratio, max(0, prefilled.protected - shared))
    return scores, pad(own, (shared, 0)) & ~scores.isneginf()


def _asked(blocks: Sequence[Block]) -> Tensor | None:
    """``[H, D, D]``, the mean outer product of queries; None without any."""
    if not blocks:
        return None
    queries = torch.cat([block.queries for block in blocks], 1).float()
    return queries.mT @ queries / queries.shape[1]


def _fitted(
    prefilled: Prefilled, layer: int, keep: Tensor, blocks: list[Block], stages: Stages, ratio: float, asked: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Keys and values ``[H, n - first, D]`` of a layer's new pairs, fitted; None: as they are.

    Raises:
        ModelError: the refit gave something else, or numbers that are not finite.
    """
    first, n = prefilled.first, len(prefilled.token_ids)
    if not blocks or bool(keep[:, first:].all()):
        return None
    keys, values = prefilled.pairs(layer, first, n)
    on = keys.device

    def stored(own: Tensor) -> Tensor:
        return decoded(stages.codec.keys(own, asked), own.dtype)

    keep, pinned = keep[:, first:].to(on), prefilled.pinned[first:].to(on)
    head_keys, head_values = prefilled.pairs(layer, 0, prefilled.protected)
    given = LayerPairs(  # all its own: whatever it does to them, what is not fitted stays as it is
        (head_keys.clone(), head_values.clone()),
        first,
        stored(keys).clone(),
        values.clone(),
        keep.clone(),
        pinned.clone(),
        blocks,
        ratio,
        stored,
    )
    fitted = stages.refit.fit(given)
    if not isinstance(fitted, tuple) or len(fitted) != 2:
        raise ModelError(f"refit {brief(stages.refit.identity())} gave {brief(fitted)}, not keys and values")
    for what, new, old in zip(("keys", "values"), fitted, (keys, values), strict=True):
        if not bool(owed(stages.refit, what, new, old.shape, old.dtype)[keep & ~pinned].isfinite().all()):
            raise ModelError(f"refit {brief(stages.refit.identity())} gave {what} that are not finite; use another one, or refit='none'")
    return fitted


def _nbytes(prefilled: Prefilled, keys: Tensor, values: Tensor, window: Window | None) -> int:
    """Bytes that a layer's dense cache of all tokens has more than that of the parent's."""
    start, n = prefilled.start, len(prefilled.token_ids)
    tokens = n - start if window is None else window.left(n) - window.left(start)
    return tokens * (keys.nbytes + (0 if values is keys else values.nbytes)) // keys.shape[1]
