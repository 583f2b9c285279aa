"""Chat messages in one form: ours, OpenAI's, LangChain's and LlamaIndex's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.blocks import parts_of, words
from kvzip_memory.prompting.cleaning import TooDeep, check_nesting, clean, cleaned, warn_once
from kvzip_memory.system.printable import brief

Message = Mapping[str, Any]

# Roles by their names in all frameworks.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
}


def as_message(item: Any, where: str = "a message") -> Message | None:
    """A message in one form, or None if ``item`` is no message.

    Takes mappings in OpenAI's form and LangChain's and LlamaIndex's messages. Gives a mapping with ``role`` and ``content``
    (a string); an assistant's may have ``tool_calls``, each with ``id``, ``name`` and ``arguments`` (a mapping, or text that is
    no JSON object), and its ``reasoning``; a tool's has the ``tool_call_id`` of the call it answers.

    Of an assistant's blocks what it did not say is left out, and calls that name no tool; a tool's that are no text are given as JSON.

    Raises:
        InputError: a mapping that lacks a role or content, content of a user other than text, or blocks as of :func:`check_nesting`.
    """
    if isinstance(item, Mapping):
        if "role" not in item or not item.keys() & {"content", "blocks", "tool_calls", "function_call"}:
            raise InputError(f"a message is a mapping with 'role' and 'content', not {brief(sorted(map(str, item)))}")
        role, fields = item["role"], item
    else:
        role = _role_of(item)
        if not role or not hasattr(item, "content") or hasattr(item, "page_content") or hasattr(item, "get_content"):
            return None
        names = ("content", "blocks", "tool_calls", "invalid_tool_calls", "function_call", "tool_call_id", "additional_kwargs")
        fields = {name: getattr(item, name, None) for name in (*names, "refusal", "reasoning_content", "reasoning")}
    role = str(getattr(role, "value", role))
    role = _ROLES.get(role, role)
    beside = fields.get("additional_kwargs")
    more = {**(beside if isinstance(beside, Mapping) else {}), **{name: value for name, value in fields.items() if value}}
    in_blocks = isinstance(fields.get("blocks"), list)  # its content is the texts alone, each on a line of its own
    content = fields["blocks"] if in_blocks else fields.get("content")
    for name in ("refusal", "audio", "reasoning_content", "reasoning"):
        check_nesting(more.get(name), where)
    for name in ("images", "audio", "videos"):  # Ollama's, beside the content
        if role in ("system", "user") and more.get(name):
            raise InputError(f"{brief(name)} of {where} are not supported: texts alone are read; send text, such as what they show or say")
    parts = parts_of(content, role, where, lines=in_blocks)
    text = "".join(parts.texts)
    if role == "assistant" and not text:  # OpenAI's, beside the content
        text = clean(words(more.get("refusal")) or words(more.get("audio")), where)
    message: dict[str, Any] = {"role": role, "content": text}
    if role == "assistant":
        told = _listed(fields.get("tool_calls")) + _listed(fields.get("invalid_tool_calls"))
        told = told or parts.calls or _listed(more.get("tool_calls")) or _listed(more.get("function_call"))
        if calls := [made for call in told if (made := _as_call(call, where))]:
            message["tool_calls"] = calls
        thoughts = "\n\n".join(filter(None, parts.thoughts)) or words(more.get("reasoning_content")) or words(more.get("reasoning"))
        if thoughts := clean(thoughts, where):
            message["reasoning"] = thoughts
    if role == "tool":
        message["tool_call_id"] = _id(more.get("tool_call_id"), where)
    return message


def system_messages(system: str | None) -> list[Message]:
    """A system prompt, if any, as messages."""
    return [] if system is None else [{"role": "system", "content": system}]


def _role_of(message: Any) -> Any:
    """Who has said a framework's message. A class that says so counts before a field, which LangChain's take from anybody."""
    kind = str(getattr(message, "type", "")).removesuffix("MessageChunk").lower()
    return kind if kind in _ROLES else getattr(message, "role", None) or kind


def may_bring_contexts(message: Any) -> bool:
    """Whether a framework's message may stand for a context: one of the application or its user, not what a model or a tool has made."""
    role = _role_of(message)
    return _ROLES.get(str(getattr(role, "value", role))) in ("system", "user")


def as_messages(question: Any) -> list[Message]:
    """A question, one message or several as checked messages. A system message that comes last is asked as if the user said it."""
    if isinstance(question, str):
        question = {"role": "user", "content": question}
    items = list(question) if isinstance(question, Sequence) else [question]
    messages = [as_message(item, f"message {number}") for number, item in enumerate(items, 1)]
    if any(message is None for message in messages):
        raise InputError(f"cannot ask a {type(question).__name__}; give a string, or chat messages with 'role' and 'content'")
    if messages and messages[-1]["role"] == "system":  # type: ignore[index]
        messages[-1] = {**messages[-1], "role": "user"}  # type: ignore[dict-item]
    check_messages(messages)  # type: ignore[arg-type]
    return messages  # type: ignore[return-value]


def says_something(message: Message) -> bool:
    """Whether a conversation is another one without it: a tool's empty result is one, too."""
    return bool(message["content"].strip() or message.get("tool_calls") or message["role"] == "tool")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises:
    InputError: no message, an unknown role, or nothing but empty texts.
    """
    if not messages:
        raise InputError("no messages; give at least one from the user")
    for message in messages:
        if message["role"] not in _ROLES.values():
            raise InputError(
                f"message role {brief(message['role'])} is not supported; use one of {', '.join(dict.fromkeys(_ROLES.values()))}"
            )
    if not any(map(says_something, messages)):
        raise InputError("the text is empty; there is nothing to ask or load")


def _as_call(call: Any, where: str) -> dict[str, Any] | None:
    """A call in ours of OpenAI's, LangChain's, LlamaIndex's or another maker's form; None for one that names no tool.

    A model may have written such a one, and an error would end its conversation for good.
    """
    call = call if isinstance(call, Mapping) else getattr(call, "__dict__", {})
    function = next((call[name] for name in ("function", "custom", "toolUse", "functionCall", "function_call") if call.get(name)), call)
    function = function if isinstance(function, Mapping) else getattr(function, "__dict__", {})

    def first(*names: str) -> Any:
        return next((given[name] for given in (call, function) for name in names if given.get(name) is not None), None)

    name, arguments = first("name", "tool_name"), first("arguments", "args", "input", "tool_kwargs")
    if not isinstance(name, str) or not name:
        if name != "" and call.get("type") != "invalid_tool_call":
            warn_once(f"{where}: a tool call without a name is left out", hash(brief(call)))
        return None
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # what a model has written may be no JSON, or too deep; that is kept as it is
            parsed = json.loads(arguments or "{}")
            arguments = cleaned(parsed, where) if isinstance(parsed, Mapping) else arguments
    try:
        arguments = cleaned({} if arguments is None else arguments, where)
    except TooDeep:
        try:
            arguments = clean(json.dumps(arguments, ensure_ascii=False, default=str), where)
        except (TypeError, ValueError, RecursionError):  # no model has written that
            arguments = None
        if arguments is None:
            raise
    return {
        "id": _id(first("call_id", "id", "tool_call_id", "tool_id", "toolUseId"), where),
        "name": clean(name, where),
        "arguments": arguments if isinstance(arguments, dict | str) else json.dumps(arguments, ensure_ascii=False),
    }


def _id(value: Any, where: str) -> str | None:
    return None if value is None else clean(str(value), where)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
