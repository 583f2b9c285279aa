"""A LlamaIndex chat engine over whole documents."""

from __future__ import annotations

import asyncio
import copy
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

from llama_index.core.async_utils import asyncio_run
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.callbacks import trace_method
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse, StreamingAgentChatResponse
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.storage.chat_store.base_db import MessageStatus
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore
from llama_index.core.types import Thread

from kvzip_memory import CompressedContext, InputError, NotPicklableError, SessionBusyError
from kvzip_memory.context import checked_context
from kvzip_memory.sources import clean
from llama_index_kvzip.llm import KVzipLLM, given_or_set_kvzip, plain_messages
from llama_index_kvzip.memory import KVzipMemoryBlock
from llama_index_kvzip.sources import Part, Ranking, whole


class _Turn:
    """A question and its answer; ended when both are in the history, or neither.

    Args:
        loop: has to run until then; None stands for none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop, self.ended = loop, Future[None]()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self.ended.set_result(None)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _twin(memory: BaseMemory, memo: dict[int, Any]) -> BaseMemory:
    """A memory with the same messages. A :class:`Memory` holds connections to its database, which cannot be copied."""
    if not isinstance(memory, Memory):
        try:
            return copy.deepcopy(memory, memo)
        except Exception as error:  # whatever it holds
            raise NotPicklableError(
                f"a {type(memory).__name__} cannot be copied ({error}); make another chat engine, with memory="
            ) from error
    store, session_id = memory.sql_store, str(uuid.uuid4())
    if isinstance(store, SQLAlchemyChatStore) and store._is_in_memory_uri(
        str(getattr(store._async_engine, "url", store.async_database_uri))
    ):
        store = SQLAlchemyChatStore(store.table_name)  # one connection for both would mix their transactions
    for status in MessageStatus:
        if said := asyncio_run(memory.sql_store.get_messages(memory.session_id, status=status)):
            asyncio_run(store.add_messages(session_id, said, status=status))
    blocks = copy.deepcopy(memory.memory_blocks, memo)
    return memory.model_copy(update={"sql_store": store, "session_id": session_id, "memory_blocks": blocks})


class KVzipChatEngine(SimpleChatEngine):
    """A conversation over documents in one compressed context: one model call a turn, no question is rewritten.

    .. code-block:: python

        chat_engine = KVzipChatEngine.from_context(context, documents, llm=llm)
        print(chat_engine.chat("Who signed the lease?"))
        print(chat_engine.chat("And when?"))

    Its documents are the ``source_nodes`` of every answer, or with ``source_top_k`` the passages that a message is about
    most. Make one with :meth:`from_context` or ``KVzipIndex.as_chat_engine``.
    """

    _part: Part
    _ranking: Ranking
    _taking: threading.Lock
    _turn: _Turn

    @classmethod
    def from_defaults(cls, *args: Any, **kwargs: Any) -> KVzipChatEngine:
        """Not for this engine, which needs a context.

        Raises:
            InputError: always.
        """
        raise InputError("a KVzipChatEngine needs a context; make it with KVzipChatEngine.from_context or KVzipIndex.as_chat_engine")

    @classmethod
    def from_context(
        cls,
        context: CompressedContext,
        documents: Sequence[BaseNode] = (),
        *,
        llm: KVzipLLM | None = None,
        memory: BaseMemory | None = None,
        chat_history: list[ChatMessage] | None = None,
        system_prompt: str | None = None,
        source_top_k: int | None = None,
        node_parser: NodeParser | None = None,
    ) -> KVzipChatEngine:
        """Converse over a context that was made of these documents.

        Args:
            context: what is answered from.
            documents: the ``source_nodes``.
            llm: what answers; None is ``Settings.llm``.
            memory: the conversation's; None keeps as much of it as the window has room for.
            chat_history: what was said before.
            system_prompt: put before the conversation, behind the documents.
            source_top_k: so many passages are the ``source_nodes``, as for :class:`KVzipQueryEngine`.
            node_parser: splits documents into these passages; None takes paragraphs.

        Raises:
            InputError: a ``source_top_k`` below 1, or a memory with a :class:`KVzipMemoryBlock`, which has a context of its own.
        """
        part = Part(context, whole(checked_context(context), documents))
        return cls._over(part, given_or_set_kvzip(llm), memory, chat_history, system_prompt, source_top_k, node_parser)

    @classmethod
    def _over(
        cls,
        part: Part,
        llm: KVzipLLM,
        memory: BaseMemory | None = None,
        chat_history: list[ChatMessage] | None = None,
        system_prompt: str | None = None,
        source_top_k: int | None = None,
        node_parser: NodeParser | None = None,
    ) -> KVzipChatEngine:
        model = llm.with_context(part.context)
        if any(isinstance(block, KVzipMemoryBlock) for block in getattr(memory, "memory_blocks", ())):
            raise InputError(
                "the memory has a KVzipMemoryBlock, whose context cannot be joined with the documents'; leave the block out, or give "
                "the documents to an agent with this memory as a QueryEngineTool"
            )
        if memory is None:
            # Half of what is free: the template's own tokens are not counted by LlamaIndex. An answer may take half before.
            free = model.metadata.context_window
            limit = max(4, (free - min(model.max_tokens, free // 2)) // 2)
            tokenizer: Any = model.engine.tokenizer

            def tokens(text: str) -> list[str]:
                return list(tokenizer.tokenize(clean(text, "a message")))

            memory = Memory.from_defaults(chat_history=chat_history, token_limit=limit, token_flush_size=limit // 4, tokenizer_fn=tokens)
        prefix = [ChatMessage(system_prompt, role="system")] if system_prompt else []
        engine = cls(llm=model, memory=memory, prefix_messages=prefix, callback_manager=llm.callback_manager)
        engine._part, engine._ranking = part, Ranking(llm.engine, source_top_k, node_parser)
        engine._taking, engine._turn = threading.Lock(), _Turn()
        engine._turn.ended.set_result(None)
        return engine

    def __deepcopy__(self, memo: dict[int, Any]) -> KVzipChatEngine:
        """The same conversation, to go on independently, as of when an answer that is under way has ended.

        A :class:`Memory` that writes to a database goes on there, too, under a session id of its own.

        Raises:
            NotPicklableError: a memory of another kind cannot be copied.
            SessionBusyError: as for :meth:`chat`.
        """
        with self._next():
            memory = _twin(self._memory, memo)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self._memory)] = memory
        for name, value in vars(self).items():
            setattr(twin, name, value if name in ("_taking", "_turn") else copy.deepcopy(value, memo))
        twin._taking, twin._turn = threading.Lock(), _Turn()
        twin._turn.ended.set_result(None)
        return twin

    # LlamaIndex' own engine writes a question at once and its answer when that has ended; another question could come between.

    def _next(self) -> _Turn:
        """Take a turn and wait for those before, which end by themselves."""
        before, turn = self._take_turn()
        before.ended.result()
        return turn

    async def _anext(self) -> _Turn:
        before, turn = self._take_turn(asyncio.get_running_loop())
        try:
            await asyncio.shield(asyncio.wrap_future(before.ended))
        except BaseException:  # cancelled: who comes behind waits for the one before
            before.ended.add_done_callback(lambda _: turn.ended.set_result(None))
            raise
        return turn

    def _take_turn(self, loop: asyncio.AbstractEventLoop | None = None) -> tuple[_Turn, _Turn]:
        with self._taking:
            before = self._turn
            needed = None if before.ended.done() else before.loop
            if loop is None and needed is not None and needed is _running_loop():
                raise SessionBusyError("an async answer is under way in this event loop, which waiting would stop; use the async method")
            self._turn = _Turn(loop or needed)
            return before, self._turn

    def _asked(self, message: str, chat_history: list[ChatMessage] | None) -> list[ChatMessage]:
        """Write the question to the history; what the model is asked."""
        if chat_history is not None:
            self._memory.set(chat_history)
        self._memory.put(ChatMessage(message))
        return [*self._prefix_messages, *self._memory.get(initial_token_count=self._prefix_tokens())]

    async def _aasked(self, message: str, chat_history: list[ChatMessage] | None) -> list[ChatMessage]:
        if chat_history is not None:
            await self._memory.aset(chat_history)
        await self._memory.aput(ChatMessage(message))
        return [*self._prefix_messages, *await self._memory.aget(initial_token_count=self._prefix_tokens())]

    def _prefix_tokens(self) -> int:
        count: Any = getattr(self._memory, "tokenizer_fn", None)
        return len(count(" ".join(message.content or "" for message in self._prefix_messages))) if count else 0

    @property
    def _active(self) -> dict[str, Any]:
        """Which messages are set again: what went to blocks of memory is theirs."""
        return {"status": MessageStatus.ACTIVE} if getattr(self._memory, "memory_blocks", ()) else {}

    @contextmanager
    def _taken_back_on_failure(self, message: str) -> Iterator[None]:
        """If there is no answer, the question leaves the history: two questions in a row are refused by many templates."""
        try:
            yield
        except BaseException:
            said = self._memory.get_all(**self._active)
            if said and (said[-1].role, said[-1].content) == (MessageRole.USER, message):
                self._memory.set(said[:-1])
            raise

    @asynccontextmanager
    async def _ataken_back_on_failure(self, message: str) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            said = await self._memory.aget_all(**self._active)
            if said and (said[-1].role, said[-1].content) == (MessageRole.USER, message):
                await self._memory.aset(said[:-1])
            raise

    @trace_method("chat")
    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer the next message; ``chat_history`` replaces what was said so far.

        Questions are answered one at a time, in their order: the next one waits until an answer that is streamed has ended, whether it is
        read or not. A question without an answer, since that failed, leaves the history.

        Raises:
            SessionBusyError: an async answer is under way in this thread's event loop, which waiting would stop.
        """
        with self._next(), self._taken_back_on_failure(message):
            answer = self._llm.chat(self._asked(message, chat_history)).message
            self._memory.put(answer)
        return AgentChatResponse(response=str(answer.content), source_nodes=self._sources(message))

    @trace_method("chat")
    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """:meth:`chat` in a thread."""
        with await self._anext():
            async with self._ataken_back_on_failure(message):
                answer = (await self._llm.achat(await self._aasked(message, chat_history))).message
                await self._memory.aput(answer)
        return AgentChatResponse(response=str(answer.content), source_nodes=await asyncio.to_thread(self._sources, message))

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """:meth:`chat`, piece by piece."""
        with ExitStack() as turn:
            turn.enter_context(self._next())
            turn.enter_context(self._taken_back_on_failure(message))
            response = StreamingAgentChatResponse(chat_stream=self._llm.stream_chat(self._asked(message, chat_history)))
            going_on = turn.pop_all()

        def write() -> None:
            with suppress(Exception), going_on:  # whoever reads the response is told
                response.write_response_to_history(self._memory)

        response.write_response_to_history_thread = thread = Thread(target=write)
        thread.start()
        response.source_nodes = self._sources(message)
        return response

    @trace_method("chat")
    async def astream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """:meth:`stream_chat` in a thread."""
        async with AsyncExitStack() as turn:
            turn.enter_context(await self._anext())
            await turn.enter_async_context(self._ataken_back_on_failure(message))
            response = StreamingAgentChatResponse(achat_stream=await self._llm.astream_chat(await self._aasked(message, chat_history)))
            going_on = turn.pop_all()

        async def write() -> None:
            with suppress(Exception):
                async with going_on:
                    await response.awrite_response_to_history(self._memory)

        response.awrite_response_to_history_task = asyncio.create_task(write())
        response.source_nodes = await asyncio.to_thread(self._sources, message)
        return response

    def reset(self) -> None:
        """Forget the conversation, when an answer that is under way has ended."""
        with self._next():
            super().reset()

    def _sources(self, message: str) -> list[NodeWithScore]:
        """Of the user's last message. The exchange before it is read too, since it may refer to it."""
        if self._ranking.top_k is None:
            return list(self._part.nodes)
        turns, _ = plain_messages(self._memory.get())
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=0)
        return self._ranking([self._part], [*turns[:last][-2:], {"role": "user", "content": message}])
