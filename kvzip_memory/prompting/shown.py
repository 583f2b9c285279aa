"""Documents as a user shows them: one text with headers, and where in it each of them lies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvzip_memory.context import Source
from kvzip_memory.prompting.documents import Document
from kvzip_memory.prompting.encoding import Tokens
from kvzip_memory.prompting.frames import header, header_word


def in_one_text(documents: Sequence[Document], first: int = 1, before: Sequence[str] = ()) -> tuple[str, list[tuple[int, int]]]:
    """Documents as one text, and where in it each of them lies. Several get headers, and so do those behind others, ``before``."""
    parts, spans, at = list[str](), list[tuple[int, int]](), 0
    word = header_word([*before, *(document.text for document in documents)]) if _are_headed(documents, first) else ""
    for number, document in enumerate(documents, first):
        if _are_headed(documents, first):
            parts.append(header(number, _name(document, number), word))
            at += len(parts[-1])
        parts.append(document.text)
        spans.append((at, at + len(document.text)))
        at += len(document.text)
    return "".join(parts), spans


def sources_in(documents: Sequence[Document], first: int, tokens: Tokens, places: Sequence[int], before: int = 0) -> tuple[Source, ...]:
    """Documents as sources; ``places`` are start and end of each in the text that the tokens are of, which follow ``before`` others."""
    sources = []
    shown = _are_headed(documents, first)
    for number, (document, start, end) in enumerate(zip(documents, places[::2], places[1::2], strict=True), first):
        begins, ends = tokens.span(start, end)
        sources.append(Source(_name(document, number), _storable(document.metadata or {}), before + begins, before + ends, shown))
    return tuple(sources)


def _are_headed(documents: Sequence[Document], first: int) -> bool:
    return len(documents) > 1 or first > 1


def _name(document: Document, number: int) -> str:
    return document.name or f"document {number}"


def _storable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as it will come back from a file."""
    try:
        return dict(json.loads(json.dumps(dict(metadata), default=str)))
    except TypeError:  # keys JSON cannot take
        return {str(key): str(value) for key, value in metadata.items()}
