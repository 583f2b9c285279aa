"""JSON schemas as people and tools bring them: odd spellings put right, and what of them cannot guide."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote

from llguidance import LLMatcher

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.cleaning import MOST_OF_SCHEMA, check_nesting
from kvzip_memory.system.printable import brief

#: One way to write each value: a model cannot lose itself in whitespace.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
#: Formats of strings that llguidance keeps to.
_FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
#: Values that are no schemas, and maps of which the keys are no keywords.
_VALUES = {"enum", "const", "default", "example", "examples"}
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
#: Types as other languages and OpenAPI call them.
_TYPES = {
    **{"str": "string", "text": "string", "int": "integer", "long": "integer", "float": "number", "double": "number", "decimal": "number"},
    **{"bool": "boolean", "dict": "object", "map": "object", "list": "array", "tuple": "array", "none": "null"},
}
#: Keywords that only narrow what a schema allows, and that llguidance does not know.
NARROWING = frozenset(
    {"uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties", "propertyNames", "not"}
    | {"if", "then", "else", "dependencies", "dependentRequired", "dependentSchemas", "$dynamicRef", "$recursiveRef"}
)
#: Such as say nothing, and the values with which they do.
_SAY_NOTHING: dict[str, list[Any]] = {
    "uniqueItems": [False],
    **{key: [True, {}] for key in ("unevaluatedItems", "unevaluatedProperties", "propertyNames")},
    **{key: [{}] for key in ("dependencies", "dependentRequired", "dependentSchemas")},
}
_ANCHORS = frozenset({"$dynamicAnchor", "$recursiveAnchor"})
#: llguidance cannot count further.
_MOST_NUMBER, _MOST_INTEGER = 10**15, 2**63 - 1024
#: Pydantic's URLs of the web differ from others by their length alone.
_WEB = {"format": "uri", "maxLength": 2083}

#: llguidance goes through schemas and what they refer to by recursion, with 11 KB of stack a level; it would take the process down.
_STACK = 256 << 20
_starting = threading.Lock()  # the size of stacks is the process'
T = TypeVar("T")


def _in_child() -> None:
    global _starting
    _starting = threading.Lock()  # another thread may have had the parent's


os.register_at_fork(after_in_child=_in_child)


def with_room(work: Callable[[], T]) -> T:
    """What ``work`` gives or raises, in a thread with stack for all levels that a schema of :data:`MOST_OF_SCHEMA` parts can have."""
    result = Future[T]()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    with _starting:
        before = threading.stack_size(_STACK)
        try:
            threading.Thread(target=run, name="kvzip-schema", daemon=True).start()
        finally:
            threading.stack_size(before)
    return result.result()


def json_rule(schema: Mapping[str, Any]) -> str:
    """A grammar's expression for the JSON of a schema.

    Raises:
        InputError: not a schema, one that is too deep or too large, or one of which no answer ever ends.
    """
    if not isinstance(schema, Mapping):
        raise InputError(f"a schema is {brief(schema)}; it must be a mapping, {{}} for any value")
    check_nesting(schema, "a schema", MOST_OF_SCHEMA)
    made = closed(schema)
    if (endless := _endless(made)) is not None:
        raise InputError(
            f"no answer that keeps to this schema ever ends: {brief(endless)} requires itself; let what leads back be null or left out"
        )
    return "%json " + json.dumps({**made, "x-guidance": _LAYOUT})


def closed(schema: Any, parts: frozenset[str] | None = None) -> Any:
    """The schema as it guides: spelled as the standard spells it, and with no other properties than it names.

    An object that says which others it has keeps them. Formats that say nothing are left out, and alternatives of which it cannot be
    guided whether they hold, if others stay.

    ``parts`` are references to what is a part of an ``allOf``: these see each other's properties, so that none can forbid what it
    does not name.
    """
    parts = frozenset(_references(schema)) if parts is None else parts
    if isinstance(schema, list):
        return [closed(item, parts) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    schema = spelled(schema)
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            made[key] = {name: item if f"#/{key}/{name}" in parts else closed(item, parts) for name, item in value.items()}
        elif key in ("anyOf", "oneOf") and isinstance(value, list):
            made[key] = [closed(item, parts) for item in value if not _left_out(item, None)[1]] or closed(value, parts)
        elif key != "format" or not isinstance(value, str) or value in _FORMATS:  # others are annotations
            made[key] = value if key == "allOf" or key in _VALUES else closed(value, parts)
    if isinstance(schema.get("properties"), Mapping) and not {"additionalProperties", "patternProperties", "allOf"} & schema.keys():
        if isinstance(required := schema.get("required"), list):  # what has to be there may be
            made["properties"] |= {name: {} for name in required if isinstance(name, str) and name not in made["properties"]}
        made["additionalProperties"] = False
    if made.get("additionalProperties") is False and schema.get("unevaluatedProperties") is False:
        del made["unevaluatedProperties"]
    return made


def spelled(schema: Mapping[str, Any]) -> dict[str, Any]:
    """One level of a schema with what is written in other ways than the standard's put right."""
    made = {
        key: value
        for key, value in schema.items()
        if (value is not None or key in _VALUES - {"enum"}) and value not in _SAY_NOTHING.get(key, []) and key not in _ANCHORS
    }
    kinds = made.get("type")
    if isinstance(kinds, str) and kinds.lower() in ("any", ""):
        del made["type"]
    elif isinstance(kinds, str):
        made["type"] = _kind(kinds)
    elif isinstance(kinds, list) and "any" in kinds:
        del made["type"]
    elif isinstance(kinds, list) and kinds:
        made["type"] = [_kind(kind) if isinstance(kind, str) else "null" if kind is None else kind for kind in kinds]
    if made.pop("nullable", False) is True and isinstance(made.get("type"), str) and made["type"] != "null":
        made["type"] = [made["type"], "null"]
        if isinstance(made.get("enum"), list) and None not in made["enum"]:
            made["enum"] = [*made["enum"], None]
    for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
        if isinstance(made.get(key), float) and made[key].is_integer():
            made[key] = int(made[key])
    whole = made.get("type") == "integer"
    most = _MOST_INTEGER if whole else _MOST_NUMBER
    for key, sign in (("minimum", -1), ("exclusiveMinimum", -1), ("maximum", 1), ("exclusiveMaximum", 1)):
        if _is_number(bound := made.get(key, 0)) and sign * bound > most:
            made[key] = sign * most
    if _WEB.items() <= made.items() and "pattern" not in made:
        made = {"type": "string", "pattern": r"^https?://[a-z0-9]+(\.[a-z0-9]+)*(/[A-Za-z0-9._~/?&=%#+-]*)?$", "maxLength": 2083}
    return made


def _kind(name: str) -> str:
    lower = name.lower()
    return _TYPES.get(lower, lower if lower in _KINDS else name)


def _references(schema: Any, inside: bool = False) -> Iterator[str]:
    """What a schema refers to within its ``allOf``."""
    for item in schema if isinstance(schema, list) else ():
        yield from _references(item, inside)
    for key, value in schema.items() if isinstance(schema, Mapping) else ():
        if key == "$ref" and inside and isinstance(value, str):
            yield value
        yield from _references(value, inside or key == "allOf")


# -- what nothing can be ------------------------------------------------------------------------------------------


def _endless(schema: Mapping[str, Any]) -> str | None:
    """A reference to what only endless values keep to, if the schema cannot do without; no value but such may be the schema's."""
    known: set[str] = set()  # to what has finite values
    open_: dict[str, Any] = {
        key: _referred(key, schema) for key in _all_references(schema) if (key == "#" or key.startswith("#/")) and _found(key, schema)
    }
    users: dict[str, set[str]] = {key: set() for key in open_}
    for key, part in open_.items():
        for inner in _all_references(part) & open_.keys():
            users[inner].add(key)
    looked_at = set(open_)
    while looked_at:  # again where something has become known
        key = looked_at.pop()
        if key not in known and _finite(open_[key], known, open_):
            known.add(key)
            looked_at |= users[key] - known
    return None if _finite(schema, known, open_) else min(open_.keys() - known)


def _all_references(schema: Any) -> set[str]:
    """What a schema refers to."""
    parts: list[Any] = schema if isinstance(schema, list) else [*schema.values()] if isinstance(schema, Mapping) else []
    own = {schema["$ref"]} if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) else set()
    return own.union(*map(_all_references, parts))


def _finite(schema: Any, known: set[str], all_: Mapping[str, Any]) -> bool:
    """Whether a schema has a finite value, as far as that is ``known`` of what it refers to; other faults of it are of no interest."""
    if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema:
        return True

    def finite(part: Any) -> bool:
        return _finite(part, known, all_)

    reference, kinds = schema.get("$ref"), schema.get("type", _KINDS)
    if isinstance(reference, str) and reference in all_ and reference not in known:
        return False
    if not all(map(finite, _listed(schema, "allOf"))):
        return False
    for key in ("anyOf", "oneOf"):
        if (choices := _listed(schema, key)) and not any(map(finite, choices)):
            return False
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if not kinds <= {"object", "array"}:
        return True
    # Each part is looked at once: twice at every level would be for ever.
    named = {name: finite(part) for name, part in (schema.get("properties") or {}).items()}
    other = schema.get("additionalProperties")
    others = finite(other)
    items = _listed(schema, "prefixItems") + _listed(schema, "items")
    fewest = schema.get("minItems", 0)
    inside = [*items[:fewest], *([schema.get("items")] if len(items) < fewest else [])]
    patterns = (schema.get("patternProperties") or {}).values()
    enough = (others and other is not False) or any(finite(part) for part in patterns if part is not False)
    enough = enough or sum(named.values()) >= schema.get("minProperties", 0)
    return ("object" in kinds and enough and all(named.get(name, others) for name in _listed(schema, "required"))) or (
        "array" in kinds and all(map(finite, inside))
    )


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    return value if isinstance(value := schema.get(key), list) else []


#: So much of a schema is shown.
_SHOWN = 120


def contradiction(schema: Mapping[str, Any]) -> str | None:
    """Where in a schema, and why, no value keeps to it, as far inside as that is so."""
    root = closed(schema)
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}

    def find(part: Any, place: str, above: frozenset[str]) -> str | None:
        whole = {**definitions, **part} if isinstance(part, Mapping) else part
        if part is not False and not (why := with_room(lambda: LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(whole)))):
            return None
        if part is False:
            return f"{place} is false"
        inner = {
            f"{place}/{key}/{i}": item for key in ("prefixItems", "anyOf", "oneOf", "allOf") for i, item in enumerate(_listed(part, key))
        }
        inner |= {f"{place}/properties/{name}": part.get("properties", {}).get(name, True) for name in _listed(part, "required")}
        if part.get("minItems", 0):
            inner[f"{place}/items"] = part.get("items", True)
        reference = part.get("$ref")
        if reference not in above and _found(reference, root):
            inner[reference] = _referred(reference, root)
        shown = json.dumps(part, ensure_ascii=False, default=repr)[:_SHOWN]
        found = (find(item, at, above | {reference}) for at, item in inner.items())
        return next(filter(None, found), f"{why.removeprefix('Unsatisfiable schema: ')} in {place}, {shown}")

    return find(root, "#", frozenset())


# -- what cannot guide -------------------------------------------------------------------------------------------


def guiding(schema: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What of a schema can guide, and the keywords that were left out: such as only narrow, and such as make no sense."""
    made, names = _left_out(schema, schema)
    return made, sorted(set(names))


def one_of_as_any(schema: Any) -> Any:
    """The schema with ``anyOf`` for each ``oneOf``."""
    if isinstance(schema, list):
        return [one_of_as_any(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {"anyOf" if key == "oneOf" else key: value if key in _VALUES else one_of_as_any(value) for key, value in schema.items()}


def _left_out(schema: Any, root: Mapping[str, Any] | None) -> tuple[Any, list[str]]:
    if isinstance(schema, list):
        parts = [_left_out(item, root) for item in schema]
        return [part for part, _ in parts], [name for _, names in parts for name in names]
    if not isinstance(schema, Mapping):
        return schema, []
    made: dict[str, Any] = {}
    names: list[str] = []
    for key, value in spelled(schema).items():
        nowhere = key == "$ref" and root is not None and not _found(value, root)
        if key in NARROWING or nowhere or (key in _SENSE and not _SENSE[key](value)):
            names.append(key)
        elif key in _NAMED:
            made[key] = {}
            for name, item in value.items():
                if key == "patternProperties" and not _compiles(name):
                    names.append(key)
                    continue
                made[key][name], more = _left_out(item, root)
                names += more
        elif key in _VALUES:
            made[key] = value
        else:
            made[key], more = _left_out(value, root)
            names += more
    if "type" in made and "enum" in made and not any(map(_is_of(made["type"]), made["enum"])):
        del made["type"]
        names.append("type")
    if "patternProperties" in names and "additionalProperties" in made:  # of these it is not known any more which they are
        made["additionalProperties"] = True
    return made, names


@lru_cache(maxsize=1024)
def _compiles(pattern: str) -> bool:
    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern})
    return not LLMatcher.validate_grammar_with_warnings(grammar)[0]


def _found(reference: Any, root: Mapping[str, Any]) -> bool:
    """Whether a reference is one into its own schema."""
    return isinstance(reference, str) and reference.startswith("#") and _referred(reference, root) is not _NOWHERE


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference is to; all of the schema for an anchor."""
    if not reference.startswith("#/"):
        return root
    at: Any = root
    for name in reference[2:].split("/"):
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(at, list) and name.isdigit() and int(name) < len(at):
            at = at[int(name)]
        elif isinstance(at, Mapping) and name in at:
            at = at[name]
        else:
            return _NOWHERE
    return at


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_schema(value: Any) -> bool:
    return isinstance(value, Mapping | bool)


def _are_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _is_kind(value: Any) -> bool:
    return value in _KINDS if isinstance(value, str) else isinstance(value, list) and bool(value) and all(kind in _KINDS for kind in value)


def _is_of(kinds: Any) -> Callable[[Any], bool]:
    """Whether values are of a type, or one of several."""
    classes: dict[str, Any] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "object": Mapping,
        "array": list,
        "null": type(None),
    }
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return lambda value: any(isinstance(value, classes[kind]) and (kind == "boolean") == isinstance(value, bool) for kind in kinds)


#: What a reference to nothing is to.
_NOWHERE = object()
_KINDS = ("string", "integer", "number", "boolean", "object", "array", "null")
#: What the values of keywords must be to make sense.
_SENSE: dict[str, Callable[[Any], bool]] = {
    "type": _is_kind,
    "enum": lambda value: isinstance(value, list) and bool(value),
    "pattern": lambda value: isinstance(value, str) and _compiles(value),
    "format": lambda value: isinstance(value, str),
    "multipleOf": lambda value: _is_number(value) and value > 0,
    "required": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "items": lambda value: _is_schema(value) or _are_schemas(value),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _is_size),
    **dict.fromkeys(("additionalProperties", "additionalItems"), _is_schema),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), _are_schemas),
    **dict.fromkeys(_NAMED, lambda value: isinstance(value, Mapping)),
}
