"""A LlamaIndex chat engine over whole documents."""

from __future__ import annotations

import asyncio
import copy
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any

from llama_index.core.async_utils import asyncio_run
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.callbacks import trace_method
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse, StreamingAgentChatResponse
from llama_index.core.llms import ChatMessage, ChatResponseGen
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.storage.chat_store.base_db import MessageStatus
from llama_index.core.storage.chat_store.sql import SQLAlchemyChatStore
from llama_index.core.types import Thread

from kvzip_memory import CompressedContext, InputError, NotPicklableError, SessionBusyError
from kvzip_memory.bridge import finished, result_of
from kvzip_memory.context import checked_context
from kvzip_memory.frameworks.engines import loads_of
from kvzip_memory.streaming import Stream
from kvzip_memory.system.calls import Cancelled, check, within
from kvzip_memory.system.forks import refuse_after_fork
from llama_index_kvzip.llm import KVzipLLM, given_or_set_kvzip
from llama_index_kvzip.memory import KVzipMemoryBlock
from llama_index_kvzip.messages import plain_messages
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


class _Response(StreamingAgentChatResponse):
    """An answer that is given up when the generator of its pieces is closed or cancelled; LlamaIndex' own waits for its end."""

    leave: Callable[[], None]

    @property
    def response_gen(self) -> Generator[str, None, None]:
        pieces = super().response_gen
        try:
            for piece in pieces:  # noqa: UP028 (which would close them, and wait for their end, before we know)
                yield piece
        except GeneratorExit:
            self.leave()
            raise

    async def async_response_gen(self) -> AsyncGenerator[str, None]:
        pieces = super().async_response_gen()
        try:
            while True:
                following = asyncio.ensure_future(anext(pieces, None))
                piece = await asyncio.shield(following)
                if piece is None:
                    return
                yield piece
        except (GeneratorExit, asyncio.CancelledError):
            tasks = [task for task in (self.awrite_response_to_history_task, following) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise


class _Exchange:
    """What a response writes its answer to: the question goes to the memory with it, at once if the memory can."""

    def __init__(self, memory: BaseMemory, question: str) -> None:
        self._memory, self._question = memory, ChatMessage(question)

    def put(self, answer: ChatMessage) -> None:
        self._memory.put_messages([self._question, answer])

    async def aput(self, answer: ChatMessage) -> None:
        await finished(self._memory.aput_messages([self._question, answer]))


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
            InputError: a ``source_top_k`` that is no whole number of at least 1, or a memory with a :class:`KVzipMemoryBlock`, which has
                a context of its own.
        """
        model = given_or_set_kvzip(llm)
        model.engine.one_context([checked_context(context)])  # tells what is wrong with it
        part = Part(context, whole(context, documents))
        return cls._over(part, model, memory, chat_history, system_prompt, source_top_k, node_parser)

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
            ids = model.engine.text_ids
            memory = Memory.from_defaults(chat_history=chat_history, token_limit=limit, token_flush_size=limit // 4, tokenizer_fn=ids)
        prefix = [ChatMessage(system_prompt, role="system")] if system_prompt else []
        engine = cls(llm=model, memory=memory, prefix_messages=prefix, callback_manager=llm.callback_manager)
        engine._part, engine._ranking = part, Ranking(llm.engine, source_top_k, node_parser)
        engine._taking, engine._turn = threading.Lock(), _Turn()
        refuse_after_fork(engine, "_taking")
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
        refuse_after_fork(twin, "_taking")
        twin._turn.ended.set_result(None)
        return twin

    # LlamaIndex' own engine writes a question at once and its answer when that has ended; another question could come between, of another
    # process, too, and one whose process is killed would stand there without an answer. Here both are written when there is an answer.

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
        """What the model is asked."""
        if chat_history is not None:
            self._memory.set(chat_history)
        return self._with_question(self._memory.get(initial_token_count=self._tokens(self._prefix_messages)), message)

    async def _aasked(self, message: str, chat_history: list[ChatMessage] | None) -> list[ChatMessage]:
        if chat_history is not None:
            await self._memory.aset(chat_history)
        said = await self._memory.aget(initial_token_count=self._tokens(self._prefix_messages))
        return self._with_question(said, message)

    def _with_question(self, said: Sequence[ChatMessage], message: str) -> list[ChatMessage]:
        """The question behind as much of what was said as the memory would keep beside it."""
        limit = getattr(self._memory, "token_limit", float("inf")) * getattr(self._memory, "chat_history_token_ratio", 1.0)
        asked = [*said, ChatMessage(message)]
        spoken = [i for i, other in enumerate(asked) if other.role != MessageRole.SYSTEM]
        while len(spoken) > 1 and self._tokens([asked[i] for i in spoken]) > limit:  # the oldest exchange goes
            del spoken[0]
            while asked[spoken[0]].role != MessageRole.USER:
                del spoken[0]
        kept = {*spoken, *(i for i, other in enumerate(asked) if other.role == MessageRole.SYSTEM)}
        return [*self._prefix_messages, *(asked[i] for i in sorted(kept))]

    def _tokens(self, messages: Sequence[ChatMessage]) -> int:
        count: Any = getattr(self._memory, "tokenizer_fn", None)
        return len(count(" ".join(message.content or "" for message in messages))) if count else 0

    @trace_method("chat")
    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer the next message; ``chat_history`` replaces what was said so far.

        Questions are answered one at a time, in their order: the next one waits until an answer that is streamed has ended, whether it is
        read or not. A question comes into the history with its answer; one whose answer failed, was cancelled, or whose generator of
        pieces was closed does not.

        Raises:
            SessionBusyError: an async answer is under way in this thread's event loop, which waiting would stop.
        """
        with self._next():
            asked = self._asked(message, chat_history)
            answer = self._llm.chat(asked).message
            _Exchange(self._memory, message).put(answer)
        return AgentChatResponse(response=str(answer.content), source_nodes=self._sources(asked))

    @trace_method("chat")
    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """:meth:`chat` in a thread."""
        with await self._anext():
            asked = await finished(self._aasked(message, chat_history))
            answer = (await self._llm.achat(asked)).message
            await _Exchange(self._memory, message).aput(answer)
        return AgentChatResponse(response=str(answer.content), source_nodes=await result_of(loads_of(self._llm), self._sources, asked))

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """:meth:`chat`, piece by piece."""
        with ExitStack() as turn:
            turn.enter_context(self._next())
            asked = self._asked(message, chat_history)
            pieces = self._llm.stream_chat(asked)
            going_on = turn.pop_all()
        left, streams = threading.Event(), list[Stream]()

        def answered() -> ChatResponseGen:
            yield from pieces
            check()  # what was cancelled has ended, too

        def leave() -> None:
            left.set()
            for stream in streams:
                stream.cancel()

        response = _Response(chat_stream=answered())
        response.leave = leave

        exchange: Any = _Exchange(self._memory, message)

        def write() -> None:
            with suppress(Exception, Cancelled), going_on, within(left, started=streams.append):  # whoever reads the response is told
                response.write_response_to_history(exchange)

        response.write_response_to_history_thread = thread = Thread(target=write)
        thread.start()
        response.source_nodes = self._sources(asked)
        return response

    @trace_method("chat")
    async def astream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """:meth:`stream_chat` in a thread."""
        async with AsyncExitStack() as turn:
            turn.enter_context(await self._anext())
            asked = await finished(self._aasked(message, chat_history))
            response = _Response(achat_stream=await self._llm.astream_chat(asked))
            going_on = turn.pop_all()

        exchange: Any = _Exchange(self._memory, message)

        async def write() -> None:
            with suppress(Exception):
                async with going_on:
                    await response.awrite_response_to_history(exchange)

        response.awrite_response_to_history_task = task = asyncio.create_task(write())
        try:
            response.source_nodes = await result_of(loads_of(self._llm), self._sources, asked)
        except BaseException:  # such as of a cancelled call, which gives nobody the response
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        return response

    def reset(self) -> None:
        """Forget the conversation, when an answer that is under way has ended."""
        with self._next():
            super().reset()

    def _sources(self, asked: Sequence[ChatMessage]) -> list[NodeWithScore]:
        """Of the question that was asked. The exchange before it is read too, since it may refer to it."""
        if self._ranking.top_k is None:
            return list(self._part.nodes)
        return self._ranking([self._part], plain_messages(asked[len(self._prefix_messages) :])[0][-3:])
