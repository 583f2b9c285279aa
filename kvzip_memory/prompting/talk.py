"""What is said over a context: the turns of a session, and the ids of them that its tail holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, chain

from kvzip_memory.context import CompressedContext
from kvzip_memory.errors import InputError, WindowError
from kvzip_memory.prompting.call_reader import read_calls
from kvzip_memory.prompting.encoding import common
from kvzip_memory.prompting.frames import CUT
from kvzip_memory.prompting.messages import Message, as_messages
from kvzip_memory.prompting.prompt import Prompt
from kvzip_memory.prompting.prompts import PromptBuilder
from kvzip_memory.prompting.tools import Tool

# Any question, and text that no prompt begins with.
_ANY: Message = {"role": "user", "content": "0"}
_UNKNOWN = "\0"


@dataclass(frozen=True)
class Said:
    """A turn: what was asked, what was answered, and how the model wrote that, with its reasoning."""

    asked: tuple[Message, ...]
    answer: Message
    written: str


@dataclass(frozen=True)
class Asked:
    """A question: its ids go behind the first ``start`` of the talk's.

    ``messages`` is None for a question that was given as ids; if they ``repeat`` the context, what comes behind it is looked for when
    another question comes.
    """

    start: int
    ids: list[int]
    messages: tuple[Message, ...] | None = None
    text: str = ""
    ends: tuple[int, ...] = ()
    repeats: bool = False


class Talk:
    """The turns of one session. Nothing here is safe for threads.

    A template may show earlier answers otherwise than they were generated: without their reasoning, without white space. Then the
    next question goes behind what is still the same, and the rest is read again, as the model was trained to read it.

    Attributes:
        ids: all that was said; an answer's last token may not have been fed to the model yet.
        ends: where in them each turn ends.
    """

    def __init__(self, prompts: PromptBuilder, context: CompressedContext | None) -> None:
        self._prompts, self._context = prompts, context
        self._recipe = context.recipe if context else None
        self._read = context.token_ids.tolist() if context else []
        self.ids: list[int] = []
        self.ends: list[int] = []
        self._said: list[Said] | None = []  # None: not known as messages
        self._told = ""  # all that was said as text
        self._repeats = False  # whether the first question still holds what the context does
        self._tools: Sequence[Tool] | None = None

    def copy(self) -> Talk:
        """The same turns, to go on independently."""
        twin = Talk(self._prompts, self._context)
        twin.ids, twin.ends, twin._told, twin._tools = [*self.ids], [*self.ends], self._told, self._tools
        twin._repeats = self._repeats
        twin._said = None if self._said is None else [*self._said]
        return twin

    def ask(self, question: str | Sequence[Message], tools: Sequence[Tool] | None, behind: bool, held: int, thinks: bool = True) -> Asked:
        """A question, of which ``held`` of the ids before it are in the tail. ``thinks``: see :meth:`PromptBuilder.question`.

        Raises:
            InputError: nothing to ask; messages or tools after the first question.
        """
        prompts = self._prompts
        if self.ends:
            if not isinstance(question, str) or tools:
                raise InputError("messages and tools can only be the first question of a session; go on with strings")
            return self._next(tuple(as_messages(question)), held, thinks)
        self._tools = tools
        if self._context is not None and not isinstance(question, str) and not behind:
            with suppress(InputError):  # what does not stand alone does not repeat the context
                ids = prompts.question(None, question, tools, fixed=True, thinks=thinks)
                if len(ids) > len(self._read) and ids[: len(self._read)] == self._read:
                    return Asked(0, ids[len(self._read) :], tuple(as_messages(question)), repeats=True)
        layout = prompts.rendered(self._recipe, question, tools, fixed=True, thinks=thinks)
        messages = tuple(as_messages(question)) if question else ()
        return Asked(0, prompts.ids(self._recipe, layout), messages, layout.text)

    def _next(self, asked: tuple[Message, ...], held: int, thinks: bool) -> Asked:
        prompts = self._prompts
        self._look_behind()
        if self._said is None:
            return self._behind_all(asked, held)
        before = chain.from_iterable([*_unmarked(said.asked), _marked(said.answer)] for said in self._said)
        messages = [*before, *_unmarked(asked)]
        try:
            layout = prompts.rendered(self._recipe, messages, self._tools, fixed=True, thinks=thinks)
        except WindowError:
            raise
        except InputError:  # a template that takes no such turns
            return self._behind_all(asked, held)
        shown = prompts.unspelled(layout.text)
        if shown.startswith(self._told):  # as it was generated
            more = prompts.ids_behind(layout.text, len(self._told))
            return Asked(held, [*self.ids[held:], *more], asked, layout.text, tuple(self.ends))
        pieces = prompts.pieces(self._recipe, layout)
        ids = [*chain.from_iterable(pieces)]
        ends = tuple(accumulate(map(len, pieces[:-1])))
        start = min(common(ids, self.ids[:held]), len(ids) - 1)
        return Asked(start, ids[start:], asked, layout.text, ends)

    def _behind_all(self, asked: Sequence[Message], held: int) -> Asked:
        """A question behind what was said so far, whatever that is."""
        recipe, prompts = self._recipe or self._prompts.free_recipe(), self._prompts
        text = prompts.text_ids(asked[0]["content"])
        return Asked(held, [*self.ids[held:], *recipe.next_turn, *text, *recipe.closing])

    def answered(self, asked: Asked, ids: Sequence[int], written: str, content: str, reasoning: str) -> None:
        """A question was answered. ``written`` is what the ids say, ``content`` that without its reasoning."""
        self.ids = [*self.ids[: asked.start], *asked.ids, *ids]
        self.ends = [*(asked.ends or self.ends), len(self.ids)]
        if asked.messages is None or self._said is None or (self._tools and read_calls(content, self._prompts.form)[1]):
            self._said = None  # calls have no results in a session: they stay as they were generated
            return
        answer: dict[str, object] = {"role": "assistant", "content": content}
        if reasoning:
            answer["reasoning"] = reasoning
        self._said.append(Said(asked.messages, answer, written))
        self._told = self._prompts.unspelled(asked.text) + written
        self._repeats = asked.repeats

    def _look_behind(self) -> None:
        """Leave out of the first question what it repeats of the context, once another one comes."""
        if not self._repeats or not self._said:
            return
        self._repeats, [first] = False, self._said
        try:
            rest = self._prompts.behind(self._read, first.asked, self._tools)
            if rest is None:  # the context does not end between two messages
                self._said = None
                return
            text = self._prompts.rendered(self._recipe, rest, self._tools).text
        except InputError:  # a template that takes no such turns
            self._said = None
            return
        self._said = [replace(first, asked=tuple(rest))]
        self._told = self._prompts.unspelled(text) + first.written

    def settle(self, held: int) -> int:
        """Read the turns as later ones will: without reasoning. How many of the ``held`` ids are still the same."""
        asked = self._next((_ANY,), held, thinks=True)
        if self._said is None or asked.ends == tuple(self.ends) or not asked.ends:
            return held
        self.ids = [*self.ids[: asked.start], *asked.ids][: asked.ends[-1]]
        self.ends = [*asked.ends]
        self._said = [replace(said, written=str(said.answer["content"])) for said in self._said]
        self._told = _UNKNOWN
        return min(asked.start, len(self.ids))

    def prompt(self, turns: int) -> Prompt:
        """The first turns as what a context is made of."""
        first = self._said[0].asked if self._said else ()
        head = self._prompts.head(first, self._tools) if first and self._context is None else 0
        return self._prompts.folded(self._context, self.ids[: self.ends[turns - 1]], head, self._tools)

    def rest(self, context: CompressedContext, turns: int) -> Talk:
        """The talk that goes on over a context of its first turns."""
        rest = Talk(self._prompts, context)
        cut = self.ends[turns - 1]
        rest.ids, rest.ends, rest._tools = self.ids[cut:], [end - cut for end in self.ends[turns:]], self._tools
        rest._said = None if self._said is None else self._said[turns:]
        if rest._said:
            *before, last = rest._said
            messages = [*chain.from_iterable([*said.asked, said.answer] for said in before), *last.asked]
            try:
                rest._told = rest._prompts.unspelled(rest._prompts.rendered(rest._recipe, messages, self._tools).text) + last.written
            except InputError:  # a template that takes no such turns
                rest._said = None
        return rest


def _unmarked(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": message["content"].replace(CUT, "")} for message in messages]


def _marked(message: Message) -> Message:
    return {**message, "content": message["content"].replace(CUT, "") + CUT}
