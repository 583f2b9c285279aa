"""Stored contexts: identical when they come back, refused when anything is wrong."""

import json
import os
import random
import stat
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from conftest import CHATML, TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CorruptFileError, IdentityMismatchError, KVzipEngine
from kvzip_memory.model_identity import model_identity
from kvzip_memory.prompting.language import tokenizer_fingerprint
from kvzip_memory.registry.identity import NEWEST_FORMAT, key_of
from kvzip_memory.system.digests import digest


def test_a_reopened_context_gives_identical_logits(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture)
    context = engine.load(["One page. " * 9, TEXT], name="pages", ratio=0.4)
    again = tiny_engine(architecture).open(context.save(tmp_path / "pages.safetensors"))
    ids = engine.prompt_ids(context, "Who?")
    assert torch.equal(tiny_engine(architecture).logits(again, ids), engine.logits(context, ids))
    assert again.key == context.key == key_of(again.identity)
    for field in ("name", "ratio", "protected", "dense_nbytes", "recipe", "n_tokens", "kept_pairs", "nbytes"):
        assert getattr(again, field) == getattr(context, field), field
    assert [vars(s) for s in again.sources] == [vars(s) for s in context.sources]
    for before, after in zip(context.layers, again.layers, strict=True):
        assert (before.lengths, before.window) == (after.lengths, after.window)
        assert all(torch.equal(x, y) for x, y in zip(before.tensors(), after.tensors(), strict=True))


def test_the_file_is_plain_safetensors_aligned_and_private(engine: KVzipEngine, tmp_path: Path) -> None:
    context = engine.load(TEXT, ratio=0.4)
    path = context.save(tmp_path / "c.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with safe_open(path, "pt") as file:
        for i, layer in enumerate(context.layers):
            assert torch.equal(file.get_tensor(f"layer.{i}.key"), layer.keys)
            assert torch.equal(file.get_tensor(f"layer.{i}.value"), layer.values)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + length])
    for name, entry in table.items():
        if name.startswith("layer.") and not name.endswith("padding"):
            assert (8 + length + entry["data_offsets"][0]) % 4096 == 0


def test_16_bit_contexts_come_back(tmp_path: Path) -> None:
    engine = KVzipEngine(tiny_model().to(torch.bfloat16), tiny_tokenizer(), ratio=0.4)
    context = engine.load(TEXT)
    again = engine.open(context.save(tmp_path / "c"))
    assert again.layers[0].keys.dtype == torch.bfloat16
    assert all(torch.equal(x.keys, y.keys) for x, y in zip(context.layers, again.layers, strict=True))


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "grow", "empty"])
def test_no_damaged_file_is_ever_served(engine: KVzipEngine, tmp_path: Path, damage: str) -> None:
    path = engine.load(TEXT, ratio=0.4).save(tmp_path / "c.safetensors")
    whole = path.read_bytes()
    rng = random.Random(damage)
    for _ in range(1 if damage == "empty" else 150):
        broken = bytearray(whole)
        at = rng.randrange(len(broken))
        if damage == "flip":
            broken[at] ^= 1 << rng.randrange(8)
        elif damage == "truncate":
            del broken[at:]
        elif damage == "zero":
            size = rng.randrange(1, 5000)
            broken[at : at + size] = bytes(len(broken[at : at + size]))
            if bytes(broken) == whole:
                continue
        elif damage == "grow":
            broken[at:at] = b"\0" * rng.randrange(1, 100)
        else:
            broken = bytearray()
        path.write_bytes(broken)
        with pytest.raises(CorruptFileError, match=r"c\.safetensors"):
            engine.open(path)
    path.write_bytes(whole)
    assert engine.open(path).n_tokens


def test_every_byte_of_a_header_is_covered(engine: KVzipEngine, tmp_path: Path) -> None:
    path = engine.load("Short page.", ratio=0.6).save(tmp_path / "c.safetensors")
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for at in range(0, 8 + length, 7):
        broken = bytearray(whole)
        broken[at] ^= 1
        path.write_bytes(broken)
        with pytest.raises(CorruptFileError):
            engine.open(path)


def test_a_file_of_a_newer_format_is_refused_and_left_alone(engine: KVzipEngine, tmp_path: Path) -> None:
    context = engine.load(TEXT, ratio=0.4)
    path = replace(context, identity={**context.identity, "format": 99}).save(tmp_path / "c.safetensors")
    before = path.read_bytes()
    with pytest.raises(CorruptFileError, match=f"format 99, newer than the {NEWEST_FORMAT}"):
        engine.open(path)
    assert path.read_bytes() == before


def test_files_that_are_something_else_are_refused(engine: KVzipEngine, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, other)
    pickled = tmp_path / "cache.pt"
    torch.save({"keys": torch.zeros(3)}, pickled)
    for path in (other, pickled):
        with pytest.raises(CorruptFileError, match="not a context file"):
            engine.open(path)
    with pytest.raises(FileNotFoundError):
        engine.open(tmp_path / "nothing")


def edited_weights() -> KVzipEngine:
    engine = tiny_engine()
    with torch.no_grad():
        engine.model.model.layers[1].mlp.up_proj.weight[5, 7] += 1e-6
    return engine


OTHERS = {
    "weights": edited_weights,
    "config": lambda: KVzipEngine(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), tiny_tokenizer()),
    "architecture": lambda: tiny_engine("qwen2"),
    "dtype": lambda: KVzipEngine(tiny_model().to(torch.bfloat16), tiny_tokenizer()),
    "tokenizer": lambda: KVzipEngine(tiny_model(), with_token(tiny_tokenizer())),
    "template": lambda: tiny_engine(template=tiny_tokenizer().chat_template + "\n"),
}


def with_token(tokenizer):  # type: ignore[no-untyped-def]
    tokenizer.add_tokens(["kvzip"])
    return tokenizer


@pytest.mark.parametrize("field", sorted(OTHERS))
def test_a_file_of_another_model_is_refused_naming_the_field(engine: KVzipEngine, tmp_path: Path, field: str) -> None:
    context = engine.load(TEXT, ratio=0.4)
    path = context.save(tmp_path / "c.safetensors")
    before = path.read_bytes()
    other = OTHERS[field]()
    with pytest.raises(IdentityMismatchError, match=field) as error:
        other.open(path)
    assert field in error.value.fields
    with pytest.raises(IdentityMismatchError, match=field):
        other.generate(context, "Who?")
    assert path.read_bytes() == before
    assert other.load(TEXT, ratio=0.4).key != context.key


def test_the_identity_of_a_model_does_not_depend_on_where_it_came_from(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = KVzipEngine.from_pretrained(tmp_path)
    language = {"tokenizer": tokenizer_fingerprint(tokenizer), "template": digest(tokenizer.chat_template)}
    assert engine._identity == {**model_identity(model), **language}


def test_a_failed_write_leaves_the_older_file_and_no_other(engine: KVzipEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = engine.load(TEXT, ratio=0.4)
    path = context.save(tmp_path / "c.safetensors")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        engine.load(TEXT, ratio=0.9).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"ratio": 0.5}, {"system": "Be brief."}])
def test_what_determines_the_bytes_is_in_the_key(tmp_path: Path, change: dict[str, object]) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    assert engine.load(TEXT, **change).key != engine.load(TEXT).key  # type: ignore[arg-type]
    assert engine.load(TEXT, name="x").key == engine.load(TEXT).key


def test_engines_whose_turns_end_differently_do_not_share_a_context(tmp_path: Path) -> None:
    template = CHATML + "{% if add_generation_prompt and not thinking %}<none>{% endif %}"
    contexts = [tiny_engine(template=template, template_kwargs={"thinking": t}, cache_dir=tmp_path).load(TEXT) for t in (True, False)]
    assert torch.equal(contexts[0].token_ids, contexts[1].token_ids)
    assert contexts[0].recipe.closing != contexts[1].recipe.closing
    assert contexts[0].key != contexts[1].key


def test_weights_edited_in_place_make_another_key(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    context = engine.load(TEXT, ratio=0.4)
    weight = engine.model.model.layers[0].mlp.up_proj.weight
    before = weight[0, 0].clone()
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(IdentityMismatchError, match="weights"):
        engine.generate(context, "Who?")
    assert engine.load(TEXT, ratio=0.4).key != context.key
    with torch.no_grad():
        weight[0, 0] = before
    assert engine.load(TEXT, ratio=0.4).key == context.key


def test_a_peft_layers_scaling_and_switch_are_part_of_the_identity() -> None:
    engine = tiny_engine()
    layer = torch.nn.Linear(2, 2)
    layer.active_adapters, layer.scaling, layer.disable_adapters, layer.merged = ["a"], {"a": 1.0}, False, False  # type: ignore[assignment]
    plain = engine.fingerprint
    engine.model.model.tuner = layer
    states = [plain, engine.fingerprint]
    layer.scaling = {"a": 0.5}  # type: ignore[assignment]
    states.append(engine.fingerprint)
    layer.disable_adapters = True  # type: ignore[assignment]
    states.append(engine.fingerprint)
    assert len(set(states)) == 4
