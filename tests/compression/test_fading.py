"""How scores fade while a context grows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_compression import prefilled_of

from conftest import tiny_engine
from kvzip_memory import IdentityMismatchError
from kvzip_memory.compression.fading import Fading
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.compression.scorers.kvzip import _seen_from

MORE = "The boat is called Petrel, and it has two masts. " * 3


def test_a_curve_is_linear_over_the_logarithm_of_the_distance_and_ends_where_it_was_measured() -> None:
    fading = Fading((64.0, 256.0, 1024.0), (0.0, -1.0, -4.0))
    assert fading._log(torch.tensor([1, 64, 128, 256, 512, 1024, 9999])).tolist() == pytest.approx([0, 0, -0.5, -1, -2.5, -4, -4])
    between = fading.between(200, 456)
    assert between.shape == (200,)
    assert between[0].item() == pytest.approx((fading._log(torch.tensor([456])) - fading._log(torch.tensor([200]))).exp().item())
    assert torch.equal(fading.between(200, 200), torch.ones(200))
    torch.testing.assert_close(between * fading.between(456, 1000)[:200], fading.between(200, 1000)[:200])  # in two steps as in one
    for unknown in (
        Fading((64.0,), (-2.0,)),
        Fading.of([64, 256], [torch.ones(2, 2, 5), torch.full((2, 2, 5), torch.nan)]),
        Fading((), ()),
    ):
        assert torch.equal(unknown.between(100, 5000), torch.ones(100))


@pytest.mark.parametrize("far", [1, 60, 200])
def test_scores_from_afar_are_those_of_a_text_that_goes_on(far: int) -> None:
    """A chunk is scored as if other tokens stood between it and the repeat, which sees the chunk alone: they may be any."""
    engine = tiny_engine()
    scorer, whole = KVzipScorer(), prefilled_of(engine)
    n, head = len(whole.token_ids), whole.protected
    short = replace(whole, dense=[(k[:, : n - far], v[:, : n - far]) for k, v in whole.dense], token_ids=whole.token_ids[: n - far])
    ids = scorer._repeat_ids(short, head, n - far)
    ours, theirs = scorer.score_chunk(short, ids, head, head, n - far, far=far), scorer.score_chunk(whole, ids, head, head, n - far)
    assert not torch.allclose(theirs, scorer.score_chunk(short, ids, head, head, n - far), atol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_from_afar_a_sliding_layer_sees_nothing_of_a_prefix() -> None:
    prefilled = prefilled_of(tiny_engine("gemma3"))
    for far in (0, 10, 31, 500):
        for window, (keys, values), (own, _) in zip(
            prefilled.model.windows, _seen_from(prefilled, far).dense, prefilled.dense, strict=True
        ):
            left = own.shape[1] if window is None else min(own.shape[1], max(0, window.size - 1 - far))
            assert keys.shape[1] == values.shape[1] == left
            assert torch.equal(keys, own[:, own.shape[1] - left :])


def test_a_model_has_one_curve_whatever_is_read(architecture: str) -> None:
    engine = tiny_engine(architecture)
    scorer, prefilled = KVzipScorer(), prefilled_of(engine)
    fading = scorer.fading(prefilled)
    assert fading == scorer.fading(prefilled_of(engine, "Something else. " * 20))
    assert list(fading.distances) == sorted(fading.distances)
    assert fading.distances[-1] <= engine._model.window
    assert fading.distances[-1] >= engine._model.window - 300


def test_a_window_that_holds_the_probe_alone_gives_no_curve() -> None:
    engine = tiny_engine()
    engine._model.window = 130
    fading = KVzipScorer().fading(prefilled_of(engine, "One. Two."))
    assert torch.equal(fading.between(50, 120), torch.ones(50))


def test_a_curve_is_measured_once_for_weights_that_were_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, measured = tiny_engine(), []
    measure = KVzipScorer.fading
    monkeypatch.setattr(KVzipScorer, "fading", lambda self, prefilled: measured.append(1) or measure(self, prefilled))
    parent = engine.load("The lamp is in the attic. " * 8)
    assert not measured  # nothing grows
    engine.extend(engine.extend(parent, MORE), MORE)
    assert len(measured) == 1
    with torch.no_grad():
        engine.model.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
    engine.extend(engine.load("The lamp is in the attic. " * 8), MORE)
    assert len(measured) == 2
    tiny_engine(compress_every=64).load("The lamp is in the attic. " * 30)
    assert len(measured) == 3  # one for all pieces


def test_a_curve_of_weights_that_change_meanwhile_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    parent, measure = engine.load("The lamp is in the attic. " * 8), KVzipScorer.fading

    def changing(self: KVzipScorer, prefilled: Any) -> Fading:
        with torch.no_grad():
            engine.model.model.layers[0].self_attn.q_proj.weight.mul_(1.1)
        return measure(self, prefilled)

    monkeypatch.setattr(KVzipScorer, "fading", changing)
    with pytest.raises(IdentityMismatchError):
        engine.extend(parent, MORE)
    assert not engine._contexts._builder._fadings
