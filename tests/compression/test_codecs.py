"""How kept pairs are written: what is answered from them is what would be from pairs of those numbers at full width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ARCHITECTURES, TEXT, lose, same_pairs, tiny_engine, tiny_model, tiny_tokenizer
from families import FAMILIES, tiny_family
from kvzip_memory import BudgetError, CompressedContext, InputError, KVzipEngine
from kvzip_memory.compression.codecs import CODECS
from kvzip_memory.context import RaggedLayer, Resident
from kvzip_memory.context.codes import Codes, decoded, tensors_of

SAID = [{"role": "user", "content": "Hello?"}]
NARROW = sorted({*CODECS} - {"none"})


def widened(context: CompressedContext) -> CompressedContext:
    """The same numbers in 32 bits."""

    def wide(layer: RaggedLayer) -> RaggedLayer:
        keys = decoded(layer.keys, torch.float32)
        return replace(layer, keys=keys, values=keys if layer.shared else decoded(layer.values, torch.float32))

    with context.lease() as lease:
        parts = [tuple(map(wide, part)) for part in lease.parts]
        storage = Resident(parts[-1], None, lease.states, tuple(parts[:-1]), lease.shifts, lease.nearer)
    return replace(context, storage=storage)


def written(context: CompressedContext) -> set[object]:
    """The ways in which its own pairs are."""
    pairs = [pairs for layer in context.layers for pairs in (layer.keys, layer.values)]
    return {some.way if isinstance(some, Codes) else some.dtype for some in pairs}


def grown(engine: KVzipEngine, how: str) -> CompressedContext:
    if how == "joinable":
        return engine.load(TEXT, joinable=True)
    context = engine.load(TEXT)
    if how == "folded":
        session = engine.session(context)
        session.ask("Who?", max_new_tokens=3)
        return session.fold(keep=0)
    return {
        "loaded": lambda: context,
        "extended": lambda: engine.extend(context, SAID, share=False),
        "shared": lambda: engine.extend(context, SAID, share=True),
        "joined": lambda: engine.join([context, engine.load("The door code is 8306. " * 4, joinable=True)]),
        "in pieces": lambda: engine.extend(engine.extend(context, SAID, share=False), [*SAID, *SAID], share=False),
    }[how]()


HOW = ["loaded", "joinable", "extended", "shared", "folded", "joined", "in pieces"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("codec", NARROW)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_what_the_same_numbers_at_full_width_are(architecture: str, codec: str, how: str) -> None:
    for ratio in (1.0, 0.4):
        engine = tiny_engine(architecture, ratio=ratio, codec=codec)
        context = grown(engine, how)
        ids = engine.prompt_ids(context, "Who carries oil?")
        torch.testing.assert_close(engine.logits(context, ids), engine.logits(widened(context), ids), atol=1e-4, rtol=1e-4)
        with context.lease() as lease:
            assert {type(layer.keys) for part in lease.parts for layer in part} == {torch.Tensor if codec == "fp16" else Codes}
        spans = [(0, 20), (20, context.n_tokens)]
        [scores], [wide] = (engine.relevance([(each, spans)], "Who?", "Ana") for each in (context, widened(context)))
        torch.testing.assert_close(scores, wide, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("codec", NARROW)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fewer_bytes_are_near(architecture: str, codec: str) -> None:
    engine, plain = tiny_engine(architecture, ratio=1.0, codec=codec), tiny_engine(architecture, ratio=1.0)
    context, expected = engine.load(TEXT), plain.load(TEXT)
    ids = engine.prompt_ids(context, "Who carries oil?")
    found, wanted = engine.logits(context, ids), plain.logits(expected, ids)
    assert 0 < (found - wanted).norm() < {"fp16": 0.002, "int8": 0.03, "k8v4": 0.2, "int4": 0.4}[codec] * wanted.norm()
    assert context.nbytes < {"fp16": 0.6, "int8": 0.45, "k8v4": 0.4, "int4": 0.35}[codec] * expected.nbytes
    assert context.key != expected.key
    assert context.identity["codec"] == codec
    assert (f"as '{codec}'" in repr(context)) == (codec != "fp16")
    assert "codec" not in expected.identity


@pytest.mark.parametrize("codec", NARROW)
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_takes_it(kind: str, codec: str) -> None:
    """Latents, chunks, states and all."""
    engine = KVzipEngine(tiny_family(kind), tiny_tokenizer(), ratio=0.5, codec=codec)
    context = engine.load(TEXT)
    ids = engine.prompt_ids(context, "Who?")
    torch.testing.assert_close(engine.logits(context, ids), engine.logits(widened(context), ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("codec", NARROW)
def test_it_is_saved_opened_stored_and_found_bit_by_bit(codec: str, how: str, tmp_path: Path) -> None:
    engine = tiny_engine("gemma3", ratio=0.5, codec=codec, cache_dir=tmp_path / "cache")
    context = grown(engine, how)
    ids = engine.prompt_ids(context, "Who?")
    expected = engine.logits(context, ids)
    opened = tiny_engine("gemma3").open(context.save(tmp_path / "saved.safetensors"))
    assert torch.equal(tiny_engine("gemma3").logits(opened, ids), expected)
    engine.registry.flush()
    for entry in engine.registry.contexts():
        with engine.registry._memory.changed:
            for held in engine.registry._memory.here(entry.key):
                engine.registry._memory.drop(held)
    assert torch.equal(engine.logits(context, ids), expected)
    again = tiny_engine("gemma3", ratio=0.5, codec=codec, cache_dir=tmp_path / "cache")
    assert torch.equal(again.logits(again.get(context.key), ids), expected)
    other = tiny_engine("gemma3", ratio=0.5, cache_dir=tmp_path / "cache")  # finds it by its key, and not by its text
    assert torch.equal(other.logits(other.get(context.key), ids), expected)
    receipt = other.load(TEXT).receipt
    assert receipt is not None
    assert not receipt.hit
    for entry in engine.registry.contexts():
        lose(engine, entry.key)
    if how != "folded":  # whose pairs were computed one by one
        torch.testing.assert_close(engine.logits(context, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codec", NARROW)
def test_a_cut_is_what_a_build_gives(codec: str) -> None:
    engine = tiny_engine(ratio=0.8, codec=codec, refit="none")
    engine.load(TEXT)
    cut = engine.load(TEXT, ratio=0.4)
    assert cut.receipt is not None
    assert cut.receipt.shrunk_from == 0.8
    built = tiny_engine(ratio=0.4, codec=codec, refit="none").load(TEXT)
    assert cut.key == built.key
    assert same_pairs(cut, built)


@pytest.mark.parametrize("codec", NARROW)
def test_a_prompts_beginning_is_one_of_the_same_codec(codec: str) -> None:
    engine = tiny_engine(ratio=1.0, codec=codec)
    context = engine.load([{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}])
    prompt = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}, *SAID]
    assert engine.generate(None, prompt, max_new_tokens=1).receipt.key == context.key


@pytest.mark.parametrize(("codec", "stays"), [("fp16", True), ("int8", False), ("k8v4", False), ("int4", False)])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_numbers_too_large_for_16_bits_are_what_they_are(ratio: float, codec: str, stays: bool, tmp_path: Path) -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e5)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    engine = KVzipEngine(model, tiny_tokenizer(), ratio, codec=codec, refit="none")
    context = engine.load(TEXT)
    as_they_are = [isinstance(values := layer.values, torch.Tensor) and values.dtype is torch.float32 for layer in context.layers]
    assert as_they_are == [stays and number == 1 for number in range(len(context.layers))]
    ids = engine.prompt_ids(context, "Who?")
    torch.testing.assert_close(engine.logits(context, ids), engine.logits(widened(context), ids), atol=1e-4, rtol=1e-4)
    grown = engine.extend(context, SAID, share=False)
    assert engine.logits(grown, ids).isfinite().all()
    opened = engine.open(grown.save(tmp_path / "saved.safetensors"))
    assert torch.equal(engine.logits(opened, ids), engine.logits(grown, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_is_as_it_is_without(dtype: torch.dtype) -> None:
    def load(**options: Any) -> CompressedContext:
        return KVzipEngine(tiny_model().to(dtype), tiny_tokenizer(), 0.5, **options).load(TEXT)

    assert load(codec="fp16").key == load(codec="none").key == load().key


@pytest.mark.parametrize(("attention", "dtype", "codec"), [("cpu", torch.float32, "fp16"), ("cpu", torch.float64, None)])
def test_what_auto_is(attention: str, dtype: torch.dtype, codec: str | None) -> None:
    engine = KVzipEngine(tiny_model().to(dtype), tiny_tokenizer(), 0.5, attention=attention)
    assert engine.load(TEXT).identity.get("codec") == codec


def test_it_is_that_of_the_model_as_it_is_now(tmp_path: Path) -> None:
    engine = tiny_engine(ratio=0.5, codec="auto", cache_dir=tmp_path)
    for dtype, codec in ((torch.float32, "fp16"), (torch.bfloat16, None), (torch.float64, None), (torch.float32, "fp16")):
        engine.model.to(dtype)
        context = engine.load(TEXT)
        assert context.identity.get("codec") == codec
        assert {layer.keys.dtype for layer in context.layers} == {torch.float16 if codec else dtype}
        engine.registry.flush()
        fresh = KVzipEngine(engine.model, tiny_tokenizer(), 0.5, cache_dir=tmp_path).load(TEXT).receipt
        assert fresh is not None
        assert fresh.hit


@pytest.mark.parametrize("codec", NARROW)
def test_what_a_join_reads_again_is_written_so_too(codec: str) -> None:
    engine = tiny_engine(ratio=1.0, codec=codec)
    a, b = engine.load(TEXT), engine.load("The door code is 8306. " * 9)
    join = engine.join([a, b], repair=10_000)
    assert written(join) == written(a)
    small = tiny_engine(ratio=1.0, codec=codec, device_bytes=a.nbytes + b.nbytes + join.nbytes * 3 // 4)
    a, b = small.load(TEXT), small.load("The door code is 8306. " * 9)
    with pytest.raises(BudgetError, match="the context takes about"):
        small.join([a, b], repair=10_000)


@pytest.mark.parametrize("ratios", [(0.5, 0.4), (1.0, 0.4), (1.0, 1.0)])
@pytest.mark.parametrize("then", sorted(CODECS))
@pytest.mark.parametrize("of", sorted(CODECS))
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_grows_is_of_the_engines_codec(architecture: str, of: str, then: str, ratios: tuple[float, float], tmp_path: Path) -> None:
    """A parent's codes stay what they are where the codec is the same, and its numbers what rounding leaves of them where it is not."""
    engine = tiny_engine(architecture, codec=then)
    parent = engine.open(tiny_engine(architecture, codec=of).load(TEXT, ratio=ratios[0]).save(tmp_path / "saved.safetensors"))
    grown = engine.extend(parent, SAID, share=False, ratio=ratios[1])
    assert written(grown) == written(engine.load(TEXT, ratio=ratios[1]))
    ids = engine.prompt_ids(grown, "Who carries oil?")
    torch.testing.assert_close(engine.logits(grown, ids), engine.logits(widened(grown), ids), atol=1e-4, rtol=1e-4)
    if of != then or ratios == (1.0, 0.4):  # of which some are fitted
        return
    for old, new in zip(parent.layers, grown.layers, strict=True):
        for head in range(old.n_heads):
            before = {int(at): row for row, at in enumerate(old.positions_of(head))}
            rows = [(before[int(at)], row) for row, at in enumerate(new.positions_of(head)) if int(at) in before]
            assert rows
            theirs, ours = torch.tensor(rows).T
            for one, other in zip(old.head(head), new.head(head), strict=True):
                for x, y in zip(tensors_of(one), tensors_of(other), strict=True):
                    assert torch.equal(x[theirs], y[ours])


@pytest.mark.parametrize("odd", ["fp8", "", None, 16, CODECS["fp16"]])
def test_an_unknown_codec_is_refused(odd: object) -> None:
    makers: list[Callable[[], object]] = [
        lambda: tiny_engine(codec=odd),
        lambda: KVzipEngine.from_pretrained("nowhere", codec=odd),  # type: ignore[arg-type]
    ]
    for make in makers:
        with pytest.raises(InputError, match="is unknown; use one of auto, fp16, int4, int8, k8v4, none"):
            make()


def test_an_attention_that_does_not_read_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    saved = tiny_engine(ratio=0.5, codec="fp16").load(TEXT).save(tmp_path / "saved.safetensors")
    with pytest.raises(InputError, match=r"codec='fp16' takes an attention that reads such pairs"):
        tiny_engine(attention="triton", codec="fp16")
    with pytest.raises(InputError, match=r"use attention='cpu'"):
        tiny_engine(attention="triton").open(saved)
    given, engine = tiny_engine(ratio=0.5, codec="fp16").load(TEXT), tiny_engine(attention="triton")
    ids = engine.prompt_ids(given, "Who?")
    for attempt in (
        lambda: engine.logits(given, ids),
        lambda: engine.session(given).ask("Who?", max_new_tokens=1),
        lambda: engine.generate(given, "Who?", max_new_tokens=1),
        lambda: engine.extend(given, SAID, share=True),
        lambda: engine.extend(given, SAID, share=False),
        lambda: engine.join([given, given]),
        lambda: engine.relevance([(given, [(0, 9)])], "Who?", ""),
    ):
        with pytest.raises(InputError, match=r"are torch.float16, which attention 'triton' does not read"):
            attempt()
    assert engine.registry.contexts() == []


@pytest.mark.parametrize("codec", NARROW)
def test_the_reference_reads_it(codec: str) -> None:
    reference = tiny_engine(ratio=0.5, codec=codec, attention="reference")
    context = reference.load(TEXT)
    ids = reference.prompt_ids(context, "Who?")
    torch.testing.assert_close(reference.logits(context, ids), tiny_engine().logits(widened(context), ids), atol=1e-4, rtol=1e-4)
