"""Guided decoding: whatever a model would rather say, its answer validates, or an error says that it was cut."""

from __future__ import annotations

import functools
import itertools
import json
import random
from typing import Any, Literal

import pytest
import torch
from jsonschema import Draft202012Validator

from conftest import tiny_engine
from kvzip_memory import InputError, KVzipEngine, UnfinishedError
from kvzip_memory.generation import Answer, GenerationParams, Sampler, decode
from kvzip_memory.guidance import Grammar, closed
from schemas import random_schema

SCHEMAS = 200


@functools.cache
def random_logits(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """``[32, vocab]``. Quotes are likely, or few strings would ever end."""
    logits = torch.randn(32, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, [i for token, i in tokenizer.get_vocab().items() if '"' in token]] += 2
    return logits


def babble(engine: KVzipEngine, grammar: Grammar, seed: int, limit: int) -> Answer:
    """An answer by the decode loop from random logits: a model that says anything, so that what validates does so by guidance alone."""
    logits, rng, answer = random_logits(engine.tokenizer, engine.model.config.vocab_size), random.Random(seed), Answer()
    sampler = Sampler(GenerationParams(grammar=grammar), engine.model.device)
    tokens = (sampler(logits[rng.randrange(len(logits))]) for _ in itertools.count())
    for _ in decode(tokens, answer, (), limit, engine._model.eos_ids, engine.tokenizer, engine._prompts.call_ids, grammar):
        pass
    return answer


def test_answers_validate_against_200_random_schemas_or_say_that_they_were_cut(smollm2: KVzipEngine) -> None:
    rng, cut = random.Random(7), 0
    for number in range(SCHEMAS):
        schema = random_schema(rng)
        try:
            answer = babble(smollm2, smollm2.guidance.json(schema), number, limit=50)
        except UnfinishedError:
            cut += 1
            continue
        assert answer.finish_reason == "stop"
        Draft202012Validator(closed(schema)).validate(json.loads(answer.text))
    assert 0 < cut < SCHEMAS // 4


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
    with pytest.raises(UnfinishedError, match="limit of 20 tokens"):
        session.ask("x", max_new_tokens=20, grammar=grammar)
    with pytest.raises(UnfinishedError, match="a stop string"):
        session.ask("x", max_new_tokens=20, grammar=grammar, stop='"a"')
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


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True, "items": {"type": "integer"}}, "uniqueItems"),
        ({"type": "elephant"}, "elephant"),
        ({"not": {"type": "string"}}, "not"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_says_why(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_engine().generate(None, "x", schema=schema)


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
    answers = []
    for seed in range(12):
        try:
            answers.append(json.loads(babble(engine, grammar, seed, limit=300).text))
        except UnfinishedError:
            continue
    assert answers
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
