"""Tool calls in every family's form: guided, read back piece by piece, and given to the next prompt again."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tokenizers import AddedToken

from conftest import CHATML, tiny_model, tiny_tokenizer
from guiding import babble, written
from kvzip_memory import InputError, KVzipEngine, UnfinishedError
from kvzip_memory.prompting.call_grammar import calls_grammar
from kvzip_memory.prompting.call_reader import CallDelta, CallReader, read_calls
from kvzip_memory.prompting.forms import FORMS, form_of
from schemas import random_schema
from templates import CONTROL, HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, MISTRAL_IDS

PARAMETERS = {"type": "object", "properties": {"town": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {**PARAMETERS, "required": ["town"]}}} for name in ("weather", "größe")
]
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "mistral-args": MISTRAL_ARGS, "mistral-ids": MISTRAL_IDS}


def engine_of(family: str, special: bool = True) -> KVzipEngine:
    """A tiny engine whose tokenizer has the family's tags as tokens of its own, flagged special or not."""
    tokenizer = tiny_tokenizer(TEMPLATES[family])
    tags = [*CONTROL[TEMPLATES[family]], "<|python_tag|>"]
    tokenizer.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in tags], special_tokens=special)
    return KVzipEngine(tiny_model(), tokenizer)


@pytest.fixture(scope="module", params=[*TEMPLATES, "hermes tags", "mistral-ids tags", "none"])
def engine(request: pytest.FixtureRequest) -> KVzipEngine:
    if request.param == "none":  # tags are plain text to this one
        return KVzipEngine(tiny_model(), tiny_tokenizer(CHATML))
    return engine_of(request.param.split()[0], special=" " not in request.param)


def answers(engine: KVzipEngine, choice: Any, schema: Any = None, parallel: bool | None = None) -> list[tuple[str, list[dict[str, Any]]]]:
    """Texts and calls of what twenty random models answer, if it is short."""
    grammar = calls_grammar(engine.guidance, engine.tool_form, TOOLS, choice, schema, parallel)
    found = []
    for seed in range(20):
        try:
            found.append(engine.read_calls(babble(engine, grammar, seed, limit=90).text))
        except UnfinishedError:
            continue
    assert found
    return found


def valid(call: dict[str, Any]) -> bool:
    return call["name"] in ("weather", "größe") and Draft202012Validator(TOOLS[0]["function"]["parameters"]).is_valid(call["arguments"])


@pytest.mark.parametrize("choice", ["any", "required", True])
def test_a_model_that_must_call_calls_one_tool(engine: KVzipEngine, choice: Any) -> None:
    for text, calls in answers(engine, choice):
        assert text.strip() == ""
        assert len(calls) == 1
        assert valid(calls[0])


@pytest.mark.parametrize("choice", ["größe", {"type": "function", "function": {"name": "größe"}}, {"type": "tool", "name": "größe"}])
def test_a_model_that_must_call_a_tool_calls_that_one(engine: KVzipEngine, choice: Any) -> None:
    assert {call["name"] for _, calls in answers(engine, choice) for call in calls} == {"größe"}


def test_a_model_that_must_not_call_does_not(engine: KVzipEngine) -> None:
    assert not any(calls for _, calls in answers(engine, "none"))


def test_a_model_that_may_call_says_something_or_calls_validly(engine: KVzipEngine) -> None:
    for _, calls in answers(engine, "auto"):
        assert all(map(valid, calls))
    grammar = calls_grammar(engine.guidance, engine.tool_form, TOOLS, "auto")
    for text in (
        "Hello {world} <b>.",
        "",
        written(engine.tool_form, [("weather", {"town": "Oslo"})]),
        written(engine.tool_form, [("größe", {"town": "Rome"})] * 2),
    ):
        assert allows(engine, grammar, text), text
    if engine.tool_form.name != "llama3":
        assert allows(engine, grammar, "Well: " + written(engine.tool_form, [("weather", {"town": "Oslo", "days": 3})]))
    assert not allows(engine, grammar, written(engine.tool_form, [("weather", {"town": "Paris"})]))


def test_calls_or_an_answer_by_a_schema(engine: KVzipEngine) -> None:
    schema = {"type": "object", "properties": {"temperature": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["temperature"]}
    for text, calls in answers(engine, "auto", schema):
        assert all(map(valid, calls)) if calls else json.loads(text)["temperature"] in range(10)
    assert all(calls and not text.strip() for text, calls in answers(engine, "any", schema))


def test_where_calls_and_answers_are_both_bare_json_either_may_come(engine: KVzipEngine) -> None:
    form, answer = FORMS["llama3"], {"first": "Ana", "age": 3}
    schema = {"type": "object", "properties": {"first": {"type": "string"}, "age": {"$ref": "#/$defs/age"}}, "required": ["first", "age"]}
    grammar = calls_grammar(engine.guidance, form, TOOLS, "auto", {**schema, "$defs": {"age": {"type": "integer"}}})
    assert allows(engine, grammar, json.dumps(answer))
    grammar = calls_grammar(engine.guidance, form, TOOLS, "auto", {**schema, "$defs": {"age": {"type": "integer"}}})
    assert allows(engine, grammar, '{"name": "weather", "parameters": {"town": "Oslo", "days": 3}}')
    grammar = calls_grammar(engine.guidance, form, TOOLS, "auto", {**schema, "$defs": {"age": {"type": "integer"}}})
    assert not allows(engine, grammar, '{"name": "weather", "parameters": {"town": "Paris"}}')
    assert read_calls('{"name": "Ana", "age": 3}', form) == ('{"name": "Ana", "age": 3}', [])


def test_several_forced_calls_only_where_they_are_asked_for(engine: KVzipEngine) -> None:
    two = written(engine.tool_form, [("weather", {"town": "Oslo"}), ("weather", {"town": "Rome"})])
    for parallel in (None, False, True):
        grammar = calls_grammar(engine.guidance, engine.tool_form, TOOLS, "any", None, parallel)
        assert allows(engine, grammar, two) == bool(parallel)


def allows(engine: KVzipEngine, grammar: Any, text: str) -> bool:
    """Whether a model may answer so, in its own tokens."""
    import torch

    guide = grammar.start()
    for token in engine.tokenizer(text, add_special_tokens=False).input_ids:
        if guide.mask(torch.zeros(engine.model.config.vocab_size))[token] < 0:
            return False
        guide.take(token)
    return guide.complete


def test_calls_of_random_schemas_are_read_back(smollm2: KVzipEngine) -> None:
    rng, calls = random.Random(3), 0
    for seed in range(30):
        parameters = random_schema(rng, depth=2)
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        grammar = calls_grammar(smollm2.guidance, smollm2.tool_form, tools, "f")
        try:
            answer = babble(smollm2, grammar, seed, limit=90)
        except UnfinishedError:
            continue
        (call,) = smollm2.read_calls(answer.text)[1]
        Draft202012Validator(parameters).validate(call["arguments"])
        calls += 1
    assert calls > 15


FIRST = '"name": "f", "arguments": {"a": "}<b>\\"{", "b": [1, {}]}'
ANSWERS = {
    "hermes": f'I look. <tool_call>\n{{{FIRST}}}\n</tool_call>\n<tool_call>{{"arguments": {{}}, "name": "g"}}</tool_call>',
    "llama3": f'<|python_tag|>{{{FIRST.replace("arguments", "parameters")}}}; {{"parameters": {{}}, "name": "g"}}',
    "mistral": f'I look. [TOOL_CALLS] [{{{FIRST}, "id": "123456789"}}, {{"arguments": {{}}, "name": "g"}}]',
    "mistral-args": f"I look. [TOOL_CALLS]f[ARGS]{{{FIRST.partition(': {')[2]}[TOOL_CALLS]g[ARGS]{{}}",
    "mistral-ids": f"I look. [TOOL_CALLS]f[CALL_ID]123456789[ARGS]{{{FIRST.partition(': {')[2]}[TOOL_CALLS]g[CALL_ID]a23456789[ARGS] {{}}",
}


@pytest.mark.parametrize("form", sorted(ANSWERS))
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_however_an_answer_is_cut_into_pieces(form: str, size: int) -> None:
    reader, answer = CallReader(FORMS[form]), ANSWERS[form]
    text, deltas = "", list[CallDelta]()
    for start in range(0, len(answer), size):
        more, calls = reader.push(answer[start : start + size])
        text, deltas = text + more, deltas + calls
    assert text + reader.flush() == ("" if form == "llama3" else "I look. ")
    assert {d.index: d.name for d in deltas if d.name} == {0: "f", 1: "g"}
    assert all((d.id is None) == (d.name is None) for d in deltas)
    arguments = ["".join(d.arguments for d in deltas if d.index == i) for i in (0, 1)]
    assert [json.loads(a) for a in arguments] == [{"a": '}<b>"{', "b": [1, {}]}, {}]
    if size == 1:
        assert len(deltas) > 20  # arguments come as they are said


@pytest.mark.parametrize("family", ["mistral", "mistral-args", "mistral-ids"])
@pytest.mark.parametrize("name", ['a "b" {c}', "größe/[x] ", "[CALL", "東<s>"])
def test_names_of_any_characters_are_guided_and_read(family: str, name: str) -> None:
    engine = engine_of(family)
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}}]
    spelled = json.dumps(name, ensure_ascii=False)[1:-1] if family == "mistral" else name
    assert allows(engine, calls_grammar(engine.guidance, engine.tool_form, tools, "any"), written(engine.tool_form, [(spelled, {})]))
    text = written(engine.tool_form, [(spelled, {"a": "[ARGS]{"})])
    reader = CallReader(engine.tool_form)
    deltas = [delta for char in text for delta in reader.push(char)[1]]
    assert [delta.name for delta in deltas if delta.name] == [name]
    assert json.loads("".join(delta.arguments for delta in deltas)) == {"a": "[ARGS]{"}


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("text", ["", "Hello", " a < b ", "{", '{"x": 1}', "<tool_cal", "[TOOL", "<tool_call> not a call", "a { b } c"])
def test_what_is_no_call_stays_text(form: str, text: str) -> None:
    for size in (1, 100):
        reader = CallReader(FORMS[form])
        shown = "".join(reader.push(text[i : i + size])[0] for i in range(0, len(text), size)) + reader.flush()
        assert shown == text


def test_a_call_that_is_broken_is_not_a_call() -> None:
    assert read_calls('<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>', FORMS["hermes"])[1] == []
    assert read_calls('<tool_call>{"nom": "f"}</tool_call>', FORMS["hermes"])[1] == []


def test_forms_are_known_by_the_template() -> None:
    assert [form and form.name for form in map(form_of, (*TEMPLATES.values(), CHATML))] == [*TEMPLATES, None]
    assert form_of("{{ tools }}<tool_call>\n<function=") is None  # a form of Qwen3-Coder that is not JSON


@pytest.mark.parametrize("choice", ["nothing", {"type": "function", "function": {"name": "f"}}, 3])
def test_a_choice_that_is_none_says_what_there_is(engine: KVzipEngine, choice: Any) -> None:
    with pytest.raises(InputError, match="weather"):
        engine.generate(None, "x", tools=TOOLS, tool_choice=choice)
