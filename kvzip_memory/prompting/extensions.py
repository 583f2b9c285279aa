"""Prefixes that go on behind a context: with more documents, with more turns, or with those of a session."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kvzip_memory.context import CompressedContext, Recipe, Source
from kvzip_memory.errors import InputError
from kvzip_memory.prompting.documents import Document
from kvzip_memory.prompting.frames import SEPARATOR
from kvzip_memory.prompting.keeping import kept_spans
from kvzip_memory.prompting.layouts import Layouts, check_ends_said, check_follows
from kvzip_memory.prompting.messages import Message, says_something
from kvzip_memory.prompting.prefixes import Prefixes
from kvzip_memory.prompting.prompt import Prompt, digest_of
from kvzip_memory.prompting.shown import in_one_text, sources_in
from kvzip_memory.prompting.stand_ins import ASKED
from kvzip_memory.prompting.tools import Tool, checked_tools, with_tools


class Extensions:
    """Lays out what goes on behind a context, which is not read again.

    Args:
        layouts: of the model's template.
        prefixes: of the same.
        tokenizer: reads back what documents a context has.
    """

    def __init__(self, layouts: Layouts, prefixes: Prefixes, tokenizer: Any) -> None:
        self._layouts, self._roles, self._window, self._encoder = layouts, layouts.roles, layouts.window, layouts.encoder
        self._prefixes, self._tokenizer = prefixes, tokenizer

    def more_documents(self, context: CompressedContext, documents: Sequence[Document], keep: Sequence[str] = ()) -> Prompt:
        """The prefix of a context of documents and further ones, each with a header. ``keep`` may name their strings only.

        Raises:
            InputError: the context goes on after its documents.
        """
        if not context.sources or context.sources[-1].end != context.n_tokens:
            raise InputError("documents cannot follow a conversation; extend it with messages, or put the text into one")
        self._window.check_messages([{"role": "user", "content": document.text} for document in documents])
        first, before = len(context.sources) + 1, context.recipe.tail
        before_them = [self._tokenizer.decode(context.token_ids[source.start : source.end]) for source in context.sources]
        shown, spans = in_one_text(documents, first, before_them)
        settled, tail = self._layouts.cut(f"{before}{shown}{SEPARATOR}{ASKED['content']}", len(before) + len(shown), continued=True)
        tokens = self._encoder.tokens(settled, continued=True)
        n = context.n_tokens
        sources = sources_in(documents, first, tokens, [len(before) + at for span in spans for at in span], n)
        whole, texts = f"{settled}{tail}"[len(before) :], [document.text for document in documents]
        kept = kept_spans(self._encoder, keep, texts, whole, tokens, len(before), n)
        recipe = replace(context.recipe, tail=tail)
        return _grown(context, tokens.ids, recipe, kept, (*context.sources, *sources))

    def more_turns(
        self,
        context: CompressedContext,
        messages: Sequence[Message],
        keep: Sequence[str] = (),
        tools: Sequence[Tool] | None = None,
        behind: bool = False,
    ) -> Prompt:
        """The prefix of a context and turns that follow it. ``keep`` may name strings of these turns only.

        Unless they come ``behind`` it, the messages may also repeat the conversation the context was made of; then it is what comes after.

        Raises:
            InputError: as for :meth:`Prefixes.conversation`, or the messages add nothing.
        """
        tools, n = checked_tools(tools), context.n_tokens
        self._window.check_messages(messages)
        if not behind and (whole := self._repeating(context, messages, keep, tools)):
            if len(whole.token_ids) > n:
                spans = tuple(span for span in whole.keep if span[0] >= n)
                return _grown(context, whole.token_ids[n:], whole.recipe, spans, context.sources)
            messages = []
        if not messages or not any(map(says_something, messages)):
            raise InputError("these messages add nothing to the context")
        check_ends_said(messages)
        check_follows(context.recipe, messages)
        shown = context.recipe.tools
        if tools and digest_of([*tools]) != shown and not self._layouts.ends_in_tools(context.recipe, messages, tools):
            shown, messages = digest_of([*tools]), with_tools(messages, tools)
        turns = self._roles.turns_behind(messages)
        joins = self._roles.joins(turns)
        layout = self._layouts.behind(context.recipe, turns, joins=joins)
        _, end, _, _ = layout.at
        settled, tail = self._layouts.cut(layout.text, end, continued=True)
        tokens = self._encoder.tokens(settled, continued=True)
        recipe = self._layouts.recipe_behind(turns, layout, joins, tail)
        recipe = replace(recipe, next_turn=context.recipe.next_turn, tools=shown, system=context.recipe.system)
        kept = kept_spans(self._encoder, keep, [turn["content"] for turn in turns], f"{settled}{tail}", tokens, 0, n)
        return _grown(context, tokens.ids, recipe, kept, context.sources)

    def _repeating(
        self, context: CompressedContext, messages: Sequence[Message], keep: Sequence[str], tools: Sequence[Tool] | None
    ) -> Prompt | None:
        """The prompt of messages that repeat the conversation a context was made of, None if they do not."""
        with suppress(InputError):  # what does not stand alone
            whole = self._prefixes.conversation(messages, None, keep, tools)
            if list(whole.token_ids[: context.n_tokens]) == context.token_ids.tolist():
                return whole
        return None

    def folded(self, context: CompressedContext | None, ids: Sequence[int], protected: int, tools: Sequence[Tool] | None = None) -> Prompt:
        """The prefix of a context, or of none, and the ids of turns behind it that end in an answer's text."""
        before = self._layouts.free_recipe() if context is None else context.recipe
        recipe = replace(before, opening=before.next_turn, separator="", role="assistant", tail="")
        if tools and not self._layouts.ends_in_tools(recipe, [], tools):  # they were described with what was asked first
            recipe = replace(recipe, tools=digest_of([*tools]))
        if context is not None:
            return _grown(context, ids, recipe, (), context.sources)
        return Prompt(tuple(ids), protected, recipe, (), (), digest_of([None, list(ids)]), None)


def _grown(
    context: CompressedContext,
    more: Sequence[int],
    recipe: Recipe,
    keep: tuple[tuple[int, int], ...],
    sources: tuple[Source, ...],
) -> Prompt:
    """The prefix of a context and more ids behind it."""
    text = digest_of([context.identity["text"], list(more)])
    return Prompt((*context.token_ids.tolist(), *more), context.protected, recipe, sources, keep, text, context.identity.get("system"))
