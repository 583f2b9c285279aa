"""What users hand in, in one form: documents and chat messages of ours, OpenAI's, LangChain's and LlamaIndex's."""

from __future__ import annotations

import json
import os
import os.path
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from kvzip_memory.context.facts import LONGEST_NAME
from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief, logger_of

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
#: Between two texts of one turn.
SEPARATOR = "\n\n"

# Around a block of text up to which a prompt is loaded once. Made anew by each process, so that no text can hold it.
CUT = f"[[kvzip cut {uuid.uuid4().hex}]]"

#: So many strings to keep may a call give.
MOST_KEPT = 1000
#: The names and metadata of all documents of a context may have so many characters as JSON.
LARGEST_METADATA = 8 << 20
#: Metadata of a document have no more lists and mappings.
MOST_OF_METADATA = 100_000
#: Values that are handed in have no more lists and mappings than this within one another, and no more of them; schemas and tools fewer.
DEEPEST, MOST_PARTS, MOST_OF_SCHEMA = 100, 1_000_000, 5_000

logger = logger_of(__name__)

_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


def clean(text: str, where: str) -> str:
    """A text as it can be encoded: without the mark of a file's beginning (BOM), pairs of surrogates as the characters they stand for.

    A surrogate alone stands for none. Extractors of PDFs make them, and files read with ``surrogateescape``. It becomes U+FFFD, with a
    warning that names ``where`` the text is from and the place in it; one for each text, as conversations are read again every turn.
    """
    if not isinstance(text, str):
        raise InputError(f"{where} is {str(text)[:80]!r}, of type {type(text).__name__}; give a text")
    text = text.lstrip("\ufeff")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        places = [found.start() for found in _LONE_SURROGATE.finditer(text)]
        if places:
            _warn(f"{where}: character {places[0]} is half of a surrogate pair; {len(places)} such are read as U+FFFD", hash(text))
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@lru_cache(maxsize=1024)
def _warn(message: str, text: int) -> None:
    logger.warning(message)


class TooDeep(InputError):
    """A value with lists and mappings within one another deeper than :data:`DEEPEST`, or within themselves."""


def check_nesting(value: Any, where: str, most: int = MOST_PARTS) -> None:
    """Raises:
    TooDeep: lists and mappings within one another, or within themselves.
    InputError: more than ``most`` of them.
    """
    level, found = [*_parts_of([[value]])], 0
    for _ in range(DEEPEST):
        found += len(level)
        if found > most:
            raise InputError(f"{where} has more than {most:,} lists and mappings, or one that holds itself; give fewer")
        if not level:
            return
        level = [*islice(_parts_of(level), most + 1)]
    raise TooDeep(f"{where} has more than {DEEPEST} lists and mappings within one another, or one that holds itself; give it flatter")


def _parts_of(level: Iterable[Any]) -> Iterator[Any]:
    """Lists and mappings in others."""
    for item in level:
        for inner in item.values() if isinstance(item, Mapping) else item:
            if isinstance(inner, dict | list | tuple | Mapping):
                yield inner


def cleaned(value: Any, where: str, most: int = MOST_PARTS) -> Any:
    """A value as JSON can hold it, with every string in it as of :func:`clean`.

    Raises:
        InputError: as for :func:`check_nesting`.
    """
    check_nesting(value, where, most)
    return _cleaned(value, where)


def _cleaned(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return clean(value, where)
    if isinstance(value, Mapping):
        return {clean(str(key), where): _cleaned(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, where) for item in value]
    return value if value is None or isinstance(value, int | float) else clean(str(value), where)


def as_texts(value: Any, where: str, most: int) -> list[str]:
    """A text, several, or None for none, as a list.

    Raises:
        InputError: anything else, or more than ``most`` texts.
    """
    given = [value] if isinstance(value, str) else value if isinstance(value, Iterable) else [] if value is None else [value]
    texts = list(islice(given, most + 1))
    if len(texts) > most:
        raise InputError(f"{where}: more than {most:,} texts were given; give fewer")
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} is {brief(value)}; give a text or a list of texts")
    return texts


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
    for number, item in enumerate(items, 1):
        message = as_message(item, f"message {number}")
        if message is None:
            documents.append(as_document(item, f"document {number}"))
        else:
            messages.append(message)
    if documents and messages:
        raise InputError(f"{len(documents)} documents and {len(messages)} messages in one source; load them as two contexts")
    for number, document in enumerate(documents, 1):
        if not document.text.strip():
            where = f" {document.name!r}" if document.name else f" {number} of {len(documents)}" if len(documents) > 1 else ""
            raise InputError(f"document{where} is empty; there is nothing to load")
    check_metadata(documents)
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
        if message["role"] not in _ROLES.values():
            raise InputError(
                f"message role {brief(message['role'])} is not supported; use one of {', '.join(dict.fromkeys(_ROLES.values()))}"
            )
    if not any(message["content"].strip() for message in messages):
        raise InputError("the text is empty; there is nothing to ask or load")


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
    parts = _parts(content, role, where, lines=in_blocks)
    text = "".join(parts.texts)
    if role == "assistant" and not text:  # OpenAI's, beside the content
        text = clean(_words(more.get("refusal")) or _words(more.get("audio")), where)
    message: dict[str, Any] = {"role": role, "content": text}
    if role == "assistant":
        told = _listed(fields.get("tool_calls")) + _listed(fields.get("invalid_tool_calls"))
        told = told or parts.calls or _listed(more.get("tool_calls")) or _listed(more.get("function_call"))
        if calls := [made for call in told if (made := _as_call(call, where))]:
            message["tool_calls"] = calls
        thoughts = "\n\n".join(filter(None, parts.thoughts)) or _words(more.get("reasoning_content")) or _words(more.get("reasoning"))
        if thoughts := clean(thoughts, where):
            message["reasoning"] = thoughts
    if role == "tool":
        message["tool_call_id"] = _id(more.get("tool_call_id"), where)
    return message


def _role_of(message: Any) -> Any:
    """Who has said a framework's message. A class that says so counts before a field, which LangChain's take from anybody."""
    kind = str(getattr(message, "type", "")).removesuffix("MessageChunk").lower()
    return kind if kind in _ROLES else getattr(message, "role", None) or kind


def may_bring_contexts(message: Any) -> bool:
    """Whether a framework's message may stand for a context: one of the application or its user, not what a model or a tool has made."""
    role = _role_of(message)
    return _ROLES.get(str(getattr(role, "value", role))) in ("system", "user")


# Kinds of blocks, of all frameworks and makers of models: where those of text have it, what was thought, and calls.
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
class _Parts:
    """What is in a message's content: the texts to join, what was thought, and calls as they are."""

    texts: list[str]
    thoughts: list[str]
    calls: list[Any]


def _parts(content: Any, role: str, where: str, lines: bool = False) -> _Parts:
    """The content of a message: a string, or blocks of text and others; ``lines``: each text is on a line of its own."""
    if not isinstance(content, str | list | tuple | Mapping | None) and role != "tool":
        raise InputError(f"message content is a {type(content).__name__}, not a string")
    parts, alone = _Parts([], [], []), False
    for item in content if isinstance(content, list | tuple) else [content]:
        kind, block = _kind(item, role, where)
        before = alone
        if kind in _TEXTS and not (kind == "guard_content" and role == "assistant"):
            text, alone = _words(block.get(_TEXTS[kind], block)), False
        elif kind == "cache_point" or (kind == "cache" and "cache_control" in block):  # it says that the one before it is marked
            if parts.texts and parts.texts[-1] and CUT not in parts.texts[-1]:
                parts.texts[-1] = f"{CUT}{parts.texts[-1]}{CUT}"
            continue
        elif role == "tool":
            text, alone = _as_json(kind, block, where), True
        elif kind == "tool_result" and role != "assistant":  # Anthropic's and Bedrock's are said by the user
            result = block.get("toolResult", block)
            result = result.get("content") if isinstance(result, Mapping) else result
            text, alone = response("".join(_parts(result, "tool", where).texts)), True
        elif kind in _THOUGHTS:
            parts.thoughts.append(_words(block))
            continue
        elif kind in _CALLS:
            parts.calls.append(block)
            continue
        elif role == "assistant" or kind in _PIECES:
            continue
        else:
            raise InputError(f"content blocks of type {brief(kind)} are not supported ({where}); send text, such as what the file says")
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


def _words(value: Any) -> str:
    """The text in a part of a block, however deep the makers of models have put it."""
    if isinstance(value, Mapping):
        return next(filter(None, (_words(value.get(name)) for name in _WORDS)), "")
    if isinstance(value, list | tuple):
        return "\n\n".join(filter(None, map(_words, value)))
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


def response(text: str) -> str:
    """A tool's result as a user's words, in tags that it cannot end: they have a number where the text has tags of that name."""
    tag = f"tool_response{_unspelled(_TAGS, [text])}"
    return f"<{tag}>\n{text}\n</{tag}>"


def enclosed(text: str) -> str:
    """A tool's result that a template puts into such tags, in ones of its own if it could end the template's."""
    return response(text) if _TAGS.search(text) else text


# Frames that a text could spell, each with the number in it, if any.
_TAGS = re.compile(r"tool_response(-\d+)?", re.IGNORECASE)
_HEADERS = re.compile(r"(?:^|[\n\r\v\f\x85\u2028\u2029])[^\w\n]{0,32}Document(-\d+)?\s{0,32}\d+\s{0,32}:", re.IGNORECASE)


def _unspelled(frames: re.Pattern[str], texts: Iterable[str]) -> str:
    """What of nothing, ``-2``, ``-3``, ... makes a frame that none of the texts spells."""
    spelled = {found[1] or "" for text in texts for found in frames.finditer(text)}
    return next(number for number in chain([""], (f"-{number}" for number in count(2))) if number not in spelled)


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
            _warn(f"{where}: a tool call without a name is left out", hash(brief(call)))
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


def header(number: int, name: str, word: str = "Document") -> str:
    """What is put before the text of one of several documents; on one line, whatever its name."""
    return f"{'' if number == 1 else SEPARATOR}{word} {number}: {' '.join(name.splitlines())}\n\n"


def header_word(texts: Sequence[str]) -> str:
    """What the headers of documents begin with, so that no line of their texts is like one."""
    return f"Document{_unspelled(_HEADERS, texts)}"


def as_document(item: Any, where: str = "document") -> Document:
    """A document of ours, LangChain's or LlamaIndex's, a text or a path in one form, and all its texts as of :func:`clean`.

    Raises:
        InputError: none of these, or an unreadable file.
    """
    document = _document(item)
    if not isinstance(document.text, str):
        raise InputError(f"the text of {where} is a {type(document.text).__name__}, not a string")
    name = None if document.name is None else clean(str(document.name), f"the name of {where}")
    if name and len(name) > LONGEST_NAME:
        raise InputError(f"the name of {where}, {brief(name)}, has {len(name):,} characters; give one of at most {LONGEST_NAME:,}")
    where = f"document {name!r}" if name else where
    metadata = None if document.metadata is None else cleaned(document.metadata, f"metadata of {where}", MOST_OF_METADATA)
    return Document(clean(document.text, where), name, metadata)


def check_metadata(documents: Iterable[Any]) -> None:
    """Documents or sources of one context.

    Raises:
        InputError: their names and metadata are too large to be kept with it.
    """
    chars = 0
    for number, document in enumerate(documents, 1):
        for piece in _JSON.iterencode([document.name, document.metadata]):
            chars += len(piece)
            if chars > LARGEST_METADATA:
                raise InputError(
                    f"names and metadata of the first {number:,} documents of the context have more than {LARGEST_METADATA:,} characters "
                    "as JSON, which is the limit; keep less in metadata, or make several contexts"
                )


_JSON = json.JSONEncoder(default=str)


def _document(item: Any) -> Document:
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        if len(item) < 256 and "\n" not in item and os.path.isfile(item):  # unlike Path's it never raises: most texts are no names
            logger.warning("a text of %d characters is loaded; there is a file of that name: give a Path to load the file", len(item))
        return Document(item)
    if isinstance(item, Path):
        try:
            return Document(item.read_text(encoding="utf-8-sig"), item.name, {"source": str(item)})
        except (OSError, ValueError) as error:  # not UTF-8, or no name at all
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
