"""From sources and questions to token ids. Templates are rendered around marks and cut; texts are put in as ids.

The chat template is the model's own. It is rendered with a mark in the place of every text and cut at the marks, so
that template and texts are tokenised apart: control tokens come from the template only, and a text that spells one
stays text. What a context's prefix needs afterwards (:class:`~kvzip_memory.context.Recipe`) is cut out in the same
go and kept as ids.

Tools, calls and their results are rendered by the template too, where it knows them. Where it does not they are put in
plain turns (:func:`~kvzip_memory.tools.in_plain_turns`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from kvzip_memory.context import CompressedContext, Recipe, Source
from kvzip_memory.errors import InputError
from kvzip_memory.sources import CUT, SEPARATOR, Document, Message, as_message, as_messages, header
from kvzip_memory.tools import FORMS, Tool, checked_tools, describe, form_of, in_plain_turns, results_in_order

#: Used when a tokenizer has no chat template: plain text, the question on a line of its own, then ``Answer:``.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}{{ message['content'] }}\nAnswer:"
    "{% else %} {{ message['content'] }}\n\n{% endif %}{% endfor %}"
)

# Templates that print today's date would give another prefix, and so another key, every day. They get this one, by the
# variable some of them read and by a macro in the place of transformers' function.
_DATE = "26 Jul 2024"
_STRFTIME = "".join(
    f" | replace('{code}', '{text}')"
    for code, text in {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"}.items()
)
_PINNED_CLOCK = "{% macro strftime_now(format) %}{{ format" + _STRFTIME + " }}{% endmacro %}"


# What stands in a rendered template for a message's text, and for a string inside a tool or a call.
_MARK = re.compile(r"\[\[kvzip (text|leaf) (\d+)\]\]")
_IDENTIFIER = re.compile(r"[A-Za-z_$][\w$-]*")


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
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str = PLAIN_TEMPLATE if tokenizer.chat_template is None else tokenizer.get_chat_template()
        if "strftime_now" in self.template:
            self.template = _PINNED_CLOCK + self.template
        self._kwargs: dict[str, Any] = {"date_string": _DATE, **(template_kwargs or {})}
        if tokenizer.chat_template is None:
            first = tokenizer("a").input_ids[:1]
            adds_bos = bool(first) and first[0] == tokenizer.bos_token_id
            self._kwargs["bos_token"] = tokenizer.bos_token if adds_bos else ""
        added = tokenizer.added_tokens_decoder
        # Special tokens, and the template's own tags (such as <think>) even where they are not flagged special.
        control = {
            i: token.content
            for i, token in added.items()
            if token.special or (len(token.content.strip()) > 2 and token.content in self.template)
        }
        self.control_ids = frozenset(control) | frozenset(tokenizer.all_special_ids)
        literals = sorted({*control.values(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._literals = re.compile("|".join(map(re.escape, literals))) if literals else None
        user = {"role": "user", "content": "a"}
        self._merges = not self._renders([user, user])
        form = form_of(self.template)
        self.form = form or FORMS["hermes"]
        spelled = "".join([self.form.begin, self.form.open, self.form.close, self.form.end, self.form.prefix or ""])
        #: Special tokens that calls are written with; they show in an answer's text.
        self.call_ids = frozenset(i for i, token in added.items() if token.special and token.content in spelled)
        self._knows_tools = form is not None and self._renders(
            [user, _call("probe_tool", {"a": "b c"}), {"role": "tool", "content": "d", "tool_call_id": None}],
            [{"type": "function", "function": {"name": "probe_tool", "description": "e f", "parameters": {}}}],
        )
        calls = [{"id": i, "name": "probe_tool", "arguments": {"a": i}} for i in "bc"]
        results = [{"role": "tool", "content": "d", "tool_call_id": i} for i in "bc"]
        #: Whether the template shows no more than one call in an answer.
        self.one_call = self._knows_tools and not self._renders([user, {"role": "assistant", "content": "", "tool_calls": calls}, *results])
        system, answer = {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}
        self._knows_system = self._renders([system, user])
        # Some templates put the system's text before what the user says last, wherever that stands.
        talk = [user, answer, user]
        self._moves_system = self._knows_system and self._renders(talk) and not self._renders([system, *talk])

    # -- prefixes ------------------------------------------------------------------------------------------------

    def documents(self, documents: Sequence[Document], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """The prefix of documents a user shows before asking. Several documents get a visible header each.

        ``keep`` are strings whose tokens are never evicted, wherever they occur in the documents.
        """
        messages = [*_system(system), {"role": "user", "content": ""}]
        pieces, _ = self._laid_out(messages)
        ids: list[int] = []
        for piece, message in zip(pieces, messages[:-1], strict=False):
            ids += piece + self.text_ids(message["content"])
        ids += pieces[-2]
        protected, sources = len(ids), []
        for number, document in enumerate(documents, 1):
            name = document.name or f"document {number}"
            if len(documents) > 1:
                ids += self.text_ids(header(number, name))
            start = len(ids)
            ids += self.text_ids(document.text)
            sources.append(Source(name, _storable(document.metadata or {}), start, len(ids)))
        recipe = Recipe((), SEPARATOR, tuple(pieces[-1]), self._next_turn(messages))
        names = [document.name if len(documents) > 1 else None for document in documents]
        texts = [document.text for document in documents]
        spans = self._kept_spans(texts, [source.start for source in sources], keep)
        return Prompt(tuple(ids), protected, recipe, tuple(sources), spans, _digest([names, texts]), _digest(system))

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
        if messages[-1].get("tool_calls"):
            raise InputError("the conversation ends in tool calls without their results; add the results or end before the calls")
        turns = self._turns(messages, tools)
        joins = self._merges and turns[-1]["role"] == "user"  # a strict template has no second user's turn behind the first
        whole = turns if joins else [*turns, {"role": "user", "content": ""}]
        pieces, texts = self._laid_out(whole)
        shown = None
        if tools:
            with_tools = (pieces, texts) if not self._knows_tools else self._laid_out(whole, tools)
            if not self._knows_tools or with_tools[0][: len(turns)] != pieces[: len(turns)]:
                (pieces, texts), shown = with_tools, _digest([*tools])
        ids: list[int] = []
        protected, starts = None, []
        for turn, piece, text in zip(turns, pieces, texts, strict=False):
            ids += piece
            if protected is None and turn["role"] != "system":
                protected = len(ids)
            starts.append(len(ids))
            ids += self.text_ids(text)
        recipe = _recipe_behind(turns[-1]["role"], pieces, joins, self._next_turn(turns), shown)
        spans = self._kept_spans(texts[: len(turns)], starts, keep)
        said = _digest([_said(message) for message in messages[0 if system is None else 1 :]])
        return Prompt(tuple(ids), len(ids) if protected is None else protected, recipe, (), spans, said, _digest(system))

    def more_documents(self, context: CompressedContext, documents: Sequence[Document], keep: Sequence[str] = ()) -> Prompt:
        """The prefix of a context of documents and further ones, each with a header. ``keep`` may name their strings only.

        Raises:
            InputError: the context goes on after its documents.
        """
        if not context.sources or context.sources[-1].end != context.n_tokens:
            raise InputError("documents cannot follow a conversation; extend it with messages, or put the text into one")
        ids, sources = context.token_ids.tolist(), [*context.sources]
        for number, document in enumerate(documents, len(sources) + 1):
            name = document.name or f"document {number}"
            ids += self.text_ids(header(number, name))
            sources.append(Source(name, _storable(document.metadata or {}), len(ids), len(ids) + len(text := self.text_ids(document.text))))
            ids += text
        added = sources[len(context.sources) :]
        spans = self._kept_spans([document.text for document in documents], [source.start for source in added], keep)
        return self._grown(context, ids, context.recipe, spans, tuple(sources))

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
        if not behind and (whole := self._repeating(context, messages, keep, tools)):
            if len(whole.token_ids) > n:
                spans = tuple(span for span in whole.keep if span[0] >= n)
                return self._grown(context, whole.token_ids, whole.recipe, spans, context.sources)
            messages = []
        if not messages or not any(message["content"].strip() or message.get("tool_calls") for message in messages):
            raise InputError("these messages add nothing to the context")
        if messages[-1].get("tool_calls"):
            raise InputError("the conversation ends in tool calls without their results; add the results or end before the calls")
        if messages[0]["role"] == context.recipe.role == "assistant":
            raise InputError("the first message after a context is from 'assistant', and so is the last one in it")
        shown = context.recipe.tools
        if tools and _digest([*tools]) != shown and not self._ends_in_tools(context.recipe, messages, tools):
            shown, messages = _digest([*tools]), _with_tools(messages, tools)
        turns = self._behind_turns(messages)
        joins = self._merges and turns[-1]["role"] == "user"
        pieces, texts = self._behind(context.recipe, turns if joins else [*turns, {"role": "user", "content": ""}])
        ids, starts = context.token_ids.tolist(), []
        said = texts if joins else texts[:-1]
        for piece, text in zip(pieces, said, strict=False):
            ids += piece
            starts.append(len(ids))
            ids += self.text_ids(text)
        recipe = _recipe_behind(turns[-1]["role"], pieces, joins, context.recipe.next_turn, shown)
        return self._grown(context, ids, recipe, self._kept_spans(said, starts, keep), context.sources)

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
        turns = self._behind_turns([*messages, {"role": "user", "content": "a"}])
        return self._knows_tools and self._behind(recipe, turns, tools) != self._behind(recipe, turns)

    def folded(self, context: CompressedContext | None, ids: Sequence[int], protected: int) -> Prompt:
        """The prefix of a context, or of none, and the ids of turns behind it that end in an answer's text."""
        before = self.free_recipe() if context is None else context.recipe
        recipe = replace(before, opening=before.next_turn, separator="", role="assistant")
        if context is not None:
            return self._grown(context, [*context.token_ids.tolist(), *ids], recipe, (), context.sources)
        return Prompt(tuple(ids), protected, recipe, (), (), _digest([None, list(ids)]), None)

    def _grown(
        self,
        context: CompressedContext,
        ids: Sequence[int],
        recipe: Recipe,
        keep: tuple[tuple[int, int], ...],
        sources: tuple[Source, ...],
    ) -> Prompt:
        text = _digest([context.identity["text"], list(ids[context.n_tokens :])])
        return Prompt(tuple(ids), context.protected, recipe, sources, keep, text, context.identity["system"])

    def _kept_spans(self, texts: Sequence[str], starts: Sequence[int], keep: Sequence[str]) -> tuple[tuple[int, int], ...]:
        """Token spans of every occurrence of every string of ``keep`` in texts whose ids start at ``starts``."""
        spans = []
        for wanted in keep:
            if not wanted or not any(wanted in text for text in texts):
                raise InputError(f"keep: {wanted!r} does not occur in the text; give strings as they are spelled there")
        for text, first in zip(texts, starts, strict=True) if keep else ():
            offsets = self.offsets(text)
            for wanted in keep:
                for found in re.finditer(re.escape(wanted), text):
                    tokens = [i for i, (start, end) in enumerate(offsets) if start < found.end() and end > found.start()]
                    spans.append((first + tokens[0], first + tokens[-1] + 1))
        return tuple(sorted(set(spans)))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` of each of the text's ids.

        Raises:
            InputError: a slow tokenizer, which does not know them.
        """
        offsets: list[tuple[int, int]] = []
        before = 0
        for part in self._harmless(text):
            try:
                encoded = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            except NotImplementedError:
                raise InputError("this needs a tokenizer that knows its tokens' places in the text (a fast one)") from None
            offsets += [(before + start, before + end) for start, end in encoded.offset_mapping]
            before += len(part)
        return offsets

    def _next_turn(self, messages: Sequence[Message]) -> tuple[int, ...]:
        turns: list[Message] = [*messages]
        if turns[-1]["role"] != "user":
            turns.append({"role": "user", "content": ""})
        pieces, _ = self._laid_out([*turns, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}])
        return tuple(pieces[-2])

    # -- what follows --------------------------------------------------------------------------------------------

    def question(self, recipe: Recipe | None, question: str | Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Ids of a question, or of a conversation that ends with one, after a context or (recipe None) on its own.

        After a context a system message cannot be moved to the front; its text goes before the question it precedes, and so
        does the description of tools that the context was not made with. A context that ends in what a user or a tool
        says can be followed by nothing, ``[]``.

        Raises:
            InputError: nothing to answer, or roles that the template refuses or that cannot follow the context.
        """
        tools = checked_tools(tools)
        messages: list[Message] = []
        if recipe is None or recipe.role == "assistant" or question or isinstance(question, str):
            messages = as_messages(question)
            if messages[-1]["role"] not in ("user", "tool") or not (messages[-1]["content"].strip() or messages[-1]["role"] == "tool"):
                raise InputError(f"the last message is from {messages[-1]['role']!r} or empty; an answer follows what a user says")
        if recipe is None:
            return self._ids(*self._laid_out(self._turns(messages, tools), tools if self._knows_tools else ()))
        if messages and messages[0]["role"] == recipe.role == "assistant":
            raise InputError("the first message after a context is from 'assistant', and so is the last one in it")
        if tools and _digest([*tools]) != recipe.tools:
            if self._knows_tools:
                ids = self._ids(*self._behind(recipe, self._behind_turns(messages), tools))
                if ids != self._ids(*self._behind(recipe, self._behind_turns(messages))):
                    return ids  # the template puts tools near the end
            messages = _with_tools(messages, tools)
        return self._ids(*self._behind(recipe, self._behind_turns(messages)))

    def until_mark(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Prompt | None:
        """The prefix of a prompt up to the last block of text that carries ``cache_control``; None without such a block.

        In the system turn what stands before that block is protected, and it is not.
        """
        messages, tools = as_messages(messages), checked_tools(tools)
        if not any(CUT in message["content"] for message in messages):
            return None
        turns = self._turns(messages, tools)
        pieces, texts = self._laid_out(turns, tools if self._knows_tools else ())
        last = max(i for i, text in enumerate(texts) if CUT in text)
        head, _, block = texts[last].rpartition(CUT)[0].rpartition(CUT)
        first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        protected = len(self._ids(pieces[: first + 1], texts[:first]))
        before = [*self._ids(pieces[: last + 1], texts[:last]), *self.text_ids(head)]
        ids = [*before, *self.text_ids(block)]
        role = turns[last]["role"]
        around, _ = self._laid_out([*_lead(role), {"role": "user", "content": ""}] if role != "user" else _lead(role))
        opening = tuple(around[-2]) if role != "user" else ()
        separator = "" if opening else SEPARATOR
        recipe = Recipe(opening, separator, tuple(around[-1]), self.free_recipe().next_turn, role, _digest([*tools]) if tools else None)
        said = _digest([_said(turn) for turn in turns[:last]] + [head.replace(CUT, ""), block])
        return Prompt(tuple(ids), min(protected, len(before)) if last < first else protected, recipe, (), (), said, None)

    def count(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
        """Tokens of any messages as a prompt, the answer's header included."""
        tools = checked_tools(tools)
        turns = self._turns([turn for message in messages if (turn := as_message(message)) is not None], tools)
        return len(self._ids(*self._laid_out(turns, tools if self._knows_tools else ())))

    def _behind(self, recipe: Recipe, turns: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[list[int]], list[str]]:
        """Pieces and texts, as of :meth:`_laid_out`, of turns behind a context: rendered behind a stand-in that ends in
        the same role, and cut there."""
        lead = _lead(recipe.role)
        joins = bool(recipe.separator and turns and turns[0]["role"] == "user")
        pieces, texts = self._laid_out([*lead, *(turns[1:] if joins else turns)], tools)
        pieces, texts = pieces[len(lead) :], texts[len(lead) :]
        return ([[], *pieces], [recipe.separator + turns[0]["content"], *texts]) if joins else (pieces, texts)

    def _behind_turns(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as turns, system messages as part of the user's turn they precede."""
        turns: list[Message] = []
        said: list[str] = []
        for message in messages:
            if message["role"] == "system":
                said.append(message["content"])
            elif said and message["role"] == "user":
                turns.append({"role": "user", "content": SEPARATOR.join([*said, message["content"]])})
                said = []
            else:
                turns += [{"role": "user", "content": text} for text in said]
                said = []
                turns.append(message)
        return self._turns(turns)

    def head(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
        """How many ids of a question without a context are template head and system prompt."""
        return self.conversation(as_messages(question), tools=tools).protected

    def next_question(self, recipe: Recipe, question: str) -> list[int]:
        """Ids of a later question, after the tokens of the answer before it."""
        as_messages(question)
        return [*recipe.next_turn, *self.text_ids(question), *recipe.closing]

    def free_recipe(self) -> Recipe:
        """The recipe of a session without a context."""
        question = [{"role": "user", "content": ""}]
        (opening, closing), _ = self._laid_out(question)
        return Recipe(tuple(opening), "", tuple(closing), self._next_turn(question))

    # -- pieces --------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text. A control token's spelling inside it is cut, so that no control id comes out."""
        ids: list[int] = []
        for part in self._harmless(text):
            ids += self.tokenizer(part, add_special_tokens=False).input_ids
        if not self.control_ids.isdisjoint(ids):
            found = sorted(self.control_ids.intersection(ids))
            raise InputError(
                f"the tokenizer turns plain text into control tokens {self.tokenizer.convert_ids_to_tokens(found)}; "
                "remove their spelling from the text"
            )
        return ids

    def _harmless(self, text: str) -> list[str]:
        parts = []
        for section in text.split(CUT):
            start = 0
            while self._literals and (found := self._literals.search(section, start)):
                parts.append(section[start : found.start() + 1])
                start = found.start() + 1
            parts.append(section[start:])
        return [part for part in parts if part]

    def _template_ids(self, piece: str) -> list[int]:
        return list(self.tokenizer(piece, add_special_tokens=False).input_ids) if piece else []

    def _turns(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Message]:
        """Messages as the template can take them."""
        turns = results_in_order(messages, self.one_call)
        if not self._knows_tools:
            turns = in_plain_turns(turns, tools, self._knows_system)
        if self._moves_system and [turn["role"] for turn in turns[:2]] == ["system", "user"]:
            turns = [{"role": "user", "content": SEPARATOR.join(turn["content"] for turn in turns[:2])}, *turns[2:]]
        return _merged(turns) if self._merges else turns

    def _ids(self, pieces: Sequence[Sequence[int]], texts: Sequence[str]) -> list[int]:
        ids = list(pieces[0])
        for text, piece in zip(texts, pieces[1:], strict=True):
            ids += [*self.text_ids(text), *piece]
        return ids

    def _laid_out(self, turns: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[list[int]], list[str]]:
        """The template's ids around every turn's text, ``len(turns) + 1`` pieces, and the texts as they go between them."""
        leaves: dict[str, int] = {}
        rest = self._render(turns, tools, leaves)
        strings = list(leaves)
        pieces: list[list[int]] = []
        texts: list[str] = []
        parts: list[tuple[bool, str]] = []  # of the current piece: whether it is text, and it
        start = 0
        for mark in _MARK.finditer(rest):
            kind, number = mark[1], int(mark[2])
            parts.append((False, rest[start : mark.start()]))
            start = mark.end()
            quoted = rest[mark.start() - 1 : mark.start()] == rest[start : start + 1] == '"'
            if kind == "leaf":
                parts.append((True, _escaped(strings[number]) if quoted else strings[number]))
                continue
            while len(texts) < number and turns[len(texts)].get("tool_calls"):  # some templates show calls without the text
                pieces.append([])
                texts.append("")
            if len(texts) != number:
                break
            text = turns[number]["content"]
            texts.append(_escaped(text) if quoted and turns[number]["role"] == "tool" else text)
            pieces.append(self._piece_ids(parts))
            parts = []
        while len(texts) < len(turns) and turns[len(texts)].get("tool_calls"):
            pieces.append([])
            texts.append("")
        if len(texts) != len(turns):
            raise InputError("the model's chat template drops, repeats or reorders messages; pass a plain chat_template")
        return [*pieces, self._piece_ids([*parts, (False, rest[start:])])], texts

    def _render(self, turns: Sequence[Message], tools: Sequence[Tool], leaves: dict[str, int]) -> str:
        """The template's text with marks; ``leaves`` is filled with what the marks inside tools and calls stand for."""
        names = {}
        marked: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            calls = turn.get("tool_calls", ())
            shown = {"role": turn["role"], "content": f"[[kvzip text {number}]]" if turn["content"] or not calls else ""}
            if calls:
                shown["tool_calls"] = []
            for call in calls:
                names[call["id"]] = call_id, name = _call_id(call), call["name"]
                function = {"name": _marked(name, leaves), "arguments": _marked(call["arguments"], leaves)}
                shown["tool_calls"].append({"id": call_id, "type": "function", "function": function})
            if turn["role"] == "tool":
                call_id, name = names.get(turn.get("tool_call_id"), (_call_id({"name": "", "arguments": turn.get("tool_call_id")}), ""))
                shown |= {"tool_call_id": call_id, "name": _marked(name, leaves)}
            marked.append(shown)
        try:
            return self.tokenizer.apply_chat_template(
                marked,
                tools=_marked(list(tools), leaves) or None,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=True,
                **self._kwargs,
            )
        except Exception as error:  # templates raise whatever they like
            roles = [turn["role"] for turn in turns]
            raise InputError(f"the model's chat template does not accept the roles {roles}: {error}") from error

    def _renders(self, turns: Sequence[Message], tools: Sequence[Tool] = ()) -> bool:
        """Whether the template shows all of these turns and tools."""
        leaves: dict[str, int] = {}
        try:
            self._laid_out(turns, tools)
            text = self._render(turns, tools, leaves)
        except InputError:
            return False
        return all(f"[[kvzip leaf {i}]]" in text for i in leaves.values())

    def _piece_ids(self, parts: Sequence[tuple[bool, str]]) -> list[int]:
        """Ids of a piece of template with strings of tools and calls in it.

        Tokenised as one, as the model knows it, unless that would make a control token out of a string.
        """
        joined, control, at = "".join(text for _, text in parts), [], 0
        for is_text, text in parts:
            if not is_text:
                control += [(at + start, at + end) for start, end in self._control_spans(text)]
            at += len(text)
        if self._control_spans(joined) == control:
            return self._template_ids(joined)
        return [i for is_text, text in parts for i in (self.text_ids(text) if is_text else self._template_ids(text))]

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in self._literals.finditer(text)] if self._literals else []


def _recipe_behind(role: str, pieces: Sequence[Sequence[int]], joins: bool, next_turn: tuple[int, ...], tools: str | None) -> Recipe:
    """The recipe of a conversation that ends in a role, from the pieces of it and, unless that ``joins``, an empty user's turn."""
    opening, separator = ((), SEPARATOR) if joins else (tuple(pieces[-2]), "")
    return Recipe(opening, separator, tuple(pieces[-1]), next_turn, role, tools)


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
            merged[-1] = {**turn, "content": SEPARATOR.join(filter(None, [before["content"], turn["content"]]))}
        else:
            merged.append(turn)
    return merged


def _with_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Messages behind a context with the tools described before the first that a user says, so never between what the context
    ends in and its answer or results."""
    says = [i for i, message in enumerate(messages) if message["role"] in ("system", "user")]
    at = says[0] if says else len(messages)
    return [*messages[:at], {"role": "system", "content": describe(tools)}, *messages[at:]]


def _lead(role: str) -> list[Message]:
    """The shortest conversation that ends in a role."""
    if role == "system":
        return [{"role": "system", "content": "a"}]
    turns: list[Message] = [{"role": "user", "content": "a"}]
    if role == "assistant":
        turns.append({"role": "assistant", "content": "a"})
    elif role == "tool":
        turns += [_call("a", {}), {"role": "tool", "content": "a", "tool_call_id": None}]
    return turns


def _call(name: str, arguments: Mapping[str, Any]) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": None, "name": name, "arguments": arguments}]}


def _call_id(call: Mapping[str, Any]) -> str:
    """An id as Mistral's templates want them, made of what is called: the ids of frameworks are random and would be misses."""
    return hashlib.sha256(json.dumps([call["name"], call["arguments"]], default=str).encode()).hexdigest()[:9]


def _marked(value: Any, leaves: dict[str, int]) -> Any:
    """``value`` with a mark for each string that is more than an identifier; templates look at those."""
    if isinstance(value, str):
        if _IDENTIFIER.fullmatch(value):
            return value
        return f"[[kvzip leaf {leaves.setdefault(value, len(leaves))}]]"
    if isinstance(value, Mapping):
        return {_marked(key, leaves): _marked(item, leaves) for key, item in value.items()}
    return [_marked(item, leaves) for item in value] if isinstance(value, list | tuple) else value


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
