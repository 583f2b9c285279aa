"""A LlamaIndex memory block that keeps old turns as a compressed context."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from llama_index.core.base.llms.types import ChatMessage, ContentBlock, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.memory import BaseMemoryBlock
from pydantic import Field

from kvzip_memory import CompressedContext, InputError, KVzipEngine, KVzipError, WindowError
from kvzip_memory.bridge import result_of
from kvzip_memory.frameworks.engines import loads_of
from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.prompting.messages import Message, says_something
from kvzip_memory.registry import check_text
from kvzip_memory.registry.holders import Naming, escaped
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.printable import brief, logger_of
from kvzip_memory.turns import Mark, Turns, TurnsFile
from llama_index_kvzip.llm import KVzipLLM, given_or_set_kvzip
from llama_index_kvzip.messages import CONTEXT_KEY, plain_messages

logger = logger_of(__name__)


class KVzipMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """What falls out of a :class:`Memory` goes, word for word, into a compressed context that grows; nothing is summarised.

    .. code-block:: python

        memory = Memory.from_defaults(session_id="ana", token_limit=2000, memory_blocks=[KVzipMemoryBlock(llm=llm)])
        agent = FunctionAgent(tools=tools, llm=llm)
        print(await agent.run("What did I ask on Monday?", memory=memory))

    The block gives one empty message that stands for the context; only :class:`KVzipLLM` over the same engine reads it, other models
    see nothing. Each session has a context of its own, by the block's name and the session's id, shared by all blocks over one engine. It
    takes room in the model's window, as much as the turns would; beyond ``context_tokens`` the oldest turns leave it.

    If the engine has a ``cache_dir`` the turns are written there, too: another process or another model goes on from them, and builds
    the context again where it is lost. Turns that could not be read into the context are told as they are, behind it, and are read with
    the next ones.

    Raises:
        InputError: by ``aput``: messages that are not text, more than a session may have (16 MiB), or, of an engine without a
            ``cache_dir``, more sessions than may be in memory; the block does not take them.
        WindowError: by ``aput``: a turn is longer than the window.
        BudgetError, ModelError: by ``aput``, as for :meth:`KVzipEngine.extend`.
    """

    llm: KVzipLLM = Field(default_factory=given_or_set_kvzip, exclude=True)
    """The model that reads the turns and answers; ``Settings.llm`` unless one is given."""
    name: str = "history"
    ratio: float | None = Field(default=None, gt=0, le=1)
    """Fraction of key-value pairs kept; None is the model's."""
    context_tokens: int | None = Field(default=None, gt=0)
    """Turns of more tokens have the oldest leave the context, until half as many are left. None is half of the window."""

    async def _aget(self, messages: list[ChatMessage] | None = None, session_id: str = "", **block_kwargs: Any) -> list[ChatMessage]:
        session = self._session(session_id)
        if not session.is_current:
            await result_of(loads_of(self.llm), session.read, self._ratio, self._limit)
        return session.told()

    async def _aput(self, messages: list[ChatMessage]) -> None:
        if messages:
            session = self._session(messages[0].additional_kwargs.get("session_id", ""))
            await result_of(loads_of(self.llm), session.grow, messages, self._ratio, self._limit)

    def context(self, session_id: str = "") -> CompressedContext | None:
        """The context of a session's old turns, None before there are any."""
        session = self._session(session_id)
        session.read(self._ratio, self._limit, wait=True)
        return session.known.context

    def forget(self, session_id: str = "") -> None:
        """Delete a session's old turns and the contexts that nobody else has loaded.

        Raises:
            StorageError: another process holds the index of the engine's folder; nothing was deleted.
        """
        self._session(session_id).forget()

    @property
    def _ratio(self) -> float | None:
        return self.llm.ratio if self.ratio is None else self.ratio

    @property
    def _limit(self) -> int:
        return self.context_tokens or self.llm.engine.window // 2

    def _session(self, session_id: str) -> _Session:
        if not isinstance(session_id, str):
            raise InputError(f"session_id is {brief(session_id)}; give a text")
        engine = self.llm.engine
        of_engine: _Sessions = engine.shared.get("llama_index.memory") or engine.shared.setdefault("llama_index.memory", _Sessions(engine))
        return of_engine.of(self.name, session_id)


_LOOKED_FOR = 3  # contexts, the latest, of which the first that is still there is taken

#: So many sessions are in memory at a time, with so many bytes of turns.
MOST_SESSIONS, MOST_IN_MEMORY = 1024, 256 << 20


@dataclass(frozen=True)
class _Known:
    """A session's old turns and where they stand in its record, which was read up to a mark; the context holds ``first`` to ``count``."""

    turns: tuple[Message, ...] = ()
    places: tuple[list[int], ...] = ()
    context: CompressedContext | None = None
    first: int = 0
    count: int = 0
    mark: Mark = field(default_factory=Mark)


class _Session:
    """The old turns of a session. They are the truth, in a file if the engine has a folder; their context is made of them.

    A record of its lines is ``{"turns": [...]}`` or, when turns have been read, ``{"context": key, "first": place of its first turn,
    "last": of its last one, "model": fingerprint}``. What is known is what the lines say, never what this process has written.
    """

    def __init__(self, engine: KVzipEngine, name: str, session_id: str, others: _Sessions) -> None:
        self._engine, self._tag = engine, clean(f"memory {escaped(name)}: {escaped(session_id)}", "session id")
        check_text(self._tag)
        self.key, self._others = (name, session_id), others
        names = engine.registry.tenant, name, session_id
        checksums = engine.registry.checksums
        self._lines = Turns() if engine.cache_dir is None else TurnsFile.of(engine.cache_dir, *names, checksums=checksums)
        self._building, self._looking = threading.Lock(), threading.Lock()
        refuse_after_fork(self, "_building", "_looking")
        self.known = _Known()

    @property
    def nbytes(self) -> int:
        """Bytes of the turns that are known."""
        return self.known.mark.end

    @property
    def is_kept(self) -> bool:
        """Whether there are turns that lie nowhere else."""
        return self._engine.cache_dir is None and self._lines.nbytes() > 0

    @property
    def is_current(self) -> bool:
        """Whether nobody has written since."""
        self.expire()
        return self._lines.stamp() == self.known.mark.stamp

    def told(self) -> list[ChatMessage]:
        """A message that stands for the context, and the turns that are not in it."""
        known = self.known
        handle = [] if known.context is None else [ChatMessage("", role="system", additional_kwargs={CONTEXT_KEY: known.context.key})]
        return handle + [_message(turn) for turn in known.turns[known.count :]]

    def read(self, ratio: float | None, limit: int, wait: bool = False) -> None:
        """Look at what was written, and put it into the context; unless ``wait`` is set, leave that to a thread that is about it."""
        if self.is_current:
            return
        self._look()
        if not self._building.acquire(blocking=wait):
            return
        try:
            self._build(ratio, limit)
        except KVzipError as error:  # they are told as they are, and whoever asks will say so
            logger.warning("%s: the turns are not compressed: %s", self._tag, error)
        finally:
            self._building.release()

    def grow(self, messages: list[ChatMessage], ratio: float | None, limit: int) -> None:
        """Take in turns, and put those that are in no context yet into it."""
        turns = [turn for turn in plain_messages(messages)[0] if says_something(turn)]
        if not turns:
            return
        self.expire()
        with self._others.growing(self):
            self._lines.append({"turns": turns}, self._tag, self._engine.registry.ttl)
        with self._building:
            self._look()
            self._build(ratio, limit)

    def forget(self) -> None:
        registry = self._engine.registry
        with self._building:
            registry.forget(Naming(self._tag))
            self._lines.remove()  # last: contexts can be made of turns again
            self._look()

    def _build(self, ratio: float | None, limit: int) -> None:
        known = self.known
        if known.count == len(known.turns) or known.turns[-1].get("tool_calls"):  # the calls' results are to come
            return
        first = self._first(known, limit)
        context = self._built(known, first, ratio)
        with self._looking:
            if self.known.mark.head == known.mark.head and self.known.count < len(known.turns):
                self.known = replace(self.known, context=context, first=first, count=len(known.turns))
        record = {"context": context.key, "first": known.places[first], "last": known.places[-1], "model": self._engine.fingerprint}
        try:
            self._lines.append(record, self._tag, self._engine.registry.ttl, still=lambda: self._is_of(known))
        except OSError as error:  # the turns are written; others will make a context of their own
            logger.warning("%s: what was made of the turns cannot be written down: %s", self._tag, error)
        self._look()

    def _is_of(self, known: _Known) -> bool:
        """Whether the session is still that one; it may have been forgotten, and begun again."""
        return self._lines.read(known.mark)[1].head == known.mark.head

    def _first(self, known: _Known, limit: int) -> int:
        """The first turn that the context is to have: the one it has, or a later one of a user if there are too many tokens."""
        turns, first, count = known.turns, known.first, self._engine.count_tokens
        later = [i for i in range(first + 1, len(turns)) if turns[i]["role"] == "user"]
        if not later or count(turns[first:], most=limit) <= limit:
            return first
        fitting = bisect_left(later, True, key=lambda i: count(turns[i:], most=limit // 2) <= limit // 2)
        first = later[min(fitting, len(later) - 1)]
        logger.warning("%s: more than %s tokens; the oldest %d turns have left the context", self._tag, f"{limit:,}", first)
        return first

    def _built(self, known: _Known, first: int, ratio: float | None) -> CompressedContext:
        if known.context is not None and first == known.first:
            try:
                return self._engine.extend(known.context, known.turns[known.count :], ratio=ratio, tags=self._tag, behind=True)
            except WindowError:
                raise
            except InputError as error:  # such as an assistant's turn behind another
                logger.debug("%s is read again: %s", self._tag, error)
        return self._engine.load(known.turns[first:], ratio=ratio, tags=self._tag)

    def expire(self) -> None:
        if (ttl := self._engine.registry.ttl) is not None:
            self._lines.remove(if_older=ttl)

    def _look(self) -> None:
        """What the lines say beyond what is known."""
        with self._looking:
            records, mark = self._lines.read(self.known.mark)
            known = self.known if mark.head == self.known.mark.head else _Known()
            turns, places, made = [*known.turns], [*known.places], []
            for at, record in records:
                said = record.get("turns", ())
                turns += said
                places += [[at, i] for i in range(len(said))]
                if "last" in record and record["model"] == self._engine.fingerprint:
                    made.append(record)
            self.known = self._with_context(replace(known, turns=tuple(turns), places=tuple(places), mark=mark), made)

    def _with_context(self, known: _Known, made: list[dict[str, Any]]) -> _Known:
        """With the context of the most turns of those that were made, if it has more than the one that is known."""
        first = known.first
        for record in sorted(made, key=lambda record: record["last"], reverse=True)[:_LOOKED_FOR]:
            count = bisect_right(known.places, record["last"])
            if known.context is not None and count <= known.count:
                break
            with suppress(KVzipError):
                context = self._engine.get(record["context"])
                return replace(known, context=context, first=bisect_left(known.places, record["first"]), count=count)
            first = max(first, bisect_left(known.places, record["first"]))
        return known if known.context is not None else replace(known, first=first, count=first)  # what has left stays away


class _Sessions:
    """The sessions of an engine's blocks that are in memory: the latest. Others are read again from their files when they are asked for;
    without files the turns in memory are all there is, and stay.
    """

    def __init__(self, engine: KVzipEngine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        refuse_after_fork(self, "_lock")
        self._kept: OrderedDict[tuple[str, str], _Session] = OrderedDict()  # the last used is last
        self._used: WeakValueDictionary[tuple[str, str], _Session] = WeakValueDictionary()  # and those that somebody still uses

    def of(self, name: str, session_id: str) -> _Session:
        with self._lock:
            session = self._used.get((name, session_id)) or _Session(self._engine, name, session_id, self)
            self._keep(session)
            return session

    @contextmanager
    def growing(self, session: _Session) -> Iterator[None]:
        """Around what gives a session turns.

        Raises:
            InputError: it would be one more than there may be.
        """
        with self._lock:
            others = [other for other in self._kept.values() if other is not session]
            for other in others if len(others) >= MOST_SESSIONS else ():
                other.expire()
            others = [other for other in others if other.is_kept]
            nbytes = sum(other.nbytes for other in others)
            if len(others) >= MOST_SESSIONS or nbytes >= MOST_IN_MEMORY:
                raise InputError(
                    f"{len(others):,} sessions have {nbytes:,} bytes of turns, in memory alone; at most {MOST_SESSIONS:,} with "
                    f"{MOST_IN_MEMORY:,} may: give the engine a cache_dir, or forget some (block.forget)"
                )
        yield
        with self._lock:
            self._keep(session)  # it had nothing to lose before, and others may have taken its room

    def _keep(self, session: _Session) -> None:
        self._kept[session.key] = self._used[session.key] = session
        self._kept.move_to_end(session.key)
        nbytes = sum(kept.nbytes for kept in self._kept.values())
        for key, kept in [*self._kept.items()][:-1]:
            if len(self._kept) <= MOST_SESSIONS and nbytes <= MOST_IN_MEMORY:
                return
            if not kept.is_kept:
                nbytes -= kept.nbytes
                del self._kept[key]


def _message(turn: Message) -> ChatMessage:
    blocks: list[ContentBlock] = [ThinkingBlock(content=turn["reasoning"])] if turn.get("reasoning") else []
    blocks += [TextBlock(text=turn["content"])] if turn["content"] else []
    blocks += [ToolCallBlock(tool_call_id=c["id"], tool_name=c["name"], tool_kwargs=c["arguments"]) for c in turn.get("tool_calls", ())]
    told = {"tool_call_id": turn["tool_call_id"]} if turn.get("tool_call_id") else {}
    return ChatMessage(role=turn["role"], blocks=blocks, additional_kwargs=told)
