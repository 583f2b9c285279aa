"""Model objects that are pickled or written down: what holds an engine says so, the rest loads where it arrives, and no hub is asked."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import pkgutil
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from langchain.agents import create_agent
from langchain_core.load import dumps, loads
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.extractors import TitleExtractor
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.memory import Memory
from llama_index.core.schema import IndexNode
from llama_index.core.workflow import Context, JsonPickleSerializer, JsonSerializer
from pydantic import BaseModel

import langchain_kvzip
import llama_index_kvzip
from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from documents import DOCUMENTS
from kvzip_memory import KVzipEngine, NotPicklableError
from langchain_kvzip import KVzipChatModel, create_memory_tools
from langchain_kvzip.structured import AnswerParser
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipMemoryBlock
from llama_index_kvzip.sources import Paragraphs

HUB_NAME = "maker/model-of-another"


class Out(BaseModel):
    lit: bool


WAYS: dict[str, Callable[[Any], Any]] = {
    **{f"pickle {n}": lambda x, n=n: pickle.loads(pickle.dumps(x, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)},  # noqa: S301
    "python pickle": lambda x: pickle.loads(pickle._dumps(x)),  # type: ignore[attr-defined]  # noqa: S301
    "cloudpickle": lambda x: pickle.loads(cloudpickle.dumps(x)),  # noqa: S301
    "dump": lambda x: type(x)(**x.model_dump()),
    "dump in part": lambda x: type(x)(**x.model_dump(exclude_defaults=True, exclude_unset=True)),
    "dump by alias": lambda x: type(x).model_validate(x.model_dump(by_alias=True, include={"model", "model_name"})),
    "json": lambda x: type(x).model_validate_json(x.model_dump_json()),
    "construct": lambda x: type(x).model_construct(**x.model_dump()),
    "to_dict": lambda x: type(x).from_dict(x.to_dict()),
    "to_json": lambda x: type(x).from_json(x.to_json()),
    "dict()": lambda x: type(x)(**x.dict()),
    "workflow json": lambda x: JsonSerializer().deserialize(JsonSerializer().serialize({"x": x}))["x"],
    "workflow pickle": lambda x: JsonPickleSerializer().deserialize(JsonPickleSerializer().serialize(x)),
    "langchain": lambda x: loads(dumps(x), allowed_objects="all"),
    "langgraph": lambda x: JsonPlusSerializer().loads_typed(JsonPlusSerializer().dumps_typed(x)),
    "langgraph pickle": lambda x: JsonPlusSerializer(pickle_fallback=True).loads_typed(
        JsonPlusSerializer(pickle_fallback=True).dumps_typed(x)
    ),
}


def things(llm: KVzipLLM, chat: KVzipChatModel) -> dict[str, Any]:
    block = KVzipMemoryBlock(llm=llm)
    return {
        "llm": llm,
        "structured llm": llm.as_structured_llm(Out),
        "block": block,
        "memory": Memory.from_defaults(memory_blocks=[block]),
        "extractor": TitleExtractor(llm=llm),
        "pipeline": IngestionPipeline(transformations=[Paragraphs(), TitleExtractor(llm=llm)]),
        "agent": FunctionAgent(llm=llm),
        "chat": chat,
        "bound": chat.bind(max_tokens=2),
        "structured": chat.with_structured_output(Out),
        "configurable": chat.configurable_fields(temperature={"id": "heat"}),  # type: ignore[arg-type]
        "alternatives": chat.with_fallbacks([chat]),
    }


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that weights were loaded by; nothing connects to anything."""
    asked: list[str] = []

    def load(model: str, **options: Any) -> KVzipEngine:
        asked.append(model)
        raise OSError("not here")

    monkeypatch.setattr(KVzipEngine, "from_pretrained", load)
    for connect in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, connect, lambda *args: pytest.fail("a connection"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("a look-up"))
    return asked


@pytest.fixture(scope="module")
def engine() -> KVzipEngine:
    engine = tiny_engine()
    engine.model.config.name_or_path = HUB_NAME
    return engine


def models(thing: Any, seen: set[int]) -> Iterator[Any]:
    """The model objects in a thing, however deep."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, KVzipLLM | KVzipChatModel):
        yield thing
    inner = (
        thing.values()
        if isinstance(thing, dict)
        else thing
        if isinstance(thing, list | tuple)
        else vars(thing).values()
        if hasattr(thing, "__dict__")
        else ()
    )
    for each in list(inner):
        if not isinstance(each, type | KVzipEngine):
            yield from models(each, seen)


def ask(made: Any) -> list[Any]:
    """Ask every model in what has arrived."""
    found = list(models(made, set()))
    for model in found:
        with pytest.raises((OSError, NotPicklableError, AttributeError), match=r"not here|lost its engine|'str' object"):
            model.complete("Who?") if isinstance(model, KVzipLLM) else model.invoke("Who?")
    return found


def tried(way: Callable[[Any], Any], thing: Any) -> tuple[Any, str | None]:
    """What arrives, or what is said instead."""
    try:
        return way(thing), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["engine", "context", "lazy with context", "lazy"])
def test_whatever_is_sent_asks_no_hub_for_a_name_that_is_none_and_leaves_the_living_as_they_are(
    engine: KVzipEngine, loaded: list[str], way: str, which: str
) -> None:
    context = engine.load(TEXT, ratio=0.4)
    given: dict[str, Any] = {"model": "a/lazy-one"} if which.startswith("lazy") else {"engine": engine}
    llm, chat = KVzipLLM(**given, max_tokens=2), KVzipChatModel(**given, max_tokens=2)
    if "context" in which:
        llm, chat = llm.with_context(context), chat.with_context(context)
    arrived = 0
    for name, thing in things(llm, chat).items():
        before = [list(models(thing, set())), dict(vars(thing)), dict(vars(llm)), dict(vars(chat))]
        made, told = tried(WAYS[way], thing)
        if told is not None:
            if "pickle" in way and which != "lazy" and way != "workflow pickle":  # that writes components down, if it can
                assert "NotPicklableError: a KVzip" in told, (name, told)
                assert re.search(r"cannot be pickled.*model=", told), (name, told)
        else:
            found = ask(made)
            assert not found or which == "lazy" or way.startswith(("construct", "langgraph")), name  # these check nothing
            arrived += len(found)
        assert [list(models(thing, set())), dict(vars(thing)), dict(vars(llm)), dict(vars(chat))] == before, name
    assert set(loaded) <= ({"a/lazy-one"} if which.startswith("lazy") else set())
    if which == "lazy" and "pickle" in way:
        assert arrived >= 5
        assert loaded


def test_every_pydantic_class_of_the_integrations_is_among_these(engine: KVzipEngine) -> None:
    found = set()
    for package in (langchain_kvzip, llama_index_kvzip):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                is_ours = isinstance(value, type) and value.__module__.startswith(package.__name__)
                if is_ours and issubclass(value, BaseModel) and not inspect.isabstract(value):
                    found.add(value)
    tried: set[type] = set()

    def walk(thing: Any, seen: set[int]) -> None:
        if id(thing) not in seen:
            seen.add(id(thing))
            tried.add(type(thing))
            for each in [*(thing if isinstance(thing, list) else []), *getattr(thing, "__dict__", {}).values()]:
                if isinstance(each, BaseModel | list):
                    walk(each, seen)

    for thing in things(KVzipLLM(engine=engine), KVzipChatModel(engine=engine)).values():
        walk(thing, set())
    holding_nothing = {cls for cls in found if not {"llm", "given_engine", "engine", "model"} & cls.model_fields.keys()}
    assert found - holding_nothing <= tried, found - tried
    assert {KVzipLLM, KVzipChatModel, KVzipMemoryBlock, AnswerParser, Paragraphs} <= tried


def test_a_lazy_model_loads_where_it_arrives(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "weights")
    tiny_tokenizer().save_pretrained(tmp_path / "weights")
    for kind in (KVzipLLM, KVzipChatModel):
        made = kind(model=str(tmp_path / "weights"), cache_dir=str(tmp_path / "cache"), max_tokens=3)
        first = made.engine.generate(None, "Who?", max_new_tokens=3).text
        arrived = pickle.loads(pickle.dumps(made))  # noqa: S301
        assert arrived.engine is not made.engine
        assert arrived.engine.generate(None, "Who?", max_new_tokens=3).text == first
        assert arrived.model_copy().engine is arrived.engine
        both = pickle.loads(pickle.dumps([made, made.model_copy(update={"max_tokens": 2})]))  # noqa: S301
        assert both[0].engine is both[1].engine


def test_what_was_written_down_goes_on_when_the_engine_is_put_in_again(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.4)
    llm = KVzipLLM(engine=engine, max_tokens=3).with_context(context)
    data = json.loads(llm.to_json())
    with pytest.raises(NotPicklableError, match=rf"written down without its engine.*'{HUB_NAME}'.*engine="):
        KVzipLLM.from_dict(data)
    with pytest.raises(NotPicklableError, match=r"context=engine.get\(key\)"):
        KVzipLLM.from_dict(data, engine=engine)
    again = KVzipLLM.from_dict(data, engine=engine, context=engine.get(data["context"]))
    assert str(again.complete("Who?")) == str(llm.complete("Who?"))
    chat = KVzipChatModel(engine=engine, max_tokens=3)
    with pytest.raises(NotPicklableError, match="written down without its engine"):
        KVzipChatModel(**chat.model_dump())
    assert KVzipChatModel(**{**chat.model_dump(), "engine": engine}).engine is engine


def test_an_engine_that_was_taken_away_is_not_looked_for_elsewhere(engine: KVzipEngine, loaded: list[str]) -> None:
    for model in (KVzipLLM(engine=engine), KVzipChatModel(engine=engine)):
        with pytest.raises(NotPicklableError, match=f"lost its engine.*{HUB_NAME}"):
            _ = model.model_copy(update={"given_engine": None}).engine
    assert loaded == []


async def test_an_agent_s_context_is_written_down_or_says_why_not(engine: KVzipEngine, loaded: list[str]) -> None:
    llm = KVzipLLM(engine=engine, max_tokens=2)
    memory = Memory.from_defaults(session_id="ana", memory_blocks=[KVzipMemoryBlock(llm=llm)])
    agent = FunctionAgent(llm=llm)
    ctx: Any = Context(agent)
    for held in (None, llm, {"of": [llm.as_structured_llm(Out)]}):
        await ctx.store.set("held", None)
        await agent.run("Who?", ctx=ctx)
        await ctx.store.set("held", held)
        with suppress(Exception):  # Workflows', in many kinds
            written: Any = Context.from_dict(agent, ctx.to_dict(serializer=JsonPickleSerializer()), serializer=JsonPickleSerializer())
            assert not list(models(await written.store.get("held"), set()))
    await ctx.store.set("held", None)
    assert str(await agent.run("And who?", ctx=ctx))
    await ctx.store.set("memory", memory)
    ctx.to_dict(serializer=JsonPickleSerializer())
    assert memory.memory_blocks[0].llm is llm  # type: ignore[attr-defined]  # LlamaIndex takes the store of messages, whatever the model
    assert loaded == []


def test_components_that_hold_an_index_keep_it(engine: KVzipEngine) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=KVzipLLM(engine=engine, max_tokens=2))
    node = IndexNode(text="all", index_id="a", obj=index)
    with pytest.raises(NotPicklableError, match="persist"):
        pickle.dumps(node)
    assert node.obj is index
    structured = KVzipLLM(engine=engine).as_structured_llm(Out)
    assert isinstance(structured, StructuredLLM)
    with pytest.raises(NotPicklableError):
        pickle.dumps({"deep": [structured]})
    assert structured.llm.engine is engine


def test_an_agent_of_a_chat_model_is_not_sent(engine: KVzipEngine) -> None:
    chat = KVzipChatModel(engine=engine, max_tokens=2)
    for thing in (create_agent(chat), create_memory_tools(engine)):
        with pytest.raises(Exception, match="pickle"):
            cloudpickle.dumps(thing)
    assert chat.engine is engine


@pytest.mark.parametrize("kind", [KVzipLLM, KVzipChatModel])
def test_the_way_out_that_is_told_makes_it_anew(engine: KVzipEngine, kind: Any) -> None:
    context = engine.load(TEXT, ratio=0.4)
    data = kind(engine=engine, max_tokens=3).with_context(context).model_dump()
    known = {kind.__name__: kind, "engine": engine, "key": context.key, "data": data}
    for missing in ("engine", "context"):
        with pytest.raises(NotPicklableError) as told:
            kind(**known["data"])
        way_out = re.search(rf"{kind.__name__}\(\*\*dict\(data, (.*)\)\)", str(told.value))
        assert way_out, missing
        known["data"] = eval(f"dict(data, {way_out[1]})", known)
        del known["__builtins__"]
    again = kind(**known["data"])
    assert again.engine is engine
    assert again.context.key == context.key
