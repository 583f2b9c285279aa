"""From logits to text: sampling, the decode loop, stop strings, incremental detokenising."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import inf
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from kvzip_memory.errors import InputError, ModelError, UnfinishedError
from kvzip_memory.inference.processors import Processors
from kvzip_memory.prompting.encoding import added_tokens
from kvzip_memory.prompting.guidance import Grammar, Guide
from kvzip_memory.system.flags import checked_flag
from kvzip_memory.system.printable import brief

#: So many stop strings an answer may have, of so many characters.
MOST_STOPS, LONGEST_STOP = 64, 1024


@dataclass(frozen=True)
class GenerationParams:
    """How an answer is generated. None is the default of each, and a text that spells a number is that number.

    What the model's ``generation_config`` says holds where a call says nothing, as in ``model.generate``: ``top_p``, ``top_k`` and
    what else it has for sampling where a call samples, ``repetition_penalty``, ``no_repeat_ngram_size``, ``suppress_tokens``,
    ``bad_words_ids``, ``min_new_tokens`` and all that is not sampling always, and ``stop_strings``. Its ``do_sample``,
    ``temperature``, ``max_new_tokens`` and ``max_length`` do not: answers are greedy and end in time unless a call says otherwise.

    Attributes:
        max_new_tokens: at most so many tokens, cut to what the window still holds.
        temperature: 0 takes the likeliest token (greedy), else logits are divided by it before sampling.
        top_p: sample from the smallest set of tokens whose probabilities sum to this, in (0, 1]; None is the model's own, 1 is off.
        top_k: sample from the k likeliest tokens; None is the model's own, more than its vocabulary is off.
        seed: makes sampling repeatable, any integer of 64 bits; None draws one.
        stop: texts that end the answer, at most 64 of at most 1,024 characters; they are not part of it. None is the model's own, ``[]``
            is none.
        repetition_penalty: as in transformers: logits of tokens that have occurred, in what the answer sees or says, are divided by it
            (multiplied where negative). 1 is off, and 1e-6 to 1e6 the range; None is the model's own. What a context has evicted has
            occurred.
        no_repeat_ngram_size: as in transformers: no n tokens come twice, those that the answer sees included; 0 is off. What a grammar
            prescribes may, and any where no token is left. None is the model's own.
        grammar: what the answer may be, see :mod:`kvzip_memory.prompting.guidance`; None leaves it free.
        speculate: guess tokens, by prompt lookup and by what the grammar leaves, and check several in one step while no other
            answer runs. The answer is the same, sooner where it quotes the context or keeps to a form.

    Raises:
        InputError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    grammar: Grammar | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        for parameter in fields(self):
            if getattr(self, parameter.name) is None:
                object.__setattr__(self, parameter.name, parameter.default)
        for name, whole, holds, wanted in _RANGES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(name, value, whole, holds, wanted))
        checked_flag("speculate", self.speculate)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InputError(f"grammar is {brief(self.grammar)}; give what engine.guidance makes of a schema")
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(texts, Collection) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"stop is {brief(self.stop)}; it must be a text or a list of texts")
        if len(texts) > MOST_STOPS:
            raise InputError(f"stop has {len(texts):,} texts; give {MOST_STOPS} at most")
        if (longest := max(map(len, texts), default=0)) > LONGEST_STOP:
            raise InputError(f"a stop string has {longest:,} characters; give its first {LONGEST_STOP:,} at most")
        if "" in texts:
            raise InputError("a stop string is empty; every answer would end at once")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationParams:
        """These options of a call.

        Raises:
            InputError: one that is unknown, or a value outside its range.
        """
        known = {parameter.name for parameter in fields(cls)}
        if unknown := sorted(options.keys() - known):
            raise InputError(f"options {brief(unknown)} are unknown; known are {sorted(known)}")
        return cls(**options)

    @property
    def free(self) -> bool:
        """Whether an answer may be any text, and a model may think before it."""
        return self.grammar is None or self.grammar.free

    def stops(self, settings: GenerationConfig | None = None) -> tuple[str, ...]:
        """The texts that end the answer: these, or a model's own."""
        stop = settings.stop_strings if self.stop is None and settings is not None else self.stop
        return (stop,) if isinstance(stop, str) else tuple(stop or ())


#: Of the parameters that are numbers: name, whether whole, what must hold, and that in words.
_RANGES: tuple[tuple[str, bool, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens", True, lambda n: n >= 1, "a whole number, at least 1"),
    ("temperature", False, lambda t: 0 <= t < inf, "a number, 0 (greedy) or more"),
    ("top_p", False, lambda p: 0 < p <= 1, "a number in (0, 1]"),
    ("top_k", True, lambda k: k >= 1, "a whole number, at least 1; None is off"),
    ("seed", True, lambda n: -(2**63) <= n < 2**64, "a whole number of 64 bits, from -2**63 to 2**64 - 1"),
    ("repetition_penalty", False, lambda p: 1e-6 <= p <= 1e6, "a number from 1e-6 to 1e6; 1 is off"),
    ("no_repeat_ngram_size", True, lambda n: n >= 0, "a whole number, at least 1; 0 is off"),
)


def _number(name: str, value: Any, whole: bool, holds: Callable[[Any], bool], wanted: str) -> int | float:
    """A parameter's value as the number that it is or spells."""
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        if isinstance(value, bool | bytes | bytearray):
            raise TypeError
        spelled = isinstance(value, str) and value.strip().lstrip("+-").isdigit()
        exact = int(value) if spelled or hasattr(value, "__index__") else float(value)
        number = int(exact) if whole else float(exact)
        if number == exact and holds(number):
            return number
    raise InputError(f"{name} is {brief(value)}; it must be {wanted}")


#: A token that cannot end in time is left out and another one picked, so often; then the ending's is taken.
_PICKS = 8
#: Below this temperature logits divided by it overflow; the likeliest token is all that is left long before.
_COLD = 1e-6


class Sampler:
    """Picks the next token of one row with transformers' logits processors, among those that the grammar allows.

    Args:
        device: of the logits.
        limit: tokens the answer may have: a grammar's answer ends within them.
        ids: all that the answer sees, for processors that look at it.
        settings: the model's own, see :func:`~kvzip_memory.inference.processors.own_settings`.
        config: the model's.
        eos_ids: ids that end the answer.

    Raises:
        InputError: a setting of the model that transformers cannot use.
    """

    def __init__(
        self,
        params: GenerationParams,
        device: torch.device,
        limit: int | None = None,
        ids: ArrayLike = (),
        settings: GenerationConfig | None = None,
        config: Any = None,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.guide = params.grammar.start(limit) if params.grammar else None
        self._greedy = params.temperature < _COLD
        given = {name: getattr(params, name) for name in ("top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size")}
        given["temperature"] = None if self._greedy else params.temperature
        limit = params.max_new_tokens if limit is None else limit
        self._own = Processors(settings or GenerationConfig(), given, config or PreTrainedConfig(), device, ids, limit, [*eos_ids])
        if self._greedy:
            return
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def hurried(self) -> bool:
        """Whether a grammar's answer was made to end."""
        return self.guide is not None and self.guide.hurried

    def __call__(self, logits: Tensor) -> int:
        """Token for ``logits [vocab]``.

        Raises:
            ModelError: a logit is not a number.
        """
        own = self._own
        scores = own.rules(own.seen, logits[None])[0] if own.rules else logits
        if own.rules and scores.max() == -inf:  # every token has been ruled out
            scores = logits
        token = self._pick(scores) if self.guide is None else self._guided(self.guide, scores, logits)
        own.append(token)
        return token

    def _guided(self, guide: Guide, scores: Tensor, logits: Tensor) -> int:
        """A token that the grammar allows, with which the answer can still end in time."""
        masked = guide.mask(scores)
        if self._own.rules and masked.max() == -inf:  # all that the grammar allows has been ruled out
            masked = guide.mask(logits)
        for _ in range(_PICKS):
            token = self._pick(masked)
            if guide.take(token):
                return token
            masked[token] = -inf
            if masked.max() == -inf:
                break
        guide.give_up()
        token = self._pick(guide.mask(logits))
        guide.take(token)
        return token

    def _pick(self, logits: Tensor) -> int:
        highest, token = logits.max(-1)
        if highest.isnan():
            raise ModelError("the model computed logits that are not numbers (usually float16 overflow); load it in bfloat16 or float32")
        if self._greedy:
            return int(token)
        scores = self._own.sampling(self._own.seen, logits[None])
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))

    def follow(self, guess: Sequence[int], logits: Tensor) -> list[int]:
        """Tokens for ``logits [len(guess) + 1, vocab]``, each after the guess before it: up to the first that was not guessed,
        or that ends the grammar.
        """
        tokens: list[int] = []
        for i, row in enumerate(logits):
            tokens.append(self(row))
            if i == len(guess) or tokens[-1] != guess[i] or (self.guide is not None and self.guide.ended):
                break
        return tokens


#: A character has no more bytes, and so no more tokens.
_BYTES = 4


class Detokenizer:
    """Text of a growing list of tokens, piece by piece, in time linear in their number.

    A character is held back until all its bytes are there. Bytes that can no longer become one are shown as ``\ufffd``, as the
    tokenizer's own ``decode`` shows them. But a SentencePiece tokenizer's decoder would, once a byte comes that makes no character,
    take back the characters that bytes right before it have made: those stay.

    Args:
        tokenizer: of the model.
        shown: special tokens whose spelling belongs to the text; others do not show.
    """

    def __init__(self, tokenizer: Any, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._ids: list[int] = []  # from a token or more before what is new: decoders look at neighbours
        self._done = 0  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text the token completes, often its own, sometimes nothing."""
        if token in self._shown:
            text = self.flush() + self._tokenizer.convert_ids_to_tokens(token)
            self._ids, self._done = [], 0
            return text
        if not self._decode([token]) and self._silent(token):
            return ""
        self._ids.append(token)
        return self._advance(complete=False)

    def flush(self) -> str:
        """What is still held back."""
        return self._advance(complete=True)

    def _advance(self, complete: bool) -> str:
        before, text = self._decode(self._ids[: self._done]), self._decode(self._ids)
        if not text.startswith(before):  # a byte has spoiled those before it
            self._ids, self._done, before = self._ids[self._done :], 0, ""
            text = self._decode(self._ids)
        if len(text) <= len(before):
            return ""
        end = len(self._ids)
        if text.endswith("\ufffd") and not complete:
            end = self._settled(text)
            text = self._decode(self._ids[:end]) if end > self._done else before
        if end > self._done:
            self._ids, self._done = self._ids[self._done :], end - self._done
        return text[len(before) :]

    def _settled(self, text: str) -> int:
        """So many tokens no byte to come can change the text of, when it ends in what is no character, or not yet one.

        That may begin with any of the last three tokens. Where the text can be cut tells: some decoders show what is not yet a
        character as one, others its bytes one by one, and then it can be cut anywhere.
        """
        end = len(self._ids)
        if end - self._done < _BYTES:
            return self._done
        for n in range(end - _BYTES + 1, end):
            if self._decode(self._ids[:n]) + self._decode(self._ids[n:]) == text:
                return n
        return end

    def _silent(self, token: int) -> bool:
        """Whether decoding leaves a token out, a special one or one that a model has beyond its tokenizer's."""
        return token >= len(self._tokenizer) or token in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(i for i, token in added_tokens(self._tokenizer).items() if token.special)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopMatcher:
    """Finds stop strings in streamed text, also ones that begin in one piece and end in another; in time linear in the text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._searches = [_Search(stop) for stop in dict.fromkeys(stops)]
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop string was met; text that may begin one is held back."""
        text, before = self._held + piece, len(self._held)
        found = [at for search in self._searches if (at := search.push(piece)) is not None]
        if found:
            self.flush()
            return text[: before + min(found)], True
        shown = len(text) - max((search.begun for search in self._searches), default=0)
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        for search in self._searches:
            search.begun = 0
        return held


class _Search:
    """Looks for one text in pieces of another, and at none of their characters twice (Knuth, Morris and Pratt).

    Attributes:
        begun: so many characters that the text begins with are the last ones seen.
    """

    def __init__(self, text: str) -> None:
        self._text, self._shorter = text, [0]  # of each beginning, the longest shorter one that it ends in
        self.begun = 0
        for char in text[1:]:
            self._shorter.append(self._step(char))
        self.begun = 0

    def push(self, piece: str) -> int | None:
        """Where the text begins that ends in this piece first, counted from the piece's beginning; None if it does not end there."""
        for at, char in enumerate(piece, 1):
            if self._step(char) == len(self._text):
                return at - self.begun
        return None

    def _step(self, char: str) -> int:
        while self.begun and char != self._text[self.begun]:
            self.begun = self._shorter[self.begun - 1]
        self.begun += char == self._text[self.begun]
        return self.begun


@dataclass
class Answer:
    """What :func:`decode` has produced so far.

    Attributes:
        ids: sampled tokens; the one that ended the answer is not among them.
        text: their text up to a stop string.
        finish_reason: ``"stop"`` (end of turn or stop string), ``"length"`` or ``"cancelled"``, None while it goes on. ``"forced"`` is
            the session's word for a stop that guidance saw to.
        cut: whether a stop string ended it, so that the last ids may say more than the text.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    cut: bool = False


def decode(
    tokens: Iterable[int],
    answer: Answer,
    stops: Sequence[str],
    limit: int,
    eos_ids: frozenset[int],
    tokenizer: Any,
    shown: frozenset[int] = frozenset(),
    grammar: Grammar | None = None,
) -> Iterator[str]:
    """Pieces of an answer's text as they come; ``answer`` is filled in on the way.

    Args:
        tokens: sampled tokens; where they end by themselves the answer was cancelled.
        limit: at most so many tokens.
        shown: special tokens that are part of the text.
        grammar: what the answer must keep to.

    Raises:
        UnfinishedError: cut before the grammar lets it end.
    """
    detokenizer, matcher = Detokenizer(tokenizer, shown), StopMatcher(stops)
    guide = grammar.start() if grammar else None  # at the token that is shown; the sampler's may be ahead
    for token in tokens:
        if guide is not None:
            guide.take(token)
        if token in eos_ids:
            answer.finish_reason = "stop"
            piece = detokenizer.flush()
        else:
            answer.ids.append(token)
            piece = detokenizer.push(token)
            ended = guide is not None and guide.ended
            if not ended and grammar is not None and guide is not None and len(answer.ids) == limit:
                ended = guide.complete and not grammar.free  # a number could always go on
            if ended or len(answer.ids) == limit:
                answer.finish_reason = "stop" if ended else "length"
                piece += detokenizer.flush()
        piece, answer.cut = matcher.push(piece)
        if answer.cut:
            answer.finish_reason = "stop"
        elif answer.finish_reason is not None:
            piece += matcher.flush()
        answer.text += piece
        if piece:
            yield piece
        if answer.finish_reason is None:
            continue
        if guide is not None and not guide.complete:
            why = "a stop string" if answer.cut else f"its limit of {limit} tokens"
            way_out = "leave out the stop strings that JSON may hold" if answer.cut else "allow more tokens, or ask for less"
            raise UnfinishedError(f"the answer was cut by {why} before its JSON was complete; {way_out}")
        return
    answer.finish_reason = "cancelled"
