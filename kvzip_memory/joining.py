"""Contexts as parts of one: read behind a preamble that is dropped, and put together without reading anything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_memory.chain import Step
from kvzip_memory.compression.moving import Piece, joined_window
from kvzip_memory.context import CompressedContext, Part, RaggedLayer, Receipt, Resident, Source, as_told
from kvzip_memory.errors import InputError
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.registry.identity import recipe_digest


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


class Join(NamedTuple):
    """Contexts that stand one behind another.

    Attributes:
        token_ids: ``[n]`` int32, of all of them, the template's head once.
        parts: what is seen, in its order.
        sources: their documents, as those say it who loaded them.
        told: the same as the texts tell it.
        shifts: how far each context has moved.
    """

    token_ids: Tensor
    parts: tuple[Part, ...]
    sources: tuple[Source, ...]
    told: tuple[Source, ...]
    shifts: tuple[int, ...]

    @classmethod
    def of(cls, contexts: Sequence[CompressedContext]) -> Join:
        """Of two contexts or more.

        Raises:
            InputError: fewer; or they are not of documents behind one template head.
        """
        if len(contexts) < 2:
            raise InputError(f"{len(contexts)} contexts to join; give at least two")
        first, *others = contexts
        ids, parts, shifts = [first.token_ids], [*first.all_parts], [0]
        sources, told = [*first.sources], [*as_told(first.sources)]
        for context in contexts:
            _check_same_head(first, context)
        for context in others:
            head = context.protected
            shift = sum(map(len, ids)) - head
            beginning, *rest = context.all_parts
            if beginning.n_tokens > head:  # else it is the head alone
                rest.insert(0, beginning._replace(n_tokens=beginning.n_tokens - head, gap=head))
            parts += [part.moved(shift) for part in rest]
            for found, of in ((sources, context.sources), (told, as_told(context.sources))):
                for number, source in enumerate(of, 1):
                    unnamed = not source.shown and source.name == f"document {number}"
                    name = f"document {len(found) + 1}" if unnamed else source.name
                    found.append(replace(source, name=name, start=source.start + shift, end=source.end + shift))
            ids.append(context.token_ids[head:])
            shifts.append(shift)
        return cls(torch.cat(ids), tuple(parts), tuple(sources), as_told(told), tuple(shifts))


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


def joined(model: LanguageModel, step: Step, contexts: tuple[CompressedContext, ...]) -> CompressedContext:
    """Contexts whose pairs are on the device as one: it has nothing of its own but what windows show at its end."""
    shifts, n, layers = Join.of(contexts).shifts, len(step.ids) if step.ids is not None else 0, list[RaggedLayer]()
    with ExitStack() as leases:
        own = [leases.enter_context(context.lease()).layers for context in contexts]
        for owner, of_all in zip(model.layout.owners, zip(*own, strict=True), strict=True):
            if of_all[-1].window is None:
                layers.append(of_all[-1].none())
                continue
            turns = [model.rotations.turn(owner, -shift) for shift in shifts]
            firsts = [context.protected * (number > 0) for number, context in enumerate(contexts)]
            layers.append(joined_window([Piece(*piece) for piece in zip(of_all, firsts, shifts, turns, strict=True)], n))
    assert step.ids is not None
    assert step.recipe is not None
    return CompressedContext(
        key=step.wanted.key,
        identity=step.wanted.identity,
        token_ids=step.ids,
        storage=Resident(tuple(layers)),
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


def without_preamble(
    model: LanguageModel, head: Sequence[RaggedLayer], layers: Sequence[RaggedLayer], start: int, dropped: int, n: int
) -> list[RaggedLayer]:
    """Layers of what was read from position ``start`` on, as they stand behind the head alone: what a window shows of the ``n`` tokens that
    are left has moved. All else moves when it is seen."""
    moved = list(layers)
    for place, (layer, owner) in enumerate(zip(layers, model.layout.owners, strict=True)):
        if layer.window is not None:
            read = Piece(layer, start, -dropped, model.rotations.turn(owner, dropped))
            moved[place] = joined_window([Piece(head[place], 0, 0, None), read], n)
    return moved
