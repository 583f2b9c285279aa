"""Pairs that are refitted: what changes, what never does, and that what changes is what the formula says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.attention import Softmax
from kvzip_memory.compression.refit import LayerPairs, NoRefit, RidgeRefit
from kvzip_memory.compression.rows import Block, Rows

KEPT = "8306"


def a_layer(
    seed: int = 0, m: int = 40, kept: int = 12, rows: int = 96, dtype: torch.dtype = torch.float32, kind: str = "plain"
) -> LayerPairs:
    """One layer of two heads with a protected head of three pairs and one block; the second pair is pinned."""
    make = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    keep = torch.stack([torch.randperm(m, generator=make) < kept - 4 * head for head in range(2)])
    pinned = torch.zeros(m, dtype=torch.bool)
    pinned[1] = True
    keep[:, 1] = True
    head = (randn(2, 3, 8).to(dtype), randn(2, 3, 8).to(dtype))
    own = randn(2, m, 8).to(dtype), randn(2, m, 8).to(dtype)
    queries = randn(2, rows, 8).float()
    cap, sinks = 1.5 if "capped" in kind else None, 3 * randn(2, rows).float() if "sinks" in kind else None
    return LayerPairs(
        head,
        3,
        *own,
        keep,
        pinned,
        [Block(3, 3 + m, queries, 0.5, cap, sinks)],
        0.3,
        stored=lambda keys: keys,
    )


def fit(pairs: LayerPairs, refit: RidgeRefit | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a copy, for what a refit is given it may change."""
    return (refit or RidgeRefit()).fit(replace(pairs, keys=pairs.keys.clone(), values=pairs.values.clone()))


class Head(NamedTuple):
    """One head of a layer, all of it written down anew in float64: ``before`` is the protected head."""

    queries: torch.Tensor
    before: tuple[torch.Tensor, torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    keep: torch.Tensor
    free: torch.Tensor
    cap: float | None
    sinks: torch.Tensor | None

    @classmethod
    def of(cls, pairs: LayerPairs, head: int) -> Head:
        (block,) = pairs.blocks
        queries = block.queries[head].double() * block.scaling
        before = pairs.head[0][head].double(), pairs.head[1][head].double()
        keep = pairs.keep[head]
        sinks = None if block.sinks is None else block.sinks[head].double()
        own = pairs.keys[head].double(), pairs.values[head].double()
        return cls(queries, before, *own, keep, keep & ~pairs.pinned, block.cap, sinks)

    def logits(self, keys: torch.Tensor) -> torch.Tensor:
        """``[R, keys]``."""
        logits = self.queries @ keys.T
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def weights(self, keys: torch.Tensor) -> torch.Tensor:
        """``[R, p + m]``, over the protected head and all pairs."""
        return self.softmax(self.logits(torch.cat([self.before[0], keys])))

    def softmax(self, logits: torch.Tensor) -> torch.Tensor:
        if self.sinks is None:
            return logits.softmax(1)
        return torch.cat([logits, self.sinks.unsqueeze(1)], 1).softmax(1)[:, :-1]

    def lost(self, keys: torch.Tensor) -> torch.Tensor:
        """``[R]``: the logarithm of what all pairs weigh over what the kept ones do with these keys."""
        return self.logits(self.keys).logsumexp(1) - self.logits(keys[self.keep]).logsumexp(1)

    def share(self) -> torch.Tensor:
        """``[R]``: of all pairs in the attention."""
        return self.weights(self.keys)[:, len(self.before[0]) :].sum(1)

    def attention(self, keys: torch.Tensor) -> torch.Tensor:
        """``[R, p + m]``, over the protected head and the kept pairs."""
        seen = torch.cat([torch.ones(len(self.before[0]), dtype=torch.bool), self.keep])
        return self.softmax(self.logits(torch.cat([self.before[0], keys])).masked_fill(~seen, -torch.inf))

    def residual(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """``[R, D]``: what attention over the kept pairs lacks."""
        all_values = torch.cat([self.before[1], self.values])
        return self.weights(self.keys) @ all_values - self.attention(keys) @ torch.cat([self.before[1], values])


def ridge(rows: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``argmin |wanted - rows x|^2 + weight |x|^2``, by a general solver."""
    unit = weight.sqrt() * torch.eye(rows.shape[1]).double()
    return torch.linalg.lstsq(torch.cat([rows, unit]), torch.cat([wanted, wanted.new_zeros(len(unit), wanted.shape[1])])).solution


KINDS = ["plain", "capped", "sinks", "capped, with sinks"]


@pytest.mark.parametrize("most", [1.0, 0.05])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_of_the_formula(kind: str, seed: int, most: float) -> None:
    pairs, refit = a_layer(seed, kind=kind), RidgeRefit(most=most)
    fitted, _ = fit(pairs, refit)
    for number in range(2):
        head = Head.of(pairs, number)
        keys, weights = head.keys.clone(), head.share().sqrt().unsqueeze(1)
        for _ in range(refit.steps):
            logits = head.logits(keys)
            slope = torch.ones_like(logits) if head.cap is None else 1 - (logits / head.cap).square()
            attention = (logits.masked_fill(~head.keep, -torch.inf).softmax(1) * slope)[:, head.free]
            rows = weights * (attention.unsqueeze(2) * head.queries.unsqueeze(1)).flatten(1)  # [R, m * D]
            shift = ridge(rows, weights * refit.step * head.lost(keys).unsqueeze(1), refit.mu * rows.square().sum(1).mean())
            shift = shift.view(-1, keys.shape[1])
            bounds = most / (head.queries @ shift.T).abs().amax(0), head.keys.square().sum(1).mean().sqrt() / shift.norm(dim=1)
            shift *= torch.minimum(*bounds).clamp(max=1.0).unsqueeze(1)
            keys[head.free] += shift
        torch.testing.assert_close(fitted[number].double(), keys, atol=1e-4, rtol=1e-3)
        before, after = ((head.share() * head.lost(k).square()).sum() for k in (head.keys, keys))
        assert after < before


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_formula(kind: str, seed: int) -> None:
    """Each lambda, over the unpinned kept pairs of one head at a time, which have their new keys."""
    pairs, refit = a_layer(seed, kind=kind), RidgeRefit(lambdas=(1.0, 0.01))
    keys, fitted = fit(pairs, refit)
    (block,) = pairs.blocks
    unseen = torch.arange(block.queries.shape[1]) // 8 % 4 == 3
    for number in range(2):
        head, new_keys = Head.of(pairs, number), keys[number].double()
        missing, attention = head.residual(new_keys, head.values), head.attention(new_keys)[:, 3:][:, head.free]
        mean = attention.square().sum(0).mean()
        prior = 10.0 * missing.square().sum(1).mean() / head.values.square().sum(1).mean()
        errors = {0.0: missing[unseen].square().sum()}
        for weight in (1.0, 0.01):
            tried = ridge(attention[~unseen], missing[~unseen], weight * mean + prior)
            errors[weight] = (missing - attention @ tried)[unseen].square().sum()
        best = min(errors, key=lambda weight: float(errors[weight]))
        change = ridge(attention, missing, best * mean + prior) if best else torch.zeros(int(head.free.sum()), 8).double()
        torch.testing.assert_close((fitted - pairs.values)[number, head.free].double(), change, atol=1e-4, rtol=1e-3)
        assert head.residual(new_keys, fitted[number].double()).square().sum() <= missing.square().sum()


def test_values_are_fitted_to_keys_as_they_are_stored() -> None:
    """A codec rounds keys; what comes out is rounded, and the values are those for such keys."""
    pairs = a_layer()
    rounded = replace(pairs, stored=lambda keys: keys.half().float().round(decimals=1))
    keys, values = fit(rounded)
    (exact, _), head = fit(pairs), Head.of(pairs, 0)
    assert torch.equal(keys[0, head.free], rounded.stored(exact)[0, head.free])
    lacks = head.residual(keys[0].double(), values[0].double()).square().sum()
    assert lacks < head.residual(keys[0].double(), head.values).square().sum()


def test_what_is_pinned_or_lost_is_left_alone() -> None:
    pairs = a_layer()
    for fitted, original in zip(fit(pairs), (pairs.keys, pairs.values), strict=True):
        changed = (fitted != original).any(-1)
        assert changed.any()
        assert not changed[~pairs.keep].any()
        assert not changed[:, pairs.pinned].any()


@pytest.mark.parametrize("size", [1e-2, 1e-5, 0.0])
def test_a_head_that_hardly_looks_at_anything_gets_no_giants(size: float) -> None:
    pairs = a_layer()
    pairs.blocks[0].queries[0] *= size
    keys, _ = fit(pairs)
    longest = pairs.keys[0].norm(dim=1)
    assert keys[0].norm(dim=1).max() <= longest.max() + 2 * longest.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_with_such_a_head_stays_finite(dtype: torch.dtype) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:32] *= 3e-6  # of the first KV head
    engine = KVzipEngine(model.to(dtype), tiny_tokenizer(), allocator="uniform")
    context = engine.load(TEXT, ratio=0.4)
    assert all(pairs.isfinite().all() for layer in context.layers for pairs in (layer.keys, layer.values))
    assert engine.logits(context, engine.prompt_ids(context, "What?")).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_head_that_cannot_be_fitted_keeps_its_pairs(value: float, dtype: torch.dtype) -> None:
    pairs = a_layer(dtype=dtype)
    pairs.blocks[0].queries[0] = value
    for fitted, original in zip(fit(pairs), (pairs.keys, pairs.values), strict=True):
        assert torch.equal(fitted[0], original[0])
        assert not torch.equal(fitted[1], original[1])


def test_a_head_that_keeps_nothing_is_left_alone() -> None:
    pairs = a_layer()
    alone = fit(pairs)
    pairs.keep[0] = False
    pairs.pinned[1] = False
    for fitted, original, other in zip(fit(pairs), (pairs.keys, pairs.values), alone, strict=True):
        assert torch.equal(fitted[0], original[0])
        assert not torch.equal(fitted[1], original[1])
        assert other.isfinite().all()


@pytest.mark.parametrize("size", [1, 7, 128, 200, 2048])
def test_rows_are_in_one_order_in_whatever_pieces_they_come(size: int) -> None:
    """The fit holds some out by their number; how long pieces are depends on the device, and on whether answers run."""
    queries, opening = torch.randn(2, 3, 300, 8, generator=torch.Generator().manual_seed(0)), 11
    sinks = torch.arange(6.0)
    queries[..., 0] = sinks.view(2, 3, 1)  # each query says which head's it is
    whole, pieces, softmax = Rows(4), Rows(4), Softmax(0.5, sinks=sinks)
    whole.take(0, 0, 289, queries, softmax, -opening)
    for start in range(0, 300, size):
        pieces.take(0, 0, 289, queries[:, :, start : start + size], softmax, start - opening)
    (one,), (other,) = whole.pop(0), pieces.pop(0)
    assert torch.equal(one.queries, other.queries)
    for block in (one, other):
        assert block.sinks is not None
        assert torch.equal(block.sinks, block.queries[..., 0].float())


def test_rows_are_taken_by_position_and_others_for_each_query_head() -> None:
    queries = torch.arange(2 * 40, dtype=torch.float32).view(1, 2, 40, 1)
    pieces, whole = Rows(16), Rows(16)
    whole.take(0, 0, 36, queries, Softmax(1.0), -4)
    for start in (0, 7, 25):
        end = {0: 7, 7: 25, 25: 40}[start]
        pieces.take(0, 0, 36, queries[:, :, start:end], Softmax(1.0), start - 4)
    (one,), (other,) = whole.pop(0), pieces.pop(0)
    assert sorted(one.queries[0, :, 0].tolist()) == sorted(other.queries[0, :, 0].tolist())
    taken = one.queries[0, :, 0].tolist()
    assert [t for t in taken if t < 40] == [0, 1, 2, 3, 4, 20, 36]
    assert [t - 40 for t in taken if t >= 40] == [0, 1, 2, 3, 12, 28]
    assert whole.pop(0) == []  # they are let go


class Doubled:
    """A refit of somebody else's that doubles everything, what is pinned too."""

    every = 16

    def identity(self) -> dict[str, Any]:
        return {"name": "doubled"}

    def fit(self, pairs: LayerPairs) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * pairs.keys, 2 * pairs.values


def test_what_is_pinned_stays_as_it_is_whatever_a_refit_gives() -> None:
    plain, doubled = (tiny_engine(refit=refit).load(TEXT, ratio=0.4, keep=KEPT) for refit in ("none", Doubled()))
    prompt = tiny_engine()
    pinned = torch.zeros(plain.n_tokens, dtype=torch.bool)
    for start, end in ((0, plain.protected), *prompt._contexts.prompt(prompt._language, TEXT, keep=[KEPT]).keep):
        pinned[start:end] = True
    for layer, other in zip(plain.layers, doubled.layers, strict=True):
        times = 2 - pinned[layer.positions.long()].float().unsqueeze(1)
        assert torch.equal(other.keys, times * layer.keys)
        assert torch.equal(other.values, times * layer.values)


def parts(context: CompressedContext) -> list[dict[str, Any]]:
    return [
        {"keys": layer.keys, "values": layer.values, "positions": layer.positions, "lengths": layer.lengths, "scores": layer.scores}
        for layer in context.layers
    ]


def test_only_new_pairs_that_are_not_pinned_change(architecture: str) -> None:
    plain, fitted = tiny_engine(architecture, refit="none"), tiny_engine(architecture)
    before, after = (engine.load(TEXT, ratio=0.4, keep=KEPT) for engine in (plain, fitted))
    changed = {"keys": 0, "values": 0}
    pinned = torch.zeros(before.n_tokens, dtype=torch.bool)
    for start, end in ((0, before.protected), *plain._contexts.prompt(plain._language, TEXT, keep=[KEPT]).keep):
        pinned[start:end] = True
    for layer, one, other in zip(before.layers, parts(before), parts(after), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            equal = torch.equal if isinstance(one[name], torch.Tensor) else lambda a, b: a == b
            if name not in changed or layer.window is not None:
                assert equal(one[name], other[name]), name
                continue
            fixed = pinned[layer.positions.long()]
            assert equal(one[name][fixed], other[name][fixed])
            changed[name] += int((one[name] != other[name]).any(1).sum())
            assert other[name].isfinite().all()
    assert all(changed.values())


def test_pairs_without_refit_are_those_the_model_computed(architecture: str) -> None:
    engine = tiny_engine(architecture, refit="none")
    whole, context = engine.load(TEXT, ratio=1.0), engine.load(TEXT, ratio=0.4)
    for dense, layer in zip(whole.layers, context.layers, strict=True):
        if layer.window is None:
            rows = layer.heads() * whole.n_tokens + layer.positions.long()
            assert torch.equal(layer.values, dense.values[rows])
            assert torch.equal(layer.keys, dense.keys[rows])


def test_a_key_says_how_pairs_were_refitted_and_nothing_where_they_were_not() -> None:
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
        assert torch.equal(layer.keys, again.keys)
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
        of_before = torch.cat([before.keys, before.values], 1)
        old = dict(zip(zip(before.heads().tolist(), before.positions.tolist(), strict=True), of_before, strict=True))
        of_after = torch.cat([after.keys, after.values], 1)
        for head, position, pair in zip(after.heads().tolist(), after.positions.tolist(), of_after, strict=True):
            if position < parent.n_tokens:
                assert torch.equal(pair, old[head, position])
            else:
                new += 1
    assert new


@pytest.mark.parametrize("way", ["extend", "fold"])
def test_contexts_and_receipts_say_what_was_fitted_as_one(architecture: str, way: str, tmp_path: Path) -> None:
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
    assert all(pairs.isfinite().all() for layer in context.layers for pairs in (layer.keys, layer.values))
    assert engine.logits(context, engine.prompt_ids(context, "What?")).isfinite().all()
