"""Grammars for answers that may, must or must not call tools."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.forms import ID, ToolForm
from kvzip_memory.prompting.guidance import Grammar, Guidance
from kvzip_memory.prompting.schemas import guiding, json_rule, one_of_as_any, spelled
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.system.printable import brief

_NAME = '{"name": '
_ID_RULE = "/[a-zA-Z0-9]{9}/"


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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
