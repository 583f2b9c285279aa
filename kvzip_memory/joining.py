"""Contexts as parts of one: read behind a preamble that is dropped, and put together without reading anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvzip_memory.chain import Step
from kvzip_memory.compression.codecs import Codec
from kvzip_memory.compression.evict import in_one
from kvzip_memory.compression.moving import Piece, joined_window
from kvzip_memory.compression.prefill import Progress, read_behind
from kvzip_memory.context import (
    CompressedContext,
    Layers,
    Lease,
    Part,
    RaggedLayer,
    Receipt,
    Resident,
    Source,
    as_told,
    parts_of,
    seen_from,
)
from kvzip_memory.context.codes import Vectors, each
from kvzip_memory.errors import InputError
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.registry.identity import recipe_digest
from kvzip_memory.system.printable import brief

#: Where joined contexts stand: one behind another; or in half of the window, or as many positions, which they share if they have more
#: tokens than that.
Positions = Literal["sequential", "shared"] | int


class Joinable(NamedTuple):
    """What a context is read behind that is to be joined to others, see :mod:`~kvzip_memory.prompting.preamble`.

    Attributes:
        head: the template's head alone, which it shares.
        front: key of the head and the preamble, which it is read behind. Of that nothing but the head is ever seen again.
        dropped: tokens of the preamble.
    """

    head: Part
    front: str
    dropped: int


class Front(NamedTuple):
    """The same, to be made.

    Attributes:
        head: step of the context of the template's head, which it shares.
        step: of that of the head and the preamble.
        joinable: what its key says of them.
    """

    head: Step
    step: Step
    joinable: Joinable


class Join(NamedTuple):
    """Contexts that stand one behind another.

    Attributes:
        token_ids: ``[n]`` int32, of all of them, the template's head once.
        parts: what is seen, in its order.
        sources: their documents, as those say it who loaded them.
        told: the same as the texts tell it.
        shifts: how far each context has moved.
        again: spans of tokens that are read again where they stand, one of each later context at most.
    """

    token_ids: Tensor
    parts: tuple[Part, ...]
    sources: tuple[Source, ...]
    told: tuple[Source, ...]
    shifts: tuple[int, ...]
    again: tuple[tuple[int, int], ...] = ()

    @property
    def read(self) -> int:
        """How many tokens are read again."""
        return sum(end - start for start, end in self.again)

    @property
    def saved(self) -> int:
        """Tokens that take no positions for themselves."""
        return self.parts[0].nearer

    @classmethod
    def of(cls, contexts: Sequence[CompressedContext], window: int, repair: int, positions: Positions) -> Join:
        """Of two contexts or more, in a model's window, of which the first ``repair`` tokens of each later one are read again.

        Raises:
            InputError: fewer; or they are not of documents behind one template head; or no number of tokens or positions, or too few.
        """
        if isinstance(repair, bool) or not isinstance(repair, int) or repair < 0:
            raise InputError(f"repair is {brief(repair)}; it is a whole number of tokens, 0 for none")
        if len(contexts) < 2:
            raise InputError(f"{len(contexts)} contexts to join; give at least two")
        first, *others = contexts
        for context in contexts:
            _check_same_head(first, context)
        nearest, *nearer = _nearer(contexts, _room(contexts, window, positions))
        if repair and (nearest or any(context.saved for context in contexts)):
            raise InputError(f"repair={repair} reads tokens where they stand, and these contexts share positions; join them without")
        ids, shifts = [first.token_ids], [0]
        parts = [part.moved(0, nearest) for part in first.all_parts] if nearest else [*first.all_parts]
        sources, told, again = [*first.sources], [*as_told(first.sources)], list[tuple[int, int]]()
        for context, near in zip(others, nearer, strict=True):
            head = context.protected
            shift = sum(map(len, ids)) - head
            beginning, *rest = context.all_parts
            if beginning.n_tokens > head:  # else it is the head alone
                rest.insert(0, beginning._replace(n_tokens=beginning.n_tokens - head, first=head))
            if rest and (count := min(repair, rest[0].n_tokens)):
                left = rest[0].n_tokens - count
                rest[:1] = [rest[0]._replace(n_tokens=left, first=head + count - rest[0].shift)] if left else []
                again.append((shift + head, shift + head + count))
            parts += [part.moved(shift, near) for part in rest]
            for found, of in ((sources, context.sources), (told, as_told(context.sources))):
                for number, source in enumerate(of, 1):
                    unnamed = not source.shown and source.name == f"document {number}"
                    name = f"document {len(found) + 1}" if unnamed else source.name
                    found.append(replace(source, name=name, start=source.start + shift, end=source.end + shift))
            ids.append(context.token_ids[head:])
            shifts.append(shift)
        return cls(torch.cat(ids), tuple(parts), tuple(sources), as_told(told), tuple(shifts), tuple(again))


def _room(contexts: Sequence[CompressedContext], window: int, positions: Positions) -> int | None:
    """How many positions contexts may take together; None for all that they would.

    Raises:
        InputError: nobody can tell, or fewer than one of them takes.
    """
    if positions == "sequential":
        return None
    longest = max(context.positions for context in contexts)
    if positions == "shared":
        return max(window // 2, longest)
    if isinstance(positions, bool) or not isinstance(positions, int):
        raise InputError(f'positions is {brief(positions)}; it is "sequential", "shared" or a number of positions')
    if positions < longest:
        raise InputError(f"positions is {positions:,}, and the longest of the contexts takes {longest:,}; give at least as many")
    return positions


def _nearer(contexts: Sequence[CompressedContext], positions: int | None) -> list[int]:
    """How much nearer to what follows each context is seen than its tokens stand: not at all where they may take as many positions as
    they have tokens. Where they may not, the first begins where it does, the last ends where the positions do, and the others stand
    between them as their beginnings do among all tokens; so they overlap evenly.
    """
    head = contexts[0].protected
    own = [context.n_tokens - context.protected for context in contexts]
    spans = [tokens - context.saved for tokens, context in zip(own, contexts, strict=True)]
    starts = [*accumulate(spans[:-1], initial=0)]
    room = sum(spans)
    if positions is not None and positions < head + room:
        room = positions - head
        starts = [min(round(start * (room - spans[-1]) / starts[-1]), room - span) for start, span in zip(starts, spans, strict=True)]
    behind = [sum(own[place:]) for place in range(1, len(own) + 1)]
    return [tokens - (room - start - span) for tokens, start, span in zip(behind, starts, spans, strict=True)]


def _check_same_head(first: CompressedContext, other: CompressedContext) -> None:
    """Raises:
    InputError: they begin otherwise, or go on otherwise, so that no prompt is of both.
    """
    head = min(first.protected, other.protected)  # a tokenizer may put the last character of one to what follows
    begins = first.token_ids[:head].tolist() == other.token_ids[:head].tolist() and abs(first.protected - other.protected) <= 1
    goes_on = [recipe_digest(replace(context.recipe, tail="")) for context in (first, other)]
    for context in (first, other):
        if not context.sources or context.sources[-1].end != context.n_tokens:
            raise InputError(f"{context!r} is of a conversation; documents are joined, and a conversation goes on behind them")
    if not begins or goes_on[0] != goes_on[1]:
        raise InputError(f"{other!r} has another system prompt, tools or template variables than {first!r}; such contexts cannot be joined")


def joined(
    model: LanguageModel, step: Step, contexts: tuple[CompressedContext, ...], codec: Codec, progress: Progress
) -> CompressedContext:
    """Contexts whose pairs are on the device as one: it has nothing of its own but what windows show at its end, and the tokens that it
    reads again, whose pairs a codec writes."""
    assert step.ids is not None
    assert step.recipe is not None
    again, saved = dict(step.wanted.identity.get("again", ())), parts_of(step.wanted.identity)[0].nearer
    ids, reading = step.ids.tolist(), _Joining(model, saved, codec)
    with ExitStack() as leases:
        for context in contexts:
            reading.add(context, leases.enter_context(context.lease()), again, ids, progress)
        layers = reading.own()
    return CompressedContext(
        key=step.wanted.key,
        identity=step.wanted.identity,
        token_ids=step.ids,
        storage=Resident(layers),
        protected=step.protected,
        ratio=step.wanted.identity["ratio"],
        dense_nbytes=0,
        recipe=step.recipe,
        sources=step.sources,
        created=min(context.created for context in contexts),
        expires=min((context.expires for context in contexts if context.expires is not None), default=None),
        coarsest=min(context.coarsest for context in contexts),
        receipt=Receipt(step.wanted.key, hit=False, tier="built"),
    )


class _Joining:
    """A join as far as its contexts have been added; ``saved`` of all its tokens take no positions for themselves."""

    def __init__(self, model: LanguageModel, saved: int, codec: Codec) -> None:
        self._model, self._n, self._saved, self._codec = model, 0, saved, codec
        self._parts, self._shifts = list[Layers](), list[int]()
        self._windows: list[list[Piece]] = [[] for _ in model.windows]
        self._like: Layers = ()
        self._read: list[Layers] = []

    def add(self, context: CompressedContext, lease: Lease, again: Mapping[int, int], ids: Sequence[int], progress: Progress) -> None:
        """One more context behind the others, of whose tokens those of a span of ``again`` that begins there are read, of the join's
        ``ids``."""
        lease, first = self._model.checked(lease), context.protected if self._parts else 0
        start, shift = self._n, self._n - first
        if start in again:
            self._repair(ids[start : again[start]], progress)
            first += again[start] - start
        hidden = [*(part.first for part in context.parts), 0]  # already
        for layers, moved, seen in zip(lease.parts, lease.shifts or (0,) * len(lease.parts), hidden, strict=True):
            self._parts.append(seen_from(layers, max(seen, first - moved)))
            self._shifts.append(moved + shift)
        for pieces, layer, owner in zip(self._windows, lease.layers, self._model.layout.owners, strict=True):
            if layer.window is not None:
                moved = shift + context.saved - self._saved  # windows show what stands before it as its tokens stand
                pieces.append(Piece(layer, first, shift, self._model.rotations.turn(owner, -moved)))
        self._like, self._n = lease.layers, shift + context.n_tokens

    def _repair(self, ids: Sequence[int], progress: Progress) -> None:
        """Read tokens behind what has been added."""
        row = Row(self._shown(), self._n, Tail(len(ids)), before=tuple(self._parts), shifts=(*self._shifts, 0))
        pairs, _ = read_behind(self._model, row, ids, progress)
        positions = torch.arange(self._n, self._n + len(ids), dtype=torch.int32, device=self._model.device)
        read = list[RaggedLayer]()
        for (keys, values), like in zip(pairs, self._like, strict=True):
            flat = self._codec.keys(keys.flatten(0, 1))
            kept = flat if values is keys else self._codec.values(values.flatten(0, 1))
            read.append(RaggedLayer(flat, kept, (len(ids),) * len(keys), positions.repeat(len(keys)), window=like.window))
        for pieces, layer in zip(self._windows, read, strict=True):
            if layer.window is not None:
                pieces.append(Piece(layer, 0, 0, None))
        self._parts.append(tuple(read))
        self._shifts.append(0)
        self._read.append(tuple(read))

    def _shown(self) -> Layers:
        """What windows show at the end, and nothing of other layers."""
        layers = zip(self._windows, self._like, strict=True)
        dtype = self._model.model.dtype
        return tuple(joined_window(pieces, self._n, self._codec, dtype) if pieces else like.none() for pieces, like in layers)

    def own(self) -> Layers:
        """The join's own layers."""
        shown = self._shown()
        return tuple(
            layer if layer.window is not None or not self._read else self._together([read[place] for read in self._read])
            for place, layer in enumerate(shown)
        )

    def _together(self, layers: Sequence[RaggedLayer]) -> RaggedLayer:
        """Layers whose heads have as many pairs each, one behind another."""
        heads, dtype = layers[0].n_heads, self._model.model.dtype

        def by_head(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (heads, -1))

        def flat(vectors: Sequence[Vectors], write: Callable[[Tensor], Vectors]) -> Vectors:
            together = in_one([each(some, by_head) for some in vectors], write, dtype, 1)
            return each(together, lambda tensor: tensor.flatten(0, 1).contiguous())

        keys = flat([layer.keys for layer in layers], self._codec.keys)
        values = keys if layers[0].shared else flat([layer.values for layer in layers], self._codec.values)
        length = sum(layer.lengths[0] for layer in layers) if heads else 0
        positions = torch.cat([by_head(layer.positions) for layer in layers], 1).flatten()
        return RaggedLayer(keys, values, (length,) * heads, positions)


def without_preamble(
    model: LanguageModel, head: Sequence[RaggedLayer], layers: Sequence[RaggedLayer], start: int, dropped: int, n: int, codec: Codec
) -> list[RaggedLayer]:
    """Layers of what was read from position ``start`` on, as they stand behind the head alone: what a window shows of the ``n`` tokens that
    are left has moved. All else moves when it is seen."""
    moved = list(layers)
    for place, (layer, owner) in enumerate(zip(layers, model.layout.owners, strict=True)):
        if layer.window is not None:
            read = Piece(layer, start, -dropped, model.rotations.turn(owner, dropped))
            moved[place] = joined_window([Piece(head[place], 0, 0, None), read], n, codec, model.model.dtype)
    return moved
