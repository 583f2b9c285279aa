"""Files whose checksums are right and whose facts are not: refused with a reason, never served, and nothing else is harmed by them."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kvzip_memory import CorruptFileError
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk.facts import ALIGNMENT
from kvzip_memory.registry.disk.files import PreparedFile, read_context
from kvzip_memory.registry.identity import tokens_digest
from synthetic import CPU, context, load, same, wanted

ODD: list[Any] = [
    -1,
    -(10**15),
    2**60,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    True,
    None,
    "x",
    "",
    [],
    {},
    [[]],
    {"x": 1},
    [-1],
    "\ud800",
]


def file_of(folder: Path, number: int = 1) -> Path:
    path = folder / f"{wanted(number).key}.safetensors"
    PreparedFile(context(number), {"group": wanted(number).group, "names": {}, "tags": []}).write(path)
    return path


def forge(path: Path, change: Callable[[dict[str, Any]], object] = lambda facts: None, text: str | None = None, data: Any = None) -> None:
    """Write a file anew with other facts, and checksums that are right."""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    table, body = json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length : -8])
    facts = json.loads(table["__metadata__"]["kvzip_memory"])
    if data is not None:
        data(facts, body)
        start = 0
        for extent in facts["extents"]:
            extent["xxh3"] = xxhash.xxh3_64_hexdigest(bytes(body[start : start + extent["padded"]]))
            start += extent["padded"]
    change(facts)
    table["__metadata__"]["kvzip_memory"] = json.dumps(facts) if text is None else text
    header = json.dumps(table).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    header = struct.pack("<Q", len(header)) + header
    path.write_bytes(header + body + struct.pack("<Q", xxhash.xxh3_64_intdigest(header)))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every fact, whatever it is in; of a list the first and the last."""
    if at:
        yield at
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*at, name))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[i], (*at, i))


def put(facts: Any, at: tuple[Any, ...], odd: Any) -> None:
    for name in at[:-1]:
        facts = facts[name]
    facts[at[-1]] = odd


def facts_of(path: Path) -> dict[str, Any]:
    whole = path.read_bytes()
    return dict(json.loads(json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])["__metadata__"]["kvzip_memory"]))


def test_every_fact_is_looked_at_before_it_is_used(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    whole, refused = path.read_bytes(), 0
    for at in places(facts_of(path)):
        for odd in ODD:
            path.write_bytes(whole)
            forge(path, lambda facts, at=at, odd=odd: put(facts, at, odd))  # type: ignore[misc]
            try:
                found = read_context(path, CPU)
            except CorruptFileError:
                refused += 1
                continue
            assert same(found, context(1)), (at, odd)
            assert found.nbytes == context(1).nbytes, (at, odd)
            assert repr(found), (at, odd)
    assert refused > 800


def beyond(facts: dict[str, Any], body: bytearray) -> None:
    start = sum(extent["padded"] for extent in facts["extents"][:2])
    body[start : start + 4] = np.int32(400).tobytes()


def negative(facts: dict[str, Any], body: bytearray) -> None:
    start = sum(extent["padded"] for extent in facts["extents"][:2])
    body[start : start + 4] = np.int32(-1).tobytes()


def sparse(path: Path) -> None:
    """9 GB, of which hardly any is on disk."""
    os.truncate(path, 9 << 30)


def sparse_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", (9 << 30) - 16))
    os.truncate(path, 9 << 30)


NESTED = "[" * 100_000
FORGERIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "negative nbytes": (lambda path: forge(path, lambda facts: put(facts, ("nbytes",), -(10**15))), "nbytes"),
    "positions beyond": (lambda path: forge(path, data=beyond), "positions"),
    "negative positions": (lambda path: forge(path, data=negative), "positions"),
    "token ids of another text": (
        lambda path: forge(path, lambda facts: put(facts, ("identity", "tokens"), tokens_digest([1]))),
        "token ids",
    ),
    "no facts": (lambda path: forge(path, text="{}"), "KeyError"),
    "facts of another kind": (lambda path: forge(path, text="[1]"), "TypeError"),
    "nested": (lambda path: forge(path, text=NESTED), "RecursionError"),
    "nested in a fact": (lambda path: forge(path, text='{"identity": {"format": 1, "x": ' + NESTED), "RecursionError"),
    "sparse": (sparse, "bytes|checksum|truncated"),
    "sparse header": (sparse_header, "header"),
    "extents that lie": (lambda path: forge(path, lambda facts: put(facts, ("extents", 0, "padded"), 2**40)), "extent"),
    "a huge shape": (lambda path: forge(path, lambda facts: put(facts, ("extents", 0, "shape"), [2**40, 2**40])), "extent"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("known", [True, False])
def test_an_odd_file_keeps_no_engine_from_opening_and_no_budget_from_holding(tmp_path: Path, forgery: str, known: bool) -> None:
    act, reason = FORGERIES[forgery]
    registry = ContextRegistry(CPU, tmp_path)
    for number in (1, 2):
        load(registry, number)
    registry.flush()
    assert registry._backing.tier is not None
    path, size = registry._backing.tier.folder.path(wanted(1).key), registry._backing.tier.folder.path(wanted(2).key).stat().st_size
    registry.close()
    act(path)
    if not known:
        shutil.rmtree(tmp_path / "index")
    with pytest.raises(CorruptFileError, match=reason):
        read_context(path, CPU)
    for _ in range(2):
        registry = ContextRegistry(CPU, tmp_path, disk_bytes=3 * size, device_bytes=3 * context(1).nbytes)
        assert registry.no_disk is None
        for number in (1, 2, 3, 4):
            assert load(registry, number) in ("built", "disk")
        registry.flush()
        assert registry._backing.tier is not None
        assert registry._backing.tier.usage() == registry._backing.tier.measured() <= 3 * size
        assert registry.stats()["tiers"]["device"]["nbytes"] <= 3 * context(1).nbytes
        registry.contexts()
        registry.gc()
        registry.close()
