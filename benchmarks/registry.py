"""What reuse costs: reading a context back, first tokens from every tier, and a folder of 10,000 contexts.

python benchmarks/registry.py --squad squad.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from common import articles, save, smollm2
from kvzip_memory import KVzipEngine
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.system.checksums import Checksums

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import synthetic

CPU = torch.device("cpu")


def best_of(repeats: int, *measured: Callable[[], float]) -> list[float]:
    """Medians of several timings taken in turn."""
    rows = [[measure() for measure in measured] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


class Nothing:
    """A checksum that takes no time."""

    def update(self, data: object) -> None: ...

    def hexdigest(self) -> str:
        return ""


def begin(self: Checksums, kind: str, original: Callable[..., Any] = Checksums.begin) -> Any:
    """That of an extent takes no time, the header's, of 100 kB, is as it is."""
    return Nothing() if kind == "extent" else original(self, kind)


def reopening(folder: Path, key: str, cold: bool, repeats: int = 11) -> dict[str, Any]:
    """A stored context read back, beside a plain read and checksum of the same bytes, both into memory not used before.

    Cold: the page cache has forgotten the file.
    """
    disk = DiskTier(folder / "contexts")
    path, nbytes = disk.folder.path(key), disk.folder.path(key).stat().st_size
    np.ones(3 * repeats * nbytes, dtype=np.uint8)  # a virtual machine gets the pages it has never used from its host, slowly
    kept: list[Any] = []

    def timed(read: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            if cold:
                forget(path)
            began = time.perf_counter()
            kept.append(read())
            return time.perf_counter() - began

        return measure

    def plain() -> Any:
        buffer: Any = np.empty(nbytes, dtype=np.uint8)
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)
        xxhash.xxh3_64_intdigest(buffer)
        return buffer

    def unverified() -> Any:
        with patch.object(Checksums, "begin", begin), patch.object(Checksums, "same", lambda *_: True):
            return disk.get(key, CPU)

    plain_s, ours_s, unverified_s = best_of(repeats, timed(plain), timed(lambda: disk.get(key, CPU)), timed(unverified))
    disk.close()
    return {
        "plain_ms": round(1e3 * plain_s, 1),
        "ours_ms": round(1e3 * ours_s, 1),
        "speed_of_plain": round(plain_s / ours_s, 2),
        "verification": round(1 - unverified_s / ours_s, 2),
    }


def first_token(engine: KVzipEngine, text: str) -> tuple[float, str]:
    """Seconds from the text to the first piece of an answer, and the tier that had it."""
    began = time.perf_counter()
    context = engine.load(text)
    with engine.stream(context, "What is this about?", max_new_tokens=2) as stream:
        next(stream)
    assert context.receipt is not None
    return time.perf_counter() - began, context.receipt.tier


def first_tokens(text: str, other: str, folder: Path) -> dict[str, Any]:
    """Rebuild, disk, device and host, in this order, with one engine."""
    plain = KVzipEngine.from_pretrained(smollm2(), ratio=0.3, progress=False)
    plain.generate(None, "Warm up.", max_new_tokens=4)
    size = max(plain.load(text).nbytes, plain.load(other).nbytes)
    engine = KVzipEngine(plain.model, plain.tokenizer, 0.3, cache_dir=folder, progress=False)
    found = {"built": first_token(engine, text)}
    engine.close()
    engine = KVzipEngine(plain.model, plain.tokenizer, 0.3, cache_dir=folder, progress=False, device_bytes=size, host_bytes=size)
    found["disk"] = first_token(engine, text)
    found["device"] = first_token(engine, text)
    engine.load(other)  # moves the first one to the host tier
    found["host"] = first_token(engine, text)
    assert all(tier == seen for tier, (_, seen) in found.items()), found
    row: dict[str, Any] = {f"{tier}_s": round(seconds, 3) for tier, (seconds, _) in found.items()}
    context = engine.load(text)
    row |= {"tokens": context.n_tokens, "key": context.key}
    engine.close()
    return row


def cold_hits(text: str, other: str, folder: Path, repeats: int = 7) -> dict[str, Any]:
    """First tokens of a running engine, medians: the context on the device, and in a file the page cache has forgotten."""
    plain = KVzipEngine.from_pretrained(smollm2(), ratio=0.3, progress=False)
    size = max(plain.load(text).nbytes, plain.load(other).nbytes)
    engine = KVzipEngine(plain.model, plain.tokenizer, 0.3, cache_dir=folder, progress=False, device_bytes=size, host_bytes=0)
    path = DiskTier(folder / "contexts").folder.path(engine.load(text).key)
    device, disk = [], []
    for _ in range(repeats):
        engine.load(other)  # the only one there is room for
        forget(path)
        seconds, tier = first_token(engine, text)
        assert tier == "disk"
        disk.append(seconds)
        seconds, tier = first_token(engine, text)
        assert tier == "device"
        device.append(seconds)
    engine.close()
    medians = {"device_ms": 1e3 * statistics.median(device), "disk_ms": 1e3 * statistics.median(disk)}
    return {name: round(ms, 1) for name, ms in medians.items()}


def forget(path: Path) -> None:
    """Make the page cache forget a file, as a restart of the machine would."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ten_thousand(folder: Path, count: int) -> dict[str, Any]:
    """A folder of small contexts: opening it, and the 99th percentile of what one does with it."""
    registry = ContextRegistry(CPU, folder)
    for i in tqdm(range(count), desc="small contexts"):
        synthetic.load(registry, i, pairs=16)
    registry.close()

    def opening() -> float:
        began = time.perf_counter()
        registry = ContextRegistry(CPU, folder)
        spent = time.perf_counter() - began
        registry.close()
        return spent

    (opened,) = best_of(5, opening)
    registry = ContextRegistry(CPU, folder)

    def p99(use: Callable[[int], Any], times: int = 1000) -> float:
        spent = []
        for i in range(times):
            began = time.perf_counter()
            use(i * 31 % count)
            spent.append(time.perf_counter() - began)
        return round(1e3 * statistics.quantiles(spent, n=100)[98], 2)

    row = {
        "contexts": count,
        "open_s": round(opened, 3),
        "ls_50_p99_ms": p99(lambda i: registry.contexts(50)),
        "show_p99_ms": p99(lambda i: registry.one(f"page {i}")),
        "pin_p99_ms": p99(lambda i: registry.pin(f"page {i}")),
        "rm_p99_ms": p99(lambda i: registry.remove(synthetic.wanted(i).key)),
    }
    registry.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--contexts", type=int, default=10_000)
    args = parser.parse_args()
    text = "\n\n".join(p["context"] for a in articles(args.squad) for p in a["paragraphs"])
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for characters in (9_500, 27_000):
            folder = Path(name, str(characters))
            row = first_tokens(text[:characters], text[characters : 2 * characters], folder)
            row["running"] = cold_hits(text[:characters], text[characters : 2 * characters], folder)
            key = row.pop("key")
            rows.append({**row, "warm": reopening(folder, key, cold=False), "cold": reopening(folder, key, cold=True)})
            print(rows[-1])
        small = ten_thousand(Path(name, "small"), args.contexts)
        print(small)
    save("registry", {"model": "SmolLM2-135M-Instruct, fp32, ratio 0.3", "table": rows, "small": small})


if __name__ == "__main__":
    main()
