"""Building: prompt and parent become a compressed context, and what it is the context of becomes its key."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from kvzip_memory.chain import Step
from kvzip_memory.compression import DensePairs, Prefilled, Progress, Stages, compress, prefill, read_behind
from kvzip_memory.compression.fading import Fading
from kvzip_memory.context import (
    NO_STATES,
    CompressedContext,
    Layers,
    Lease,
    Part,
    RaggedLayer,
    Receipt,
    Resident,
    States,
    as_told,
    parts_of,
)
from kvzip_memory.errors import IdentityMismatchError, InputError
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.inference.weights import Stamp
from kvzip_memory.joining import Join, Joinable, joined, without_preamble
from kvzip_memory.model_identity import ModelIdentity
from kvzip_memory.progress import Bar, Tally
from kvzip_memory.prompting.language import Language
from kvzip_memory.prompting.prompt import Prompt
from kvzip_memory.registry import Report
from kvzip_memory.registry.identity import are_codes, model_fields, recipe_digest, tokens_digest, with_parts
from kvzip_memory.sizes import Sizes
from kvzip_memory.system.digests import digest, same
from kvzip_memory.system.modes import plain

_MAX_FADINGS = 64  # a few numbers each
_STAGES = ("scorer", "allocator", "refit", "codec")


def context_identity(
    model: Mapping[str, Any],
    prompt: Prompt,
    ratio: float,
    stages: Stages,
    tenant: str | None = None,
    parent: CompressedContext | None = None,
    compress_every: int | None = None,
    share: bool = False,
    joinable: Joinable | None = None,
) -> dict[str, Any]:
    """All fields that determine a context's bytes, what may follow it, and who may use it.

    Args:
        model: the model's fields.
        tenant: a digest, see :func:`tenant_digest`.
        compress_every: size of the pieces it is built in, None if in one.
        parent: the context it was grown from. If that has scores, this one has them at any ratio.
        share: whether the parent's pairs stay as they are, and where they are; then its scores are none of this one's.
        joinable: what it shares in place of the parent, behind which it is only read.
    """
    scored = ratio < 1.0 or (parent is not None and not share and parent.identity.get("scorer") is not None)
    way = stages.at(ratio).identity(scored)
    parts = _parts(parent, share) if joinable is None else (joinable.head,)
    above, of = (None, None) if parent is None else (parent.key, parent.identity["format"])
    return {
        **model,
        **with_parts(model["format"], parts, stages.codec.in_codes() or (bool(parts) and are_codes(of))),
        "text": prompt.text_digest,
        "system": prompt.system_digest,
        "keep": digest(prompt.keep) if prompt.keep and scored else None,
        "ratio": ratio,
        **way,
        "compress_every": compress_every,
        "tenant": tenant,
        "tokens": tokens_digest(prompt.token_ids),
        "protected": prompt.protected,
        "recipe": recipe_digest(prompt.recipe),
        "tools": prompt.recipe.tools,
        "parent": above if joinable is None else joinable.front,
        **({} if joinable is None else {"shift": -joinable.dropped}),
    }


def _parts(parent: CompressedContext | None, share: bool) -> tuple[Part, ...]:
    """What a context shares: what its parent does, and the parent itself."""
    if parent is None:
        return ()
    return parent.all_parts if share else parent.parts


class Computed(NamedTuple):
    """Pairs that are there already, such as those of a session's turns.

    Attributes:
        pairs: of all tokens behind the parent. Building empties it.
        since: stamp of the model from when it was known to be the one they are of.
    """

    pairs: DensePairs
    since: Stamp


@dataclass(frozen=True)
class _Beginning:
    """As much of a context as is compressed already.

    Attributes:
        n_tokens: its tokens.
        layers: their pairs but for those that are shared, none of no tokens. Compressing what follows empties it, so that layers that
            nobody else has are freed on the way.
        dense_nbytes: storage of all its pairs before eviction.
        fitted: spans of positions whose pairs were refitted.
        ms: milliseconds of each stage, over all pieces.
        fading: the curve that was used, under its name.
        states: what layers without attention remember at its end.
        before: layers of the parts that are shared.
        shared: tokens that these stand for.
        shifts: how far each of these, and the layers, have moved; empty if nothing has.
        nearer: how much nearer to what follows each is seen than it stands then; empty if none is.
    """

    n_tokens: int = 0
    layers: list[RaggedLayer] = field(default_factory=list)
    dense_nbytes: int = 0
    fitted: tuple[tuple[int, int], ...] = ()
    ms: dict[str, float] = field(default_factory=dict)
    fading: dict[str, Fading] = field(default_factory=dict)
    states: States = field(default_factory=dict)
    before: tuple[Layers, ...] = ()
    shared: int = 0
    shifts: tuple[int, ...] = ()
    nearer: tuple[int, ...] = ()

    @classmethod
    def of(cls, lease: Lease, parent: CompressedContext, share: bool) -> _Beginning:
        """A whole context, of which nothing is the next one's own if that is to share it, but what a window shows."""
        if share:
            layers = [layer.none() if layer.window is None else layer for layer in lease.layers]
            n, states, before = parent.n_tokens, lease.states, lease.parts
            shifts, nearer = (*lease.shifts, 0) if lease.shifts else (), lease.nearer + lease.nearer[:1]  # read where that much is saved
            return cls(n, layers, states=states, before=before, shared=n, shifts=shifts, nearer=nearer)
        return cls(
            parent.n_tokens,
            list(lease.layers),
            parent.dense_nbytes,
            parent.fitted,
            states=lease.states,
            before=lease.before,
            shared=parent.shared_tokens,
            shifts=lease.shifts,
            nearer=lease.nearer,
        )


class Builder:
    """Builds contexts of one model, one way.

    Args:
        model: computes them.
        identity: tells which model that is.
        stages: how pairs are ranked, chosen and refitted.
        compress_every: compress after so many tokens, before more are read; None reads everything first.
        progress: whether bars are shown, see :class:`~kvzip_memory.progress.Bar`.
        tenant: digest of whose contexts they are, None of nobody's.

    Raises:
        InputError: see :meth:`check_every`.
    """

    def __init__(
        self,
        model: LanguageModel,
        identity: ModelIdentity,
        stages: Stages,
        compress_every: int | None = None,
        progress: bool | None = None,
        tenant: str | None = None,
    ) -> None:
        self.check_every(compress_every)
        self._model, self._identity, self._tenant = model, identity, tenant
        self._stages, self._compress_every, self._progress = stages, compress_every, progress
        self._fadings: dict[str, Fading] = {}  # of weights that were proven

    @staticmethod
    def check_every(compress_every: int | None) -> None:
        """Raises:
        InputError: pieces too small to rank pairs in.
        """
        if compress_every is not None and compress_every < 64:
            raise InputError(f"compress_every is {compress_every} tokens; pairs cannot be ranked among fewer than 64")

    @property
    def scorer(self) -> dict[str, Any]:
        """How pairs are ranked, as it is in keys."""
        scorer: dict[str, Any] = self._stages.identity()["scorer"]
        return scorer

    def is_way_of(self, identity: Mapping[str, Any]) -> bool:
        """Whether the pairs of a context were ranked, chosen and refitted in the same way, if they were at all, and written so."""
        return not self._other_stages(identity)

    def _other_stages(self, identity: Mapping[str, Any]) -> tuple[str, ...]:
        """The stages by whose methods, as they are now, pairs of a context would be ranked, chosen, refitted or written otherwise."""
        scored = identity.get("scorer") is not None
        way, stages = self._stages.at(identity["ratio"]).identity(scored), _STAGES if scored else _STAGES[-1:]
        return tuple(stage for stage in stages if not same(identity.get(stage), way.get(stage)))

    def identity(
        self,
        language: Language,
        prompt: Prompt,
        ratio: float,
        parent: CompressedContext | None = None,
        *,
        computed: bool = False,
        share: bool = False,
        joinable: Joinable | None = None,
    ) -> dict[str, Any]:
        """What the context of a prompt is the context of; all of its pairs are read in one piece if they are ``computed``. It may ``share``
        those of its parent, or be made to be joined.
        """
        behind = max(prompt.protected, parent.n_tokens if parent else 0)
        whole = computed or ratio == 1.0 or len(prompt.token_ids) - behind <= (self._compress_every or math.inf)
        return context_identity(
            self._identity.of(language),
            prompt,
            ratio,
            self._stages,
            self._tenant,
            parent,
            None if whole else self._compress_every,
            share,
            joinable,
        )

    @property
    def sizes(self) -> Sizes:
        """Of its contexts."""
        return Sizes(self._model, self._stages.codec)

    def bar(self, name: str | None) -> Bar:
        """For the progress of a context of this name, from now on until it is there."""
        return Bar(name or "context", self._progress)

    def build(
        self, language: Language, step: Step, given: tuple[CompressedContext, ...], report: Report, computed: Computed | None = None
    ) -> CompressedContext:
        """A context of the weights that its key names and of no others: all of them are read once it is built, and nobody has written to
        them meanwhile, or since the stamp of the model that ``computed`` pairs are of.

        Raises:
            IdentityMismatchError: they are others, or were for a while; or so is a method.
            ModelError: the model gave scores that are not finite, or a method something else than it owes.
        """
        wanted, since = step.wanted, computed.since if computed else self._identity.stamp()
        where = f"context {wanted.key[:12]!r}"
        self._identity.check(wanted.identity, language, where)  # a handle may outlive the weights
        self._check_way(wanted.identity, where)
        context, ms, fading = self._built(language, step, given, report, computed)
        self._check_way(wanted.identity, where)
        began = time.perf_counter()
        self._identity.prove(wanted.identity, language, where, since)
        ms["verify"] = 1e3 * (time.perf_counter() - began)
        self._fadings.update(fading)
        for oldest in list(self._fadings)[:-_MAX_FADINGS]:
            self._fadings.pop(oldest, None)
        return replace(context, receipt=Receipt(wanted.key, hit=False, tier="built", ms=ms))

    def _check_way(self, identity: Mapping[str, Any], where: str) -> None:
        """Raises:
        IdentityMismatchError: a method says now that it is another one.
        """
        if fields := self._other_stages(identity):
            raise IdentityMismatchError(
                f"{' and '.join(fields)} of {where} say that they are others than when it was loaded, and nothing is stored. Load it "
                "again, and change no method meanwhile",
                fields=fields,
            )

    @plain()
    def _built(
        self, language: Language, step: Step, given: tuple[CompressedContext, ...], report: Report, computed: Computed | None
    ) -> tuple[CompressedContext, dict[str, float], dict[str, Fading]]:
        wanted, recipe, parent = step.wanted, step.recipe, given[0] if step.parent else None
        assert step.ids is not None
        assert recipe is not None
        token_ids = step.ids if parent is None else torch.cat([parent.token_ids, step.ids])
        ids, scored = tuple(token_ids.tolist()), wanted.identity["scorer"] is not None
        if (dropped := -wanted.identity.get("shift", 0)) > 0:  # tokens of a preamble, behind the head
            self.check_movable()
        known = parent.n_tokens if parent else 0
        share = parent is not None and (dropped > 0 or len(parts_of(wanted.identity)) > len(parent.parts))
        first = known if parent and (share or parent.identity.get("scorer")) else step.protected
        total = len(ids) - known + (self._stages.cost(len(ids) - first) if scored else 0)
        with self._model.building(), self.bar(wanted.name) as bar, parent.lease() if parent else nullcontext() as lease:
            progress = Tally(total, bar.show, report)
            beginning = _Beginning.of(self._model.checked(lease), parent, share) if parent and lease else _Beginning()
            for end in _ends(max(known, step.protected), len(ids), wanted.identity["compress_every"]):
                beginning = self._grown(beginning, ids[:end], language, step, progress, computed, dropped)
        if dropped:
            token_ids = torch.cat([token_ids[: step.protected], token_ids[known:]])
            layers = without_preamble(self._model, given[1].layers, beginning.layers, known, dropped, len(token_ids), self._stages.codec)
            fitted = tuple((start - dropped, end - dropped) for start, end in beginning.fitted)
            beginning = replace(beginning, layers=layers, fitted=fitted)
        ratio, above = wanted.identity["ratio"], given[1:] if dropped else given  # it is as old as what it shares
        context = CompressedContext(
            key=wanted.key,
            identity=wanted.identity,
            token_ids=token_ids,
            storage=Resident(tuple(beginning.layers), states=beginning.states),
            protected=step.protected,
            ratio=ratio,
            dense_nbytes=beginning.dense_nbytes,
            recipe=recipe,
            sources=(*(as_told(parent.sources) if parent else ()), *step.sources),
            created=min((context.created for context in above), default=0.0),
            expires=min((context.expires for context in above if context.expires is not None), default=None),
            coarsest=min([ratio, *(context.coarsest for context in given)]) if parent else ratio,
            fitted=beginning.fitted,
        )
        return context, beginning.ms, beginning.fading

    def check_movable(self) -> None:
        """Raises:
        UnsupportedModelError: parts of the model's contexts cannot be moved.
        """
        self._model.rotations.measure()

    def _read(self, beginning: _Beginning, ids: Sequence[int], progress: Progress) -> tuple[DensePairs, States]:
        """The pairs of ids behind a beginning, and the states behind them."""
        layers, tail = tuple(beginning.layers), Tail(len(ids))
        row = Row(layers, beginning.n_tokens, tail, beginning.states, beginning.before, beginning.shifts, beginning.nearer)
        if row.moved:
            self.check_movable()
        return read_behind(self._model, row, ids, progress)

    def joined_identity(self, language: Language, prompt: Prompt, contexts: Sequence[CompressedContext], join: Join) -> dict[str, Any]:
        """What contexts are the context of when they are joined."""
        texts = digest(["joined", [context.identity["text"] for context in contexts]])
        whole = context_identity(self._identity.of(language), replace(prompt, text_digest=texts), 1.0, self._stages, self._tenant)
        again = {"again": [[*span] for span in join.again]} if join.again else {}
        parts = with_parts(whole["format"], join.parts, any(are_codes(context.identity["format"]) for context in contexts))
        return {**whole, "ratio": min(context.ratio for context in contexts), **parts, **again}

    def join(self, language: Language, step: Step, contexts: tuple[CompressedContext, ...], report: Report) -> CompressedContext:
        """See :func:`~kvzip_memory.joining.joined`; what is read is of the weights that the key names, as in :meth:`build`.

        Raises:
            IdentityMismatchError: they are others, or were for a while.
        """
        self.check_movable()
        wanted, since, where = step.wanted, self._identity.stamp(), f"context {step.wanted.key[:12]!r}"
        total = sum(end - start for start, end in wanted.identity.get("again", ()))
        if not total:
            return joined(self._model, step, contexts, self._stages.codec, lambda *_: None)
        self._identity.check(wanted.identity, language, where)
        with self._model.building(), self.bar(wanted.name) as bar:
            join = joined(self._model, step, contexts, self._stages.codec, Tally(total, bar.show, report))
        self._identity.prove(wanted.identity, language, where, since)
        return join

    def _grown(
        self,
        beginning: _Beginning,
        ids: tuple[int, ...],
        language: Language,
        step: Step,
        progress: Progress,
        computed: Computed | None,
        dropped: int = 0,
    ) -> _Beginning:
        """A beginning that goes on to the end of ``ids``: the piece between is read, unless it is computed, and all are compressed."""
        assert step.recipe is not None
        start, layers, n = beginning.n_tokens, beginning.layers, len(ids)
        began = time.perf_counter()
        states = NO_STATES
        if computed is not None:
            pairs = computed.pairs
            progress("prefill", n - start)
        elif layers:
            pairs, states = self._read(beginning, ids[start:], progress)
        else:
            pairs, states = prefill(self._model, ids, progress)
        read = time.perf_counter()
        piece = Prefilled(
            self._model,
            pairs,
            ids,
            step.protected,
            step.recipe.opening,
            step.recipe.closing,
            language.prompts.text_ids,
            tuple((first + dropped, min(last + dropped, n)) for first, last in step.keep if first + dropped < n),
            layers,
            start,
            states,
            before=beginning.before,
            shared=beginning.shared,
            shifts=beginning.shifts,
            nearer=beginning.nearer,
        )
        fading = beginning.fading or self._fading(piece, step.wanted.identity)
        measured = 1e3 * (time.perf_counter() - read)
        piece = replace(piece, fading=next(iter(fading.values()), None))
        compressed = compress(piece, step.wanted.identity["ratio"], self._stages, progress)
        took = {"prefill": 1e3 * (read - began), **compressed.ms, "score": measured + compressed.ms["score"]}
        ms = {stage: beginning.ms.get(stage, 0.0) + more for stage, more in took.items()}
        dense_nbytes, fitted = beginning.dense_nbytes + compressed.dense_nbytes, beginning.fitted + compressed.fitted
        return replace(
            beginning,
            n_tokens=n,
            layers=list(compressed.layers),
            dense_nbytes=dense_nbytes,
            fitted=fitted,
            ms=ms,
            fading=fading,
            states=states,
        )

    def _fading(self, piece: Prefilled, identity: Mapping[str, Any]) -> dict[str, Fading]:
        """How scores of the pairs that are there already fade, under the name of what that depends on; nothing if they do not."""
        if not piece.scored_parent:
            return {}
        told = [identity["scorer"], piece.opening, piece.closing, piece.token_ids[: piece.protected]]
        name = digest([*model_fields(identity).values(), *told])
        fading = self._fadings.get(name) or self._stages.fading(piece)
        return {} if fading is None else {name: fading}


def _ends(first: int, n: int, every: int | None) -> list[int]:
    """Ends of the equal pieces, of at most ``every`` tokens, in which ``[first, n)`` is read and compressed."""
    count = 1 if every is None else max(1, math.ceil((n - first) / every))
    return [first + round((i + 1) * (n - first) / count) for i in range(count)]
