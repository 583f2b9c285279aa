"""From prompts to token ids, as the model's tokenizer makes them, but that control tokens come from the template only.

A rendered prompt is tokenised whole, so that a text's first and last characters merge with the template's as they do in
training. What tells the template's control tokens from their spelling inside a text is a spelling that no text can hold:
:meth:`Encoder.spell` gives them one, and they are encoded by a copy of the tokenizer that knows them by no other.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from kvzip_memory.errors import InputError

#: Made anew by each process, so that no text can hold it.
NONCE = uuid.uuid4().hex

#: How families of models write what they think before they answer.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

_OPEN, _CLOSE = "\ue000", "\ue001"
_SECRET = re.compile(f"{_OPEN}{NONCE}[0-9a-f]+{_CLOSE}")

# How far back and ahead it is looked for tokens that a cut would change. No token of a vocabulary is longer.
_WINDOW = 256

# A text of fewer characters for each token is tokenised whole.
_SPARSE = 8

# Of texts of so many characters the ids of so many are remembered, the last used: a context loaded again takes a fourth of the time.
_LONG, _REMEMBERED = 1024, 32

# One of these, put in front, keeps a tokenizer from beginning a text with a space of its own; see `continued`.
_ANCHORS = ("\x01", "\n", "|", "0")
_PROBES = ("a", " a", "\n", "\n\n", "1", ".", "é", "<", "東")


def knows_mistral(tokenizer: Any) -> bool:
    """Whether it is one of mistral-common's, which transformers gives for Mistral's newer models."""
    return type(tokenizer).__name__ == "MistralCommonBackend"


def added_tokens(tokenizer: Any) -> dict[int, AddedToken]:
    """Added tokens by id. mistral-common's tokenizers know only control tokens."""
    if not knows_mistral(tokenizer):
        return dict(tokenizer.added_tokens_decoder)
    pairs = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {i: AddedToken(content, special=True, normalized=False) for i, content in pairs}


def token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """Gives what an ordinary token of mistral-common's or of another SentencePiece tokenizer stands for."""
    tekken = getattr(tokenizer.tokenizer.instruct_tokenizer.tokenizer, "id_to_byte_piece", None) if knows_mistral(tokenizer) else None
    return tekken or (lambda i: _bytes(tokenizer.convert_ids_to_tokens(i)))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@dataclass(frozen=True)
class Tokens:
    """Ids of a text, and the characters ``[starts[i], ends[i])`` of each."""

    ids: list[int]
    starts: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]

    def before(self, at: int) -> int:
        """How many tokens end before a character."""
        return int(np.searchsorted(self.ends, at, side="right"))

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The tokens ``[first, last)`` that hold any of the characters ``[start, end)``."""
        return self.before(start), int(np.searchsorted(self.starts, end, side="left"))


class Encoder:
    """Token ids of spelled text.

    Args:
        tokenizer: a transformers tokenizer. It is copied: what others do to it (truncation, padding) changes nothing here.
        control: the control tokens' spellings by id.
    """

    def __init__(self, tokenizer: Any, control: Mapping[int, str]) -> None:
        self._secrets = {content: f"{_OPEN}{NONCE}{i:x}{_CLOSE}" for i, content in control.items()}
        self._controls = {secret: content for content, secret in self._secrets.items()}
        self._ids = {self._secrets[content]: i for i, content in control.items()}
        longest_first = sorted(self._secrets, key=len, reverse=True)
        #: Matches control tokens as a text would spell them.
        self.literals = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._anchor = ""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._encode: Callable[[str], Tokens] = (
            _Whole(backend, control, self._secrets).encoded if backend is not None else _Pieces(tokenizer, self._ids).encoded
        )
        self._remembered = lru_cache(_REMEMBERED)(self._compact)
        self._anchor = self._found_anchor()

    def spell(self, text: str) -> str:
        """A template's text with its control tokens in the spelling that only they have."""
        return self.literals.sub(lambda found: self._secrets[found[0]], text)

    def unspell(self, text: str) -> str:
        """The reverse of :meth:`spell`."""
        return _SECRET.sub(lambda found: self._controls[found[0]], text)

    def behind(self, text: str, n: int) -> str:
        """Spelled text without its first ``n`` characters, control tokens counted as they are unspelled."""
        start = 0
        for found in _SECRET.finditer(text):
            if n <= found.start() - start:
                break
            n -= found.start() - start + len(self._controls[found[0]])
            start = found.end()
        return text[start + n :]

    def blank(self, text: str) -> str:
        """Spelled text with nothing readable in the place of control tokens; as long as before."""
        return _SECRET.sub(lambda found: "\0" * len(found[0]), text)

    def ids(self, text: str) -> list[int]:
        """Ids of spelled text that begins a prompt."""
        return self._encoded(text).ids if text else []

    def continued(self, text: str) -> list[int]:
        """Ids of spelled text that goes on behind other text, without the space that some tokenizers put in front."""
        return self.tokens(text, True).ids

    def tokens(self, text: str, continued: bool = False) -> Tokens:
        """Ids of spelled text and where they lie in it."""
        anchor = self._anchor if continued else ""
        if not text:
            return Tokens([], np.empty(0, int), np.empty(0, int))
        found = self._encoded(anchor + text)
        if not anchor:
            return found
        skip = len(self._encoded(anchor).ids)
        return Tokens(found.ids[skip:], found.starts[skip:] - len(anchor), found.ends[skip:] - len(anchor))

    def forget(self) -> None:
        """Keep no text that was read."""
        self._remembered.cache_clear()

    def _encoded(self, text: str) -> Tokens:
        if len(text) < _LONG:
            return self._encode(text)
        ids, starts, ends = self._remembered(text)
        return Tokens(ids.tolist(), starts, ends)

    def _compact(self, text: str) -> tuple[np.ndarray[Any, Any], ...]:
        tokens = self._encode(text)
        compact = tuple(np.asarray(numbers, np.int32) for numbers in (tokens.ids, tokens.starts, tokens.ends))
        for numbers in compact:
            numbers.flags.writeable = False  # they are given to many
        return compact

    def least(self, text: str, most: int) -> int:
        """So many tokens a text has at least: more than ``most`` if it has more, and no more of it is read than tells that.

        Of a beginning those tokens count that what follows cannot change. A text that has fewer characters than tokens that are
        wanted could have is not read, and has 0 at least.
        """
        read, found = _SPARSE * max(most, 1), 0
        while read < len(text) and found <= most:
            found = self._encode(text[:read]).before(read - _WINDOW)
            read *= 4
        return found

    def unsettled(self, before: str, after: str, continued: bool = False) -> str:
        """The end of ``before`` whose tokens ``after`` would change: read apart from it, the rest keeps its ids.

        Mostly nothing, or a full stop that becomes one token with the line's end behind it.
        """
        secrets = [found.span() for found in _SECRET.finditer(before, max(0, len(before) - 4 * _WINDOW))]
        start, first = secrets[-1] if secrets else (0, 0)
        if len(before) - first > _WINDOW:
            start = first = len(before) - _WINDOW
        opens = start == 0 and not continued
        window, behind = before[start:], self._near(after)
        read = self.ids if opens or (secrets and start == secrets[-1][0]) else self.continued
        whole = read(window + behind)
        for n in range(len(before) - first + 1):
            end = len(window) - n
            if [*read(window[:end]), *self.continued(window[end:] + behind)] == whole:
                return window[end:]
        return ""

    def _near(self, text: str) -> str:
        """The beginning of a text, no shorter than any token and with no control token cut."""
        found = _SECRET.search(text)
        return text[: min(_WINDOW, found.end() if found else _WINDOW)] if not found or found.end() > _WINDOW else text[: found.end()]

    def _found_anchor(self) -> str:
        """What `continued` puts in front; nothing for a tokenizer that adds no space."""
        for anchor in _ANCHORS:
            alone = self.ids(anchor)
            behind = [self.ids(anchor + probe) for probe in _PROBES]
            if alone and all(ids[: len(alone)] == alone for ids in behind):
                plain = all(ids[len(alone) :] == self.ids(probe) for ids, probe in zip(behind, _PROBES, strict=True))
                return "" if plain else anchor
        return ""


class _Whole:
    """A copy of a fast tokenizer in which control tokens have their secret spellings."""

    def __init__(self, backend: Tokenizer, control: Mapping[int, str], secrets: Mapping[str, str]) -> None:
        self._backend = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._backend.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._backend.pre_tokenizer = backend.pre_tokenizer
        added = sorted(backend.get_added_tokens_decoder().items())
        spelled = {i: secrets[control[i]] if i in control else token.content for i, token in added}
        flags = ("single_word", "lstrip", "rstrip", "special")
        found = {i: token.normalized and self._stays(spelled[i]) for i, token in added}
        copies = [AddedToken(spelled[i], **{name: getattr(token, name) for name in flags}, normalized=found[i]) for i, token in added]
        self._backend.add_special_tokens([copy for copy in copies if copy.special])
        self._backend.add_tokens([copy for copy in copies if not copy.special])
        self._real = {self._backend.token_to_id(text): i for i, text in spelled.items()}
        model = backend.model
        unknown = getattr(model, "unk_token", None)
        # What the vocabulary itself holds of them could come out of a text, as from a unigram model; an unknown character may.
        self._forged = {i for i, text in control.items() if model.token_to_id(text) == i and text != unknown}

    def _stays(self, spelled: str) -> bool:
        """Whether a token can be looked for in normalised text: one that the normaliser changes is not found there, or not everywhere."""
        normalizer = self._backend.normalizer
        return normalizer is None or normalizer.normalize_str(spelled) == spelled

    def encoded(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        raw, offsets = encoding.ids, np.asarray(encoding.offsets, dtype=int).reshape(-1, 2)
        if self._forged and not self._forged.isdisjoint(raw):
            raw, offsets = self._in_characters(text, raw, offsets)
        real = self._real
        return Tokens([real.get(i, i) for i in raw], offsets[:, 0], offsets[:, 1])

    def _in_characters(self, text: str, raw: list[int], offsets: np.ndarray[Any, Any]) -> tuple[list[int], np.ndarray[Any, Any]]:
        """The same, with the characters' own tokens for a control token that a text spells."""
        ids, places = list[int](), list[tuple[int, int]]()
        for i, (start, end) in zip(raw, offsets.tolist(), strict=True):
            if i not in self._forged:
                ids.append(i)
                places.append((start, end))
                continue
            for at in range(start, end):
                spelled = [j for j in self._inside(text[at]) if j not in self._forged]
                ids += spelled
                places += [(at, at + 1)] * len(spelled)
        return ids, np.asarray(places, dtype=int).reshape(-1, 2)

    def _inside(self, char: str) -> list[int]:
        """Ids of a character that does not begin a text."""
        for anchor in _ANCHORS:
            alone, both = (self._backend.encode(text, add_special_tokens=False).ids for text in (anchor, anchor + char))
            if alone and both[: len(alone)] == alone:
                return both[len(alone) :]
        return self._backend.encode(char, add_special_tokens=False).ids


class _Pieces:
    """A tokenizer that cannot be copied so: what stands between control tokens is encoded piece by piece."""

    def __init__(self, tokenizer: Any, ids: Mapping[str, int]) -> None:
        self._tokenizer, self._ids, self._control = tokenizer, ids, set(ids.values())
        # mistral-common's never makes a control token of a text, and knows no such option.
        self._options = {} if knows_mistral(tokenizer) else {"split_special_tokens": True}
        self._bytes = token_bytes(tokenizer)

    def encoded(self, text: str) -> Tokens:
        ids, starts, ends = list[int](), [np.empty(0, int)], [np.empty(0, int)]
        for at, piece, control in self._pieces(text):
            own = [control] if control is not None else self._tokenizer(piece, add_special_tokens=False, **self._options).input_ids
            if control is None and not self._control.isdisjoint(own):
                raise InputError(f"the tokenizer turns the text {piece[:80]!r} into control tokens; use its fast version")
            ids += own
            places = [0, len(piece)] if control is not None else self._places(own, piece)
            starts.append(at + np.asarray(places[:-1], int))
            ends.append(at + np.asarray(places[1:], int))
        return Tokens(ids, np.concatenate(starts), np.concatenate(ends))

    def _pieces(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        start = 0
        for found in _SECRET.finditer(text):
            if found.start() > start:
                yield start, text[start : found.start()], None
            yield found.start(), found[0], self._ids[found[0]]
            start = found.end()
        if start < len(text):
            yield start, text[start:], None

    def _places(self, ids: Sequence[int], piece: str) -> list[int]:
        """Where in a piece each token begins, and its end; a token that begins within a character begins with it."""
        widths = [len(self._bytes(i)) for i in ids]
        extra = sum(widths) - len(piece.encode())  # a space put in front
        characters = np.repeat(np.arange(len(piece)), [len(c.encode()) for c in piece])
        at = np.clip(np.cumsum([0, *widths]) - extra, 0, len(characters))
        return [*np.append(characters, len(piece))[at].tolist()]


def _bytes(token: str) -> bytes:
    """What a SentencePiece token stands for."""
    found = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(found[1], 16)]) if found else token.replace("▁", " ").encode()
