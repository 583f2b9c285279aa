"""Conversations over a context."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip_memory.building import Computed
from kvzip_memory.context import CompressedContext, Lease, Receipt
from kvzip_memory.errors import IdentityMismatchError, InputError, SessionBusyError, WindowError
from kvzip_memory.inference.admission import Place
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.ends import eos_ids
from kvzip_memory.inference.generation import Detokenizer, GenerationParams, Sampler, decode
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.inference.processors import own_settings
from kvzip_memory.inference.speculation import PromptLookup
from kvzip_memory.inference.weights import Stamp
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.prompt import Prompt
from kvzip_memory.prompting.prompts import PromptBuilder
from kvzip_memory.prompting.reasoning import ReasoningReader
from kvzip_memory.prompting.talk import Asked, Talk
from kvzip_memory.prompting.tools import Tool
from kvzip_memory.registry.identity import check_same_model
from kvzip_memory.streaming import Reply, Stream, Turn, Usage
from kvzip_memory.system import calls
from kvzip_memory.system.calls import Cancelled
from kvzip_memory.system.flags import check_flags
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.printable import brief
from kvzip_memory.system.sharing import NotPickled

Tags = str | Sequence[str] | None
#: Builds the context of a parent, if any, and of a prompt behind it, whose pairs are computed; ratio, name and tags follow.
Fold = Callable[[CompressedContext | None, Prompt, Computed | None, float | None, str | None, Tags], CompressedContext]

_NO_LEASE = Lease((), Receipt(None, hit=False, tier="none", reason="asked without a context"))
_LEFT = Lease((), Receipt(None, hit=False, tier="none", reason="cancelled before its turn"))


class Session(NotPickled):
    """One conversation over a context, or over none: questions and answers so far, in a private tail.

    The context is shared and never changed. A session answers one question at a time; different sessions may be
    used from different threads. A copy, deep or not, is a :meth:`fork`.
    """

    _way_out = "fold() its turns and give the key of the context that this makes, or ask with the conversation as messages"

    def __init__(
        self,
        model: LanguageModel,
        prompts: PromptBuilder,
        context: CompressedContext | None,
        fold: Fold,
        identity: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._model, self._prompts, self._fold, self._identity = model, prompts, fold, identity
        self._made_with: Mapping[str, Any] = {}  # of the tail, the model's fields of a key
        self._stamps: tuple[Stamp, Stamp] | None = None  # around the computing of its last pairs, if they differ
        self._talk: Talk
        self._go_on(context)
        self._shown = prompts.call_ids
        self._tail = Tail()
        self._turn: Turn | None = None  # the answer under way
        self._lock = threading.Lock()
        refuse_after_fork(self, "_lock")

    def ask(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None, behind: bool = False, **params: Any) -> Reply:
        """Answer the next question. ``params`` are those of :class:`~kvzip_memory.inference.generation.GenerationParams`.

        The first question may be a list of messages with ``tools``. If they repeat the conversation that the context was made of,
        what comes after that is asked, unless all of them come ``behind`` it.

        Raises:
            InputError: an empty question or a parameter outside its range.
            WindowError: the conversation would not fit into the model's window.
            SessionBusyError: the session is still answering.
        """
        checked = GenerationParams.of(params)
        return self._asked(question, tools, behind, checked).whole()

    def stream(self, question: str | Sequence[Message], tools: Sequence[Tool] | None = None, behind: bool = False, **params: Any) -> Stream:
        """Answer the next question piece by piece; errors as for :meth:`ask`, raised here and not while iterating.

        Only a model that is changed between this and the first piece is an error then.
        """
        checked = GenerationParams.of(params)
        self._check_model(self._tail.length)
        return self._asked(question, tools, behind, checked)

    def _asked(self, question: str | Sequence[Message], tools: Sequence[Tool] | None, behind: bool, checked: GenerationParams) -> Stream:
        check_flags(behind=behind)
        return self._stream(lambda: self._talk.ask(question, tools, behind, self._tail.length, thinks=checked.free), checked)

    def stream_ids(self, ids: list[int], params: GenerationParams) -> Stream:
        """Answer what ``ids`` ask, which go on behind all that the session holds."""
        self._check_model(self._tail.length)
        return self._stream(lambda: Asked(self._tail.length, [*self._pending, *ids]), params)

    def _stream(self, question: Callable[[], Asked], checked: GenerationParams) -> Stream:
        model = self._model.model
        settings = own_settings(model)
        ends = checked.grammar.eos_ids if checked.grammar else eos_ids(model, self._prompts.tokenizer)
        with self._lock:
            self._check_idle()
            asked = question()
            taken, ids = self._start + asked.start, asked.ids
            if taken + len(ids) >= self._window:
                raise WindowError(
                    f"the question's {len(ids):,} tokens, with what is said before it in the same prompt, do not fit: of the model's "
                    f"window of {self._model.window:,} tokens {taken - self._saved:,} are taken and the answer needs one, which leaves "
                    f"{max(0, self._window - taken - 1):,}; ask shorter, begin anew with reset(), or load less",
                    tokens=taken - self._saved + len(ids),
                    window=self._model.window,
                )
            if checked.grammar is not None:
                self._check_least(checked.grammar.least, checked.max_new_tokens, taken + len(ids))
            self._turn = Turn(asked, checked, settings, ends)
            stream = Stream(self._turn, self._answer, self._settle)
        calls.started(stream)
        return stream

    def fork(self) -> Session:
        """A second session that has had the same conversation so far; the two go on independently."""
        with self._lock:
            self._check_idle()
            twin = Session(self._model, self._prompts, self.context, self._fold, self._identity)
            twin._tail, twin._talk = self._tail.copy(), self._talk.copy()
            twin._made_with, twin._stamps = self._made_with, self._stamps
            return twin

    def __copy__(self) -> Session:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self.fork()

    def fold(self, keep: int = 1, *, ratio: float | None = None, name: str | None = None, tags: Tags = ()) -> CompressedContext:
        """Compress the older turns: they become part of a context of their own, over which the session goes on.

        They are not read again: their pairs are ranked and join the context's. (With recurrent layers they are: what these remembered
        behind the last of them is gone.) The turns that stay are, behind the new context, together with the next question. The context so
        far stays as it is for whoever uses it; the new one is stored like any other, and :meth:`reset` goes back to it.

        Args:
            keep: turns, a question and its answer each, that stay as they are.
            ratio: kept fraction of all pairs of the new context; None takes the context's, or the engine's.
            name: an alias for the new context.
            tags: free words to list and forget it by.

        Raises:
            InputError: fewer turns than that, or a negative number.
            SessionBusyError: the session is still answering.
            WindowError, BudgetError, ModelError: as for :meth:`KVzipEngine.extend`; the session is as it was.
            IdentityMismatchError: the model is another one now, or was for a while as the turns were answered or folded.
        """
        with self._lock:
            self._check_idle()
            ends = self._talk.ends
            if type(keep) is not int or not 0 <= keep < len(ends):
                raise InputError(f"keep is {brief(keep)}; there are {len(ends)} turns to fold, of which fewer can stay (0 or more)")
            turns, since = len(ends) - keep, self._model.watch.stamp()
            self._check_model(self._tail.length)
            self._tail.crop(self._talk.settle(self._tail.length))
            computed = None if self._model.layout.stateful else self._pairs(self._talk.ends[turns - 1], since)
            prompt = self._talk.prompt(turns)
            context = self._fold(self.context, prompt, computed, ratio, name, tags)
            talk = self._talk.rest(context, turns)
            self._go_on(context)
            self._tail, self._talk, self._stamps = Tail(), talk, None
            return context

    def _pairs(self, cut: int, since: Stamp) -> Computed:
        """Those of the first ``cut`` tokens of the conversation; what of them was not read yet is."""
        if cut > self._tail.length:
            try:
                with self.context.lease() if self.context else nullcontext(_NO_LEASE) as lease:
                    deque(self._model.append(self._model.row(lease, self._start, self._tail), self._pending), maxlen=0)
            finally:
                self._computed(since, self._model.watch.stamp())
        return Computed(self._tail.copy(cut).pairs(cut), since)

    def reset(self) -> None:
        """Forget the conversation; the context stays. Costs nothing."""
        with self._lock:
            self._check_idle()
            self._tail.crop(0)
            self._stamps = None
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
        self._saved = context.saved if context else 0
        self._window = self._model.window + self._saved  # in tokens
        self._talk = Talk(self._prompts, context)

    def _check_idle(self) -> None:
        turn = self._turn
        if turn is not None and turn.cancelled.is_set():
            turn.settled.get()  # within a token
        if self._turn is not None:
            raise SessionBusyError("this session is still answering; close its stream, wait for it, or use another session")

    def _check_model(self, taken: int) -> Mapping[str, Any]:
        """The model's fields now, with the session's template, if the context and the first ``taken`` pairs of the tail are of the same.

        Raises:
            IdentityMismatchError: they are not, or the model was another one while some of these were computed.
        """
        now = self._identity()
        made: list[tuple[Mapping[str, Any], str, str]] = []
        if self.context is not None:
            made.append((self.context.identity, f"{self.context!r}", "load its text again"))
        if taken:
            made.append((self._made_with, "the conversation of this session", "reset() it"))
        for made_with, where, way_out in made:
            check_same_model(made_with, now, where, f"{way_out}, or ask with the model as it was")
        if taken and self._stamps:
            if not self._model.untouched(*self._stamps):
                raise IdentityMismatchError(
                    "the model was changed while this session answered, whose conversation is then of both; reset() it, and change no "
                    "weights meanwhile",
                    fields=("weights",),
                )
            self._stamps = None
        return now

    def _begin(self, start: int) -> None:
        """Before the tail goes on behind its first ``start`` pairs: see :meth:`_check_model`. Without any it may be another model's."""
        now = self._check_model(start)
        if not start:
            self._stamps = None
            if now != self._made_with:
                self._tail.clear()  # which may be of another dtype
                self._made_with = now

    def _computed(self, since: Stamp, until: Stamp) -> None:
        """Remember it if the model may have changed between two stamps, while pairs of the tail were computed."""
        if until != since:
            self._stamps = since, until

    def _check_least(self, least: int, limit: int, taken: int) -> None:
        """Raises where no answer of ``least`` tokens can be finished."""
        shortest = f"the shortest answer that is complete JSON or a complete tool call takes {least:,} tokens"
        if least > limit:
            raise InputError(f"{shortest} and max_new_tokens is {limit:,}; allow more tokens, or ask for less")
        if least > self._window - taken:
            raise WindowError(
                f"{shortest}, and {taken - self._saved:,} of the model's window of {self._model.window:,} tokens are taken; ask shorter, "
                "reset() the session, load less, or ask for less",
                tokens=taken - self._saved + least,
                window=self._model.window,
            )

    def _answer(self, turn: Turn) -> Generator[str, None, None]:
        """Compute the pieces of an answer; take it back unless it ends by itself."""
        model, tail, answer = self._model, self._tail, turn.answer
        start, cached = turn.asked.start, self._start + turn.asked.start
        limit = min(turn.params.max_new_tokens, self._window - cached - len(turn.asked.ids))
        read = np.empty(0, np.int64) if self.context is None else self.context.token_ids.numpy()
        seen = np.concatenate([read, self._talk.ids[:start], turn.asked.ids]).astype(np.int64)
        sampler = Sampler(turn.params, model.device, limit, seen, turn.settings, model.model.config, turn.eos_ids)
        complete = False
        tail.crop(start)
        tail.mark()
        held = self._start + tail.length
        began = time.perf_counter()
        try:
            with model.answering(tail, turn.entry) as place, self._lease(turn, place) as lease:
                since = model.watch.stamp()
                self._begin(start)
                tokens = self._tokens(turn, sampler, self._model.row(lease, self._start, tail), limit, seen)
                stops, tokenizer = turn.params.stops(turn.settings), self._prompts.tokenizer
                pieces = decode(tokens, answer, stops, limit, turn.eos_ids, tokenizer, self._shown, turn.params.grammar)
                yield from self._told(pieces, turn)
                if not turn.cancelled.is_set():
                    turn.stamps = since, model.watch.stamp()
            if sampler.hurried and answer.finish_reason == "stop" and not answer.cut:
                answer.finish_reason = "forced"
            complete = answer.finish_reason != "cancelled"
            prefilled = turn.prefilled or began
            ms = {"prefill": 1e3 * (prefilled - began), "decode": 1e3 * (time.perf_counter() - prefilled)}
            usage = Usage(cached + len(turn.asked.ids), len(answer.ids), held)
            fitted = self.context.fitted if self.context else ()
            receipt = replace(lease.receipt, ms={**lease.receipt.ms, **ms}, fitted=fitted)
            text, reasoning = (answer.text, "") if turn.reader is None else (turn.reader.text, turn.reader.reasoning)
            turn.reply = Reply(text, usage, str(answer.finish_reason), receipt, reasoning)
        finally:
            turn.over = True
            if not complete or turn.cancelled.is_set():
                self._settle(turn, keep=False)

    def _told(self, pieces: Iterator[str], turn: Turn) -> Iterator[str]:
        """Pieces with those of reasoning told apart."""
        thought, params = self._prompts.thought, turn.params
        if thought is None or not params.free:
            yield from pieces
            return
        turn.reader = ReasoningReader(thought, self._prompts.thinking(turn.asked.ids))
        for piece in pieces:
            yield from turn.reader.push(piece)
        yield from turn.reader.flush()

    @contextmanager
    def _lease(self, turn: Turn, place: Place) -> Iterator[Lease]:
        """The context's layers. While the answer waits for them another one has its place."""
        if self.context is None:
            yield _NO_LEASE
            return
        with ExitStack() as held:
            lease = _LEFT
            with suppress(Cancelled), calls.within(turn.cancelled, place):
                calls.check()
                lease = held.enter_context(self.context.lease())
            yield lease

    def _tokens(self, turn: Turn, sampler: Sampler, row: Row, limit: int, seen: NDArray[Any]) -> Iterator[int]:
        """An answer's tokens as they are sampled; ends when it is cancelled."""
        model = self._model
        if turn.cancelled.is_set():  # while it waited
            return
        lookup = PromptLookup(seen, model.device.type)
        again = self._talk.ids[row.tail.length : turn.asked.start]  # behind a mark, where the tail could not be cut anywhere
        chosen = model.feed(row, [*again, *turn.asked.ids], partial(sampler.follow, ()), cancelled=turn.cancelled)
        turn.prefilled = time.perf_counter()
        left = limit
        while chosen:
            yield from chosen
            if turn.cancelled.is_set():
                return
            left -= len(chosen)
            lookup.append(chosen)
            guess: list[int] = []
            if turn.params.speculate and model.alone and not model.layout.stateful:
                guess = lookup.guess(left - 1, sampler.guide.forced() if sampler.guide else ())
                guess = list(takewhile(lambda token: token not in turn.eos_ids, guess))
            length = row.tail.length
            chosen = model.feed(row, [chosen[-1], *guess], partial(sampler.follow, guess), n_logits=len(guess) + 1)
            row.tail.crop(length + len(chosen))
            lookup.learn(len(guess), len(chosen) - 1)

    def _commit(self, turn: Turn) -> None:
        """Keep an answer's tokens: what it said up to a stop string, not what it said after."""
        answer, ids = turn.answer, list(turn.answer.ids)
        if answer.cut:
            del ids[self._within(ids, len(answer.text)) :]
        written = answer.text
        if answer.cut:
            written = self._text(ids)  # a stop string may begin within a token
        content, reasoning = (answer.text, "") if turn.reader is None else (turn.reader.text, turn.reader.reasoning)
        self._talk.answered(turn.asked, ids, written, content, reasoning)
        self._tail.crop(len(self._talk.ids))

    def _within(self, ids: Sequence[int], length: int) -> int:
        """How many of these tokens say no more than so many characters."""
        reader = Detokenizer(self._prompts.tokenizer, self._shown)
        shown = list(accumulate(len(reader.push(token)) for token in ids))
        most = bisect_right(shown, length)  # but for what is held back at the end of them
        return next(n for n in range(most, -1, -1) if n == 0 or len(self._text(ids[:n])) <= length)

    def _text(self, ids: Sequence[int]) -> str:
        reader = Detokenizer(self._prompts.tokenizer, self._shown)
        return "".join(map(reader.push, ids)) + reader.flush()

    def _settle(self, turn: Turn, keep: bool) -> None:
        """Make an answer that is over part of the conversation, or take it back; once."""
        with turn.lock:
            if turn.kept is not None:
                return
            turn.kept = keep
        try:
            if keep:
                if turn.stamps:
                    self._computed(*turn.stamps)
                self._commit(turn)
            else:
                self._tail.crop(turn.asked.start)
        finally:
            self._turn = None
            turn.settled.put(None)
