"""Methods of the stages: given by name or as objects, other packages' own among them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TEXT, same_pairs, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, IdentityMismatchError, InputError, KVzipEngine
from kvzip_memory.compression import Prefilled, Progress, methods
from kvzip_memory.compression.allocators import ALLOCATORS
from kvzip_memory.compression.fading import Fading
from kvzip_memory.compression.refit import REFITS, LayerPairs
from kvzip_memory.compression.scorers import SCORERS, KVzipScorer
from kvzip_memory.errors import ModelError
from kvzip_memory.registry.identity import key_of

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
        "no numbers": lambda given: given.to("meta"),
        "sparse ones": lambda given: given.to_sparse(),
    },
    "allocator": {
        "nothing": None,
        "no numbers": lambda given: given.to("meta"),
        "sparse ones": lambda given: given.to_sparse(),
        "a number": 7,
        "scores": lambda given: given.float(),
        "one head": lambda given: given[:, :1],
    },
    "refit": {
        "nothing": None,
        "values alone": lambda given: given[1],
        "no numbers": lambda given: (given[0], given[1].to("meta")),
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


def nothing(scores: Tensor, budget: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool)


def newest(scores: Tensor, budget: int) -> Tensor:
    layers, heads, n = scores.shape
    return (torch.arange(n) >= n - budget // (layers * heads)).expand(scores.shape)


def in_place(scores: Tensor, budget: int) -> Tensor:
    """Changes what it was given, for pairs that it does not like."""
    scores[..., ::3] = torch.where(scores[..., ::3].isfinite(), -1e3, scores[..., ::3])
    return ALLOCATORS.of("global").allocate(scores, budget)


def wiping(scores: Tensor, budget: int) -> Tensor:
    keep = newest(scores, budget).clone()
    scores.fill_(-torch.inf)
    return keep


ALLOCATE = {"nothing": nothing, "newest": newest, "in place": in_place, "wiping": wiping, "lower": Lower().allocate}


def allocator(name: str, identity: Any) -> Any:
    """Registered under its name."""
    facts = {"nested": True, "identity": lambda self: identity, "allocate": lambda self, *given: ALLOCATE[name](*given)}
    made = type("Own", (), facts)
    ALLOCATORS.register(name, made)
    return made()


def pairs_of(context: CompressedContext) -> list[list[float]]:
    return [part.flatten().tolist() for layer in context.layers for part in (layer.keys, layer.values, layer.positions, layer.heads())]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["name", "mapping"])
@pytest.mark.parametrize("name", ALLOCATE)
def test_what_is_never_evicted_is_kept_whatever_an_allocator_says_and_a_cut_is_what_a_build_gives(
    name: str, kind: str, tmp_path: Path
) -> None:
    own = allocator(name, name if kind == "name" else {"name": name, "version": 1})
    kept, text = ("Ferdinand", "8306"), TEXT + "That is all."
    built = tiny_engine(allocator=own, refit="none").load(text, ratio=0.3, keep=kept)
    engine = tiny_engine(allocator=own, refit="none", cache_dir=tmp_path)
    finer = engine.load(text, ratio=0.6, keep=kept)
    cut = engine.load(text, ratio=0.3, keep=kept)
    assert cut.key == built.key
    assert cut.receipt is not None
    if name != "newest":  # its share of a head is rounded down, and so can be larger than what is left
        assert cut.receipt.shrunk_from == 0.6
    engine.close()
    again = tiny_engine(allocator=own, refit="none", cache_dir=tmp_path).load(text, ratio=0.3, keep=kept)
    assert again.receipt is not None
    assert again.receipt.tier == "disk"
    for context in (cut, again):
        assert pairs_of(context) == pairs_of(built)
    spans = [span for word in kept for span in spans_of(built, word)]
    assert spans
    for context in (finer, built, cut):
        never = {*range(context.protected), *(i for start, end in spans for i in range(start, end))}
        for layer in context.layers:
            for head in range(layer.n_heads):
                there = set(layer.positions[layer.heads() == head].tolist())
                assert never <= there
                assert name != "nothing" or there == never


def spans_of(context: CompressedContext, word: str) -> list[tuple[int, int]]:
    """Tokens of the tiny tokenizer, which are characters."""
    text = TEXT + "That is all."
    start = context.sources[0].start
    assert context.sources[0].end - start >= len(text) - 1
    return [(start + found.start(), start + found.end()) for found in re.finditer(word, text)]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("what", ODD["allocator"])
def test_what_an_allocator_gives_for_a_cut_is_looked_at_too(what: str) -> None:
    odd, asked = ODD["allocator"][what], []

    def allocate(scores: Tensor, budget: int) -> Tensor:
        asked.append(budget)
        right = ALLOCATORS.of("global").allocate(scores, budget)
        return right if len(asked) == 1 else odd(right) if callable(odd) else odd

    own = type("Odd", (), {"nested": True, "identity": lambda self: "odd", "allocate": lambda self, *given: allocate(*given)})
    ALLOCATORS.register("odd", own)
    engine = tiny_engine(allocator=own(), refit="none")
    finer = engine.load(TEXT, ratio=0.6)
    with pytest.raises(ModelError, match="'odd' gave its choice"):
        engine.load(TEXT, ratio=0.3)
    assert [entry.key for entry in engine.registry.contexts()] == [finer.key]


@pytest.mark.parametrize("part", ["head", "keys", "values", "keep", "pinned"])
@pytest.mark.parametrize("filled", [0, 1, float("nan")])
def test_what_a_refit_is_given_is_its_own(part: str, filled: float) -> None:
    class Filling(Halved):
        def fit(self, pairs: LayerPairs) -> tuple[Tensor, Tensor]:
            right = pairs.keys.clone(), pairs.values.clone()
            for tensor in pairs.head if part == "head" else [getattr(pairs, part)]:
                tensor.fill_(filled)
            return right

    context = tiny_engine(refit=Filling()).load(TEXT, ratio=0.4, keep="8306")
    assert pairs_of(context) == pairs_of(tiny_engine(refit="none").load(TEXT, ratio=0.4, keep="8306"))


def test_what_a_refit_gives_for_pinned_pairs_is_not_used() -> None:
    class Pinning(Halved):
        def fit(self, pairs: LayerPairs) -> tuple[Tensor, Tensor]:
            pairs.keys[:, pairs.pinned] = torch.nan
            pairs.values[:, pairs.pinned] = torch.inf
            return pairs.keys, pairs.values

    context = tiny_engine(refit=Pinning()).load(TEXT, ratio=0.4, keep="8306")
    assert pairs_of(context) == pairs_of(tiny_engine(refit="none").load(TEXT, ratio=0.4, keep="8306"))


# -- what a method says of itself --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    name: str = "facts"


NO_IDENTITY: dict[str, Any] = {
    "nothing": None,
    "an empty text": "",
    "an empty mapping": {},
    "false": False,
    "a number": 3,
    "a list": ["own", 1],
    "bytes": {"name": b"own"},
    "a set": {"name": "own", "layers": {1}},
    "no number": {"name": "own", "weight": float("nan")},
    "a tensor": {"name": "own", "weight": torch.ones(1)},
    "a dataclass": Facts(),
    "a dataclass in it": {"name": "own", "facts": Facts()},
    "a proxy": MappingProxyType({"name": "own"}),
    "keys of two kinds": {"name": "own", ("a", 1): 2},
    "a number that is too long": {"name": "own", "n": 10**5000},
}


@pytest.mark.parametrize(
    ("stage", "what"),
    [(stage, what) for stage in STAGES for what in NO_IDENTITY if (stage, what) != ("refit", "nothing")],  # which changes nothing
)
def test_an_identity_that_no_key_can_hold_is_refused_at_once(stage: str, what: str) -> None:
    method = OWN[stage]()
    method.identity = lambda: NO_IDENTITY[what]
    with pytest.raises(InputError, match=f"{stage}.* says that it is"):
        tiny_engine(**{stage: method})


@pytest.mark.parametrize("stage", STAGES)
def test_an_identity_is_what_json_makes_of_it_in_every_process(stage: str, tmp_path: Path) -> None:
    def engine() -> KVzipEngine:
        method = OWN[stage]()
        method.identity = lambda: {"name": "own", "layers": (1, 2), "by": {3: (4,)}}
        return tiny_engine(cache_dir=tmp_path, **{"refit": "none", stage: method})

    first = engine()
    talk = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "I see."}]
    context, more = first.load(talk, ratio=0.4), [{"role": "user", "content": "And then?"}]
    assert context.identity[stage] == {"name": "own", "layers": [1, 2], "by": {"3": [4]}}
    first.close()
    again = engine()
    assert again.get(context.key).identity == context.identity
    assert again.load(talk, ratio=0.4).receipt.tier in ("disk", "device")
    assert again.generate(None, [*talk, *more], max_new_tokens=1, reuse=0.4).receipt.key == context.key
    assert again.extend(context, more).identity["parent"] == context.key
    assert again.stats()["quarantined"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_an_identity_may_change_between_two_loads_and_not_while_one_is_built(stage: str, tmp_path: Path) -> None:
    method, facts = OWN[stage](), {"name": "own", "weight": 1.0, "of": {"text": "the same"}}
    method.identity = lambda: facts
    engine = tiny_engine(cache_dir=tmp_path, **{"refit": "none", stage: method})
    first = engine.load(TEXT, ratio=0.4)
    engine.registry.flush()
    facts["weight"] = 2.0
    second = engine.load(TEXT, ratio=0.4)
    assert first.identity[stage]["weight"] == 1.0
    assert key_of(first.identity) == first.key != second.key
    assert second.receipt is not None
    assert second.receipt.differs == (stage,)
    assert "stored {'weight': 1.0}, wanted {'weight': 2.0}" in str(second.receipt.reason)
    if stage == "scorer":
        with pytest.raises(InputError, match="were ranked by"):
            engine.extend(first, "More.")
    way = {"scorer": "score", "allocator": "allocate", "refit": "fit"}[stage]
    right = getattr(method, way)

    def changing(*args: Any) -> Any:
        facts["weight"] += 1.0
        return right(*args)

    setattr(method, way, changing)
    with pytest.raises(IdentityMismatchError, match=f"{stage} of context"):
        engine.load(TEXT * 2, ratio=0.4)
    engine.registry.flush()
    assert {entry.key for entry in engine.registry.contexts()} == {first.key, second.key}
    setattr(method, way, right)
    assert engine.load(TEXT * 2, ratio=0.4).receipt.tier == "built"
    engine.registry.remove(first.key)
    with pytest.raises(IdentityMismatchError, match=f"{stage} of context"):  # it would have to be built as it was
        engine.generate(first, "Why?", max_new_tokens=1)


ODD_FACTS: dict[str, tuple[str, str, list[Any]]] = {
    "every": ("refit", "every", ["4", [1], -1, 1.5, float("nan"), True, None]),
    "fading": ("scorer", "fading", [3, "slow", ()]),
}


@pytest.mark.parametrize(("fact", "value"), [(fact, value) for fact, (_, _, values) in ODD_FACTS.items() for value in values])
def test_odd_facts_of_a_method_are_refused_at_once(fact: str, value: Any) -> None:
    stage, name, _ = ODD_FACTS[fact]
    method = KVzipScorer() if stage == "scorer" else OWN[stage]()
    given = type("Own", (type(method),), {name: value})()
    with pytest.raises(InputError, match=name):
        tiny_engine(**{stage: given})


@pytest.mark.parametrize("value", [None, "4", 1.5, -1, True])
def test_a_cost_that_is_no_number_of_tokens_is_refused_and_nothing_is_stored(value: Any) -> None:
    engine = tiny_engine(scorer=type("Own", (Latest,), {"cost": lambda self, n: value})())
    with pytest.raises(ModelError, match="cost"):
        engine.load(TEXT, ratio=0.4)
    assert engine.registry.contexts() == []


@pytest.mark.parametrize("value", [None, 1.0, "slow", [1.0]])
def test_a_fading_that_is_none_is_refused_and_nothing_is_stored(value: Any) -> None:
    engine = tiny_engine(scorer=type("Own", (KVzipScorer,), {"fading": lambda self, prefilled: value})())
    parent = engine.load(TEXT, ratio=0.4)
    with pytest.raises(ModelError, match="fading"):
        engine.extend(parent, "More of it.")
    assert [entry.key for entry in engine.registry.contexts()] == [parent.key]


@pytest.mark.parametrize("stage", STAGES)
def test_only_what_makes_a_method_can_be_registered(stage: str) -> None:
    with pytest.raises(InputError, match=f"makes no {stage}"):
        STAGES[stage].register("own", OWN[stage]())  # type: ignore[arg-type]
    assert "own" not in STAGES[stage]


def test_why_a_context_is_not_cut_from_a_finer_one_is_said() -> None:
    engine = tiny_engine()
    engine.load(TEXT, ratio=0.6)
    assert "fitted to those that were evicted" in str(engine.load(TEXT, ratio=0.3).receipt.reason)
    assert "fitted" not in str(engine.load(TEXT, ratio=0.8).receipt.reason)
    pieces = tiny_engine(refit="none", compress_every=64)
    pieces.load(TEXT, ratio=0.6)
    assert "in pieces" in str(pieces.load(TEXT, ratio=0.3).receipt.reason)
    own = tiny_engine(refit="none", allocator=Lower())
    own.load(TEXT, ratio=0.6)
    assert "allocator is not registered" in str(own.load(TEXT, ratio=0.3).receipt.reason)


class Relative:
    """By scores relative to the mean of those that are there, which are others for a cut."""

    def identity(self) -> str:
        return "relative"

    def allocate(self, scores: Tensor, budget: int) -> Tensor:
        given = scores.float()
        mean = torch.where(given.isfinite(), given, 0.0).sum(-1, keepdim=True) / given.isfinite().sum(-1, keepdim=True).clamp(min=1)
        return ALLOCATORS.of("global").allocate(torch.where(given.isfinite(), given / mean, given), budget)


def broken() -> Any:
    raise ModuleNotFoundError("no such package")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("make", [Relative, lambda: Relative(1), broken, lambda: 3])  # type: ignore[call-arg]
def test_only_by_a_registered_allocator_of_nested_choices_a_context_is_cut(make: Any) -> None:
    ALLOCATORS.register("relative", make)
    engine = tiny_engine(allocator=Relative(), refit="none")
    engine.load(TEXT, ratio=0.6)
    context = engine.load(TEXT, ratio=0.3)
    assert context.receipt is not None
    assert context.receipt.tier == "built"
    assert pairs_of(context) == pairs_of(tiny_engine(allocator=Relative(), refit="none").load(TEXT, ratio=0.3))


@pytest.mark.usefixtures("registered")
def test_true_is_not_one_where_methods_are_compared() -> None:
    one, true = ({"name": "lower", "first": first} for first in (1, True))
    facts = {"nested": True, "allocate": lambda self, *given: ALLOCATORS.of("global").allocate(*given)}
    ALLOCATORS.register("lower", type("One", (), {**facts, "identity": lambda self: one}))
    engine = tiny_engine(allocator=type("True", (), {**facts, "identity": lambda self: true})(), refit="none")
    finer = engine.load(TEXT, ratio=0.6)
    assert engine.load(TEXT, ratio=0.3).receipt.tier == "built"
    scorer = type("Own", (Latest,), {"identity": lambda self: {"name": "latest", "first": 1}})
    ranked = tiny_engine(scorer=scorer()).load(TEXT, ratio=0.4)
    with pytest.raises(InputError, match="were ranked by"):
        tiny_engine(scorer=type("Own", (Latest,), {"identity": lambda self: {"name": "latest", "first": True}})()).extend(ranked, "More.")
    assert finer.key != tiny_engine(allocator="lower", refit="none").load(TEXT, ratio=0.6).key


def test_how_scores_fade_is_measured_of_each_scorer() -> None:
    class Own(KVzipScorer):
        weight = 0.1

        def identity(self) -> dict[str, Any]:
            return {**super().identity(), "name": "own", "weight": Own.weight}

        def fading(self, prefilled: Prefilled) -> Fading:
            return Fading((1.0, 4096.0), (0.0, -Own.weight * 9))

    def grown(engine: KVzipEngine) -> CompressedContext:
        return engine.extend(engine.load(TEXT, ratio=0.4), "More of it. " * 20)

    engine = tiny_engine(scorer=Own(), refit="none")
    slow = grown(engine)
    Own.weight = 3.0
    fast = grown(engine)
    assert pairs_of(fast) == pairs_of(grown(tiny_engine(scorer=Own(), refit="none"))) != pairs_of(slow)


@pytest.mark.parametrize("name", [None, 5, "", b"own", ["own"], {}])
@pytest.mark.parametrize("stage", STAGES)
def test_a_methods_name_is_a_text(stage: str, name: Any) -> None:
    before = [*STAGES[stage]]
    with pytest.raises(InputError, match=f"name of a {stage}"):
        STAGES[stage].register(name, OWN[stage])
    assert [*STAGES[stage]] == before


def test_where_few_layers_are_compressed_auto_refits_from_a_ratio_on() -> None:
    few = tiny_model("gemma3", layer_types=[*["sliding_attention"] * 3, "full_attention"])
    engines = {refit: KVzipEngine(few, tiny_tokenizer(), refit=refit) for refit in ("auto", "none", "ridge")}
    for ratio, like in ((0.3, "none"), (0.5, "ridge")):
        contexts = {refit: engine.load(TEXT, ratio=ratio) for refit, engine in engines.items()}
        assert contexts["auto"].key == contexts[like].key != contexts["none" if like == "ridge" else "ridge"].key
        assert same_pairs(contexts["auto"], contexts[like])
        assert contexts["auto"].fitted == contexts[like].fitted
    half = {refit: tiny_engine("gemma3", refit=refit).load(TEXT, ratio=0.3) for refit in ("auto", "ridge")}
    assert half["auto"].key == half["ridge"].key
