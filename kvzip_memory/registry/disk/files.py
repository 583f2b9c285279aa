"""One context, one safetensors file. Written whole or not at all, checked whole before it is used. No pickle.

Layout, readable by any safetensors reader::

    8 bytes   length of the header
    header    JSON, padded with spaces so that the data starts at a multiple of 4 KiB
    data      per layer: K, V (if K are not their own values), each followed by its scales if it is codes, positions, scores, each an
              extent padded to 4 KiB;
              then states, if there are any; then the layers of the parts that the context shares, if the file is to do without
              theirs; then the token ids;
              last, 8 bytes: xxh3-64 of everything up to the start of the data

The header's metadata holds the identity, the lengths of the heads and an xxh3-64 of every extent, padding included,
so that every byte of the file is covered by one checksum. With a secret all of them are HMAC-SHA256, of 32 bytes, see
:mod:`~kvzip_memory.system.checksums`: who has not got it can change nothing, nor give a file the key of another.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kvzip_memory.context import CompressedContext, Layers, RaggedLayer, Recipe, Resident, Source, seen_from
from kvzip_memory.context.codes import tensors_of
from kvzip_memory.errors import CorruptFileError, StorageError
from kvzip_memory.registry.disk.extents import DTYPES, PIECE, bytes_of, read_layers
from kvzip_memory.registry.disk.facts import ALIGNMENT, ELEMENT, OddFactError, check_header
from kvzip_memory.registry.identity import NEWEST_FORMAT, key_of, recipe_digest
from kvzip_memory.system.checksums import PLAIN, Checksums

LARGEST_HEADER = 1 << 26  # bytes of a header at most


class UnreadableHereError(CorruptFileError):
    """Of a newer format, or of a secret that is not given: nothing is known to be wrong with the file."""


class PreparedFile:
    """A context as the bytes of a file, checksums computed; nothing is written yet.

    Args:
        context: one that holds its pairs itself.
        catalog: facts for the registry's index, kept in the header so that the index can be made anew from the files.
        checksums: how they are made.

    Raises:
        StorageError: its header would be longer than any that is read.
    """

    def __init__(self, context: CompressedContext, catalog: Mapping[str, Any] | None = None, checksums: Checksums = PLAIN) -> None:
        self._checksums = checksums
        self._header, self._extents = _header(context, catalog or {}, checksums)
        self.nbytes = len(self._header) + sum(len(data) + -len(data) % ALIGNMENT for data in self._extents) + checksums.size

    def write(self, path: Path) -> None:
        """Write it and fsync it; mode 0600.

        Raises:
            OSError: it cannot be written, and is gone.
        """
        pieces = (piece for data in self._extents for piece in (data, bytes(-len(data) % ALIGNMENT)))
        _write(path, self._header, pieces, self._checksums)


def copy_with_catalog(path: Path, copy: Path, catalog: Mapping[str, Any], checksums: Checksums = PLAIN) -> int:
    """Copy a file with another catalog; its data is as it is. Returns the copy's bytes.

    Raises:
        CorruptFileError: as for :func:`read_header`.
        OSError: it cannot be read or written; there is no copy.
    """
    with open_context(path, follow_links=False) as source:
        facts, table = _read_header(source, path, checksums)
        table["__metadata__"]["kvzip_memory"] = json.dumps({**facts, "catalog": dict(catalog)})
        header = _padded(table)
        data = sum(extent["padded"] for extent in facts["extents"])

        def body() -> Iterator[bytes]:
            left = data
            while left and (piece := source.read(min(left, PIECE))):
                left -= len(piece)
                yield piece

        _write(copy, header, body(), checksums)
    return len(header) + data + checksums.size


def write_context(context: CompressedContext, path: Path, checksums: Checksums = PLAIN) -> Path:
    """Write ``context`` to ``path`` through a temporary file beside it.

    Raises:
        OSError: it cannot be written; whatever was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    PreparedFile(context, None, checksums).write(temporary)
    replace_with(path, temporary)
    return path


def read_context(
    path: Path,
    device: torch.device,
    *,
    follow_links: bool = True,
    admit: Callable[[Mapping[str, Any]], None] | None = None,
    checksums: Checksums = PLAIN,
) -> CompressedContext:
    """Read a context and check every byte of it.

    Args:
        follow_links: whether ``path`` may be a symbolic link.
        admit: told the facts of the header, such as the bytes ``nbytes`` that it takes in memory, before the pairs are read.
        checksums: how they were made.

    Raises:
        CorruptFileError: damaged, incomplete, or not a context file; says what is wrong.
        UnreadableHereError: of a newer format, or written with a secret that is not given.
        OSError: the file cannot be read.
    """
    with open_context(path, follow_links) as file:
        facts = read_header(file, path, checksums)
        if admit is not None:
            admit(facts)
        layers, before, states, token_ids = read_layers(file, facts, path, device, checksums)
    context = _context(facts, Resident(()), token_ids)
    moved = (context.shifts, context.nearer) if before else ((), ())
    storage = Resident(layers, partial(write_context, checksums=checksums), states, before, *moved)
    return replace(context, storage=storage)


def open_context(path: Path, follow_links: bool) -> BinaryIO:
    """Open a file for reading; one that is a link or no plain file only if links may be followed.

    Raises:
        CorruptFileError: a symbolic link, a device or a pipe where a stored file should be.
        OSError: it cannot be opened.
    """
    if follow_links:
        return path.open("rb")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptFileError(f"{path}: a symbolic link, not a file of ours") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptFileError(f"{path}: not a plain file")
    return os.fdopen(descriptor, "rb")


def read_header(file: BinaryIO, path: Path, checksums: Checksums = PLAIN) -> dict[str, Any]:
    """Check a file's header and size and give the facts stored in it; the file stands at the start of the data then.

    Raises:
        CorruptFileError: not a context file, a damaged header, or a wrong size.
        UnreadableHereError: as for :func:`read_context`.
    """
    return _read_header(file, path, checksums)[0]


def _read_header(file: BinaryIO, path: Path, checksums: Checksums) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts, and the table of tensors that they stand in."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= size - 8 - checksums.size:
        raise CorruptFileError(f"{path}: truncated, or not a context file (no safetensors header)")
    if length > LARGEST_HEADER:
        raise CorruptFileError(f"{path}: a header of {length:,} bytes, more than the {LARGEST_HEADER:,} of any file of ours")
    header = file.read(length)
    file.seek(size - checksums.size)
    sound = file.read(checksums.size) == _trailer(prefix + header, checksums)
    try:
        table: dict[str, Any] = json.loads(header)
        facts: dict[str, Any] = json.loads(table["__metadata__"]["kvzip_memory"])
        written = int(facts["identity"]["format"])
    except (OverflowError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not a context file, or its header is damaged ({type(error).__name__})") from None
    if written > NEWEST_FORMAT:
        raise UnreadableHereError(
            f"{path}: written in format {written}, newer than the {NEWEST_FORMAT} this version reads; upgrade kvzip-memory"
        )
    if f"header.{checksums.name}" not in table:
        if checksums.are_keyed:
            raise CorruptFileError(f"{path}: written without the secret, so it could be anybody's; an engine without a secret can open it")
        if "header.hmac" in table:
            raise UnreadableHereError(f"{path}: written with a secret; give secret= to the engine that reads it")
    if not sound:
        raise CorruptFileError(f"{path}: the header's checksum is wrong, or the file is truncated")
    try:
        check_header(facts)
        if facts["identity"].get("recipe", recipe_digest(_recipe(facts))) != recipe_digest(_recipe(facts)):
            raise OddFactError("recipe is not that of its key")
    except (OddFactError, RecursionError) as error:
        raise CorruptFileError(f"{path}: {error}, which no version of ours has written") from None
    expected = 8 + length + sum(extent["padded"] for extent in facts["extents"]) + checksums.size
    if size != expected:
        raise CorruptFileError(f"{path}: {size} bytes instead of {expected}")
    file.seek(8 + length)
    nbytes = sum(math.prod(extent["shape"]) * ELEMENT[extent["dtype"]] for extent in facts["extents"][:-1])  # what they will take here
    return {**_of_older_files(facts), **facts, "nbytes": nbytes}, table


def _of_older_files(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What files of an earlier version do not say, or say elsewhere."""
    catalog = facts["catalog"]
    coarsest = facts["ratio"] if facts["identity"].get("parent") is None else 0.0
    return {"created": catalog.get("created", 0.0), "expires": catalog.get("expires"), "coarsest": coarsest, "fitted": [], "before": []}


def read_token_ids(file: BinaryIO, facts: Mapping[str, Any]) -> np.ndarray:
    """``[n]`` int32, the ids of a file that stands at the start of its data; their checksum is not looked at."""
    *before, last = facts["extents"]
    file.seek(sum(extent["padded"] for extent in before), os.SEEK_CUR)
    return np.frombuffer(file.read(4 * math.prod(last["shape"])), dtype=np.int32)


# -- writing -----------------------------------------------------------------------------------------------------


def _header(context: CompressedContext, catalog: Mapping[str, Any], checksums: Checksums) -> tuple[bytes, list[memoryview]]:
    tensors = dict(_named_tensors(context))
    extents, table, offset = [], {}, 0
    for name, tensor in tensors.items():
        data = bytes_of(tensor)
        padded = len(data) + -len(data) % ALIGNMENT
        checksum = checksums.begin("extent")
        checksum.update(data)
        checksum.update(bytes(padded - len(data)))
        extent = {"name": name, "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "padded": padded}
        extents.append({**extent, checksums.name: checksum.hexdigest()})
        table[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + len(data)]}
        if padded > len(data):  # safetensors allows no holes: padding is a tensor of its own
            table[f"{name}.padding"] = {"dtype": "U8", "shape": [padded - len(data)], "data_offsets": [offset + len(data), offset + padded]}
        offset += padded
    size = checksums.size
    table[f"header.{checksums.name}"] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
    facts = {**_facts(context), "catalog": dict(catalog), "extents": extents}
    header = _padded({"__metadata__": {"kvzip_memory": json.dumps(facts, default=str)}, **table})
    return header, [bytes_of(t) for t in tensors.values()]


def _padded(table: Mapping[str, Any]) -> bytes:
    """A header as it is written, behind its length.

    Raises:
        StorageError: it would be longer than any that is read.
    """
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    if len(header) > LARGEST_HEADER:
        raise StorageError(
            f"a header of {len(header):,} bytes, more than the {LARGEST_HEADER:,} that are read; use less metadata, and fewer names"
        )
    return struct.pack("<Q", len(header)) + header


def _trailer(header: bytes, checksums: Checksums) -> bytes:
    """The checksum of a header as it stands at a file's end: a number, the lowest byte first."""
    return bytes.fromhex(checksums.of("header", header))[::-1]


def replace_with(path: Path, temporary: Path) -> None:
    """Rename a file that was written to ``path``.

    Raises:
        OSError: it cannot be renamed; it is gone.
    """
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _write(temporary: Path, header: bytes, body: Iterator[bytes | memoryview], checksums: Checksums) -> None:
    """Write a file and fsync it; mode 0600. After an error it is gone."""
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # a umask may have taken some of it
            file.write(header)
            for piece in body:
                file.write(piece)
            file.write(_trailer(header, checksums))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _layer_facts(layer: RaggedLayer) -> dict[str, Any]:
    size, chunked = layer.window or (None, False)
    more = {"chunked": True} if chunked else {}
    return {"lengths": layer.lengths, "window": size, "shared": layer.shared, **more}


def _named_tensors(context: CompressedContext) -> Iterator[tuple[str, Tensor]]:
    with context.lease() as lease:
        yield from _tensors_of("layer", lease.layers)
        for name, state in sorted(lease.states.items()):
            yield f"state.{name}", state
        for number, layers in enumerate(lease.before):
            yield from _tensors_of(f"before.{number}", seen_from(layers, 0))  # with what others see that share the same part
    yield "token_ids", context.token_ids


def _tensors_of(part: str, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(layers):
        yield from zip((f"{part}.{i}.key", f"{part}.{i}.key.scale"), tensors_of(layer.keys), strict=False)
        if not layer.shared:
            yield from zip((f"{part}.{i}.value", f"{part}.{i}.value.scale"), tensors_of(layer.values), strict=False)
        yield f"{part}.{i}.position", layer.positions
        if layer.scores is not None:
            yield f"{part}.{i}.score", layer.scores


def _facts(context: CompressedContext) -> dict[str, Any]:
    with context.lease() as lease:
        layers, *before = ([_layer_facts(layer) for layer in seen_from(part, 0)] for part in (lease.layers, *lease.before))
    return {
        "identity": dict(context.identity),
        "name": context.name,
        "n_tokens": context.n_tokens,
        "nbytes": context.nbytes,
        "ratio": context.ratio,
        "coarsest": context.coarsest,
        "fitted": [list(span) for span in context.fitted],
        "created": context.created,
        "expires": context.expires,
        "protected": context.protected,
        "dense_nbytes": context.dense_nbytes,
        "recipe": vars(context.recipe),
        "sources": [vars(source) for source in context.sources],
        "layers": layers,
        "states": sorted(context.states),
        **({"before": before} if before else {}),
    }


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading -----------------------------------------------------------------------------------------------------


def _recipe(facts: Mapping[str, Any]) -> Recipe:
    recipe: dict[str, Any] = {field: tuple(v) if isinstance(v, list) else v for field, v in facts["recipe"].items()}
    return Recipe(**recipe)


def _context(facts: Mapping[str, Any], storage: Resident, token_ids: Tensor) -> CompressedContext:
    return CompressedContext(
        key=key_of(facts["identity"]),
        identity=facts["identity"],
        token_ids=token_ids,
        storage=storage,
        protected=facts["protected"],
        ratio=facts["ratio"],
        dense_nbytes=facts["dense_nbytes"],
        recipe=_recipe(facts),
        sources=tuple(Source(**source) for source in facts["sources"]),
        name=facts["name"],
        created=facts["created"],
        expires=facts["expires"],
        coarsest=facts["coarsest"],
        fitted=tuple((start, end) for start, end in facts["fitted"]),
    )
