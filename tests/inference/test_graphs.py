"""Decode steps over static tensors: equal to eager ones, and made once whoever comes and goes.

A step is a function that a GPU captures and replays; here it is called. What a replay sees is the same: only its tables and
inputs change.
"""

from typing import Any

import pytest
import torch

from conftest import TEXT, row_over, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.graphs import CaptureError, DecodeSteps, Step

pytest.importorskip("triton", reason="triton has no wheel for this platform")
import tables


def static(engine: KVzipEngine, kernels: Any = tables) -> DecodeSteps:
    """Let an engine decode by static steps."""
    steps = DecodeSteps(engine.model, engine._model.windows, kernels)
    engine._model._steps = steps
    return steps


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def engines(request: pytest.FixtureRequest) -> tuple[KVzipEngine, KVzipEngine, list[CompressedContext]]:
    """One that decodes by static steps, one that does not, and contexts both can use."""
    model = tiny_model(request.param)
    one, other = (KVzipEngine(model, tiny_tokenizer(), 0.5, codec="none") for _ in range(2))
    contexts = [one.load(TEXT), one.load("Nothing is known of the lamp.")]
    static(one)
    return one, other, contexts


def feed(engine: KVzipEngine, rows: list[Row], ids: list[list[int]]) -> torch.Tensor:
    return torch.cat(engine._model.forward(rows, ids))


def test_static_steps_compute_what_eager_ones_do(engines: tuple[KVzipEngine, KVzipEngine, list[CompressedContext]]) -> None:
    """Rows on one context, on two and on none, which join, leave and fill their tails' buffers."""
    one, other, (first, second) = engines
    contexts = [first, None, second, first, first]
    rows, twins = ([row_over(context) for context in contexts] for _ in range(2))
    ids = [[5, 6, 7], [9], [4, 4], [20] * 60, [8]]
    feed(one, rows, ids)
    feed(other, twins, ids)
    steps = static(one)
    for present in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [3], [4, 0, 2], [2, 4, 0], *[[0, 1, 2, 3]] * 6, [3, 1, 2, 0, 4]):
        tokens = [[int(torch.randint(3, 250, ()))] for _ in present]
        got, expected = feed(one, [rows[b] for b in present], tokens), feed(other, [twins[b] for b in present], tokens)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert steps.captured == [(1, 1), (4, 1), (8, 1)]


def test_static_steps_of_several_tokens(engines: tuple[KVzipEngine, KVzipEngine, list[CompressedContext]]) -> None:
    """Guesses that are checked, a different number in each row, and taken back as far as they were wrong."""
    one, other, (first, second) = engines
    contexts = [first, second, None, first]
    rows, twins = ([row_over(context) for context in contexts] for _ in range(2))
    feed(one, rows, [[5]] * 4)
    feed(other, twins, [[5]] * 4)
    steps = static(one)
    for counts in ([2, 1, 5, 1], [1, 1, 1, 1], [7, 8, 1, 3], [1, 16, 2, 4]):
        ids = [torch.randint(3, 250, (count,)).tolist() for count in counts]
        for got, expected in zip(one._model.forward(rows, ids, 4), other._model.forward(twins, ids, 4), strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        for row, count in zip([*rows, *twins], counts * 2, strict=True):
            row.tail.crop(row.tail.length - count // 2)
    assert steps.captured == [(4, 1), (4, 8), (4, 16)]
    ids = [[7] * 17] * 4  # too many for a step
    torch.testing.assert_close(feed(one, rows, ids), feed(other, twins, ids), atol=2e-5, rtol=1e-4)
    assert steps.captured == [(4, 1), (4, 8), (4, 16)]


def test_rows_of_several_parts(engines: tuple[KVzipEngine, KVzipEngine, list[CompressedContext]]) -> None:
    """Some shared with others, in the same place or in another; others come and go."""
    one, other, (first, second) = engines
    a, b = first.layers, second.layers
    whole = first.n_tokens + second.n_tokens
    kinds = [(b, (a,)), (a, ()), ((), ()), (a, (b,)), (b, (a,)), (b, (a, a)), (b, ())]
    rows, twins = ([Row(own, whole if own else 0, Tail(), before=before) for own, before in kinds] for _ in range(2))
    feed(one, rows, [[5]] * len(rows))
    feed(other, twins, [[5]] * len(rows))
    steps = static(one)
    for chosen in ([*range(7)], [0, 4], [1, 2], [6, 5, 0, 4], [*range(7)]):
        ids = [torch.randint(3, 250, (1,)).tolist() for _ in chosen]
        got, expected = feed(one, [rows[i] for i in chosen], ids), feed(other, [twins[i] for i in chosen], ids)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert steps.captured == [(2, 1), (4, 1), (8, 1)]


def test_in_tritons_interpreter() -> None:
    """The same through the kernels themselves, from the engine's own choice on."""
    model = tiny_model(num_hidden_layers=1)
    one, other = (KVzipEngine(model, tiny_tokenizer(), 0.5, attention=name, codec="none") for name in ("triton", "reference"))
    assert one.stats()["attention"] == "triton"
    context = other.load(TEXT)
    rows, twins = ([row_over(context), row_over(None), row_over(context)] for _ in range(2))
    for ids in ([[5, 6], [7], [8]], [[9], [10], [11]], [[12, 15], [13], [14]]):
        torch.testing.assert_close(feed(one, rows, ids), feed(other, twins, ids), atol=2e-5, rtol=1e-4)
    assert one._model._steps is not None
    assert one._model._steps.captured == [(4, 1), (4, 2)]


def test_a_thousand_tokens_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured again while the tail doubles from 64 to 1,024, and tables are written only then."""
    engine = KVzipEngine(tiny_model(num_hidden_layers=1), tiny_tokenizer(), 0.5, codec="none")
    context = engine.load(TEXT)
    row, twin = row_over(context), row_over(context)
    feed(engine, [row], [[5, 6]])
    feed(engine, [twin], [[5, 6]])
    steps = static(engine)
    written: list[int] = []
    original = tables.plan
    monkeypatch.setattr(tables, "plan", lambda *args: written.append(row.tail.capacity) or original(*args))
    ids = torch.randint(3, 250, (1000,)).tolist()
    for token in ids:
        last = feed(engine, [row], [[token]])
    assert steps.captured == [(1, 1)]
    assert written == [64, 128, 256, 512, 1024]
    engine._model._steps = None
    torch.testing.assert_close(last, feed(engine, [twin], [ids]), atol=1e-4, rtol=1e-3)


def test_a_tail_that_moves_to_another_context_reads_that_one() -> None:
    """Tables are rewritten for it, though rows and tails are the same."""
    engine = tiny_engine()
    context, smaller = engine.load(TEXT), engine.load(TEXT, ratio=0.1)
    static(engine)
    tail = Tail()
    feed(engine, [row_over(context, tail)], [[5, 6]])
    feed(engine, [row_over(context, tail)], [[7]])
    tail.crop(2)
    got = feed(engine, [row_over(smaller, tail)], [[7]])
    engine._model._steps = None
    tail.crop(2)
    torch.testing.assert_close(got, feed(engine, [row_over(smaller, tail)], [[7]]), atol=2e-5, rtol=1e-4)


def test_weights_that_were_replaced_are_seen() -> None:
    engine = tiny_engine()
    row, twin = row_over(None), row_over(None)
    steps = static(engine)
    feed(engine, [row], [[5, 6]])
    feed(engine, [row], [[7]])
    before = steps._batches[1, 1, 1]
    engine.model.model.embed_tokens.weight = torch.nn.Parameter(engine.model.model.embed_tokens.weight * 2)
    feed(engine, [twin], [[5, 6]])
    feed(engine, [twin], [[7]])
    assert steps._batches[1, 1, 1] is not before


def test_a_tail_never_written_is_fed_without_a_step() -> None:
    engine = tiny_engine()
    steps = static(engine)
    row = row_over(None)
    feed(engine, [row], [[5]])
    assert (steps.captured, row.tail.length) == ([], 1)
    feed(engine, [row], [[6]])
    assert (steps.captured, row.tail.length) == ([(1, 1)], 2)


def test_answers_through_static_steps_are_the_same(engines: tuple[KVzipEngine, KVzipEngine, list[CompressedContext]]) -> None:
    one, other, (context, _) = engines
    ours, theirs = one.session(context), other.session(context)
    for question in ("Who carries oil?", "And the code?"):
        assert ours.ask(question, max_new_tokens=20).text == theirs.ask(question, max_new_tokens=20).text
    ours.reset()
    theirs.reset()
    assert ours.ask("Again?", max_new_tokens=8).text == theirs.ask("Again?", max_new_tokens=8).text


def test_a_model_that_cannot_be_captured_is_run_without_graphs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuses(self: Step) -> torch.Tensor:
        raise CaptureError("operation not permitted when stream is capturing")

    engine = tiny_engine()
    row, twin = row_over(None), row_over(None)
    feed(engine, [twin], [[5, 6]])
    expected = [feed(engine, [twin], [[token]]) for token in (7, 8)]
    static(engine)
    monkeypatch.setattr(Step, "run", refuses)
    feed(engine, [row], [[5, 6]])
    for token, logits in zip((7, 8), expected, strict=True):
        torch.testing.assert_close(feed(engine, [row], [[token]]), logits)
    assert len(caplog.messages) == 1
    assert "without CUDA graphs" in caplog.messages[0]


def test_graphs_are_dropped_when_an_adapter_is_switched() -> None:
    engine = tiny_engine()
    steps = static(engine)
    module = engine.model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    module.active_adapters = ["a"]  # type: ignore[union-attr]
    engine.generate(None, "Who?", max_new_tokens=4, speculate=False)
    before = steps._batches[1, 1, 1]
    engine.generate(None, "Who?", max_new_tokens=4, speculate=False)
    assert steps._batches[1, 1, 1] is before
    module.active_adapters = ["b"]  # type: ignore[union-attr]
    engine.generate(None, "Who?", max_new_tokens=4, speculate=False)
    assert steps._batches[1, 1, 1] is not before
