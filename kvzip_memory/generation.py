"""From logits to text: sampling, the decode loop, stop strings, incremental detokenising."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvzip_memory.errors import InputError, ModelError, UnfinishedError
from kvzip_memory.guidance import Grammar


@dataclass(frozen=True)
class GenerationParams:
    """How an answer is generated.

    Attributes:
        max_new_tokens: at most so many tokens, cut to what the window still holds.
        temperature: 0 takes the likeliest token (greedy), else logits are divided by it before sampling.
        top_p: sample from the smallest set of tokens whose probabilities sum to this, in (0, 1].
        top_k: sample from the k likeliest tokens.
        seed: makes sampling repeatable; None draws one.
        stop: texts that end the answer; they are not part of it.
        grammar: what the answer may be, see :mod:`kvzip_memory.guidance`; None leaves it free.
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
    grammar: Grammar | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; it must be a whole number, at least 1")
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1")
        if "" in self.stops:
            raise InputError("a stop string is empty; every answer would end at once")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Sampler:
    """Picks the next token of one row with transformers' logits processors, among those that the grammar allows."""

    def __init__(self, params: GenerationParams, device: torch.device) -> None:
        self.guide = params.grammar.start() if params.grammar else None
        self._greedy = params.temperature == 0
        if self._greedy:
            return
        self._processors = LogitsProcessorList()
        if params.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k is not None:
            self._processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p is not None and params.top_p < 1:
            self._processors.append(TopPLogitsWarper(params.top_p))
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """Token for ``logits [vocab]``.

        Raises:
            ModelError: a logit is not a number.
        """
        if self.guide is not None:
            logits = self.guide.mask(logits)
        token = self._pick(logits)
        if self.guide is not None:
            self.guide.take(token)
        return token

    def _pick(self, logits: Tensor) -> int:
        highest, token = logits.max(-1)
        if highest.isnan():
            raise ModelError("the model computed logits that are not numbers (usually float16 overflow); load it in bfloat16 or float32")
        if self._greedy:
            return int(token)
        scores = self._processors(torch.empty(1, 0, dtype=torch.long, device=logits.device), logits[None])
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


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; a character is held back until all its bytes are there.

    Args:
        tokenizer: of the model.
        shown: special tokens whose spelling belongs to the text; others do not show.
    """

    def __init__(self, tokenizer: Any, shown: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._ids: list[int] = []
        self._start = 0  # decoding starts here, a token or more before what is new: decoders look at neighbours
        self._done = 0  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """The text the token completes, often its own, sometimes nothing."""
        if token in self._shown:
            text = self.flush() + self._tokenizer.convert_ids_to_tokens(token)
            self._ids, self._start, self._done = [], 0, 0
            return text
        self._ids.append(token)
        return self._advance(complete=False)

    def flush(self) -> str:
        """What is still held back."""
        return self._advance(complete=True)

    def _advance(self, complete: bool) -> str:
        before = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not complete):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopMatcher:
    """Finds stop strings in streamed text, also ones that begin in one piece and end in another."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop string was met; text that may begin one is held back."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


@dataclass
class Answer:
    """What :func:`decode` has produced so far.

    Attributes:
        ids: sampled tokens; the one that ended the answer is not among them.
        text: their text up to a stop string.
        finish_reason: ``"stop"`` (end of turn or stop string), ``"length"`` or ``"cancelled"``, None while it goes on.
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
            raise UnfinishedError(f"the answer was cut by {why} before its JSON was complete; allow more tokens, or ask for less")
        return
    answer.finish_reason = "cancelled"
