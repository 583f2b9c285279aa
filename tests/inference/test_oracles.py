"""What a model computes through our attention equals what transformers computes for the same question."""

import pytest
import torch

from conftest import TEXT, masked_logits, own_logits, row_over, tiny_engine, tiny_model
from kvzip_memory import KVzipEngine
from kvzip_memory.attention import BACKENDS, RowKV, Softmax

QUESTION = "Which day does the donkey carry oil?"


def test_at_ratio_1_logits_equal_transformers_own(architecture: str) -> None:
    engine = tiny_engine(architecture)
    context = engine.load(TEXT, ratio=1.0)
    ids = engine.prompt_ids(context, QUESTION)
    torch.testing.assert_close(engine.logits(context, ids), own_logits(engine, context, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio", [0.6, 0.25])
def test_below_ratio_1_logits_equal_dense_attention_with_evicted_pairs_masked(architecture: str, ratio: float) -> None:
    engine = tiny_engine(architecture)
    context = engine.load(TEXT, ratio=ratio)
    ids = engine.prompt_ids(context, QUESTION)
    ours = engine.logits(context, ids)
    torch.testing.assert_close(ours, masked_logits(engine, context, ids), atol=1e-4, rtol=0)
    assert (ours - own_logits(engine, context, ids)).abs().max() > 0.01  # eviction shows: the oracle is not vacuous


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_rows_of_a_batch_equal_each_row_alone(architecture: str, backend: str) -> None:
    engine = tiny_engine(architecture)
    engine._model._backend = BACKENDS[backend]
    first, second = engine.load(TEXT, ratio=0.3), engine.load("Another page. " * 9, ratio=0.7)
    contexts = [first, second, None, first]  # two rows share one context, one has none
    parts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [3, 4], [14]]
    more = [[20], [21, 22], [23, 24, 25, 26], [27, 28]]
    rows = [row_over(context) for context in contexts]
    before = engine._model.forward(rows, parts, n_logits=99)
    after = engine._model.forward(rows, more, n_logits=99)
    for context, a, b, logits_a, logits_b in zip(contexts, parts, more, before, after, strict=True):
        alone = masked_logits(engine, context, a + b) if context else own_tail_logits(engine, a + b)
        torch.testing.assert_close(torch.cat([logits_a, logits_b]), alone, atol=1e-4, rtol=0)


def own_tail_logits(engine: KVzipEngine, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return engine.model(input_ids=torch.tensor([ids])).logits[0].float()


def test_a_long_tail_slides_out_of_a_sliding_layers_window() -> None:
    engine = tiny_engine("gemma3")
    context = engine.load(TEXT, ratio=0.4)
    ids = [3 + i % 200 for i in range(90)]  # far more than the window of 32
    torch.testing.assert_close(engine.logits(context, ids), masked_logits(engine, context, ids), atol=1e-4, rtol=0)
    row = row_over(context)
    one_by_one = torch.cat([engine._model.forward([row], [[token]])[0] for token in ids])
    torch.testing.assert_close(one_by_one, engine.logits(context, ids), atol=1e-4, rtol=0)


def test_sliding_layers_keep_exactly_their_window() -> None:
    context = tiny_engine("gemma3").load(TEXT, ratio=0.4)
    for layer in context.layers:
        if layer.window is not None:
            assert layer.lengths == (layer.window.size - 1,) * layer.n_heads
            assert layer.positions[0] == context.n_tokens - (layer.window.size - 1)


def test_the_model_goes_on_working_for_others(architecture: str) -> None:
    plain, engine = tiny_model(architecture), tiny_engine(architecture)
    engine.load(TEXT, ratio=0.5)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.inference_mode():
        assert torch.equal(engine.model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert engine.model.generate(ids, max_new_tokens=8).tolist() == plain.generate(ids, max_new_tokens=8).tolist()


def test_an_attention_switched_after_the_engine_was_made_changes_nothing(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.4)
    ids = engine.prompt_ids(context, QUESTION)
    before = engine.logits(context, ids)
    engine.model.set_attn_implementation("eager")
    assert torch.equal(engine.logits(context, ids), before)


def test_float16_products_that_would_overflow_do_not() -> None:
    query, keys = torch.full((1, 2, 1, 64), 60.0).half(), torch.full((1, 3, 64), 60.0).half()
    row = RowKV((), keys, torch.ones(1, 3, 64).half(), 1, 0)
    out = BACKENDS["cpu"](query, [row], Softmax(0.125), None)  # 64 * 60 * 60 is beyond float16
    torch.testing.assert_close(out, torch.ones_like(out), atol=5e-3, rtol=0)


@pytest.mark.parametrize(("codec", "apart"), [("none", 1e-4), ("auto", 2e-2)])
def test_smollm2_at_ratio_1_equals_transformers_and_generates_the_same_64_tokens(
    codec: str, apart: float, smollm2: KVzipEngine, exact: KVzipEngine, excerpt: str
) -> None:
    engine = exact if codec == "none" else smollm2
    context = engine.load(excerpt, ratio=1.0)
    ids = engine.prompt_ids(context, "Write a long letter about the company.")
    torch.testing.assert_close(engine.logits(context, ids), own_logits(engine, context, ids), atol=apart, rtol=0)
    everything = torch.cat([context.token_ids.long(), torch.tensor(ids)])[None]
    theirs = engine.model.generate(everything, max_new_tokens=64, do_sample=False)[0, everything.shape[1] :]
    reply = engine.generate(context, "Write a long letter about the company.", max_new_tokens=64)
    assert reply.usage.output_tokens == 64
    assert reply.text == engine.tokenizer.decode(theirs, skip_special_tokens=True)


def test_smollm2_below_ratio_1_equals_masked_dense_attention(exact: KVzipEngine, excerpt: str) -> None:
    context = exact.load(excerpt)
    ids = exact.prompt_ids(context, "What is the telephone number of head office?")
    expected = masked_logits(exact, context, ids)
    torch.testing.assert_close(exact.logits(context, ids), expected, atol=1e-3, rtol=0)
