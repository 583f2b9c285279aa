# ruff: noqa: E501
"""Libraries for guided decoding on 200 random JSON schemas: compiling, masks a token, and what of JSON Schema they keep to.

python benchmarks/guidance.py     with llguidance, xgrammar and outlines-core installed (a venv of its own, see docs/benchmarks.md)
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common import gemma3, save, smollm2
from kvzip_memory.prompting.guidance import Guidance

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from schemas import random_schema, random_value

SCHEMAS = 200
KEYWORDS: dict[str, tuple[dict[str, Any], Any, Any]] = {  # a schema, a value it allows, one it forbids
    "additionalProperties": ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, {"a": 1}, {"b": 1}),
    "additionalProperties typed": ({"type": "object", "additionalProperties": {"type": "integer"}}, {"b": 1}, {"b": "1"}),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, 4, 2),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "a"),
    "const": ({"const": "é"}, "é", "e"),
    "enum": ({"enum": ["a", 1]}, 1, 2),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 2}, 1.5, 2),
    "format date-time": ({"type": "string", "format": "date-time"}, "2026-11-22T10:00:00Z", "yesterday"),
    "format email": ({"type": "string", "format": "email"}, "a@example.org", "a"),
    "format uuid": ({"type": "string", "format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "123"),
    "maxItems": ({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [1, 2], [1, 2, 3]),
    "maxLength": ({"type": "string", "maxLength": 3}, "東京塔", "東京タワー"),
    "maximum": ({"type": "integer", "maximum": 120}, 119, 121),
    "minItems": ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, [1, 2], [1]),
    "minimum": ({"type": "number", "minimum": -1.5}, -1.25, -2),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, 15, 16),
    "oneOf": ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "a", None),
    "pattern": ({"type": "string", "pattern": "^[a-z]+[0-9]$"}, "abc1", "abc"),
    "patternProperties": ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}, {"x1": 1}, {"y": 1}),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False}, [1, "a"], ["a", 1]),
    "recursion": ({"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "additionalProperties": False}}, "$ref": "#/$defs/n"}, {"n": {"n": {}}}, {"n": 1}),
    "required": ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["b"]}, {"b": 1}, {"a": 1}),
    "type list": ({"type": ["string", "null"]}, None, 1),
}  # fmt: skip


class Guide(Protocol):
    """One answer under way."""

    def allowed(self) -> Callable[[int], bool]: ...

    def take(self, token: int) -> None: ...


def llguidance(tokenizer: PreTrainedTokenizerFast, size: int) -> Callable[[dict[str, Any]], Guide]:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    wrapped = from_tokenizer(tokenizer, n_vocab=size)

    class Matcher:
        def __init__(self, schema: dict[str, Any]) -> None:
            self.matcher = LLMatcher(wrapped, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
            if self.matcher.is_error():
                raise ValueError(self.matcher.get_error())

        def allowed(self) -> Callable[[int], bool]:
            bits = self.matcher.compute_bitmask()
            return lambda token: bool(bits[token >> 3] >> (token & 7) & 1)

        def take(self, token: int) -> None:
            self.matcher.consume_token(token)

    return Matcher


def xgrammar(tokenizer: PreTrainedTokenizerFast, size: int) -> Callable[[dict[str, Any]], Guide]:
    import xgrammar as xgr

    info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    compiler = xgr.GrammarCompiler(info, cache_enabled=False, max_threads=1)

    class Matcher:
        def __init__(self, schema: dict[str, Any]) -> None:
            self.matcher = xgr.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema), any_whitespace=True))
            self.bits = xgr.allocate_token_bitmask(1, size)

        def allowed(self) -> Callable[[int], bool]:
            self.matcher.fill_next_token_bitmask(self.bits)
            return lambda token: bool(int(self.bits[0, token >> 5]) >> (token & 31) & 1)

        def take(self, token: int) -> None:
            self.matcher.accept_token(token)

    return Matcher


def outlines_core(tokenizer: PreTrainedTokenizerFast, size: int) -> Callable[[dict[str, Any]], Guide]:
    from outlines_core import Guide as OutlinesGuide
    from outlines_core import Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    tokens: dict[bytes, list[int]] = {}
    special = set(tokenizer.all_special_ids)
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        if i not in special and text:
            tokens.setdefault(text.encode(), []).append(i)
    vocabulary = Vocabulary(tokenizer.eos_token_id, tokens)

    class Matcher:
        def __init__(self, schema: dict[str, Any]) -> None:
            self.guide = OutlinesGuide(Index(build_regex_from_schema(json.dumps(schema)), vocabulary))

        def allowed(self) -> Callable[[int], bool]:
            return set(self.guide.get_tokens()).__contains__

        def take(self, token: int) -> None:
            self.guide.advance(token, return_tokens=False)

    return Matcher


LIBRARIES = {"llguidance": llguidance, "xgrammar": xgrammar, "outlines-core": outlines_core}


def walk(guide: Guide, ids: list[int], eos: int) -> tuple[bool, list[float]]:
    """Whether all of an answer and its end are allowed, and milliseconds a mask."""
    ms = []
    for token in [*ids, eos]:
        began = time.perf_counter()
        allowed = guide.allowed()
        ms.append(1e3 * (time.perf_counter() - began))
        if not allowed(token):
            return False, ms
        if token != eos:
            guide.take(token)
    return True, ms


def measure(name: str, tokenizer: PreTrainedTokenizerFast, size: int, budget_s: float) -> dict[str, Any]:
    began = time.perf_counter()
    make = LIBRARIES[name](tokenizer, size)
    setup = time.perf_counter() - began
    rng = random.Random(7)
    compile_ms, mask_ms, refused, failed, done = [], [], 0, 0, 0
    began = time.perf_counter()
    for _ in range(SCHEMAS):
        schema = random_schema(rng)
        value = random_value(schema, rng)
        if time.perf_counter() - began > budget_s:
            break
        done += 1
        start = time.perf_counter()
        try:
            guide = make(schema)
        except Exception:
            failed += 1
            continue
        compile_ms.append(1e3 * (time.perf_counter() - start))
        ids = tokenizer(json.dumps(value, ensure_ascii=False), add_special_tokens=False).input_ids
        kept, ms = walk(guide, ids, tokenizer.eos_token_id)
        refused += not kept
        mask_ms += ms
    return {
        "library": name,
        "version": importlib.metadata.version(name),
        "vocabulary": size,
        "setup_s": round(setup, 2),
        "schemas": done,
        "not_compiled": failed,
        "refused_a_valid_value": refused,
        "compile_ms": _spread(compile_ms),
        "mask_ms": _spread(mask_ms),
    }


def coverage(name: str, tokenizer: PreTrainedTokenizerFast, size: int) -> dict[str, str]:
    """By keyword: kept; ignored (a forbidden value passes); wrong (an allowed one does not); refused (an error says so)."""
    make, found = LIBRARIES[name](tokenizer, size), {}
    for keyword, (schema, good, bad) in KEYWORDS.items():
        try:
            results = [
                walk(
                    make(schema), tokenizer(json.dumps(v, ensure_ascii=False), add_special_tokens=False).input_ids, tokenizer.eos_token_id
                )[0]
                for v in (good, bad)
            ]
        except Exception:
            found[keyword] = "refused"
            continue
        found[keyword] = "wrong" if not results[0] else "ignored" if results[1] else "kept"
    return found


def whole_cost(tokenizer: PreTrainedTokenizerFast, size: int) -> dict[str, Any]:
    """What guidance adds to a sampled token in this package: mask, masked logits, the next state, and an ending within reach; and what it
    takes once an answer to know the shortest."""
    guidance = Guidance(tokenizer, size, frozenset({tokenizer.eos_token_id}))
    rng, logits, ms, search_ms = random.Random(7), torch.randn(size), [], []
    for _ in range(SCHEMAS):
        schema = random_schema(rng)
        value = random_value(schema, rng)
        grammar = guidance.json(schema)
        began = time.perf_counter()
        limit = 1000 + grammar.least
        search_ms.append(1e3 * (time.perf_counter() - began))
        guide = grammar.start(limit)
        for token in tokenizer(json.dumps(value, ensure_ascii=False), add_special_tokens=False).input_ids:
            began = time.perf_counter()
            guide.mask(logits)
            guide.take(token)
            ms.append(1e3 * (time.perf_counter() - began))
    return {"vocabulary": size, "ms_a_token": _spread(ms), "ms_the_shortest_answer": _spread(search_ms)}


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        "max": round(ordered[-1], 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    tokenizers = [AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name) for path in (smollm2(), gemma3())]
    table = []
    for tokenizer in tokenizers:
        for name in LIBRARIES:
            row = measure(name, tokenizer, len(tokenizer), budget_s=60)
            print(row, flush=True)
            table.append(row)
    kept = {name: coverage(name, tokenizers[0], len(tokenizers[0])) for name in LIBRARIES}
    for name, found in kept.items():
        print(name, {k: v for k, v in found.items() if v != "kept"})
    cost = [whole_cost(tokenizer, len(tokenizer)) for tokenizer in tokenizers]
    print(cost)
    save("guidance", {"table": table, "coverage": kept, "whole_cost": cost})


if __name__ == "__main__":
    main()
