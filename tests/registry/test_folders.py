"""Folders as they are found: read-only ones, another user's, spread over mounts, with what killed writers left, under many processes."""

import errno
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import synthetic
from kvzip_memory import BudgetError, CompressedContext, StorageError
from kvzip_memory.registry import ContextRegistry, Report
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.files import PreparedFile
from kvzip_memory.registry.disk.index import Index
from kvzip_memory.registry.disk.putting import Putting
from kvzip_memory.registry.disk.store import DiskTier
from synthetic import CPU, load, processes, wanted

SIZE = synthetic.context(0).nbytes


@pytest.fixture
def baked() -> Iterator[Path]:
    """A folder with two contexts that belongs to another user, or is read-only for its own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    registry = ContextRegistry(CPU, folder / "contexts")
    for number in (1, 2):
        load(registry, number)
    registry.flush()
    with registry.lease(synthetic.Wanted(wanted(1).key, wanted(1).identity, wanted(1).group, "later"), lambda report: synthetic.context(1)):
        pass  # a name that its file does not know
    registry.close()
    yield folder / "contexts"
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(folder)


def test_a_folder_of_another_user_is_found_listed_and_answered_from(baked: Path) -> None:
    without_index = baked.with_name("without_index")
    shutil.copytree(baked, without_index)
    shutil.rmtree(without_index / "index")
    for path in (*baked.parent.rglob("*"), baked.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in baked.parent.rglob("*"))
    answers = synthetic.processes.Queue()
    asked = ([baked, without_index], ["page 1", "later", "page 2"], answers)
    worker = synthetic.processes.Process(target=synthetic.as_another_user, args=asked)
    worker.start()
    for _ in range(2):
        found, tiers, listed, refused, told = answers.get(timeout=120)
        assert found == [wanted(1).key, wanted(1).key, wanted(2).key]
        assert (tiers, listed, refused) == (["disk", "disk", "built", "device"], 3, 2)
        assert told == [("note", "owner"), ("note", "index")]
    worker.join()
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in baked.parent.rglob("*")) == before


def test_blobs_on_another_mount_are_stored_and_what_is_damaged_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operating system answers where ``blobs/`` is mounted; a real mount stands in test_registry.py."""
    replace, blobs = os.replace, tmp_path / "c" / "blobs"

    def across(source: Path, target: Path) -> None:
        if Path(source).is_relative_to(blobs) != Path(target).is_relative_to(blobs):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    monkeypatch.setattr(os, "replace", across)
    registry = ContextRegistry(CPU, tmp_path / "c")
    load(registry, 1)
    registry.close()
    path = DiskTier(tmp_path / "c").folder.path(wanted(1).key)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    registry = ContextRegistry(CPU, tmp_path / "c")
    assert load(registry, 1) == "built"
    registry.flush()
    assert registry._backing.tier.usage() == registry._backing.tier.measured() == len(whole)  # type: ignore[union-attr]
    registry.close()
    registry = ContextRegistry(CPU, tmp_path / "c")
    assert load(registry, 1) == "disk"
    registry.close()


def test_what_a_killed_writer_left_is_built_stored_and_counted_once(tmp_path: Path) -> None:
    """Killed while it wrote, behind the back of a process that has the folder open."""
    registry = ContextRegistry(CPU, tmp_path)
    disk = registry._backing.tier
    assert disk is not None
    for number in (1, 2):
        key = wanted(number).key
        for folder in (tmp_path / "tmp", tmp_path / "blobs" / ".tmp"):  # an older version's, and ours
            folder.mkdir(exist_ok=True)
            (folder / f"{key}.tmp").write_bytes(b"x" * 5000)
        with disk._keeper.opened().transaction():
            stored, writing = disk._keeper.opened().totals()
            disk._keeper.opened().set_totals(stored, {**writing, key: 5000})
    assert load(registry, 1) == "built"
    registry.flush()
    assert [entry.key for entry in disk.entries()] == [wanted(1).key]
    assert disk.usage() == disk.measured() == disk.folder.path(wanted(1).key).stat().st_size
    registry.close()


def same_stripe(first: int) -> int:
    """The number of another context whose key begins as that of the first does."""
    start = wanted(first).key[:3]
    return next(number for number in range(first + 1, 100_000) if wanted(number).key[:3] == start)


def test_a_key_that_shares_the_lock_of_one_that_leaves_is_built_at_once(tmp_path: Path) -> None:
    other = same_stripe(0)
    registry = ContextRegistry(CPU, tmp_path, device_bytes=SIZE)
    load(registry, 0)
    registry.flush()
    registry._backing.tier.remove(wanted(0).key)  # type: ignore[union-attr] # by another process: it is in memory only, and must be written
    began = time.monotonic()
    load(registry, other)
    assert time.monotonic() - began < 30  # it was a minute
    registry.flush()
    assert registry.stats()["dropped"] == 0
    assert {entry.key for entry in registry.contexts()} == {wanted(0).key, wanted(other).key}
    registry.close()


def test_who_waits_for_a_build_that_fails_tries_a_build_of_their_own(tmp_path: Path) -> None:
    """One at a time, and nobody gets the error of another."""
    registry, all_wait = ContextRegistry(CPU, tmp_path), threading.Event()
    building, waiters = threading.Lock(), set[int]()
    ends: list[BudgetError | str] = []
    own, alone = list[bool](), list[bool]()

    def waiting(*progress: object) -> None:
        waiters.add(threading.get_ident())
        if len(waiters) == 5:
            all_wait.set()

    def ask(fails: bool) -> None:
        def build(report: Report) -> CompressedContext:
            alone.append(building.acquire(blocking=False))
            try:
                all_wait.wait(30)
                if fails:
                    raise BudgetError(f"that of {threading.get_ident()}")
                return synthetic.context(1)
            finally:
                building.release()

        try:
            with registry.lease(wanted(1), build, waiting) as (_, lease):
                ends.append(lease.receipt.tier)
        except BudgetError as error:
            ends.append(error)
            own.append(str(error) == f"that of {threading.get_ident()}")

    threads = [threading.Thread(target=ask, args=(number < 5,)) for number in range(6)]
    for thread in threads:
        thread.start()
        while not registry._memory.flights:  # the first one's fails
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert len(ends) == 6
    assert ends.count("built") == 1
    assert all(own + alone)
    registry.close()


def test_a_read_only_folder_refuses_changes_and_says_why(baked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    registry = ContextRegistry(CPU, baked)
    key = registry.one("later").key
    changes = (lambda: registry.remove(key), lambda: registry.pin(key), lambda: registry.untag(key, "a"), registry.gc)
    for change in (*changes, registry.check_changeable):
        with pytest.raises(StorageError, match="cannot be written by user"):
            change()
    assert load(registry, 1) == "disk"
    registry.close()


def test_opening_an_index_once_more_keeps_what_sqlite_has_locked(tmp_path: Path) -> None:
    index, answers = Index(tmp_path), processes.Queue()
    index.set("a", {})
    for _ in range(2):
        Index(tmp_path).close()
        visitor = processes.Process(
            target=synthetic.visit, args=(tmp_path, answers)
        )  # who would delete the log of a database that nobody has open
        visitor.start()
        assert "a" in answers.get(timeout=60)
        visitor.join()
        index.set("b", {})
    visitor = processes.Process(target=synthetic.visit, args=(tmp_path, answers))
    visitor.start()
    assert answers.get(timeout=60) == ["a", "b"]
    visitor.join()
    index.close()


@pytest.mark.parametrize("others", [2, 3])
def test_a_writer_that_was_taken_for_dead_makes_room_once_more(tmp_path: Path, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ContextRegistry(CPU, tmp_path)
    for number in range(2):
        load(registry, number)
    registry.flush()
    disk = registry._backing.tier
    assert disk
    disk._tidying.budget = budget = 3 * disk.folder.path(wanted(0).key).stat().st_size
    other, insert = ContextRegistry(CPU, tmp_path, disk_bytes=budget), Putting._insert

    def after(putting: Putting, entry: Entry) -> None:
        monkeypatch.undo()
        putting._keeper.unreserve(entry.key)  # by another process
        for number in range(2, 2 + others):
            load(other, number)
        other.flush()
        insert(putting, entry)

    monkeypatch.setattr(Putting, "_insert", after)
    load(registry, 9)
    registry.flush()
    assert disk.usage() == disk.measured() <= budget
    assert disk.has(wanted(9).key)
    other.close()
    registry.close()


def test_threads_that_write_one_context_write_it_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, began, writing = DiskTier(tmp_path), threading.Barrier(2), list[str]()
    write = PreparedFile.write

    def slowly(*args: Any) -> None:
        writing.append("begins")
        time.sleep(0.05)
        write(*args)
        writing.append("ends")

    monkeypatch.setattr(PreparedFile, "write", slowly)

    def put() -> None:
        began.wait()
        disk.put(synthetic.context(1), wanted(1).group)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(put) for _ in range(2)]:
            done.result()
    assert writing == ["begins", "ends"] * 2
    assert disk.usage() == disk.measured()
    disk.close()
