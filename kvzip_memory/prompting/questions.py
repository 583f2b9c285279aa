"""What follows a context, or stands alone: questions, and conversations that end with one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from kvzip_memory.context import Recipe
from kvzip_memory.errors import InputError
from kvzip_memory.prompting.frames import CUT
from kvzip_memory.prompting.layouts import Layouts, check_follows
from kvzip_memory.prompting.messages import Message, as_message, as_messages, says_something
from kvzip_memory.prompting.prompt import digest_of
from kvzip_memory.prompting.stand_ins import ASKED
from kvzip_memory.prompting.template import Layout
from kvzip_memory.prompting.tools import Tool, checked_tools, with_tools

#: Tools of more characters for each token of the window are described before a grammar is made of them.
_MANY = 8


class Questions:
    """Lays questions out, and makes ids of them."""

    def __init__(self, layouts: Layouts) -> None:
        self._layouts, self._roles, self._window, self._encoder = layouts, layouts.roles, layouts.window, layouts.encoder

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
            fixed: on its own, so that it begins with the ids of :meth:`Prefixes.conversation`, where the template would let the system
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
        """Ids of a rendered question. On its own, those of :meth:`Prefixes.until_mark` come first if there is a mark."""
        self._window.check(layout.text)
        if recipe is not None:
            return self._encoder.continued(layout.text)
        if not layout.at:
            return self._encoder.ids(layout.text)
        settled, _ = self._layouts.cut(layout.text, layout.at[-1], apart=True)
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
            self._window.check_messages(messages)
            if messages[-1]["role"] not in ("user", "tool") or not says_something(messages[-1]):
                raise InputError(f"the last message is from {messages[-1]['role']!r} or empty; an answer follows what a user says")
        layout = self._layouts.alone(messages, tools, fixed) if recipe is None else self._following(recipe, messages, tools)
        if thinks or not self._layouts.template.opens_thought(layout.text):
            return layout
        assert self._layouts.template.thought is not None
        closed = f"\n\n{self._layouts.template.thought[1]}\n\n"
        return replace(layout, text=layout.text.rstrip() + self._encoder.spell(closed))

    def _following(self, recipe: Recipe, messages: Sequence[Message], tools: Sequence[Tool]) -> Layout:
        """A prompt behind a context. Places: its marks."""
        check_follows(recipe, messages)
        if tools and digest_of([*tools]) != recipe.tools:
            if self._roles.knows_tools:
                turns = self._roles.turns_behind(messages)
                layout = self._layouts.behind(recipe, turns, tools)
                if layout.text != self._layouts.behind(recipe, turns).text:
                    return layout  # the template puts tools near the end
            messages = with_tools(messages, tools)
        return self._layouts.behind(recipe, self._roles.turns_behind(messages))

    def pieces(self, recipe: Recipe | None, layout: Layout) -> list[list[int]]:
        """Ids of a rendered conversation, cut at its marks."""
        self._window.check(layout.text)
        ends = [*layout.at, len(layout.text)]
        texts = [layout.text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return [self._encoder.ids(text) if recipe is None and not n else self._encoder.continued(text) for n, text in enumerate(texts)]

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
            return len(self._encoder.ids(self._layouts.alone(said, checked_tools(tools), fixed=False).text))
        except InputError:
            return sum(len(self.text_ids(turn["content"])) for turn in said)

    def check_tools(self, tools: Sequence[Tool]) -> None:
        """Refuse tools that have more tokens than the window, before a grammar is made of them.

        Raises:
            WindowError: they have.
        """
        window = self._window.tokens
        if window is not None and len(json.dumps(tools, default=str)) > _MANY * window:
            self._window.check(self._layouts.alone([ASKED], tools, fixed=False).text)

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text inside of a prompt. What it spells of control tokens is text."""
        return self._encoder.continued(text.replace(CUT, ""))
