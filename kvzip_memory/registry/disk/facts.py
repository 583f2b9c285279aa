"""One look at everything that a stored header, a row of the index, a line of turns or a note says, before any of it is used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from kvzip_memory.context import Recipe, Source, parts_of

ALIGNMENT = 4096
#: Bytes of an element, by what safetensors calls its type.
ELEMENT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1, "U8": 1}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_CODES = {"I8", "U8"}
_TOKENS = 1 << 26  # more than any model takes
_MOST = 1 << 50
#: The last time that a file or row may have, in seconds since the epoch.
LATEST = float(_MOST - 1)

Check = Callable[[Any], bool]


class OddFactError(ValueError):
    """A fact that is missing, of another kind, or contradicts others; says which."""


def _whole(most: int = _MOST, least: int = 0) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _number(least: float = -math.inf, most: float = math.inf) -> Check:
    return lambda value: type(value) in (int, float) and abs(value) < _MOST and least <= value <= most


def _any_text(value: Any) -> bool:
    """Also one with half a character, such as the name of a file that is not UTF-8."""
    return type(value) is str


def _text(value: Any) -> bool:
    """What a name, a tag or a prompt can have."""
    try:
        return type(value) is str and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def is_id(value: Any) -> bool:
    """Whether it can be part of a row's key: a digest, or a number and a digest."""
    return type(value) is str and value.isascii() and len(value) <= 256


def _true_or_false(value: Any) -> bool:
    return type(value) is bool


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check) -> Check:
    return lambda value: type(value) in (list, tuple) and all(map(check, value))


def _mapping(check: Check) -> Check:
    return lambda value: type(value) is dict and all(map(_any_text, value)) and all(map(check, value.values()))


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


def _state(value: Any) -> bool:
    """What a state is called."""
    return _text(value) and re.fullmatch(r"[0-9]{1,4}\.(conv|recurrent)\.[0-9]{1,4}", value) is not None


def _is_part(value: Any) -> bool:
    if not _list(lambda _: True)(value) or len(value) not in (2, 4, 5):
        return False
    shift, others = value[2:3], value[3:]
    moved = all(map(_whole(_TOKENS, least=-_TOKENS), shift)) and all(map(_whole(_TOKENS), others))
    return is_id(value[0]) and _SOME_TOKENS(value[1]) and moved


_SOME_TOKENS: Check = _whole(_TOKENS, least=1)
_ANYTHING: Check = _mapping(lambda _: True)
_IDENTITY = _fields(
    {"format": _whole(), "ratio": _number(0, 1), "tenant": _or_none(is_id), "text": is_id},
    {
        "tokens": is_id,
        "recipe": is_id,
        "protected": _whole(),
        "parent": _or_none(is_id),
        "system": _or_none(is_id),
        "scorer": _or_none(_ANYTHING),
        "shift": _whole(_TOKENS, least=-_TOKENS),
        "parts": _list(lambda part: _is_part(part)),
        "again": _list(lambda span: _SPAN(span)),
    },
)
_IDS = _list(_whole(2**31 - 1))
_COMMON: dict[str, Check] = {
    "identity": lambda value: _ANYTHING(value) and _IDENTITY(value),
    "n_tokens": _SOME_TOKENS,
    "nbytes": _whole(),
    "ratio": _number(0, 1),
}
_TIMES: dict[str, Check] = {"created": _number(), "expires": _or_none(_number()), "coarsest": _or_none(_number(0, 1))}
_NAMES: Check = lambda value: _mapping(_number())(value) and all(map(_text, value))  # noqa: E731
_CATALOG: dict[str, Check] = {"group": is_id, "names": _NAMES, "tags": _list(_text)}
_ROW: dict[str, Check] = {**_COMMON, **_CATALOG, "key": is_id, "file_nbytes": _whole()}
_ROW_MORE: dict[str, Check] = {**_TIMES, "pinned": _true_or_false, "used": _number(), "beginning": is_id, "former": _list(_text)}
_BAD: dict[str, Check] = {"key": is_id, "reason": _any_text, "time": _number(), "tenant": _or_none(_text)}
_FORGOTTEN: dict[str, Check] = {
    "before": _number(),
    "time": _number(),
    "notes": _list(
        lambda note: _list(lambda _: True)(note) and len(note) == 3 and _number()(note[0]) and is_id(note[1]) and _list(is_id)(note[2])
    ),
}
_RECIPE = _fields(
    {"opening": _IDS, "separator": _text, "closing": _IDS, "next_turn": _IDS},
    {"role": _text, "tools": _or_none(_text), "tail": _text, "system": _text},
)
_SOURCE = _fields({"name": _any_text, "metadata": _ANYTHING, "start": _whole(), "end": _whole()}, {"shown": _true_or_false})
_SPAN: Check = lambda value: _list(_whole())(value) and len(value) == 2 and value[0] < value[1]  # noqa: E731
_SUMS: dict[str, Check] = {"xxh3": _text, "hmac": _text}
_LAYERS: Check = _list(
    _fields(
        {"lengths": _list(_whole()), "window": _or_none(_whole(least=1))},
        {"chunked": _true_or_false, "shared": _true_or_false},
    )
)
_HEADER: dict[str, Check] = {
    **_COMMON,
    "name": _or_none(_text),
    "protected": _whole(),
    "dense_nbytes": _whole(),
    "recipe": _only(_RECIPE, Recipe),
    "sources": _list(_only(_SOURCE, Source)),
    "layers": _LAYERS,
    "catalog": _fields({}, {**_CATALOG, **_TIMES}),
    "extents": _list(
        _fields({"name": _text, "dtype": lambda v: _text(v) and v in ELEMENT, "shape": _list(_whole()), "padded": _whole()}, _SUMS)
    ),
}


_LABEL: dict[str, Check] = {
    **{"name": _text, "tenant": _or_none(is_id), "family": is_id, "key": is_id, "loaded": _number()},
    "sources": _list(lambda source: _list(lambda _: True)(source) and len(source) == 2 and _any_text(source[0]) and _ANYTHING(source[1])),
}
_CALL = _fields({"id": _or_none(_text), "name": _text, "arguments": lambda value: _text(value) or _ANYTHING(value)})
_ROLES = {"system", "user", "assistant", "tool"}
_TURN = _fields(
    {"role": lambda value: _text(value) and value in _ROLES, "content": _text},
    {"reasoning": _text, "tool_call_id": _or_none(_text), "tool_calls": _list(_CALL)},
)
_PLACE: Check = lambda value: _list(_whole())(value) and len(value) == 2  # noqa: E731
_MADE: dict[str, Check] = {"context": is_id, "first": _PLACE, "last": _PLACE, "model": is_id}
_LINE: dict[str, Check] = {"session": _text, "ttl": _or_none(_number(0)), "turns": _list(_TURN)}
_PROGRESS: dict[str, Check] = {
    **{"key": is_id, "done": _whole(), "total": _whole()},
    "stage": lambda value: _text(value) and len(value) <= 100,
}

is_size: Check = _whole()


def is_bad(row: Mapping[str, Any]) -> bool:
    """Whether it can be the row of a file in quarantine."""
    return not any(_odd(row, {"nbytes": is_size}, _BAD))


def is_forgotten(row: Mapping[str, Any]) -> bool:
    """Whether it can be the row of what was forgotten."""
    return not any(_odd(row, {}, _FORGOTTEN))


def is_label(row: Any) -> bool:
    """Whether it can be what a name means."""
    return type(row) is dict and row.keys() <= _LABEL.keys() and not any(_odd(row, _LABEL, {}))


def is_line(record: Mapping[str, Any]) -> bool:
    """Whether it can be a line of turns, or of what was made of them."""
    return not any(_odd(record, _MADE if record.keys() & _MADE.keys() else {}, _LINE))


def is_progress(note: Any) -> bool:
    """Whether it can be how far a build is."""
    return type(note) is dict and not any(_odd(note, _PROGRESS, {})) and note["done"] <= note["total"]


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
    optional = {**_TIMES, "coarsest": _number(0, 1), "fitted": _list(_SPAN), "states": _list(_state), "before": _list(_LAYERS)}
    for odd in _odd(facts, _HEADER, optional):
        raise OddFactError(f"{odd} is missing or of another kind")
    n, expected = facts["n_tokens"], _tensors(facts)
    if facts["protected"] > n or any(not source["start"] <= source["end"] <= n for source in facts["sources"]):
        raise OddFactError("protected or sources go beyond the tokens")
    if sorted({*facts.get("states", ())}) != [*facts.get("states", ())]:
        raise OddFactError("a state is there twice, or out of order")
    edges = [edge for span in facts.get("fitted", ()) for edge in span]
    if edges != sorted(edges) or edges[-1:] > [n]:
        raise OddFactError("the fitted spans are none of its tokens")
    parts, before = parts_of(facts["identity"]), facts.get("before", [])
    beside = n - sum(part.n_tokens for part in parts)
    if beside < 0 or len(before) not in (0, len(parts)):
        raise OddFactError("the parts before it are not those of its key")
    if parts and max(part.nearer for part in parts) > min(parts[0].nearer, n - facts["protected"]):
        raise OddFactError("a part is seen nearer than its tokens could be")
    if not any(layer["window"] is None and layer["lengths"] for layer in facts["layers"]):
        raise OddFactError("no layer has full attention")
    hidden, counts = [0, *(part.first for part in parts)], [beside, *(part.n_tokens for part in parts)]
    for first, tokens, layers in zip(hidden, counts, [facts["layers"], *before], strict=False):
        if any(length > (first + tokens if layer["window"] is None else n) for layer in layers for length in layer["lengths"]):
            raise OddFactError("a head has more pairs than there are tokens")
    first = before[0] if before else [] if parts else facts["layers"]
    if any(length < facts["protected"] for layer in first if layer["window"] is None for length in layer["lengths"]):
        raise OddFactError("a head has fewer pairs than are protected")
    for name in ("ratio", "protected"):
        if facts["identity"].get(name, facts[name]) != facts[name]:
            raise OddFactError(f"{name} is not that of its key")
    if [extent["name"] for extent in facts["extents"]] != [name for name, _, _ in expected]:
        raise OddFactError("the extents are not those of the layers")
    codes: Mapping[str, Any] = {}
    for extent, (name, rows, types) in zip(facts["extents"], expected, strict=True):
        shape, size = extent["shape"], math.prod(extent["shape"]) * ELEMENT[extent["dtype"]]
        ragged = not name.startswith("state.")
        if not ragged and not (0 < math.prod(shape) < _MOST and min(shape) > 0):
            raise OddFactError(f"the extent {name} has no shape that a state has")
        dims = 2 if name.endswith((".key", ".value", ".scale")) else 1
        if shape[:1] != [rows] or (ragged and len(shape) != dims) or extent["dtype"] not in types:
            raise OddFactError(f"the extent {name} is not as its layer says")
        if name.endswith(".scale"):
            dim = codes["shape"][1] * (1 if codes["dtype"] == "I8" else 2)
            if not shape[1] or dim % shape[1]:
                raise OddFactError(f"the extent {name} is not as its codes are")
        codes = extent
        if extent["padded"] != size + -size % ALIGNMENT:
            raise OddFactError(f"the extent {name} has another size than its shape")


def _tensors(facts: Mapping[str, Any]) -> list[tuple[str, int, set[str]]]:
    """Name, rows and possible types of each extent, in their order."""
    named = {extent["name"] for extent in facts["extents"]}
    expected = [*_tensors_of("layer", facts["layers"], named)]
    expected += [(f"state.{name}", 1, _FLOATS) for name in facts.get("states", ())]
    for number, layers in enumerate(facts.get("before", ())):
        expected += _tensors_of(f"before.{number}", layers, named)
    return [*expected, ("token_ids", facts["n_tokens"], {"I32"})]


def _tensors_of(part: str, layers: Sequence[Mapping[str, Any]], named: Collection[str]) -> Iterator[tuple[str, int, set[str]]]:
    for i, layer in enumerate(layers):
        rows = sum(layer["lengths"])
        for kind in ("key",) if layer.get("shared") else ("key", "value"):
            has_codes = f"{part}.{i}.{kind}.scale" in named
            yield f"{part}.{i}.{kind}", rows, _CODES if has_codes else _FLOATS
            if has_codes:
                yield f"{part}.{i}.{kind}.scale", rows, {"BF16"}
        yield f"{part}.{i}.position", rows, {"I32"}
        if f"{part}.{i}.score" in named:
            yield f"{part}.{i}.score", rows, {"F16"}
