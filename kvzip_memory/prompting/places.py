"""Where in a JSON text a guided answer is."""

from __future__ import annotations

from collections.abc import Iterator
from math import isinf
from typing import Any, NamedTuple

QUOTE = frozenset(b'"')
#: What may stand behind a number or a word.
BEHIND_A_VALUE = frozenset(b",]}")
#: What ends a list or an object.
_CLOSERS = frozenset(b"]}")
#: What numbers begin with.
_NUMBERS = [bytes([byte]) for byte in b"-0123456789"]
#: Numbers of fewer digits are finite.
_LARGE = 308


class Place(NamedTuple):
    """Where in a JSON text one is: which containers are open, with the number of items and the last key of each, and how much of a
    string, number or word has been said. Two answers at one place that may go on alike go on alike (nearly always), whatever they
    said before.
    """

    path: tuple[Any, ...] = ()
    word: bytes = b""
    quoted: bool = False
    escaped: bool = False

    def then(self, byte: int) -> Place:
        char = chr(byte)
        path, word, quoted, escaped = self
        if quoted:
            return Place(path, word + bytes([byte]), char != '"' or escaped, char == "\\" and not escaped)
        if char == '"':
            return Place(path, b'"', True)
        if char in "{[":
            return Place((path, 0, b""))
        if char == ":" and path:
            return Place((path[0], path[1], word))
        if char == ",":
            return Place((path[0], path[1] + 1, path[2]) if path else path)
        if char in "}]":
            return Place(path[0] if path else ())
        return self if char == " " else Place(path, word + bytes([byte]))

    def closers(self, wide: bool) -> Iterator[frozenset[int]]:
        """Bytes that end what one is in, and are no more than one has to say; where choices are few, a text may have others as short."""
        if self.quoted:
            if wide:
                yield QUOTE
            return
        if self.path:
            yield _CLOSERS
        if self.word:
            yield BEHIND_A_VALUE

    @property
    def number(self) -> bool:
        """Whether one is in a number."""
        return not self.quoted and self.word[:1] in _NUMBERS

    def overflows(self) -> bool:
        """Whether one is in a number that is too large to be one."""
        if not self.number or (len(self.word) < _LARGE and b"e" not in self.word and b"E" not in self.word):
            return False
        try:
            return isinf(float(self.word))
        except ValueError:  # not complete yet
            return False
