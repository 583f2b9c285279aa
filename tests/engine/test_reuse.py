"""Which stored context a prompt without one is answered from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from llama_index.core.llms import ChatMessage

from conftest import TEXT, tiny_engine
from kvzip_memory import CompressedContext, InputError, KVzipEngine
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.conversations import Memory
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipLLM

FIRST = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Noted."}]
MORE = [{"role": "user", "content": "The keeper's name is Ottoline."}, {"role": "assistant", "content": "Noted, too."}]
ASKED = [*FIRST, *MORE, {"role": "user", "content": "Who?"}]


def used(engine: KVzipEngine, **options: Any) -> str | None:
    return engine.generate(None, ASKED, max_new_tokens=2, **options).receipt.key


def test_the_longest_that_keeps_enough_is_used_and_the_finest_of_equals(tmp_path: Path) -> None:
    writer = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    keys: dict[tuple[int, float], str] = {}
    for ratio in (0.02, 0.5, 0.8, 1.0):
        keys[1, ratio] = writer.load(FIRST, ratio=ratio).key
    for ratio in (0.02, 0.45):
        keys[2, ratio] = writer.load([*FIRST, *MORE], ratio=ratio).key
    writer.close()
    for engine in (writer, tiny_engine(cache_dir=tmp_path, ratio=0.5)):  # from memory, and from disk
        assert used(engine) == keys[1, 1.0]
        assert used(engine, reuse=0.4) == keys[2, 0.45]
        assert used(engine, reuse=0.01) == keys[2, 0.45]
        assert used(engine, reuse=False) is None
    for wrong in (2, "no"):
        with pytest.raises(InputError, match=f"reuse is {wrong!r}; it is the fraction of pairs kept"):
            used(writer, reuse=wrong)
    longer = writer.load([*FIRST, *MORE], ratio=0.5)
    assert used(writer) == longer.key
    assert writer.generate(None, ASKED, max_new_tokens=2).usage.cached_tokens == longer.n_tokens


def test_the_finest_is_found_however_many_others_there_are_of_a_text(tmp_path: Path) -> None:
    writer = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    finest = writer.load(FIRST, ratio=1.0)
    for n in range(40):
        writer.load(FIRST, ratio=0.5 + n / 100)
    writer.close()
    assert used(tiny_engine(cache_dir=tmp_path, ratio=0.5)) == finest.key


def test_what_was_grown_is_as_coarse_as_what_it_was_grown_from(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    grown = engine.extend(engine.load(FIRST, ratio=0.02), MORE, ratio=1.0)
    fine = engine.load(FIRST, ratio=0.6)
    cut = engine.extend(fine, MORE, ratio=0.7)  # keeps no more of the first part than there is
    engine.close()
    for reader in (engine, tiny_engine(cache_dir=tmp_path, ratio=0.5)):
        assert used(reader) == cut.key
        assert used(reader, reuse=0.65) is None
        assert used(reader, reuse=0.01) == cut.key
        assert (reader.get(grown.key).coarsest, reader.get(cut.key).coarsest) == (0.02, 0.6)
    only = tiny_engine(ratio=0.5)
    only.extend(only.load(FIRST, ratio=0.02), MORE, ratio=1.0)
    assert used(only) is None


@pytest.mark.parametrize("other", [{"scorer": KVzipScorer(aggregation="max")}, {"allocator": "uniform"}])
def test_what_was_ranked_otherwise_is_not_used_unless_nothing_was_evicted(tmp_path: Path, other: dict[str, Any]) -> None:
    writer, engine = tiny_engine(cache_dir=tmp_path, ratio=0.5, **other), tiny_engine(cache_dir=tmp_path, ratio=0.5)
    writer.load([*FIRST, *MORE])
    whole = writer.load(FIRST, ratio=1.0)
    writer.registry.flush()
    assert used(engine) == whole.key


def asked_of(frame: str, engine: KVzipEngine, **fields: Any) -> str | None:
    if frame == "langchain":
        reply = KVzipChatModel(engine=engine, max_tokens=2, **fields).invoke([HumanMessage(TEXT), ("ai", "Noted."), ("human", "Who?")])
        return reply.response_metadata["kvzip"].get("context")
    messages = [ChatMessage(TEXT), ChatMessage("Noted.", role="assistant"), ChatMessage("Who?")]
    raw = KVzipLLM(engine=engine, max_tokens=2, **fields).chat(messages).raw
    key: str | None = raw["kvzip"]["context"]  # type: ignore[index]
    return key


@pytest.mark.parametrize("frame", ["langchain", "llamaindex"])
def test_models_of_frameworks_use_what_keeps_as_much_as_they_do_or_nothing(frame: str) -> None:
    engine = tiny_engine(ratio=0.5)
    half, most = engine.load(FIRST), engine.load(FIRST[:1], ratio=0.8)
    assert asked_of(frame, engine) == half.key
    assert asked_of(frame, engine, ratio=0.7) == most.key
    assert asked_of(frame, engine, ratio=0.9) is None
    assert asked_of(frame, engine, reuse=False) is None
    assert asked_of(frame, engine, reuse=False, ratio=0.7) is None


def test_memory_goes_on_from_what_keeps_enough() -> None:
    engine, memory = tiny_engine(ratio=0.5), Memory(("messages", 60), ("messages", 2))
    fine = engine.load(FIRST, ratio=0.8)
    engine.load([*FIRST, *MORE], ratio=0.3)
    found = memory.recall(engine, ASKED, ratio=0.5)
    assert (found.context and found.context.key, found.messages) == (fine.key, 2)
    assert memory.recall(engine, ASKED, ratio=0.9).context is None


def test_a_mark_goes_on_from_what_keeps_enough() -> None:
    engine = tiny_engine(ratio=0.5)

    def marked(n: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": TEXT * n, "cache_control": {"type": "ephemeral"}}]}]

    fine = engine.load_marked(marked(1))
    coarse = engine.load_marked(marked(2), ratio=0.1)
    assert fine is not None
    assert coarse is not None
    moved: CompressedContext | None = engine.load_marked(marked(3))
    assert moved is not None
    assert moved.identity["parent"] == fine.key
