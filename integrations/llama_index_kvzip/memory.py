"""A LlamaIndex memory block that keeps old turns as a compressed context."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import BaseMemoryBlock
from pydantic import Field, PrivateAttr

from kvzip_memory import CompressedContext, InputError
from llama_index_kvzip.llm import CONTEXT_KEY, KVzipLLM, plain_messages


class KVzipMemoryBlock(BaseMemoryBlock[list[ChatMessage]]):
    """What falls out of a :class:`Memory` goes, word for word, into a compressed context that grows; nothing is summarised.

    .. code-block:: python

        memory = Memory.from_defaults(session_id="ana", token_limit=2000, memory_blocks=[KVzipMemoryBlock(llm=llm)])
        agent = FunctionAgent(tools=tools, llm=llm)
        print(await agent.run("What did I ask on Monday?", memory=memory))

    The block gives one empty message that stands for the context; only :class:`KVzipLLM` over the same engine reads it, other models
    see nothing. Each session has a context of its own, found again by the block's name and the session's id after a restart if
    the engine has a ``cache_dir``. It takes room in the model's window, as much as the turns would.

    Raises:
        WindowError: by ``aput``: the turns outgrow the window.
        BudgetError, ModelError: by ``aput``, as for :meth:`KVzipEngine.extend`.
    """

    llm: KVzipLLM = Field(exclude=True)
    """The model that reads the turns and answers."""
    name: str = "history"
    ratio: float | None = None
    """Fraction of key-value pairs kept; None is the model's."""

    _contexts: dict[str, CompressedContext] = PrivateAttr(default_factory=dict)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    async def _aget(self, messages: list[ChatMessage] | None = None, session_id: str = "", **block_kwargs: Any) -> list[ChatMessage]:
        context = await asyncio.to_thread(self.context, session_id)
        return [] if context is None else [ChatMessage("", role="system", additional_kwargs={CONTEXT_KEY: context.key})]

    async def _aput(self, messages: list[ChatMessage]) -> None:
        if messages:
            await asyncio.to_thread(self._grow, messages)

    def context(self, session_id: str = "") -> CompressedContext | None:
        """The context of a session's old turns, None before there are any."""
        with self._lock:
            return self._found(session_id)

    def _found(self, session_id: str) -> CompressedContext | None:
        if session_id not in self._contexts:
            with suppress(InputError):
                self._contexts[session_id] = self.llm.engine.get(self._alias(session_id))
        return self._contexts.get(session_id)

    def _alias(self, session_id: str) -> str:
        return f"memory {self.name}: {session_id}"

    def _grow(self, messages: list[ChatMessage]) -> None:
        session_id = messages[0].additional_kwargs.get("session_id", "")
        turns, _ = plain_messages(messages)
        with self._lock:
            engine, before = self.llm.engine, self._found(session_id)
            options: dict[str, Any] = {"name": self._alias(session_id), "ratio": self.ratio or self.llm.ratio}
            self._contexts[session_id] = engine.extend(before, turns, **options) if before else engine.load(turns, **options)
