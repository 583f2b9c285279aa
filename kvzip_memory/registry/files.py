"""One context, one safetensors file. Written whole or not at all, checked whole before it is used. No pickle.

Layout, readable by any safetensors reader::

    8 bytes   length of the header
    header    JSON, padded with spaces so that the data starts at a multiple of 4 KiB
    data      per layer: K, V, positions, scores, each an extent padded to 4 KiB; then the token ids;
              last, 8 bytes: xxh3-64 of everything up to the start of the data

The header's metadata holds the identity, the lengths of the heads and an xxh3-64 of every extent, padding included,
so that every byte of the file is covered by one checksum.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from kvzip_memory.context import CompressedContext, RaggedLayer, Recipe, Source
from kvzip_memory.errors import CorruptFileError
from kvzip_memory.registry.identity import FORMAT, key_of

ALIGNMENT = 4096
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


def write_context(context: CompressedContext, path: Path) -> Path:
    """Write ``context`` to ``path`` through a temporary file beside it: fsynced, then renamed, mode 0600.

    Raises:
        OSError: it cannot be written; the temporary file is gone and ``path`` is as it was.
    """
    header, extents = _header(context)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(header)
            for data in extents:
                file.write(data)
                file.write(bytes(-len(data) % ALIGNMENT))
            file.write(struct.pack("<Q", xxhash.xxh3_64_intdigest(header)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)
    return path


def read_context(path: Path, device: torch.device) -> CompressedContext:
    """Read a context and check every byte of it.

    Raises:
        CorruptFileError: damaged, incomplete, of a newer format, or not a context file; says what is wrong.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        facts = read_header(file, path)
        tensors = {extent["name"]: _read_extent(file, extent, path) for extent in facts["extents"]}
    return _context(facts, tensors, device)


def read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Check a file's header and size and give the facts stored in it; the file stands at the start of the data then.

    Raises:
        CorruptFileError: not a context file, a damaged header, a wrong size, or a newer format.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= size - 16:
        raise CorruptFileError(f"{path}: truncated, or not a context file (no safetensors header)")
    header = file.read(length)
    try:
        facts: dict[str, Any] = json.loads(json.loads(header)["__metadata__"]["kvzip_memory"])
        written = int(facts["identity"]["format"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not a context file, or its header is damaged ({type(error).__name__})") from None
    if written > FORMAT:
        raise CorruptFileError(f"{path}: written in format {written}, newer than the {FORMAT} this version reads; upgrade kvzip-memory")
    file.seek(size - 8)
    if file.read(8) != struct.pack("<Q", xxhash.xxh3_64_intdigest(prefix + header)):
        raise CorruptFileError(f"{path}: the header's checksum is wrong, or the file is truncated")
    expected = 8 + length + sum(extent["padded"] for extent in facts["extents"]) + 8
    if size != expected:
        raise CorruptFileError(f"{path}: {size} bytes instead of {expected}")
    file.seek(8 + length)
    return facts


# -- writing -----------------------------------------------------------------------------------------------------


def _header(context: CompressedContext) -> tuple[bytes, list[memoryview]]:
    tensors = dict(_named_tensors(context))
    extents, table, offset = [], {}, 0
    for name, tensor in tensors.items():
        data = _bytes(tensor)
        padded = len(data) + -len(data) % ALIGNMENT
        checksum = xxhash.xxh3_64(data)
        checksum.update(bytes(padded - len(data)))
        extents.append(
            {"name": name, "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "padded": padded, "xxh3": checksum.hexdigest()}
        )
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + len(data)]}
        if padded > len(data):  # safetensors allows no holes: padding is a tensor of its own
            table[f"{name}.padding"] = {"dtype": "U8", "shape": [padded - len(data)], "data_offsets": [offset + len(data), offset + padded]}
        offset += padded
    table["header.xxh3"] = {"dtype": "U8", "shape": [8], "data_offsets": [offset, offset + 8]}
    facts = {**_facts(context), "extents": extents}
    header = json.dumps({"__metadata__": {"kvzip_memory": json.dumps(facts, default=str)}, **table}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return struct.pack("<Q", len(header)) + header, [_bytes(t) for t in tensors.values()]


def _named_tensors(context: CompressedContext) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(context.layers):
        yield f"layer.{i}.key", layer.keys
        yield f"layer.{i}.value", layer.values
        yield f"layer.{i}.position", layer.positions
        if layer.scores is not None:
            yield f"layer.{i}.score", layer.scores
    yield "token_ids", context.token_ids


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)


def _facts(context: CompressedContext) -> dict[str, Any]:
    return {
        "identity": dict(context.identity),
        "name": context.name,
        "ratio": context.ratio,
        "protected": context.protected,
        "dense_nbytes": context.dense_nbytes,
        "recipe": vars(context.recipe),
        "sources": [vars(source) for source in context.sources],
        "layers": [{"lengths": layer.lengths, "window": layer.window} for layer in context.layers],
    }


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading -----------------------------------------------------------------------------------------------------


def _read_extent(file: BinaryIO, extent: Mapping[str, Any], path: Path) -> Tensor:
    tensor = torch.empty(extent["shape"], dtype=_TORCH[extent["dtype"]])
    data = _bytes(tensor)
    padding = extent["padded"] - len(data)
    checksum = xxhash.xxh3_64()
    if file.readinto(data) == len(data):  # type: ignore[attr-defined]
        checksum.update(data)
    checksum.update(file.read(padding))
    if checksum.hexdigest() != extent["xxh3"]:
        raise CorruptFileError(f"{path}: the checksum of {extent['name']} is wrong")
    return tensor


def _context(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> CompressedContext:
    layers = []
    for i, layer in enumerate(facts["layers"]):
        scores = tensors.get(f"layer.{i}.score")
        layers.append(
            RaggedLayer(
                keys=tensors[f"layer.{i}.key"].to(device),
                values=tensors[f"layer.{i}.value"].to(device),
                lengths=tuple(layer["lengths"]),
                positions=tensors[f"layer.{i}.position"].to(device),
                scores=None if scores is None else scores.to(device),
                window=layer["window"],
            )
        )
    recipe = facts["recipe"]
    return CompressedContext(
        key=key_of(facts["identity"]),
        identity=facts["identity"],
        token_ids=tensors["token_ids"],
        layers=tuple(layers),
        protected=facts["protected"],
        ratio=facts["ratio"],
        dense_nbytes=facts["dense_nbytes"],
        recipe=Recipe(tuple(recipe["opening"]), recipe["separator"], tuple(recipe["closing"]), tuple(recipe["next_turn"])),
        sources=tuple(Source(**source) for source in facts["sources"]),
        name=facts["name"],
    )
