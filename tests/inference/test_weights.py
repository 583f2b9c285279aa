"""Weights that change under an engine: noticed before an answer, by value before a store, and never another model's pairs."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_models
import test_modes
import torch
from torch import nn

from conftest import ARCHITECTURES, TEXT, lose, same_pairs, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, IdentityMismatchError, InputError, KVzipEngine, Session
from kvzip_memory.attention import Chosen, cpu
from kvzip_memory.compression import Prefilled
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.contexts import Contexts
from kvzip_memory.inference.generation import GenerationParams
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.inference.weights import Watch, checksum, fingerprint

# -- what changes weights ---------------------------------------------------------------------------------------------


def optimizers() -> Iterator[Any]:
    """Every optimizer of torch in every implementation it has."""
    for name, kind in sorted(vars(torch.optim).items()):
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            known = inspect.signature(kind).parameters
            for way in ("plain", *(way for way in ("foreach", "fused") if way in known)):
                plain = {other: False for other in ("foreach", "fused") if other in known} if way == "plain" else {way: True}
                yield pytest.param(kind, plain, id=f"{name}-{way}")


def step(model: nn.Module, kind: type[torch.optim.Optimizer], options: dict[str, bool]) -> None:
    parameters = [p for p in model.parameters() if p.ndim == 2]  # Muon takes no others
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
        if kind is torch.optim.SparseAdam:
            parameter.grad = parameter.grad.to_sparse()
    optimizer = kind(parameters, lr=1e-3, **options)  # type: ignore[call-arg]
    optimizer.step(lambda: torch.tensor(1.0))  # LBFGS asks for the loss


@pytest.mark.parametrize(("kind", "options"), [*optimizers()])
def test_a_step_of_any_optimizer_is_noticed(kind: type[torch.optim.Optimizer], options: dict[str, bool]) -> None:
    engine = tiny_engine()
    context = engine.load(TEXT)
    step(engine.model, kind, options)
    with pytest.raises(IdentityMismatchError, match="weights"):
        engine.generate(context, "Who?", max_new_tokens=1)
    assert engine.load(TEXT).identity["weights"] == fingerprint(engine.model)


def inner(model: Any) -> Any:
    return model.model.layers[1].mlp


def under_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        inner(model).up_proj.weight.copy_(torch.randn(96, 64))


def by_numpy(model: Any) -> None:
    inner(model).up_proj.weight.detach().numpy()[:] *= 2


def a_state(model: Any) -> None:
    model.load_state_dict(tiny_model(seed=1).state_dict())


def a_layer(model: Any) -> None:
    inner(model).up_proj = nn.Linear(64, 96, bias=False)


def a_hidden_layer(model: Any) -> None:
    """As PEFT wraps one; its weight stays the same object in another place."""
    inner(model).up_proj = nn.Sequential(inner(model).up_proj, nn.Linear(96, 96))


def rotation(model: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(1.5)


def set_data(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data * 1.01

    return change


CHANGES: dict[str, Callable[[Any], None]] = {
    "copy_ under inference mode": under_inference_mode,
    "through .data": lambda model: inner(model).up_proj.weight.data.mul_(1.001),
    "numpy": by_numpy,
    "load_state_dict": a_state,
    "a layer": a_layer,
    "a wrapped layer": a_hidden_layer,
    "a buffer of no checkpoint": rotation,
    "another .data": set_data("lm_head.weight"),
    "a vector's .data": lambda model: model.model.norm.weight.data.add_(1e-3),
    "dtype": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_weights_is_noticed(change: Callable[[Any], None]) -> None:
    engine = tiny_engine()
    context = engine.load(TEXT)
    change(engine.model)
    with pytest.raises(IdentityMismatchError, match="weights"):
        engine.generate(context, "Who?", max_new_tokens=1)
    again = engine.load(TEXT)
    assert again.identity["weights"] == fingerprint(engine.model) != context.identity["weights"]
    assert engine.generate(again, "Who?", max_new_tokens=1).receipt.hit


def test_a_stamp_keeps_no_weights_alive() -> None:
    layer = nn.Linear(64, 64)
    watch = Watch(layer)
    watch.stamp()
    freed: list[bool] = []
    torch.utils.weak.weakref.finalize(layer.weight.untyped_storage(), freed.append, True)
    layer.weight.data = torch.zeros(64, 64)
    assert freed


# -- a fingerprint ----------------------------------------------------------------------------------------------------


def negated_columns(model: Any) -> None:
    model.model.embed_tokens.weight.data[:, 1::2] *= -1


def exchanged_heads(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    weight.copy_(weight.view(2, -1, 64).flip(0).reshape_as(weight))


VALUES: dict[str, Callable[[Any], None]] = {
    "the least bit": lambda model: inner(model).up_proj.weight.data.view(torch.int32)[5, 7].bitwise_xor_(1),
    "signs of every other column": negated_columns,
    "heads": exchanged_heads,
    "rotation": rotation,
    "the end of a view": lambda model: model.whole.data[-1:].add_(1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
def test_a_fingerprint_is_of_every_value(change: Callable[[Any], None], dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    whole = torch.arange(20.0)
    model.part, model.whole = nn.Parameter(whole[:10]), nn.Parameter(whole)
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    sums = checksum(model)
    assert checksum(copy.deepcopy(model)) == sums
    if "bit" in inspect.getsource(change) and dtype is torch.bfloat16:
        inner(model).up_proj.weight.data.view(torch.int16)[5, 7].bitwise_xor_(1)
    else:
        change(model)
    assert fingerprint(model) != before
    assert checksum(model) != sums


def forge(model: Any, twin: bool) -> None:
    """Two models whose bytes have the same sums along rows and columns: two words are exchanged crosswise."""
    words = model.model.embed_tokens.weight.data.flatten()[: 2 * 8192].view(torch.int64).view(2, 4096)
    words[:, :2] = torch.tensor([[5, 7], [7, 5]] if twin else [[7, 5], [5, 7]])


def test_two_models_made_for_one_checksum_have_two_fingerprints(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    forge(engine.model, False)
    context, before = engine.load(TEXT), checksum(engine.model)
    forge(engine.model, True)
    assert checksum(engine.model) == before
    assert fingerprint(engine.model) != context.identity["weights"]
    with pytest.raises(IdentityMismatchError, match="weights"):
        engine.generate(context, "Who?", max_new_tokens=1)
    assert engine.load(TEXT).receipt.tier == "built"
    engine.close()


def test_which_tensor_another_name_stands_for_is_in_the_fingerprint() -> None:
    def model(tied: str) -> nn.Module:
        layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
        for number, name in enumerate("ab"):
            nn.init.constant_(layers[name].weight, number)
            nn.init.zeros_(layers[name].bias)
        layers["c"] = layers[tied]
        return layers

    assert fingerprint(model("a")) == fingerprint(model("a")) != fingerprint(model("b"))


def test_a_fingerprint_is_taken_once_and_by_bytes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    taken = []
    monkeypatch.setattr("kvzip_memory.inference.weights.fingerprint", lambda model: taken.append(fingerprint(model)) or taken[-1])
    for text in ("One. ", "Two. "):
        engine.load(text + TEXT)
    assert len(taken) == 1  # their checksum is looked at behind each build
    twin = copy.deepcopy(engine.model)
    twin.lm_head.weight.data = twin.lm_head.weight.data.t().contiguous().t()  # the same values, laid out otherwise
    assert not twin.lm_head.weight.is_contiguous()
    assert fingerprint(twin) == taken[0]


# -- before a store ---------------------------------------------------------------------------------------------------


def unseen(engine: KVzipEngine) -> None:
    """A write that no stamp can tell."""
    before = engine._model.watch.stamp()
    inner(engine.model).up_proj.weight.data[0, 1] += 4
    assert engine._model.watch.stamp() == before


MORE = [{"role": "user", "content": "And who winds the lamp? " * 12}]


def until_mark(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]}]


def lost(engine: KVzipEngine, context: CompressedContext) -> None:
    """Its handle has it built again."""
    lose(engine, context.key)
    engine.generate(context, "Who?", max_new_tokens=1)


def extended(engine: KVzipEngine, context: CompressedContext) -> CompressedContext:
    return engine.extend(context, MORE)


WAYS: dict[str, Callable[[KVzipEngine, CompressedContext], object]] = {
    "load": lambda engine, context: engine.load("New. " + TEXT),
    "in pieces": lambda engine, context: engine.load("New. " * 40 + TEXT),
    "a mark": lambda engine, context: engine.load_marked(until_mark("New. " + TEXT)),
    "a mark that moved on": lambda engine, context: engine.load_marked(until_mark(2 * TEXT)),
    "extend": extended,
    "lost": lost,
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_stored_under_the_key_of_weights_that_did_not_make_it(way: str, tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4, compress_every=128 if way == "in pieces" else None)
    context = engine.load_marked(until_mark(TEXT))
    assert context is not None
    known = {context.key}
    unseen(engine)
    if way not in ("extend", "lost"):  # under the key of the weights as they are now
        made = WAYS[way](engine, context)
        assert isinstance(made, CompressedContext)
        assert made.identity["weights"] == fingerprint(engine.model) != context.identity["weights"]
        known.add(made.key)
    else:  # what they go on from is of weights that are gone
        with pytest.raises(IdentityMismatchError, match="weights"):
            WAYS[way](engine, context)
    engine.registry.flush()
    assert {entry.key for entry in engine.registry.contexts()} <= known
    with pytest.raises(IdentityMismatchError, match="weights"):  # all of them have been read meanwhile
        engine.generate(context, "Who?")
    engine.close()


class Training(KVzipScorer):
    """Changes a weight each time it ranks, as a training that goes on beside a build does."""

    def score(self, prefilled: Prefilled, *args: Any) -> Any:
        scores = super().score(prefilled, *args)
        for _ in range(self.steps.pop() if self.steps else 0):
            inner(prefilled.model.model).up_proj.weight.data[0, 1] += 4
        return scores

    steps: list[int]


@pytest.mark.parametrize(("steps", "told"), [([1], False), ([1, 1], True)])
def test_a_build_beside_which_weights_change_is_made_once_more_and_then_given_up(steps: list[int], told: bool, tmp_path: Path) -> None:
    scorer = Training()
    object.__setattr__(scorer, "steps", steps)
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4, scorer=scorer)
    if told:
        with pytest.raises(IdentityMismatchError, match="changed, perhaps while it was built, and nothing is stored"):
            engine.load(TEXT)
    else:
        assert engine.load(TEXT).identity["weights"] == fingerprint(engine.model)
    engine.registry.flush()
    assert [entry.identity["weights"] for entry in engine.registry.contexts()] == [fingerprint(engine.model)] * (not told)
    assert engine.load(TEXT).receipt.tier == ("built" if told else "device")
    engine.close()


# -- changed, and changed back ----------------------------------------------------------------------------------------


@contextmanager
def for_a_while(model: Any, change: Callable[[torch.Tensor], object] = lambda weight: weight.mul_(3)) -> Iterator[None]:
    """Other weights, by writes that torch counts, and then those that were."""
    weight = model.model.layers[1].self_attn.k_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        change(weight)
        yield
        weight.copy_(before)


class Swapping(KVzipScorer):
    """Ranks with other weights, as often as it is told."""

    times: list[int]

    def score(self, prefilled: Prefilled, *args: Any) -> Any:
        if not self.times:
            return super().score(prefilled, *args)
        self.times.pop()
        with for_a_while(prefilled.model.model):
            return super().score(prefilled, *args)


def swapping(**options: Any) -> tuple[KVzipEngine, list[int]]:
    scorer, times = Swapping(), list[int]()
    object.__setattr__(scorer, "times", times)
    return tiny_engine(ratio=0.4, scorer=scorer, **options), times


@pytest.mark.parametrize(("times", "told"), [(1, False), (2, True)])
def test_a_build_within_which_weights_are_other_ones_is_made_once_more_and_then_given_up(times: int, told: bool, tmp_path: Path) -> None:
    expected = swapping()[0].load(TEXT)
    engine, left = swapping(cache_dir=tmp_path)
    left += range(times)
    if told:
        with pytest.raises(IdentityMismatchError, match=r"changed and changed back while context .* nothing is stored") as error:
            engine.load(TEXT)
        assert error.value.fields == ("weights",)
        engine.registry.flush()
        assert not engine.registry.contexts()
    context = engine.load(TEXT)
    assert (context.key, context.receipt.tier) == (expected.key, "built")  # type: ignore[union-attr]
    assert same_pairs(context, expected)
    engine.close()


@pytest.mark.parametrize("way", ["extend", "lost"])
def test_what_goes_on_from_a_context_with_other_weights_for_a_while_is_not_stored(way: str, tmp_path: Path) -> None:
    engine, left = swapping(cache_dir=tmp_path)
    context = engine.load(TEXT)
    left.append(1)
    with pytest.raises(IdentityMismatchError, match="nothing is stored"):
        (extended if way == "extend" else lost)(engine, context)
    engine.registry.flush()
    assert [entry.key for entry in engine.registry.contexts()] == [context.key] * (way == "extend")
    extended(engine, context) if way == "extend" else context.layers
    assert len(engine.registry.contexts()) == 1 + (way == "extend")
    engine.close()


def many_models() -> Iterator[Any]:
    for architecture in ARCHITECTURES:
        yield pytest.param(lambda name=architecture: tiny_model(name), id=architecture)
    for kind, (architecture, changes) in test_models.ROTATIONS.items():
        yield pytest.param(lambda name=architecture, changes=changes: tiny_model(name, **changes), id=f"rotation: {kind}")
    for kind, compiled in test_models.COMPILED.items():
        yield pytest.param(lambda compiled=compiled: compiled(tiny_model()), id=f"compiled: {kind}")
    for kind, (architecture, changes, prepare) in test_modes.MODELS.items():

        def made(name: str = architecture, changes: Any = changes, prepare: Any = prepare) -> Any:
            model = tiny_model(name, **changes)
            prepare(model)
            return model.train()

        yield pytest.param(made, id=f"training: {kind}")


@pytest.mark.parametrize("make", [*many_models()])
def test_no_model_has_another_stamp_after_it_was_run(make: Callable[[], Any]) -> None:
    model = make()
    engine = KVzipEngine(model, tiny_tokenizer(), 0.5)
    with torch.inference_mode():  # another user's long text
        (model._orig_mod if hasattr(model, "_orig_mod") else model).eval()(input_ids=torch.arange(2100)[None] % 250)
    model.train("training" in str(make))
    before = engine._model.watch.stamp()
    session = engine.session(engine.load(TEXT[:200]))
    assert engine._model.watch.stamp() == before
    for question in ("Who?", "When?"):
        session.ask(question, max_new_tokens=3)
    session.fold(1)
    session.ask("Why?", max_new_tokens=3)
    assert engine._model.watch.stamp() == before
    assert engine.stats()["built"] == 2


class Counting(nn.Module):
    """Writes what it has computed to buffers of its own at each forward, as an observer of ranges that has seen the widest does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("written", torch.ones(3))
        self.register_buffer("replaced", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.written.copy_(torch.ones(3))  # type: ignore[operator]
        self.replaced = self.replaced.clone()  # type: ignore[operator]
        return self.inner(x)  # type: ignore[no-any-return]


def counting() -> tuple[KVzipEngine, Any]:
    engine = tiny_engine(ratio=0.5)
    model: Any = engine.model
    model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    return engine, model.model


def test_a_model_that_writes_to_its_own_buffers_is_always_the_same() -> None:
    engine, _ = counting()
    before = engine._model.watch.stamp()
    context = engine.load(TEXT)
    assert engine._model.watch.stamp() != before
    session = engine.session(engine.extend(context, "More of it."))
    for question in ("Who?", "When?"):
        session.ask(question, max_new_tokens=3)
    session.fold(1)
    assert session.ask("Why?", max_new_tokens=3).receipt.hit
    assert engine.stats()["built"] == 3


@pytest.mark.parametrize(("where", "name"), [("rotary_emb", "inv_freq"), ("layers.1.self_attn.k_proj", "weight")])
def test_what_others_write_to_beside_it_is_noticed(where: str, name: str) -> None:
    engine, model = counting()
    session = engine.session(engine.load(TEXT))
    stream = session.stream("Who?", max_new_tokens=3).in_this_thread()
    next(stream)  # and so its last tokens are computed after what follows
    with torch.no_grad():
        model.get_submodule(where).get_parameter(name).mul_(1) if name == "weight" else model.get_submodule(where).get_buffer(name).mul_(1)
    stream.whole()
    with pytest.raises(IdentityMismatchError, match=r"reset\(\) it"):
        session.ask("When?", max_new_tokens=1)


# -- sessions ---------------------------------------------------------------------------------------------------------


def adapter(model: Any) -> None:
    layer = nn.Linear(1, 1)
    layer.active_adapters, layer.scaling = ["a"], {"a": 1.0}  # type: ignore[assignment]
    model.adapted = layer


OTHERS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "weights": ("weights", lambda model: model.lm_head.weight.data.mul_(2)),
    "adapter": ("adapter", adapter),
    "dtype": ("dtype", lambda model: model.to(torch.bfloat16)),
    "float64": ("dtype", lambda model: model.to(torch.float64)),
    "device": ("device", lambda model: model.to("meta")),
}
ASK: dict[str, Callable[[Session], object]] = {
    "ask": lambda session: session.ask("And when?", max_new_tokens=2),
    "stream": lambda session: session.stream("And when?", max_new_tokens=2),
    "ids": lambda session: session.stream_ids([5, 6], GenerationParams(max_new_tokens=2)),
    "fold": lambda session: session.fold(0),
    "fork": lambda session: session.fork().ask("And when?", max_new_tokens=2),
    "fork and fold": lambda session: copy.copy(session).fold(0),
}


@pytest.mark.parametrize("over", ["a context", "none"])
@pytest.mark.parametrize("change", OTHERS)
def test_a_session_does_not_go_on_with_another_model(change: str, over: str) -> None:
    engine = tiny_engine()
    session = engine.session(engine.load(TEXT) if over == "a context" else None)
    waiting = engine.session(session.context).stream("Who?", max_new_tokens=2)
    session.ask("Who?", max_new_tokens=2)
    begun = session.fork().stream("And when?", max_new_tokens=2)
    taken, said = session.n_tokens, session.fork().ask("And when?", max_new_tokens=2).text
    before = copy.deepcopy(engine.model)
    field, edit = OTHERS[change]
    edit(engine.model)
    for way in ASK.values():
        with pytest.raises(IdentityMismatchError) as error:
            way(session)
        assert field in error.value.fields
    for stream in (begun, *([waiting] if over == "a context" or change == "device" else [])):
        with pytest.raises(IdentityMismatchError):
            next(stream)
    assert session.n_tokens == taken
    if change == "weights":  # it is as it was
        engine.model.load_state_dict(before.state_dict())
        assert session.ask("And when?", max_new_tokens=2).text == said


@pytest.mark.parametrize("change", ["weights", "adapter", "dtype"])
def test_a_session_over_no_context_begins_anew_with_another_model(change: str) -> None:
    engine = tiny_engine()
    session = engine.session()
    session.ask("Who?", max_new_tokens=2)
    OTHERS[change][1](engine.model)
    session.reset()
    reply = session.ask("And when?", max_new_tokens=8)
    assert reply.text == engine.generate(None, "And when?", max_new_tokens=8).text
    session.fold(0)
    assert session.ask("Why?", max_new_tokens=2).receipt.hit
    OTHERS["weights"][1](engine.model)
    with pytest.raises(IdentityMismatchError, match="load its text again"):
        session.ask("Why?", max_new_tokens=2)


def test_an_engine_stays_on_the_device_it_was_made_on() -> None:
    engine = tiny_engine()
    engine.model.to("meta")
    with pytest.raises(IdentityMismatchError, match=r"made for its model on cpu.* on meta now") as error:
        engine.load(TEXT)
    assert error.value.fields == ("device",)


def test_an_attention_that_cannot_compute_with_another_dtype_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    context = engine.load(TEXT)

    def library(name: str, device: torch.device, dtype: torch.dtype) -> Chosen:
        """As one that computes in half precision."""
        if dtype is torch.bfloat16:
            raise InputError("needs float32")
        return Chosen("another", cpu.attention)

    monkeypatch.setattr("kvzip_memory.inference.modeling.choose", library)
    engine.model.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(InputError, match="needs float32"):
            engine.generate(context, "Who?")
    engine.model.to(torch.float64)
    assert engine.generate(engine.load(TEXT), "Who?", max_new_tokens=1).receipt.hit
    assert engine.stats()["attention"] == "another"


@pytest.mark.parametrize("over", ["a context", "none"])
@pytest.mark.parametrize("back", ["within it", "after it"])
def test_a_session_does_not_go_on_from_an_answer_within_which_the_model_changed(back: str, over: str) -> None:
    engine = tiny_engine()
    session = engine.session(engine.load(TEXT) if over == "a context" else None)
    expected = session.fork().ask("Where?", max_new_tokens=4).text
    session.ask("Who?", max_new_tokens=2)
    stream = session.stream("When?", max_new_tokens=12, speculate=False).in_this_thread()
    next(stream)
    with for_a_while(engine.model):
        next(stream)
        if back == "after it":
            stream.whole()
            with pytest.raises(IdentityMismatchError):
                session.ask("And when?", max_new_tokens=2)
    assert stream.whole().finish_reason == "length"
    for _ in range(2):
        for way in ASK.values():
            with pytest.raises(IdentityMismatchError, match=r"changed while this session answered.* reset\(\) it") as error:
                way(session)
            assert error.value.fields == ("weights",)
    session.reset()
    assert session.ask("Where?", max_new_tokens=4).text == expected
    assert session.fold(0).ratio


@pytest.mark.parametrize("end", ["closed", "cancelled", "dropped"])
def test_an_answer_that_is_taken_back_leaves_nothing_of_another_model(end: str) -> None:
    engine = tiny_engine()
    session, twin = (engine.session(engine.load(TEXT)) for _ in range(2))
    for each in (session, twin):
        each.ask("Who?", max_new_tokens=2)
    stream = session.stream("When?", max_new_tokens=200, speculate=False)
    next(stream)
    with for_a_while(engine.model):
        next(stream)
    if end == "dropped":
        del stream
    else:
        stream.close() if end == "closed" else stream.cancel()
    assert session.ask("Why?", max_new_tokens=4).text == twin.ask("Why?", max_new_tokens=4).text
    assert same_pairs(session.fold(0), twin.fold(0))


@pytest.mark.parametrize("when", ["as its last tokens are read", "before its key is made"])
@pytest.mark.parametrize("back", [True, False])
def test_a_fold_within_which_the_model_changes_stores_nothing(when: str, back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name = (LanguageModel, "append") if "tokens" in when else (Contexts, "fold")
    original = getattr(where, name)

    def changing(self: Any, *args: Any, **options: Any) -> Any:
        if back and "tokens" in when:
            with for_a_while(engine.model):
                return iter([*original(self, *args, **options)])
        if back:
            with for_a_while(engine.model):
                pass
        else:
            inner(engine.model).up_proj.weight.data.mul_(2)
        return original(self, *args, **options)

    engine = tiny_engine()
    with monkeypatch.context() as patch:
        patch.setattr(where, name, changing)
        session = engine.session()
        session.ask("Who?", max_new_tokens=4)
        with pytest.raises(IdentityMismatchError, match="nothing is stored"):
            session.fold(0)
    assert not engine.registry.contexts()
    if "tokens" in when or not back:
        with pytest.raises(IdentityMismatchError, match=r"reset\(\) it"):
            session.fold(0)


def test_a_stream_that_waits_for_its_turn_is_checked_when_that_comes() -> None:
    engine = tiny_engine(max_running=1)
    context = engine.load(TEXT)
    first = engine.stream(context, "Who?", max_new_tokens=1000, speculate=False)
    next(first)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(engine.generate, context, "When?", max_new_tokens=1)
        while engine.stats()["waiting"] == 0:
            time.sleep(0.001)
        engine.model.lm_head.weight.data.mul_(2)  # type: ignore[union-attr,operator]
        first.close()
        with pytest.raises(IdentityMismatchError, match="weights"):
            second.result()


def test_a_session_keeps_the_template_it_began_with() -> None:
    engine = tiny_engine()
    session = engine.session(engine.load(TEXT))
    session.ask("Who?", max_new_tokens=2)
    engine.tokenizer.chat_template += "\n"
    assert session.ask("And when?", max_new_tokens=2).receipt.hit
