"""From sources and questions to token ids. Templates are rendered around marks and cut; texts are put in as ids.

The chat template is the model's own. It is rendered with a mark in the place of every text and cut at the marks, so
that template and texts are tokenised apart: control tokens come from the template only, and a text that spells one
stays text. What a context's prefix needs afterwards (:class:`~kvzip_memory.context.Recipe`) is cut out in the same
go and kept as ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_memory.context import Recipe, Source
from kvzip_memory.errors import InputError

#: Used when a tokenizer has no chat template: plain text, the question on a line of its own, then ``Answer:``.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}{{ message['content'] }}\nAnswer:"
    "{% else %} {{ message['content'] }}\n\n{% endif %}{% endfor %}"
)

# Templates that print today's date would give another prefix, and so another key, every day. They get this one, by the
# variable some of them read and by a macro in the place of transformers' function.
_DATE = "26 Jul 2024"
_STRFTIME = "".join(
    f" | replace('{code}', '{text}')"
    for code, text in {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"}.items()
)
_PINNED_CLOCK = "{% macro strftime_now(format) %}{{ format" + _STRFTIME + " }}{% endmacro %}"

_ROLES = ("system", "user", "assistant")
_SEPARATOR = "\n\n"

Message = Mapping[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A text to load, with the name and metadata that stay with the context as its source."""

    text: str
    name: str | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Prompt:
    """A source as token ids: the prefix a context is built from.

    Attributes:
        token_ids: template head and texts.
        protected: the first so many ids are template head and system prompt.
        recipe: what follows the prefix.
        sources: the documents and their token spans.
        keep: token spans ``[start, end)`` that are never evicted either.
        text_digest: hash of the texts, as they were before any model's template and tokenizer saw them.
        system_digest: hash of the system prompt, None without one.
    """

    token_ids: tuple[int, ...]
    protected: int
    recipe: Recipe
    sources: tuple[Source, ...]
    keep: tuple[tuple[int, int], ...]
    text_digest: str | None
    system_digest: str | None


class PromptBuilder:
    """Renders and tokenises for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template_kwargs: variables handed to the chat template, such as ``enable_thinking=False``.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str = PLAIN_TEMPLATE if tokenizer.chat_template is None else tokenizer.get_chat_template()
        if "strftime_now" in self.template:
            self.template = _PINNED_CLOCK + self.template
        self._kwargs: dict[str, Any] = {"date_string": _DATE, **(template_kwargs or {})}
        if tokenizer.chat_template is None:
            first = tokenizer("a").input_ids[:1]
            adds_bos = bool(first) and first[0] == tokenizer.bos_token_id
            self._kwargs["bos_token"] = tokenizer.bos_token if adds_bos else ""
        added = tokenizer.added_tokens_decoder
        # Special tokens, and the template's own tags (such as <think>) even where they are not flagged special.
        control = {
            i: token.content
            for i, token in added.items()
            if token.special or (len(token.content.strip()) > 2 and token.content in self.template)
        }
        self.control_ids = frozenset(control) | frozenset(tokenizer.all_special_ids)
        literals = sorted({*control.values(), *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._literals = re.compile("|".join(map(re.escape, literals))) if literals else None

    # -- prefixes ------------------------------------------------------------------------------------------------

    def documents(self, documents: Sequence[Document], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """The prefix of documents a user shows before asking. Several documents get a visible header each.

        ``keep`` are strings whose tokens are never evicted, wherever they occur in the documents.
        """
        messages = [*_system(system), {"role": "user", "content": ""}]
        pieces = self._render(messages)
        ids: list[int] = []
        for piece, message in zip(pieces, messages[:-1], strict=False):
            ids += self._template_ids(piece) + self.text_ids(message["content"])
        ids += self._template_ids(pieces[-2])
        protected, sources = len(ids), []
        for number, document in enumerate(documents, 1):
            name = document.name or f"document {number}"
            if len(documents) > 1:
                gap = "" if number == 1 else "\n\n"
                ids += self.text_ids(f"{gap}Document {number}: {name}\n\n")
            start = len(ids)
            ids += self.text_ids(document.text)
            sources.append(Source(name, _storable(document.metadata or {}), start, len(ids)))
        recipe = Recipe((), _SEPARATOR, tuple(self._template_ids(pieces[-1])), self._next_turn(messages))
        names = [document.name if len(documents) > 1 else None for document in documents]
        texts = [document.text for document in documents]
        spans = self._kept_spans(texts, [source.start for source in sources], keep)
        return Prompt(tuple(ids), protected, recipe, tuple(sources), spans, _digest([names, texts]), _digest(system))

    def conversation(self, messages: Sequence[Message], system: str | None = None, keep: Sequence[str] = ()) -> Prompt:
        """The prefix of a conversation so far; the next question is the user's next turn. ``keep`` as for documents."""
        messages = [*_system(system), *messages]
        pieces = self._render([*messages, {"role": "user", "content": ""}])
        ids: list[int] = []
        protected, starts = None, []
        for piece, message in zip(pieces, messages, strict=False):
            ids += self._template_ids(piece)
            if protected is None and message["role"] != "system":
                protected = len(ids)
            starts.append(len(ids))
            ids += self.text_ids(_text(message))
        opening, closing = (tuple(self._template_ids(piece)) for piece in pieces[-2:])
        recipe = Recipe(opening, "", closing, self._next_turn(messages))
        spans = self._kept_spans([_text(message) for message in messages], starts, keep)
        said = _digest([[message["role"], _text(message)] for message in messages[0 if system is None else 1 :]])
        return Prompt(tuple(ids), len(ids) if protected is None else protected, recipe, (), spans, said, _digest(system))

    def _kept_spans(self, texts: Sequence[str], starts: Sequence[int], keep: Sequence[str]) -> tuple[tuple[int, int], ...]:
        """Token spans of every occurrence of every string of ``keep`` in texts whose ids start at ``starts``."""
        spans = []
        for wanted in keep:
            if not wanted or not any(wanted in text for text in texts):
                raise InputError(f"keep: {wanted!r} does not occur in the text; give strings as they are spelled there")
        for text, first in zip(texts, starts, strict=True) if keep else ():
            offsets = self._offsets(text)
            for wanted in keep:
                for found in re.finditer(re.escape(wanted), text):
                    tokens = [i for i, (start, end) in enumerate(offsets) if start < found.end() and end > found.start()]
                    spans.append((first + tokens[0], first + tokens[-1] + 1))
        return tuple(sorted(set(spans)))

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` of each of the text's ids."""
        offsets: list[tuple[int, int]] = []
        before = 0
        for part in self._harmless(text):
            try:
                encoded = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            except NotImplementedError:
                raise InputError("keep needs a tokenizer that knows its tokens' places in the text (a fast one)") from None
            offsets += [(before + start, before + end) for start, end in encoded.offset_mapping]
            before += len(part)
        return offsets

    def _next_turn(self, messages: Sequence[Message]) -> tuple[int, ...]:
        turns: list[Message] = [*messages]
        if turns[-1]["role"] != "user":
            turns.append({"role": "user", "content": ""})
        pieces = self._render([*turns, {"role": "assistant", "content": ""}, {"role": "user", "content": ""}])
        return tuple(self._template_ids(pieces[-2]))

    # -- what follows --------------------------------------------------------------------------------------------

    def question(self, recipe: Recipe | None, question: str | Sequence[Message]) -> list[int]:
        """Ids of a question, or of a conversation that ends with one, after a context or (recipe None) on its own.

        After a context a system message cannot be moved to the front; its text goes before the question it precedes.
        """
        messages = _as_messages(question)
        if messages[-1]["role"] != "user" or not _text(messages[-1]).strip():
            raise InputError(f"the last message is from {messages[-1]['role']!r} or empty; an answer follows what a user says")
        if recipe is None:
            ids: list[int] = []
            pieces = self._render(messages)
            for piece, message in zip(pieces, messages, strict=False):
                ids += self._template_ids(piece) + self.text_ids(_text(message))
            return ids + self._template_ids(pieces[-1])
        turns = _alternating(messages)
        if turns[0][0] == "assistant":
            raise InputError("the first message after a context is from 'assistant'; a context is followed by a user's turn")
        ids, opening, separator = [], recipe.opening, recipe.separator
        for role, text in turns:
            if role == "user":
                ids += [*opening, *self.text_ids(separator + text), *recipe.closing]
                opening, separator = recipe.next_turn, ""
            else:
                ids += self.text_ids(text)
        return ids

    def next_question(self, recipe: Recipe, question: str) -> list[int]:
        """Ids of a later question, after the tokens of the answer before it."""
        _as_messages(question)
        return [*recipe.next_turn, *self.text_ids(question), *recipe.closing]

    def free_recipe(self) -> Recipe:
        """The recipe of a session without a context."""
        question = [{"role": "user", "content": ""}]
        opening, closing = (tuple(self._template_ids(piece)) for piece in self._render(question))
        return Recipe(opening, "", closing, self._next_turn(question))

    # -- pieces --------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text. A control token's spelling inside it is cut, so that no control id comes out."""
        ids: list[int] = []
        for part in self._harmless(text):
            ids += self.tokenizer(part, add_special_tokens=False).input_ids
        if not self.control_ids.isdisjoint(ids):
            found = sorted(self.control_ids.intersection(ids))
            raise InputError(
                f"the tokenizer turns plain text into control tokens {self.tokenizer.convert_ids_to_tokens(found)}; "
                "remove their spelling from the text"
            )
        return ids

    def _harmless(self, text: str) -> list[str]:
        parts, start = [], 0
        while self._literals and (found := self._literals.search(text, start)):
            parts.append(text[start : found.start() + 1])
            start = found.start() + 1
        return [*parts, text[start:]] if text[start:] else parts

    def _template_ids(self, piece: str) -> list[int]:
        return list(self.tokenizer(piece, add_special_tokens=False).input_ids) if piece else []

    def _render(self, messages: Sequence[Message]) -> list[str]:
        """The template's text around every message's content: ``len(messages) + 1`` pieces."""
        marks = [f"[[kvzip mark {i}]]" for i in range(len(messages))]
        marked = [{"role": m["role"], "content": mark} for m, mark in zip(messages, marks, strict=True)]
        try:
            rest = self.tokenizer.apply_chat_template(
                marked, chat_template=self.template, tokenize=False, add_generation_prompt=True, **self._kwargs
            )
        except Exception as error:  # templates raise whatever they like
            roles = [m["role"] for m in messages]
            raise InputError(f"the model's chat template does not accept the roles {roles}: {error}") from error
        pieces = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise InputError("the model's chat template drops, repeats or reorders messages; pass a plain chat_template")
            pieces.append(before)
        return [*pieces, rest]


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
            documents.append(_as_document(item))
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
    if not any(_text(message).strip() for message in messages):
        raise InputError("the text is empty; there is nothing to ask or load")


def as_message(item: Any) -> Message | None:
    """A message as a mapping with ``role`` and ``content``, or None if ``item`` is no message."""
    if isinstance(item, Mapping):
        if not {"role", "content"} <= item.keys():
            raise InputError(f"a message is a mapping with 'role' and 'content', not {sorted(item)}")
        return item
    kind = str(getattr(item, "type", "")).removesuffix("MessageChunk").lower()
    role = getattr(item, "role", None) or {"human": "user", "ai": "assistant"}.get(kind, kind)
    if role and hasattr(item, "content") and not hasattr(item, "page_content") and not hasattr(item, "get_content"):
        text = getattr(item, "text", None)  # LangChain: the text of all blocks
        return {"role": str(getattr(role, "value", role)), "content": str(text) if isinstance(text, str) else item.content}
    return None


def _as_document(item: Any) -> Document:
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


def _as_messages(question: Any) -> list[Message]:
    """A question, one message or several as checked messages."""
    if isinstance(question, str):
        question = {"role": "user", "content": question}
    items = list(question) if isinstance(question, Sequence) else [question]
    messages = [as_message(item) for item in items]
    if any(message is None for message in messages):
        raise InputError(f"cannot ask a {type(question).__name__}; give a string, or chat messages with 'role' and 'content'")
    check_messages(messages)  # type: ignore[arg-type]
    return messages  # type: ignore[return-value]


def _digest(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _storable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it will come back from a file."""
    try:
        return dict(json.loads(json.dumps(dict(metadata), default=str)))
    except TypeError:  # keys JSON cannot take
        return {str(key): str(value) for key, value in metadata.items()}


def _text(message: Message) -> str:
    content = message["content"]
    if not isinstance(content, str):
        raise InputError(f"message content is a {type(content).__name__}, not a string")
    return content


def _system(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def _alternating(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Roles and texts with system messages counted as the user's and neighbours of one role joined."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n\n{_text(message)}")
        else:
            turns.append((role, _text(message)))
    return turns
