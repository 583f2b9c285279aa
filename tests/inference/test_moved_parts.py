"""Queries that are turned see a part as if its pairs were copied and moved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_parts import IDS, parts_of

from conftest import ARCHITECTURES, STRESS, TEXT, row_over, tiny_engine, tiny_tokenizer
from families import FAMILIES, tiny_family
from kvzip_memory import CompressedContext, KVzipEngine, UnsupportedModelError
from kvzip_memory.attention.base import turned
from kvzip_memory.context import RaggedLayer
from kvzip_memory.inference.attribution import attention_mass
from kvzip_memory.inference.cache import Row, Tail

REFUSED = {"llama4_text": "otherwise than by rotating"}
CUTS, SHIFTS = [20, 50], (0, 31, 300)


def copied(engine: KVzipEngine, parts: list[tuple[RaggedLayer, ...]], shifts: tuple[int, ...]) -> list[tuple[RaggedLayer, ...]]:
    """The parts with keys rotated on to where they have moved; what has a window is left alone."""
    rotations, owners = engine._model.rotations, engine._model.layout.owners
    moved = []
    for layers, shift in zip(parts, shifts, strict=True):
        own = []
        for layer, owner in zip(layers, owners, strict=True):
            if layer.window is None:
                keys = turned(layer.keys, rotations.turn(owner, -shift))  # the rotation that takes queries the other way
                layer = replace(layer, keys=keys, values=keys if layer.shared else layer.values, positions=layer.positions + shift)
            own.append(layer)
        moved.append(tuple(own))
    return moved


def rows(engine: KVzipEngine, context: CompressedContext, shifts: tuple[int, ...] = SHIFTS) -> tuple[Row, Row]:
    """Over parts that have moved, and over copies of them that were moved."""
    engine._model.rotations.measure()
    parts, n = parts_of(context, CUTS), context.n_tokens + shifts[-1]
    *before, own = parts
    *copies, last = copied(engine, parts, shifts)
    return Row(own, n, Tail(), {}, tuple(before), shifts), Row(last, n, Tail(), {}, tuple(copies))


def check(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.5)
    (moved, copies), (again, once_more) = rows(engine, context), rows(engine, context)
    elsewhere, others = rows(engine, context, (0, 7, 20))
    asked = [moved, row_over(context), elsewhere, row_over(None), again]
    wanted = [copies, row_over(context), others, row_over(None), once_more]
    for ids in ([IDS] * 5, [[7]] * 5, [IDS[:2], [3], IDS, [4], [8]]):
        for got, expected in zip(engine._model.forward(asked, ids), engine._model.forward(wanted, ids), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    check_one(engine)


def check_one(engine: KVzipEngine) -> None:
    alone = [engine._model.forward([row], [IDS], n_logits=4)[0] for row in rows(engine, engine.load(TEXT, ratio=0.5))]
    torch.testing.assert_close(*alone, atol=1e-4, rtol=1e-4)


BACKENDS = [(architecture, attention) for attention in ("cpu", "reference") for architecture in ARCHITECTURES]
BACKENDS += [(architecture, "triton") for architecture in (ARCHITECTURES if STRESS else ["gemma3"])]


@pytest.mark.parametrize(("architecture", "attention"), BACKENDS)
def test_what_has_moved_is_seen_where_it_is(architecture: str, attention: str) -> None:
    check(tiny_engine(architecture, attention=attention))


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_turns_its_queries_or_says_why_not(kind: str) -> None:
    engine = KVzipEngine(tiny_family(kind), tiny_tokenizer(), codec="none")
    reason = "remember states" if engine._model.layout.stateful else REFUSED.get(kind)
    if reason is None:
        return check(engine) if STRESS else check_one(engine)
    with pytest.raises(UnsupportedModelError, match=reason):
        engine._model.rotations.measure()


def test_attention_mass_of_moved_parts() -> None:
    engine = tiny_engine(ratio=0.5)
    context = engine.load(TEXT)
    spans = [(0, 20), (51, 60), (81, 350), (350, context.n_tokens + 300)]
    got, expected = (attention_mass(engine._model, row, IDS, spans) for row in rows(engine, context))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_a_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    engine._model.rotations.measure()
    monkeypatch.setattr(engine._model.rotations, "_fill", None)
    engine._model.rotations.measure()
