"""Turns laid out by the template: alone, before a question to come, and behind a context.

A prompt is rendered whole by the model's own template and tokenised whole (:mod:`kvzip_memory.prompting.template`,
:mod:`kvzip_memory.prompting.encoding`), so its ids are those of ``apply_chat_template``. A context is cut from it at a token's end. The
characters before the cut whose token would reach over it stay out of the context and are read with what follows
(:attr:`~kvzip_memory.context.Recipe.tail`), so prefix and question together are the ids of the whole prompt, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

from kvzip_memory.context import Recipe
from kvzip_memory.errors import InputError
from kvzip_memory.prompting.frames import CUT, SEPARATOR
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.roles import Roles
from kvzip_memory.prompting.stand_ins import ASKED, lead
from kvzip_memory.prompting.template import ChatTemplate, Layout, Place
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.prompting.window import Window


class Layouts:
    """Lays turns out by one template.

    Args:
        template: the model's own.
        roles: the turns that it shows.
        window: what is cut must fit into it.

    Attributes:
        template, roles, window: as given.
        encoder: makes ids of what is laid out.
    """

    def __init__(self, template: ChatTemplate, roles: Roles, window: Window) -> None:
        self.template, self.roles, self.window = template, roles, window
        self.encoder = template.encoder

    def alone(self, messages: Sequence[Message], tools: Sequence[Tool], fixed: bool) -> Layout:
        """A prompt without a context. Places: its marks."""
        shown = tools if self.roles.knows_tools else ()
        if self.roles.moves_system and not fixed:
            with suppress(InputError):  # with a result as the last message some templates drop the system prompt
                turns = self.roles.turns(messages, tools, moves=True)
                return self.template.layout(turns, shown, cuts_in(turns), moves=True)
        turns = self.roles.turns(messages, tools)
        return self.template.layout(turns, shown, cuts_in(turns))

    def asked(self, turns: Sequence[Message], joins: bool, tools: Sequence[Tool] = (), start: Place = (0, 0)) -> Layout:
        """Turns and a question to come, which may ``join`` the last one. Places: ``start``, the turns' end, and the question's.

        White space at the end of what it joins is not within the end: without a question a template may trim it.
        """
        said = turns[-1]["content"].replace(CUT, "")
        end = (len(turns) - 1, len(said.rstrip() if joins else said))
        if joins:
            whole = [*turns[:-1], {**turns[-1], "content": f"{said}{SEPARATOR}{ASKED['content']}"}]
            asked = (end[0], len(said) + len(SEPARATOR))
        else:
            whole, asked = [*turns, ASKED], (len(turns), 0)
        return self.template.layout(whole, tools, [start, end, asked, (asked[0], asked[1] + len(ASKED["content"]))])

    def behind(self, recipe: Recipe, turns: Sequence[Message], tools: Sequence[Tool] = (), joins: bool | None = None) -> Layout:
        """What comes behind a context: rendered behind a stand-in that ends in the same role.

        ``joins`` asks for a question to come, with the places of :meth:`asked`; None has none, and the places of its marks.
        """
        settled = recipe.tail.rstrip()
        space = recipe.tail[len(settled) :]  # which the template may trim, by what follows
        told = lead(recipe.role, recipe.system, space)
        place = (len(told) - 1, len(told[-1]["content"]) - len(space))
        if recipe.separator and turns and turns[0]["role"] == "user":
            first = f"{told[-1]['content']}{recipe.separator}{turns[0]['content']}"
            told, turns = [*told[:-1], {**told[-1], "content": first}], turns[1:]
        whole = [*told, *turns]
        asked = joins is not None
        layout = self.asked(whole, bool(joins), tools, place) if asked else self.template.layout(whole, tools, [place, *cuts_in(whole)])
        skip = layout.at[0] - len(settled)
        at = tuple(at - skip for at in layout.at)
        return Layout(settled + layout.text[layout.at[0] :], at if asked else at[1:])

    def ends_in_tools(self, recipe: Recipe, messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
        """Whether the template describes tools near the end of a prompt, not in what comes before the last question."""
        turns = self.roles.turns_behind([*messages, ASKED])
        return self.roles.knows_tools and self.behind(recipe, turns, tools).text != self.behind(recipe, turns).text

    def cut(self, text: str, at: int, continued: bool = False, apart: bool = False) -> tuple[str, str]:
        """A layout's text up to a character, less what is read with what follows, and that.

        ``apart``: whatever follows, so that another question has the same prefix.
        """
        self.window.check(text)
        before, after = text[:at], f"{SEPARATOR}{ASKED['content']}" if apart else text[at:]
        tail = self.encoder.unsettled(before, after, continued)
        return before[: at - len(tail)], tail

    def recipe_behind(self, turns: Sequence[Message], layout: Layout, joins: bool, tail: str) -> Recipe:
        """What follows a conversation, from its layout of :meth:`asked`."""
        _, end, asked, closing = layout.at
        said = turns[-1]["content"].replace(CUT, "")
        opening = () if joins else self.continued(tail + layout.text[end:asked])
        tail += said[len(said.rstrip()) :] if joins else ""
        return Recipe(opening, SEPARATOR if joins else "", self.continued(layout.text[closing:]), (), turns[-1]["role"], tail=tail)

    def free_recipe(self) -> Recipe:
        """The recipe of a session without a context."""
        layout = self.template.layout([ASKED], places=[(0, 0), (0, len(ASKED["content"]))])
        start, end = layout.at
        return Recipe(tuple(self.encoder.ids(layout.text[:start])), "", self.continued(layout.text[end:]), self.next_turn)

    @cached_property
    def next_turn(self) -> tuple[int, ...]:
        """Ids between an answer and the user's next text."""
        answer = {"role": "assistant", "content": "a"}
        layout = self.template.layout([*lead("user"), answer, ASKED], places=[(1, 1), (2, 0)])
        return self.continued(layout.text[slice(*layout.at)])

    def continued(self, text: str) -> tuple[int, ...]:
        """Ids of a text that stands behind others."""
        return tuple(self.encoder.continued(text))


def start_of(turns: Sequence[Message]) -> Place:
    """Where what is said begins, behind the system prompt."""
    number = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns) - 1)
    return number, turns[number].get("head", 0)


def last_block(turns: Sequence[Message]) -> tuple[Place, Place] | None:
    """Where the last block with ``cache_control`` begins and ends, None without one."""
    for number, turn in reversed([*enumerate(turns)]):
        before, cut, _ = turn["content"].rpartition(CUT)
        if cut:
            head = before.rpartition(CUT)[0].replace(CUT, "")
            return (number, len(head)), (number, len(before.replace(CUT, "")))
    return None


def cuts_in(turns: Sequence[Message]) -> list[Place]:
    """Where marks stand in turns."""
    return [
        (number, found.start() - nth * len(CUT))
        for number, turn in enumerate(turns)
        for nth, found in enumerate(re.finditer(re.escape(CUT), turn["content"]))
    ]


def check_ends_said(messages: Sequence[Message]) -> None:
    if messages[-1].get("tool_calls"):
        raise InputError("the conversation ends in tool calls without their results; add the results or end before the calls")


def check_follows(recipe: Recipe, messages: Sequence[Message]) -> None:
    if messages and messages[0]["role"] == recipe.role == "assistant":
        raise InputError("the first message after a context is from 'assistant', and so is the last one in it")
