"""Processes that write turns of one conversation. Imported by the processes of the tests."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from llama_index.core.llms import ChatMessage

from conftest import tiny_model, tiny_tokenizer
from kvzip_memory import KVzipEngine
from llama_index_kvzip import KVzipLLM, KVzipMemoryBlock


def wide_engine(folder: Path | None) -> KVzipEngine:
    """Of a model with room for thousands of turns."""
    return KVzipEngine(tiny_model(max_position_embeddings=1 << 17), tiny_tokenizer(), ratio=0.1, cache_dir=folder)


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
        barrier.wait()
    if killed_within is not None:
        die_within(killed_within, random.Random(who))
    for i in range(count):
        asyncio.run(block.aput(exchange(f"{who}-{i}"), session_id="ana"))
        acknowledge(folder, f"{who}-{i}")
    block.llm.engine.close()


def told(folder: Path) -> Counter[str]:
    """How often a process that comes later is told each exchange, by context and messages; both of its turns, side by side."""
    engine = wide_engine(folder)
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine))
    messages = asyncio.run(block.aget([], session_id="ana"))
    context = block.context("ana")
    text = "" if context is None else engine.tokenizer.decode(context.token_ids)
    text += "\n".join(str(message.content) for message in messages)
    engine.close()
    questions, answers = re.findall(r"q([\w-]+)\.", text), re.findall(r"a([\w-]+)\.", text)
    assert questions == answers
    return Counter(questions)
