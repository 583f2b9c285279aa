"""The data of a stored context: its extents, read and checked by a few threads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kvzip_memory.context import Layers, RaggedLayer, States, Window, parts_of, seen_from
from kvzip_memory.context.codes import Codes, Vectors
from kvzip_memory.context.upload import upload
from kvzip_memory.errors import CorruptFileError
from kvzip_memory.registry.identity import tokens_digest
from kvzip_memory.system.checksums import Checksums
from kvzip_memory.system.modes import plain

#: Threads that read one file.
READERS = min(4, os.cpu_count() or 1)
_SMALL = 4 << 20  # bytes not worth a thread
PIECE = 1 << 18  # read, then hashed while the processor has it in its cache
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def read_layers(
    file: BinaryIO, facts: Mapping[str, Any], path: Path, device: torch.device, checksums: Checksums
) -> tuple[Layers, tuple[Layers, ...], States, Tensor]:
    """Read and check everything, into one buffer, by a few threads: neither reading nor hashing holds Python's lock.

    Layers go on to the device as they come, while the next ones are read.

    Returns:
        The context's own layers, those of the parts before it if the file has them, the states and the token ids.
    """
    extents = facts["extents"]
    tensors = _laid_out(extents)
    starts = list(accumulate((extent["padded"] for extent in extents), initial=file.tell()))
    together: dict[str, list[int]] = {}
    for i, extent in enumerate(extents):
        together.setdefault(extent["name"].removesuffix(".scale").rpartition(".")[0], []).append(i)

    def read(some: list[int]) -> None:
        for i in some:
            _read_extent(file.fileno(), extents[i], starts[i], bytes_of(tensors[extents[i]["name"]]), path, checksums)

    with ThreadPoolExecutor(READERS) as pool:
        small = starts[-1] - starts[0] < _SMALL
        done: dict[str, Callable[[], None]] = {
            name: partial(read, some) if small else pool.submit(read, some).result for name, some in together.items()
        }

        def layers(part: str, told: Sequence[Mapping[str, Any]], start: int, end: int) -> Iterator[RaggedLayer]:
            for i, layer in enumerate(told):
                done[f"{part}.{i}"]()
                keys = _vectors(tensors, f"{part}.{i}.key", path)
                values = keys if layer.get("shared") else _vectors(tensors, f"{part}.{i}.value", path)
                window = Window(layer["window"], layer.get("chunked", False)) if layer["window"] else None
                positions, scores = tensors[f"{part}.{i}.position"], tensors.get(f"{part}.{i}.score")
                read = RaggedLayer(keys, values, tuple(layer["lengths"]), positions, scores, window)
                first, last = (start, end) if window is None else (0, facts["n_tokens"])
                _check_positions(read, first, last, path)
                yield read

        def uploaded(part: str, told: Sequence[Mapping[str, Any]], start: int, end: int) -> Layers:
            return tuple(arrival.wait() for arrival in upload(layers(part, told, start, end), device))

        n, parts, shift = facts["n_tokens"], parts_of(facts["identity"]), facts["identity"].get("shift", 0)
        edges = list(accumulate((part.n_tokens for part in parts), initial=0))
        own = uploaded("layer", facts["layers"], 0 if facts["identity"].get("again") else edges[-1] - shift, n - shift)
        before = tuple(
            seen_from(uploaded(f"before.{i}", told, *((-part.shift, n - part.shift) if part.joined else edges[i : i + 2])), part.first)
            for i, (part, told) in enumerate(zip(parts, facts["before"], strict=False))  # no file but those that are saved has them
        )
        for finish in done.values():
            finish()
        states = {name: tensors[f"state.{name}"].to(device) for name in facts.get("states", ())}
    wanted = facts["identity"].get("tokens")
    if wanted is not None and tokens_digest(tensors["token_ids"].numpy()) != wanted:
        raise CorruptFileError(f"{path}: its token ids are not those of its key")
    return own, before, states, tensors["token_ids"]


def _vectors(tensors: Mapping[str, Tensor], name: str, path: Path) -> Vectors:
    """Keys or values as they are stored.

    Raises:
        CorruptFileError: a scale is no number.
    """
    scales = tensors.get(f"{name}.scale")
    if scales is None:
        return tensors[name]
    if not bool(scales.isfinite().all()):
        raise CorruptFileError(f"{path}: a scale of {name} is no number")
    return Codes(tensors[name], scales)


def _check_positions(layer: RaggedLayer, start: int, end: int, path: Path) -> None:
    """Raises:
    CorruptFileError: pairs of tokens other than ``[start, end)``, or not in the order of their positions within each head.
    """
    positions = layer.positions.numpy()
    if len(positions) and not start <= positions.min() <= positions.max() < end:
        raise CorruptFileError(f"{path}: pairs at positions beyond its {end - start} tokens")
    falling = np.flatnonzero(positions[1:] <= positions[:-1]) + 1
    if not set(falling.tolist()) <= set(layer.offsets):
        raise CorruptFileError(f"{path}: the pairs of a head are not in the order of their positions")


@plain()
def _laid_out(extents: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Empty tensors for the extents, one behind another in a buffer, and in a second one what is shared: the types with the longest
    elements first, so that no gaps are needed. numpy asks for huge pages, which halves the time a fresh buffer of 90 MB takes to fill."""
    shapes = {extent["name"]: (tuple(extent["shape"]), _TORCH[extent["dtype"]]) for extent in extents}
    nbytes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    tensors = {"token_ids": torch.empty(*shapes["token_ids"][0], dtype=shapes["token_ids"][1])}
    names = sorted(shapes.keys() - {"token_ids"}, key=lambda name: -shapes[name][1].itemsize)
    for shared in (False, True):
        some = [name for name in names if name.startswith("before.") is shared]
        buffer, start = torch.from_numpy(np.empty(max(1, sum(nbytes[name] for name in some)), dtype=np.uint8)), 0
        for name in some:
            shape, dtype = shapes[name]
            tensors[name] = buffer[start : start + nbytes[name]].view(dtype).view(shape)
            start += nbytes[name]
    return tensors


def _read_extent(descriptor: int, extent: Mapping[str, Any], start: int, data: memoryview, path: Path, checksums: Checksums) -> None:
    checksum, done = checksums.begin("extent"), 0
    while done < len(data) and (count := os.preadv(descriptor, [data[done : done + PIECE]], start + done)):
        checksum.update(data[done : done + count])  # while it is in the processor's cache
        done += count
    checksum.update(os.pread(descriptor, extent["padded"] - len(data), start + len(data)))
    if not checksums.same(checksum.hexdigest(), extent.get(checksums.name, "")):
        raise CorruptFileError(f"{path}: the checksum of {extent['name']} is wrong")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in the host's memory."""
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)
