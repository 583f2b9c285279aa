"""Tools in words: how they are described to a model, and how calls and results are written into a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvzip_memory.errors import InputError

#: A tool as OpenAI's ``{"type": "function", "function": {"name", "description", "parameters"}}``.
Tool = Mapping[str, Any]


def checked_tools(tools: Sequence[Tool] | None) -> list[Tool]:
    """Raises:
    InputError: a tool that is no mapping of OpenAI's form, or two of one name.
    """
    checked = list(tools or ())
    for tool in checked:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f'a tool is {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}, not {str(tool)[:80]!r}')
    names = [tool["function"]["name"] for tool in checked]
    if len(set(names)) < len(names):
        raise InputError(f"two tools have one name among {names}; rename one")
    return checked


def describe(tools: Sequence[Tool]) -> str:
    """Text that tells a model which tools there are and how to call them (Hermes' form)."""
    signatures = "\n".join(_json(tool) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{signatures}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def in_plain_turns(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = ()) -> list[Mapping[str, Any]]:
    """The same conversation for a template that knows only texts: tools in the system turn, calls and results as tagged JSON."""
    turns: list[Mapping[str, Any]] = []
    if tools:
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        turns.append({"role": "system", "content": f"{first['content']}\n\n{describe(tools)}" if first else describe(tools)})
        messages = messages[1 if first else 0 :]
    before = None
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if before == "tool":  # results of one answer's calls share a turn
                text = f"{turns.pop()['content']}\n{text}"
        for call in message.get("tool_calls", ()):
            shown = _json({"name": call["name"], "arguments": call["arguments"]})
            text += f"{chr(10) if text else ''}<tool_call>\n{shown}\n</tool_call>"
        turns.append({"role": "user" if role == "tool" else role, "content": text})
        before = role
    return turns


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
