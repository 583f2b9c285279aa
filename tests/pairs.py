"""Tokenizers, the makers' and tiny ones of every kind, each with a family's chat template."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tokenizers import AddedToken

from conftest import STRESS
from kinds import KINDS, tiny
from kvzip_memory.prompting.prompts import PromptBuilder
from makers import maker
from templates import FAMILIES, Family


@dataclass(frozen=True, eq=False)
class Pair:
    """A tokenizer and a family of templates on it."""

    name: str
    family: Family
    load: Callable[[Sequence[Any], Sequence[str]], Any]

    @property
    def tokenizer(self) -> Any:
        return _tokenizer(self)

    @property
    def builder(self) -> PromptBuilder:
        return PromptBuilder(self.tokenizer, self.family.kwargs or None)


@cache
def _tokenizer(pair: Pair) -> Any:
    tokenizer = pair.load(pair.family.special, pair.family.tags)
    if pair.family.template is not None:
        tokenizer.chat_template = pair.family.template
    return tokenizer


_maker = cache(maker)


def _real(name: str, family: str, own: bool = False, strip: bool = False, **options: Any) -> Pair:
    """A maker's tokenizer with a family's template, or ``own`` one that behaves like that family's."""

    def load(special: Sequence[Any], tags: Sequence[str]) -> Any:
        if name == "qwen3":  # loaded once, since that takes seconds; its vocabulary has no other family's control tokens as text
            others = [FAMILIES[other] for other in ("smollm3", "r1", "phi4", "granite")]
            special, tags = [token for other in others for token in other.special], FAMILIES["r1"].tags
        special = [AddedToken(token, rstrip=True, special=True) for token in special] if strip else special
        return copy.copy(_maker(name, tuple(special), tuple(tags), **options))

    known = replace(FAMILIES[family], template=None, special=(), tags=()) if own else FAMILIES[family]
    shown = f"{name}{' first' if options else ''}"
    return Pair(f"{shown} {'own' if own else family}", known, load)


def _tiny(kind: str, family: str) -> Pair:
    return Pair(f"{kind}, {family}", FAMILIES[family], lambda special, tags: tiny(kind, special, tags))


REAL = [
    *(_real("llama2", family) for family in ("llama2", "zephyr", "mistral-v0.1", "mistral-v0.3", "gemma2")),
    _real("llama2", "phi3", strip=True),
    *(_real("llama2-file", family) for family in ("llama2", "zephyr", "mistral-v0.1", "mistral-v0.3")),
    *(_real("llama2", family, legacy=False) for family in ("llama2", "zephyr", "mistral-v0.3")),
    _real("qwen3", "qwen3", own=True),
    *(_real("qwen3", family) for family in ("qwen2.5", "qwen3-silent", "smollm3", "r1", "phi4", "granite")),
]
#: With tokenizers that only ``make tokenizers`` fetches.
MORE = [
    replace(_real("llama3_1", "zephyr", own=True), family=Family(None)),
    _real("llama3_1", "llama3.1"),
    _real("gemma3", "gemma3", own=True),
    _real("gemma3", "gemma2"),
    replace(_real("deepseek_v3", "r1", own=True), family=Family(None)),
    _real("deepseek_v3", "r1"),
    _real("gptoss", "harmony"),
]
#: Each kind with three of the families, so that every family is on a byte-level and on a SentencePiece kind; under stress each with all.
TINY = [
    _tiny(kind, family)
    for number, kind in enumerate(KINDS)
    for place, family in enumerate(FAMILIES)
    if STRESS or (place - 3 * number) % len(FAMILIES) in (0, 5, 10)
]
PAIRS = {pair.name: pair for pair in [*REAL, *MORE, *TINY]}
