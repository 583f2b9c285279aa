"""A LlamaIndex memory block that keeps old turns as a compressed context."""

from __future__ import annotations

import asyncio
import logging
import threading
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ContentBlock, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.memory import BaseMemoryBlock
from pydantic import Field

from kvzip_memory import CompressedContext, InputError, KVzipEngine, KVzipError, WindowError
from kvzip_memory.sources import Message, clean
from kvzip_memory.turns import TurnsFile
from llama_index_kvzip.llm import CONTEXT_KEY, KVzipLLM, given_or_set_kvzip, plain_messages

logger = logging.getLogger(__name__)


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
        InputError: by ``aput``: messages that are not text; the block does not take them.
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
            await asyncio.to_thread(session.read, self._ratio, self._limit)
        return session.told()

    async def _aput(self, messages: list[ChatMessage]) -> None:
        if messages:
            session = self._session(messages[0].additional_kwargs.get("session_id", ""))
            await asyncio.to_thread(session.grow, messages, self._ratio, self._limit)

    def context(self, session_id: str = "") -> CompressedContext | None:
        """The context of a session's old turns, None before there are any."""
        session = self._session(session_id)
        session.read(self._ratio, self._limit)
        return session.known.context

    def forget(self, session_id: str = "") -> None:
        """Delete a session's old turns and the contexts that only it has loaded.

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
        engine = self.llm.engine
        of_engine: dict[tuple[str, str], _Session] = engine.shared.setdefault("llama_index.memory", {})
        return of_engine.setdefault((self.name, session_id), _Session(engine, self.name, session_id))


@dataclass(frozen=True)
class _Known:
    """A session's old turns; the context holds those from ``first`` to ``count``, ``size`` bytes of the file were read."""

    turns: tuple[Message, ...] = ()
    context: CompressedContext | None = None
    first: int = 0
    count: int = 0
    size: int = 0


class _Session:
    """The old turns of a session. They are the truth, in a file if the engine has a folder; their context is made of them.

    A record, a line of JSON, is ``{"turns": [...]}`` or, when turns have been read, ``{"context": key, "first": its first turn, "count":
    the turn behind its last, "model": fingerprint}``.
    """

    def __init__(self, engine: KVzipEngine, name: str, session_id: str) -> None:
        self._engine, self._tag = engine, clean(f"memory {name}: {session_id}", "session id")
        self._file = None if engine.cache_dir is None else TurnsFile.of(engine.cache_dir, engine.registry.tenant, name, session_id)
        self._lock = threading.Lock()
        self.known = _Known()

    @property
    def is_current(self) -> bool:
        """Whether no other process has written since."""
        return self._size() == self.known.size

    def told(self) -> list[ChatMessage]:
        """A message that stands for the context, and the turns that are not in it."""
        known = self.known
        handle = [] if known.context is None else [ChatMessage("", role="system", additional_kwargs={CONTEXT_KEY: known.context.key})]
        return handle + [_message(turn) for turn in known.turns[known.count :]]

    def read(self, ratio: float | None, limit: int) -> None:
        """What other processes have written."""
        with self._lock:
            if self.is_current:
                return
            self._read()
            try:
                self._build(ratio, limit)
            except KVzipError as error:  # they are told as they are, and whoever asks will say so
                logger.warning("%s: the turns are not compressed: %s", self._tag, error)

    def grow(self, messages: list[ChatMessage], ratio: float | None, limit: int) -> None:
        """Take in turns, and put those that are in no context yet into it."""
        turns = [turn for turn in plain_messages(messages)[0] if turn["content"].strip() or turn.get("tool_calls")]
        with self._lock:
            if not self.is_current:
                self._read()
            self._write({"turns": turns})
            self.known = replace(self.known, turns=(*self.known.turns, *turns), size=self._size())
            self._build(ratio, limit)

    def forget(self) -> None:
        registry = self._engine.registry
        with self._lock:
            registry.check_changeable()
            for entry in registry.contexts():
                if set(entry.tags) == {self._tag} and not entry.names:
                    registry.remove(entry.key)
            if self._file is not None:  # last: contexts can be made of turns again
                self._file.remove()
            self.known = _Known()

    def _build(self, ratio: float | None, limit: int) -> None:
        known = self.known
        if known.count == len(known.turns) or known.turns[-1].get("tool_calls"):  # the calls' results are to come
            return
        first = self._first(limit)
        context = self._built(first, ratio)
        self._write({"context": context.key, "first": first, "count": len(known.turns), "model": self._engine.fingerprint})
        self.known = replace(known, context=context, first=first, count=len(known.turns), size=self._size())

    def _first(self, limit: int) -> int:
        """The first turn that the context is to have: the one it has, or a later one of a user if there are too many tokens."""
        turns, first, count = self.known.turns, self.known.first, self._engine.count_tokens
        later = [i for i in range(first + 1, len(turns)) if turns[i]["role"] == "user"]
        if not later or count(turns[first:]) <= limit:
            return first
        fitting = bisect_left(later, True, key=lambda i: count(turns[i:]) <= limit // 2)
        first = later[min(fitting, len(later) - 1)]
        logger.warning("%s: more than %s tokens; the oldest %d turns have left the context", self._tag, f"{limit:,}", first)
        return first

    def _built(self, first: int, ratio: float | None) -> CompressedContext:
        known = self.known
        if known.context is not None and first == known.first:
            try:
                return self._engine.extend(known.context, known.turns[known.count :], ratio=ratio, tags=self._tag, behind=True)
            except WindowError:
                raise
            except InputError as error:  # such as an assistant's turn behind another
                logger.debug("%s is read again: %s", self._tag, error)
        return self._engine.load(known.turns[first:], ratio=ratio, tags=self._tag)

    # -- the file ------------------------------------------------------------------------------------------------

    def _size(self) -> int:
        if self._file is None:
            return 0
        if (ttl := self._engine.registry.ttl) is not None:
            self._file.remove_if_older(ttl)
        return self._file.size()

    def _read(self) -> None:
        turns: list[Message] = []
        key, first, count = None, 0, 0
        records, size = self._file.read() if self._file else ([], 0)
        for record in records:
            turns += record.get("turns", ())
            if record.get("model") == self._engine.fingerprint:
                key, first, count = record["context"], record["first"], record["count"]
        context = None
        if key is not None:
            with suppress(KVzipError):
                context = self._engine.get(key)
        known = _Known(tuple(turns), size=size)
        self.known = known if context is None else replace(known, context=context, first=first, count=count)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(record, self._tag, self._engine.registry.ttl)


def _message(turn: Message) -> ChatMessage:
    blocks: list[ContentBlock] = [ThinkingBlock(content=turn["reasoning"])] if turn.get("reasoning") else []
    blocks += [TextBlock(text=turn["content"])] if turn["content"] else []
    blocks += [ToolCallBlock(tool_call_id=c["id"], tool_name=c["name"], tool_kwargs=c["arguments"]) for c in turn.get("tool_calls", ())]
    told = {"tool_call_id": turn["tool_call_id"]} if turn.get("tool_call_id") else {}
    return ChatMessage(role=turn["role"], blocks=blocks, additional_kwargs=told)
