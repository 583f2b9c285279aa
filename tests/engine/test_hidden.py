"""Tokens, passwords and salts among a model object's options: in no trace, cache key, repr or dump, and handed on as they were given."""

from __future__ import annotations

import inspect
import json
import pickle
import pprint
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, dumps
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler as LlamaHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from pydantic import SecretStr, ValidationError
from rich.console import Console
from test_travel import things

from conftest import tiny_engine
from kvzip_memory import InputError, KVzipEngine, NotPicklableError
from kvzip_memory.frameworks.hidden import hidden, revealed
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipLLM

# Every text in it has a mark, by which it is found.
OPTIONS: dict[str, Any] = {
    "token": "hf_MARK1",
    "tenant": "MARK2",
    "secret": "MARK9",
    "proxies": {"https": "http://user:MARK3@proxy"},
    "hub": [{"password": "MARK4"}, ({"api_key": "MARK5", "Authorization": "Bearer MARK6"},)],
    "storage": {"key": "MARK7", "client_secret": SecretStr("MARK8")},
}
#: Where what was set past all checks is as it is.
UNCHECKED = ("__dict__", "__getstate__", "__reduce__", "model_kwargs", "vars")
KINDS: list[Any] = [KVzipLLM, KVzipChatModel]


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Things write themselves down where the process is."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that engines are made with."""
    made: list[dict[str, Any]] = []

    def from_pretrained(model: str, **options: Any) -> KVzipEngine:
        made.append(options)
        return tiny_engine(tenant=options.get("tenant"))

    monkeypatch.setattr(KVzipEngine, "from_pretrained", from_pretrained)
    return made


def told_by(thing: Any) -> Iterator[tuple[str, str]]:
    """What a thing tells by all that it has and does without being told anything, and by what prints and writes things down."""
    for name in sorted({*dir(type(thing)), *vars(thing)} - {"__init__", "run", "arun"}):
        text = ""
        try:
            value = getattr(thing, name)
            text = f"{value} {value!r}"
            needed = [p for p in inspect.signature(value).parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
            if not needed and not inspect.iscoroutinefunction(value):
                value = value()
                text += f"{value} {value!r}"
        except Exception as error:
            text += f"{error} {error!r}"
        yield name, text
    yield "pprint", pprint.pformat(thing)
    yield "vars", pprint.pformat(vars(thing))
    for way in (dumps, dumpd):
        yield way.__name__, str(way(thing))
    console = Console(record=True, width=1000, quiet=True)
    console.print(thing)
    yield "rich", console.export_text()


@pytest.mark.filterwarnings("ignore")  # for what is deprecated
@pytest.mark.parametrize("given", ["given", "copied", "set later"])
def test_secrets_are_told_by_nothing_that_a_model_object_has(asked: list[dict[str, Any]], given: str, tmp_path: Path) -> None:
    models = [kind(model="a/b", model_kwargs={} if given == "set later" else OPTIONS) for kind in KINDS]
    if given == "copied":
        models = [model.model_copy(update={"model_kwargs": dict(OPTIONS, tenant="MARK9")}) for model in models]
    for model in models if given == "set later" else ():
        model.model_kwargs = OPTIONS
    counted = 0
    for name, thing in things(*models).items():
        for way, text in told_by(thing):
            if given == "given" or way not in UNCHECKED:
                assert "MARK" not in text, (name, way)
                counted += 1
    assert counted > 500
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"MARK" in path.read_bytes()]
    assert "dtype" in str(KVzipLLM(model="a/b", model_kwargs={"dtype": "float32"}).to_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_with_a_model_object_is_told_without_its_options(kind: Any) -> None:
    for wrong in ({"max_tokens": {"a": 1}}, {"ratio": 7}, {"model": ""}, {"tokens": "MARK"}, {"temperature": "hot"}):
        with pytest.raises(ValidationError) as told:
            kind(**{"model": "a/b", "model_kwargs": OPTIONS, **wrong})
        assert "MARK" not in str(told.value) + repr(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_engines_are_made_with_the_secrets_and_each_tenant_has_its_own(kind: Any, asked: list[dict[str, Any]]) -> None:
    one = kind(model="a/b", model_kwargs=OPTIONS, max_tokens=2)
    assert one.engine is one.model_copy().engine
    assert isinstance(one.model_kwargs["tenant"], SecretStr)
    assert revealed(hidden(OPTIONS)) == {**OPTIONS, "storage": {"key": "MARK7", "client_secret": "MARK8"}}
    (options,) = asked
    assert {name: options[name] for name in OPTIONS} == revealed(OPTIONS)
    other = one.model_copy(update={"model_kwargs": {**one.model_kwargs, "tenant": SecretStr("other")}})
    assert other.engine is not one.engine
    assert other.engine.registry.tenant != one.engine.registry.tenant
    again = pickle.loads(pickle.dumps(kind(model="a/b", model_kwargs=OPTIONS)))  # noqa: S301
    assert revealed(again.model_kwargs) == revealed(OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_down_without_its_secrets_asks_for_them(kind: Any, asked: list[dict[str, Any]]) -> None:
    data = json.loads(kind(model="a/b", model_kwargs={"tenant": "ana"}).model_dump_json())
    data.pop("class_name", None)
    for remake in (kind, kind.model_construct):
        with pytest.raises(NotPicklableError, match=r"\['tenant'\].*dict\(data, model_kwargs="):
            _ = remake(**data).engine
    assert not asked
    assert kind(**dict(data, model_kwargs={"tenant": "ana"})).engine.registry.tenant


async def test_secrets_are_in_no_trace_and_no_cache_key(asked: list[dict[str, Any]]) -> None:
    seen: list[str] = []

    class Watch(BaseCallbackHandler):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda *args, **options: seen.append(repr((name, args, options)))
            return super().__getattribute__(name)

    class Keys(InMemoryCache):
        def lookup(self, prompt: str, llm_string: str) -> Any:
            seen.append(f"key {prompt} {llm_string}")

    chat, runs = KVzipChatModel(model="a/b", model_kwargs=OPTIONS, max_tokens=2, cache=Keys()), RunCollectorCallbackHandler()
    config: Any = {"callbacks": [Watch(), runs]}
    chat.invoke("Who?", config)
    await chat.ainvoke("Who?", config)
    list(chat.with_fallbacks([chat]).stream("Who?", config))
    seen += [run.json() for run in runs.traced_runs]
    assert {"on_chat_model_start", "key "} <= {name for name in ("on_chat_model_start", "key ") if any(name in text for text in seen)}

    class Events(BaseEventHandler):
        def handle(self, event: Any, **options: Any) -> None:
            seen.append(f"event {event!r} {event.model_dump()}")

    class Payloads(LlamaHandler):
        def on_event_start(self, *args: Any, **options: Any) -> str:
            seen.append(f"payload {args!r} {options!r}")
            return ""

        on_event_end = on_event_start  # type: ignore[assignment]

        def start_trace(self, trace_id: str | None = None) -> None: ...
        def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...

    root = get_dispatcher()
    root.add_event_handler(handler := Events())
    llm = KVzipLLM(model="a/b", model_kwargs=OPTIONS, max_tokens=2, callback_manager=CallbackManager([Payloads([], [])]))
    llm.complete("Who?")
    list(llm.stream_complete("Who?"))
    await llm.acomplete("Who?")
    root.event_handlers.remove(handler)
    assert sum(text.startswith("event") for text in seen) >= 4
    assert sum(text.startswith("payload") for text in seen) >= 4
    assert [text for text in seen if "MARK" in text] == []
    assert len(asked) == 2


def test_a_tenant_that_is_no_text_is_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    for tenant in (SecretStr("ana"), 7):
        for make in (tiny_engine, lambda tenant: KVzipEngine.from_pretrained(tmp_path / "none", tenant=tenant)):
            with pytest.raises(InputError, match=f"tenant is of type {type(tenant).__name__}; give a text"):
                make(tenant=tenant)
