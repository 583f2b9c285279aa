"""One look at everything that a stored header or a row of the index says of a context, before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from kvzip_memory.context import Recipe, Source

ALIGNMENT = 4096
#: Bytes of an element, by what safetensors calls its type.
ELEMENT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_TOKENS = 1 << 26  # more than any model takes
_MOST = 1 << 50

Check = Callable[[Any], bool]


class OddFactError(ValueError):
    """A fact that is missing, of another kind, or contradicts others; says which."""


def _whole(most: int = _MOST, least: int = 0) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _number(least: float = -math.inf, most: float = math.inf) -> Check:
    return lambda value: type(value) in (int, float) and abs(value) < _MOST and least <= value <= most


def _text(value: Any) -> bool:
    return type(value) is str


def _true_or_false(value: Any) -> bool:
    return type(value) is bool


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check) -> Check:
    return lambda value: type(value) in (list, tuple) and all(map(check, value))


def _mapping(check: Check) -> Check:
    return lambda value: type(value) is dict and all(map(_text, value)) and all(map(check, value.values()))


def _fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A mapping with these fields, and other ones that are not looked at."""

    def check(value: Any) -> bool:
        return type(value) is dict and not any(True for _ in _odd(value, required, optional or {}))

    return check


def _odd(facts: Mapping[str, Any], required: Mapping[str, Check], optional: Mapping[str, Check]) -> Iterator[str]:
    for name, check in required.items():
        if name not in facts or not check(facts[name]):
            yield name
    for name, check in optional.items():
        if name in facts and not check(facts[name]):
            yield name


def _only(check: Check, kind: type) -> Check:
    known = {field.name for field in fields(kind)}
    return lambda value: check(value) and value.keys() <= known


_IDENTITY = _fields({}, {"format": _whole(), "ratio": _number(0, 1), "tenant": _or_none(_text), "text": _text, "tokens": _text})
_IDS = _list(_whole(2**31 - 1))
_COMMON: dict[str, Check] = {
    "identity": lambda value: _mapping(lambda _: True)(value) and _IDENTITY(value),
    "n_tokens": _whole(_TOKENS),
    "nbytes": _whole(),
    "ratio": _number(0, 1),
}
_TIMES: dict[str, Check] = {"created": _number(), "expires": _or_none(_number()), "coarsest": _or_none(_number(0, 1))}
_CATALOG: dict[str, Check] = {"group": _text, "names": _mapping(_number()), "tags": _list(_text)}
_ROW: dict[str, Check] = {**_COMMON, **_CATALOG, "key": _text, "file_nbytes": _whole()}
_ROW_MORE: dict[str, Check] = {**_TIMES, "pinned": _true_or_false, "used": _number(), "beginning": _text, "former": _list(_text)}
_RECIPE = _fields(
    {"opening": _IDS, "separator": _text, "closing": _IDS, "next_turn": _IDS},
    {"role": _text, "tools": _or_none(_text), "tail": _text, "system": _text},
)
_SOURCE = _fields({"name": _text, "metadata": _mapping(lambda _: True), "start": _whole(), "end": _whole()}, {"shown": _true_or_false})
_SUMS: dict[str, Check] = {"xxh3": _text, "hmac": _text}
_HEADER: dict[str, Check] = {
    **_COMMON,
    "name": _or_none(_text),
    "protected": _whole(),
    "dense_nbytes": _whole(),
    "recipe": _only(_RECIPE, Recipe),
    "sources": _list(_only(_SOURCE, Source)),
    "layers": _list(_fields({"lengths": _list(_whole()), "window": _or_none(_whole(least=1))})),
    "catalog": _fields({}, {**_CATALOG, **_TIMES}),
    "extents": _list(
        _fields({"name": _text, "dtype": lambda v: _text(v) and v in ELEMENT, "shape": _list(_whole()), "padded": _whole()}, _SUMS)
    ),
}


is_size: Check = _whole()


def check_row(row: Mapping[str, Any]) -> None:
    """Look at the row of a context.

    Raises:
        OddFactError: it is none of ours.
    """
    for odd in _odd(row, _ROW, _ROW_MORE):
        raise OddFactError(f"{odd} is missing or of another kind")


def check_header(facts: Any) -> None:
    """Look at a header's facts.

    Raises:
        OddFactError: it is none of ours.
    """
    if type(facts) is not dict:
        raise OddFactError("the facts are no mapping")
    for odd in _odd(facts, _HEADER, _TIMES):
        raise OddFactError(f"{odd} is missing or of another kind")
    n, expected = facts["n_tokens"], _tensors(facts)
    if facts["protected"] > n or any(not source["start"] <= source["end"] <= n for source in facts["sources"]):
        raise OddFactError("protected or sources go beyond the tokens")
    if [extent["name"] for extent in facts["extents"]] != [name for name, _, _ in expected]:
        raise OddFactError("the extents are not those of the layers")
    for extent, (name, rows, types) in zip(facts["extents"], expected, strict=True):
        shape, size = extent["shape"], math.prod(extent["shape"]) * ELEMENT[extent["dtype"]]
        if shape[:1] != [rows] or len(shape) != (2 if types is _FLOATS else 1) or extent["dtype"] not in types:
            raise OddFactError(f"the extent {name} is not as its layer says")
        if extent["padded"] != size + -size % ALIGNMENT:
            raise OddFactError(f"the extent {name} has another size than its shape")


def _tensors(facts: Mapping[str, Any]) -> list[tuple[str, int, set[str]]]:
    """Name, rows and possible types of each extent, in their order."""
    named, expected = {extent["name"] for extent in facts["extents"]}, []
    for i, layer in enumerate(facts["layers"]):
        rows = sum(layer["lengths"])
        expected += [(f"layer.{i}.key", rows, _FLOATS), (f"layer.{i}.value", rows, _FLOATS), (f"layer.{i}.position", rows, {"I32"})]
        if f"layer.{i}.score" in named:
            expected.append((f"layer.{i}.score", rows, {"F16"}))
    return [*expected, ("token_ids", facts["n_tokens"], {"I32"})]
