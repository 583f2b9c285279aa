"""A model's ``generation_config`` holds as in ``model.generate`` with the same explicit arguments; answers are greedy all the same."""

import copy
import string
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, WatermarkingConfig

from conftest import TEXT, tiny_engine
from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.inference.generation import GenerationParams, Sampler
from kvzip_memory.inference.processors import _REFUSED
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipLLM

N = 24
ASKED = "Go on. " + string.printable[:94]


@pytest.fixture
def said(engine: KVzipEngine) -> list[int]:
    """What the model says without any settings."""
    return answer(engine)


def answer(engine: KVzipEngine, context: Any = None, **params: Any) -> list[int]:
    """Ids of an answer, with the one that ended it."""
    session = engine.session(context)
    session.ask(ASKED, **{"max_new_tokens": N, **params})
    return session._talk.ids[len(engine.prompt_ids(context, ASKED)) :]


def theirs(engine: KVzipEngine, read: list[int], **params: Any) -> list[int]:
    """The same by transformers alone, without the end of the turn."""
    eos = sorted(engine._model.eos_ids)
    options = {"max_new_tokens": N, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos, **params}
    ids = engine.model.generate(torch.tensor([read]), attention_mask=torch.ones(1, len(read)), tokenizer=engine.tokenizer, **options)
    new = ids[0, len(read) :].tolist()
    return new[: next((i for i, token in enumerate(new) if token in eos), len(new))]


def settings_of(said: list[int], length: int, eos: int) -> dict[str, list[Any]]:
    """Values that change an answer, of every field that is kept to. ``said`` is the answer without."""
    first, second, third = said[:3]
    every = [token for token in range(3, 300) if token not in (first, second)]
    return {
        "repetition_penalty": [1.3, 0.5],
        "no_repeat_ngram_size": [1, 2, 3],
        "encoder_repetition_penalty": [1.6, 0.5],
        "encoder_no_repeat_ngram_size": [1, 2],
        "suppress_tokens": [[first, third]],
        "begin_suppress_tokens": [[first]],
        "bad_words_ids": [[[first]], [[first, second]], [[second, third], [third]]],
        "sequence_bias": [[[[first], -30.0]], [[[first, second], -30.0], [[every[5]], 2.0]]],
        "min_new_tokens": [12],
        "min_length": [length + 9],
        "forced_eos_token_id": [eos, [eos]],
        "forced_bos_token_id": [7],
        "exponential_decay_length_penalty": [(3, 3.0)],
        "renormalize_logits": [True],
        "remove_invalid_values": [True],
        "watermarking_config": [WatermarkingConfig(bias=20.0)],
        "eos_token_id": [[eos, third]],
    }


#: Fields that say nothing about a greedy answer of so many tokens, or that the call says itself.
HARMLESS: dict[str, Any] = {
    "max_length": 3,
    "max_new_tokens": 3,
    "do_sample": True,
    "temperature": 1.7,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.5,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "early_stopping": True,
    "length_penalty": 3.0,
    "diversity_penalty": 2.0,
    "num_return_sequences": 2,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 8,
    "prefill_chunk_size": 2,
    "low_memory": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 5,
    "bos_token_id": 5,
    "decoder_start_token_id": 5,
    "use_mtp": True,
    "is_assistant": True,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 5,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "x",
    "compile_config": None,
    "disable_compile": True,
    "continuous_batching_config": None,
    "transformers_version": "5.0",
    "_from_model_config": True,
    "_original_object_hash": 1,
}


def test_every_setting_is_kept_to_or_says_nothing_or_is_refused() -> None:
    kept = {*settings_of([5, 6, 7], 9, 2), "stop_strings"}
    fields = vars(GenerationConfig()).keys()
    assert fields - HARMLESS.keys() - _REFUSED.keys() == kept
    assert not kept & (HARMLESS.keys() | _REFUSED.keys())


@pytest.mark.parametrize("name", settings_of([5, 6, 7], 9, 2))
def test_a_setting_is_kept_to_as_generate_does(engine: KVzipEngine, said: list[int], name: str) -> None:
    read, answers = engine.prompt_ids(None, ASKED), list[list[int]]()
    for value in settings_of(said, len(read), min(engine._model.eos_ids))[name]:
        setattr(engine.model.generation_config, name, value)  # after the engine was made
        if name in ("min_new_tokens", "min_length", "exponential_decay_length_penalty"):
            engine.model.generation_config.eos_token_id = [min(engine._model.eos_ids), said[4], said[7]]
        answers.append(answer(engine))
        assert answers[-1] == theirs(engine, read), value
    if name not in ("remove_invalid_values", "renormalize_logits", "forced_bos_token_id"):
        assert any(ours != said for ours in answers)


def test_the_models_own_stop_strings_end_an_answer(engine: KVzipEngine, said: list[int]) -> None:
    engine.model.generation_config.stop_strings = stop = engine.tokenizer.decode(said[3])
    text = engine.tokenizer.decode(theirs(engine, engine.prompt_ids(None, ASKED)))
    assert text.endswith(stop)
    reply = engine.generate(None, ASKED, max_new_tokens=N)
    assert (reply.text, reply.finish_reason) == (text.removesuffix(stop), "stop")


@pytest.mark.parametrize("name", HARMLESS)
def test_a_setting_that_says_nothing_changes_nothing(engine: KVzipEngine, said: list[int], name: str) -> None:
    setattr(engine.model.generation_config, name, HARMLESS[name])
    assert answer(engine) == said


@pytest.mark.parametrize("name", _REFUSED)
def test_another_way_of_generating_is_refused_before_anything_is_computed(engine: KVzipEngine, name: str) -> None:
    context = engine.load(TEXT)
    engine._model.feed = None  # type: ignore
    values = {"num_beams": 4, "num_beam_groups": 2, "guidance_scale": 1.5, "penalty_alpha": 0.6, "dola_layers": "high", "max_time": 1.0}
    setattr(engine.model.generation_config, name, values.get(name, [[5]]))
    session = engine.session(context)
    for ask in (lambda: engine.generate(context, ASKED), lambda: engine.stream(None, ASKED), lambda: session.ask(ASKED)):
        with pytest.raises(InputError, match=rf"generation_config has {name}=.*Set model.generation_config.{name} = None"):
            ask()
    with pytest.raises(InputError, match=name):
        KVzipChatModel(engine=engine).invoke(ASKED)
    setattr(engine.model.generation_config, name, None)
    session.stream(ASKED).close()


def test_a_setting_that_transformers_cannot_use_is_named(engine: KVzipEngine) -> None:
    engine.model.generation_config.repetition_penalty = -3.0
    with pytest.raises(InputError, match=r"generation_config cannot be used.*penalty"):
        engine.generate(None, ASKED)
    assert engine.generate(None, ASKED, repetition_penalty=1, max_new_tokens=2).text


@pytest.mark.parametrize("name", ["repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"])
def test_over_a_context_a_setting_sees_all_that_was_read(engine: KVzipEngine, name: str) -> None:
    """As generate does, that is given it as ids."""
    context = engine.load(TEXT, ratio=1.0)
    read = [*context.token_ids.tolist(), *engine.prompt_ids(context, ASKED)]
    values = {
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 2,
        "bad_words_ids": [[read[30], read[31]]],
    }
    setattr(engine.model.generation_config, name, values[name])
    assert answer(engine, context) == theirs(engine, read)


def test_what_a_call_says_comes_before_what_the_model_says(engine: KVzipEngine, said: list[int]) -> None:
    own = engine.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.stop_strings = 1.5, 1, ["\n", "e"]
    assert answer(engine) != said
    assert answer(engine, repetition_penalty=1, no_repeat_ngram_size=0, stop=[]) == said
    read = engine.prompt_ids(None, ASKED)
    own.stop_strings = None
    assert answer(engine, repetition_penalty=1.2) == theirs(engine, read, repetition_penalty=1.2)
    llm, chat = KVzipLLM(engine=engine, max_tokens=N), KVzipChatModel(engine=engine, max_tokens=N)
    text = engine.generate(None, ASKED, max_new_tokens=N).text
    assert llm.complete(ASKED).text == chat.invoke(ASKED).content == text
    plain = {"repetition_penalty": 1, "no_repeat_ngram_size": 0}
    assert llm.complete(ASKED, **plain).text == chat.invoke(ASKED, **plain).content != text


@pytest.mark.parametrize(
    "own",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.02},
        {"top_h": 0.5},
        {"top_k": 9, "top_p": 0.7, "repetition_penalty": 3.0, "renormalize_logits": True, "watermarking_config": WatermarkingConfig()},
    ],
)
def test_where_a_call_samples_the_models_own_settings_fill_in_what_it_leaves_open(engine: KVzipEngine, own: dict[str, Any]) -> None:
    """Probabilities are those that transformers' own generate samples from."""
    torch.manual_seed(0)
    logits, ids = torch.randn(300) * 3, [3, 4, 5, 6]
    settings = GenerationConfig(**own, do_sample=True, temperature=9.0)
    expected = GenerationConfig(**own, do_sample=True, temperature=0.7)
    expected._eos_token_tensor = torch.tensor([2])
    processors = engine.model._get_logits_processor(expected, input_ids_seq_length=4, device="cpu")
    wanted = processors(torch.tensor([ids]), logits[None])[0].softmax(-1)
    params = GenerationParams(temperature=0.7, seed=1)
    sampler = Sampler(params, torch.device("cpu"), 9000, ids, settings, engine.model.config, [2])
    sampler._own.append = lambda token: None  # type: ignore[method-assign]
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(3000)]), minlength=300)
    assert (counts / 3000 - wanted).abs().max() < 0.05
    assert not counts[wanted == 0].any()
    assert (wanted > 0).sum() < 300 or own.keys() == {"top_p"}
    off = Sampler(
        GenerationParams(temperature=0.7, top_p=1, top_k=10**6, repetition_penalty=1),
        torch.device("cpu"),
        9,
        ids,
        GenerationConfig(top_k=4, top_p=0.5, repetition_penalty=2.0),
    )
    assert torch.equal(off._own.sampling(torch.tensor([ids]), logits[None])[0], logits / 0.7)
    assert not off._own.rules


def test_a_model_that_was_published_to_sample_is_greedy_here(engine: KVzipEngine, said: list[int]) -> None:
    own = engine.model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p = True, 1.5, 50, 0.9
    assert answer(engine) == said
    assert answer(engine, top_p=0.5) == said  # without a temperature
    assert len({tuple(answer(engine, temperature=1.5)) for _ in range(3)}) > 1


@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 1.05}, {"no_repeat_ngram_size": 8}, {"bad_words_ids": [[60, 70]]}, {"min_new_tokens": 20}]
)
def test_guesses_are_checked_with_the_processors_applied(own: dict[str, Any]) -> None:
    engine = tiny_engine()
    context = engine.load(TEXT * 2, ratio=0.4)
    engine.model.generation_config = GenerationConfig(**own)
    steps: list[int] = []
    feed = engine._model.feed
    engine._model.feed = lambda row, ids, *args, **options: steps.append(len(ids)) or feed(row, ids, *args, **options)
    guessed = answer(engine, context, max_new_tokens=80)
    assert max(steps[1:]) > 1
    assert guessed == answer(engine, context, max_new_tokens=80, speculate=False)


def test_a_grammar_comes_before_the_models_settings(engine: KVzipEngine) -> None:
    own = engine.model.generation_config
    quote, digit = (engine.tokenizer(text).input_ids[0] for text in ('"', "1"))
    own.suppress_tokens, own.min_new_tokens = [quote, digit], 50
    assert engine.generate(None, ASKED, schema={"enum": ["a", "b"]}, max_new_tokens=9).text in ('"a"', '"b"')
    assert engine.generate(None, ASKED, schema={"enum": [1, 2]}, max_new_tokens=9).text == "2"


def test_an_answer_keeps_the_settings_it_began_with(engine: KVzipEngine, said: list[int]) -> None:
    with engine.stream(None, ASKED, max_new_tokens=N) as stream:
        next(stream)
        engine.model.generation_config.suppress_tokens = said
        engine.model.generation_config.eos_token_id = said[4:8]
        rest = "".join(stream)
    assert rest
    assert stream.reply.usage.output_tokens == N


def test_a_cached_answer_is_not_that_of_other_settings(engine: KVzipEngine, said: list[int]) -> None:
    from langchain_core.caches import InMemoryCache

    chat = KVzipChatModel(engine=engine, max_tokens=8, cache=InMemoryCache())
    before = chat.invoke(ASKED).content
    engine.model.generation_config.suppress_tokens = said
    assert chat.invoke(ASKED).content == engine.generate(None, ASKED, max_new_tokens=8).text != before


def test_an_engine_leaves_the_models_settings_as_they_are(engine: KVzipEngine) -> None:
    engine.model.generation_config.repetition_penalty = 1.2
    before = copy.deepcopy(vars(engine.model.generation_config))
    engine.generate(None, ASKED, max_new_tokens=4, temperature=0.5, top_k=3)
    assert vars(engine.model.generation_config) == before
