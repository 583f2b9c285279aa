"""What is too long, too many or too deep is refused before it is worked on."""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from conftest import TEXT, tiny_engine
from kvzip_memory import InputError, KVzipEngine, QueueFullError, WindowError
from kvzip_memory.generation import LONGEST_STOP, MOST_STOPS, GenerationParams, StopMatcher
from kvzip_memory.guidance import MOST_OF_GRAMMAR
from kvzip_memory.registry.registry import LONGEST_NAME, MOST_TAGS
from kvzip_memory.schemas import json_rule
from kvzip_memory.session import Session
from kvzip_memory.sources import DEEPEST, MOST_KEPT, MOST_OF_SCHEMA, as_message, brief, check_nesting, read_source
from kvzip_memory.tools import FORMS, CallReader, read_calls
from test_template_equality import PAIRS

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
    encoded = encoder._encoded
    monkeypatch.setattr(encoder, "_encoded", lambda text: (read.append(len(text)), encoded(text))[1])
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
    with pytest.raises(InputError, match=r"lists and mappings|characters; at most 1,000,000") as raised:
        ask[where](GREEDY[greedy])
    assert not isinstance(raised.value, WindowError)
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
    for value in ("a" * 10**7, [["a"] * 10**6] * 3, _deep(100_000), _own(), {n: n for n in range(10**6)}):
        assert len(brief(value)) < 500


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
    assert methods - {"leave_behind"} == {"load", "extend", "load_marked", "forget", "aforget", "get", "fold"}


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
