"""Contexts without a model, for what the registry does whatever is in them. Imported by the processes of the stress tests."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from kvzip_memory.context import CompressedContext, RaggedLayer, Recipe, Resident
from kvzip_memory.errors import StorageError
from kvzip_memory.registry import ContextRegistry, Report, Wanted
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.disk.index import Index
from kvzip_memory.registry.identity import group_of, key_of, tokens_digest
from kvzip_memory.system.digests import digest

CPU = torch.device("cpu")
IDENTITY: dict[str, Any] = {"format": 1, "ratio": 0.5, "tenant": None, "allocator": "global"}


def token_ids(number: int) -> torch.Tensor:
    return torch.arange(400, dtype=torch.int32) + 1000 * number


def wanted(number: int, **changes: Any) -> Wanted:
    identity = {**IDENTITY, "text": digest(number), "tokens": tokens_digest(token_ids(number).numpy()), **changes}
    return Wanted(key_of(identity), identity, group_of(identity), f"page {number}")


def context(number: int, pairs: int = 400) -> CompressedContext:
    """Always the same for the same number, with so many of its 400 tokens' pairs."""
    generator = torch.Generator().manual_seed(number)
    layers = tuple(
        RaggedLayer(
            torch.randn(pairs, 8, generator=generator),
            torch.randn(pairs, 8, generator=generator),
            (pairs // 4, pairs - pairs // 4),
            torch.arange(pairs, dtype=torch.int32),
            torch.rand(pairs, generator=generator).half(),
        )
        for _ in range(2)
    )
    asked = wanted(number)
    return CompressedContext(asked.key, asked.identity, token_ids(number), Resident(layers), 0, 0.5, 4 * pairs * 64, Recipe((), "", (), ()))


def same(one: CompressedContext, other: CompressedContext) -> bool:
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x.tensors(), y.tensors(), strict=True))


def load(registry: ContextRegistry, number: int, pairs: int = 400, log: Path | None = None, seconds: float = 0.0) -> str:
    """Load through a registry, check every byte, and say from where."""

    def build(report: Report) -> CompressedContext:
        if log is not None:
            with log.open("a") as file:
                file.write(f"{number}\n")
        for step in range(20 if seconds else 0):
            report("score", step, 20)
            time.sleep(seconds / 20)
        return context(number, pairs)

    with registry.lease(wanted(number), build) as (found, lease):
        assert same(found, context(number, pairs))
        return lease.receipt.tier


# -- what processes do ---------------------------------------------------------------------------------------------

#: Processes are forked from one that has imported everything and started no thread. Python 3.11 does not tell it our path.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["synthetic", "conftest", "writers"])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


def in_a_process(work: Any, *args: Any) -> Any:
    """What work puts into the queue that it is given last."""
    answers = processes.Queue()
    process = processes.Process(target=work, args=(*args, answers))
    process.start()
    process.join(timeout=900)
    assert process.exitcode == 0
    return answers.get(timeout=5)


def ask_together(folder: Path, log: Path, answers: Any, barrier: Any, seconds: float) -> None:
    """Eight threads ask for one context at once."""
    torch.set_num_threads(1)
    registry = ContextRegistry(CPU, folder)
    barrier.wait()
    tiers: list[str] = []
    threads = [threading.Thread(target=lambda: tiers.append(load(registry, 1, log=log, seconds=seconds))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    registry.close()
    answers.put(tiers)


def churn(folder: Path, seed: int, budget: int) -> None:
    """Write, spill, evict and remove until killed."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    size = context(0).nbytes
    registry = ContextRegistry(CPU, folder, device_bytes=2 * size, host_bytes=size, disk_bytes=budget)
    while True:
        number = rng.randrange(8)
        load(registry, number)
        if rng.random() < 0.2:
            registry.flush()
            for entry in registry.find(wanted(rng.randrange(8)).key):
                registry.remove(entry.key)


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def as_another_user(folders: list[Path], names: list[str], answers: Any) -> None:
    """What a user finds in folders of somebody else: keys by name, tiers, how many contexts are listed, changes refused, and what doctor
    says that is not "ok"."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    for folder in folders:
        registry = ContextRegistry(CPU, folder)
        found = [entry.key for name in names for entry in registry.find(name)]
        tiers = [load(registry, number) for number in (1, 2, 3)]
        registry.flush()
        refused = 0
        for change in (registry.remove, registry.pin):
            try:
                change(wanted(1).key)
            except StorageError as error:
                refused += "cannot be written by user" in str(error)
        told = [(finding.level, finding.what) for finding in examine(folder) if finding.level != "ok"]
        answers.put((found, [*tiers, load(registry, 1)], len(registry.contexts()), refused, told))
        registry.close()


def visit(folder: Path, answers: Any) -> None:
    """Open an index and let go of it, as a process does that comes and goes."""
    index = Index(folder)
    answers.put(sorted(index.keys("")))
    index.close()
