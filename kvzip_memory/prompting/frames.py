"""What stands between and around texts in a prompt, so that no text can end or imitate it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from itertools import chain, count

#: Between two texts of one turn.
SEPARATOR = "\n\n"

# Around a block of text up to which a prompt is loaded once. Made anew by each process, so that no text can hold it.
CUT = f"[[kvzip cut {uuid.uuid4().hex}]]"

# Frames that a text could spell, each with the number in it, if any.
_TAGS = re.compile(r"tool_response(-\d+)?", re.IGNORECASE)
_HEADERS = re.compile(r"(?:^|[\n\r\v\f\x85\u2028\u2029])[^\w\n]{0,32}Document(-\d+)?\s{0,32}\d+\s{0,32}:", re.IGNORECASE)


def response(text: str) -> str:
    """A tool's result as a user's words, in tags that it cannot end: they have a number where the text has tags of that name."""
    tag = f"tool_response{_unspelled(_TAGS, [text])}"
    return f"<{tag}>\n{text}\n</{tag}>"


def enclosed(text: str) -> str:
    """A tool's result that a template puts into such tags, in ones of its own if it could end the template's."""
    return response(text) if _TAGS.search(text) else text


def header(number: int, name: str, word: str = "Document") -> str:
    """What is put before the text of one of several documents; on one line, whatever its name."""
    return f"{'' if number == 1 else SEPARATOR}{word} {number}: {' '.join(name.splitlines())}\n\n"


def header_word(texts: Sequence[str]) -> str:
    """What the headers of documents begin with, so that no line of their texts is like one."""
    return f"Document{_unspelled(_HEADERS, texts)}"


def _unspelled(frames: re.Pattern[str], texts: Iterable[str]) -> str:
    """What of nothing, ``-2``, ``-3``, ... makes a frame that none of the texts spells."""
    spelled = {found[1] or "" for text in texts for found in frames.finditer(text)}
    return next(number for number in chain([""], (f"-{number}" for number in count(2))) if number not in spelled)
