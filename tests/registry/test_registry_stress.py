"""The registry under threads, processes, kills and damage. ``make stress`` runs the full counts, ``make test`` fewer."""

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import synthetic
from conftest import STRESS, TEXT, say, tiny_engine
from kvzip_memory import CompressedContext
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk.store import DiskTier
from synthetic import CPU, ask_together, churn, kill, load, processes, wanted


@contextmanager
def watched(registry: ContextRegistry) -> Iterator[dict[str, int]]:
    """The largest bytes a tier was ever seen to hold: the disk's from its files, memory's from the storages."""
    largest: dict[str, int] = Counter()
    done = threading.Event()

    def look() -> None:
        disk = registry._backing.tier
        assert disk is not None
        while not done.is_set():
            with registry._memory.changed:
                for tier in (registry._memory.device, registry._memory.host):
                    held = sum(h.context.nbytes for h in tier.held.values())
                    largest[tier.name] = max(largest[tier.name], tier.nbytes, held)
            with disk._keeper.opened().transaction():  # or what is deleted and what is written while we look are added up
                largest["disk"] = max(largest["disk"], disk.measured())
            largest["looks"] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()


def test_budgets_hold_at_every_moment_and_answers_stay_right(tmp_path: Path) -> None:
    """One context's room a tier, three contexts, eight threads."""
    texts = [f"Page {i}. " + TEXT for i in range(3)]
    fresh = tiny_engine(ratio=0.4)
    expected = [fresh.load(text) for text in texts]
    ids = fresh.prompt_ids(expected[0], "Who?")
    logits = [fresh.logits(c, ids) for c in expected]
    size = max(c.nbytes for c in expected)
    file_size = max(c.save(tmp_path / "file").stat().st_size for c in expected) + 4096
    engine = tiny_engine(ratio=0.4, device_bytes=size, host_bytes=size, disk_bytes=file_size, cache_dir=tmp_path / "cache")
    operations, wrong = 300 if STRESS else 60, []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(operations // 8 + 1):
            i = rng.randrange(3)
            held: CompressedContext = engine.load(texts[i])
            with held.lease() as lease:
                addresses = [t.data_ptr() for layer in lease.layers for t in layer.tensors()]
                if not torch.equal(engine.logits(held, ids), logits[i]):
                    wrong.append(i)
                if addresses != [t.data_ptr() for layer in lease.layers for t in layer.tensors()]:
                    wrong.append("moved")

    with watched(engine.registry) as largest:
        for i in [0, 1, 2] * 3:
            assert torch.equal(engine.logits(engine.load(texts[i]), ids), logits[i])
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.registry.flush()
    stats = engine.stats()
    assert not wrong
    assert largest["device"] <= size
    assert largest["host"] <= size
    assert largest["disk"] <= file_size
    assert stats["tiers"]["disk"]["nbytes"] == engine.registry._backing.tier.measured()  # type: ignore[union-attr]
    assert stats["spills"]["host"] > 0
    engine.close()
    say(operations=operations, looks=largest["looks"], hits=stats["hits"], built=stats["built"], spills=stats["spills"])


def test_eight_processes_of_eight_threads_cause_one_build(tmp_path: Path) -> None:
    count = 8 if STRESS else 4
    answers, barrier = processes.Queue(), processes.Barrier(count)
    workers = [processes.Process(target=ask_together, args=(tmp_path / "c", tmp_path / "log", answers, barrier, 0.5)) for _ in range(count)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    tiers = Counter(tier for tiers in found for tier in tiers)
    assert (tmp_path / "log").read_text() == "1\n"
    assert tiers["built"] == 1
    assert sum(tiers.values()) == 8 * count
    assert len(list((tmp_path / "c" / "blobs").rglob("*.safetensors"))) == 1
    say(processes=count, threads=8, tiers=dict(tiers))


def test_a_killed_builder_is_replaced_within_seconds(tmp_path: Path) -> None:
    answers, alone = processes.Queue(), processes.Barrier(1)
    builder = processes.Process(target=ask_together, args=(tmp_path / "c", tmp_path / "log", answers, alone, 600.0))
    builder.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    together = processes.Barrier(3)
    workers = [processes.Process(target=ask_together, args=(tmp_path / "c", tmp_path / "log", answers, together, 0.1)) for _ in range(2)]
    for worker in workers:
        worker.start()
    together.wait(timeout=60)
    time.sleep(1)
    kill(builder)
    for _ in workers:
        assert answers.get(timeout=5)
    for worker in workers:
        worker.join()
    assert (tmp_path / "log").read_text() == "1\n1\n"  # the killed one's, and one more
    assert len(list((tmp_path / "c" / "blobs").rglob("*.safetensors"))) == 1
    assert not list((tmp_path / "c" / "blobs" / ".tmp").iterdir())


BLOB_FAULTS = ("flip", "truncate", "zero", "swap", "torn header")
INDEX_FAULTS = ("flip", "truncate", "zero", "missing", "other file")


def damage(path: Path, fault: str, other: Path, rng: random.Random) -> bool:
    """Damage a file; False if its bytes are the same afterwards."""
    whole = path.read_bytes()
    broken = bytearray(whole)
    at = rng.randrange(len(broken))
    if fault == "flip":
        broken[at] ^= 1 << rng.randrange(8)
    elif fault == "truncate":
        del broken[at:]
    elif fault == "zero":
        size = rng.randrange(1, 5000)
        broken[at : at + size] = bytes(len(broken[at : at + size]))
    elif fault == "torn header":
        at = rng.randrange(1, 4000)
        broken[at : at + 512] = rng.randbytes(512)
    elif fault in ("swap", "other file"):
        broken = bytearray(other.read_bytes())
    elif fault == "missing":
        path.unlink()
        return True
    path.write_bytes(broken)
    return bytes(broken) != whole


def test_no_fault_in_a_stored_file_is_ever_served(tmp_path: Path) -> None:
    """Every byte that is served is compared with the truth in ``load``."""
    rng, counts = random.Random(7), Counter[str]()
    folder = tmp_path / "c"

    def fresh() -> ContextRegistry:
        return ContextRegistry(CPU, folder)

    registry = fresh()
    for number in (1, 2):
        load(registry, number)
    paths = {number: registry._backing.tier.folder.path(wanted(number).key) for number in (1, 2)}  # type: ignore[union-attr]
    registry.close()
    for round_ in range(1100 if STRESS else 60):
        fault = BLOB_FAULTS[round_ % len(BLOB_FAULTS)]
        changed = damage(paths[1], fault, paths[2], rng)
        registry = fresh()
        tier = load(registry, 1)
        assert tier == ("built" if changed else "disk"), fault
        if changed:
            assert all(row["reason"] for row in registry.quarantine())
            assert registry.stats()["quarantined"] == len(registry.quarantine()) == 1, fault
        assert registry.gc() is not None
        registry.close()
        registry = fresh()
        assert load(registry, 1) == "disk"
        registry.close()
        counts[f"blob {fault}"] += changed
    index = folder / "index" / "cache.db"
    for round_ in range(1100 if STRESS else 60):
        fault = INDEX_FAULTS[round_ % len(INDEX_FAULTS)]
        for log in (index.with_name("cache.db-wal"), index.with_name("cache.db-shm")):
            log.unlink(missing_ok=True)
        changed = damage(index, fault, paths[2], rng)
        registry = fresh()
        for number in (1, 2):
            assert load(registry, number) == "disk", fault
        assert {entry.key for entry in registry.contexts()} == {wanted(1).key, wanted(2).key}, fault
        load(registry, 3)
        registry.flush()
        registry.remove(wanted(3).key)
        assert registry._backing.tier.usage() >= sum(path.stat().st_size for path in paths.values()), fault  # type: ignore[union-attr]
        registry.gc()
        registry.close()
        counts[f"index {fault}"] += changed
    say(faults=sum(counts.values()), **{name.replace(" ", "_"): n for name, n in counts.items()})


def test_a_kill_at_any_moment_leaves_a_folder_that_opens_without_repair(tmp_path: Path) -> None:
    rng, folder = random.Random(11), tmp_path / "c"
    registry = ContextRegistry(CPU, folder)
    load(registry, 0)
    file_size = registry._backing.tier.folder.path(wanted(0).key).stat().st_size if registry.flush() is None else 0  # type: ignore[union-attr]
    registry.close()
    budget, states = 3 * file_size, Counter[str]()
    for round_ in range(200 if STRESS else 12):
        worker = processes.Process(target=churn, args=(folder, round_, budget))
        worker.start()
        time.sleep(0.02 + rng.random() * 0.25)
        kill(worker)
        states["written_halfway"] += any((folder / "blobs" / ".tmp").iterdir())
        disk = DiskTier(folder, budget)
        assert disk.quarantine() == []
        assert not list((folder / "blobs" / ".tmp").iterdir())
        assert disk.usage() == disk.measured() <= budget
        stored = disk.entries()
        assert {entry.key for entry in stored} == {path.stem for path in (folder / "blobs").rglob("*.safetensors")}
        for entry in stored:
            assert disk.verify(entry.key) is None
            states["verified"] += 1
        disk.close()
        registry = ContextRegistry(CPU, folder, disk_bytes=budget)
        number = rng.randrange(8)
        states[f"then_{load(registry, number)}"] += 1
        registry.close()
    say(kills=200 if STRESS else 12, **states)


def test_thousands_of_loads_and_evictions_leave_nothing_behind(tmp_path: Path) -> None:
    import gc

    import psutil

    size = synthetic.context(0).nbytes
    registry = ContextRegistry(CPU, tmp_path / "c", device_bytes=2 * size, host_bytes=size, disk_bytes="1MB")
    process, cycles = psutil.Process(), 10_000 if STRESS else 150
    for i in range(100):
        load(registry, i % 8)
    gc.collect()
    files, resident = process.num_fds(), process.memory_info().rss
    for i in range(cycles):
        load(registry, i % 8)
    gc.collect()
    grown = process.memory_info().rss - resident
    assert process.num_fds() <= files + 2
    assert grown < 20e6
    registry.close()
    shutil.rmtree(tmp_path / "c")
    say(cycles=cycles, resident_grown_MB=round(grown / 1e6, 2))
