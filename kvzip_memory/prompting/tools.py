"""Tools: how they are described to a model, how its calls are written, guided and read.

Families of models write calls in forms of their own (:data:`FORMS`). A model whose template knows no tools, or a form that we
do not know, is told Hermes' form in words.
"""

from __future__ import annotations

import json
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.guidance import Grammar, Guidance
from kvzip_memory.prompting.schemas import guiding, json_rule, one_of_as_any, spelled
from kvzip_memory.prompting.sources import MOST_OF_SCHEMA, check_nesting, cleaned, response
from kvzip_memory.system.printable import brief

#: Where a call's name and its id stand in what opens it, in a form whose JSON holds only the arguments.
NAME, ID = "{name}", "{id}"
_ID_RULE = "/[a-zA-Z0-9]{9}/"

#: A tool as OpenAI's ``{"type": "function", "function": {"name", "description", "parameters"}}``.
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class ToolForm:
    """How a family of models writes its calls: ``begin (open JSON close) between (open JSON close) ... end``.

    Attributes:
        name: what users call it.
        begin, open, close, between, end: the texts around the JSON of each call. With :data:`NAME` in ``open`` the JSON is the
            arguments alone.
        arguments: the JSON's key for the arguments, beside ``name``, otherwise.
        prefix: a token that may stand before everything.
    """

    name: str
    begin: str
    open: str
    close: str
    between: str
    end: str
    arguments: str = "arguments"
    prefix: str | None = None

    @property
    def trigger(self) -> str:
        """What tells a call from other text; empty if a call is known by its being JSON."""
        return head.split()[0] if (head := self.head) else ""

    @property
    def head(self) -> str:
        """What stands before the JSON, or the name, of the first call."""
        return self.begin + self.opening

    @property
    def opening(self) -> str:
        return self.open.partition(NAME)[0]

    @property
    def named(self) -> str:
        """What stands between a call's name and its arguments; empty if the JSON holds both."""
        return self.open.partition(NAME)[2]


FORMS = {
    form.name: form
    for form in (
        ToolForm("hermes", "", "<tool_call>\n", "\n</tool_call>", "\n", ""),
        ToolForm("llama3", "", "", "", "; ", "", arguments="parameters", prefix="<|python_tag|>"),
        ToolForm("mistral", "[TOOL_CALLS] [", "", "", ", ", "]"),
        ToolForm("mistral-args", "", f"[TOOL_CALLS]{NAME}[ARGS]", "", "", ""),
        ToolForm("mistral-ids", "", f"[TOOL_CALLS]{NAME}[CALL_ID]{ID}[ARGS]", "", "", ""),
    )
}


def form_of(template: str) -> ToolForm | None:
    """The form in which a chat template writes calls; None if it knows no tools or writes them in a form we do not know."""
    if "[TOOL_CALLS]" in template:
        return FORMS["mistral" if "[ARGS]" not in template else "mistral-ids" if "[CALL_ID]" in template else "mistral-args"]
    if "<tool_call>" in template and "<function=" not in template:
        return FORMS["hermes"]
    if '"parameters": ' in template and "<|eot_id|>" in template:
        return FORMS["llama3"]
    return None


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


def checked_tools(tools: Sequence[Tool] | None) -> list[Tool]:
    """Raises:
    InputError: a tool that is no mapping of OpenAI's form, two of one name, or what is too deep or too much to be described.
    """
    check_nesting(list(tools or ()), "tools", MOST_OF_SCHEMA)
    checked = [cleaned(tool, f"tool {number}") if isinstance(tool, Mapping) else tool for number, tool in enumerate(tools or (), 1)]
    for tool in checked:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f'a tool is {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}, not {brief(tool)}')
    names = [tool["function"]["name"] for tool in checked]
    if len(set(names)) < len(names):
        raise InputError(f"two tools have one name among {brief(names)}; rename one")
    return checked


def describe(tools: Sequence[Tool]) -> str:
    """Text that tells a model which tools there are and how to call them (Hermes' form)."""
    signatures = "\n".join(_framed(tool) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{signatures}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def results_in_order(messages: Sequence[Mapping[str, Any]], one_call: bool = False) -> list[Mapping[str, Any]]:
    """The results of an answer's calls in the order of the calls; frameworks give them as they came, and not all templates show ids.

    With ``one_call`` calls of one answer and their results become answers of a call each. Results without their calls and calls
    without their results, which trimmed and broken off conversations have and many templates refuse, are put in plain text; only calls
    that come last may still get their results.
    """
    turns: list[Mapping[str, Any]] = []
    for are_results, run in groupby(messages, key=lambda message: message["role"] == "tool"):
        group = list(run)
        if not are_results:
            turns += [*(_told(message, message.get("tool_calls", ())) for message in group[:-1]), group[-1]]
            continue
        calls = turns[-1].get("tool_calls", ()) if turns else ()
        if not calls:
            turns += map(_orphan, group)
            continue
        numbers = {call["id"]: number for number, call in enumerate(calls)}
        group.sort(key=lambda message: numbers.get(message.get("tool_call_id"), len(numbers)))
        ids = [message.get("tool_call_id") for message in group]
        if numbers.keys() > set(ids):
            whole = turns.pop()
            turns.append(_told(whole, [call for call in calls if call["id"] not in ids]))
            calls = turns[-1]["tool_calls"]
        if one_call and len(calls) > 1:
            whole = _told(turns.pop(), calls[len(group) :])
            for call, result in zip(calls, group, strict=False):
                turns += [{**whole, "tool_calls": [call]}, result]
                whole = {"role": whole["role"], "content": ""}
            turns += map(_orphan, group[len(calls) :])
        else:
            turns += group
    return turns


def _orphan(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result without its call, as what the user says."""
    return {"role": "user", "content": response(result["content"])}


def _told(message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """An answer with some of its calls as text."""
    if not calls:
        return message
    text = message["content"]
    for call in calls:
        shown = _framed({"name": call["name"], "arguments": call["arguments"]})
        text += f"{chr(10) if text else ''}<tool_call>\n{shown}\n</tool_call>"
    rest = [call for call in message["tool_calls"] if call not in calls]
    told = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**told, "content": text, **({"tool_calls": rest} if rest else {})}


def in_plain_turns(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = (), system: bool = True) -> list[Mapping[str, Any]]:
    """The same conversation for a template that knows only texts: calls and results as tagged JSON, tools in the system turn.

    Where the template knows no ``system`` they are in front of what the user says first.
    """
    turns: list[Mapping[str, Any]] = []
    if tools and not system:
        first = messages[0] if messages and messages[0]["role"] == "user" else None
        turns.append({"role": "user", "content": f"{describe(tools)}\n\n{first['content']}" if first else describe(tools)})
        messages = messages[1 if first else 0 :]
    elif tools:
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        turns.append({"role": "system", "content": f"{first['content']}\n\n{describe(tools)}" if first else describe(tools)})
        messages = messages[1 if first else 0 :]
    before = None
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "tool":
            text = response(text)
            if before == "tool":  # results of one answer's calls share a turn
                text = f"{turns.pop()['content']}\n{text}"
        turns.append({"role": "user", "content": text} if role == "tool" else _told(message, message.get("tool_calls", ())))
        before = role
    return turns


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# What ends the tags in which tools and calls are told.
_CLOSERS = re.compile("</(?=tool)", re.IGNORECASE)


def _framed(value: Any) -> str:
    """JSON that no text in it can end: a closing tag can be spelled within a string only, and there JSON has another way to write it."""
    return _CLOSERS.sub(r"<\\/", _json(value))


_NAME = '{"name": '

# -- guiding -----------------------------------------------------------------------------------------------------


def calls_grammar(
    guidance: Guidance,
    form: ToolForm,
    tools: Sequence[Tool],
    choice: Any = "auto",
    schema: Mapping[str, Any] | None = None,
    parallel: bool | None = None,
) -> Grammar:
    """A grammar for answers that may, must or must not call tools.

    What of a tool's schema cannot guide and only narrows is left out with a warning: the tool validates again.

    Args:
        choice: ``"auto"``, ``"none"``, ``"any"``, ``"required"`` or True, a tool's name, or OpenAI's mapping with one.
        schema: what an answer without calls is; None for any text.
        parallel: whether an answer may hold several calls; None allows them where the model chooses.

    Raises:
        InputError: a choice that is none of these, or names no tool; or no call of a tool can be guided.
    """
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, Mapping):
        choice = (choice.get("function") or choice).get("name")
    choice = "auto" if choice in (None, False) else "any" if choice is True or choice == "required" else choice
    if choice not in ("auto", "any", "none"):
        if choice not in names:
            raise InputError(f"tool_choice is {brief(choice)}; it is 'auto', 'any', 'none' or one of the tools {brief(names)}")
        tools = [tool for tool in tools if tool["function"]["name"] == choice]
    several = parallel if parallel is not None else choice == "auto"
    try:
        return _grammar(guidance, form, tools, choice, schema, several)
    except InputError:
        return _grammar(guidance, form, [_guiding(guidance, tool) for tool in tools], choice, schema, several)


def _guiding(guidance: Guidance, tool: Tool) -> Tool:
    """The tool with what of its schema can guide."""
    function, whole = tool["function"], _parameters(tool)

    def reason(parameters: Mapping[str, Any]) -> str | None:
        try:
            guidance.json(parameters)
        except InputError as error:
            return str(error)
        return None

    if reason(whole) is None:
        return tool
    parameters, names = guiding(whole)
    if (why := reason(parameters)) is not None:
        parameters, names = one_of_as_any(parameters), [*names, "oneOf"]
        if reason(parameters) is not None:
            raise InputError(f"calls of the tool {function['name']!r}: {why}; change its schema, or leave the tool out")
    left = ", ".join(map(repr, names))
    warnings.warn(f"calls of the tool {function['name']!r} are not guided by {left} of its schema; the tool must check that", stacklevel=4)
    return {**tool, "function": {**function, "parameters": parameters}}


def _grammar(
    guidance: Guidance, form: ToolForm, tools: Sequence[Tool], choice: str, schema: Mapping[str, Any] | None, several: bool
) -> Grammar:
    said = "free" if schema is None else "json"
    more = f" ({guidance.literal(form.between + form.opening)} call {guidance.literal(form.close)})*" if several else ""
    rest = f"call {guidance.literal(form.close)}{more} {guidance.literal(form.end)}"
    lines = []
    if choice == "none":
        lines.append(f"start: {said}")
    elif choice != "auto":
        lines.append(f"start: {guidance.literal(form.head)} {rest}")
    elif not form.trigger:
        prefix = f"{guidance.literal(form.prefix)}? " if form.prefix and form.prefix in guidance.added else ""
        if schema is not None:  # one JSON or another: what they begin with is not told apart by a call's spelling
            lines = [f"start: {prefix}({' | '.join(f'c{i}' for i in range(len(tools)))}) | json", f"json: {json_rule(schema)}"]
            lines += [f"c{i}: {json_rule(_call_schema(tool, form))}" for i, tool in enumerate(tools)]
            return guidance.lark("\n".join(lines))
        lines.append(f"start: {prefix}{rest} | {said}")
    else:
        before = "free" if schema is None else ""
        if form.trigger in guidance.added:
            lines.append(f"start: {said} | {before} {guidance.literal(form.head)} {rest}")
        else:
            after = guidance.literal(form.head[len(form.trigger) :])
            lines += [f"start: {said} | head {after} {rest}", f"head[lazy]: {'TEXT?' if before else ''} {json.dumps(form.trigger)}"]
    if said == "json":
        lines.append(f"json: {json_rule(schema or {})}")
    elif form.trigger:
        lines.append(guidance.free_text(form.trigger if choice == "none" or form.trigger in guidance.added else None))
    else:
        lines.append("free: TEXT?\nTEXT: /(?s:[^{].*)/")
    if choice != "none" and form.named:
        behind = f" {_ID_RULE} ".join(map(guidance.literal, form.named.split(ID)))
        one = [f"{json.dumps(tool['function']['name'])} {behind} a{i}" for i, tool in enumerate(tools)]
        lines.append(f"call: {' | '.join(one)}")
    elif choice != "none":
        one = [f"{json.dumps(_json(tool['function']['name']) + f', {_json(form.arguments)}: ')} a{i}" for i, tool in enumerate(tools)]
        lines.append(f"call: {json.dumps(_NAME)} ({' | '.join(one)}) {json.dumps('}')}")
    if choice != "none":
        lines += [f"a{i}: {json_rule(_parameters(tool))}" for i, tool in enumerate(tools)]
    # Text may be cut within a character, which has up to four bytes and so tokens.
    return guidance.lark("\n".join(lines), slack=3 if said == "free" and choice in ("auto", "none") else 0)


def _call_schema(tool: Tool, form: ToolForm) -> Mapping[str, Any]:
    parameters = _parameters(tool)
    definitions = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    called = {"name": {"const": tool["function"]["name"]}, form.arguments: parameters}
    return {"type": "object", "properties": called, "required": [*called], **definitions}


def _parameters(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    parameters = tool["function"].get("parameters") or {"properties": {}}
    if not isinstance(parameters, Mapping):
        raise InputError(f"the parameters of the tool {tool['function']['name']!r} are {brief(parameters)}; they must be a JSON schema")
    kinds = spelled(parameters).get("type", "object")
    if "object" not in ([kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []):
        raise InputError(
            f"the parameters of the tool {tool['function']['name']!r} are of the type {brief(parameters['type'])}; they must be an "
            "'object' that has what the tool takes as its properties"
        )
    if not isinstance(kinds, str):  # arguments are never null
        return {**parameters, "type": "object"}
    if parameters.get("type") in (None, "any") and not {"$ref", "anyOf", "oneOf", "allOf", "const", "enum"} & parameters.keys():
        return {**parameters, "type": "object"}
    return parameters


# -- reading -----------------------------------------------------------------------------------------------------


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
            return [CallDelta(self._index, _json(arguments), self._id, call["name"])]
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
