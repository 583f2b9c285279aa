"""What users hand in, in one form: documents and chat messages of ours, OpenAI's, LangChain's and LlamaIndex's."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_memory.errors import InputError

Message = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
#: Between two texts of one turn.
SEPARATOR = "\n\n"

# Around a block of text up to which a prompt is loaded once. Made anew by each process, so that no text can hold it.
CUT = f"[[kvzip cut {uuid.uuid4().hex}]]"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A text to load, with the name and metadata that stay with the context as its source."""

    text: str
    name: str | None = None
    metadata: Mapping[str, Any] | None = None


def read_source(source: Any) -> tuple[list[Document], list[Message]]:
    """Sort a source given by a user into documents or messages; one of the two lists is empty.

    Accepts a string, a path, a document (LangChain's, LlamaIndex's or ours), a message (a mapping with role and
    content, LangChain's or LlamaIndex's), or a sequence of documents or of messages.

    Raises:
        InputError: nothing to read, an unknown type, an unreadable file, or documents mixed with messages.
    """
    items = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    documents, messages = [], []
    for item in items:
        message = as_message(item)
        if message is None:
            documents.append(as_document(item))
        else:
            messages.append(message)
    if documents and messages:
        raise InputError(f"{len(documents)} documents and {len(messages)} messages in one source; load them as two contexts")
    for number, document in enumerate(documents, 1):
        if not document.text.strip():
            where = f" {document.name!r}" if document.name else f" {number} of {len(documents)}" if len(documents) > 1 else ""
            raise InputError(f"document{where} is empty; there is nothing to load")
    if messages:
        check_messages(messages)
    elif not documents:
        raise InputError("the source is an empty list; there is nothing to load")
    return documents, messages


def check_messages(messages: Sequence[Message]) -> None:
    """Raises:
    InputError: no message, an unknown role, or nothing but empty texts.
    """
    if not messages:
        raise InputError("no messages; give at least one from the user")
    for message in messages:
        if message["role"] not in _ROLES:
            raise InputError(f"message role {message['role']!r} is not supported; use one of {', '.join(_ROLES)}")
    for before, message in zip([None, *messages], messages, strict=False):
        if message["role"] == "tool" and not (before and (before["role"] == "tool" or before.get("tool_calls"))):
            raise InputError("a tool's result does not follow the assistant's call; send both, or neither")
    if not any(message["content"].strip() for message in messages):
        raise InputError("the text is empty; there is nothing to ask or load")


def as_message(item: Any) -> Message | None:
    """A message in one form, or None if ``item`` is no message.

    Takes mappings in OpenAI's form and LangChain's and LlamaIndex's messages. Gives a mapping with ``role`` and ``content``
    (a string); an assistant's may have ``tool_calls``, each with ``id``, ``name`` and ``arguments`` (a mapping), a tool's has
    the ``tool_call_id`` of the call it answers.

    Raises:
        InputError: a mapping that lacks a role or content, content other than text, or a call that is none.
    """
    if isinstance(item, Mapping):
        if "role" not in item or ("content" not in item and not item.get("tool_calls")):
            raise InputError(f"a message is a mapping with 'role' and 'content', not {sorted(item)}")
        role, content = item["role"], item.get("content")
    else:
        kind = str(getattr(item, "type", "")).removesuffix("MessageChunk").lower()
        role = getattr(item, "role", None) or {"human": "user", "ai": "assistant"}.get(kind, kind)
        if not role or not hasattr(item, "content") or hasattr(item, "page_content") or hasattr(item, "get_content"):
            return None
        role, content = str(getattr(role, "value", role)), item.content

    def get(name: str) -> Any:
        return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)

    calls = get("tool_calls") or [block for block in get("blocks") or () if getattr(block, "block_type", None) == "tool_call"]
    message: dict[str, Any] = {"role": role, "content": "" if content is None and calls else _plain(content)}
    if role == "assistant" and calls:
        message["tool_calls"] = [_as_call(call) for call in calls]
    if role == "tool":
        message["tool_call_id"] = get("tool_call_id") or (get("additional_kwargs") or {}).get("tool_call_id")
    return message


# Blocks of an assistant's content that are not said to anybody, or are in ``tool_calls`` too.
_SILENT_BLOCKS = {"tool_use", "tool_call", "tool_call_chunk", "input_json_delta", "reasoning", "thinking", "redacted_thinking"}


def _plain(content: Any) -> str:
    """The text of a message's content: a string, or blocks of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"message content is a {type(content).__name__}, not a string")
    texts = []
    for block in content:
        kind = "text" if isinstance(block, str) else block.get("type") if isinstance(block, Mapping) else type(block).__name__
        if kind == "text":
            text = block if isinstance(block, str) else block["text"]
            texts.append(f"{CUT}{text}{CUT}" if isinstance(block, Mapping) and block.get("cache_control") else text)
        elif kind not in _SILENT_BLOCKS:
            raise InputError(f"content blocks of type {kind!r} are not supported; send text")
    return "".join(texts)


def _as_call(call: Any) -> dict[str, Any]:
    """A call of OpenAI's, LangChain's or LlamaIndex's form in ours."""
    if not isinstance(call, Mapping):
        call = {"id": call.tool_call_id, "name": call.tool_name, "arguments": call.tool_kwargs}
    function = call.get("function", call)
    arguments: Any = next((function[name] for name in ("arguments", "args") if name in function), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"a tool call has a name and a JSON object of arguments, not {str(call)[:80]!r}")
    return {"id": call.get("id"), "name": function["name"], "arguments": dict(arguments)}


def header(number: int, name: str) -> str:
    """What is put before the text of one of several documents."""
    return f"{'' if number == 1 else SEPARATOR}Document {number}: {name}\n\n"


def as_document(item: Any) -> Document:
    """A document of ours, LangChain's or LlamaIndex's, a text or a path in one form.

    Raises:
        InputError: none of these, or an unreadable file.
    """
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        if len(item) < 256 and "\n" not in item and Path(item).is_file():
            logger.warning("loading the text %r itself; there is a file of that name: give a Path to load the file", item)
        return Document(item)
    if isinstance(item, Path):
        try:
            return Document(item.read_text(encoding="utf-8"), item.name, {"source": str(item)})
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {str(item)!r} as UTF-8 text: {error}") from error
    if hasattr(item, "page_content"):  # LangChain
        text = item.page_content
    elif hasattr(item, "get_content"):  # LlamaIndex
        text = item.get_content()
    else:
        raise InputError(f"cannot load a {type(item).__name__}; give a string, a path, documents or chat messages")
    metadata = dict(item.metadata or {})
    name = next((str(metadata[k]) for k in ("title", "file_name", "source") if metadata.get(k)), None)
    return Document(text, name, metadata)


def as_messages(question: Any) -> list[Message]:
    """A question, one message or several as checked messages."""
    if isinstance(question, str):
        question = {"role": "user", "content": question}
    items = list(question) if isinstance(question, Sequence) else [question]
    messages = [as_message(item) for item in items]
    if any(message is None for message in messages):
        raise InputError(f"cannot ask a {type(question).__name__}; give a string, or chat messages with 'role' and 'content'")
    check_messages(messages)  # type: ignore[arg-type]
    return messages  # type: ignore[return-value]
