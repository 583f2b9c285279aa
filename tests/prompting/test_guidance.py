"""Guided decoding: whatever a model would rather say, its answer validates and ends in time, or is refused before it begins."""

from __future__ import annotations

import itertools
import json
import random
import re
import warnings
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from jsonschema import Draft202012Validator

from conftest import STRESS, tiny_engine
from guiding import babble, written
from kvzip_memory import InputError, KVzipEngine, UnfinishedError, WindowError
from kvzip_memory.inference.generation import Answer, GenerationParams, Sampler, decode
from kvzip_memory.prompting import endings
from kvzip_memory.prompting.call_grammar import calls_grammar
from kvzip_memory.prompting.forms import FORMS
from kvzip_memory.prompting.guidance import Grammar
from kvzip_memory.prompting.reach import goes_round
from kvzip_memory.prompting.schemas import NARROWING, closed
from schemas import random_schema

SCHEMAS = 200


def test_answers_validate_against_200_random_schemas_whose_shortest_answer_fits(smollm2: KVzipEngine) -> None:
    rng, refused = random.Random(7), 0
    for number in range(SCHEMAS):
        schema = random_schema(rng)
        grammar = smollm2.guidance.json(schema)
        if grammar.least > 30:
            refused += 1
            continue
        answer = babble(smollm2, grammar, number, limit=30)
        assert answer.finish_reason == "stop"
        Draft202012Validator(closed(schema)).validate(json.loads(answer.text))
    assert 0 < refused < SCHEMAS // 10


def ask_all(engine: KVzipEngine, schemas: int, limit: int) -> Counter[str]:
    """Greedy answers to random schemas with texts: how they ended. All of them validate, or are refused."""
    rng, ends, tokens = random.Random(limit), Counter[str](), 0
    for _ in range(schemas):
        schema = random_schema(rng)
        schema["properties"] |= {"text": {"type": "string"}}
        schema["required"] = [*schema["required"], "text"]
        least = engine.guidance.json(schema).least
        if least > limit:
            with pytest.raises(InputError, match=f"takes {least} tokens and max_new_tokens is {limit}"):
                engine.generate(None, "Describe a dog.", schema=schema, max_new_tokens=limit)
            ends["refused"] += 1
            continue
        reply = engine.generate(None, "Describe a dog.", schema=schema, max_new_tokens=limit)
        Draft202012Validator(closed(schema)).validate(json.loads(reply.text))
        assert reply.usage.output_tokens <= limit
        ends[reply.finish_reason] += 1
        tokens += reply.usage.output_tokens
    if STRESS:
        print(f"\n{schemas} schemas, at most {limit} tokens: {dict(ends)}, {tokens} tokens")  # noqa: T201
    return ends


@pytest.mark.parametrize("limit", [64, 256])
def test_greedy_answers_end_in_time(smollm2: KVzipEngine, limit: int) -> None:
    ends = ask_all(smollm2, SCHEMAS if STRESS else 2, limit)
    assert set(ends) <= {"stop", "forced", "refused"}


@pytest.mark.parametrize("limit", [64, 256])
def test_a_model_without_any_sense_ends_in_time(limit: int) -> None:
    ends = ask_all(tiny_engine(), SCHEMAS if STRESS else 8, limit)
    assert ends["forced"] > 0 or limit > 64


LONG: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a", "b"]}
NODE: dict[str, Any] = {
    "$defs": {"n": {"properties": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["n"], "type": "object"}},
    "$ref": "#/$defs/n",
}
CLOSE: list[tuple[Any, int]] = [  # schemas, and the tokens of the shortest answer where each byte is one
    ({"type": "string"}, len('""')),
    ({"type": "string", "minLength": 10}, len('"0123456789"')),
    ({"type": "string", "maxLength": 3}, len('""')),
    ({"type": "string", "pattern": "^([a-z]{20}|x1)$"}, len('"x1"')),
    ({"type": "string", "format": "date"}, len('"2026-11-28"')),
    ({"type": "integer", "minimum": 100}, len("100")),
    ({"type": "integer", "exclusiveMaximum": -9}, len("-10")),
    ({"type": "number"}, len("0")),
    ({"enum": ["alphabet", "aloha", "be"]}, len('"be"')),
    ({"enum": [True, "日本", None]}, len("true")),
    ({"const": 'a "quoted" 🙂'}, len(json.dumps('a "quoted" 🙂', ensure_ascii=False).encode())),
    ({"anyOf": [{"type": "string", "minLength": 9}, {"type": "array", "items": {"type": "integer"}, "minItems": 2}]}, len("[0, 0]")),
    ({"type": "array", "items": LONG}, len("[]")),
    ({"type": "array", "items": {"enum": ["x", "yy"]}, "minItems": 3}, len('["x", "x", "x"]')),
    ({"type": "object"}, len("{}")),
    (LONG, len('{"a": "", "b": ""}')),
    ({**LONG, "required": ["b"]}, len('{"b": ""}')),
    ({"type": "object", "properties": {"x": LONG, "y": {"type": ["integer", "null"]}}, "required": ["y"]}, len('{"y": 0}')),
    ({"allOf": [LONG, {"properties": {"c": {"type": "boolean"}}, "required": ["c"]}]}, len('{"a": "", "b": "", "c": true}')),
    (NODE, len('{"n": null}')),
    ({"type": "string", "pattern": "^([a-z]+[0-9]{3,}){3,8}$"}, len('"a000a000a000"')),
    ({"type": "array", "minItems": 2}, len("[0, 0]")),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "least"), CLOSE)
def test_the_shortest_answer_is_known_and_given_where_no_other_fits(schema: dict[str, Any], least: int) -> None:
    engine = tiny_engine()
    assert engine.guidance.json(schema).least == least
    for limit in (least, least + 1, least + 2, least + 7):
        reply = engine.generate(None, "Say something.", schema=schema, max_new_tokens=limit)
        Draft202012Validator(closed(schema)).validate(json.loads(reply.text))
    if least > 1:
        with pytest.raises(InputError, match=f"takes {least} tokens and max_new_tokens is {least - 1}"):
            engine.session().stream("x", grammar=engine.guidance.json(schema), max_new_tokens=least - 1)


def test_an_object_of_many_properties_has_a_shortest_answer() -> None:
    assert tiny_engine().guidance.json({"type": "object", "minProperties": 4}).least == len('{"": 0, "": 0, "": 0, "": 0}')


def test_what_the_window_leaves_is_a_limit_too() -> None:
    engine = tiny_engine()
    question = "x" * (engine.window - 60)
    with pytest.raises(WindowError, match="takes 59 tokens"):
        engine.generate(
            None, question, schema={"type": "object", "properties": {"a": {"type": "string", "minLength": 50}}, "required": ["a"]}
        )
    assert json.loads(engine.generate(None, question, schema=LONG).text)


def test_an_answer_that_had_to_end_says_so() -> None:
    engine = tiny_engine()
    session = engine.session()
    grammar = engine.guidance.json(LONG)
    assert session.ask("x", grammar=grammar, max_new_tokens=20).finish_reason == "forced"
    assert session.ask("x", max_new_tokens=3).finish_reason == "length"
    assert engine.generate(None, "x", schema={"const": "a"}).finish_reason == "stop"
    with engine.stream(None, "x", schema=LONG, max_new_tokens=20) as stream:
        text = "".join(stream)
    assert (stream.reply.text, stream.reply.finish_reason) == (text, "forced")
    assert set(json.loads(text)) == {"a", "b"}


@pytest.mark.parametrize("closable", [True, False])
def test_a_text_that_goes_round_in_circles_is_closed_where_it_may_be(engine: KVzipEngine, closable: bool) -> None:
    text = {"type": "string"} if closable else {"type": "string", "minLength": 40}
    grammar = engine.guidance.json({"type": "object", "properties": {"a": text, "n": {"type": "number"}}, "required": ["a", "n"]})
    logits = torch.zeros(engine.model.config.vocab_size)
    logits[engine.tokenizer.convert_tokens_to_ids(["x", "3", "."])] = torch.tensor([9.0, 8.0, 7.0])
    sampler, answer = Sampler(GenerationParams(grammar=grammar), engine.model.device, 500), Answer()
    tokens = (sampler(logits) for _ in itertools.count())
    for _ in decode(tokens, answer, (), 500, engine._model.eos_ids, engine.tokenizer, grammar=grammar):
        pass
    assert sampler.hurried
    value = json.loads(answer.text)
    assert value["a"] == "x" * (24 if closable else 48)
    assert str(value["n"]).startswith("3333333333333333333333")


@pytest.mark.parametrize(
    ("tokens", "round"),
    [
        ([7] * 23, False),
        ([7] * 24, True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9] * 3, True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, False),
        ([*range(100), *[1, 2] * 12], True),
        ([*[1, 2] * 12, 3], False),
        ([*range(60)] * 3, True),
        ([], False),
    ],
)
def test_circles_are_the_same_three_times_and_long(tokens: list[int], round: bool) -> None:
    assert goes_round(tokens) == round


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_guesses_change_nothing_about_how_an_answer_ends(params: dict[str, Any]) -> None:
    engine = tiny_engine()
    for limit in (*range(18, 30), 120):
        one, other = (
            engine.generate(None, "x", schema=LONG, max_new_tokens=limit, speculate=speculate, **params) for speculate in (True, False)
        )
        assert (one.text, one.usage, one.finish_reason) == (other.text, other.usage, other.finish_reason)
        assert set(json.loads(one.text)) == {"a", "b"}


def test_numbers_are_finite() -> None:
    engine = tiny_engine()
    grammar = engine.guidance.json({"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]})
    guide = grammar.start(limit=100)
    for token in engine.tokenizer('{"n": 1e30').input_ids:
        assert guide.take(token)
    for digit in engine.tokenizer("9").input_ids:  # 1e309
        assert not guide.take(digit)
    logits = torch.zeros(engine.model.config.vocab_size)
    logits[engine.tokenizer("1e98765432").input_ids] = torch.arange(10.0, 0, -1)
    for seed in range(20):
        sampler = Sampler(GenerationParams(grammar=grammar, temperature=1.0, seed=seed), engine.model.device, 400)
        said: list[int] = []
        while not sampler.guide.ended:  # type: ignore[union-attr]
            said.append(sampler(logits))
        assert abs(json.loads(engine.tokenizer.decode(said))["n"]) < float("inf")


@pytest.mark.parametrize("schema", [{"type": "number"}, {}, {"type": "integer"}, {"anyOf": [{"type": "number"}, {"type": "null"}]}])
def test_a_number_that_is_all_of_the_answer_ends_and_is_finite(schema: dict[str, Any]) -> None:
    engine = tiny_engine()
    for params in ({}, {"temperature": 1.0, "seed": 3}):
        reply = engine.generate(None, "hi", schema=schema, max_new_tokens=64, **params)
        assert abs(json.loads(reply.text)) < float("inf")
        assert reply.finish_reason in ("stop", "forced")
    logits = torch.zeros(engine.model.config.vocab_size)
    logits[engine.tokenizer("7").input_ids] = 9.0
    sampler, said = Sampler(GenerationParams(grammar=engine.guidance.json(schema)), engine.model.device, 500), list[int]()
    while not sampler.guide.ended:  # type: ignore[union-attr]
        said.append(sampler(logits))
    assert said == [*engine.tokenizer("7").input_ids * 25, min(engine._model.eos_ids)]  # goes round in circles at 24
    assert sampler.hurried


ANY_LIST: dict[str, Any] = {"type": "array"}
UNTYPED: list[tuple[dict[str, Any], str]] = [
    (ANY_LIST, "[]"),
    ({}, "0"),
    ({"anyOf": [ANY_LIST, {"type": "null"}]}, "[]"),
    ({"type": "object"}, "{}"),
    ({"type": "array", "items": {"type": "object"}}, "[]"),
    ({"type": "array", "minItems": 2}, "[0, 0]"),
    ({"type": "array", "items": ANY_LIST, "minItems": 1}, "[[]]"),
    ({"type": "object", "additionalProperties": {}, "minProperties": 1}, '{"": 0}'),
]


@pytest.mark.parametrize(("argument", "value"), UNTYPED)
def test_a_call_with_an_argument_that_may_be_anything_ends_in_time(argument: dict[str, Any], value: str) -> None:
    engine = tiny_engine()
    parameters = {"type": "object", "properties": {"a": argument}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    form = FORMS["hermes"]
    shortest = f'<tool_call>\n{{"name": "f", "arguments": {{"a": {value}}}}}\n</tool_call>'
    forced = calls_grammar(engine.guidance, form, tools, "any")
    assert forced.least == len(shortest)
    for seed in range(4):
        answer = babble(engine, forced, seed, limit=len(shortest) + 9 * seed)
        assert Draft202012Validator(argument).is_valid(json.loads(answer.text[12:-13])["arguments"]["a"])
    guide = calls_grammar(engine.guidance, form, tools, "auto").start(1024)
    assert all(map(guide.take, engine.tokenizer(shortest).input_ids))
    assert not guide.hurried


def test_an_ending_that_is_too_much_to_look_for_refuses_nothing_but_infinite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    parameters = {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    monkeypatch.setattr(endings, "_MOST_STATES", 1)
    for choice in ("auto", "any"):
        guide = calls_grammar(engine.guidance, FORMS["hermes"], tools, choice).start(1024)
        call = '<tool_call>\n{"name": "f", "arguments": {"a": [[1e30'
        assert all(map(guide.take, engine.tokenizer(call).input_ids))
        assert not guide.take(engine.tokenizer("9").input_ids[0])
        guide.give_up()
        allowed = guide.mask(torch.zeros(engine.model.config.vocab_size)).isfinite().nonzero().flatten().tolist()
        assert allowed == engine.tokenizer("]").input_ids
        assert all(map(guide.take, engine.tokenizer("]]}}\n</tool_call>").input_ids))
        assert guide.complete


def node(child: dict[str, Any]) -> dict[str, Any]:
    return {"$defs": {"n": {"type": "object", "properties": {"n": child}, "required": ["n"]}}, "$ref": "#/$defs/n"}


LOOP: dict[str, Any] = {"$ref": "#/$defs/n"}
ENDLESS: list[dict[str, Any]] = [
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    node(LOOP),
    node({"type": "array", "items": LOOP, "minItems": 1}),
    {"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1},
    node({"anyOf": [LOOP, {"allOf": [{"type": "object"}, LOOP]}]}),
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_a_schema_of_which_no_answer_ends_is_refused_before_the_answer(schema: dict[str, Any]) -> None:
    engine = tiny_engine()
    engine._model.forward = engine._model.feed = None  # type: ignore
    with pytest.raises(InputError, match=r"no answer that keeps to this schema ever ends: '#.*' requires itself"):
        engine.generate(None, "x", schema=schema)
    with pytest.raises(InputError, match=r"tool 'odd': no answer .* ever ends"):
        engine.generate(None, "x", tools=[{"type": "function", "function": {"name": "odd", "parameters": schema}}])


@pytest.mark.parametrize(
    "child",
    [{"type": "array", "items": LOOP}, {"anyOf": [LOOP, {"type": "null"}]}, {"type": ["object", "null"], "properties": {"n": LOOP}}],
)
def test_a_schema_that_refers_to_itself_where_it_need_not_go_on_guides(child: dict[str, Any]) -> None:
    assert json.loads(tiny_engine().generate(None, "x", schema=node(child), max_new_tokens=40).text)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (
            {"type": "integer", "minimum": 3, "maximum": 1},
            r"minimum \(3\) is greater than maximum \(1\) in #/properties/u/items/properties/v",
        ),
        ({"type": "string", "const": 1}, r'incompatible types in #/properties/u/items/properties/v, {"type": "string", "const": 1}'),
        (False, "#/properties/u/items/properties/v is false"),
        ({"$ref": "#/$defs/w"}, "greater than maxLength .* in #/\\$defs/w"),
    ],
)
def test_a_schema_that_nothing_keeps_to_says_where_and_why(engine: KVzipEngine, part: Any, why: str) -> None:
    inner = {"type": "object", "properties": {"v": part}, "required": ["v"]}
    outer = {"type": "object", "properties": {"u": {"type": "array", "items": inner, "minItems": 1}}, "required": ["u"]}
    with pytest.raises(InputError, match=why):
        engine.generate(None, "x", schema={**outer, "$defs": {"w": {"type": "string", "minLength": 3, "maxLength": 1}}})
    with pytest.raises(InputError, match="a schema is False; it must be a mapping"):
        engine.generate(None, "x", schema=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["array", "string", ["array", "null"], 5])
def test_arguments_that_are_no_object_name_the_tool(engine: KVzipEngine, kind: Any) -> None:
    tools = [{"type": "function", "function": {"name": "odd", "parameters": {"type": kind}}}]
    with pytest.raises(InputError, match=f"tool 'odd' are of the type {re.escape(repr(kind))}; they must be an 'object'"):
        engine.generate(None, "x", tools=tools)


def test_arguments_are_never_null(engine: KVzipEngine) -> None:
    tools = [{"type": "function", "function": {"name": "odd", "parameters": {"type": ["object", "null"]}}}]
    grammar = calls_grammar(engine.guidance, FORMS["mistral"], tools, "any")
    assert says(engine, grammar, '[TOOL_CALLS] [{"name": "odd", "arguments": {}}]')
    assert not says(engine, grammar, '[TOOL_CALLS] [{"name": "odd", "arguments": null}]')


def test_answers_of_a_real_model_validate(smollm2: KVzipEngine) -> None:
    schema = {
        "type": "object",
        "properties": {
            "größe": {"enum": ["klein", "groß"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 1, "maxItems": 2},
            "count": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["größe", "tags", "count"],
    }
    reply = smollm2.generate(None, "Describe a dog.", schema=schema, max_new_tokens=60)
    value = json.loads(reply.text)
    Draft202012Validator(schema).validate(value)
    assert list(value) == ["größe", "tags", "count"]
    assert reply.finish_reason == "stop"  # without waiting for an end of turn: nothing else could follow


def test_a_cut_answer_is_an_error_and_leaves_the_session_as_it_was() -> None:
    engine = tiny_engine()
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 50}}, "required": ["a"]}
    session = engine.session()
    grammar = engine.guidance.json(schema)
    with pytest.raises(InputError, match="takes 59 tokens and max_new_tokens is 20"):
        session.ask("x", max_new_tokens=20, grammar=grammar)
    with pytest.raises(UnfinishedError, match="a stop string"):
        session.ask("x", max_new_tokens=60, grammar=grammar, stop='"a"')
    assert session.n_tokens == 0
    assert session.ask("x", max_new_tokens=3).usage.output_tokens <= 3


def test_guidance_leaves_what_the_model_would_say_anyway(smollm2: KVzipEngine) -> None:
    free = smollm2.generate(None, "Count to five.", max_new_tokens=8).text
    grammar = smollm2.guidance.lark("start: /(?s:.*)/")
    assert smollm2.generate(None, "Count to five.", max_new_tokens=8, grammar=grammar).text == free


def test_properties_that_a_schema_does_not_name_are_not_made_up() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"properties": {"enum": [{"properties": {}}]}, "b": {"properties": {}}}}
    assert closed(schema) == {
        **schema,
        "properties": {"properties": {"enum": [{"properties": {}}]}, "b": {"properties": {}, "additionalProperties": False}},
        "additionalProperties": False,
    }
    joined: dict[str, Any] = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert closed(joined) == joined


ARRAY: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
TEXT_: dict[str, Any] = {"type": "string"}
OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": TEXT_}}
#: By keyword of drafts 7, 2019-09 and 2020-12: schemas that cannot guide.
UNGUIDED: dict[str, dict[str, Any]] = {
    "uniqueItems": {**ARRAY, "uniqueItems": True},
    "contains": {**ARRAY, "contains": {"const": 1}},
    "minContains": {**ARRAY, "contains": {}, "minContains": 1},
    "maxContains": {**ARRAY, "maxContains": 1},
    "unevaluatedItems": {**ARRAY, "unevaluatedItems": False},
    "unevaluatedProperties": {"allOf": [OBJECT], "unevaluatedProperties": False},
    "propertyNames": {**OBJECT, "propertyNames": {"pattern": "^a"}},
    "dependencies": {**OBJECT, "dependencies": {"a": ["b"]}},
    "dependentRequired": {**OBJECT, "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {**OBJECT, "dependentSchemas": {"a": {"required": ["b"]}}},
    "not": {**TEXT_, "not": {"const": "x"}},
    "if": {**OBJECT, "if": {"required": ["a"]}},
    "then": {**OBJECT, "if": {}, "then": {"required": ["a"]}},
    "else": {**OBJECT, "if": {}, "else": {"required": ["a"]}},
    "$dynamicRef": {"$dynamicRef": "#node"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "pattern": {**TEXT_, "pattern": "^(?=.*[A-Z]).+$"},
    "patternProperties": {"type": "object", "patternProperties": {"^(?!x)": TEXT_}, "additionalProperties": False},
    "$ref": {"$ref": "https://example.org/other.json"},
    "oneOf": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "type": {"type": "elephant"},
    "required": {**OBJECT, "required": True},
    "minLength": {**TEXT_, "minLength": -1},
    "minimum": {"type": "integer", "minimum": "3"},
    "enum": {"enum": []},
}
#: Schemas as they come, and an answer that each of them allows.
ODD: list[tuple[dict[str, Any], Any]] = [
    ({}, {}),
    ({"type": "any"}, "x"),
    ({"type": None}, "x"),
    ({"type": "str"}, "x"),
    ({"type": "INTEGER"}, 3),
    ({"type": ["string", "null"]}, None),
    ({**TEXT_, "nullable": True}, None),
    ({**TEXT_, "enum": ["x"], "nullable": True}, None),
    ({**OBJECT, "required": None}, {"a": "x"}),
    ({**OBJECT, "required": ["zzz"]}, {"a": "x", "zzz": 1}),
    ({"type": "object", "properties": None}, {"x": 1}),
    ({**OBJECT, "additionalProperties": None}, {"a": "x"}),
    ({**TEXT_, "description": None, "default": None, "format": None, "pattern": None, "enum": None, "anyOf": None}, "x"),
    (
        {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "http://example.org/x", "$comment": "x", "title": "x", **OBJECT},
        {"a": "x"},
    ),
    ({**TEXT_, "format": "color", "examples": ["x"], "example": "x", "default": "x", "deprecated": True, "x-order": 1}, "x"),
    ({"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}, -5),
    ({"type": "number", "minimum": -1e308, "maximum": 1e308}, 0.5),
    ({"enum": [f"value {i}" for i in range(3000)]}, "value 2999"),
    ({"const": {"a": 1}}, {"a": 1}),
    ({"type": "object", "patternProperties": {"^x": TEXT_}}, {"x1": "a"}),
    ({"definitions": {"x": TEXT_}, "$ref": "#/definitions/x"}, "x"),
    ({"$defs": {"x": TEXT_}, "$ref": "#/$defs/x", "$dynamicAnchor": "node"}, "x"),
    ({"components": {"schemas": {"x": TEXT_}}, "$ref": "#/components/schemas/x"}, "x"),
    ({"type": "object", "properties": {"child": {"$ref": "#"}}}, {"child": {"child": {}}}),
    ({**ARRAY, "uniqueItems": False}, [1, 1]),
    ({**OBJECT, "unevaluatedProperties": False, "propertyNames": True, "dependentRequired": {}}, {"a": "x"}),
    ({**TEXT_, "minLength": 2.0}, "xy"),
    ({"anyOf": [{"type": "number"}, {**TEXT_, "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]}, 1.5),
    ({**TEXT_, "format": "uri", "minLength": 1, "maxLength": 2083}, "https://example.org/a?b=c"),
]


@pytest.mark.parametrize(("keyword", "schema"), UNGUIDED.items())
def test_a_schema_that_cannot_be_kept_to_says_why(engine: KVzipEngine, keyword: str, schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=re.escape(keyword)):
        engine.generate(None, "x", schema={"type": "object", "properties": {"v": schema}, "required": ["v"]})


def test_all_keywords_that_only_narrow_are_among_them() -> None:
    assert set(UNGUIDED) > NARROWING


def says(engine: KVzipEngine, grammar: Grammar, text: str) -> bool:
    """Whether a grammar allows a text, and lets it end there."""
    guide = grammar.start()
    return all(guide._matcher.try_consume_tokens([i]) for i in engine.tokenizer(text).input_ids) and guide._matcher.is_accepting()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("keyword", "schema"), [item for item in UNGUIDED.items() if item[0] != "enum"]
)  # what may be left out can be none
def test_one_tool_with_a_keyword_that_cannot_guide_leaves_the_rest_of_its_calls_guided(
    engine: KVzipEngine, form: str, keyword: str, schema: dict[str, Any]
) -> None:
    parameters = {"type": "object", "properties": {"v": schema, "n": {"enum": [1, 2]}}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("fine", "other")]
    tools.append({"type": "function", "function": {"name": "odd", "parameters": parameters}})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grammar = calls_grammar(engine.guidance, FORMS[form], tools, "odd")
    assert [str(warning.message) for warning in caught if "'odd'" in str(warning.message) and repr(keyword) in str(warning.message)]
    assert len(caught) == 1
    assert says(engine, grammar, written(FORMS[form], [("odd", {"n": 2})]))
    assert not says(engine, grammar, written(FORMS[form], [("odd", {"n": 3})]))


def test_a_tool_that_cannot_be_guided_at_all_is_named(engine: KVzipEngine) -> None:
    parameters = {"type": "object", "properties": {"v": {"type": "integer", "minimum": 3, "maximum": 1}}, "required": ["v"]}
    tools = [{"type": "function", "function": {"name": "odd", "parameters": parameters}}]
    with pytest.raises(InputError, match=r"tool 'odd': .*'v'"):
        engine.generate(None, "x", tools=tools)
    tools[0]["function"]["parameters"] = "nothing"  # type: ignore[index]
    with pytest.raises(InputError, match="tool 'odd'"):
        engine.generate(None, "x", tools=tools)


@pytest.mark.parametrize(("schema", "value"), ODD)
def test_odd_spellings_of_schemas_are_read(engine: KVzipEngine, schema: dict[str, Any], value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert says(engine, engine.guidance.json(schema), json.dumps(value))
        if isinstance(value, dict):
            tools = [{"type": "function", "function": {"name": "odd", "parameters": schema}}]
            called = f'[TOOL_CALLS] [{{"name": "odd", "arguments": {json.dumps(value)}}}]'
            assert says(engine, calls_grammar(engine.guidance, FORMS["mistral"], tools, "any"), called)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "seed": 1}])
def test_what_a_grammar_leaves_no_choice_about_is_checked_in_few_steps(params: dict[str, float]) -> None:
    engine = tiny_engine()
    properties: dict[str, Any] = {"name_of_the_keeper": {"enum": ["Ana", "Ito"]}, "wound": {"type": "boolean"}}
    grammar = engine.guidance.json({"type": "object", "properties": properties, "required": list(properties)})
    steps: list[int] = []
    feed = engine._model.feed
    engine._model.feed = lambda row, ids, *args, **options: steps.append(len(ids)) or feed(row, ids, *args, **options)  # type: ignore
    guided, plain = engine.session(), engine.session()
    for question in ("Who?", "Who else?"):
        one, few = guided.ask(question, max_new_tokens=60, grammar=grammar, **params), len(steps)
        steps.clear()
        other, many = plain.ask(question, max_new_tokens=60, grammar=grammar, speculate=False, **params), len(steps)
        steps.clear()
        assert set(json.loads(one.text)) == set(properties)
        assert (one.text, one.usage, one.finish_reason) == (other.text, other.usage, "stop")
        assert guided._talk.ids == plain._talk.ids
        assert guided._tail.length == plain._tail.length
        assert 4 * few < many


@pytest.mark.parametrize("kind", ["object", "anything"])
def test_json_without_a_schema(kind: Literal["object", "anything"]) -> None:
    engine = tiny_engine()
    grammar = engine.guidance.json({"type": "object"} if kind == "object" else {})
    answers = [json.loads(babble(engine, grammar, seed, limit=60).text) for seed in range(12)]
    assert kind == "anything" or all(isinstance(answer, dict) for answer in answers)


def test_parts_of_an_all_of_may_be_definitions_and_unknown_formats_say_nothing(engine: KVzipEngine) -> None:
    base = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    more = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    both = {"allOf": [{"$ref": "#/$defs/Base"}, more]}
    engine.guidance.json({"type": "object", "properties": {"x": both}, "required": ["x"], "$defs": {"Base": base}})
    plain = {"type": "object", "properties": {"format": {"type": "string", "format": "color"}}, "required": ["format"]}
    assert closed(plain)["properties"] == {"format": {"type": "string"}}
    engine.guidance.json(plain)
    with pytest.raises(InputError):
        engine.guidance.json({"type": "string", "format": "date", "not": {}})
