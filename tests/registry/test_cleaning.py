"""The index is written anew behind deletions: once for many, and whatever ends the process."""

import os
import signal
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest

from kvzip_memory.registry import ContextRegistry, cleaning
from kvzip_memory.registry.disk.index import Index
from synthetic import CPU, context, processes, wanted


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "contexts"


@pytest.fixture
def registry(folder):
    registry = ContextRegistry(CPU, folder)
    yield registry
    registry.close()


@pytest.fixture
def rewrites(monkeypatch):
    """Threads by which indexes were written anew."""
    done, before = [], Index.rewrite
    monkeypatch.setattr(Index, "rewrite", lambda self: done.append(threading.current_thread().name) or before(self))
    return done


def load(registry, count):
    for i in range(count):
        registry.readmit(wanted(i).key)
        with registry.lease(replace(wanted(i), tags=(f"Ottoline {i}.",)), lambda report, i=i: context(i, 8)):
            pass
    registry.flush()


def told(folder, count):
    """Of which contexts the folder holds the key, the name or the tag anywhere."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    names = [path.name for path in folder.rglob("*")]
    words = {i: (wanted(i).key.encode(), f'page {i}"'.encode(), f"Ottoline {i}.".encode()) for i in range(count)}
    return [i for i in words if any(w in data for w in words[i] for data in files) or any(wanted(i).key in name for name in names)]


def test_many_deletions_are_one_rewriting(registry, rewrites, folder):
    load(registry, 200)
    for i in range(199):
        registry.remove(wanted(i).key)
    assert rewrites == []
    registry.flush()
    assert told(folder, 200) == [199]
    assert len(rewrites) == 1
    registry.flush()
    registry.close()
    assert len(rewrites) == 1, "nothing was deleted since"


def test_without_a_flush_it_is_done_when_it_is_quiet(registry, rewrites, folder, monkeypatch):
    monkeypatch.setattr(cleaning, "_QUIET_S", 0.3)
    load(registry, 8)
    for i in range(7):
        registry.remove(wanted(i).key)
    assert rewrites == []
    for _ in range(100):
        if told(folder, 8) == [7]:
            break
        time.sleep(0.1)
    assert told(folder, 8) == [7]
    assert len(rewrites) == 1
    assert rewrites != ["MainThread"]


def test_a_stream_of_deletions_does_not_put_it_off_for_ever(registry, rewrites, monkeypatch):
    monkeypatch.setattr(cleaning, "_LATEST_S", 0.0)
    load(registry, 2)
    registry.remove(wanted(0).key)
    for _ in range(100):
        if rewrites:
            break
        time.sleep(0.1)
    assert len(rewrites) == 1


def test_closing_does_it(registry, folder):
    load(registry, 3)
    registry.remove(wanted(1).key)
    registry.close()
    assert told(folder, 3) == [0, 2]


def remove_and_die(folder, how):
    registry = ContextRegistry(CPU, folder)
    registry.remove(wanted(1).key)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_process_that_ends_leaves_it_to_the_next_or_does_it(folder, how):
    registry = ContextRegistry(CPU, folder)
    load(registry, 3)
    registry.close()
    process = processes.Process(target=remove_and_die, args=(folder, how))
    process.start()
    process.join(60)
    if how == "killed":
        assert 1 in told(folder, 3), "or this test shows nothing"
        ContextRegistry(CPU, folder).close()
    assert told(folder, 3) == [0, 2]


def test_opening_writes_nothing_anew_where_nothing_was_deleted(registry, rewrites, folder):
    load(registry, 3)
    registry.remove(wanted(1).key)
    registry.close()
    assert len(rewrites) == 1
    ContextRegistry(CPU, folder).close()
    assert len(rewrites) == 1


def test_an_index_that_is_held_is_written_anew_when_it_is_free(registry, folder):
    load(registry, 3)
    registry.remove(wanted(1).key)
    with closing(sqlite3.connect(folder / "index" / "cache.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM Cache").fetchall()
        registry.flush()
        assert 1 in told(folder, 3), "or this test shows nothing"
        reader.execute("ROLLBACK")
    ContextRegistry(CPU, folder).close()
    assert told(folder, 3) == [0, 2]


def test_what_is_forgotten_while_it_is_written_anew_is_not_left_out(registry, rewrites, folder, monkeypatch):
    load(registry, 4)
    counted, other = Index.rewrite, ContextRegistry(CPU, folder)

    def rewrite(self):
        counted(self)
        other._backing.tier.remove(wanted(2).key, for_good=True)  # of a process that is killed then

    registry.remove(wanted(1).key)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "rewrite", rewrite)
        registry.close()
    other._backing.tier.close()
    assert len(rewrites) == 1
    again = ContextRegistry(CPU, folder)
    assert len(rewrites) == 2
    assert told(folder / "index", 4) == [0, 3]
    again.close()


def test_what_is_loaded_again_at_once_keeps_its_name(registry, folder):
    load(registry, 3)
    registry.remove(wanted(1).key)
    load(registry, 3)
    registry.close()
    again = ContextRegistry(CPU, folder)
    assert again.one("page 1").key == wanted(1).key
    again.close()
