"""Backends against the oracle, and the merge."""

import pytest
import torch

from kvzip_memory.attention import BACKENDS, RowKV, reference
from kvzip_memory.attention import cpu as cpu_backend
from kvzip_memory.attention.merge import merge
from kvzip_memory.context import RaggedLayer

HEADS, GROUP, DIM = 3, 2, 8


def ragged(lengths: tuple[int, ...], n: int, seed: int = 0) -> RaggedLayer:
    torch.manual_seed(seed)
    positions = torch.cat([torch.randperm(n)[:length].sort().values for length in lengths]).int()
    return RaggedLayer(torch.randn(sum(lengths), DIM), torch.randn(sum(lengths), DIM), lengths, positions)


def tail(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(HEADS, n, DIM), torch.randn(HEADS, n, DIM)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("block", [1 << 23, 40])  # 40 elements: every product is cut into blocks of rows
@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference"}))
def test_a_backend_equals_the_reference(backend: str, block: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "BLOCK_ELEMENTS", block)
    shared = ragged((5, 0, 9), 20)  # a head may keep nothing
    other = ragged((1, 2, 3), 12, seed=1)
    rows = [
        RowKV(shared, *tail(7), n_new=4, context_tokens=20),
        RowKV(None, *tail(3), n_new=3, context_tokens=0),
        RowKV(shared, *tail(1), n_new=1, context_tokens=20),
        RowKV(other, *tail(15), n_new=2, context_tokens=12),
    ]
    query = torch.randn(len(rows), HEADS * GROUP, 4, DIM)
    expected = reference.attention(query, rows, 0.3, window)
    torch.testing.assert_close(BACKENDS[backend](query, rows, 0.3, window), expected, atol=1e-5, rtol=1e-5)


def test_merging_two_parts_equals_attention_over_the_whole() -> None:
    torch.manual_seed(0)
    logits, values = torch.randn(4, 10) * 20, torch.randn(10, DIM)
    whole = logits.softmax(-1) @ values
    parts = [(part.softmax(-1) @ values[rows], part.logsumexp(-1)) for rows in (slice(0, 3), slice(3, 10)) for part in [logits[:, rows]]]
    torch.testing.assert_close(merge(*parts[0], *parts[1]), whole, atol=1e-5, rtol=1e-5)


def test_a_part_with_nothing_visible_does_not_count() -> None:
    out, lse = torch.randn(4, DIM), torch.randn(4)
    nothing = torch.full((4,), float("-inf"))
    assert torch.equal(merge(torch.zeros(4, DIM), nothing, out, lse), out)
