"""What a context is built from: a prefix as token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from kvzip_memory.context import Recipe, Source
from kvzip_memory.prompting.frames import CUT
from kvzip_memory.prompting.messages import Message


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


def digest_of(value: Any) -> str | None:
    """Hash of texts, None of none."""
    return None if value is None else hashlib.sha256(json.dumps(value).encode()).hexdigest()


def what_is_said(message: Message) -> list[Any]:
    """What a message says, without the ids of calls: frameworks make them up anew."""
    calls = [[call["name"], call["arguments"]] for call in message.get("tool_calls", ())]
    return [message["role"], message["content"].replace(CUT, ""), *([calls] if calls else [])]
