"""Sampling, stop strings and incremental text."""

import re
from dataclasses import fields
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TEXT, tiny_engine, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.inference.generation import Detokenizer, GenerationParams, Sampler, StopMatcher
from kvzip_memory.inference.speculation import COST, GPU_COST, PromptLookup


def test_pieces_join_to_the_text_and_never_split_a_character() -> None:
    tokenizer = tiny_tokenizer()
    text = "naïve 東京 🙂 end"
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_never_completed_is_flushed() -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    tokens = tokenizer("a🙂").input_ids[:-1]
    assert "".join(map(detokenizer.push, tokens)) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_smollm2_pieces_join_to_its_own_decoding(smollm2: KVzipEngine) -> None:
    text = " It's 3.5 °C — naïve, isn't it?\n\n  def f(x):\n\treturn '東京 🙂'"
    ids = smollm2.tokenizer(text).input_ids
    detokenizer = Detokenizer(smollm2.tokenizer)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == smollm2.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "stopped"),
    [
        (["ab", "cSTO", "Pde"], ["STOP"], "abc", True),
        (["abSTO", "Qde"], ["STOP"], "abSTOQde", False),
        (["aST", "STOPb"], ["STOP"], "aST", True),
        (["x\n", "\ny"], ["\n\n", "zz"], "x", True),
        (["abcd"], ["cd", "bc"], "a", True),
        (["abS"], ["STOP"], "abS", False),
    ],
)
def test_stop_strings_may_span_pieces(pieces: list[str], stops: list[str], shown: str, stopped: bool) -> None:
    matcher, out, hit = StopMatcher(stops), "", False
    for piece in pieces:
        text, hit = matcher.push(piece)
        out += text
        if hit:
            break
    assert (out + ("" if hit else matcher.flush()), hit) == (shown, stopped)


def test_streaming_and_generating_give_the_same_and_stops_end_both(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.4)
    whole = engine.generate(context, "Go on.", max_new_tokens=40)
    with engine.stream(context, "Go on.", max_new_tokens=40) as stream:
        assert "".join(stream) == whole.text
    assert stream.reply.usage == whole.usage
    stop = whole.text[10:13]
    cut = engine.generate(context, "Go on.", max_new_tokens=40, stop=["never", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert whole.finish_reason == "length"


def test_a_stream_never_shows_the_beginning_of_a_stop_string(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.4)
    whole = engine.generate(context, "Go on.", max_new_tokens=30).text
    stop = whole[8:14]
    with engine.stream(context, "Go on.", max_new_tokens=30, stop=stop) as stream:
        assert "".join(stream) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "params", [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.3, "top_p": 0.6, "top_k": 20}]
)
def test_sampling_follows_transformers_distribution(params: dict[str, float]) -> None:
    """The sampler's frequencies match the probabilities transformers' own generate would sample from."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(30) * 2
    expected = TemperatureLogitsWarper(params["temperature"])(None, logits[None])
    if "top_k" in params:
        expected = TopKLogitsWarper(int(params["top_k"]))(None, expected)
    if "top_p" in params:
        expected = TopPLogitsWarper(params["top_p"])(None, expected)
    sampler = Sampler(GenerationParams(seed=1, **params), torch.device("cpu"))  # type: ignore[arg-type]
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(4000)]), minlength=30)
    assert (counts / 4000 - expected[0].softmax(-1)).abs().max() < 0.04
    assert not counts[expected[0] == float("-inf")].any()


def test_a_seed_repeats_a_sample_and_none_does_not(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.4)
    texts = [engine.generate(context, "Go on.", max_new_tokens=20, temperature=1.0, seed=seed).text for seed in (3, 3, 4, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) >= 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_new_tokens", value) for value in (0, -1, 1.5, True, "abc", "", inf, nan, [3], b"7")],
        *[("temperature", value) for value in (-1, nan, inf, -inf, True, "warm", "nan", [0.5])],
        *[("top_p", value) for value in (0, 1.1, nan, -0.5, True, "much")],
        *[("top_k", value) for value in (0, -3, 2.5, True, "", "five")],
        *[("seed", value) for value in (2**70, -(2**70), 1.5, True, "x", 2**64)],
        *[("stop", value) for value in ([3], ["a", None], 7, {"a": 1}.items(), b"x", True)],
        *[("repetition_penalty", value) for value in (0, -1, nan, inf, True, "x", 1e-40, 1e40)],
        *[("no_repeat_ngram_size", value) for value in (-1, 1.5, True, "x")],
    ],
)
def test_a_value_out_of_its_range_is_named_before_anything_is_computed(engine: KVzipEngine, name: str, value: object) -> None:
    engine._model.forward = engine._model.feed = None  # type: ignore
    with pytest.raises(InputError, match=re.escape(f"{name} is {value!r}; it must be ")):
        engine.generate(None, "Hello?", **{name: value})
    session = engine.session()
    with pytest.raises(InputError, match=name):
        session.stream("Hello?", **{name: value})
    assert session.n_tokens == 0


@pytest.mark.parametrize("stop", ["", [""], ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: object) -> None:
    with pytest.raises(InputError, match="a stop string is empty"):
        GenerationParams(stop=stop)  # type: ignore[arg-type]


def test_none_is_the_default_and_a_text_that_spells_a_number_is_that_number() -> None:
    assert GenerationParams(**dict.fromkeys((field.name for field in fields(GenerationParams)), None)) == GenerationParams()
    spelled = GenerationParams(max_new_tokens="7", temperature=" 0.5 ", top_p="1", top_k="3.0", seed=str(2**63 - 1), repetition_penalty="2")  # type: ignore
    assert spelled == GenerationParams(max_new_tokens=7, temperature=0.5, top_p=1, top_k=3, seed=2**63 - 1, repetition_penalty=2)
    assert GenerationParams(max_new_tokens=np.int64(3), temperature=np.float32(0.5), top_k=4.0) == GenerationParams(3, 0.5, top_k=4)  # type: ignore
    assert GenerationParams(stop="x").stops() == GenerationParams(stop=["x"]).stops() == ("x",)
    assert GenerationParams(stop=()).stops() == ()


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-7])
def test_a_temperature_of_nearly_nothing_is_greedy(engine: KVzipEngine, temperature: float) -> None:
    greedy = engine.generate(None, "Go on.", max_new_tokens=8).text
    assert engine.generate(None, "Go on.", max_new_tokens=8, temperature=temperature, seed=1).text == greedy


@pytest.mark.parametrize(
    "params", [{"temperature": 1e39}, {"temperature": 1e300, "top_p": 0.5}, {"temperature": 1e30, "repetition_penalty": 1e6}]
)
def test_a_temperature_without_end_makes_all_that_a_grammar_allows_alike(params: dict[str, Any]) -> None:
    engine = tiny_engine()
    schema = {"enum": ["a", "b", "c"]}
    said = {engine.generate(None, "Go on.", schema=schema, seed=seed, **params).text for seed in range(12)}
    assert {'"a"', '"b"'} <= said <= {'"a"', '"b"', '"c"'} or "top_p" in params


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
@pytest.mark.parametrize("temperature", [1e-6, 1.0])
def test_the_largest_penalties_leave_numbers(penalty: float, temperature: float) -> None:
    sampler = Sampler(GenerationParams(repetition_penalty=penalty, temperature=temperature, seed=1), torch.device("cpu"), ids=[3, 4])
    assert sampler(torch.tensor([-1e3, 1.0, 2.0, 1e3, -1e3])) == (3 if penalty < 1 else 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_every_token_has_been_ruled_out_all_are_allowed_again(temperature: float) -> None:
    params = GenerationParams(no_repeat_ngram_size=1, temperature=temperature, seed=1)
    sampler, logits = Sampler(params, torch.device("cpu")), torch.tensor([0.0, 40.0, 0.0])
    said = [sampler(logits) for _ in range(5)]
    assert sorted(said[:3]) == [0, 1, 2]
    assert said[3:] == [1, 1]


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, 2**64 - 1])
def test_seeds_of_64_bits_work(engine: KVzipEngine, seed: int) -> None:
    one, other = (engine.generate(None, "Go on.", max_new_tokens=8, temperature=1.0, seed=seed).text for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    "params", [{"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 1}, {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2}]
)
def test_repetition_is_held_back_as_transformers_does(params: dict[str, Any]) -> None:
    """Without a context our greedy ids are those of transformers' own generate."""
    engine = tiny_engine()
    ids = engine.prompt_ids(None, "Go on.")
    theirs = engine.model.generate(
        torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=sorted(engine._model.eos_ids), pad_token_id=0, **params
    )
    session = engine.session()
    answer = session.ask("Go on.", max_new_tokens=40, **params)
    assert session._talk.ids == theirs[0].tolist()
    assert answer.text != engine.generate(None, "Go on.", max_new_tokens=40).text


def test_what_a_context_has_read_has_occurred(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.3)
    seen = {*context.token_ids.tolist(), *engine.prompt_ids(context, "Go on.")}
    session = engine.session(context)
    session.ask("Go on.", max_new_tokens=4, no_repeat_ngram_size=1)
    assert not seen & set(session._talk.ids[len(engine.prompt_ids(context, "Go on.")) :])
    assert session.ask("And?", max_new_tokens=2, no_repeat_ngram_size=1).usage.output_tokens == 2


def test_a_lookup_guesses_what_followed_and_learns() -> None:
    lookup = PromptLookup(np.array([5, 1, 2, 3, 7, 8, 9, 4]), "cpu")
    lookup.append([1, 2])
    assert lookup.guess(10) == []  # 4, 1, 2 has not occurred before
    lookup.append([3])
    assert lookup.guess(10) == [7]  # 3 twentieths of a step may be lost, and a guessed token costs 0.12
    lookup.learn(1, 1)
    assert lookup.guess(10) == [7, 8, 9, 4, 1, 2, 3]
    assert lookup.guess(2) == [7, 8]
    assert lookup.guess(0) == []
    lookup.learn(7, 0)
    assert lookup.guess(10) == [7]  # little is left to be spent
    lookup.append([7])  # the last place where 2, 3, 7 stood before
    assert lookup.guess(10) == [8, 9]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_wrong_guesses_lose_a_twentieth_of_the_steps(device: str) -> None:
    lookup, lost, steps = PromptLookup(np.array([1, 2, 3, 4] * 5), device), 0.0, 400
    for token in [1, 2, 3, 5] * (steps // 4):  # 1, 2, 3 is followed by something else than before
        lookup.append([token])
        guessed = len(lookup.guess(20))
        lost += (COST["cpu"] if device == "cpu" else GPU_COST) * guessed
        lookup.learn(guessed, 0)
    assert 0 < lost <= 0.05 * steps


@pytest.mark.parametrize("params", [{}, {"temperature": 0.3, "seed": 4}])
def test_speculation_changes_nothing_but_the_number_of_steps(architecture: str, params: dict[str, float]) -> None:
    engine = tiny_engine(architecture)
    context = engine.load(TEXT * 2, ratio=0.4)
    counts: list[int] = []
    feed = engine._model.feed
    engine._model.feed = lambda row, ids, *args, **options: counts.append(len(ids)) or feed(row, ids, *args, **options)
    plain, spoken = engine.session(context), engine.session(context)
    for question in ("Repeat it.", "Again: " + TEXT[:40], "And again."):  # a random model soon repeats itself
        with_guesses = spoken.ask(question, max_new_tokens=60, **params)
        steps, counts[:] = list(counts), []
        without = plain.ask(question, max_new_tokens=60, speculate=False, **params)
        assert with_guesses.text == without.text
        assert with_guesses.usage == without.usage
        assert spoken._talk.ids == plain._talk.ids
        assert spoken._tail.length == plain._tail.length
        assert len(steps) <= len(counts)
        counts.clear()


@pytest.mark.parametrize("ask", ["generate", "stream", "session"])
def test_an_unknown_option_is_named_with_the_known_ones(engine: KVzipEngine, ask: str) -> None:
    asked = engine.session().ask if ask == "session" else lambda *args, **options: getattr(engine, ask)(None, *args, **options)
    with pytest.raises(InputError, match=r"\['max_tokens'\] are unknown; known are .*'max_new_tokens'"):
        asked("Who?", max_tokens=3)
