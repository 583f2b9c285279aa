"""A LlamaIndex chat engine over whole documents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse, StreamingAgentChatResponse
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, NodeWithScore

from kvzip_memory import CompressedContext, InputError
from kvzip_memory.sources import clean
from llama_index_kvzip.llm import KVzipLLM, plain_messages
from llama_index_kvzip.memory import KVzipMemoryBlock
from llama_index_kvzip.sources import Part, Ranking, whole


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
        llm: KVzipLLM,
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
            llm: what answers.
            memory: the conversation's; None keeps as much of it as the window has room for.
            chat_history: what was said before.
            system_prompt: put before the conversation, behind the documents.
            source_top_k: so many passages are the ``source_nodes``, as for :class:`KVzipQueryEngine`.
            node_parser: splits documents into these passages; None takes paragraphs.

        Raises:
            InputError: a ``source_top_k`` below 1, or a memory with a :class:`KVzipMemoryBlock`, which has a context of its own.
        """
        part = Part(context, whole(context, documents))
        return cls._over(part, llm, memory, chat_history, system_prompt, source_top_k, node_parser)

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
        return engine

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer the next message; ``chat_history`` replaces what was said so far."""
        response = super().chat(message, chat_history)
        response.source_nodes = self._sources(message)
        return response

    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """:meth:`chat` in a thread."""
        response = await super().achat(message, chat_history)
        response.source_nodes = await asyncio.to_thread(self._sources, message)
        return response

    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """:meth:`chat`, piece by piece."""
        response = super().stream_chat(message, chat_history)
        response.source_nodes = self._sources(message)
        return response

    async def astream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """:meth:`stream_chat` in a thread."""
        response = await super().astream_chat(message, chat_history)
        response.source_nodes = await asyncio.to_thread(self._sources, message)
        return response

    def _sources(self, message: str) -> list[NodeWithScore]:
        """Of the user's last message. The exchange before it is read too, since it may refer to it."""
        if self._ranking.top_k is None:
            return list(self._part.nodes)
        turns, _ = plain_messages(self._memory.get())
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=0)
        return self._ranking([self._part], [*turns[:last][-2:], {"role": "user", "content": message}])
