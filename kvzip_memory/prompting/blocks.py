"""What is in a message's content: a text, or blocks of all frameworks and makers of models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.cleaning import check_nesting, clean, cleaned
from kvzip_memory.prompting.frames import CUT, response
from kvzip_memory.system.printable import brief

# Kinds of blocks: where those of text have it, what was thought, and calls.
_TEXTS = {
    "text": "text",
    "text-plain": "text",
    "input_text": "text",
    "output_text": "text",
    "output_audio": "transcript",
    "refusal": "refusal",
    "guard_content": "guard_content",
}
_THOUGHTS = {"reasoning", "thinking", "redacted_thinking", "reasoning_content"}
_CALLS = {"tool_use", "tool_call", "function_call", "invalid_tool_call"}
_PIECES = {"tool_call_chunk", "input_json_delta"}  # of calls that are in ``tool_calls`` too
_MEDIA = {"image", "image_url", "input_image", "audio", "input_audio", "video", "document", "file", "input_file", "file_data", "media"}
# Where the words of a part are, the innermost first.
_WORDS = (
    *("text", "value", "transcript", "guardContent", "reasoningText", "reasoningContent", "reasoning_content", "reasoning", "thinking"),
    *("summary", "content"),
)


@dataclass(frozen=True)
class Parts:
    """What is in a message's content: the texts to join, what was thought, and calls as they are."""

    texts: list[str]
    thoughts: list[str]
    calls: list[Any]


def parts_of(content: Any, role: str, where: str, lines: bool = False) -> Parts:
    """The content of a message: a string, or blocks of text and others; ``lines``: each text is on a line of its own."""
    if not isinstance(content, str | list | tuple | Mapping | None) and role != "tool":
        raise InputError(f"message content is a {type(content).__name__}, not a string")
    parts, alone = Parts([], [], []), False
    for item in content if isinstance(content, list | tuple) else [content]:
        kind, block = _kind(item, role, where)
        before = alone
        if kind in _TEXTS and not (kind == "guard_content" and role == "assistant"):
            text, alone = words(block.get(_TEXTS[kind], block)), False
        elif kind == "cache_point" or (kind == "cache" and "cache_control" in block):  # it says that the one before it is marked
            if parts.texts and parts.texts[-1] and CUT not in parts.texts[-1]:
                parts.texts[-1] = f"{CUT}{parts.texts[-1]}{CUT}"
            continue
        elif role == "tool":
            text, alone = _as_json(kind, block, where), True
        elif kind == "tool_result" and role != "assistant":  # Anthropic's and Bedrock's are said by the user
            result = block.get("toolResult", block)
            result = result.get("content") if isinstance(result, Mapping) else result
            text, alone = response("".join(parts_of(result, "tool", where).texts)), True
        elif kind in _THOUGHTS:
            parts.thoughts.append(words(block))
            continue
        elif kind in _CALLS:
            parts.calls.append(block)
            continue
        elif role == "assistant" or kind in _PIECES:
            continue
        else:
            raise InputError(
                f"content blocks of type {brief(kind)} are not supported ({where}); send text, such as what the file says: texts alone are "
                "read, whatever the model can see or hear"
            )
        text = ("\n" if parts.texts and (lines or alone or before) else "") + clean(text, where)
        parts.texts.append(f"{CUT}{text}{CUT}" if text and block.get("cache_control") else text)
    return parts


def _kind(block: Any, role: str, where: str) -> tuple[str, Mapping[str, Any]]:
    """What a block of content is, and the block as a mapping."""
    if block is None or isinstance(block, str):
        return "text", {"text": block}
    if not isinstance(block, Mapping):  # LlamaIndex's, or of a maker's own library
        kind = getattr(block, "block_type", None) or getattr(block, "type", None)
        if kind is None:
            return ("json" if role == "tool" else type(block).__name__), {"json": block}
        block = {**{name: value for name, value in getattr(block, "__dict__", {}).items() if value is not None}, "type": kind}
    check_nesting(block, where)
    while block.get("type") == "non_standard" and isinstance(block.get("value"), Mapping):  # LangChain's wrapping
        block = block["value"]
    kind = block.get("type", block.get("block_type"))
    if not isinstance(kind, str):  # Bedrock's and Google's are told by their keys; what else a tool returned is only data
        kind = "text" if "text" in block else next(iter(block), "text")
        if role == "tool" and (len(block) > 1 or kind not in ("text", "json", "cachePoint", *_MEDIA)):
            return "json", {"json": block}
    if block.get("thought") is True:
        return "thinking", block
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    return ("file" if kind == "text-plain" and "text" not in block else kind), block


def words(value: Any) -> str:
    """The text in a part of a block, however deep the makers of models have put it."""
    if isinstance(value, Mapping):
        return next(filter(None, (words(value.get(name)) for name in _WORDS)), "")
    if isinstance(value, list | tuple):
        return "\n\n".join(filter(None, map(words, value)))
    return value if isinstance(value, str) else ""


def _as_json(kind: str, block: Mapping[str, Any], where: str) -> str:
    """What a tool returned, as JSON; of images and files without their bytes, which say nothing to a model of texts."""
    value = block["json"] if kind == "json" and "json" in block else {k: v for k, v in block.items() if k != "cache_control"}
    return json.dumps(cleaned(_without_bytes(value) if kind in _MEDIA else value, where), ensure_ascii=False)


def _without_bytes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_bytes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_bytes(item) for item in value]
    coded = isinstance(value, str) and len(value) > 256 and value.isascii() and not re.search(r"\s", value)
    return f"<{len(value):,} bytes>" if coded or isinstance(value, bytes) else value
