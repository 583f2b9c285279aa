"""docs/models.md: its table of families is that of the tests, and what it says of their layers is what the engine makes of them."""

from __future__ import annotations

import pytest

import families
import multimodal
from conftest import ROOT, tiny_tokenizer
from kvzip_memory import KVzipEngine, UnsupportedModelError
from kvzip_memory.inference.layout import Layout

PAGE = (ROOT / "docs" / "models.md").read_text()


def layers(layout: Layout) -> str:
    kinds = ["full"]
    for chunked, told in ((False, "sliding"), (True, "chunks")):
        if any(window is not None and window.chunked == chunked for window in layout.windows):
            kinds.append(told)
    if layout.stateful:
        kinds.append("states")
    if layout.latent:
        kinds.append("latents")
    if len(layout.places) > len(layout.owners):
        kinds.append("some reuse pairs")
    return ", ".join(kinds)


def test_the_table_of_families_is_that_of_the_tests() -> None:
    rows = []
    for example, kind in sorted((example, kind) for kind, example in families.EXAMPLES.items()):
        engine = KVzipEngine(families.tiny_family(kind), tiny_tokenizer())
        rows.append(f"| {example} | `{kind}` | {layers(engine._model.layout)} |")
    for example, kind in sorted((example, kind) for kind, example in multimodal.EXAMPLES.items()):
        engine = KVzipEngine(multimodal.tiny_multimodal(kind), tiny_tokenizer())
        rows.append(f"| {example} | `{kind}`, text alone | {layers(engine._model.layout)} |")
    told = [line for line in PAGE.partition("## What is refused")[0].splitlines() if line.startswith("| ") and "| `" in line]
    assert told == rows, "\n".join(rows)


def test_the_table_of_what_is_refused_says_what_the_engine_says() -> None:
    rows = []
    for kind, (example, _) in sorted(families.REFUSED.items(), key=lambda item: item[1][0]):
        with pytest.raises(UnsupportedModelError) as refused:
            KVzipEngine(families.tiny_refused(kind), tiny_tokenizer())
        why = str(refused.value).partition(": on a test forward")[0]
        rows.append(f"| {example} | {why.replace(repr(kind), f'`{kind}`')} |")
    told = [line for line in PAGE.partition("## What is refused")[2].partition("## ")[0].splitlines() if line.startswith("| ")][1:]
    assert told == rows, "\n".join(rows)


def test_every_family_has_a_checkpoint() -> None:
    assert families.EXAMPLES.keys() == families.FAMILIES.keys()
    assert multimodal.EXAMPLES.keys() == multimodal.CONFIGS.keys()
