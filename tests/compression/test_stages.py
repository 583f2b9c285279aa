"""Methods of the stages: given by name or as objects, other packages' own among them."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TEXT, tiny_engine
from kvzip_memory import InputError
from kvzip_memory.compression import Prefilled, Progress, methods
from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.refit import REFITS, LayerPairs
from kvzip_memory.compression.scorers import SCORERS, KVzipScorer
from kvzip_memory.errors import ModelError

STAGES = {"scorer": SCORERS, "allocator": ALLOCATORS, "refit": REFITS}


class Latest:
    """A scorer of ten lines: what is nearer to the end matters more."""

    def identity(self) -> dict[str, Any]:
        return {"name": "latest", "version": 1}

    def cost(self, n_tokens: int) -> int:
        return 0

    def score(self, prefilled: Prefilled, progress: Progress) -> Tensor:
        n, layers = len(prefilled.token_ids), prefilled.full_layers
        return torch.arange(n, dtype=torch.float32).expand(len(layers), prefilled.dense[layers[0]][0].shape[0], n).clone()


class Lower:
    """An allocator: the lower half of the layers keeps nothing but what is protected."""

    def identity(self) -> dict[str, Any]:
        return {"name": "lower", "version": 1}

    def allocate(self, scores: Tensor, budget: int) -> Tensor:
        keep = scores.isposinf()
        upper = scores[len(scores) // 2 :]
        keep[len(scores) // 2 :] |= ALLOCATORS.of("global").allocate(upper, min(budget - int(keep.sum()), upper.numel()))
        return keep


class Halved:
    """A refit: keys and values are half of what they were."""

    every = 4

    def identity(self) -> dict[str, Any]:
        return {"name": "halved", "version": 1}

    def fit(self, pairs: LayerPairs) -> tuple[Tensor, Tensor]:
        assert all(block.queries.shape[1] for block in pairs.blocks)
        return pairs.keys / 2, pairs.values / 2


OWN = {"scorer": Latest, "allocator": Lower, "refit": Halved}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage, known in STAGES.items():
        monkeypatch.setattr(known, "_known", dict(known._known))
        known.register(f"own-{stage}", OWN[stage])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("stage", STAGES)
def test_a_method_of_ones_own_is_used_by_its_name_and_stands_in_the_key(stage: str, tmp_path: Path) -> None:
    plain = {"refit": "none"} if stage != "refit" else {}
    named, given = tiny_engine(cache_dir=tmp_path, **{**plain, stage: f"own-{stage}"}), tiny_engine(**{**plain, stage: OWN[stage]()})
    context, same, usual = named.load(TEXT, ratio=0.4), given.load(TEXT, ratio=0.4), tiny_engine().load(TEXT, ratio=0.4)
    assert context.identity[stage] == OWN[stage]().identity()
    assert context.key == same.key != usual.key
    assert all(torch.equal(a.values, b.values) for a, b in zip(context.layers, same.layers, strict=True))
    if stage == "scorer":
        assert context.layers[0].positions.max() == context.n_tokens - 1
    elif stage == "allocator":
        assert set(context.layers[0].lengths) == {context.protected}
    else:
        original = tiny_engine(refit="none").load(TEXT, ratio=0.4)
        new = original.layers[0].positions >= original.protected
        assert torch.equal(context.layers[0].keys[new], original.layers[0].keys[new] / 2)
        assert torch.equal(context.layers[0].values[new], original.layers[0].values[new] / 2)
    named.close()
    again = tiny_engine(cache_dir=tmp_path, **{**plain, stage: f"own-{stage}"}).load(TEXT, ratio=0.4)
    assert again.receipt is not None
    assert again.receipt.tier == "disk"
    other = tiny_engine(cache_dir=tmp_path).load(TEXT, ratio=0.4)
    assert other.receipt is not None
    assert not other.receipt.hit
    assert stage in other.receipt.differs


@pytest.mark.parametrize("stage", STAGES)
def test_another_packages_method_is_found_by_its_entry_point(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", f"{__name__}:{OWN[stage].__name__}", f"kvzip_memory.{stage}s")
    monkeypatch.setattr(methods, "entry_points", lambda group: [point] if group == point.group else [])
    assert "theirs" in STAGES[stage]
    assert STAGES[stage].of("theirs").identity() == OWN[stage]().identity()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", ["nosuch", 3, None, object()])
def test_what_is_no_method_is_refused_with_the_names_that_are_known(stage: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        tiny_engine(**{stage: value})
    assert stage in str(error.value)
    for name in STAGES[stage]:
        assert name in str(error.value)


def test_a_name_is_one_methods() -> None:
    with pytest.raises(InputError, match="another name"):
        SCORERS.register("kvzip", Latest)
    SCORERS.register("kvzip", KVzipScorer)


def test_a_scorer_without_queries_has_nothing_refitted_and_says_so_where_that_was_asked_for() -> None:
    context = tiny_engine(scorer=Latest()).load(TEXT, ratio=0.4)
    assert "refit" not in context.identity
    with pytest.raises(InputError, match="refit='none'"):
        tiny_engine(scorer=Latest(), refit="ridge")


ODD: dict[str, dict[str, Any]] = {
    "scorer": {
        "nothing": None,
        "one layer": torch.zeros(1, 2, 3),
        "whole numbers": lambda given: given.long(),
    },
    "allocator": {
        "nothing": None,
        "a number": 7,
        "scores": lambda given: given.float(),
        "one head": lambda given: given[:, :1],
    },
    "refit": {
        "nothing": None,
        "values alone": lambda given: given[1],
        "values that are missing": lambda given: (given[0], None),
        "a row less": lambda given: (given[0][:, 1:], given[1]),
        "another dtype": lambda given: (given[0], given[1].double()),
        "values that are not finite": lambda given: (given[0], given[1] / 0),
        "keys that are not finite": lambda given: (given[0] / 0, given[1]),
    },
}


@pytest.mark.parametrize(("stage", "what"), [(stage, what) for stage, odd in ODD.items() for what in odd])
def test_what_a_method_owes_is_looked_at_and_refused_by_its_name(stage: str, what: str, tmp_path: Path) -> None:
    odd, method = ODD[stage][what], OWN[stage]()
    way = {"scorer": "score", "allocator": "allocate", "refit": "fit"}[stage]
    right = getattr(method, way)
    setattr(method, way, lambda *args: odd(right(*args)) if callable(odd) else odd)
    engine = tiny_engine(cache_dir=tmp_path, **{stage: method})
    with pytest.raises(ModelError, match=re.escape(f"{method.identity()!r} gave")):
        engine.load(TEXT, ratio=0.4)
    assert engine.registry.contexts() == []


def test_what_is_never_evicted_is_kept_whatever_an_allocator_says() -> None:
    class Nothing(Lower):
        def allocate(self, scores: Tensor, budget: int) -> Tensor:
            return torch.zeros_like(scores, dtype=torch.bool)

    context = tiny_engine(allocator=Nothing(), refit="none").load(TEXT, ratio=0.4)
    assert {length for layer in context.layers for length in layer.lengths} == {context.protected}
