"""Budgets of one context, in bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from families import FAMILIES, tiny_family
from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.cli import app
from kvzip_memory.compression.codecs import CODECS
from kvzip_memory.sizes import SMALLEST_RATIO


def engine_of(kind: str) -> KVzipEngine:
    return KVzipEngine(tiny_family(kind), tiny_tokenizer(), codec="none")


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_context_takes_what_it_may_and_no_more(kind: str) -> None:
    engine = engine_of(kind)
    least, most = (engine.load(TEXT, ratio=ratio).nbytes for ratio in (0.05, 0.95))
    for nbytes in (least, (least + most) // 2, most):
        context = engine.load(TEXT, nbytes=nbytes)
        assert nbytes - 0.02 * (most - least) - 200 < context.nbytes <= nbytes
    assert engine.load(TEXT, nbytes="1GB").ratio == 1.0


@pytest.mark.parametrize("kind", sorted(kind for kind in FAMILIES if any(engine_of(kind)._model.windows)))
def test_what_a_window_shows_takes_no_more_at_any_length(kind: str) -> None:
    engine = engine_of(kind)
    grown = engine.load(TEXT, ratio=1.0)
    for length in range(60, 100):  # beyond the windows, at the edges of chunks and between them
        context = engine.load(TEXT[:length], ratio=1.0)
        assert context.nbytes == engine._contexts._builder.sizes.nbytes(context.n_tokens, context.protected, 1.0)
        more = engine.extend(grown, TEXT[:length], ratio=1.0)
        assert more.nbytes == engine._contexts._builder.sizes.nbytes(more.n_tokens, more.protected, 1.0)


@pytest.mark.parametrize("codec", [*CODECS])
def test_a_fraction_is_of_a_dense_cache_of_16_bits(codec: str) -> None:
    engine = tiny_engine(codec=codec)
    full = engine.load(TEXT, ratio=1.0)
    context = engine.load(TEXT, nbytes=0.25)
    assert 0.24 < context.nbytes / (full.dense_nbytes / 2) <= 0.25
    assert engine.load(TEXT, nbytes="0.25").key == context.key


@given(share=st.floats(0.2, 0.99))
def test_any_fraction_is_met_and_the_next_ratio_would_not(share: float) -> None:
    engine = tiny_engine()
    sizes = engine._contexts._builder.sizes
    ratio = sizes.ratio_within(share, 1000, 40)
    assert sizes.nbytes(1000, 40, ratio) <= share * sizes.dense_nbytes(1000)
    assert ratio == 1.0 or sizes.nbytes(1000, 40, ratio + 2e-3) > share * sizes.dense_nbytes(1000)


def test_it_is_found_by_the_same_budget_and_by_its_ratio() -> None:
    engine = tiny_engine()
    context = engine.load(TEXT, nbytes="40kB")
    again, by_ratio = engine.load(TEXT, nbytes="40kB"), engine.load(TEXT, ratio=context.ratio)
    assert context.key == again.key == by_ratio.key
    assert again.receipt is not None
    assert again.receipt.hit


def test_documents_that_are_to_be_joined_have_budgets_too() -> None:
    engine = tiny_engine()
    context = engine.load(TEXT, nbytes=0.2, joinable=True, preamble="Other words stand before it. " * 4)
    assert context.ratio < 1.0


NONE = [0, -1, 0.0, -0.5, True, False, "", "much", "-3MB", "20 miles", [1], float("nan"), float("inf"), b"20MB"]
NONE += ["9" * 400, "9" * 400 + "GB", 1.0, 2e7]


@pytest.mark.parametrize("nbytes", NONE)
def test_what_is_no_budget_is_refused(nbytes: Any) -> None:
    with pytest.raises(InputError, match="nbytes is"):
        tiny_engine().load(TEXT, nbytes=nbytes)


def test_strings_to_keep_count_in_a_budget() -> None:
    engine = tiny_engine()
    some = engine.load(TEXT, ratio=0.02).nbytes
    with pytest.raises(InputError, match="with what it is to keep"):
        engine.load(TEXT, nbytes=some, keep=TEXT[:400])
    context = engine.load(TEXT, nbytes=0.9, keep="8306")
    assert context.nbytes <= 0.9 * context.dense_nbytes / 2


def test_too_small_a_budget_says_what_it_takes() -> None:
    engine = tiny_engine()
    with pytest.raises(InputError, match=rf"takes ([\d,]+) at a ratio of {SMALLEST_RATIO}") as error:
        engine.load(TEXT, nbytes=1000)
    needed = int(str(error.value).split("takes ")[1].split(" at ")[0].replace(",", ""))
    assert engine.load(TEXT, nbytes=needed).ratio < SMALLEST_RATIO + 0.002
    with pytest.raises(InputError, match="takes"):
        engine.load(TEXT, nbytes=needed - 1)


def test_a_ratio_and_a_budget_are_one_too_many() -> None:
    with pytest.raises(InputError, match=r"ratio is 0.3 and nbytes is '20MB'; give one of them"):
        tiny_engine().load(TEXT, ratio=0.3, nbytes="20MB")


def test_the_command_takes_a_budget(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "page.txt").write_text(TEXT)
    args = ["load", str(tmp_path / "page.txt"), "--model", str(tmp_path / "model"), "--cache-dir", str(tmp_path / "cache"), "--json"]
    for nbytes in ("60kB", "0.2"):
        out = CliRunner().invoke(app, [*args, "--nbytes", nbytes])
        assert out.exit_code == 0, out.output
        key = json.loads(out.stdout)["key"]
        assert tiny_engine(cache_dir=tmp_path / "cache", codec="auto").load(TEXT, nbytes=nbytes).key == key
    out = CliRunner().invoke(app, [*args, "--nbytes", "0.2", "--ratio", "0.5"])
    assert isinstance(out.exception, InputError)
