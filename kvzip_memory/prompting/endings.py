"""The shortest way to end a guided answer, so that it is there before the tokens run out.

A grammar is walked byte by byte, where one state leads to few others, and the bytes are spelled in as few tokens as the vocabulary
allows. What is found is an ending for certain; that none is shorter holds but for grammars whose branches look alike for long.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from math import inf
from typing import Any, NamedTuple

from llguidance import LLMatcher

from kvzip_memory.prompting.alphabet import Alphabet, Spelling
from kvzip_memory.prompting.places import Place

#: States that a search may look at (0.3 to 1 s), and of those that look the same: in a second search, where the first finds nothing, more.
_MOST_STATES, _ALIKE = 3_000, (2, 32)
#: So many choices are all looked at; of more, those that lead to different choices.
_FEW = 8
_ESCAPE = ord("\\")


class Ending(NamedTuple):
    """What ends an answer: symbols of the :class:`Alphabet`, and the same as tokens."""

    symbols: tuple[int, ...]
    tokens: tuple[int, ...]


class Unknown(Exception):
    """No ending was found.

    Attributes:
        least: fewer tokens are not enough.
        gave_up: there was too much to look at, so that there may well be one.
    """

    def __init__(self, least: int, gave_up: bool) -> None:
        super().__init__(least, gave_up)
        self.least, self.gave_up = least, gave_up


def shortest(alphabet: Alphabet, matcher: LLMatcher, place: Place, most: float = inf) -> Ending:
    """The ending with the fewest tokens from where a matcher of the alphabet is.

    Raises:
        Unknown: none of ``most`` tokens, or too much to look at.
    """
    if alphabet.ends(matcher, ()):
        return Ending((), ())
    unknown = Unknown(0, gave_up=True)
    for alike in _ALIKE:
        try:
            return _search(alphabet, matcher, place, most, alike)
        except Unknown as error:
            unknown = error
        if not unknown.gave_up:
            break
    raise unknown


def _search(alphabet: Alphabet, matcher: LLMatcher, place: Place, most: float, most_alike: int) -> Ending:
    """As :func:`shortest`; of states that look the same only so many are looked at."""
    order, looks, cut, passed_over = count(), 0, False, inf
    seen: Counter[Any] = Counter()
    classes: dict[bytes, list[int]] = {}  # of wide choices, the symbols that lead to different ones
    heap: list[tuple[float, int, int, LLMatcher, Place, tuple[int, ...], Spelling]] = []

    def push(matcher: LLMatcher, place: Place, said: tuple[int, ...], spelling: Spelling, more: Sequence[int]) -> None:
        nonlocal cut
        for symbol in more:
            spelling = alphabet.spell_on(spelling, symbol)
            byte = alphabet.byte(symbol)
            place = Place() if byte is None else place.then(byte)
        least = len(spelling.done) + spelling.least
        if least <= most:
            heapq.heappush(heap, (least, len(said) + len(more), next(order), matcher, place, (*said, *more), spelling))
        else:
            cut = True

    push(matcher, place, (), Spelling(), ())
    least = 0.0
    while heap:
        least, _, _, matcher, place, said, spelling = heapq.heappop(heap)
        if alphabet.ends(matcher, ()):
            tokens = spelling.tokens
            if tokens is None:
                continue
            if len(tokens) > least:  # a longer token would have covered more, but nothing follows
                heapq.heappush(heap, (len(tokens), len(said), next(order), matcher, place, said, spelling))
                continue
            return Ending(said, tokens)
        looks += 1
        if looks > _MOST_STATES:
            raise Unknown(int(min(least, passed_over)), gave_up=True)
        forced = alphabet(matcher.compute_ff_bytes())
        if forced:
            ahead = matcher.deep_copy()
            if ahead.consume_tokens(forced):
                push(ahead, place, said, spelling, forced)
                continue
        choices, mask = alphabet.allowed(matcher)
        alike = (place.path, len(place.word), place.quoted, mask)
        seen[alike] += 1
        if seen[alike] > most_alike:
            passed_over = min(passed_over, least)
            continue
        for symbol, ahead in _worth(alphabet, matcher, choices, mask, place, classes):
            push(ahead, place, said, spelling, (symbol,))
    raise Unknown(int(min(least, passed_over)), gave_up=not cut)


def _worth(
    alphabet: Alphabet, matcher: LLMatcher, choices: list[int], mask: bytes, place: Place, classes: dict[bytes, list[int]]
) -> Iterator[tuple[int, LLMatcher]]:
    """Choices worth a look, and the matcher behind each."""
    wide = len(choices) > _FEW
    for ends in place.closers(wide):  # what can end here does: a list, an object, a text or a number
        closers = [symbol for symbol in choices if (byte := alphabet.byte(symbol)) is not None and byte in ends]
        if closers:
            choices, wide = closers, False
            break
    if wide and mask in classes:
        choices, wide = classes[mask], False
    elif wide:  # an escape or a character of several bytes is never shorter
        plain = [symbol for symbol in choices if (byte := alphabet.byte(symbol)) is None or (byte < 0x80 and byte != _ESCAPE)]
        choices = plain or choices
    behind, kept = set(), []
    for symbol in choices:
        ahead = matcher.deep_copy()
        if not ahead.consume_token(symbol):
            continue
        if wide:
            forced = ahead.compute_ff_bytes()
            leads = (ahead.is_accepting(), forced, b"" if forced else ahead.compute_bitmask())
            if leads in behind:
                continue
            behind.add(leads)
            kept.append(symbol)
        yield symbol, ahead
    if wide:
        classes[mask] = kept
