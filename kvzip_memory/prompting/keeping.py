"""Strings whose tokens are never evicted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.encoding import Encoder, Tokens
from kvzip_memory.prompting.frames import CUT
from kvzip_memory.system.printable import brief


def kept_spans(
    encoder: Encoder, keep: Sequence[str], texts: Sequence[str], shown: str, tokens: Tokens, start: int, first: int = 0
) -> tuple[tuple[int, int], ...]:
    """Token spans of every occurrence of every string of ``keep``.

    Args:
        encoder: of the tokens.
        texts: where each must occur.
        shown: the texts as they are shown, from character ``start`` of what the tokens are of; they may go on behind these.
        first: number of the first of the tokens.
    """
    spans = set[tuple[int, int]]()
    shown = encoder.blank(shown) if keep else ""
    texts = [text.replace(CUT, "") for text in texts] if keep else []
    for wanted in dict.fromkeys(keep):
        if not wanted or not any(wanted in text for text in texts):
            raise InputError(f"keep: {brief(wanted)} does not occur in the text; give strings as they are spelled there")
        spellings = {wanted, json.dumps(wanted, ensure_ascii=False)[1:-1]}  # templates show results as JSON, too
        if not any(spelled in shown for spelled in spellings):
            spellings = {wanted.strip()} - {""}  # they may trim a text
        for spelled in spellings:
            for at in _places_of(spelled, shown):
                span = tokens.span(start + at, start + at + len(spelled))
                if span[0] < span[1]:
                    spans.add((first + span[0], first + span[1]))
    return tuple(sorted(spans))


def _places_of(part: str, text: str) -> Iterator[int]:
    """Where a part stands in a text, time after time."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))
