"""Calls of tools told from the text of an answer, piece by piece."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from typing import Any

from kvzip_memory.prompting.cleaning import check_nesting
from kvzip_memory.prompting.forms import ID, ToolForm


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call as it is read.

    Attributes:
        index: number of the call in its answer.
        arguments: the next characters of its arguments' JSON.
        id, name: in the first piece of a call only; a call without a name is none that can be made.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class CallReader:
    """Tells calls from text while an answer arrives.

    What is no call in this form, in whole or in part, stays text.
    """

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._held = ""  # may be the beginning of a call
        self._started = False  # something other than whitespace was said
        self._json: _JsonReader | None = None
        self._inside = False  # between the first call and the end
        self._calls = 0

    def push(self, piece: str) -> tuple[str, list[CallDelta]]:
        """The text to show, and pieces of calls."""
        self._held += piece
        shown = ""
        deltas: list[CallDelta] = []
        while self._held:
            if self._json is not None:
                self._held = self._json.push(self._held, deltas)
                if self._json.done:
                    shown += self._json.said
                    self._inside, self._calls = self._inside and not self._json.said, self._calls + 1
                    self._json = None
                continue
            at, ready = self._next_call()
            if not self._inside:
                shown += self._held[:at]
                self._started |= bool(self._held[:at].strip())
            self._held = self._held[at:]
            if not ready:
                break
            self._inside = True
            name, at = self._opened(self._held)
            self._held = self._held[at:]
            self._json = _JsonReader(self._form, self._calls, name)
        return shown, deltas

    def flush(self) -> str:
        """Text that was held back because a call could have begun with it."""
        held, self._held = self._held, ""
        if self._json is not None:
            return self._json.untold
        return "" if self._inside else held

    def _opened(self, text: str) -> tuple[str | None, int]:
        """A call's name, where it is not in the JSON, and where that begins; -1 while it does not."""
        form = self._form
        if not form.named:
            return None, text.find("{")
        marks = form.named.split(ID)
        end = text.find(marks[-1], len(form.trigger))
        name = text[len(form.trigger) : end].partition(marks[0])[0]
        return name, -1 if end < 0 else text.find("{", end + len(marks[-1]))

    def _next_call(self) -> tuple[int, bool]:
        """Where text ends in what is held, and whether a call's JSON begins behind that."""
        held, form = self._held, self._form
        brace = held.find("{")
        if self._inside and not form.named:  # whatever stands between two calls is of no interest
            return (brace, True) if brace >= 0 else (len(held), False)
        if not form.trigger:
            bare = held.strip().removeprefix(form.prefix or "").lstrip()
            if self._started or (bare and not bare.startswith("{") and not (form.prefix or "").startswith(held.strip())):
                return len(held), False
            return 0, bare.startswith("{")
        at = held.find(form.trigger)
        if at >= 0:
            return at, self._opened(held[at:])[1] >= 0
        keep = max((n for n in range(1, len(form.trigger)) if held.endswith(form.trigger[:n])), default=0)
        return len(held) - keep, False


class _JsonReader:
    """One call's JSON, character by character; its arguments are passed on as soon as its name is known."""

    def __init__(self, form: ToolForm, index: int, name: str | None = None) -> None:
        self._form, self._index, self._known = form, index, name
        self._level = 2 if name is None else 1  # of the braces of the arguments
        self._id = f"call_{uuid.uuid4().hex[:24]}"
        self._text = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self._complete = False  # the arguments are
        self._arguments_at: int | None = None  # where the arguments begin
        self.done = False
        self.said = ""  # what turned out to be no call

    def push(self, text: str, deltas: list[CallDelta]) -> str:
        """Takes what belongs to it and gives the rest back."""
        sent = len(self._text)
        for at, char in enumerate(text):
            self._text += char
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
                if self._depth == self._level and self._arguments_at is None and (name := self._known or self._name()):
                    self._arguments_at = sent = len(self._text) - 1
                    deltas.append(CallDelta(self._index, "", self._id, name))
            elif char in "}]":
                self._depth -= 1
                if self._depth == self._level - 1 and self._arguments_at is not None and not self._complete:
                    self._complete = True
                    _append(deltas, CallDelta(self._index, self._text[sent:]))
                if self._depth == 0:
                    self.done = True
                    if self._arguments_at is None:
                        deltas += self._whole()
                    return text[at + 1 :]
        if self._arguments_at is not None and not self._complete and self._text[sent:]:
            _append(deltas, CallDelta(self._index, self._text[sent:]))
        return ""

    @property
    def untold(self) -> str:
        """What has been read and not passed on."""
        return self._text if self._arguments_at is None else ""

    def _name(self) -> str | None:
        """The name, if all that stands before an opening brace is the name and the key of the arguments."""
        try:
            before = json.loads(self._text[:-1] + "null}")
        except (ValueError, RecursionError):
            return None
        keys = {"arguments", "parameters"} & before.keys()
        name = before.get("name")
        return name if isinstance(name, str) and keys and before[keys.pop()] is None else None

    def _whole(self) -> list[CallDelta]:
        """A call whose name came last, or that is none."""
        try:
            call = json.loads(self._text)
        except (ValueError, RecursionError):
            call = {}
        arguments: Any = next((call[key] for key in ("arguments", "parameters") if key in call), {} if self._form.trigger else None)
        if isinstance(call.get("name"), str) and isinstance(arguments, dict):
            return [CallDelta(self._index, json.dumps(arguments, ensure_ascii=False), self._id, call["name"])]
        if not self._form.trigger:
            self.said = self._text
            return []
        return [CallDelta(self._index, self._text, self._id)]


def _append(deltas: list[CallDelta], more: CallDelta) -> None:
    """Frameworks expect one piece of a call at a time."""
    if deltas and deltas[-1].index == more.index:
        deltas[-1] = replace(deltas[-1], arguments=deltas[-1].arguments + more.arguments)
    else:
        deltas.append(more)


def read_calls(text: str, form: ToolForm) -> tuple[str, list[dict[str, Any]]]:
    """A whole answer's text, and its calls as ``id``, ``name`` and ``arguments``; calls that cannot be made are left out."""
    reader = CallReader(form)
    shown, deltas = reader.push(text)
    calls = []
    for delta in deltas:  # one a call, since all of it came at once
        try:
            arguments = json.loads(delta.arguments)
            check_nesting(arguments, "a call's arguments")
        except (ValueError, RecursionError):
            continue
        calls.append({"id": delta.id, "name": delta.name, "arguments": arguments})
    return shown + reader.flush(), [call for call in calls if call["name"]]
