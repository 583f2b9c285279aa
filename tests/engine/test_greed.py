"""What is too long, too many or too deep is refused before it is worked on."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import json
import pkgutil
import random
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from typer.testing import CliRunner

import kvzip_memory
import langchain_kvzip
import llama_index_kvzip
from conftest import ROOT, TEXT, tiny_engine
from kvzip_memory import Document, InputError, KVzipEngine, KVzipError, QueueFullError, WindowError, turns
from kvzip_memory.cli import app
from kvzip_memory.context.facts import LONGEST_NAME
from kvzip_memory.inference.generation import LONGEST_STOP, MOST_STOPS, GenerationParams, StopMatcher
from kvzip_memory.prompting.call_reader import CallReader, read_calls
from kvzip_memory.prompting.cleaning import DEEPEST, MOST_KEPT, MOST_OF_SCHEMA, check_nesting
from kvzip_memory.prompting.documents import LARGEST_METADATA, MOST_OF_METADATA
from kvzip_memory.prompting.forms import FORMS
from kvzip_memory.prompting.guidance import MOST_OF_GRAMMAR
from kvzip_memory.prompting.messages import as_message
from kvzip_memory.prompting.schemas import json_rule
from kvzip_memory.prompting.sources import read_source
from kvzip_memory.registry import holders
from kvzip_memory.registry.holders import MOST_HOLDERS
from kvzip_memory.registry.wanted import MOST_TAGS
from kvzip_memory.session import Session
from kvzip_memory.system.printable import brief
from kvzip_memory.turns import LARGEST_SESSION, Turns, sessions
from langchain_kvzip import create_memory_tools, memory_tools
from langchain_kvzip.folders import LARGEST_FILE
from langchain_kvzip.memory_tools import LONGEST_DOCUMENT_NAME
from llama_index_kvzip import KVzipLLM, KVzipMemoryBlock, memory
from pairs import PAIRS

WINDOW = 2048
#: A thousand times the window of the tiny models.
HUGE = "A page of a very long book that nobody reads. " * 45_000


@pytest.fixture
def engine() -> KVzipEngine:
    return tiny_engine()


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """The most bytes of Python's that were taken since the last call."""
    tracemalloc.start()

    def most() -> int:
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return taken

    most()
    yield most
    tracemalloc.stop()


# -- texts that do not fit -------------------------------------------------------------------------------------------

USER, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}
MARKED = {"type": "text", "text": HUGE, "cache_control": {"type": "ephemeral"}}


def _huge(role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": HUGE}


def _second(session: Session) -> Any:
    session.ask("Who?", max_new_tokens=1)
    return session.ask(HUGE)


# Of each public method that takes texts of a prompt: ways to give it one.
WAYS: dict[str, list[Callable[[KVzipEngine], Any]]] = {
    "load": [
        lambda engine: engine.load(HUGE),
        lambda engine: engine.load([TEXT, HUGE]),
        lambda engine: engine.load(TEXT, system=HUGE),
        lambda engine: engine.load([USER, SAID, _huge()]),
        lambda engine: engine.load([USER, _huge("assistant"), USER]),
        lambda engine: engine.load([USER], tools=[tool("f", description=HUGE)]),
    ],
    "aload": [lambda engine: asyncio.run(engine.aload(HUGE))],
    "load_marked": [lambda engine: engine.load_marked([{"role": "user", "content": [MARKED]}])],
    "extend": [
        lambda engine: engine.extend(engine.load([TEXT, TEXT]), HUGE),
        lambda engine: engine.extend(engine.load([USER, SAID]), [_huge()]),
    ],
    "aextend": [lambda engine: asyncio.run(engine.aextend(engine.load([USER, SAID]), [_huge()]))],
    "generate": [
        lambda engine: engine.generate(None, HUGE),
        lambda engine: engine.generate(None, [_huge("system"), USER]),
        lambda engine: engine.generate(None, [USER, _huge("tool")]),
        lambda engine: engine.generate(None, [USER, {**SAID, "reasoning": HUGE, "content": HUGE}, USER]),
        lambda engine: engine.generate(engine.load(TEXT), HUGE),
        lambda engine: engine.generate(engine.load(TEXT), [USER, SAID, _huge()]),
    ],
    "agenerate": [lambda engine: asyncio.run(engine.agenerate(None, HUGE))],
    "stream": [lambda engine: engine.stream(None, HUGE), lambda engine: engine.stream(None, [_huge()], tools=[tool("f")])],
    "prompt_ids": [lambda engine: engine.prompt_ids(None, HUGE), lambda engine: engine.prompt_ids(engine.load(TEXT), HUGE)],
    "relevance": [lambda engine: engine.relevance([(engine.load(TEXT), [(0, 4)])], HUGE)],
    "ask": [lambda engine: engine.session().ask(HUGE), lambda engine: _second(engine.session(engine.load(TEXT)))],
}
#: They count, or say where tokens lie, or read an answer: there is no limit to a text of which that is asked.
UNLIMITED = {"count_tokens", "text_ids", "token_offsets", "read_calls"}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object", "properties": {}}, **more}}


def test_all_ways_in_are_known() -> None:
    takes = {"source", "question", "messages", "more", "text", "answer"}
    methods = [
        (name, method) for kind in (KVzipEngine, Session) for name, method in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"
    ]
    found = {name for name, method in methods if takes & inspect.signature(method).parameters.keys()}
    assert found - UNLIMITED == WAYS.keys()


@pytest.mark.parametrize(("way", "number"), [(way, number) for way in WAYS for number in range(len(WAYS[way]))])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised_whole(
    way: str, number: int, engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch, peak: Callable[[], int]
) -> None:
    encoder, read = engine._prompts._encoder, list[int]()
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda text: (read.append(len(text)), encode(text))[1])
    with pytest.raises(WindowError, match=r"a text of 2,\d{3},\d{3} characters has .* tokens and more.*window is 2,048") as raised:
        WAYS[way][number](engine)
    assert raised.value.tokens > raised.value.window == WINDOW
    assert max(read) <= 4 * 8 * WINDOW
    assert peak() < 40 * len(HUGE)  # in copies of text; tokens take 170 bytes a character


#: A pair for each kind of tokenizer.
TOKENIZERS = {name.partition(",")[0]: pair for name, pair in PAIRS.items() if "," in name}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_that_fits_is_refused(name: str) -> None:
    rng = random.Random(0)
    encoder = TOKENIZERS[name].builder._encoder
    for kind in ("words", " ", "a", "aB", "\n", "字", "0123456789", "é€😀", "e\u0301", "\u00a0\t "):
        text = TEXT * 6 if kind == "words" else "".join(rng.choice(kind) for _ in range(1500))
        n = len(encoder.ids(text))
        assert all(encoder.least(text, most) <= n for most in (5, n // 9, n - 1, n) if most > 0)
    assert encoder.least(TEXT * 6, 30) > 30


# -- stop strings and strings to keep --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        ([f"{n}" for n in range(10 * MOST_STOPS)], "stop has 640 texts; give 64 at most"),
        ("a" * 10 * LONGEST_STOP, "a stop string has 10,240 characters; give its first 1,024 at most"),
        ([["a"] * 10_000_000], r"stop is \[\[.*\]\]; it must be a text"),
    ],
)
def test_long_and_many_stop_strings_are_refused(stop: Any, told: str, engine: KVzipEngine) -> None:
    with pytest.raises(InputError, match=told) as raised:
        engine.generate(None, "Who?", stop=stop)
    assert len(str(raised.value)) < 300
    GenerationParams(stop=["a" * LONGEST_STOP] * MOST_STOPS)


def plainly(text: str, stops: list[str]) -> tuple[str, bool]:
    """Up to the stop string that is complete first, and of those the longest."""
    for end in range(len(text) + 1):
        if begins := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(begins)], True
    return text, False


def test_stop_strings_are_found_as_plainly_looked_for() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 4))]
        text = "".join(rng.choices("abc", [4, 4, 1], k=rng.randint(0, 40)))
        matcher, out, hit = StopMatcher(stops), "", False
        for char in text:  # a stop string that ends in a later piece is not seen before
            shown, hit = matcher.push(char)
            assert not any(shown.endswith(stop) for stop in stops)
            out += shown
            if hit:
                break
        assert (out + ("" if hit else matcher.flush()), hit) == plainly(text, stops)


def test_no_character_is_compared_over_and_over() -> None:
    compared = 0

    class Counted(str):
        def __getitem__(self, at: Any) -> str:
            nonlocal compared
            compared += 1
            return super().__getitem__(at)

    [search] = StopMatcher([Counted("a" * 1000 + "b")])._searches
    compared = 0
    assert search.push("a" * 20_000) is None
    assert compared < 3 * 20_000


def test_long_and_many_strings_to_keep_are_refused(engine: KVzipEngine) -> None:
    with pytest.raises(InputError, match="keep: more than 1,000 texts were given"):
        engine.load(TEXT, keep=[TEXT[:4]] * 10 * MOST_KEPT)
    with pytest.raises(InputError, match=r"keep: .* does not occur") as raised:
        engine.load(TEXT, keep="a" * 10 * len(TEXT))
    assert len(str(raised.value)) < 300
    assert engine.load(TEXT, keep=[TEXT[n : n + 9] for n in range(200)]).n_tokens


# -- schemas, tools and calls ----------------------------------------------------------------------------------------


def nested(levels: int, kind: str) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {
            "objects": lambda: {"type": "object", "properties": {"a": value}, "required": ["a"]},  # noqa: B023
            "others": lambda: {"type": "object", "additionalProperties": value, "required": ["a", "b"]},  # noqa: B023
            "lists": lambda: {"type": "array", "items": value, "minItems": 1},  # noqa: B023
            "choices": lambda: {"anyOf": [value, {"type": "null"}]},  # noqa: B023
            "parts": lambda: {"allOf": [value]},  # noqa: B023
            "two": lambda: {"anyOf": [value, {"type": "array", "items": value}]},  # noqa: B023
        }[kind]()
    return value


def cyclic(twice: bool) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    schema["properties"] |= dict.fromkeys("ab" if twice else "a", schema)
    return schema


def chain(levels: int) -> dict[str, Any]:
    """Each refers to the next."""
    definitions = {
        f"d{n}": {"type": "object", "properties": {"n": {"$ref": f"#/$defs/d{n + 1}"}}, "required": ["n"]} for n in range(levels)
    }
    return {"type": "object", "properties": {"d": {"$ref": "#/$defs/d0"}}, "$defs": {**definitions, f"d{levels}": {"type": "integer"}}}


GREEDY: dict[str, Any] = {
    **{kind: nested(10 * DEEPEST, kind) for kind in ("objects", "others", "lists", "choices", "parts")},
    **{f"very deep {kind}": nested(20_000, kind) for kind in ("objects", "lists")},
    "shared": nested(40, "two"),
    "cyclic": cyclic(False),
    "cyclic twice": cyclic(True),
    "wide": {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(10 * MOST_OF_SCHEMA)}},
    "long chain": chain(10 * MOST_OF_SCHEMA),
    "long text": {"type": "object", "properties": {"a": {"const": "a" * 10 * MOST_OF_GRAMMAR}}},
    "many texts": {"type": "object", "properties": {"a": {"enum": [f"value {n}" * 10 for n in range(MOST_OF_GRAMMAR // 10)]}}},
}


@pytest.mark.parametrize("where", ["schema", "guidance", "tools"])
@pytest.mark.parametrize("greedy", GREEDY)
def test_greedy_schemas_are_refused(greedy: str, where: str, engine: KVzipEngine, peak: Callable[[], int]) -> None:
    engine.guidance.json({})
    peak()
    ask: dict[str, Callable[[Any], Any]] = {
        "guidance": engine.guidance.json,
        "schema": lambda schema: engine.generate(None, "Who?", schema=schema),
        "tools": lambda schema: engine.generate(None, "Who?", tools=[tool("f", schema)]),
    }
    with pytest.raises(InputError, match=r"lists and mappings|characters; at most 1,000,000|model's window is") as raised:
        ask[where](GREEDY[greedy])
    assert where == "tools" or not isinstance(raised.value, WindowError)  # tools stand in the prompt, too
    assert len(str(raised.value)) < 400
    assert peak() < 300_000_000


@pytest.mark.parametrize("kind", ["objects", "others", "lists", "choices", "parts"])
def test_what_is_just_not_too_deep_guides_in_time_that_does_not_double_with_each_level(kind: str, engine: KVzipEngine) -> None:
    assert json_rule(nested(45, kind))
    assert kind == "others" or engine.guidance.json(nested(45, kind)).least > 0  # of others llguidance says that they are too many


def test_definitions_that_refer_to_one_another_for_long_do_not_take_the_process_down(engine: KVzipEngine) -> None:
    n = MOST_OF_SCHEMA // 4 - 9
    assert engine.guidance.json(chain(n)) is not None
    with pytest.raises(InputError, match="ever ends"):
        engine.guidance.json({**chain(9), "$defs": {**chain(9)["$defs"], "d9": {"$ref": "#/$defs/d0"}}, "required": ["d"]})


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _own() -> dict[str, Any]:
    value: dict[str, Any] = {"type": "non_standard"}
    value["value"] = value["text"] = value["content"] = value
    return value


WHERE: dict[str, Callable[[Any], Any]] = {
    "a block": lambda value: {"role": "user", "content": [{"type": "text", "text": value}]},
    "a result": lambda value: {"role": "tool", "content": [{"a": value, "b": 1}], "tool_call_id": "1"},
    "a raw result": lambda value: {"role": "tool", "content": value if isinstance(value, dict) else [value], "tool_call_id": "1"},
    "an image": lambda value: {"role": "tool", "content": [{"type": "image", "data": value}], "tool_call_id": "1"},
    "a said result": lambda value: {"role": "user", "content": [{"type": "tool_result", "content": value}]},
    "a thought": lambda value: {"role": "assistant", "content": [{"type": "thinking", "thinking": value}]},
    "beside it": lambda value: {"role": "assistant", "content": "", "reasoning_content": value},
    "further beside it": lambda value: {"role": "assistant", "content": "", "additional_kwargs": {"audio": value}},
}


@pytest.mark.parametrize("value", [_deep(10 * DEEPEST), _deep(100_000), _own()], ids=["deep", "very deep", "its own"])
@pytest.mark.parametrize("where", WHERE)
def test_deep_and_cyclic_parts_of_messages_are_refused(where: str, value: Any) -> None:
    with pytest.raises(InputError, match="lists and mappings"):
        as_message(WHERE[where](value))


def test_deep_and_cyclic_metadata_is_refused() -> None:
    class Page:
        page_content = "text"

        def __init__(self, metadata: Any) -> None:
            self.metadata = metadata

    for value in (_deep(100_000), _own()):
        with pytest.raises(InputError, match="metadata of document 1 has more than"):
            read_source(Page({"a": value}))


def test_calls_a_model_has_written_too_deep_stay_text_and_cyclic_ones_are_refused(engine: KVzipEngine) -> None:
    for arguments in ({"a": _deep(500)}, '{"a": ' + "[" * 500 + "]" * 500 + "}", "[" * 100_000):
        call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
        message = as_message({"role": "assistant", "content": "", "tool_calls": [call]})
        assert message is not None
        assert isinstance(message["tool_calls"][0]["arguments"], str)
        assert engine.count_tokens([USER, message, {"role": "tool", "content": "1", "tool_call_id": "1"}])
    for value in (_own(), {"a": _deep(100_000)}):
        with pytest.raises(InputError, match="lists and mappings"):
            as_message({"role": "assistant", "content": "", "tool_calls": [{"id": "1", "name": "f", "args": value}]})
        as_message({"role": "assistant", "content": "", "tool_calls": [{"args": value}]})  # no name: it is left out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("deep", [500, 100_000])
def test_calls_that_are_too_deep_are_left_out(form: str, deep: int) -> None:
    brackets = "[" * deep + "]" * deep
    made = FORMS[form]
    opened = made.begin + made.open.replace("{name}", "f").replace("{id}", "123456789")
    for body in (f'{{"a": {brackets}}}', f'{{"a": {brackets}, "name": "f", "{made.arguments}": {{}}}}'):
        _, calls = read_calls(f"{opened}{body}{made.close}{made.end}", made)
        assert all(check_nesting(call["arguments"], "a call") is None for call in calls)
        CallReader(made).push(f"{opened}{body}{made.close}{made.end}")


def test_values_in_messages_are_short() -> None:
    for value in ("a" * 10**7, [["a"] * 10**6] * 3, _deep(100_000), _own(), {n: n for n in range(10**6)}, 10**5000, [-(10**5000)]):
        assert len(brief(value)) < 500


# Python writes it into no text.
UNWRITABLE = 10**5000
TAKE: dict[str, Callable[[KVzipEngine, str], Any]] = {
    "__init__": lambda engine, option: KVzipEngine(engine.model, engine.tokenizer, **{option: UNWRITABLE}),
    "stream": lambda engine, option: next(engine.stream(engine.load(TEXT), "Why?", **{"max_new_tokens": 1, option: UNWRITABLE})),
    "load": lambda engine, option: engine.load(TEXT, **{option: UNWRITABLE}),
    "extend": lambda engine, option: engine.extend(engine.load(TEXT), "More.", **{option: UNWRITABLE}),
    "join": lambda engine, option: engine.join([engine.load(TEXT)] * 2, **{option: UNWRITABLE}),
    "get": lambda engine, option: engine.get(UNWRITABLE),  # type: ignore[arg-type]
    "forget": lambda engine, option: engine.forget(UNWRITABLE),  # type: ignore[arg-type]
    "logits": lambda engine, option: engine.logits(None, [UNWRITABLE]),
    "fold": lambda engine, option: engine.session(engine.load(TEXT)).fold(**{option: UNWRITABLE}),
}


def options_of(method: str) -> list[str]:
    kind: Any = Session if method == "fold" else KVzipEngine
    taken = [p.name for p in inspect.signature(getattr(kind, method)).parameters.values() if p.default is not p.empty]
    taken += [field.name for field in fields(GenerationParams)] if method == "stream" else []
    return taken or [""]


@pytest.mark.parametrize(("method", "option"), [(method, option) for method in TAKE for option in options_of(method)])
def test_a_number_that_no_text_can_hold_is_used_or_refused(method: str, option: str) -> None:
    with suppress(KVzipError):
        TAKE[method](tiny_engine(), option)


# -- names and tags --------------------------------------------------------------------------------------------------

LONG = "a" * 10 * LONGEST_NAME
NAMED: dict[str, Callable[[KVzipEngine], Any]] = {
    "a name": lambda engine: engine.load(TEXT, name=LONG),
    "a tag": lambda engine: engine.load(TEXT, tags=[LONG]),
    "many tags": lambda engine: engine.load(TEXT, tags=[f"{n}" for n in range(10 * MOST_TAGS)]),
    "endless tags": lambda engine: engine.load(TEXT, tags=iter(lambda: "a", "b")),  # type: ignore[arg-type]
    "extended, a name": lambda engine: engine.extend(engine.load([USER, SAID]), [USER], name=LONG),
    "extended, a tag": lambda engine: engine.extend(engine.load([USER, SAID]), [USER], tags=LONG),
    "extended, many tags": lambda engine: engine.extend(engine.load([USER, SAID]), [USER], tags=["a"] * 10 * MOST_TAGS),
    "marked": lambda engine: engine.load_marked([{"role": "user", "content": [MARKED]}], tags=[LONG]),
    "forgotten": lambda engine: engine.forget(LONG),
    "got": lambda engine: engine.get(LONG),
    "folded": lambda engine: _fold(engine, name=LONG),
    "folded, a tag": lambda engine: _fold(engine, tags=[LONG]),
}


def _fold(engine: KVzipEngine, **options: Any) -> Any:
    session = engine.session()
    for _ in range(2):
        session.ask("Who?", max_new_tokens=2)
    return session.fold(**options)


def test_all_ways_to_name_are_known() -> None:
    takes = {"name", "tag", "tags", "reference"}
    methods = {
        name
        for kind in (KVzipEngine, Session)
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if name[0] != "_" and takes & inspect.signature(method).parameters.keys()
    }
    # of these a name or tag is one that a context already has
    assert methods - {"leave_behind"} == {"load", "extend", "join", "load_marked", "forget", "aforget", "get", "fold"}


@pytest.mark.parametrize("way", NAMED)
def test_long_and_many_names_are_refused(way: str, engine: KVzipEngine) -> None:
    with pytest.raises(InputError, match=r"has 40,960 characters; give one of at most 4,096|tags: more than 256 texts") as raised:
        NAMED[way](engine)
    assert len(str(raised.value)) < 300
    assert engine.load(TEXT, name="b" * LONGEST_NAME, tags=[f"{n}" for n in range(MOST_TAGS)]).n_tokens


# -- async calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["answers", "loads"])
async def test_of_more_async_calls_than_may_wait_the_rest_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go = tiny_engine(max_running=1, max_waiting=3), threading.Event()
    places = engine.places if what == "answers" else engine.loads
    monkeypatch.setattr(places, "_limit", 1)
    name = "generate" if what == "answers" else "load"
    monkeypatch.setattr(engine, name, lambda *args, **options: go.wait(30))
    tasks = [asyncio.create_task(engine.agenerate(None, "Who?") if what == "answers" else engine.aload(TEXT)) for _ in range(40)]
    refused = tasks[4:]
    for task in refused:
        with pytest.raises(QueueFullError, match=r"1 async calls are running and 3 wait.*max_waiting"):
            await asyncio.wait_for(asyncio.shield(task), 30)
    tasks[1].cancel()  # who does not wait any more takes no place in the queue
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    late = asyncio.create_task(engine.agenerate(None, "Who?") if what == "answers" else engine.aload(TEXT))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(places.waiting) == 3
    go.set()
    assert await asyncio.gather(tasks[0], *tasks[2:4], late) == [True] * 4
    assert places.waiting == []


async def test_threads_and_event_loops_wait_in_one_count() -> None:
    engine, waiting = tiny_engine(max_running=1, max_waiting=2), list[threading.Thread]()
    stream = engine.stream(None, "Who?", max_new_tokens=1500)
    next(stream)
    for n in range(2):
        waiting.append(threading.Thread(target=engine.generate, args=(None, "Who?"), kwargs={"max_new_tokens": 1}))
        waiting[-1].start()
        while engine.stats()["waiting"] <= n:
            await asyncio.sleep(0.001)
    with pytest.raises(QueueFullError, match="1 answers are running and 2 wait"):
        await engine.agenerate(None, "Who?", max_new_tokens=1)
    with pytest.raises(QueueFullError, match="1 answers are running and 2 wait"):
        engine.generate(None, "Who?", max_new_tokens=1)
    assert engine.stats()["waiting"] == 2
    stream.close()
    await asyncio.to_thread(lambda: [thread.join(30) for thread in waiting])
    tasks = [asyncio.create_task(engine.agenerate(None, "Who?", max_new_tokens=1)) for _ in range(3)]  # who has a thread is not refused
    assert [(await task).finish_reason for task in tasks]


# -- what gathers over many calls --------------------------------------------------------------------------------------


def _tags(first: int, count: int = MOST_TAGS) -> list[str]:
    return [f"tag {n}" for n in range(first, first + count)]


@pytest.mark.parametrize("stored", [False, True])
def test_a_context_gathers_so_many_tags_and_no_more(stored: bool, tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path if stored else None)
    context = engine.load(TEXT)
    full = MOST_HOLDERS // MOST_TAGS
    for n in range(full):
        engine.load(TEXT, tags=_tags(n * MOST_TAGS))
    if stored:  # another engine knows them from the folder
        engine.registry.flush()
        engine = tiny_engine(cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"has 9,984 tags of .* no room for 256 more; it may have 10,000 .*engine.forget"):
        engine.load(TEXT, tags=_tags(MOST_HOLDERS))
    engine.load(TEXT, tags=_tags(MOST_HOLDERS, 16))
    engine.registry.join(context.key, ["a conversation's"])  # many others hold it
    [entry] = engine.registry.find(context.key)
    assert len(entry.tags) == MOST_HOLDERS
    engine.forget("tag 7")
    engine.load(TEXT, tags=["another"])


def test_a_context_gathers_so_many_names_and_no_more(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "MOST_HOLDERS", 20)
    context = engine.load(TEXT)
    for n in range(20):
        engine.load(TEXT, name=f"name {n}")
    engine.load(TEXT, name="name 7")
    with pytest.raises(InputError, match=r"has 20 names of 130 characters, .*kvzip-memory rm"):
        engine.load(TEXT, name="name 20")
    engine.load("Another text.", name="name 7")  # which is no longer the first one's
    engine.load(TEXT, name="name 20")
    assert engine.get("name 20").key == engine.get("name 0").key == context.key
    engine.registry.remove("name 0")
    engine.load(TEXT, name="name 21")


def test_marks_of_more_conversations_than_a_context_has_room_for_are_left_out(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "MOST_HOLDERS", 3)
    marked = [{"role": "user", "content": [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}]}]
    contexts = {engine.load_marked(marked, tags=[f"thread: {n}"]).key for n in range(5)}  # type: ignore[union-attr]
    [entry] = engine.registry.find(contexts.pop())
    assert (contexts, entry.tags) == (set(), ("cache_control", "thread: 0", "thread: 1"))


def test_large_names_and_metadata_of_documents_are_refused(engine: KVzipEngine, peak: Callable[[], int]) -> None:
    with pytest.raises(InputError, match=r"name of document 1, .* has 40,960 characters; give one of at most 4,096"):
        engine.load(Document(TEXT, LONG))
    large = {"a": "b" * (LARGEST_METADATA // 3)}
    first = engine.load([Document(TEXT, "a", large), Document(TEXT, "b", large)])
    with pytest.raises(InputError, match=r"of the first 3 documents .* more than 8,388,608 characters"):
        engine.extend(first, [Document(TEXT, "c", large)])
    peak()
    with pytest.raises(InputError, match="keep less in metadata"):
        engine.load(Document(TEXT, "a", {"a": ["b" * LARGEST_METADATA] * 10}))
    assert peak() < 6 * LARGEST_METADATA  # of ten times as much
    with pytest.raises(InputError, match="metadata of document 'a' has more than 100,000 lists and mappings"):
        engine.load(Document(TEXT, "a", {"a": [[]] * 10 * MOST_OF_METADATA}))


def test_many_documents_messages_and_tools_are_refused_before_work(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    context = engine.load(["A page.", "Another page."])
    monkeypatch.setattr("kvzip_memory.answering.calls_grammar", None)  # no grammar is made
    with pytest.raises(WindowError, match=r"a text of .* has .* tokens and more"):
        engine.generate(None, "Who?", tools=[tool(f"f{i}") for i in range(WINDOW // 2)])
    monkeypatch.setattr(engine._prompts._template, "layout", None)  # nothing is rendered
    for ask in (
        lambda: engine.load(["a"] * 10 * WINDOW),
        lambda: engine.extend(context, ["a"] * 10 * WINDOW),
        lambda: engine.generate(None, [USER, SAID] * 10 * WINDOW + [USER]),
    ):
        with pytest.raises(WindowError, match=r"20,48\d texts have 20,48\d tokens and more, .* the model's window is 2,048"):
            ask()
    with pytest.raises(WindowError, match=r"a text of 36,000 characters"):
        engine.load(["a" * 18] * 2000)


# -- sessions of memory blocks -----------------------------------------------------------------------------------------


def _block(engine: KVzipEngine) -> KVzipMemoryBlock:
    return KVzipMemoryBlock(llm=KVzipLLM(engine=engine), ratio=1.0)


async def _say(block: KVzipMemoryBlock, session_id: str, text: str = "My name is Ana.") -> None:
    await block.aput([ChatMessage(text)], from_short_term_memory=True, session_id=session_id)


async def test_sessions_make_way_for_others_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_SESSIONS", 4)
    engine = tiny_engine(cache_dir=tmp_path)
    block = _block(engine)
    for n in range(8):
        await _say(block, f"user {n}", f"I am number {n}.")
    for n in range(500):
        assert await block.aget([], session_id=f"nobody {n}") == []
    open_sessions = engine.shared["llama_index.memory"]
    assert len(open_sessions._kept) == len(open_sessions._used) == 4
    built = engine.stats()["built"]
    for n in range(8):
        [handle] = await block.aget([], session_id=f"user {n}")
        held = engine.get(handle.additional_kwargs["kvzip_context"])
        assert f"I am number {n}." in engine.tokenizer.decode(held.token_ids)
    assert engine.stats()["built"] == built
    await _say(block, "user 0", "And I like tea.")
    assert "number 0" in engine.tokenizer.decode(block.context("user 0").token_ids)  # type: ignore[union-attr]
    assert {s.turns for s in sessions(tmp_path) if s.name.endswith("user 0")} == {2}


async def test_a_session_that_somebody_uses_is_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_SESSIONS", 1)
    block = _block(tiny_engine(cache_dir=tmp_path))
    used = block._session("ana")
    block._session("bob")
    assert block._session("ana") is used


async def test_sessions_that_are_in_memory_alone_stay_and_more_are_refused(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_SESSIONS", 3)
    block = _block(engine)
    for n in range(3):
        await _say(block, f"user {n}")
        for other in range(10):
            assert await block.aget([], session_id=f"nobody {other}") == []
    with pytest.raises(InputError, match=r"3 sessions have [\d,]+ bytes of turns, in memory alone; at most 3 .* cache_dir, or forget some"):
        await _say(block, "user 3")
    assert all([await block.aget([], session_id=f"user {n}") for n in range(3)])
    await _say(block, "user 1")
    block.forget("user 2")
    await _say(block, "user 3")
    monkeypatch.setattr(memory, "MOST_IN_MEMORY", 100)
    with pytest.raises(InputError, match="at most 3 with 100 may"):
        await _say(block, "user 3")


@pytest.mark.parametrize("stored", [False, True])
async def test_a_session_has_so_many_bytes_of_turns(stored: bool, tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path if stored else None)
    block = _block(engine)
    await _say(block, "ana")
    with pytest.raises(InputError, match=r"'memory history: ana' has \d+ bytes of turns, and 167,\d+,\d+ more .*at most 16,777,216.*rm"):
        await _say(block, "ana", "a" * 10 * LARGEST_SESSION)
    assert len(await block.aget([], session_id="ana")) == 1
    await _say(block, "ana", "I like tea.")
    assert "tea" in engine.tokenizer.decode(block.context("ana").token_ids)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"has 40,97\d characters"):
        await _say(block, LONG)
    assert engine.stats()["turns"]["sessions"] == int(stored)


async def test_bytes_of_turns_are_counted_shown_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    block = _block(engine)
    for name in ("ana", "bob"):
        await _say(block, name)
    engine.registry.flush()
    nbytes = sum(path.stat().st_size for path in (tmp_path / "memory").iterdir())
    assert engine.stats()["turns"] == {"sessions": 2, "nbytes": nbytes}
    assert sum(session.nbytes for session in sessions(tmp_path)) == nbytes
    told = json.loads(run("stats", tmp_path, "--json"))
    assert (told["turns_sessions"], told["turns_nbytes"]) == (2, nbytes)
    assert "and 2 sessions" in run("ls", tmp_path)
    assert f"2 with {nbytes:,} bytes of turns as text" in str(json.loads(run("doctor", tmp_path, "--json")))
    monkeypatch.setattr(turns, "LARGEST_SESSION", 100)
    assert "'memory history: ana'" in str(json.loads(run("doctor", tmp_path, "--json")))
    run("rm", tmp_path, "memory history: ana")
    engine.forget("memory history: bob")
    assert engine.stats()["turns"] == {"sessions": 0, "nbytes": 0}


def run(command: str, folder: Path, *arguments: str) -> str:
    return CliRunner().invoke(app, [command, *arguments, "--cache-dir", str(folder)]).output


def test_turns_in_memory_are_added_in_linear_time() -> None:
    lines, record = Turns(), {"turns": [{"role": "user", "content": "a" * 50_000}]}
    for _ in range(300):
        lines.append(record, "ana", None)
    content = lines._content
    lines.append(record, "ana", None)
    assert lines._content is content  # not copied


def test_turns_that_are_too_many_for_the_context_are_not_all_counted(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, read = engine._prompts._encoder, list[int]()
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda text: (read.append(len(text)), encode(text))[1])
    assert engine.count_tokens([_huge()], most=100) > 100
    assert sum(read) < 10_000
    assert engine.count_tokens([USER], most=100) == engine.count_tokens([USER])


# -- an agent's documents ----------------------------------------------------------------------------------------------


def test_an_agent_keeps_so_many_documents_of_so_large_files(
    tmp_path: Path, engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch, peak: Callable[[], int]
) -> None:
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(10 * LARGEST_FILE)
    load, *_ = create_memory_tools(engine, folder=tmp_path)
    peak()
    assert "'big.txt' has more than 67,108,864 bytes, which is the limit" in load.invoke({"path": "big.txt"})
    assert peak() < 1.5 * LARGEST_FILE
    load, names, ask, forget = create_memory_tools(engine)
    assert "has 2,560 characters; give one of at most 256" in load.invoke({"name": "a" * 10 * LONGEST_DOCUMENT_NAME, "text": TEXT})
    monkeypatch.setattr(memory_tools, "MOST_DOCUMENTS", 12)
    for n in range(12):
        assert "is kept" in load.invoke({"name": f"{n}" * 100, "text": f"{TEXT} {n}"})
    assert "12 documents are kept, at most 12 may be; forget one first" in load.invoke({"name": "one more", "text": TEXT})
    assert "is kept" in load.invoke({"name": "3" * 100, "text": TEXT})
    for told in (ask.invoke({"name": "none" * 10_000, "question": "?"}), forget.invoke({"name": "none"})):
        assert "no document" in told
        assert len(told) < 500
    forget.invoke({"name": "3" * 100})
    assert "is kept" in load.invoke({"name": "one more", "text": TEXT})
    assert len(names.invoke({}).splitlines()) == 12


def test_locks_of_namespaces_go_with_their_use(engine: KVzipEngine) -> None:
    for n in range(50):
        load, *_ = create_memory_tools(engine, namespace=f"user {n}")
        load.invoke({"name": "page", "text": TEXT})
    assert len(engine.shared["langchain.memory_tools"]._of) == 0


# -- the limits themselves ---------------------------------------------------------------------------------------------

LIMIT = re.compile(r"(MOST|LONGEST|LARGEST|DEEPEST)(_[A-Z_]+)?")
#: Of their name, and of what nobody outside can fill.
OURS = {"kvzip_memory.inference.speculation.MOST", "kvzip_memory.inference.graphs.MOST_TOKENS"}


def limits_of_the_code() -> set[str]:
    """Every constant of a module that says how much may be."""
    found = set()
    for package in (kvzip_memory, langchain_kvzip, llama_index_kvzip):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.rpartition(".")[2] in ("triton", "kernels", "flash"):
                continue
            module = importlib.import_module(info.name)
            names = {target.id for node in ast.parse(inspect.getsource(module)).body for target in _targets(node)}
            found |= {f"{info.name}.{name}" for name in names if LIMIT.fullmatch(name)}
    return found - OURS


def _targets(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    flat = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [name for name in flat if isinstance(name, ast.Name)]


def test_every_limit_is_measured() -> None:
    """What it costs to be refused at ten times a limit is in docs/benchmarks.md, for every one there is."""
    measured = json.loads((ROOT / "benchmarks/results/greed.json").read_text())["table"]
    assert {name.rpartition(".")[2] for name in limits_of_the_code()} <= {row["limit"].partition(":")[0] for row in measured}
    assert all(row["told"] < 500 for row in measured)
    refused = [row for row in measured if row["error"] != "none"]
    calls = {row["limit"]: 0.002 * row["given"] for row in refused if row["of"] == "calls"}  # each is a task of its own
    slow = [row["limit"] for row in refused if row["s"] > 5 + 20 * row["reading_s"] + calls.get(row["limit"], 0)]
    large = [row["limit"] for row in refused if row["mb"] > 200 + 4 * row["reading_mb"]]
    assert (slow, large) == ([], [])
