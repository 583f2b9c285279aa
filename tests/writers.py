"""Processes that write turns of one conversation. Imported by the processes of the tests."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import threading
from collections import Counter
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from langchain.agents import create_agent
from langgraph.checkpoint.sqlite import SqliteSaver
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory
from transformers import PreTrainedModel

from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from killing import STRIDE, killed_at
from kvzip_memory import CompressedContext, KVzipEngine, WindowError
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware, create_memory_tools
from llama_index_kvzip import KVzipChatEngine, KVzipLLM, KVzipMemoryBlock


@cache
def wide_model() -> PreTrainedModel:
    """With room for thousands of turns; processes that are forked share it."""
    return tiny_model(max_position_embeddings=1 << 17, num_hidden_layers=1)


def wide_engine(folder: Path | None) -> KVzipEngine:
    return KVzipEngine(wide_model(), tiny_tokenizer(), ratio=0.1, cache_dir=folder)


def exchange(name: str) -> list[ChatMessage]:
    return [ChatMessage(f"q{name}."), ChatMessage(f"a{name}.", role="assistant")]


def acknowledge(folder: Path, name: str) -> None:
    """Note, so that a kill cannot undo it, that a turn was taken."""
    with (folder / "acknowledged").open("ab", buffering=0) as file:
        file.write(f"{name}\n".encode())


def acknowledged(folder: Path) -> list[str]:
    return (folder / "acknowledged").read_text().split() if (folder / "acknowledged").exists() else []


def die_within(seconds: float, rng: random.Random) -> None:
    timer = threading.Timer(rng.random() * seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def write_turns(folder: Path, who: str, count: int, barrier: Any = None, killed_within: float | None = None) -> None:
    """Hand a block so many exchanges, one after the other; perhaps be killed while doing so."""
    torch.set_num_threads(1)
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=wide_engine(folder)))
    if barrier is not None:
        barrier.wait(timeout=60)
    if killed_within is not None:
        die_within(killed_within, random.Random(who))
    for i in range(count):
        asyncio.run(block.aput(exchange(f"{who}-{i}"), session_id="ana"))
        acknowledge(folder, f"{who}-{i}")
    block.llm.engine.close()


def kill_a_block(root: Path, answers: Any) -> None:
    """Kill who hands a turn to a block, at each step in turn; the next ones in the same folder go on, ten of them."""
    torch.set_num_threads(1)
    wide_model()
    for number, step in enumerate(range(0, 100_000, 13 * STRIDE - 12)):  # every one, or every 79th
        folder, name = root / str(number // 10), f"k-{step}"
        folder.mkdir(exist_ok=True)

        def take(folder: Path = folder, name: str = name) -> None:
            engine = wide_engine(folder)
            session = KVzipMemoryBlock(llm=KVzipLLM(engine=engine))._session("ana")
            session.grow(exchange(name), None, 1 << 16)
            acknowledge(folder, name)
            engine.close()

        got_there = killed_at(step, take)
        pid = os.fork()
        if pid == 0:
            found = told(folder)
            missing = dict.fromkeys(acknowledged(folder), 1).items() - found.items()
            os._exit(bool(missing or set(found.values()) - {1}))
        assert os.waitpid(pid, 0)[1] == 0, step
        if not got_there:
            answers.put(step)
            return


def told(folder: Path) -> Counter[str]:
    """How often a process that comes later is told each exchange."""
    engine = wide_engine(folder)
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine))
    found = said(asyncio.run(block.aget([], session_id="ana")), block.context("ana"), engine)
    engine.close()
    return found


def said(messages: list[ChatMessage], context: CompressedContext | None, engine: KVzipEngine) -> Counter[str]:
    """How often each exchange is in a context and messages, its answer behind its question."""
    text = "" if context is None else str(engine.tokenizer.decode(context.token_ids))
    text += "\n".join(str(message.content) for message in messages)
    questions, answers = re.findall(r"q([\w-]+)\.", text), re.findall(r"a([\w-]+)\.", text)
    assert questions == answers
    return Counter(questions)


def keep_documents(folder: Path, who: str, count: int, barrier: Any = None, killed_after: int | None = None) -> None:
    """Have an agent's tools keep documents, under names of its own and one that all use; perhaps be killed once so many are kept."""
    torch.set_num_threads(1)
    engine = KVzipEngine(wide_model(), tiny_tokenizer(), cache_dir=folder)
    load = create_memory_tools(engine)[0]
    for i in range(count):
        for name in (f"{who}-{i}", "shared"):
            if barrier is not None:
                barrier.wait(timeout=60)
            told = load.invoke({"name": name, "text": f"By {who}-{i} as {name}. " * 9})
            assert "is kept" in told, told
            acknowledge(folder, name)
        if i + 1 == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
    engine.close()


def converse(folder: Path, who: str, count: int, barrier: Any, failing: bool = False, killed: bool = False) -> None:
    """Chat over a document, with the history in a database that others write to; ``failing``: ask what is too long."""
    torch.set_num_threads(1)
    chat = chat_over_a_document(folder)
    barrier.wait(timeout=60)
    if killed:
        die_within(0.5, random.Random(who))
    for i in range(count):
        with suppress(WindowError) if failing else nullcontext():
            chat.chat(f"{who}-{i}? " + "Why? " * 1000 * failing)
            acknowledge(folder, f"{who}-{i}?")


def chat_over_a_document(folder: Path) -> KVzipChatEngine:
    llm = KVzipLLM(engine=tiny_engine(), max_tokens=2)
    memory = Memory.from_defaults(
        session_id="ana",
        token_limit=400,
        token_flush_size=100,
        tokenizer_fn=llm.engine.tokenizer.tokenize,
        async_database_uri=f"sqlite+aiosqlite:///{folder / 'chat.db'}?timeout=60",  # on a busy machine others may have it for long
    )
    return KVzipChatEngine.from_context(llm.engine.load(TEXT), llm=llm, memory=memory)


def talk_to_an_agent(folder: Path, who: str, count: int, killed: bool = False) -> None:
    """Converse in threads that begin alike, with checkpoints in one database; answers are those of a model that reads everything."""
    torch.set_num_threads(1)
    llm = KVzipChatModel(engine=KVzipEngine(wide_model(), tiny_tokenizer(), ratio=1.0, cache_dir=folder), max_tokens=6)
    whole = KVzipChatModel(engine=KVzipEngine(wide_model(), tiny_tokenizer(), ratio=1.0), max_tokens=6)
    memory = KVzipMemoryMiddleware(trigger=("messages", 5), keep=("messages", 2))
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.db")) as checkpoints:
        agent = create_agent(llm, [], middleware=[memory], checkpointer=checkpoints)
        if killed:
            die_within(1.0, random.Random(who))
        for i in range(count):
            name = f"{i}" if i < 3 else f"{who}-{i}"
            messages = agent.invoke({"messages": [("user", f"q{name}.")]}, {"configurable": {"thread_id": who}})["messages"]
            acknowledge(folder, f"{who}:{name}")
            assert messages[-1].content == whole.invoke(messages[:-1]).content
    llm.engine.close()


def told_to_an_agent(folder: Path, who: str) -> list[str]:
    """What a later process' agent finds that the user of a thread has said."""
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.db")) as checkpoints:
        agent = create_agent(KVzipChatModel(engine=tiny_engine()), [], middleware=[], checkpointer=checkpoints)
        messages = agent.get_state({"configurable": {"thread_id": who}}).values.get("messages", [])
        return [message.text[1:-1] for message in messages if message.type == "human"]
