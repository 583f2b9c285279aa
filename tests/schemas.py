"""Random JSON schemas and values that satisfy them: nested, with enums, optional properties, arrays, bounds and unicode."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "größe", "Ort", "price", "東京", "is open", "tags", "née", "código", "a.b", "$ref_", 'quo"te', "пример", "emoji 🙂", "x"]
TEXTS = ["", "plain", "two words", "ünïcode", "東京タワー", 'a "quoted" part', "back\\slash", "new\nline", "🙂🙃", "null", "{}"]


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """An object's schema; a seeded ``rng`` gives the same one."""
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _random_value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _random_value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "enum", "null_or", "bounded", "const"]
    kind = rng.choice(kinds + (["object", "array", "union"] * 2 if depth > 0 else []))
    if kind == "object":
        return random_schema(rng, depth)
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": _random_value(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "union":
        return {"anyOf": [random_schema(rng, depth - 1), {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]}
    if kind == "enum":
        return {"enum": rng.sample([*TEXTS[1:], 1, -2.5, True, None], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(TEXTS)}
    if kind == "null_or":
        return {"anyOf": [{"type": rng.choice(["string", "integer"])}, {"type": "null"}]}
    if kind == "bounded":
        low = rng.randint(-50, 50)
        return rng.choice(
            [
                {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)},
                {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 12)},
                {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                {"type": "string", "format": "date"},
            ]
        )
    return {"type": kind}


def random_value(schema: dict[str, Any], rng: random.Random) -> Any:
    """A value that satisfies a schema of :func:`random_schema`."""
    if "anyOf" in schema:
        return random_value(rng.choice(schema["anyOf"]), rng)
    if "enum" in schema or "const" in schema:
        return rng.choice(schema["enum"]) if "enum" in schema else schema["const"]
    kind = schema["type"]
    if kind == "object":
        return {
            name: random_value(value, rng)
            for name, value in schema["properties"].items()
            if name in schema["required"] or rng.random() < 0.5
        }
    if kind == "array":
        return [random_value(schema["items"], rng) for _ in range(rng.randint(schema.get("minItems", 0), schema["maxItems"]))]
    if "pattern" in schema:
        return f"AB-{rng.randint(0, 999):03}"
    if "format" in schema:
        return f"20{rng.randint(10, 30)}-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}"
    if kind == "string":
        return "x" * rng.randint(1, schema["maxLength"]) if "maxLength" in schema else rng.choice(TEXTS)
    if kind == "integer":
        return rng.randint(schema.get("minimum", -1000), schema.get("maximum", 1000))
    return {"number": rng.choice([0.5, -3, 1e3, 2.25]), "boolean": rng.random() < 0.5, "null": None}[kind]
