"""Keeps an ending of a guided answer within reach of the tokens that are left."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from llguidance import LLMatcher

from kvzip_memory.prompting.alphabet import Alphabet
from kvzip_memory.prompting.endings import Ending, Unknown, shortest
from kvzip_memory.prompting.places import BEHIND_A_VALUE, QUOTE, Place

#: A text goes round in circles when it ends in so many times the same, of at most so many tokens, and of at least so many in all.
_TIMES, _PERIOD, _ROUND = 3, 64, 24


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
        closers = [symbol for symbol in choices if self._alphabet.byte(symbol) in BEHIND_A_VALUE]
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
            if self._alphabet.byte(first[0]) in (QUOTE if self._place.quoted else BEHIND_A_VALUE):
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
