"""Conversations over a context."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from kvzip_memory.cache import Row, Tail
from kvzip_memory.compression import DensePairs
from kvzip_memory.context import CompressedContext, Lease, Receipt
from kvzip_memory.errors import InputError, SessionBusyError, WindowError
from kvzip_memory.generation import Answer, Detokenizer, GenerationParams, Sampler, decode
from kvzip_memory.modeling import LanguageModel
from kvzip_memory.prompt import PromptBuilder
from kvzip_memory.sources import Message
from kvzip_memory.speculation import PromptLookup
from kvzip_memory.talk import Asked, Talk
from kvzip_memory.tools import Tool


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer.

    Attributes:
        input_tokens: everything the answer could see, the context's tokens included.
        output_tokens: generated tokens.
        cached_tokens: those of the input whose pairs were reused and not computed for this answer.
    """

    input_tokens: int
    output_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: up to the end of the turn or a stop string.
        usage: token counts.
        finish_reason: ``"stop"``, ``"length"`` or ``"cancelled"``.
        receipt: what was reused, and milliseconds of ``prefill`` (the question) and ``decode``.
    """

    text: str
    usage: Usage
    finish_reason: str
    receipt: Receipt

    def __str__(self) -> str:
        return self.text


#: Builds the context of a parent, if any, and ids behind it: how many of them are head without a parent, their pairs,
#: ratio and name follow.
Fold = Callable[[CompressedContext | None, Sequence[int], int, DensePairs, float | None, str | None], CompressedContext]

_NO_LEASE = Lease((), Receipt(None, hit=False, tier="none", reason="asked without a context"))


@dataclass
class _Turn:
    """An answer under way; shared by the stream that shows it and the session that computes it."""

    asked: Asked
    params: GenerationParams
    answer: Answer = field(default_factory=Answer)
    cancelled: threading.Event = field(default_factory=threading.Event)
    prefilled: float | None = None  # when its first token was there
    reply: Reply | None = None


class Stream(Iterator[str]):
    """An answer as it is generated: iterate over its pieces; :attr:`reply` is there when they have ended.

    An answer that is closed, cancelled, dropped or fails is taken back: its session is as it was before the question.
    """

    def __init__(self, session: Session, turn: _Turn) -> None:
        self._session, self._turn = session, turn
        self._pieces = session._answer(turn)

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def cancel(self) -> None:
        """End the answer after the token being computed; may be called from any thread."""
        self._turn.cancelled.set()

    def close(self) -> None:
        """End the answer now; from another thread than the one that iterates, after the token being computed."""
        try:
            self._pieces.close()
        except ValueError:  # the generator is running, in another thread
            self.cancel()
            return
        self._session._release(self._turn)  # a generator that never started has not released it

    @property
    def reply(self) -> Reply:
        """The whole answer.

        Raises:
            SessionBusyError: it has not ended yet.
        """
        if self._turn.reply is None:
            raise SessionBusyError("the answer has not ended; iterate over the stream first")
        return self._turn.reply


class Session:
    """One conversation over a context, or over none: questions and answers so far, in a private tail.

    The context is shared and never changed. A session answers one question at a time; different sessions may be
    used from different threads.
    """

    def __init__(self, model: LanguageModel, prompts: PromptBuilder, context: CompressedContext | None, fold: Fold) -> None:
        self._model, self._prompts, self._fold = model, prompts, fold
        self._talk: Talk
        self._go_on(context)
        self._shown = prompts.call_ids
        self._tail = Tail()
        self._turn: _Turn | None = None  # the answer under way
        self._lock = threading.Lock()

    def ask(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None, behind: bool = False, **params: Any) -> Reply:
        """Answer the next question. ``params`` are those of :class:`~kvzip_memory.generation.GenerationParams`.

        The first question may be a list of messages with ``tools``. If they repeat the conversation that the context was made of,
        what comes after that is asked, unless all of them come ``behind`` it.

        Raises:
            InputError: an empty question or a parameter outside its range.
            WindowError: the conversation would not fit into the model's window.
            SessionBusyError: the session is still answering.
        """
        with self.stream(question, tools, behind, **params) as stream:
            for _ in stream:
                pass
            return stream.reply

    def stream(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None, behind: bool = False, **params: Any) -> Stream:
        """Answer the next question piece by piece; errors as for :meth:`ask`, raised here and not while iterating."""
        return self._stream(lambda: self._talk.ask(question, tools, behind, self._tail.length), GenerationParams(**params))

    def stream_ids(self, ids: list[int], params: GenerationParams) -> Stream:
        """Answer what ``ids`` ask, which go on behind all that the session holds."""
        return self._stream(lambda: Asked(self._tail.length, [*self._pending, *ids]), params)

    def _stream(self, question: Callable[[], Asked], checked: GenerationParams) -> Stream:
        with self._lock:
            self._check_idle()
            asked = question()
            taken, ids = self._start + asked.start, asked.ids
            if taken + len(ids) >= self._model.window:
                raise WindowError(
                    f"the question's {len(ids):,} tokens do not fit: {taken:,} of the model's window of {self._model.window:,} "
                    "tokens are taken and the answer needs some; ask shorter, reset() the session, or load less",
                    tokens=taken + len(ids),
                    window=self._model.window,
                )
            self._turn = _Turn(asked, checked)
            return Stream(self, self._turn)

    def fork(self) -> Session:
        """A second session that has had the same conversation so far; the two go on independently."""
        with self._lock:
            self._check_idle()
            twin = Session(self._model, self._prompts, self.context, self._fold)
            twin._tail, twin._talk = self._tail.copy(), self._talk.copy()
            return twin

    def fold(self, keep: int = 1, *, ratio: float | None = None, name: str | None = None) -> CompressedContext:
        """Compress the older turns: they become part of a context of their own, over which the session goes on.

        They are not read again: their pairs are ranked and join the context's. The turns that stay are, behind the new context,
        together with the next question. The context so far stays as it is for whoever uses it; the new one is stored like any
        other, and :meth:`reset` goes back to it.

        Args:
            keep: turns, a question and its answer each, that stay as they are.
            ratio: kept fraction of all pairs of the new context; None takes the context's, or the engine's.
            name: an alias for the new context.

        Raises:
            InputError: fewer turns than that, or a negative number.
            SessionBusyError: the session is still answering.
            WindowError, BudgetError, ModelError: as for :meth:`KVzipEngine.extend`; the session is as it was.
        """
        with self._lock:
            self._check_idle()
            ends = self._talk.ends
            if keep < 0 or len(ends) <= keep:
                raise InputError(f"keep is {keep}; there are {len(ends)} turns to fold, of which fewer can stay (0 or more)")
            turns = len(ends) - keep
            cut = ends[turns - 1]
            if cut > self._tail.length:
                with self.context.lease() if self.context else nullcontext(_NO_LEASE) as lease:
                    deque(self._model.append(Row(lease.layers, self._start, self._tail), self._pending), maxlen=0)
            pairs = [(keys.clone(), values.clone()) for keys, values in self._tail.pairs(cut)]
            head = 0 if self.context else self._talk.head
            context = self._fold(self.context, self._talk.ids[:cut], head, pairs, ratio, name)
            talk = self._talk.rest(context, turns)
            self._go_on(context)
            self._tail, self._talk = Tail(), talk
            return context

    def reset(self) -> None:
        """Forget the conversation; the context stays. Costs nothing."""
        with self._lock:
            self._check_idle()
            self._tail.crop(0)
            self._talk = Talk(self._prompts, self.context)

    @property
    def n_tokens(self) -> int:
        """Tokens the conversation takes in the window, context included."""
        return self._start + len(self._talk.ids)

    def __repr__(self) -> str:
        return f"<Session over {self.context!r}: {len(self._talk.ends)} turns, {self._tail.length} tokens>"

    @property
    def _pending(self) -> list[int]:
        """Ids that are answered but not yet in the tail."""
        return self._talk.ids[self._tail.length :]

    def _go_on(self, context: CompressedContext | None) -> None:
        self.context = context
        self._start = context.n_tokens if context else 0
        self._talk = Talk(self._prompts, context)

    def _check_idle(self) -> None:
        if self._turn is not None:
            raise SessionBusyError("this session is still answering; close its stream, wait for it, or use another session")

    def _answer(self, turn: _Turn) -> Generator[str, None, None]:
        """Compute the pieces of an answer; make it part of the conversation if it ends by itself."""
        model, tail, answer = self._model, self._tail, turn.answer
        start, cached = turn.asked.start, self._start + turn.asked.start
        limit = min(turn.params.max_new_tokens, model.window - cached - len(turn.asked.ids))
        sampler = Sampler(turn.params, model.device)
        complete = False
        tail.crop(start)
        began = time.perf_counter()
        try:
            with model.answering(tail, turn.cancelled), self.context.lease() if self.context else nullcontext(_NO_LEASE) as lease:
                tokens = self._tokens(turn, sampler, Row(lease.layers, self._start, tail), limit)
                stops, tokenizer = turn.params.stops, self._prompts.tokenizer
                yield from decode(tokens, answer, stops, limit, model.eos_ids, tokenizer, self._shown, turn.params.grammar)
            complete = answer.finish_reason != "cancelled"
            prefilled = turn.prefilled or began
            ms = {"prefill": 1e3 * (prefilled - began), "decode": 1e3 * (time.perf_counter() - prefilled)}
            usage = Usage(cached + len(turn.asked.ids), len(answer.ids), cached)
            receipt = replace(lease.receipt, ms={**lease.receipt.ms, **ms})
            turn.reply = Reply(answer.text, usage, str(answer.finish_reason), receipt)
        finally:
            if complete:
                self._commit(turn)
            else:
                tail.crop(start)
            self._release(turn)

    def _tokens(self, turn: _Turn, sampler: Sampler, row: Row, limit: int) -> Iterator[int]:
        """An answer's tokens as they are sampled; ends when it is cancelled."""
        model = self._model
        read = np.empty(0, np.int64) if self.context is None else self.context.token_ids.numpy()
        lookup = PromptLookup(np.concatenate([read, self._talk.ids[: row.tail.length], turn.asked.ids]), model.device.type)
        chosen = model.feed(row, turn.asked.ids, partial(sampler.follow, ()), cancelled=turn.cancelled)
        turn.prefilled = time.perf_counter()
        left = limit
        while chosen:
            yield from chosen
            if turn.cancelled.is_set():
                return
            left -= len(chosen)
            lookup.append(chosen)
            guess: list[int] = []
            if turn.params.speculate and model.alone:
                guess = lookup.guess(left - 1, sampler.guide.forced() if sampler.guide else ())
                guess = list(takewhile(lambda token: token not in model.eos_ids, guess))
            length = row.tail.length
            chosen = model.feed(row, [chosen[-1], *guess], partial(sampler.follow, guess), n_logits=len(guess) + 1)
            row.tail.crop(length + len(chosen))
            lookup.learn(len(guess), len(chosen) - 1)

    def _commit(self, turn: _Turn) -> None:
        """Keep an answer's tokens: what it said up to a stop string, not what it said after."""
        answer, ids = turn.answer, list(turn.answer.ids)
        if answer.cut:
            while ids and len(self._text(ids)) > len(answer.text):
                ids.pop()
        self._talk.answered(turn.asked, ids, answer.text, answer.text, "")
        self._tail.crop(len(self._talk.ids))

    def _text(self, ids: Sequence[int]) -> str:
        reader = Detokenizer(self._prompts.tokenizer, self._shown)
        return "".join(map(reader.push, ids)) + reader.flush()

    def _release(self, turn: _Turn) -> None:
        if self._turn is turn:
            self._turn = None
