"""Copies share the engine and the pairs; nothing is pickled by accident; folders stay where they were."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from llama_index.core import Document
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory
from llama_index.core.tools import QueryEngineTool

from conftest import TEXT, tiny_engine
from kvzip_memory import CompressedContext, KVzipEngine, NotPicklableError
from kvzip_memory.conversations import Recalled
from kvzip_memory.inference.generation import GenerationParams
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware, create_memory_tools
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine, KVzipSynthesizer

COPIES = [copy.copy, copy.deepcopy]


@pytest.fixture
def context(engine: KVzipEngine) -> CompressedContext:
    return engine.load(TEXT, ratio=0.4)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_an_engine_or_a_context_is_itself(
    engine: KVzipEngine, context: CompressedContext, copied: Callable[[Any], Any], tmp_path: Path
) -> None:
    assert copied(engine) is engine
    assert copied(context) is context
    opened = engine.open(context.save(tmp_path / "page"))
    assert copied(opened) is opened
    assert copied({"handle": Recalled(context, 2)})["handle"].context is context

    @dataclass
    class State:
        context: CompressedContext

    assert asdict(State(context))["context"]["storage"] is context.storage
    params = GenerationParams(grammar=engine.guidance.json({"type": "integer"}))
    assert copied(params).grammar is params.grammar


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_a_session_is_a_fork(engine: KVzipEngine, context: CompressedContext, copied: Callable[[Any], Any]) -> None:
    session, other = engine.session(context), engine.session(context)
    session.ask("Who?", max_new_tokens=4)
    other.ask("Who?", max_new_tokens=4)
    twin = copied(session)
    twin.ask("Something else?", max_new_tokens=9)
    assert session.ask("When?", max_new_tokens=6).text == other.ask("When?", max_new_tokens=6).text
    assert len(twin._talk.ends) == 2


def things(engine: KVzipEngine, context: CompressedContext) -> dict[str, tuple[Any, Callable[[Any], object]]]:
    """What users hold, and what can be asked of it."""
    chat, llm = KVzipChatModel(engine=engine, max_tokens=6), KVzipLLM(engine=engine, max_tokens=6)
    documents = [Document(text=TEXT, doc_id="a")]
    index = KVzipIndex.from_documents(documents, llm=llm)
    memory = Memory.from_defaults(session_id="x", memory_blocks=[KVzipMemoryBlock(llm=llm)])
    return {
        "chat model": (chat.with_context(context), lambda model: model.invoke("Who?").content),
        "bound": (chat.bind(max_tokens=3), lambda model: model.invoke("Who?").content),
        "llm": (llm.with_context(context), lambda model: model.complete("Who?").text),
        "query engine": (KVzipQueryEngine.from_documents(documents, llm=llm), lambda query: str(query.query("Who?"))),
        "tool": (QueryEngineTool.from_defaults(index.as_query_engine()), lambda tool: str(tool("Who?"))),
        "index": (index, lambda index: str(index.as_query_engine().query("Who?"))),
        "retriever": (index.as_retriever(), lambda retriever: [node.text for node in retriever.retrieve("Who?")]),
        "chat engine": (index.as_chat_engine(), lambda chat: str(copy.deepcopy(chat).chat("Who?"))),
        "memory": (memory, lambda memory: memory.get()),
        "synthesizer": (KVzipSynthesizer(llm=llm), lambda synthesizer: str(synthesizer.get_response("Who?", [TEXT]))),
        "memory tools": (create_memory_tools(engine), lambda tools: [tool.name for tool in tools]),
        "middleware": (
            [chat, KVzipMemoryMiddleware()],
            lambda made: create_agent(made[0], middleware=made[1:]).invoke({"messages": [("user", "Who?")]})["messages"][-1].content,
        ),
    }


@pytest.mark.parametrize("copied", COPIES)
def test_what_frameworks_copy_answers_as_before_and_shares_the_engine(
    engine: KVzipEngine, context: CompressedContext, copied: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVzipEngine, "from_pretrained", lambda *args, **options: pytest.fail("a second engine"))
    for name, (thing, asked) in things(engine, context).items():
        assert asked(copied(thing)) == asked(thing), name


def test_a_copy_of_a_model_that_is_not_loaded_yet_loads_it_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[KVzipEngine] = []
    monkeypatch.setattr(KVzipEngine, "from_pretrained", lambda *args, **options: made.append(tiny_engine()) or made[-1])
    for model in (KVzipChatModel(model="any"), KVzipLLM(model="any")):
        made.clear()
        copies = [model, copy.copy(model), copy.deepcopy(model), model.model_copy(deep=True), copy.deepcopy({"model": model})["model"]]
        assert {id(each.engine) for each in copies[::-1]} == {id(made[0])}
        assert len(made) == 1


def test_what_cannot_be_pickled_says_what_to_do(engine: KVzipEngine, context: CompressedContext) -> None:
    index = KVzipIndex.from_documents([Document(text=TEXT)], llm=KVzipLLM(engine=engine))
    for thing, way_out in (
        (engine, "cache_dir"),
        (context, r"save\(\)"),
        (engine.session(context), r"fold\(\)"),
        (engine.stream(None, "Who?"), "read once"),
        (KVzipChatModel(engine=engine), "cache_dir"),
        (KVzipLLM(engine=engine), "cache_dir"),
        (KVzipLLM(engine=engine).with_context(context), "key"),
        (index, "persist"),
        ({"messages": [ChatMessage("Who?")], "context": context}, "key"),
    ):
        with pytest.raises(NotPicklableError, match=rf"cannot be pickled.*{way_out}"):
            pickle.dumps(thing)
    with pytest.raises(NotPicklableError, match="read once"):
        copy.deepcopy(engine.stream(None, "Who?"))
    reply = engine.generate(context, "Who?", max_new_tokens=2)
    assert pickle.loads(pickle.dumps(reply)) == copy.deepcopy(reply) == reply  # noqa: S301
    assert pickle.loads(pickle.dumps(KVzipLLM(model="any", max_tokens=3))).max_tokens == 3  # noqa: S301


def test_the_folders_of_a_model_object_are_fixed_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    made: list[tuple[str, str]] = []

    def load(model: str, **options: Any) -> KVzipEngine:
        made.append((model, options["cache_dir"]))
        return tiny_engine()

    monkeypatch.setattr(KVzipEngine, "from_pretrained", load)
    models = [kind(model=model, cache_dir="cache") for kind in (KVzipChatModel, KVzipLLM) for model in ("weights", "some/hub-id")]
    monkeypatch.chdir(tmp_path / "elsewhere")
    for model in models:
        assert model.engine.window
    assert made == [(str(tmp_path / "weights"), str(tmp_path / "cache")), ("some/hub-id", str(tmp_path / "cache"))] * 2
