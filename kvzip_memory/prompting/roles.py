"""Which turns a chat template can show, and messages made into turns of that kind.

Tools, calls and their results are rendered by the template where it knows them. Where it does not they are put in plain
turns (:func:`~kvzip_memory.prompting.tools.in_plain_turns`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvzip_memory.prompting.frames import CUT, SEPARATOR, enclosed
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.stand_ins import a_call
from kvzip_memory.prompting.template import ChatTemplate
from kvzip_memory.prompting.tools import Tool, described, in_plain_turns, results_in_order


class Roles:
    """Asks a template which turns it shows, once, and makes messages into such turns.

    Args:
        template: the model's own.
        calls: whether its calls are written in a form that we know.

    Attributes:
        knows_tools: whether the template renders tools, calls and results.
        one_call: whether it shows no more than one call in an answer.
        moves_system: whether it puts the system's text before what the user says last, wherever that stands.
    """

    def __init__(self, template: ChatTemplate, calls: bool) -> None:
        user, answer, system = ({"role": role, "content": "a"} for role in ("user", "assistant", "system"))
        result = {"role": "tool", "content": "d", "tool_call_id": "b"}
        self._frames_in_words = template.frames_in_words
        self._merges = not template.shows([user, user])
        self.knows_tools = calls and template.shows(
            [user, a_call("probe_tool", {"probe_key": "probe value"}, "b"), result],
            [{"type": "function", "function": {"name": "probe_tool", "description": "probe it", "parameters": {}}}],
            ["probe_key", "probe value", "probe it"],
        )
        two = [{"id": i, "name": "probe_tool", "arguments": {"a": i}} for i in "bc"]
        both: list[Message] = [{"role": "assistant", "content": "", "tool_calls": two}, result, {**result, "tool_call_id": "c"}]
        self.one_call = self.knows_tools and not template.shows([user, *both])
        self._knows_system = template.shows([system, user])
        self._knows_late_system = self._knows_system and template.shows([system, system, user, answer, system, user])
        self._greets = template.shows([answer, user])
        talk = [user, answer, user]
        self.moves_system = self._knows_system and template.shows(talk) and not template.shows([system, *talk])

    def turns(self, messages: Sequence[Message], tools: Sequence[Tool] = (), moves: bool = False) -> list[Message]:
        """Messages as the template can take them. ``moves``: a system prompt may be shown behind other turns."""
        turns: list[Message] = results_in_order(messages, self.one_call)
        if tools and not self.knows_tools:
            turns = described(turns, tools)
        if not self._knows_late_system:
            said = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
            first = turns[: said if self._knows_system else 0]
            joined = [{"role": "system", "content": SEPARATOR.join(turn["content"] for turn in first)}] if first else []
            turns = [*joined, *_in_user_turns(turns[len(first) :])]
        turns = self._with_results(turns)
        if self.moves_system and not moves:
            turns = _in_user_turns(turns)
        said = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        if not self._greets and turns[said:] and turns[said]["role"] == "assistant":
            turns.insert(said, {"role": "user", "content": ""})
        return _merged(turns) if self._merges else turns

    def turns_behind(self, messages: Sequence[Message]) -> list[Message]:
        """Messages behind a context as turns. There is no place for a system prompt any more."""
        turns = self._with_results(results_in_order(_in_user_turns(messages), self.one_call))
        return _merged(turns) if self._merges else turns

    def joins(self, turns: Sequence[Message]) -> bool:
        """Whether a question joins the last turn: a strict template has no second user's turn behind the first."""
        return self._merges and turns[-1]["role"] == "user"

    def shown_system(self, turns: Sequence[Message]) -> str:
        """The system prompt that the template shows in front, and may look at."""
        return turns[0]["content"].replace(CUT, "") if turns[0]["role"] == "system" and not self.moves_system else ""

    def _with_results(self, turns: list[Message]) -> list[Message]:
        """Turns with results as the template can show them, in frames that they cannot end."""
        if not self.knows_tools:
            return in_plain_turns(turns)
        if self._frames_in_words:
            return [{**turn, "content": enclosed(turn["content"])} if turn["role"] == "tool" else turn for turn in turns]
        return turns


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
