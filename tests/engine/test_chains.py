"""Contexts that were grown in many steps: made again, and held."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TEXT, lose, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, InputError, KVzipEngine
from kvzip_memory.chain import Managed, Step
from kvzip_memory.registry import ContextRegistry, Wanted

STEPS = 60


def wide_engine(**options: object) -> KVzipEngine:
    return KVzipEngine(tiny_model(max_position_embeddings=16384, num_hidden_layers=1), tiny_tokenizer(), **options)  # type: ignore[arg-type]


def grown(engine: KVzipEngine, steps: int = STEPS, ratio: float = 1.0) -> CompressedContext:
    context = engine.load([{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}], ratio=ratio)
    for step in range(steps):
        context = engine.extend(context, [{"role": "user", "content": f"{step}?"}, {"role": "assistant", "content": "Yes."}])
    return context


def pairs_of(context: CompressedContext) -> list[torch.Tensor]:
    return [t.clone() for layer in context.layers for t in layer.tensors()]


def forget_all(engine: KVzipEngine, keep: int = 0) -> list[str]:
    """Lose all contexts but the first few; their keys, the oldest first."""
    keys = [entry.key for entry in sorted(engine.registry.contexts(), key=lambda entry: entry.n_tokens)]
    for key in keys[keep:]:
        lose(engine, key)
    return keys


@contextmanager
def shallow(frames: int = 180) -> Iterator[None]:
    """A stack for the model's own depth, and not for that of a chain."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_a_long_chain_is_made_again_with_the_same_bytes(tmp_path: Path, stored: bool, ratio: float) -> None:
    engine = wide_engine(cache_dir=tmp_path if stored else None, device_bytes="64MB")
    context = grown(engine, STEPS if ratio == 1.0 else 20, ratio)
    before = pairs_of(context)
    keys = forget_all(engine)
    with shallow(180 if ratio == 1.0 else 120):
        again = pairs_of(context)
    assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))
    assert {entry.key for entry in engine.registry.contexts()} == set(keys)  # all of them, the same
    engine.close()


@pytest.mark.parametrize("harm", ["lost", "damaged", "old"])
def test_it_goes_on_from_the_nearest_that_is_stored(tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = wide_engine(cache_dir=tmp_path, device_bytes="64MB", ttl=3600)
    context = grown(engine)
    before = pairs_of(context)
    built = engine.stats()["built"]
    keys = [entry.key for entry in sorted(engine.registry.contexts(), key=lambda entry: entry.n_tokens)]
    if harm == "lost":
        forget_all(engine, keep=STEPS - 10)
        built += 10 + 1
    else:
        engine.close()
        engine.registry._memory.device.held.clear()  # what is in no memory
        engine.registry._memory.device._settled = 0
        engine.registry._backing.tier = wide_engine(cache_dir=tmp_path).registry._backing.tier
        built += len(keys)
    if harm == "damaged":  # which shows when it is read, with a lock held
        for path in (tmp_path / "contexts" / "blobs").rglob("*.safetensors"):
            data = bytearray(path.read_bytes())
            data[-5000] ^= 1
            path.write_bytes(data)
    if harm == "old":
        import time

        later = time.time() + 3601
        monkeypatch.setattr(time, "time", lambda: later)
    with shallow():
        again = pairs_of(context)
    assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))
    assert engine.stats()["built"] == built


def test_a_handle_of_a_long_chain_holds_its_own_tokens_once() -> None:
    engine = wide_engine()
    context = grown(engine, 3)
    ancestors = [weakref.ref(context)]
    for step in range(5):
        context = engine.extend(context, [{"role": "user", "content": f"And {step}?"}])
        ancestors.append(weakref.ref(context))
    gc.collect()
    assert [ref() is not None for ref in ancestors] == [False] * 5 + [True]
    assert isinstance(context.storage, Managed)
    ids, step, known = [], context.storage.step, set()
    while isinstance(step, Step):
        assert step.ids is not None
        ids[:0] = step.ids.tolist()
        known.add(step.wanted.key)
        step = step.parent  # type: ignore[assignment]
    assert ids == context.token_ids.tolist()
    assert len(known) == 9


def test_nothing_goes_down_a_chain_by_itself() -> None:
    engine = wide_engine()
    context = grown(engine, 1)
    assert isinstance(context.storage, Managed)
    step = context.storage.step
    for _ in range(100_000):
        step = Step(step.registry, step.wanted, step.make, step, step.ids)
    long = Managed(step, context).handle()
    assert copy.deepcopy(long) is copy.copy(long) is long
    assert repr(long) == repr(context)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(long)
    del step, long
    gc.collect()  # without end of the stack


def test_a_session_is_folded_again_and_again() -> None:
    engine = wide_engine(device_bytes="64MB")
    session = engine.session()
    for turn in range(40):
        session.ask(f"{turn}?", max_new_tokens=1)
        context = session.fold(0, ratio=1.0)
    forget_all(engine)
    with shallow():
        assert session.ask("Who?", max_new_tokens=1).receipt.tier == "built"
    assert context.identity["parent"] is not None


def test_a_parent_without_its_text_says_so() -> None:
    engine = wide_engine()
    first = grown(engine, 1)
    child = engine.extend(engine.get(first.key), [{"role": "user", "content": "More?"}])
    key = first.key
    del first
    forget_all(engine)
    with pytest.raises(InputError, match=f"{key[:12]}.* is no longer stored; load its text again"):
        engine.generate(child, "Who?", max_new_tokens=1)


OPENING = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes."}]
NEXT = [{"role": "user", "content": "And the lamp? " * 9}, {"role": "assistant", "content": "No."}]


def room_for_a_child(engine: KVzipEngine) -> None:
    """And not for its parent beside it."""
    sizes = wide_engine(ratio=0.5)
    engine.registry._memory.device.budget = int(1.15 * sizes.extend(sizes.load(OPENING), NEXT).nbytes)
    engine.registry._memory.wait_s = 0.5


def test_nobody_waits_for_room_that_a_parent_takes_when_the_child_is_cut_from_a_finer_one() -> None:
    engine = wide_engine(ratio=0.5, refit="none")
    parent = engine.load(OPENING)
    engine.extend(parent, NEXT)
    room_for_a_child(engine)
    before = engine.stats()
    child = engine.extend(parent, NEXT, ratio=0.4)
    receipt = child.receipt
    assert receipt is not None
    assert (receipt.tier, receipt.shrunk_from, receipt.read) == ("device", 0.5, 0)
    assert [engine.stats()[event] - before[event] for event in ("lookups", "built", "shrunk")] == [1, 0, 1]
    engine.registry._memory.device.budget = None
    assert engine.extend(parent, NEXT, ratio=0.3).receipt.shrunk_from == 0.4  # type: ignore[union-attr]


def test_nor_when_another_process_has_made_it_while_its_parent_was_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, other = (wide_engine(ratio=0.5, cache_dir=tmp_path) for _ in range(2))
    parent = engine.load(OPENING)
    engine.registry.flush()
    room_for_a_child(engine)
    lease = ContextRegistry.lease

    @contextmanager
    def late(registry: ContextRegistry, wanted: Wanted, *args: Any) -> Iterator[Any]:
        with lease(registry, wanted, *args) as found:
            if registry is engine.registry and wanted.key == parent.key and len(other.registry.contexts()) == 1:
                other.extend(other.get(parent.key), NEXT)
                other.registry.flush()
            yield found

    monkeypatch.setattr(ContextRegistry, "lease", late)
    assert engine.extend(parent, NEXT).receipt.tier == "disk"  # type: ignore[union-attr]
    for each in (engine, other):
        each.close()


@pytest.mark.parametrize("lost", [False, True])
def test_a_child_that_is_built_is_counted_and_told_of_once(lost: bool, caplog: pytest.LogCaptureFixture) -> None:
    engine = wide_engine(ratio=0.5)
    parent = engine.load(OPENING)
    before = engine.stats()
    if lost:
        engine.registry.remove(parent.key)
    child = engine.extend(parent, NEXT)
    receipt = child.receipt
    assert receipt is not None
    assert (receipt.tier, receipt.read, receipt.hit) == ("built", child.n_tokens - parent.n_tokens, False)
    assert receipt.ms.keys() >= {"prefill", "score", "evict", "verify"}
    assert engine.stats()["built"] - before["built"] == (not lost)  # what was removed, and what grows from it, is built for one answer
    assert (receipt.reason == "removed") == lost
    assert engine.stats()["lookups"] - before["lookups"] == 2 * (not lost)  # of its parent, too
    assert len([record for record in caplog.records if "was removed" in record.message]) == lost
    if not lost:
        engine.registry.remove(child.key)
        assert child.layers
        assert len([record for record in caplog.records if "was removed" in record.message]) == 1
