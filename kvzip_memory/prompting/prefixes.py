"""Prefixes that contexts are built from: of documents, of a conversation, and up to a mark."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from kvzip_memory.context import Recipe
from kvzip_memory.errors import InputError
from kvzip_memory.prompting.documents import Document
from kvzip_memory.prompting.frames import CUT, SEPARATOR
from kvzip_memory.prompting.keeping import kept_spans
from kvzip_memory.prompting.layouts import Layouts, check_ends_said, last_block, start_of
from kvzip_memory.prompting.messages import Message, as_messages, system_messages
from kvzip_memory.prompting.prompt import Prompt, digest_of, what_is_said
from kvzip_memory.prompting.shown import in_one_text, sources_in
from kvzip_memory.prompting.stand_ins import ASKED, lead
from kvzip_memory.prompting.tools import Tool, checked_tools

# A context may end so many tokens before a message does, see `Recipe.tail`.
_NEAR = 8


class Prefixes:
    """Cuts prefixes from what a template lays out."""

    def __init__(self, layouts: Layouts) -> None:
        self._layouts, self._roles, self._window, self._encoder = layouts, layouts.roles, layouts.window, layouts.encoder

    def documents(self, documents: Sequence[Document], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """The prefix of documents a user shows before asking. Several documents get a visible header each.

        ``keep`` are strings whose tokens are never evicted, wherever they occur in the documents.

        Raises:
            InputError: a string to keep that does not occur.
            WindowError: more tokens than the window by far, as for all that follows.
        """
        self._window.check_messages([*system_messages(system), *({"role": "user", "content": document.text} for document in documents)])
        shown, spans = in_one_text(documents)
        turns = self._roles.turns([*system_messages(system), {"role": "user", "content": f"{shown}{SEPARATOR}{ASKED['content']}"}])
        before = turns[-1].get("head", 0)
        ends = [before, *(before + at for span in spans for at in span)]
        layout = self._layouts.template.layout(turns, places=[(len(turns) - 1, at) for at in [*ends, len(turns[-1]["content"])]])
        head, *places, asked = layout.at
        settled, tail = self._layouts.cut(layout.text, places[-1])
        tokens = self._encoder.tokens(settled)
        closing = self._layouts.continued(layout.text[asked:])
        recipe = Recipe((), SEPARATOR, closing, self._layouts.next_turn, tail=tail, system=self._roles.shown_system(turns))
        sources = sources_in(documents, 1, tokens, places)
        names = [document.name if len(documents) > 1 else None for document in documents]
        texts = [document.text for document in documents]
        protected = tokens.before(head)
        kept = kept_spans(self._encoder, keep, texts, f"{settled}{tail}"[head:], tokens, head)
        return Prompt(tuple(tokens.ids), protected, recipe, sources, kept, digest_of([names, texts]), digest_of(system))

    def documents_apart(self, documents: Sequence[Document], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """:meth:`documents` that may stand behind any others: they begin with a blank line, and no token of theirs depends on what follows.

        Raises:
            InputError: as for :meth:`documents`.
        """
        plain, any_text = self.documents(documents, system, keep), self.documents([Document(ASKED["content"])], system)
        head, (shown, spans), at = any_text.token_ids[: any_text.protected], in_one_text(documents), len(SEPARATOR)
        tokens = self._encoder.tokens(f"{SEPARATOR}{shown}", continued=True)
        sources = sources_in(documents, 1, tokens, [at + place for span in spans for place in span], len(head))
        kept = kept_spans(self._encoder, keep, [document.text for document in documents], shown, tokens, at, len(head))
        recipe = replace(plain.recipe, tail="")
        return replace(plain, token_ids=(*head, *tokens.ids), protected=len(head), recipe=recipe, sources=sources, keep=kept)

    def conversation(
        self,
        messages: Sequence[Message],
        system: str | None = None,
        keep: Sequence[str] = (),
        tools: Sequence[Tool] | None = None,
    ) -> Prompt:
        """The prefix of a conversation so far; the next question is the user's next turn. ``keep`` as for documents.

        The ids are those with which :meth:`Questions.question` begins for the same tools, these messages and any that follow.

        Raises:
            InputError: it ends between calls and their results, or in roles that the template refuses.
        """
        messages, tools = [*system_messages(system), *messages], checked_tools(tools)
        self._window.check_messages(messages)
        check_ends_said(messages)
        turns = self._roles.turns(messages, tools)
        joins = self._roles.joins(turns)
        layout = self._layouts.asked(turns, joins, (), start_of(turns))
        shown = None
        if tools:
            described = layout if not self._roles.knows_tools else self._layouts.asked(turns, joins, tools, start_of(turns))
            if not self._roles.knows_tools or described.text[: described.at[1]] != layout.text[: layout.at[1]]:
                layout, shown = described, digest_of([*tools])
        start, end, _, _ = layout.at
        settled, tail = self._layouts.cut(layout.text, end)
        tokens = self._encoder.tokens(settled)
        recipe = self._layouts.recipe_behind(turns, layout, joins, tail)
        recipe = replace(recipe, next_turn=self._layouts.next_turn, tools=shown, system=self._roles.shown_system(turns))
        protected = len(tokens.ids) if all(turn["role"] == "system" for turn in turns) else tokens.before(start)
        kept = kept_spans(self._encoder, keep, [turn["content"] for turn in turns], f"{settled}{tail}"[start:], tokens, start)
        said = digest_of([what_is_said(message) for message in messages[0 if system is None else 1 :]])
        return Prompt(tuple(tokens.ids), protected, recipe, (), kept, said, digest_of(system))

    def until_mark(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Prompt | None:
        """The prefix of a prompt up to the last block of text that carries ``cache_control``; None without such a block.

        In the system turn what stands before that block is protected, and it is not. What follows the block does not matter:
        it may be another question.
        """
        messages, tools = as_messages(messages), checked_tools(tools)
        self._window.check_messages(messages)
        turns = self._roles.turns(messages, tools)
        if (block := last_block(turns)) is None:
            return None
        (last, begin), (_, end) = block
        layout = self._layouts.template.layout(turns, tools if self._roles.knows_tools else (), [start_of(turns), *block])
        settled, tail = self._layouts.cut(layout.text, layout.at[2], apart=True)
        tokens = self._encoder.tokens(settled)
        role = turns[last]["role"]
        recipe = self._layouts.free_recipe()
        opening: tuple[int, ...] = ()
        if role != "user":
            opening = self._layouts.recipe_behind(lead(role), self._layouts.asked(lead(role), False), False, "").opening
        separator, system = SEPARATOR if role == "user" else "", self._roles.shown_system(turns)
        recipe = replace(recipe, opening=opening, separator=separator, role=role, tail=tail, system=system)
        recipe = replace(recipe, tools=digest_of([*tools]) if tools else None)
        text = turns[last]["content"].replace(CUT, "")
        said = digest_of([what_is_said(turn) for turn in turns[:last]] + [text[:begin], text[begin:end]])
        protected = tokens.before(layout.at[0])
        if (last, begin) < start_of(turns):
            protected = min(protected, tokens.before(layout.at[1]))
        return Prompt(tuple(tokens.ids), protected, recipe, (), (), said, None)

    def behind(self, read: Sequence[int], messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[Message] | None:
        """Messages of a conversation that come behind the ids of a context of its beginning; None if that does not end between two."""
        plain: list[Message] = [{**message, "content": message["content"].replace(CUT, "")} for message in messages]
        said = [number for number, message in enumerate(plain) if message["content"]]
        marked = [{**message, "content": message["content"] + (CUT if message["content"] else "")} for message in plain]
        layout = self._layouts.alone(marked, checked_tools(tools), fixed=True)
        tokens = self._encoder.tokens(layout.text)
        for number, at in zip(said, layout.at, strict=True):
            if 0 <= tokens.before(at) - len(read) <= _NEAR:
                with suppress(InputError):  # where no context can end
                    if list(self.conversation(plain[: number + 1], tools=tools).token_ids) == list(read):
                        return plain[number + 1 :]
        return None

    def offsets(self, text: str, alone: bool = True) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` of each of a document's ids, as it lies in a context, ``alone`` or behind another one."""
        if alone:
            turns = [{"role": "user", "content": f"{text}{SEPARATOR}{ASKED['content']}"}]
            layout = self._layouts.template.layout(turns, places=[(0, 0), (0, len(text))])
            start, end = layout.at
            tokens = self._encoder.tokens(self._layouts.cut(layout.text, end)[0])
        else:
            start, end = len(SEPARATOR), len(SEPARATOR) + len(text)
            tokens = self._encoder.tokens(f"{SEPARATOR}{text}{SEPARATOR}", continued=True)
        trimmed = len(text) - (end - start)  # by the template, in front
        first, last = tokens.span(start, end)
        starts, ends = (places[first:last] - start + trimmed for places in (tokens.starts, tokens.ends))
        return [(max(0, start), min(len(text), end)) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def head(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
        """How many ids of a question without a context are template head and system prompt."""
        return self.conversation(as_messages(question), tools=tools).protected
