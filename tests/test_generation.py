"""Sampling, stop strings and incremental text."""

import numpy as np
import pytest
import torch

from conftest import TEXT, tiny_engine, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.generation import Detokenizer, GenerationParams, Sampler, StopMatcher
from kvzip_memory.speculation import COST, GPU_COST, PromptLookup


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
    "params",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"stop": [""]}],
)
def test_parameters_out_of_range_name_the_value(engine: KVzipEngine, params: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(params)) if "stop" not in params else "stop string"):
        engine.generate(None, "Hello?", **params)


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
