"""What is wrong with a model, a tokenizer or their options is said in words, before any heavy work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3nConfig, LlamaForSequenceClassification, LlamaModel

import families
from conftest import SHAPE, TEXT, tiny_model, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine, UnsupportedModelError, WindowError
from multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "bf16"}, "dtype is 'bf16'"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"dtype": "nn"}, "dtype is 'nn'"),
    ({"dtype": None}, "dtype is None"),
    ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
    ({"torch_dtype": torch.bfloat16}, "give dtype= in the place"),
    ({"device": "gpu"}, "device is 'gpu'"),
    ({"device": None}, "device is None"),
    ({"device": "cuda:99"}, "device is 'cuda:99'"),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS, ids=[said for _, said in OPTIONS])
def test_a_slip_in_an_option_is_told(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        KVzipEngine.from_pretrained(folder, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_told_in_any_way(folder: Path, dtype: Any) -> None:
    assert KVzipEngine.from_pretrained(folder, dtype=dtype).model.dtype is torch.bfloat16


@pytest.mark.parametrize("path", [Path("nowhere"), "./nowhere", "/no/such/folder", "~/no such folder", "a/b/c"])
def test_a_folder_that_does_not_exist_is_no_hub_id(path: Any) -> None:
    with pytest.raises(InputError, match="does not exist"):
        KVzipEngine.from_pretrained(path)


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert KVzipEngine.from_pretrained(f"~/{folder.name}").model.config.vocab_size == SHAPE["vocab_size"]


@pytest.mark.parametrize("given", [None, 5, ""])
def test_what_names_no_model_is_told(given: Any) -> None:
    with pytest.raises(InputError, match="a model is a hub id, a folder"):
        KVzipEngine.from_pretrained(given)


def test_a_file_that_is_no_gguf_is_told(folder: Path) -> None:
    with pytest.raises(InputError, match="a model is a hub id, a folder"):
        KVzipEngine.from_pretrained(folder / "config.json")


@pytest.mark.parametrize("as_path", [True, False])
def test_a_configuration_may_be_given(folder: Path, as_path: bool) -> None:
    config = folder if as_path else AutoConfig.from_pretrained(folder)
    ids = [5, 6, 7]
    given, plain = KVzipEngine.from_pretrained(folder, config=config), KVzipEngine.from_pretrained(folder)
    assert torch.equal(given.logits(None, ids), plain.logits(None, ids))


LACKING: dict[str, tuple[Callable[[], Any], str]] = {
    "a head": (lambda: LlamaForSequenceClassification(tiny_model(tie_word_embeddings=False).config), "lm_head.weight"),
    "a matrix": (tiny_model, "model.layers.1.mlp.up_proj.weight"),
    "a language model's head": (lambda: tiny_multimodal("mistral3").model, "lm_head"),
}


@pytest.mark.parametrize("what", LACKING)
def test_weights_that_are_missing_are_not_made_up(what: str, tmp_path: Path) -> None:
    made, name = LACKING[what]
    made().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(name, None)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks weights of .* such as .*{name}"):
        KVzipEngine.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["cohere2", "deepseek_v3", "falcon_h1", "gemma2", "gemma4_text", "gpt_oss", "kimi_linear", "llama4_text"])
def test_a_saved_model_lacks_nothing(kind: str, tmp_path: Path) -> None:
    model = families.tiny_family(kind)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = [5, 6, 7]
    read, plain = KVzipEngine.from_pretrained(tmp_path), KVzipEngine(model, tiny_tokenizer())
    assert torch.equal(read.logits(None, ids), plain.logits(None, ids))


@pytest.mark.parametrize("given", ["a name", None, "swapped"])
def test_what_is_no_model_is_told(given: Any) -> None:
    with pytest.raises(InputError, match="a model of transformers is wanted"):
        KVzipEngine(tiny_tokenizer() if given == "swapped" else given, tiny_tokenizer())


@pytest.mark.parametrize("given", ["gpt2", None, 5])
def test_what_is_no_tokenizer_is_told(given: Any) -> None:
    with pytest.raises(InputError, match="a tokenizer or processor of transformers is wanted"):
        KVzipEngine(tiny_model(), given)


HEADLESS: dict[str, Callable[[], Any]] = {
    "a body": lambda: LlamaModel(tiny_model().config),
    "a classifier": lambda: LlamaForSequenceClassification(tiny_model().config),
    "a body with a tower": lambda: tiny_multimodal("llava").model,
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_without_a_language_head_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match="gives no logits of tokens"):
        KVzipEngine(HEADLESS[kind](), tiny_tokenizer())


def test_a_tokenizer_with_more_tokens_than_the_model_is_told_where_that_shows() -> None:
    engine = KVzipEngine(tiny_model(vocab_size=100), tiny_tokenizer())
    for use in (engine.load, lambda text: engine.generate(None, text)):
        with pytest.raises(InputError, match="embeddings of 100 tokens"):
            use(TEXT)


def test_a_window_too_short_for_any_context_says_so() -> None:
    with pytest.raises(WindowError, match=r"a context may have 0 \(the model's window of 100 less 256"):
        KVzipEngine(tiny_model(max_position_embeddings=100), tiny_tokenizer()).load(TEXT)


def test_dynamic_rotation_ends_the_window_where_it_begins() -> None:
    engine = KVzipEngine(tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}), tiny_tokenizer())
    assert engine.window == SHAPE["max_position_embeddings"]


@pytest.mark.parametrize("field", ["images", "audio", "videos"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_what_a_message_has_beside_its_text_is_not_dropped(field: str, role: str) -> None:
    engine = KVzipEngine(tiny_model(), tiny_tokenizer())
    with pytest.raises(InputError, match=f"'{field}' of message 1 are not supported"):
        engine.generate(None, [{"role": role, "content": "What is this?", field: ["aGVsbG8="]}, {"role": "user", "content": "Well?"}])


@pytest.mark.parametrize("kind", sorted(families.REFUSED))
def test_what_a_configuration_tells_is_refused_before_weights_are_read(kind: str, tmp_path: Path) -> None:
    model = families.tiny_refused(kind)
    with pytest.raises(UnsupportedModelError) as refused:
        KVzipEngine(model, tiny_tokenizer())
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    if "test forward" not in str(refused.value):
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
    with pytest.raises(UnsupportedModelError) as again:
        KVzipEngine.from_pretrained(tmp_path)
    assert str(again.value).partition(": on a test forward")[0] == str(refused.value).partition(": on a test forward")[0]


def test_gemma_3n_is_read_without_its_towers(tmp_path: Path) -> None:
    """Whose own class needs a library for images even to be made."""
    model = families.tiny_family("gemma3n_text")
    config = Gemma3nConfig(text_config=model.config.to_dict())
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    weights = {f"model.language_model.{name.removeprefix('model.')}": value for name, value in model.state_dict().items()}
    del weights["model.language_model.lm_head.weight"]  # it is tied
    save_file({**weights, "model.vision_tower.x": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(tmp_path)
    read, whole = KVzipEngine.from_pretrained(tmp_path), KVzipEngine(model, tiny_tokenizer())
    assert torch.equal(read.logits(None, [5, 6, 7]), whole.logits(None, [5, 6, 7]))
