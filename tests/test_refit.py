"""Values that are refitted: what changes, what never does, and that what changes is what the formula says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TEXT, tiny_engine
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.compression.refit import LayerPairs, NoRefit, RidgeRefit
from kvzip_memory.compression.rows import Block, Rows

KEPT = "8306"


def a_layer(seed: int = 0, m: int = 40, kept: int = 12, rows: int = 96, dtype: torch.dtype = torch.float32) -> LayerPairs:
    """One layer of two heads with a protected head of three pairs and one block; the second pair is pinned."""
    make = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=make)  # noqa: E731
    keep = torch.stack([torch.randperm(m, generator=make) < kept - 4 * head for head in range(2)])
    pinned = torch.zeros(m, dtype=torch.bool)
    pinned[1] = True
    keep[:, 1] = True
    head = (randn(2, 3, 8).to(dtype), randn(2, 3, 8).to(dtype))
    return LayerPairs(
        head, 3, randn(2, m, 8).to(dtype), randn(2, m, 8).to(dtype), keep, pinned, [Block(3, 3 + m, randn(2, rows, 8), 0.5)], 0.3
    )


def residual(pairs: LayerPairs, values: torch.Tensor, head: int) -> torch.Tensor:
    """What attention over the kept pairs with these values lacks, ``[R, D]`` float64; all of it written down anew."""
    (block,) = pairs.blocks
    keys = torch.cat([pairs.head[0][head], pairs.keys[head]]).double()
    original = torch.cat([pairs.head[1][head], pairs.values[head]]).double()
    changed = torch.cat([pairs.head[1][head], values[head]]).double()
    logits = block.queries[head].double() @ keys.T * block.scaling
    kept = torch.cat([torch.ones(3, dtype=torch.bool), pairs.keep[head]])
    return logits.softmax(-1) @ original - logits.masked_fill(~kept, -torch.inf).softmax(-1) @ changed


@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_the_formula(seed: int) -> None:
    """Oracle: each lambda by a general solver in float64, over the unpinned kept pairs of one head at a time."""
    pairs, refit = a_layer(seed), RidgeRefit(lambdas=(1.0, 0.01))
    fitted = refit.values(pairs)
    (block,) = pairs.blocks
    run = torch.arange(block.queries.shape[1]) // 8
    unseen = run % 4 == 3
    for head in range(2):
        free = pairs.keep[head] & ~pairs.pinned
        missing = residual(pairs, pairs.values, head)
        keys = torch.cat([pairs.head[0][head], pairs.keys[head]]).double()
        kept = torch.cat([torch.ones(3, dtype=torch.bool), pairs.keep[head]])
        logits = block.queries[head].double() @ keys.T * block.scaling
        attention = logits.masked_fill(~kept, -torch.inf).softmax(-1)[:, 3:][:, free]
        mean = attention.square().sum(0).mean()
        prior = 10.0 * missing.square().sum(1).mean() / pairs.values[head].double().square().sum(1).mean()

        def solved(rows: torch.Tensor, weight: torch.Tensor, a: torch.Tensor = attention, r: torch.Tensor = missing) -> torch.Tensor:
            return torch.linalg.lstsq(
                torch.cat([a[rows], weight.sqrt() * torch.eye(a.shape[1]).double()]),
                torch.cat([r[rows], r.new_zeros(a.shape[1], r.shape[1])]),
            ).solution

        errors = {0.0: missing[unseen].square().sum()}
        for weight in (1.0, 0.01):
            errors[weight] = (missing - attention @ solved(~unseen, weight * mean + prior))[unseen].square().sum()
        best = min(errors, key=lambda weight: float(errors[weight]))
        change = solved(unseen | ~unseen, best * mean + prior) if best else torch.zeros(int(free.sum()), 8).double()
        torch.testing.assert_close((fitted - pairs.values)[head, free].double(), change, atol=1e-4, rtol=1e-3)
        assert residual(pairs, fitted, head).square().sum() <= missing.square().sum()


def test_what_is_pinned_or_lost_is_left_alone() -> None:
    pairs = a_layer()
    changed = (RidgeRefit().values(pairs) != pairs.values).any(-1)
    assert changed.any()
    assert not changed[~pairs.keep].any()
    assert not changed[:, pairs.pinned].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_head_that_cannot_be_fitted_keeps_its_values(value: float) -> None:
    pairs = a_layer()
    pairs.blocks[0].queries[0] = value
    fitted = RidgeRefit().values(pairs)
    assert torch.equal(fitted[0], pairs.values[0])
    assert not torch.equal(fitted[1], pairs.values[1])


@pytest.mark.parametrize("size", [1, 7, 128, 200, 2048])
def test_rows_are_in_one_order_in_whatever_pieces_they_come(size: int) -> None:
    """The fit holds some out by their number; how long pieces are depends on the device, and on whether answers run."""
    queries, opening = torch.randn(2, 3, 300, 8, generator=torch.Generator().manual_seed(0)), 11
    whole, pieces = Rows(4), Rows(4)
    whole.take(0, 0, 289, queries, 0.5, -opening)
    for start in range(0, 300, size):
        pieces.take(0, 0, 289, queries[:, :, start : start + size], 0.5, start - opening)
    assert torch.equal(whole.pop(0)[0].queries, pieces.pop(0)[0].queries)


def test_rows_are_taken_by_position_and_others_for_each_query_head() -> None:
    queries = torch.arange(2 * 40, dtype=torch.float32).view(1, 2, 40, 1)
    pieces, whole = Rows(16), Rows(16)
    whole.take(0, 0, 36, queries, 1.0, -4)
    for start in (0, 7, 25):
        end = {0: 7, 7: 25, 25: 40}[start]
        pieces.take(0, 0, 36, queries[:, :, start:end], 1.0, start - 4)
    (one,), (other,) = whole.pop(0), pieces.pop(0)
    assert sorted(one.queries[0, :, 0].tolist()) == sorted(other.queries[0, :, 0].tolist())
    taken = one.queries[0, :, 0].tolist()
    assert [t for t in taken if t < 40] == [0, 1, 2, 3, 4, 20, 36]
    assert [t - 40 for t in taken if t >= 40] == [0, 1, 2, 3, 12, 28]
    assert whole.pop(0) == []  # they are let go


def parts(context: CompressedContext) -> list[dict[str, Any]]:
    return [
        {"keys": layer.keys, "values": layer.values, "positions": layer.positions, "lengths": layer.lengths, "scores": layer.scores}
        for layer in context.layers
    ]


def test_only_values_of_new_pairs_that_are_not_pinned_change(architecture: str) -> None:
    plain, fitted = tiny_engine(architecture, refit="none"), tiny_engine(architecture)
    before, after = (engine.load(TEXT, ratio=0.4, keep=KEPT) for engine in (plain, fitted))
    changed = 0
    for layer, one, other in zip(before.layers, parts(before), parts(after), strict=True):
        values, fit = one.pop("values"), other.pop("values")
        assert one.keys() == other.keys()
        for name in one:
            equal = torch.equal if isinstance(one[name], torch.Tensor) else lambda a, b: a == b
            assert equal(one[name], other[name]), name
        pinned = torch.zeros(before.n_tokens, dtype=torch.bool)
        for start, end in ((0, before.protected), *plain._contexts.prompt(plain._language, TEXT, keep=[KEPT]).keep):
            pinned[start:end] = True
        if layer.window is not None:
            assert torch.equal(values, fit)
        else:
            assert torch.equal(values[pinned[layer.positions.long()]], fit[pinned[layer.positions.long()]])
            changed += int((values != fit).any(1).sum())
        assert fit.isfinite().all()
    assert changed


def test_values_without_refit_are_those_the_model_computed(architecture: str) -> None:
    engine = tiny_engine(architecture, refit="none")
    whole, context = engine.load(TEXT, ratio=1.0), engine.load(TEXT, ratio=0.4)
    for dense, layer in zip(whole.layers, context.layers, strict=True):
        if layer.window is None:
            rows = layer.heads() * whole.n_tokens + layer.positions.long()
            assert torch.equal(layer.values, dense.values[rows])
            assert torch.equal(layer.keys, dense.keys[rows])


def test_a_key_says_how_values_were_refitted_and_nothing_where_they_were_not() -> None:
    fitted, plain = tiny_engine().load(TEXT, ratio=0.4), tiny_engine(refit="none").load(TEXT, ratio=0.4)
    assert fitted.identity["refit"] == RidgeRefit().identity()
    assert {field: value for field, value in fitted.identity.items() if field != "refit"} == plain.identity
    assert NoRefit().identity() is None
    assert tiny_engine().load(TEXT, ratio=1.0).identity == tiny_engine(refit="none").load(TEXT, ratio=1.0).identity


def test_it_is_the_same_each_time() -> None:
    torch.manual_seed(1)
    one = tiny_engine().load(TEXT, ratio=0.4)
    torch.manual_seed(2)
    other = tiny_engine().load(TEXT, ratio=0.4)
    for layer, again in zip(one.layers, other.layers, strict=True):
        assert torch.equal(layer.values, again.values)


def growths(engine: KVzipEngine) -> dict[str, tuple[CompressedContext, CompressedContext]]:
    """Parents and their children, by every way in which a context grows."""
    parent = engine.load([{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Thank you."}], ratio=0.4)
    more = [{"role": "user", "content": TEXT[:300]}, {"role": "assistant", "content": "So it is."}]
    session = engine.session(parent)
    session.ask("Who carries the oil to the lamp of the tower?", max_new_tokens=40)
    return {"extend": (parent, engine.extend(parent, more)), "fold": (parent, session.fold(0))}


@pytest.mark.parametrize("way", ["extend", "fold"])
def test_a_refit_is_never_refitted(architecture: str, way: str) -> None:
    """What a parent's kept pairs say they say in the child, too."""
    parent, child = growths(tiny_engine(architecture))[way]
    new = 0
    for before, after in zip(parent.layers, child.layers, strict=True):
        if before.window is not None:
            continue
        old = dict(zip(zip(before.heads().tolist(), before.positions.tolist(), strict=True), before.values, strict=True))
        for head, position, value in zip(after.heads().tolist(), after.positions.tolist(), after.values, strict=True):
            if position < parent.n_tokens:
                assert torch.equal(value, old[head, position])
            else:
                new += 1
    assert new


@pytest.mark.parametrize("way", ["extend", "fold"])
def test_contexts_and_receipts_say_what_values_were_fitted_to(architecture: str, way: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, cache_dir=tmp_path)
    parent, child = growths(engine)[way]
    assert parent.fitted == ((parent.protected, parent.n_tokens),)
    assert child.fitted == (*parent.fitted, (parent.n_tokens, child.n_tokens))
    saved = child.save(tmp_path / "child.safetensors")
    engine.close()
    later = tiny_engine(architecture, cache_dir=tmp_path)
    for again in (later.get(child.key), later.open(saved)):
        assert again.fitted == child.fitted
    for context in (parent, child, later.open(saved)):
        assert context.receipt is not None
        assert context.receipt.fitted == context.fitted
    for again in (later.get(child.key), later.open(saved)):
        assert later.generate(again, "Who?", max_new_tokens=2).receipt.fitted == child.fitted


def test_what_was_not_fitted_says_so() -> None:
    assert tiny_engine(refit="none").load(TEXT, ratio=0.4).fitted == ()
    engine = tiny_engine()
    whole = engine.load(TEXT, ratio=1.0)
    assert whole.fitted == ()
    more = engine.extend(whole, TEXT[:300], ratio=0.4)
    assert more.fitted == ((more.protected, more.n_tokens),)  # ranked and fitted as one text
    assert engine.extend(more, "The boat is called Petrel. " * 9, ratio=1.0).fitted == more.fitted
    pieces = tiny_engine(compress_every=100).load(TEXT, ratio=0.4)
    assert [start for start, _ in pieces.fitted] == [pieces.protected, *(end for _, end in pieces.fitted[:-1])]
    assert len(pieces.fitted) == 3


TEXTS = {
    "a paragraph twenty times": TEXT[:70] * 20,
    "a table of equal rows": "| lamp | oil | 8306 |\n" * 60,
    "a page of one character": "a" * 900,
    "nearly nothing": "Oil.",
}


@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.1])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_repeat_themselves_stay_finite(text: str, ratio: float) -> None:
    engine = tiny_engine()
    context = engine.load(TEXTS[text], ratio=ratio)
    assert all(layer.values.isfinite().all() for layer in context.layers)
    assert engine.logits(context, engine.prompt_ids(context, "What?")).isfinite().all()
