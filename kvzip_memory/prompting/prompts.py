"""From sources and questions to token ids: prefixes that contexts are built from, and what follows them.

A prompt is rendered whole by the model's own template and tokenised whole (:mod:`kvzip_memory.prompting.template`,
:mod:`kvzip_memory.prompting.encoding`), so its ids are those of ``apply_chat_template``. A context is cut from it at a token's end. The
characters before the cut whose token would reach over it stay out of the context and are read with what follows
(:attr:`~kvzip_memory.context.Recipe.tail`), so prefix and question together are the ids of the whole prompt, too.

Tools, calls and their results are rendered by the template where it knows them. Where it does not they are put in plain
turns (:func:`~kvzip_memory.prompting.tools.in_plain_turns`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kvzip_memory.context import CompressedContext, Recipe, Source
from kvzip_memory.errors import InputError, WindowError
from kvzip_memory.prompting.encoding import Tokens, added_tokens
from kvzip_memory.prompting.sources import CUT, SEPARATOR, Document, Message, as_message, as_messages, enclosed, header, header_word
from kvzip_memory.prompting.template import ChatTemplate, Layout, Place
from kvzip_memory.prompting.tools import FORMS, Tool, checked_tools, describe, form_of, in_plain_turns, results_in_order
from kvzip_memory.system.printable import brief

# A context may end so many tokens before a message does, see `Recipe.tail`.
_NEAR = 8
#: Tools of more characters for each token of the window are described before a grammar is made of them.
_MANY = 8

# Stands for a question that is not known yet. A digit merges with nothing that comes before it.
_ASKED: Message = {"role": "user", "content": "0"}


@dataclass(frozen=True)
class Prompt:
    """A source as token ids: the prefix a context is built from.

    Attributes:
        token_ids: template head and texts.
        protected: the first so many ids are template head and system prompt.
        recipe: what follows the prefix.
        sources: the documents and their token spans.
        keep: token spans ``[start, end)`` that are never evicted either.
        text_digest: hash of the texts, as they were before any model's template and tokenizer saw them.
        system_digest: hash of the system prompt, None without one.
    """

    token_ids: tuple[int, ...]
    protected: int
    recipe: Recipe
    sources: tuple[Source, ...]
    keep: tuple[tuple[int, int], ...]
    text_digest: str | None
    system_digest: str | None


class PromptBuilder:
    """Renders and tokenises for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template_kwargs: variables handed to the chat template, such as ``enable_thinking=False``.
        window: tokens that the model can hold. Texts that have more are refused before they are tokenised whole; None refuses none.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, window: int | None = None) -> None:
        self.tokenizer, self._window = tokenizer, window
        self._template = template = ChatTemplate(tokenizer, template_kwargs)
        self._encoder = template.encoder
        #: The template's text.
        self.template = template.source
        #: Tokens that only the template may write.
        self.control_ids = template.control_ids
        #: What the model writes around its reasoning, None if it does not.
        self.thought = template.thought
        user, answer, system = ({"role": role, "content": "a"} for role in ("user", "assistant", "system"))
        self._merges = not template.shows([user, user])
        form = form_of(self.template)
        self.form = form or FORMS["hermes"]
        spelled = "".join([self.form.begin, self.form.open, self.form.close, self.form.end, self.form.prefix or "", *(self.thought or ())])
        #: Special tokens that calls and reasoning are written with; they show in an answer's text.
        self.call_ids = frozenset(i for i, token in added_tokens(tokenizer).items() if token.special and token.content in spelled)
        result = {"role": "tool", "content": "d", "tool_call_id": "b"}
        self._knows_tools = form is not None and template.shows(
            [user, _call("probe_tool", {"probe_key": "probe value"}, "b"), result],
            [{"type": "function", "function": {"name": "probe_tool", "description": "probe it", "parameters": {}}}],
            ["probe_key", "probe value", "probe it"],
        )
        calls = [{"id": i, "name": "probe_tool", "arguments": {"a": i}} for i in "bc"]
        both: list[Message] = [{"role": "assistant", "content": "", "tool_calls": calls}, result, {**result, "tool_call_id": "c"}]
        #: Whether the template shows no more than one call in an answer.
        self.one_call = self._knows_tools and not template.shows([user, *both])
        self._knows_system = template.shows([system, user])
        self._knows_late_system = self._knows_system and template.shows([system, system, user, answer, system, user])
        self._greets = template.shows([answer, user])
        # Some templates put the system's text before what the user says last, wherever that stands.
        talk = [user, answer, user]
        self._moves_system = self._knows_system and template.shows(talk) and not template.shows([system, *talk])

    # -- prefixes ------------------------------------------------------------------------------------------------

    def documents(self, documents: Sequence[Document], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """The prefix of documents a user shows before asking. Several documents get a visible header each.

        ``keep`` are strings whose tokens are never evicted, wherever they occur in the documents.

        Raises:
            InputError: a string to keep that does not occur.
            WindowError: more tokens than the window by far, as for all that follows.
        """
        self._check_fit([*_system(system), *({"role": "user", "content": document.text} for document in documents)])
        shown, spans = _shown(documents)
        turns = self._turns([*_system(system), {"role": "user", "content": f"{shown}{SEPARATOR}{_ASKED['content']}"}])
        before = turns[-1].get("head", 0)
        ends = [before, *(before + at for span in spans for at in span)]
        layout = self._template.layout(turns, places=[(len(turns) - 1, at) for at in [*ends, len(turns[-1]["content"])]])
        head, *places, asked = layout.at
        settled, tail = self._cut(layout.text, places[-1])
        tokens = self._encoder.tokens(settled)
        closing = self._continued(layout.text[asked:])
        recipe = Recipe((), SEPARATOR, closing, self._next_turn, tail=tail, system=self._shown_system(turns))
        sources = _sources(documents, 1, tokens, places)
        names = [document.name if len(documents) > 1 else None for document in documents]
        texts = [document.text for document in documents]
        protected = tokens.before(head)
        kept = self._kept_spans(keep, texts, settled[head:], tokens, head)
        return Prompt(tuple(tokens.ids), protected, recipe, sources, kept, _digest([names, texts]), _digest(system))

    def conversation(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        keep: Sequence[str] = (),
        tools: Sequence[Tool] | None = None,
    ) -> Prompt:
        """The prefix of a conversation so far; the next question is the user's next turn. ``keep`` as for documents.

        The ids are those with which :meth:`question` begins for the same tools, these messages and any that follow.

        Raises:
            InputError: it ends between calls and their results, or in roles that the template refuses.
        """
        messages, tools = [*_system(system), *messages], checked_tools(tools)
        self._check_fit(messages)
        _check_ends_said(messages)
        turns = self._turns(messages, tools)
        joins = self._joins(turns)
        layout = self._asked(turns, joins, (), _start(turns))
        shown = None
        if tools:
            described = layout if not self._knows_tools else self._asked(turns, joins, tools, _start(turns))
            if not self._knows_tools or described.text[: described.at[1]] != layout.text[: layout.at[1]]:
                layout, shown = described, _digest([*tools])
        start, end, _, _ = layout.at
        settled, tail = self._cut(layout.text, end)
        tokens = self._encoder.tokens(settled)
        recipe = self._recipe_behind(turns, layout, joins, tail)
        recipe = replace(recipe, next_turn=self._next_turn, tools=shown, system=self._shown_system(turns))
        protected = len(tokens.ids) if all(turn["role"] == "system" for turn in turns) else tokens.before(start)
        kept = self._kept_spans(keep, [turn["content"] for turn in turns], settled[start:], tokens, start)
        said = _digest([_said(message) for message in messages[0 if system is None else 1 :]])
        return Prompt(tuple(tokens.ids), protected, recipe, (), kept, said, _digest(system))

    def more_documents(self, context: CompressedContext, documents: Sequence[Document], keep: Sequence[str] = ()) -> Prompt:
        """The prefix of a context of documents and further ones, each with a header. ``keep`` may name their strings only.

        Raises:
            InputError: the context goes on after its documents.
        """
        if not context.sources or context.sources[-1].end != context.n_tokens:
            raise InputError("documents cannot follow a conversation; extend it with messages, or put the text into one")
        self._check_fit([{"role": "user", "content": document.text} for document in documents])
        first, before = len(context.sources) + 1, context.recipe.tail
        before_them = [self.tokenizer.decode(context.token_ids[source.start : source.end]) for source in context.sources]
        shown, spans = _shown(documents, first, before_them)
        settled, tail = self._cut(f"{before}{shown}{SEPARATOR}{_ASKED['content']}", len(before) + len(shown), continued=True)
        tokens = self._encoder.tokens(settled, continued=True)
        n = context.n_tokens
        sources = _sources(documents, first, tokens, [len(before) + at for span in spans for at in span], n)
        kept = self._kept_spans(keep, [document.text for document in documents], settled[len(before) :], tokens, len(before), n)
        recipe = replace(context.recipe, tail=tail)
        return self._grown(context, tokens.ids, recipe, kept, (*context.sources, *sources))

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
            InputError: as for :meth:`conversation`, or the messages add nothing.
        """
        tools, n = checked_tools(tools), context.n_tokens
        self._check_fit(messages)
        if not behind and (whole := self._repeating(context, messages, keep, tools)):
            if len(whole.token_ids) > n:
                spans = tuple(span for span in whole.keep if span[0] >= n)
                return self._grown(context, whole.token_ids[n:], whole.recipe, spans, context.sources)
            messages = []
        if not messages or not any(message["content"].strip() or message.get("tool_calls") for message in messages):
            raise InputError("these messages add nothing to the context")
        _check_ends_said(messages)
        _check_follows(context.recipe, messages)
        shown = context.recipe.tools
        if tools and _digest([*tools]) != shown and not self._ends_in_tools(context.recipe, messages, tools):
            shown, messages = _digest([*tools]), _with_tools(messages, tools)
        turns = self._turns_behind(messages)
        joins = self._joins(turns)
        layout = self._behind(context.recipe, turns, joins=joins)
        _, end, _, _ = layout.at
        settled, tail = self._cut(layout.text, end, continued=True)
        tokens = self._encoder.tokens(settled, continued=True)
        recipe = self._recipe_behind(turns, layout, joins, tail)
        recipe = replace(recipe, next_turn=context.recipe.next_turn, tools=shown, system=context.recipe.system)
        kept = self._kept_spans(keep, [turn["content"] for turn in turns], settled, tokens, 0, n)
        return self._grown(context, tokens.ids, recipe, kept, context.sources)

    def _repeating(
        self, context: CompressedContext, messages: Sequence[Message], keep: Sequence[str], tools: Sequence[Tool] | None
    ) -> Prompt | None:
        """The prompt of messages that repeat the conversation a context was made of, None if they do not."""
        with suppress(InputError):  # what does not stand alone
            whole = self.conversation(messages, None, keep, tools)
            if list(whole.token_ids[: context.n_tokens]) == context.token_ids.tolist():
                return whole
        return None

    def _ends_in_tools(self, recipe: Recipe, messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
        """Whether the template describes tools near the end of a prompt, not in what comes before the last question."""
        turns = self._turns_behind([*messages, _ASKED])
        return self._knows_tools and self._behind(recipe, turns, tools).text != self._behind(recipe, turns).text

    def until_mark(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Prompt | None:
        """The prefix of a prompt up to the last block of text that carries ``cache_control``; None without such a block.

        In the system turn what stands before that block is protected, and it is not. What follows the block does not matter:
        it may be another question.
        """
        messages, tools = as_messages(messages), checked_tools(tools)
        self._check_fit(messages)
        turns = self._turns(messages, tools)
        if (block := _last_block(turns)) is None:
            return None
        (last, begin), (_, end) = block
        layout = self._template.layout(turns, tools if self._knows_tools else (), [_start(turns), *block])
        settled, tail = self._cut(layout.text, layout.at[2], apart=True)
        tokens = self._encoder.tokens(settled)
        role = turns[last]["role"]
        recipe = self.free_recipe()
        opening: tuple[int, ...] = ()
        if role != "user":
            opening = self._recipe_behind(_lead(role), self._asked(_lead(role), False), False, "").opening
        separator, system = SEPARATOR if role == "user" else "", self._shown_system(turns)
        recipe = replace(recipe, opening=opening, separator=separator, role=role, tail=tail, system=system)
        recipe = replace(recipe, tools=_digest([*tools]) if tools else None)
        text = turns[last]["content"].replace(CUT, "")
        said = _digest([_said(turn) for turn in turns[:last]] + [text[:begin], text[begin:end]])
        protected = tokens.before(layout.at[0])
        if (last, begin) < _start(turns):
            protected = min(protected, tokens.before(layout.at[1]))
        return Prompt(tuple(tokens.ids), protected, recipe, (), (), said, None)

    def folded(self, context: CompressedContext | None, ids: Sequence[int], protected: int, tools: Sequence[Tool] | None = None) -> Prompt:
        """The prefix of a context, or of none, and the ids of turns behind it that end in an answer's text."""
        before = self.free_recipe() if context is None else context.recipe
        recipe = replace(before, opening=before.next_turn, separator="", role="assistant", tail="")
        if tools and not self._ends_in_tools(recipe, [], tools):  # they were described with what was asked first
            recipe = replace(recipe, tools=_digest([*tools]))
        if context is not None:
            return self._grown(context, ids, recipe, (), context.sources)
        return Prompt(tuple(ids), protected, recipe, (), (), _digest([None, list(ids)]), None)

    def _grown(
        self,
        context: CompressedContext,
        more: Sequence[int],
        recipe: Recipe,
        keep: tuple[tuple[int, int], ...],
        sources: tuple[Source, ...],
    ) -> Prompt:
        """The prefix of a context and more ids behind it."""
        text = _digest([context.identity["text"], list(more)])
        return Prompt((*context.token_ids.tolist(), *more), context.protected, recipe, sources, keep, text, context.identity.get("system"))

    def _kept_spans(
        self, keep: Sequence[str], texts: Sequence[str], shown: str, tokens: Tokens, start: int, first: int = 0
    ) -> tuple[tuple[int, int], ...]:
        """Token spans of every occurrence of every string of ``keep``.

        Args:
            texts: where each must occur.
            shown: the texts as they are shown, from character ``start`` of what the tokens are of.
            first: number of the first of the tokens.
        """
        spans = set[tuple[int, int]]()
        shown = self._encoder.blank(shown) if keep else ""
        texts = [text.replace(CUT, "") for text in texts] if keep else []
        for wanted in dict.fromkeys(keep):
            if not wanted or not any(wanted in text for text in texts):
                raise InputError(f"keep: {brief(wanted)} does not occur in the text; give strings as they are spelled there")
            for spelled in {wanted, json.dumps(wanted, ensure_ascii=False)[1:-1]}:  # templates show results as JSON, too
                for at in _places_of(spelled, shown):
                    span = tokens.span(start + at, start + at + len(spelled))
                    if span[0] < span[1]:
                        spans.add((first + span[0], first + span[1]))
        return tuple(sorted(spans))

    # -- what follows --------------------------------------------------------------------------------------------

    def question(
        self,
        recipe: Recipe | None,
        question: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        fixed: bool = False,
        thinks: bool = True,
    ) -> list[int]:
        """Ids of a question, or of a conversation that ends with one, after a context or (recipe None) on its own.

        After a context a system message cannot be moved to the front; its text goes before the question it precedes, and so
        does the description of tools that the context was not made with. A context that ends in what a user or a tool
        says can be followed by nothing, ``[]``.

        Args:
            fixed: on its own, so that it begins with the ids of :meth:`conversation`, where the template would let the system
                prompt move on with what the user says last.
            thinks: whether the model may think first, where the template opens its reasoning; else that is closed at once.

        Raises:
            InputError: nothing to answer, or roles that the template refuses or that cannot follow the context.
            WindowError: more tokens than the window by far.
        """
        layout = self.rendered(recipe, question, tools, fixed=fixed, thinks=thinks)
        if recipe is None and layout.at and not fixed:  # what `until_mark` begins with is fixed
            layout = self.rendered(None, question, tools, fixed=True, thinks=thinks)
        return self.ids(recipe, layout)

    def ids(self, recipe: Recipe | None, layout: Layout) -> list[int]:
        """Ids of a rendered question. On its own, those of :meth:`until_mark` come first if there is a mark."""
        self._check_rendered(layout.text)
        if recipe is not None:
            return self._encoder.continued(layout.text)
        if not layout.at:
            return self._encoder.ids(layout.text)
        settled, _ = self._cut(layout.text, layout.at[-1], apart=True)
        return [*self._encoder.ids(settled), *self._encoder.continued(layout.text[len(settled) :])]

    def rendered(
        self,
        recipe: Recipe | None,
        question: str | Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        fixed: bool = False,
        thinks: bool = True,
    ) -> Layout:
        """The text of :meth:`question`, spelled, and where in it the marks lie that stand in the messages."""
        tools = checked_tools(tools)
        messages: list[Message] = []
        # Nothing is to be said where a conversation has ended in what awaits an answer; behind a document something is.
        awaits = recipe is not None and recipe.role in ("user", "tool") and not recipe.separator
        if not awaits or question or not isinstance(question, Sequence) or isinstance(question, str):
            messages = as_messages(question)
            self._check_fit(messages)
            if messages[-1]["role"] not in ("user", "tool") or not (messages[-1]["content"].strip() or messages[-1]["role"] == "tool"):
                raise InputError(f"the last message is from {messages[-1]['role']!r} or empty; an answer follows what a user says")
        layout = self._alone(messages, tools, fixed) if recipe is None else self._following(recipe, messages, tools)
        if thinks or not self._template.opens_thought(layout.text):
            return layout
        assert self.thought is not None
        return replace(layout, text=layout.text.rstrip() + self._encoder.spell(f"\n\n{self.thought[1]}\n\n"))

    def _following(self, recipe: Recipe, messages: Sequence[Message], tools: Sequence[Tool]) -> Layout:
        """A prompt behind a context. Places: its marks."""
        _check_follows(recipe, messages)
        if tools and _digest([*tools]) != recipe.tools:
            if self._knows_tools:
                turns = self._turns_behind(messages)
                layout = self._behind(recipe, turns, tools)
                if layout.text != self._behind(recipe, turns).text:
                    return layout  # the template puts tools near the end
            messages = _with_tools(messages, tools)
        return self._behind(recipe, self._turns_behind(messages))

    def behind(self, read: Sequence[int], messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[Message] | None:
        """Messages of a conversation that come behind the ids of a context of its beginning; None if that does not end between two."""
        plain: list[Message] = [{**message, "content": message["content"].replace(CUT, "")} for message in messages]
        said = [number for number, message in enumerate(plain) if message["content"]]
        marked = [{**message, "content": message["content"] + (CUT if message["content"] else "")} for message in plain]
        layout = self._alone(marked, checked_tools(tools), fixed=True)
        tokens = self._encoder.tokens(layout.text)
        for number, at in zip(said, layout.at, strict=True):
            if 0 <= tokens.before(at) - len(read) <= _NEAR:
                with suppress(InputError):  # where no context can end
                    if list(self.conversation(plain[: number + 1], tools=tools).token_ids) == list(read):
                        return plain[number + 1 :]
        return None

    def thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends where the model's reasoning has begun."""
        if self.thought is None:
            return False
        return bool(self.tokenizer.decode([*ids][-8:]).rstrip().endswith(self.thought[0]))

    def pieces(self, recipe: Recipe | None, layout: Layout) -> list[list[int]]:
        """Ids of a rendered conversation, cut at its marks."""
        self._check_rendered(layout.text)
        ends = [*layout.at, len(layout.text)]
        texts = [layout.text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return [self._encoder.ids(text) if recipe is None and not n else self._encoder.continued(text) for n, text in enumerate(texts)]

    def ids_behind(self, text: str, n: int) -> list[int]:
        """Ids of a rendered text's part behind its first ``n`` characters, as a model would write them."""
        return self._encoder.continued(self._encoder.behind(text, n))

    def unspelled(self, text: str) -> str:
        """A rendered text as a model would write it."""
        return self._encoder.unspell(text)

    def count(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, most: int | None = None) -> int:
        """Tokens of any messages as a prompt, the answer's header included; of what no template takes, those of its texts. Of what has more
        than ``most`` no more may be read than tells that, and some number above it is given.
        """
        said = [turn for message in messages if (turn := as_message(message)) is not None]
        if not said:
            return 0
        shown = "" if most is None else "".join(turn["content"].strip() for turn in said if turn["role"] != "assistant")
        if most is not None and (least := self._encoder.least(shown, most)) > most:
            return least
        try:
            return len(self._encoder.ids(self._alone(said, checked_tools(tools), fixed=False).text))
        except InputError:
            return sum(len(self.text_ids(turn["content"])) for turn in said)

    def offsets(self, text: str, alone: bool = True) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` of each of a document's ids, as it lies in a context, ``alone`` or behind another one."""
        if alone:
            turns = [{"role": "user", "content": f"{text}{SEPARATOR}{_ASKED['content']}"}]
            layout = self._template.layout(turns, places=[(0, 0), (0, len(text))])
            start, end = layout.at
            tokens = self._encoder.tokens(self._cut(layout.text, end)[0])
        else:
            start, end = len(SEPARATOR), len(SEPARATOR) + len(text)
            tokens = self._encoder.tokens(f"{SEPARATOR}{text}{SEPARATOR}", continued=True)
        trimmed = len(text) - (end - start)  # by the template, in front
        first, last = tokens.span(start, end)
        starts, ends = (places[first:last] - start + trimmed for places in (tokens.starts, tokens.ends))
        return [(max(0, start), min(len(text), end)) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text inside of a prompt. What it spells of control tokens is text."""
        return self._encoder.continued(text.replace(CUT, ""))

    def head(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
        """How many ids of a question without a context are template head and system prompt."""
        return self.conversation(as_messages(question), tools=tools).protected

    def free_recipe(self) -> Recipe:
        """The recipe of a session without a context."""
        layout = self._template.layout([_ASKED], places=[(0, 0), (0, len(_ASKED["content"]))])
        start, end = layout.at
        return Recipe(tuple(self._encoder.ids(layout.text[:start])), "", self._continued(layout.text[end:]), self._next_turn)

    @cached_property
    def _next_turn(self) -> tuple[int, ...]:
        """Ids between an answer and the user's next text."""
        answer = {"role": "assistant", "content": "a"}
        layout = self._template.layout([*_lead("user"), answer, _ASKED], places=[(1, 1), (2, 0)])
        return self._continued(layout.text[slice(*layout.at)])

    def _continued(self, text: str) -> tuple[int, ...]:
        return tuple(self._encoder.continued(text))

    def _check_fit(self, messages: Sequence[Message]) -> None:
        """Refuse texts that have more tokens than the window, before they are rendered. What an answer said may not be shown.

        Raises:
            WindowError: they have.
        """
        said = [message["content"].replace(CUT, "").strip() for message in messages if message["role"] != "assistant"]
        said = [text for text in said if text]
        if self._window is not None and len(said) > self._window:
            raise WindowError(
                f"{len(said):,} texts have {len(said):,} tokens and more, which were not counted; the model's window is "
                f"{self._window:,} tokens. Give fewer texts, or several contexts of them",
                tokens=len(said),
                window=self._window,
            )
        self._check_rendered(max(said, key=len, default=""))
        self._check_rendered("".join(said))

    def check_tools(self, tools: Sequence[Tool]) -> None:
        """Refuse tools that have more tokens than the window, before a grammar is made of them.

        Raises:
            WindowError: they have.
        """
        if self._window is not None and len(json.dumps(tools, default=str)) > _MANY * self._window:
            self._check_rendered(self._alone([_ASKED], tools, fixed=False).text)

    def _check_rendered(self, text: str) -> None:
        """Refuse a text that has more tokens than the window, before it is tokenised whole.

        Raises:
            WindowError: it has.
        """
        if self._window is None or (tokens := self._encoder.least(text, self._window)) <= self._window:
            return
        raise WindowError(
            f"a text of {len(text):,} characters has {tokens:,} tokens and more, which were not counted; the model's window is "
            f"{self._window:,} tokens. Give a shorter text, or several contexts of it",
            tokens=tokens,
            window=self._window,
        )

    # -- layouts -------------------------------------------------------------------------------------------------

    def _alone(self, messages: Sequence[Message], tools: Sequence[Tool], fixed: bool) -> Layout:
        """A prompt without a context. Places: its marks."""
        shown = tools if self._knows_tools else ()
        if self._moves_system and not fixed:
            with suppress(InputError):  # with a result as the last message some templates drop the system prompt
                turns = self._turns(messages, tools, moves=True)
                return self._template.layout(turns, shown, _cuts(turns), moves=True)
        turns = self._turns(messages, tools)
        return self._template.layout(turns, shown, _cuts(turns))

    def _cut(self, text: str, at: int, continued: bool = False, apart: bool = False) -> tuple[str, str]:
        """A layout's text up to a character, less what is read with what follows, and that.

        ``apart``: whatever follows, so that another question has the same prefix.
        """
        self._check_rendered(text)
        before, after = text[:at], f"{SEPARATOR}{_ASKED['content']}" if apart else text[at:]
        tail = self._encoder.unsettled(before, after, continued)
        return before[: at - len(tail)], tail

    def _asked(self, turns: Sequence[Message], joins: bool, tools: Sequence[Tool] = (), start: Place = (0, 0)) -> Layout:
        """Turns and a question to come, which may ``join`` the last one. Places: ``start``, the turns' end, and the question's.

        White space at the end of what it joins is not within the end: without a question a template may trim it.
        """
        said = turns[-1]["content"].replace(CUT, "")
        end = (len(turns) - 1, len(said.rstrip() if joins else said))
        if joins:
            whole = [*turns[:-1], {**turns[-1], "content": f"{said}{SEPARATOR}{_ASKED['content']}"}]
            asked = (end[0], len(said) + len(SEPARATOR))
        else:
            whole, asked = [*turns, _ASKED], (len(turns), 0)
        return self._template.layout(whole, tools, [start, end, asked, (asked[0], asked[1] + len(_ASKED["content"]))])

    def _behind(self, recipe: Recipe, turns: Sequence[Message], tools: Sequence[Tool] = (), joins: bool | None = None) -> Layout:
        """What comes behind a context: rendered behind a stand-in that ends in the same role.

        ``joins`` asks for a question to come, with the places of :meth:`_asked`; None has none, and the places of its marks.
        """
        settled = recipe.tail.rstrip()
        space = recipe.tail[len(settled) :]  # which the template may trim, by what follows
        lead = _lead(recipe.role, recipe.system, space)
        place = (len(lead) - 1, len(lead[-1]["content"]) - len(space))
        if recipe.separator and turns and turns[0]["role"] == "user":
            first = f"{lead[-1]['content']}{recipe.separator}{turns[0]['content']}"
            lead, turns = [*lead[:-1], {**lead[-1], "content": first}], turns[1:]
        whole = [*lead, *turns]
        asked = joins is not None
        layout = self._asked(whole, bool(joins), tools, place) if asked else self._template.layout(whole, tools, [place, *_cuts(whole)])
        skip = layout.at[0] - len(settled)
        at = tuple(at - skip for at in layout.at)
        return Layout(settled + layout.text[layout.at[0] :], at if asked else at[1:])

    def _recipe_behind(self, turns: Sequence[Message], layout: Layout, joins: bool, tail: str) -> Recipe:
        """What follows a conversation, from its layout of :meth:`_asked`."""
        _, end, asked, closing = layout.at
        said = turns[-1]["content"].replace(CUT, "")
        opening = () if joins else self._continued(tail + layout.text[end:asked])
        tail += said[len(said.rstrip()) :] if joins else ""
        return Recipe(opening, SEPARATOR if joins else "", self._continued(layout.text[closing:]), (), turns[-1]["role"], tail=tail)

    def _shown_system(self, turns: Sequence[Message]) -> str:
        """The system prompt that the template shows in front, and may look at."""
        return turns[0]["content"].replace(CUT, "") if turns[0]["role"] == "system" and not self._moves_system else ""

    def _joins(self, turns: Sequence[Message]) -> bool:
        """Whether a question joins the last turn: a strict template has no second user's turn behind the first."""
        return self._merges and turns[-1]["role"] == "user"

    def _turns(self, messages: Sequence[Message], tools: Sequence[Tool] = (), moves: bool = False) -> list[Message]:
        """Messages as the template can take them. ``moves``: a system prompt may be shown behind other turns."""
        turns: list[Message] = results_in_order(messages, self.one_call)
        if tools and not self._knows_tools:
            turns = _described(turns, tools)
        if not self._knows_late_system:
            said = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
            first = turns[: said if self._knows_system else 0]
            joined = [{"role": "system", "content": SEPARATOR.join(turn["content"] for turn in first)}] if first else []
            turns = [*joined, *_in_user_turns(turns[len(first) :])]
        turns = self._with_results(turns)
        if self._moves_system and not moves:
            turns = _in_user_turns(turns)
        said = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        if not self._greets and turns[said:] and turns[said]["role"] == "assistant":
            turns.insert(said, {"role": "user", "content": ""})
        return _merged(turns) if self._merges else turns

    def _turns_behind(self, messages: Sequence[Message]) -> list[Message]:
        """Messages behind a context as turns. There is no place for a system prompt any more."""
        turns = self._with_results(results_in_order(_in_user_turns(messages), self.one_call))
        return _merged(turns) if self._merges else turns

    def _with_results(self, turns: list[Message]) -> list[Message]:
        """Turns with results as the template can show them, in frames that they cannot end."""
        if not self._knows_tools:
            return in_plain_turns(turns)
        if self._template.frames_in_words:
            return [{**turn, "content": enclosed(turn["content"])} if turn["role"] == "tool" else turn for turn in turns]
        return turns


def _places_of(part: str, text: str) -> Iterator[int]:
    """Where a part stands in a text, time after time."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def _shown(documents: Sequence[Document], first: int = 1, before: Sequence[str] = ()) -> tuple[str, list[tuple[int, int]]]:
    """Documents as one text, and where in it each of them lies. Several get headers, and so do those behind others, ``before``."""
    parts, spans, at = list[str](), list[tuple[int, int]](), 0
    word = header_word([*before, *(document.text for document in documents)]) if _are_headed(documents, first) else ""
    for number, document in enumerate(documents, first):
        if _are_headed(documents, first):
            parts.append(header(number, _name(document, number), word))
            at += len(parts[-1])
        parts.append(document.text)
        spans.append((at, at + len(document.text)))
        at += len(document.text)
    return "".join(parts), spans


def _are_headed(documents: Sequence[Document], first: int) -> bool:
    return len(documents) > 1 or first > 1


def _name(document: Document, number: int) -> str:
    return document.name or f"document {number}"


def _sources(documents: Sequence[Document], first: int, tokens: Tokens, places: Sequence[int], before: int = 0) -> tuple[Source, ...]:
    """Documents as sources; ``places`` are start and end of each in the text that the tokens are of, which follow ``before`` others."""
    sources = []
    shown = _are_headed(documents, first)
    for number, (document, start, end) in enumerate(zip(documents, places[::2], places[1::2], strict=True), first):
        begins, ends = tokens.span(start, end)
        sources.append(Source(_name(document, number), _storable(document.metadata or {}), before + begins, before + ends, shown))
    return tuple(sources)


def _start(turns: Sequence[Message]) -> Place:
    """Where what is said begins, behind the system prompt."""
    number = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns) - 1)
    return number, turns[number].get("head", 0)


def _last_block(turns: Sequence[Message]) -> tuple[Place, Place] | None:
    """Where the last block with ``cache_control`` begins and ends, None without one."""
    for number, turn in reversed([*enumerate(turns)]):
        before, cut, _ = turn["content"].rpartition(CUT)
        if cut:
            head = before.rpartition(CUT)[0].replace(CUT, "")
            return (number, len(head)), (number, len(before.replace(CUT, "")))
    return None


def _cuts(turns: Sequence[Message]) -> list[Place]:
    """Where marks stand in turns."""
    return [
        (number, found.start() - nth * len(CUT))
        for number, turn in enumerate(turns)
        for nth, found in enumerate(re.finditer(re.escape(CUT), turn["content"]))
    ]


def _check_ends_said(messages: Sequence[Message]) -> None:
    if messages[-1].get("tool_calls"):
        raise InputError("the conversation ends in tool calls without their results; add the results or end before the calls")


def _check_follows(recipe: Recipe, messages: Sequence[Message]) -> None:
    if messages and messages[0]["role"] == recipe.role == "assistant":
        raise InputError("the first message after a context is from 'assistant', and so is the last one in it")


def _digest(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _storable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it will come back from a file."""
    try:
        return dict(json.loads(json.dumps(dict(metadata), default=str)))
    except TypeError:  # keys JSON cannot take
        return {str(key): str(value) for key, value in metadata.items()}


def _system(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def _said(message: Message) -> list[Any]:
    """What a message says, without the ids of calls: frameworks make them up anew."""
    calls = [[call["name"], call["arguments"]] for call in message.get("tool_calls", ())]
    return [message["role"], message["content"].replace(CUT, ""), *([calls] if calls else [])]


def _merged(turns: Sequence[Message]) -> list[Message]:
    """Neighbours of one role joined."""
    merged: list[Message] = []
    for turn in turns:
        before = merged[-1] if merged else None
        if before and before["role"] == turn["role"] != "tool" and not before.get("tool_calls"):
            text = SEPARATOR.join(filter(None, [before["content"], turn["content"]]))
            merged[-1] = {**turn, "content": text, "head": before.get("head", 0)}
        else:
            merged.append(turn)
    return merged


def _in_user_turns(messages: Sequence[Message]) -> list[Message]:
    """Messages with what the system says in front of what the user says next; ``head`` of that is how long it is."""
    turns: list[Message] = []
    said: list[str] = []
    for message in messages:
        if message["role"] == "system":
            said.append(message["content"])
        elif said and message["role"] == "user":
            head = SEPARATOR.join([*said, ""])
            turns.append({**message, "content": head + message["content"], "head": len(head.replace(CUT, ""))})
            said = []
        else:
            turns += map(_from_system, said)
            said = []
            turns.append(message)
    return [*turns, *map(_from_system, said)]


def _from_system(text: str) -> Message:
    return {"role": "user", "content": text, "head": len(text.replace(CUT, ""))}


def _described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Messages with the tools described in the system prompt."""
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    text = f"{first['content']}{SEPARATOR}{describe(tools)}" if first else describe(tools)
    return [{"role": "system", "content": text}, *messages[1 if first else 0 :]]


def _with_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Messages behind a context with the tools described before the first that a user says, so never between what the context
    ends in and its answer or results."""
    says = [i for i, message in enumerate(messages) if message["role"] in ("system", "user")]
    at = says[0] if says else len(messages)
    return [*messages[:at], {"role": "system", "content": describe(tools)}, *messages[at:]]


def _lead(role: str, system: str = "", end: str = "") -> list[Message]:
    """The shortest conversation that ends in a role, behind a system prompt, and in a text that goes on with ``end``."""
    text = f"a{end}"
    before = _system(system or None)
    if role == "system":
        return [{"role": "system", "content": f"{system or 'a'}{end}"}]
    if role == "assistant":
        return [*before, {"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    if role == "tool":
        call = _call("a", {})
        return [*before, {"role": "user", "content": "a"}, call, {"role": "tool", "content": text, "tool_call_id": None}]
    return [*before, {"role": "user", "content": text}]


def _call(name: str, arguments: Mapping[str, Any], call_id: str | None = None) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "name": name, "arguments": arguments}]}
