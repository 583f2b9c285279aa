"""Nothing to ask, what is no context, and no model: each says what to give, in every way in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from llama_index.core import Document, Settings
from llama_index.core.llms import MockLLM

from conftest import TEXT, results, tiny_engine
from kvzip_memory import InputError, KVzipEngine
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware
from llama_index_kvzip import KVzipChatEngine, KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine, KVzipSynthesizer


@pytest.fixture(scope="module")
def engine() -> KVzipEngine:
    return tiny_engine()


ASKING_NOTHING: dict[str, Callable[[KVzipEngine, Any], Any]] = {
    "generate": lambda e, c: e.generate(c, []),
    "agenerate": lambda e, c: e.agenerate(c, []),
    "stream": lambda e, c: e.stream(c, []),
    "ask": lambda e, c: e.session(c).ask([]),
    **{
        f"langchain {method}": lambda e, c, method=method: getattr(KVzipChatModel(engine=e).with_context(c), method)([])
        for method in ("invoke", "ainvoke", "stream", "astream")
    },
    "langchain batch": lambda e, c: KVzipChatModel(engine=e).with_context(c).batch([[]]),
    "langchain abatch": lambda e, c: KVzipChatModel(engine=e).with_context(c).abatch([[]]),
    "agent": lambda e, c: create_agent(KVzipChatModel(engine=e).with_context(c)).invoke({"messages": []}),
    "agent with memory": lambda e, c: create_agent(KVzipChatModel(engine=e).with_context(c), middleware=[KVzipMemoryMiddleware()]).invoke(
        {"messages": []}
    ),
    **{
        f"llama_index {method}": lambda e, c, method=method: getattr(KVzipLLM(engine=e).with_context(c), method)([])
        for method in ("chat", "stream_chat", "achat", "astream_chat", "chat_with_tools")
    },
}


@pytest.mark.parametrize("has_context", [False, True])
@pytest.mark.parametrize("way", ASKING_NOTHING)
def test_no_messages_are_no_question(engine: KVzipEngine, way: str, has_context: bool) -> None:
    context = engine.load(TEXT, ratio=0.4) if has_context else None
    with pytest.raises(InputError, match="no messages; give at least one from the user"):
        asyncio.run(results(ASKING_NOTHING[way](engine, context)))


def test_a_conversation_that_awaits_an_answer_needs_no_more(engine: KVzipEngine) -> None:
    asked = [{"role": "user", "content": "Who winds the lamp?"}]
    awaiting = engine.load(asked, ratio=1.0)
    expected = engine.generate(None, asked, max_new_tokens=5).text
    assert engine.generate(awaiting, [], max_new_tokens=5).text == expected
    assert KVzipChatModel(engine=engine, max_tokens=5).with_context(awaiting).invoke([]).text == expected
    marked = engine.load([{"role": "system", "content": "Be brief."}], ratio=1.0)
    with pytest.raises(InputError, match="no messages"):
        engine.generate(marked, [])


GIVING_A_CONTEXT: dict[str, Callable[[KVzipEngine, Any], Any]] = {
    "generate": lambda e, c: e.generate(c, "Who?"),
    "agenerate": lambda e, c: e.agenerate(c, "Who?"),
    "stream": lambda e, c: e.stream(c, "Who?"),
    "session": lambda e, c: e.session(c),
    "extend": lambda e, c: e.extend(c, "More."),
    "join": lambda e, c: e.join([c, c]),
    "relevance": lambda e, c: e.relevance([(c, [(0, 5)])], "Who?"),
    "logits": lambda e, c: e.logits(c, [5]),
    "langchain": lambda e, c: KVzipChatModel(engine=e).with_context(c),
    "llama_index": lambda e, c: KVzipLLM(engine=e).with_context(c),
    "query engine": lambda e, c: KVzipQueryEngine.from_context(c, llm=KVzipLLM(engine=e)),
    "chat engine": lambda e, c: KVzipChatEngine.from_context(c, llm=KVzipLLM(engine=e)),
}


@pytest.mark.parametrize("way", GIVING_A_CONTEXT)
@pytest.mark.parametrize("wrong", [3, {"page"}, {"key": "page"}, b"page", True])
def test_what_is_no_context_is_named(engine: KVzipEngine, way: str, wrong: Any) -> None:
    with pytest.raises(InputError, match=rf"is no context, but of type {type(wrong).__name__}; give what load\(\)"):
        asyncio.run(results(GIVING_A_CONTEXT[way](engine, wrong)))


# -- Settings.llm ------------------------------------------------------------------------------------------------

DOCUMENTS = [Document(text=TEXT, doc_id="a")]
WITHOUT_A_MODEL: dict[str, Callable[[KVzipEngine], Any]] = {
    "index": lambda e: KVzipIndex.from_documents(DOCUMENTS)._llm,
    "index of nodes": lambda e: KVzipIndex([])._llm,
    "index from storage": lambda e: (
        KVzipIndex.from_storage(KVzipIndex.from_documents(DOCUMENTS, llm=KVzipLLM(engine=e)).storage_context)._llm
    ),
    "memory block": lambda e: KVzipMemoryBlock().llm,
    "query engine": lambda e: KVzipQueryEngine.from_documents(DOCUMENTS)._llm,
    "query engine of a context": lambda e: KVzipQueryEngine.from_context(e.load(TEXT))._llm,
    "query engine of None": lambda e: KVzipQueryEngine(None, tuple)._llm,
    "chat engine": lambda e: KVzipChatEngine.from_context(e.load(TEXT))._llm.with_context(None),  # type: ignore[attr-defined]
    "synthesizer": lambda e: KVzipSynthesizer()._model,
}


@pytest.mark.parametrize("way", WITHOUT_A_MODEL)
def test_settings_llm_is_the_default_and_no_server_s_model(engine: KVzipEngine, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = WITHOUT_A_MODEL[way]
    monkeypatch.setattr(Settings, "_llm", None)
    with pytest.raises(InputError, match=r"no model: give llm=KVzipLLM\(...\), or set Settings.llm"):
        made(engine)
    assert Settings._llm is None  # LlamaIndex' own default was not made
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    with pytest.raises(InputError, match=r"is MockLLM.*KVzipLLM.*set Settings.llm to one"):
        made(engine)
    Settings.llm = llm = KVzipLLM(engine=engine, max_tokens=4)
    assert made(engine) == llm


def test_an_index_answers_by_its_own_model_whatever_the_settings(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    index = KVzipIndex.from_documents(DOCUMENTS, llm=KVzipLLM(engine=engine, max_tokens=4))
    assert index.as_query_engine().query("Who?").metadata["usage"]["completion_tokens"] <= 4
    assert index.as_chat_engine().chat("Who?").response
