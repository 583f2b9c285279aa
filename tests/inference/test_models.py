"""Which models are accepted, and what is refused before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MambaConfig,
    MistralConfig,
    OlmoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from conftest import TEXT, masked_logits, own_logits, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine, UnsupportedModelError
from kvzip_memory.attention import NAMES, choose
from kvzip_memory.inference.generation import GenerationParams
from kvzip_memory.inference.layout import layout_of

_TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "t5": (T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0), "encoder-decoder"),
    "mamba": (MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4), "KV heads|layers of type"),
    "all sliding": (MistralConfig(**_TINY, sliding_window=64, max_position_embeddings=2048), "no full-attention cache"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_models_that_cannot_work_are_refused_with_the_reason(kind: str) -> None:
    config, reason = REFUSED[kind]
    factory = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = factory.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason):
        KVzipEngine(model, tiny_tokenizer())
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("window", [None, 0])
def test_sliding_layers_without_a_window_see_everything(window: int | None) -> None:
    model = tiny_model("gemma3")
    model.config.sliding_window = window
    assert layout_of(model.config, 2048).windows == (None,) * 4
    model.config.sliding_window = 1
    with pytest.raises(UnsupportedModelError, match="sliding_window 1"):
        layout_of(model.config, 2048)


def test_a_window_as_long_as_the_model_is_full_attention() -> None:
    engine = KVzipEngine(tiny_model("mistral", sliding_window=2048), tiny_tokenizer())
    assert engine._model.windows == (None,) * 2


def test_an_untested_architecture_is_compared_with_itself_once() -> None:
    torch.manual_seed(0)
    config = OlmoConfig(**{k: v for k, v in _TINY.items() if k != "head_dim"}, max_position_embeddings=512)
    engine = KVzipEngine(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer())
    context = engine.load("A page. " * 10, ratio=1.0)
    ids = engine.prompt_ids(context, "Who?")
    with torch.inference_mode():
        own = engine.model(input_ids=torch.tensor([[*context.token_ids.tolist(), *ids]])).logits[0, context.n_tokens :]
    torch.testing.assert_close(engine.logits(context, ids), own, atol=1e-4, rtol=0)


def test_an_untested_architecture_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip_memory.inference import modeling

    monkeypatch.setattr(modeling, "TESTED", frozenset())
    model = tiny_model()
    original = model.model.layers[1].self_attn.forward

    def rescaled(*args, **kwargs):  # type: ignore[no-untyped-def]
        model.model.layers[1].self_attn.scaling = 0.9 if "kvzip" in kwargs else 0.25
        return original(*args, **kwargs)

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", rescaled)
    with pytest.raises(UnsupportedModelError, match="logits differ"):
        KVzipEngine(model, tiny_tokenizer())
    assert model.config._attn_implementation == "sdpa"


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 512}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **FACTORS}
ROTATIONS: dict[str, tuple[str, dict[str, object]]] = {
    "dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 512}),
    "the older name": ("qwen2", {"rope_scaling": {**FACTORS, "type": "longrope", "factor": 4.0}, "rope_parameters": None}),
    "of the configuration": ("phi3", {"rope_parameters": PLAIN | LONG, "original_max_position_embeddings": 512}),
    "layers of one type": ("gemma3", {"rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN}}),
    "layers of the other": ("gemma3", {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": DYNAMIC}}),
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_that_change_with_length_end_the_window_there(kind: str) -> None:
    architecture, changes = ROTATIONS[kind]
    engine = KVzipEngine(tiny_model(architecture, **changes), tiny_tokenizer(), 1.0, codec="none")
    assert engine.window == 512
    context = engine.load("Lamps and oil. " * 13)
    ids = [i % 250 for i in range(512 - context.n_tokens)]
    torch.testing.assert_close(engine.logits(context, ids), own_logits(engine, context, ids), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_that_another_users_long_text_has_left_change_no_key(kind: str) -> None:
    architecture, changes = ROTATIONS[kind]
    engine = KVzipEngine(tiny_model(architecture, **changes), tiny_tokenizer(), codec="none")
    context = engine.load(TEXT[:200])
    expected = engine.logits(context, [5, 6, 7])
    with torch.inference_mode():
        engine.model(input_ids=torch.arange(2100)[None] % 250)
    assert engine.load(TEXT[:200]).receipt.hit  # type: ignore[union-attr]
    torch.testing.assert_close(engine.logits(context, [5, 6, 7]), expected)
    engine.registry.remove(context.key)
    with torch.inference_mode():
        engine.model(input_ids=torch.arange(2100)[None] % 250)
    again = engine.load(TEXT[:200])
    assert again.key == context.key
    torch.testing.assert_close(engine.logits(again, [5, 6, 7]), expected)


def in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.compile(backend="eager")
    return model


def layers(model: Any) -> PreTrainedModel:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    for layer in model.model.layers[:3]:
        layer.compile(backend="eager")
    return model


def forward(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


COMPILED: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "whole": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item,return-value]
    "in place": in_place,
    "layers": layers,
    "forward": forward,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_has_the_contexts_of_the_same_model(how: str, tmp_path: Path) -> None:
    plain = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = plain.load(TEXT)
    expected = plain.generate(context, "Who?", max_new_tokens=8).text
    plain.close()
    engine = KVzipEngine(COMPILED[how](tiny_model()), tiny_tokenizer(), 0.4, cache_dir=tmp_path, codec="none")
    found = engine.load(TEXT)
    assert (found.key, found.receipt.tier) == (context.key, "disk")  # type: ignore[union-attr]
    assert engine.generate(found, "Who?", max_new_tokens=8).text == expected
    engine.model.train()
    assert engine.generate(found, "Who?", max_new_tokens=8).text == expected
    engine.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", NAMES)
def test_a_model_in_float64_works_or_is_refused(attention: str, architecture: str) -> None:
    model = tiny_model(architecture).to(torch.float64)
    if attention == "flash":
        with pytest.raises(InputError, match=r"float16 or bfloat16.*torch\.float64"):
            KVzipEngine(model, tiny_tokenizer(), attention=attention)
        return
    engine = KVzipEngine(model, tiny_tokenizer(), 0.4, attention=attention)
    if attention == "triton":  # in the interpreter
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([[5, 6]])).logits[0].float()
        torch.testing.assert_close(engine.logits(None, [5, 6]), expected, atol=1e-5, rtol=0)
        return
    context = engine.load(TEXT)
    torch.testing.assert_close(engine.logits(context, [5, 6, 7]), masked_logits(engine, context, [5, 6, 7]), atol=1e-5, rtol=0)
    session = engine.session(context)
    session.stream_ids([5, 6], GenerationParams(max_new_tokens=1)).whole()
    assert session.fold(0).identity["dtype"] == "float64"


def test_a_gpu_computes_float64_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose("auto", torch.device("cuda"), torch.float64).name == "cpu"
    with pytest.raises(InputError, match="at most 32 bits"):
        choose("triton", torch.device("cuda"), torch.float64)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, 30, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused_before_anything_is_loaded(ratio: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fraction of pairs kept"):
        KVzipEngine.from_pretrained(tmp_path / "there is no model here", ratio=ratio)
    with pytest.raises(InputError, match="fraction of pairs kept"):
        tiny_engine().load(TEXT, ratio=ratio)


def test_an_unknown_allocator_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'best' is unknown; use one of"):
        tiny_engine(allocator="best")
    with pytest.raises(InputError, match="does not exist"):
        KVzipEngine.from_pretrained(tmp_path / "model.gguf")


def test_a_gguf_file_is_converted_once_and_reads_the_same(smollm2: KVzipEngine, smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    text = "The keeper's log, 3 May 1871: naïve façade, 東京 -- don't\n\tpanic!"
    assert smollm2.tokenizer(text).input_ids == source(text).input_ids
    assert smollm2.tokenizer.decode(source(text).input_ids) == text
    assert smollm2.window == 8192
