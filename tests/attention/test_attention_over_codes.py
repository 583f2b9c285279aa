"""Pairs in codes: what is read of them, and attention over them against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import EXAMPLES, Call, calls

from kvzip_memory.attention import Softmax, cpu, reference
from kvzip_memory.attention import codes as over_codes
from kvzip_memory.compression.codecs import CODECS, rounding
from kvzip_memory.compression.codecs.rounding import block_of, rounded
from kvzip_memory.context import RaggedLayer
from kvzip_memory.context.codes import Codes, decoded, joined, turn

DIMS = [1, 2, 6, 7, 8, 16, 24, 64, 80, 96, 128, 192, 256, 576]
IN_CODES = sorted(name for name, codec in CODECS.items() if codec.in_codes())


def asked_by(dim: int, heads: int = 2) -> torch.Tensor:
    """Of queries that lie mostly in some directions."""
    queries = torch.randn(heads, 300, dim) @ torch.linalg.qr(torch.randn(dim, dim)).Q * torch.logspace(0, -2, dim)
    queries = queries @ torch.linalg.qr(torch.randn(dim, dim)).Q
    return queries.mT @ queries / 300


def read_by_hand(codes: Codes) -> torch.Tensor:
    """As the docstring says, number by number."""
    rows, blocks = codes.scales.shape
    found = []
    for row in range(rows):
        data = codes.codes[row].tolist()
        if codes.codes.dtype is torch.uint8:
            nibbles = [byte & 15 for byte in data] + [byte >> 4 for byte in data]
            data = [16 * (nibble - 16 if nibble > 7 else nibble) for nibble in nibbles]
        size = len(data) // blocks
        found.append([number * codes.scales[row, i // size].item() for i, number in enumerate(data)])
    return torch.tensor(found)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_codes_are_read_as_they_are_documented(dim: int, bits: int) -> None:
    torch.manual_seed(dim)
    codes = rounded(torch.randn(5, dim), bits)
    assert isinstance(codes, Codes)
    assert codes.way == (8 if dim % 2 else bits, dim, dim // block_of(codes.way.bits, dim))
    assert codes.shape == (5, dim)
    torch.testing.assert_close(codes.numbers(), read_by_hand(codes))
    torch.testing.assert_close(decoded(codes, torch.float64), turn(read_by_hand(codes).double()))
    assert torch.equal(codes[torch.tensor([3, 1])].numbers(), codes.numbers()[[3, 1]])
    assert torch.equal(joined([codes[1:], codes]).numbers(), torch.cat([codes.numbers()[1:], codes.numbers()]))  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_no_number_is_farther_from_its_code_than_half_a_step(dim: int, bits: int) -> None:
    torch.manual_seed(dim)
    vectors = torch.randn(3, 40, dim) * torch.logspace(-1, 3, 40)[:, None]
    codes = rounded(vectors, bits)
    assert isinstance(codes, Codes)
    step = (codes.scales.float().abs() * (1 if codes.way.bits == 8 else 16)).repeat_interleave(dim // codes.way.blocks, -1)
    apart = (codes.numbers() - turn(vectors)).abs()
    # of 16 codes one is missing on one side; a scale is rounded to 8 bits, which moves the largest code
    assert (apart <= step * (0.76 if codes.way.bits == 8 else 1.04)).all()
    assert (apart <= 0.5001 * step).double().mean() > (0.99 if codes.way.bits == 8 else 0.85)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", DIMS)
def test_what_is_rounded_is_rounded_to_itself(dim: int, bits: int, asks: bool) -> None:
    torch.manual_seed(dim)
    asked = asked_by(dim) if asks else None
    codes = rounded(torch.randn(2, 60, dim), bits, asked)
    again = rounded(decoded(codes, torch.float32), bits, asked)
    for one, other in zip((codes.codes, codes.scales), (again.codes, again.scales), strict=True):  # type: ignore[union-attr]
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_what_is_asked_of_keys_changes_less_by_far(dim: int, bits: int) -> None:
    torch.manual_seed(dim)
    keys, asked = torch.randn(2, 200, dim), asked_by(dim)

    def changed(codes: Any) -> torch.Tensor:
        apart = decoded(codes, torch.float32) - keys
        return (apart @ asked * apart).sum()

    assert changed(rounded(keys, bits, asked)) < 0.3 * changed(rounded(keys, bits))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_rounded_alike_however_many(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, asked = torch.randn(2, 50, 64), asked_by(64)
    whole = rounded(vectors, bits, asked)
    monkeypatch.setattr(rounding, "_ROWS", 7)
    cut = rounded(vectors, bits, asked)
    torch.testing.assert_close(decoded(cut, torch.float32), decoded(whole, torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("asks", [None, 0.0, 1.0])
def test_odd_vectors_are_what_they_are(bits: int, asks: float | None) -> None:
    """None, one, zeros, equal numbers, tiny ones, and the largest; and queries that are nothing."""
    asked = None if asks is None else asks * asked_by(16, 1)
    assert decoded(rounded(torch.empty(1, 0, 16), bits, asked), torch.float32).shape == (1, 0, 16)
    for number in (0.0, 1.0, -3.0, 1e-30, 1e-9, 6e4, 7e9, 1e30):
        vectors = torch.full((1, 3, 16), number)
        torch.testing.assert_close(decoded(rounded(vectors, bits, asked), torch.float32), vectors, rtol=0.01, atol=0)


def encoded(part: RaggedLayer, codec: str) -> RaggedLayer:
    keys, values = CODECS[codec].keys(part.keys), CODECS[codec].values(part.values)  # type: ignore[arg-type]
    return replace(part, keys=keys, values=keys if part.shared else values)


@given(calls(), st.sampled_from(IN_CODES), st.sampled_from([1, 7, 64, 1 << 13]), st.sampled_from([1, 2, 3]), st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_attention_over_codes_equals_the_reference(call: Call, codec: str, at_a_time: int, threads: int, data: st.DataObject) -> None:
    """On any call, a few of its parts in codes; layers with a window, caps and sinks, empty heads, pairs in gaps, and several threads."""
    query, rows, softmax, window = call
    known = {part: part for row in rows for part in row.parts}
    for part in known:
        seen = encoded(part, codec) if data.draw(st.booleans()) else part
        if window is None and data.draw(st.booleans()):
            seen = seen.seen_from(int(part.positions.max()) // 2 if len(part.positions) else 0)
        known[part] = seen
    rows = [row._replace(parts=tuple(known[part] for part in row.parts)) for row in rows]
    expected, before = reference.attention(query, rows, softmax, window), torch.get_num_threads()
    tolerance = 2e-5 if query.dtype == torch.float32 else 2e-2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(over_codes, "READ_PAIRS", at_a_time)
        patch.setattr("kvzip_memory.attention.codes.PIECE_PAIRS", 16)
        torch.set_num_threads(threads)
        try:
            found = cpu.attention(query, rows, softmax, window)
        finally:
            torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_latents_in_codes_are_their_own_values() -> None:
    latents = torch.randn(9, 64)
    part = RaggedLayer(latents, latents, (4, 5), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4], dtype=torch.int32))
    part = encoded(part, "int8")
    assert part.shared
    assert part.having([tensor.clone() for tensor in part.tensors()]).shared
    query, sharp = torch.randn(2, 6, 64), Softmax(0.2)
    out, lse = over_codes.attend_codes(query, part, sharp)
    wide = replace(part, keys=(keys := decoded(part.keys, torch.float32)), values=keys)
    expected, expected_lse = cpu._attend_part(query, wide, sharp, None)
    torch.testing.assert_close(out[:, 0], expected.squeeze(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, 0], expected_lse.squeeze(1), atol=1e-5, rtol=1e-5)
