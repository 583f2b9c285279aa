"""Backends against the oracle."""

import os
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip_memory.attention import AttentionBackend, RowKV, Softmax, flash, reference
from kvzip_memory.attention import cpu as cpu_backend
from kvzip_memory.attention.base import Turn
from kvzip_memory.context import RaggedLayer, Window

HEADS, GROUP, DIM = 3, 2, 8
Call = tuple[torch.Tensor, list[RowKV], Softmax, int | None]


def plain_varlen(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a flash attention library computes, see :class:`kvzip_memory.attention.flash.Varlen`, sequence by sequence."""
    outs, lses = [], []
    parts = zip(query.split(query_lengths), keys.split(key_lengths), values.split(key_lengths), strict=True)
    for q, k, v in parts:
        assert min(len(q), len(k)) > 0, "libraries differ on what an empty sequence gives"
        logits = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) * scaling
        if causal:
            logits.masked_fill_(torch.ones(len(q), len(k)).tril(len(k) - len(q)) == 0, float("-inf"))
        lse = logits.logsumexp(-1)
        outs.append(torch.einsum("hqk,kd->qhd", (logits - lse.unsqueeze(-1)).exp(), v[:, 0].double()).to(query.dtype))
        lses.append(lse.float())
    return torch.cat(outs), torch.cat(lses, 1)


def backend_named(name: str) -> AttentionBackend:
    if name == "flash":
        return flash.backend(plain_varlen)
    if name == "cpu":
        return cpu_backend.attention
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    return import_module("kvzip_memory.attention.triton").attention


def check(name: str, call: Call) -> None:
    query, rows, softmax, window = call
    tolerance = 2e-5 if query.dtype == torch.float32 else 2e-2
    expected = reference.attention(query, rows, softmax, window)
    torch.testing.assert_close(backend_named(name)(query, rows, softmax, window), expected, atol=tolerance, rtol=tolerance)


def ragged(lengths: tuple[int, ...], n: int, seed: int = 0) -> RaggedLayer:
    torch.manual_seed(seed)
    positions = torch.cat([torch.randperm(n)[:length].sort().values for length in lengths]).int()
    return RaggedLayer(torch.randn(sum(lengths), DIM), torch.randn(sum(lengths), DIM), lengths, positions)


def tail(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(HEADS, n, DIM), torch.randn(HEADS, n, DIM)


@pytest.mark.parametrize("window", [None, Window(6), Window(6, True), Window(17, True)])
@pytest.mark.parametrize(("backend", "block"), [("cpu", 1 << 23), ("cpu", 40), ("flash", 1 << 23), ("triton", 1 << 23)])
def test_a_backend_equals_the_reference(backend: str, block: int, window: Window | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "BLOCK_ELEMENTS", block)  # 40 elements: every product is cut into blocks of rows
    shared = ragged((5, 0, 9), 20)  # a head may keep nothing
    other = ragged((1, 2, 3), 12, seed=1)
    own = ragged((0, 4, 10), 10, seed=2)
    own = replace(own, positions=own.positions + 20)
    rows = [
        RowKV((shared,), *tail(7), n_new=4, context_tokens=20),
        RowKV((), *tail(3), n_new=3, context_tokens=0),
        RowKV((shared,), *tail(1), n_new=1, context_tokens=20),
        RowKV((other,), *tail(15), n_new=2, context_tokens=12),
        RowKV((shared, own), *tail(2), n_new=2, context_tokens=30),
        RowKV((shared, other, own), *tail(9), n_new=1, context_tokens=30),
    ]
    query = torch.randn(len(rows), HEADS * GROUP, 4, DIM)
    expected = reference.attention(query, rows, Softmax(0.3), window)
    torch.testing.assert_close(backend_named(backend)(query, rows, Softmax(0.3), window), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softmax", [Softmax(0.3), Softmax(0.3, sinks=torch.randn(HEADS * GROUP))], ids=["plain", "sinks"])
@pytest.mark.parametrize("n_new", [1, 3, 9])
@pytest.mark.parametrize("small", [0, 6, 1024])
def test_a_row_on_several_parts_equals_the_reference(small: int, n_new: int, softmax: Softmax, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that take plain products together, those that take a call each, and both beside each other."""
    monkeypatch.setattr(cpu_backend, "SMALL_PAIRS", small)
    parts = [ragged(lengths, 12, seed) for seed, lengths in enumerate([(5, 0, 9), (3, 3, 3), (0, 0, 0), (0, 2, 1), (7, 7, 7), (12, 0, 1)])]
    parts.append(parts[4].seen_from(6))
    turns = [None if by == 0 else Turn(by, torch.rand(4), torch.rand(4), 2, torch.tensor([1, 0, 3, 2])) for by in (0, 3, 0, 5, 9, 1, 2)]
    rows = [RowKV(tuple(parts), *tail(4 + n_new), n_new=n_new, context_tokens=60, turns=tuple(turns))]
    check("cpu", (torch.randn(1, HEADS * GROUP, n_new, DIM), rows, softmax, None))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any call a backend may get: rows on none or several parts, their own and others', empty and one-pair heads, long and short tails."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    dim = draw(st.sampled_from([32, 64, 80, 96, 128, 256]))
    dim_v = draw(st.sampled_from([dim, dim, dim, 16, 64, 192]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    n = draw(st.integers(1, 300))
    parts = []
    for number in range(draw(st.integers(1, 4))):
        lengths = tuple(draw(st.lists(st.sampled_from([0, 1, min(2, n), n // 3, n]), min_size=heads, max_size=heads)))
        positions = torch.cat([torch.randperm(n)[:length].sort().values for length in lengths]).int() + n * (number % 2)
        keys, values = (torch.randn(sum(lengths), d).to(dtype) for d in (dim, dim_v))
        parts.append(RaggedLayer(keys, values, lengths, positions))
    several = st.lists(st.sampled_from(parts), max_size=3, unique_by=id).map(tuple)
    kinds = [(), (parts[0],), tuple(parts[:2]), draw(several)]
    rows = []
    for seen in draw(st.lists(st.one_of(st.sampled_from(kinds), several), min_size=1, max_size=9)):
        n_new, before = draw(st.sampled_from([1, 1, 2, 5])), draw(st.sampled_from([0, 1, 7, 40]))
        keys, values = (torch.randn(heads, before + n_new, d).to(dtype) for d in (dim, dim_v))
        rows.append(RowKV(seen, keys, values, n_new, 2 * n if seen else 0))
    query = torch.randn(len(rows), heads * group, max(row.n_new for row in rows), dim).to(dtype)
    sinks = draw(st.sampled_from([None, torch.randn(heads * group).mul(3).to(dtype)]))
    softmax = Softmax(dim**-0.5, draw(st.sampled_from([None, None, 1.5, 50.0])), sinks)
    return (
        query,
        rows,
        softmax,
        draw(st.sampled_from([None, None, *(Window(size, chunked) for size in (1, 16, 200) for chunked in (False, True))])),
    )


EXAMPLES = int(os.environ.get("KVZIP_EXAMPLES", "80"))


@pytest.mark.parametrize("backend", ["cpu", "flash"])
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(call=calls())
def test_a_backend_equals_the_reference_on_any_call(backend: str, call: Call) -> None:
    check(backend, call)


@settings(max_examples=EXAMPLES // 5, deadline=None, derandomize=True)  # half a second each in Triton's interpreter
@given(call=calls())
def test_the_triton_kernels_equal_the_reference_on_any_call(call: Call) -> None:
    check("triton", call)


def test_where_torch_has_no_fused_kernel_plain_products_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on other devices, computed on this one."""
    row = RowKV((ragged((900, 0, 1301), 2000),), *tail(9), n_new=1, context_tokens=2000)
    query = torch.randn(1, HEADS * GROUP, 1, DIM)
    fused = cpu_backend.attention(query, [row], Softmax(0.3), None)
    for module in ("cpu", "fused", "codes"):
        monkeypatch.setattr(f"kvzip_memory.attention.{module}.has_fused", lambda *given: False)
    torch.testing.assert_close(cpu_backend.attention(query, [row], Softmax(0.3), None), fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_head_divided_among_threads_is_the_whole_head(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    row = RowKV((ragged((1700, 7, 1301), 2000),), *tail(3), n_new=1, context_tokens=2000)
    query = torch.randn(1, HEADS * GROUP, 1, DIM)
    expected = reference.attention(query, [row], Softmax(0.3), None)
    torch.testing.assert_close(cpu_backend.attention(query, [row], Softmax(0.3), None), expected, atol=1e-5, rtol=1e-5)
