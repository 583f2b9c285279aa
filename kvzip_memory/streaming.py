"""Answers as they are read: piece by piece, to the end or not."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from transformers import GenerationConfig

from kvzip_memory.context import Receipt
from kvzip_memory.errors import SessionBusyError
from kvzip_memory.inference.generation import Answer, GenerationParams
from kvzip_memory.inference.weights import Stamp
from kvzip_memory.prompting.reasoning import Reasoning, ReasoningReader
from kvzip_memory.prompting.talk import Asked
from kvzip_memory.system.calls import Gate
from kvzip_memory.system.forks import is_parents, refuse_after_fork
from kvzip_memory.system.sharing import NotPickled
from kvzip_memory.system.threads import release


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
        text: what was said, up to the end of the turn or a stop string; what was read of it if it was cancelled.
        usage: token counts.
        finish_reason: ``"stop"``, ``"length"`` or ``"cancelled"``; ``"forced"`` if JSON or a tool call is complete because guidance made it
            end: the limit of tokens came near, or a text in it repeated itself.
        receipt: what was reused, and milliseconds of ``prefill`` (the question) and ``decode``.
        reasoning: what the model thought before that, empty if it does not; later turns are read without it.
    """

    text: str
    usage: Usage
    finish_reason: str
    receipt: Receipt
    reasoning: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(eq=False)
class Turn:
    """An answer under way; shared by the stream that shows it and the session that computes it.

    It is over when nothing more is decoded, and settled when the session has kept it or taken it back. Streams are dropped wherever
    garbage is collected, so what that calls waits for nobody: a lock that lets its own thread in again, and gates.
    """

    asked: Asked
    params: GenerationParams
    settings: GenerationConfig  # the model's own
    eos_ids: frozenset[int]
    answer: Answer = field(default_factory=Answer)
    reader: ReasoningReader | None = None  # for a model that thinks
    prefilled: float | None = None  # when its first token was there
    reply: Reply | None = None
    stamps: tuple[Stamp, Stamp] | None = None  # of the model, before its first forward and after its last
    cancelled: threading.Event = field(default_factory=threading.Event)  # nobody waits for it
    entry: Gate = field(default_factory=SimpleQueue)  # opened when it is its turn, or when it is cancelled
    over: bool = False
    kept: bool | None = None  # None until it is settled
    settled: Gate = field(default_factory=SimpleQueue)  # opened then
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        refuse_after_fork(self, "lock")


class _Ahead(Iterator[str]):
    """Pieces that a generator yields in a thread of its own, whether or not they are read."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(_run_ahead, pieces, self._pieces), name="kvzip-answer", daemon=True).start()

    def __next__(self) -> str:
        release()
        piece = self._pieces.get()
        if isinstance(piece, str):
            return piece
        self._pieces.put(None)  # for whoever asks again
        raise StopIteration if piece is None else piece


def _run_ahead(pieces: Iterator[str], read: SimpleQueue[str | BaseException | None]) -> None:
    try:
        for piece in pieces:
            read.put(piece)
        read.put(None)
    except BaseException as error:
        read.put(error)


class Stream(NotPickled, Iterator[str]):
    """An answer as it is generated: iterate over its pieces; :attr:`reply` is there when they have ended.

    Decoding begins when the first piece is asked for, and goes on in a thread of its own, whether or not the pieces are read: a
    reader that is away keeps nobody waiting, and pieces that are not read are a little text. The answer is part of its session
    once it was read to its end. One that is closed, cancelled or dropped before, or fails, is taken back: its session is as it was
    before the question.

    Args:
        turn: the answer.
        answer: computes its pieces, reasoning among them, and fills in the turn.
        settle: makes the turn part of the session, or takes it back; does so once.
    """

    _way_out = "it is read once; copy what it has given"

    def __init__(self, turn: Turn, answer: Callable[[Turn], Iterator[str]], settle: Callable[[Turn, bool], None]) -> None:
        self._turn, self._answer, self._settle = turn, answer, settle
        self._pieces: Iterator[str] | None = None  # None until the first one is asked for
        self._here = self._thinks = False
        self._read: list[str] = []

    def __next__(self) -> str:
        turn = self._turn
        with turn.lock:
            if self._pieces is None and not turn.cancelled.is_set():
                answer = self._answer(turn)
                self._pieces = answer if self._here else _Ahead(answer)
        for piece in self._pieces or ():
            if turn.cancelled.is_set():
                continue  # until it has ended, after the token being computed
            if isinstance(piece, Reasoning):
                if self._thinks:
                    return piece
                continue
            self._read.append(piece)
            return piece
        self._settle(turn, not turn.cancelled.is_set())
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def with_reasoning(self) -> Stream:
        """Give pieces of what the model thinks, too; they are :class:`~kvzip_memory.prompting.reasoning.Reasoning`, a kind of string."""
        self._thinks = True
        return self

    def in_this_thread(self) -> Stream:
        """Decode in the thread that iterates, which saves one. For readers that do not stop before the end."""
        self._here = True
        return self

    def whole(self) -> Reply:
        """Read what is left, in this thread; the whole answer."""
        with self.in_this_thread():
            deque(self, maxlen=0)
            return self.reply

    def cancel(self) -> None:
        """End the answer after the token being computed, and what was not read of it; may be called from any thread."""
        turn = self._turn
        if turn.kept is not None or is_parents(turn):
            return
        turn.cancelled.set()
        turn.entry.put(None)
        with turn.lock:
            turn.over = turn.over or self._pieces is None
        if turn.over:
            self._settle(turn, False)

    def close(self) -> None:
        """:meth:`cancel`; the session may be asked at once, and waits for that token."""
        self.cancel()
        if isinstance(self._pieces, Generator) and not is_parents(self._turn):
            with suppress(ValueError):  # it is running, in another thread, and will end
                self._pieces.close()

    @property
    def reply(self) -> Reply:
        """The whole answer.

        Raises:
            SessionBusyError: it has not ended yet.
        """
        turn = self._turn
        if turn.kept is None or turn.reply is None:
            raise SessionBusyError("the answer has not ended; iterate over the stream first")
        return turn.reply if turn.kept else replace(turn.reply, text="".join(self._read), finish_reason="cancelled")
