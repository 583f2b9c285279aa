"""Bytes and added tokens, of which all tokens of a vocabulary are made, and the fewest tokens that spell them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

#: Tokens of more bytes are not spelled with.
_LONGEST = 24
#: Parts of texts of which it is remembered whether a token begins with them.
_REMEMBERED = 100_000


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
