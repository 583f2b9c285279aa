"""A row over parts of a context equals one over the whole of it."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from conftest import ARCHITECTURES, TEXT, row_over, tiny_engine
from kvzip_memory import CompressedContext
from kvzip_memory.context import RaggedLayer
from kvzip_memory.inference.attribution import attention_mass
from kvzip_memory.inference.cache import Row, Tail

IDS = [5, 9, 6, 4]


def parts_of(context: CompressedContext, cuts: Sequence[int]) -> list[tuple[RaggedLayer, ...]]:
    """Its pairs by position; of a layer with a window the last part has all."""
    found = []
    for start, end in pairwise([0, *cuts, context.n_tokens]):
        last = end == context.n_tokens
        found.append(tuple(_between(layer, start, end) if layer.window is None or not last else layer for layer in context.layers))
    return found


def _between(layer: RaggedLayer, start: int, end: int) -> RaggedLayer:
    return layer.among((layer.positions >= start) & (layer.positions < end))


def row_of(context: CompressedContext, cuts: Sequence[int]) -> Row:
    *before, own = parts_of(context, cuts)
    return Row(own, context.n_tokens, Tail(), context.states, tuple(before))


@pytest.mark.parametrize("cuts", [[20], [20, 21, 50]], ids=["two", "four"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_are_the_whole(architecture: str, cuts: list[int]) -> None:
    engine = tiny_engine(architecture, ratio=0.5)
    context, other = engine.load(TEXT), engine.load("Nothing is known of the lamp, and nobody asks.")
    rows = [row_of(context, cuts), row_over(context), row_over(None), row_of(other, [10]), row_of(context, cuts)]
    whole = [row_over(context), row_over(context), row_over(None), row_over(other), row_over(context)]
    for ids in ([IDS] * 5, [[7]] * 5, [IDS[:2], [3], IDS, [4], [8]]):
        for got, expected in zip(engine._model.forward(rows, ids), engine._model.forward(whole, ids), strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_attention_mass_spans_of_parts(architecture: str) -> None:
    engine = tiny_engine(architecture, ratio=0.5)
    context = engine.load(TEXT)
    spans = [(0, 15), (15, 30), (18, 22), (30, context.n_tokens)]
    got, expected = (attention_mass(engine._model, row, IDS, spans) for row in (row_of(context, [20, 40]), row_over(context)))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
