"""Weights of linear layers that stay 4 or 8 bits."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conftest import TEXT, own_logits, tiny_model, tiny_tokenizer
from families import FAMILIES, tiny_family
from kvzip_memory import InputError, KVzipEngine, UnsupportedModelError
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.packed import BLOCK, PackedLinear, Weights, _decoded, is_packed, pack
from kvzip_memory.inference.weights import fingerprint

WEIGHTS: list[Weights] = [*get_args(Weights)]
QUESTION = "Which day does the donkey carry oil?"


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight.data = weight
    if bias is not None:
        made.bias.data = bias
    return made


def decoded(packed: PackedLinear, like: torch.Tensor) -> torch.Tensor:
    """The weights a packed layer computes with: exactly what it makes of unit vectors, but for rounding to bfloat16; and by its codes."""
    rows = packed.forward(torch.eye(packed.in_features, dtype=torch.float32)).T
    assert rows.shape == like.shape
    return rows


def packed_model(weights: Weights, model: PreTrainedModel | None = None) -> PreTrainedModel:
    model = tiny_model(vocab_size=304) if model is None else model
    pack(model, weights, lambda *_: None)
    return model


def in_blocks(kind: str, rows: int = 32, n: int = 6) -> torch.Tensor:
    """Weights such as a file of 4 bits holds, whose scales and offsets are 16 bits."""
    draw = torch.Generator().manual_seed(len(kind))
    codes = torch.randint(0, 16, (rows, n, BLOCK), generator=draw).float()
    scale, offset = torch.rand(rows, n, 1, generator=draw).half().float() + 0.01, torch.randn(rows, n, 1, generator=draw).half().float()
    if kind == "q4_0":
        codes[..., 0] = 0
        return ((codes - 8) * scale).flatten(1)
    if kind == "q4_1":
        codes[..., 0], codes[..., 1] = 0, 15
        return (codes * scale + offset).flatten(1)
    codes = codes.clamp(2, 13)  # q4_k: not all codes need occur
    codes[..., 0], codes[..., 1] = 2, 13
    return (codes * scale - offset.abs()).flatten(1)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q4_k"])
def test_weights_that_had_4_bits_lose_nothing_but_16_bits_of_their_scales(kind: str) -> None:
    weight = in_blocks(kind)
    for weights in ("auto", "int4"):
        packed = PackedLinear(layer_of(weight), weights)  # type: ignore[arg-type]
        assert len(packed._parts) == 1
        found = decoded(packed, weight)
        assert ((found - weight).norm() / weight.norm()) < 0.006


def test_8_bits_say_more_than_4_and_auto_takes_them_for_weights_of_more() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    lost = {}
    for weights in WEIGHTS:
        packed = PackedLinear(layer_of(weight), weights)
        lost[weights] = ((decoded(packed, weight) - weight).norm() / weight.norm()).item()
        taken = sum(codes.nbytes + scales.nbytes for codes, scales in packed._parts)
        assert taken == (0.625 if weights == "int4" else 1.25) * weight.numel()
    assert lost["int4"] < 0.12
    assert lost["int8"] == lost["auto"] < 0.01


@given(data=st.data())
def test_a_packed_layer_is_the_layer_of_its_decoded_weights_row_by_row(data: st.DataObject) -> None:
    outputs, inputs = 16 * data.draw(st.integers(1, 12)), BLOCK * data.draw(st.integers(1, 8))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(outputs, inputs, generator=draw) * data.draw(st.sampled_from([1e-3, 1.0, 30.0]))
    if data.draw(st.booleans()):
        weight[0], weight[1] = 0, 0.5  # rows without a range
    bias = torch.randn(outputs, generator=draw).to(dtype) if data.draw(st.booleans()) else None
    packed = PackedLinear(layer_of(weight.to(dtype), bias), data.draw(st.sampled_from(WEIGHTS)))
    x = torch.randn(2, data.draw(st.integers(1, 20)), inputs, generator=draw).to(dtype)
    out = packed(x)
    assert out.dtype is dtype
    whole = decoded(packed, weight)
    expected = linear(x.bfloat16().float(), whole, None if bias is None else bias.float())
    if bias is not None:
        whole_alone = packed.forward(torch.zeros(1, inputs, dtype=dtype))
        torch.testing.assert_close(whole_alone[0], bias)
        expected = linear(x.bfloat16().float(), whole - bias.float()[:, None], bias.float())
    scale = (x.float().abs().flatten(0, 1) @ whole.abs().T).max().item() + 1e-9
    torch.testing.assert_close(out.float(), expected, atol=0.01 * scale, rtol=0)
    rows = x.flatten(0, 1)
    for i in (0, len(rows) - 1):  # whoever is beside a row
        assert torch.equal(packed(rows[i : i + 1])[0], out.flatten(0, 1)[i])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_what_a_packed_model_computes_over_contexts_is_what_it_computes_by_itself(kind: str, weights: Weights) -> None:
    model = tiny_family(kind)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    fitting = sum(linear.in_features % BLOCK == 0 and linear.out_features % 16 == 0 for linear in linears)
    if fitting == 0:
        with pytest.raises(UnsupportedModelError, match="no linear layers"):
            pack(model, weights, lambda *_: None)
        return
    pack(model, weights, lambda *_: None)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == fitting
    engine = KVzipEngine(model, tiny_tokenizer(), codec="none")
    context = engine.load(TEXT, ratio=1.0)
    ids = engine.prompt_ids(context, QUESTION)
    expected = own_logits(engine, context, ids)
    torch.testing.assert_close(engine.logits(context, ids), expected, atol=0.1 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_an_answer_is_the_same_alone_and_beside_eight_others(weights: Weights) -> None:
    engine = KVzipEngine(packed_model(weights), tiny_tokenizer())
    ids = [[5, 9 + i, 7] for i in range(9)]
    together = engine._model.forward([Row((), 0, Tail()) for _ in ids], ids)
    for some, row in zip(ids, together, strict=True):
        torch.testing.assert_close(engine._model.forward([Row((), 0, Tail())], [some])[0], row, atol=1e-5, rtol=1e-5)


def test_the_head_has_8_bits_and_what_is_no_linear_layer_or_does_not_fit_stays() -> None:
    model = packed_model("int4")
    kinds = {name: len(module._parts) for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert kinds.pop("lm_head") == 2
    assert {*kinds.values()} == {1}
    assert type(model.get_input_embeddings()) is nn.Embedding
    odd = packed_model("int4", tiny_model(vocab_size=300))  # the head's 300 rows are no multiple of 16
    assert type(odd.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_folder_is_read_packed_and_its_contexts_are_its_own(weights: Weights, dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(vocab_size=304).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def engine_of(weights: str | None) -> KVzipEngine:
        return KVzipEngine.from_pretrained(folder, weights=weights, dtype=dtype, device="cpu", cache_dir=tmp_path / "cache", progress=False)

    engine = engine_of(weights)
    assert is_packed(engine.model)
    plain = KVzipEngine.from_pretrained(folder, dtype=dtype, device="cpu", progress=False).model  # all else is what it would be
    assert {name: b.dtype for name, b in engine.model.named_buffers() if not name.endswith("digest")} == {
        name: b.dtype for name, b in plain.named_buffers()
    }
    others = dict(plain.named_parameters())
    assert all(torch.equal(p, others[name]) and p.dtype is others[name].dtype for name, p in engine.model.named_parameters())
    first = engine.load(TEXT)
    answer = engine.generate(first, QUESTION, max_new_tokens=8).text
    engine.close()
    second = engine_of(weights)
    again = second.load(TEXT)
    assert (again.receipt.tier, again.key) == ("disk", first.key)  # type: ignore[union-attr]
    assert second.generate(again, QUESTION, max_new_tokens=8).text == answer
    second.close()
    unpacked = engine_of(None)
    assert "weights" in unpacked.load(TEXT).receipt.reason  # type: ignore[operator,union-attr]
    unpacked.close()


def test_a_packed_model_is_the_same_on_every_processor(tmp_path: Path) -> None:
    tiny_model(vocab_size=304).save_pretrained(tmp_path)
    program = (
        "import sys; from test_packed import *; torch.set_num_threads(1)\n"
        "model = lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print([fingerprint(packed_model(weights, model())) for weights in WEIGHTS], end='')"
    )
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent), str(here.parents[1])])
    found = {}
    for capability in ("default", "avx2", "avx512"):
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": paths}
        out = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=env, capture_output=True, text=True, check=True)
        found[capability] = out.stdout
    assert len(set(found.values())) == 1, found


def test_no_two_packed_models_have_one_fingerprint() -> None:
    other = tiny_model(vocab_size=304)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 3
    models = [tiny_model(vocab_size=304), *(packed_model(weights) for weights in ("int4", "int8")), packed_model("int4", other)]  # type: ignore[arg-type]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_a_packed_model_in_training_mode_answers_the_same() -> None:
    model = packed_model("int4")
    engine = KVzipEngine(model, tiny_tokenizer())
    context = engine.load(TEXT)
    before = engine.generate(context, QUESTION, max_new_tokens=8).text
    model.train()
    assert engine.generate(context, QUESTION, max_new_tokens=8).text == before
    assert fingerprint(deepcopy(model)) == fingerprint(model)


@pytest.mark.parametrize("weights", ["int3", "", 4, True, ["int4"], "INT4"])
def test_what_weights_are_not_packed_as_is_refused_before_anything_is_loaded(weights: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give 'auto', 'int8' or 'int4', or None"):
        KVzipEngine.from_pretrained(tmp_path / "there is no model here", weights=weights)


@pytest.mark.parametrize("options", [{"device": "meta"}, {"device_map": "auto"}, {"quantization_config": {"load_in_8bit": True}}])
def test_weights_are_packed_on_a_cpu_and_once(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is for CPUs and plain weights"):
        KVzipEngine.from_pretrained(tmp_path / "there is no model here", weights="int4", **options)


def test_a_model_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="are quantised already"):
        KVzipEngine.from_pretrained(tmp_path, weights="int8", device="cpu")


def test_a_model_without_linear_layers_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=60, n_layer=1, n_head=4, vocab_size=300))
    with pytest.raises(UnsupportedModelError, match="no linear layers that could be packed; leave weights out"):
        pack(model, "int4", lambda *_: None)


def test_a_layer_of_two_names_is_one_and_a_packed_model_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=304)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    pack(model, "int4", lambda *_: None)
    assert isinstance(model.model.layers[1].mlp.up_proj, PackedLinear)
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert not any(module.training for module in model.modules())
    with pytest.raises(UnsupportedModelError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    assert model.lm_head(torch.zeros(64)).shape == (304,)


def test_packing_tells_how_far_it_is() -> None:
    told: list[tuple[str, int, int]] = []
    model = tiny_model(vocab_size=304)
    total = sum(module.weight.numel() for module in model.modules() if type(module) is nn.Linear)
    pack(model, "int8", lambda *some: told.append(some))
    assert told[-1][1:] == (total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_codes_and_scales_decode_to_the_nearest_of_those_tried() -> None:
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8)
    scales = torch.stack([torch.full((2, 4), 0.5), torch.full((2, 4), -1.0)], -1).bfloat16()
    assert torch.equal(_decoded(codes, scales), (codes.float() - 8) * 0.5 - 1)
