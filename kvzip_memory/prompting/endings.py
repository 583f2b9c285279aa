"""The shortest way to end a guided answer, so that it is there before the tokens run out.

A grammar is walked byte by byte, where one state leads to few others, and the bytes are spelled in as few tokens as the vocabulary
allows. What is found is an ending for certain; that none is shorter holds but for grammars whose branches look alike for long.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from math import inf, isinf
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

#: Tokens of more bytes are not spelled with.
_LONGEST = 24
#: Parts of texts of which it is remembered whether a token begins with them.
_REMEMBERED = 100_000
#: States that a search may look at (0.3 to 1 s), and of those that look the same: in a second search, where the first finds nothing, more.
_MOST_STATES, _ALIKE = 3_000, (2, 32)
#: So many choices are all looked at; of more, those that lead to different choices.
_FEW = 8
_QUOTE, _ESCAPE = frozenset(b'"'), ord("\\")
#: What may stand behind a number or a word.
_BEHIND_A_VALUE = frozenset(b",]}")
#: What ends a list or an object.
_CLOSERS = frozenset(b"]}")
#: What numbers begin with.
_NUMBERS = [bytes([byte]) for byte in b"-0123456789"]
#: Numbers of fewer digits are finite.
_LARGE = 308
#: A text goes round in circles when it ends in so many times the same, of at most so many tokens, and of at least so many in all.
_TIMES, _PERIOD, _ROUND = 3, 64, 24


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


class Alphabet:
    """Bytes and added tokens, of which all tokens of a vocabulary are made.

    Args:
        vocabulary: prepared for the grammars' matchers.
        eos_ids: ids that end an answer.

    Attributes:
        tokenizer: for matchers that go symbol by symbol. Added tokens keep their ids; bytes follow behind the vocabulary.
    """

    def __init__(self, vocabulary: LLTokenizer, eos_ids: Sequence[int]) -> None:
        size = vocabulary.vocab_size
        spelled = [b"" if vocabulary.is_special_token(i) else vocabulary.decode_bytes([i]) for i in range(size)]
        self._bytes, self._ids = spelled, {}
        for i in reversed(range(size)):  # of two tokens of the same bytes the first
            if 0 < len(spelled[i]) <= _LONGEST:
                self._ids[spelled[i]] = i
        self._sorted = sorted(self._ids)
        self._beginnings: dict[bytes, bool] = {}
        self._size, self._eos = size, list(eos_ids)
        self.tokenizer = LLTokenizer(TokenizerWrapper(self), n_vocab=size + 256, eos_token=self._eos, slices=[])

    # -- what TokenizerWrapper asks for ---------------------------------------------------------------------------

    bos_token_id = None

    @property
    def eos_token_id(self) -> int:
        return self._eos[0]

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset(self._eos)

    @property
    def special_token_ids(self) -> list[int]:
        return [i for i, spelled in enumerate(self._bytes) if not spelled]

    @property
    def tokens(self) -> list[bytes]:
        return [b"" if spelled else b"<|%d|>" % i for i, spelled in enumerate(self._bytes)] + [bytes([b]) for b in range(256)]

    def __call__(self, text: bytes) -> list[int]:
        return [self._size + byte for byte in text]

    # -- symbols and tokens ---------------------------------------------------------------------------------------

    def symbols(self, token: int) -> list[int]:
        """What a token is made of."""
        return self(self._bytes[token]) if self._bytes[token] else [token]

    def byte(self, symbol: int) -> int | None:
        """None for an added token."""
        return symbol - self._size if symbol >= self._size else None

    def allowed(self, matcher: LLMatcher) -> tuple[list[int], bytes]:
        """Symbols that may follow, and the same as a mask."""
        mask = matcher.compute_bitmask()
        some = np.frombuffer(mask, dtype=np.uint8).nonzero()[0].tolist()  # few of them
        return [8 * at + bit for at in some for bit in range(8) if mask[at] >> bit & 1], mask

    def ends(self, matcher: LLMatcher, symbols: Sequence[int]) -> bool:
        """Whether an answer may go on with these and end."""
        return matcher.is_accepting() if not symbols else matcher.validate_tokens([*symbols, self._eos[0]]) == len(symbols) + 1

    def _begins(self, part: bytes) -> bool:
        """Whether a token begins with these bytes."""
        found = self._beginnings.get(part)
        if found is None:
            at = bisect_left(self._sorted, part)
            found = at < len(self._sorted) and self._sorted[at].startswith(part)
            if len(self._beginnings) < _REMEMBERED:
                self._beginnings[part] = found
        return found

    def spell(self, symbols: Sequence[int]) -> tuple[int, ...] | None:
        """As few tokens as possible; None where the vocabulary does not have the bytes."""
        spelling = Spelling()
        for symbol in symbols:
            spelling = self.spell_on(spelling, symbol)
        return spelling.tokens

    def spell_on(self, spelling: Spelling, symbol: int) -> Spelling:
        """A spelling with one more symbol."""
        byte = self.byte(symbol)
        if byte is None:
            before = spelling.tokens
            return Spelling((*before, symbol)) if before is not None else Spelling((), least=inf)
        text, best = spelling.text + bytes([byte]), spelling.best
        end = len(text)
        shortest: tuple[float, int, int] = (inf, 0, 0)  # tokens, the last of which begins at, and is
        least = inf
        for start in range(max(0, end - _LONGEST), end):
            tokens = best[start][0] + 1
            if tokens >= shortest[0] and tokens >= least:
                continue
            part = text[start:]
            if (token := self._ids.get(part)) is not None:
                shortest = min(shortest, (tokens, start, token))
            elif tokens < least and self._begins(part):
                least = tokens
        return Spelling(spelling.done, text, [*best, shortest], least=min(least, shortest[0]))


@dataclass(frozen=True)
class Spelling:
    """Symbols in as few tokens as possible.

    Attributes:
        done: tokens up to the last added token.
        text: bytes behind it.
        best: for each length of ``text``: how many tokens it takes, where the last of them begins, and its id.
        least: with whatever follows there will be at least so many tokens in ``text``.
    """

    done: tuple[int, ...] = ()
    text: bytes = b""
    best: list[tuple[float, int, int]] = field(default_factory=lambda: [(0, 0, 0)])
    least: float = 0

    @property
    def tokens(self) -> tuple[int, ...] | None:
        found, at = [], len(self.text)
        while at:
            n, start, token = self.best[at]
            if n == inf:
                return None
            found.append(token)
            at = start
        return (*self.done, *reversed(found))


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
                yield _QUOTE
            return
        if self.path:
            yield _CLOSERS
        if self.word:
            yield _BEHIND_A_VALUE

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


class Reach:
    """Keeps an ending of one answer within reach, and notices where a text goes round in circles.

    Args:
        alphabet: of the matcher.
        matcher: goes symbol by symbol; at the beginning.
        ending: of the beginning; None where it is not known.
        limit: tokens the answer may have.
        free: what is complete may be any text, and need not be JSON.

    Attributes:
        ending: of the answer so far; it fits into the tokens that are left. None where too much had to be looked at to know one: then
            the answer goes on as it likes.
        only: the token that must come next, where there is no choice any more.
        forced: whether a token was ever refused or prescribed.
        left: tokens the answer may still have.
    """

    def __init__(self, alphabet: Alphabet, matcher: LLMatcher, ending: Ending | None, limit: int, free: bool = False) -> None:
        self._alphabet, self._matcher, self._free = alphabet, matcher, free
        self.ending, self.left, self.forced = ending, limit, False
        self.only: int | None = None
        self._place = Place()
        self._unread: list[int] = []  # tokens the matcher has not seen yet
        self._text: list[int] = []  # tokens that changed nothing about how the answer can end: those of a string

    def take(self, token: int, complete: bool) -> bool:
        """The answer goes on with a token; False, and nothing happens, if it could not end in time then.

        Args:
            complete: the answer may end behind the token.
        """
        place, known = self._place, self.ending
        ending: Ending | None = Ending((), ())
        matcher = None if complete else self._read().deep_copy()
        symbols = self._alphabet.symbols(token) if matcher is None else self._consume(matcher, token)
        if complete and self._free:
            place = Place()
        else:
            for symbol in symbols:
                byte = self._alphabet.byte(symbol)
                place = Place() if byte is None else place.then(byte)
                if token != self.only and place.overflows():  # 1e999 is valid JSON, and no number that Python has
                    return False
        if matcher is None:
            self._unread.append(token)
            same = place.number and known == ending
        else:
            try:
                ending = self._behind(token, tuple(symbols), matcher, place, known) if known is not None else None
            except Unknown as unknown:
                if not unknown.gave_up:
                    self.forced = True
                    return False
                ending = None
            self._matcher, same = matcher, ending is known
        self._text = [*self._text[1 - _TIMES * _PERIOD :], token] if same else []
        self._place, self.ending = place, ending
        self.left -= 1
        self.only = None
        if goes_round(self._text):
            self._close()
        return True

    def give_up(self) -> None:
        """The next token is the ending's, or ends a number."""
        self.forced = True
        if self.ending is not None:
            self.only = self.ending.tokens[0] if self.ending.tokens else self._alphabet.eos_token_id
            return
        choices, _ = self._alphabet.allowed(self._read())
        closers = [symbol for symbol in choices if self._alphabet.byte(symbol) in _BEHIND_A_VALUE]
        spelled = self._alphabet.spell((closers or choices)[-1:])
        self.only = spelled[0] if spelled else None

    def _read(self) -> LLMatcher:
        """The matcher, which has seen all there is."""
        for token in self._unread:
            self._consume(self._matcher, token)
        self._unread = []
        return self._matcher

    def _consume(self, matcher: LLMatcher, token: int) -> list[int]:
        """Show a matcher a token; returns it as symbols."""
        symbols = self._alphabet.symbols(token)
        if matcher.validate_tokens(symbols) < len(symbols):  # an added token that the grammar has by its id, not by what it spells
            symbols = [token]
        matcher.consume_tokens(symbols)
        return symbols

    def _behind(self, token: int, symbols: tuple[int, ...], matcher: LLMatcher, place: Place, known: Ending) -> Ending:
        """An ending behind a token. Most often the one known so far is one, too, or what of it is not said yet.

        Raises:
            Unknown: none within the tokens that are left, or too much to look at.
        """
        alphabet = self._alphabet
        ending: Ending | None = None
        if known.symbols[: len(symbols)] == symbols:
            rest = known.symbols[len(symbols) :]
            tokens = known.tokens[1:] if token == known.tokens[0] else alphabet.spell(rest)
            ending = None if tokens is None else Ending(rest, tokens)
        else:  # what begins with a digit could go on with a number, which is not the shortest and may become too large
            whole, parts = range(bool(known.symbols)), range(len(known.symbols) - 1, 0, -1)
            for start in (*parts, *whole) if place.number else (*whole, *parts):
                rest = known.symbols[start:]
                if alphabet.ends(matcher, rest):
                    tokens = known.tokens if start == 0 else alphabet.spell(rest)
                    ending = known if start == 0 else None if tokens is None else Ending(rest, tokens)
                    break
        if ending is not None and len(ending.tokens) < self.left:
            return ending
        return shortest(alphabet, matcher, place, most=self.left - 1)

    def _close(self) -> None:
        """End the text or number that goes round in circles, if it may end here."""
        self._text = []
        if self.ending is None:
            return
        if not self.ending.symbols:  # a number that is all of the answer
            self.give_up()
            return
        with suppress(Unknown):
            self.ending = shortest(self._alphabet, self._matcher, self._place, most=self.left)
            first, rest = self.ending.symbols[:1], self.ending.symbols[1:]
            if self._alphabet.byte(first[0]) in (_QUOTE if self._place.quoted else _BEHIND_A_VALUE):
                closer, then = self._alphabet.spell(first), self._alphabet.spell(rest)
                roomy = closer is not None and then is not None and len(then) < self.left
                self.only, self.forced = closer[0] if closer and roomy else self.ending.tokens[0], True


def goes_round(tokens: Sequence[int]) -> bool:
    """Whether the last tokens are the same ones again and again."""
    for period in range(1, min(_PERIOD, len(tokens) // _TIMES) + 1):
        span = max(_TIMES * period, _ROUND)
        if len(tokens) >= span and tokens[-1] == tokens[-1 - period] and tokens[period - span :] == tokens[-span:-period]:
            return True
    return False
