"""Tools in words: how they are described to a model, and its calls and their results told in plain turns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.cleaning import MOST_OF_SCHEMA, check_nesting, cleaned
from kvzip_memory.prompting.frames import SEPARATOR, response
from kvzip_memory.prompting.messages import Message
from kvzip_memory.system.printable import brief

#: A tool as OpenAI's ``{"type": "function", "function": {"name", "description", "parameters"}}``.
Tool = Mapping[str, Any]

# What ends the tags in which tools and calls are told.
_CLOSERS = re.compile("</(?=tool)", re.IGNORECASE)


def checked_tools(tools: Sequence[Tool] | None) -> list[Tool]:
    """Raises:
    InputError: no list of tools, one that is no mapping of OpenAI's form, two of one name, or what is too deep or too much to be described.
    """
    if tools is not None and not isinstance(tools, Sequence):
        raise InputError(f"tools is {brief(tools)}; give a list of tools")
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


def described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Messages with the tools described in the system prompt."""
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    text = f"{first['content']}{SEPARATOR}{describe(tools)}" if first else describe(tools)
    return [{"role": "system", "content": text}, *messages[1 if first else 0 :]]


def with_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Messages behind a context with the tools described before the first that a user says, so never between what the context
    ends in and its answer or results."""
    says = [i for i, message in enumerate(messages) if message["role"] in ("system", "user")]
    at = says[0] if says else len(messages)
    return [*messages[:at], {"role": "system", "content": describe(tools)}, *messages[at:]]


def _framed(value: Any) -> str:
    """JSON that no text in it can end: a closing tag can be spelled within a string only, and there JSON has another way to write it."""
    return _CLOSERS.sub(r"<\\/", json.dumps(value, ensure_ascii=False))
