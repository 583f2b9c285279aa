"""The index is written anew behind deletions: once for many, and whatever ends the process."""

import atexit
import errno
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

import pytest

from kvzip_memory.errors import InputError
from kvzip_memory.registry import ContextRegistry, cleaning
from kvzip_memory.registry.disk import leaving
from kvzip_memory.registry.disk import names as disk_names
from kvzip_memory.registry.disk.connected import Connected
from kvzip_memory.registry.disk.index import Index
from kvzip_memory.registry.disk.leaving import Leaving
from kvzip_memory.registry.disk.names import Names
from kvzip_memory.registry.disk.rows import Rows
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.disk.tidying import Tidying
from synthetic import CPU, context, processes, wanted


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


def remove_and_end(folder, how):
    registry = ContextRegistry(CPU, folder)
    remove = partial(registry.remove, wanted(1).key)
    if how == "by a thread that is not waited for":
        thread = threading.Thread(target=remove, daemon=True)
        thread.start()
        thread.join()
    elif how == "when it has ended already":
        atexit.register(remove)
    else:
        remove()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["killed", "ended", "by a thread that is not waited for", "when it has ended already"])
def test_a_process_that_ends_leaves_it_to_the_next_or_does_it(folder, how):
    registry = ContextRegistry(CPU, folder)
    load(registry, 3)
    registry.close()
    start = multiprocessing.get_context("spawn") if "ended already" in how else processes  # the others end without Python's own end
    process = start.Process(target=remove_and_end, args=(folder, how))
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


@pytest.mark.parametrize("by", ["a flush", "the next who opens it"])
def test_an_index_that_is_held_is_written_anew_when_it_is_free(registry, folder, by):
    load(registry, 3)
    registry.remove(wanted(1).key)
    with closing(sqlite3.connect(folder / "index" / "cache.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM Cache").fetchall()
        registry.flush()
        assert 1 in told(folder, 3), "or this test shows nothing"
        reader.execute("ROLLBACK")
    if by == "a flush":
        registry.flush()
    else:
        ContextRegistry(CPU, folder).close()
    assert told(folder, 3) == [0, 2]


FAILING = {
    "the index": (Index, "rewrite"),
    "names": (Names, "sweep"),
    "quarantine": (Tidying, "drop_bad"),
    "catalogs": (Leaving, "_write_catalogs"),
    "taking a name": (Names, "take"),
}


@pytest.mark.parametrize("error", [OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", FAILING)
def test_what_could_not_be_done_is_done_by_the_next_flush(registry, folder, monkeypatch, failing, error):
    load(registry, 3)

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch, suppress(error):
        patch.setattr(*FAILING[failing], fail)
        with suppress(error):
            registry.remove(wanted(1).key)
        registry.flush()
    registry.flush()
    assert told(folder, 3) == [0, 2]


def test_what_is_forgotten_while_it_is_written_anew_is_not_left_out(registry, rewrites, folder, monkeypatch):
    load(registry, 4)
    counted, other = Index.rewrite, ContextRegistry(CPU, folder)

    def rewrite(self):
        counted(self)
        other._backing.tier.remove(wanted(2).key, for_good=time.time())  # of a process that is killed then

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


def while_removed(registry, monkeypatch):
    """Load it from another thread while it is being removed: its file is gone, its name not yet."""
    take = Names.take

    def late(names, label):
        thread = threading.Thread(target=load, args=(registry, 3))
        thread.start()
        thread.join()
        take(names, label)

    with monkeypatch.context() as patch:
        patch.setattr(Names, "take", late)
        registry.remove(wanted(1).key)


def set_back(registry, monkeypatch):
    registry.remove(wanted(1).key)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 60)
    load(registry, 3)


def by_another(registry, monkeypatch):
    registry.remove(wanted(1).key)
    other = ContextRegistry(CPU, registry._backing.folder)
    load(other, 3)
    other.close()


def at_once(registry, monkeypatch):
    registry.remove(wanted(1).key)
    load(registry, 3)


@pytest.mark.parametrize("again", [at_once, by_another, set_back, while_removed], ids=lambda again: again.__name__.replace("_", " "))
def test_what_is_loaded_again_keeps_what_it_was_given_then(registry, folder, monkeypatch, again):
    load(registry, 3)
    again(registry, monkeypatch)
    registry.flush()
    monkeypatch.undo()
    assert registry.one("page 1").key == wanted(1).key
    registry.close()
    after = ContextRegistry(CPU, folder)
    assert after.one("page 1").key == wanted(1).key
    assert after.one("page 1").tags == ("Ottoline 1.",)
    after.close()


def test_what_is_loaded_again_under_another_name_has_not_its_old_one(registry, folder):
    load(registry, 3)
    registry.pin(wanted(1).key)
    registry.remove("page 1")
    registry.readmit(wanted(1).key)
    with registry.lease(replace(wanted(1), name="another"), lambda report: context(1, 8)):
        pass
    registry.flush()
    entry = registry.one("another")
    assert (tuple(entry.names), entry.tags, entry.pinned) == (("another",), (), False)
    with pytest.raises(InputError):
        registry.one("page 1")


def test_a_removal_that_fails_takes_nothing(registry, monkeypatch):
    load(registry, 3)
    registry.pin(wanted(1).key)
    before = registry.one("page 1")

    def fail(*args, **options):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "remove", fail)
        with pytest.raises(OSError, match="gone"):
            registry.remove("page 1")
    after = registry.one("page 1")
    assert (after.names, after.tags, after.pinned) == (before.names, before.tags, True)


@pytest.mark.parametrize("killed", [False, True])
def test_a_name_that_was_dropped_is_nowhere_though_its_context_stays(registry, folder, killed):
    load(registry, 1)
    with registry.lease(replace(wanted(0), name="another"), lambda report: context(0, 8)):
        pass
    registry.close()  # which writes names into the file
    again = ContextRegistry(CPU, folder)
    again.remove("another")
    if killed:
        again._cleaning._timer.cancel()
        again = ContextRegistry(CPU, folder)
    again.flush()
    assert again.one("page 0").key == wanted(0).key
    assert [path.name for path in folder.rglob("*") if path.is_file() and b'another"' in path.read_bytes()] == []
    again.close()


def test_what_was_set_aside_goes_with_its_context(registry, folder):
    load(registry, 3)
    path = registry._backing.tier.folder.path(wanted(1).key)
    sound = path.read_bytes()
    path.write_bytes(sound[:-64] + bytes(64))
    registry.verify(wanted(1).key)
    assert any(wanted(1).key in path.name for path in (folder / "quarantine").iterdir()), "or this test shows nothing"
    load(registry, 3)
    registry.remove(wanted(1).key)
    registry.flush()
    assert told(folder, 3) == [0, 2]


def test_what_was_removed_is_not_written_back_by_who_has_it_still_though_the_index_is_made_anew(registry, folder):
    load(registry, 5)
    other = ContextRegistry(CPU, folder, device_bytes=2 * context(0, 8).nbytes)
    with other.lease(replace(wanted(1), tags=("Ottoline 1.",)), lambda report: context(1, 8)):
        pass
    other.flush()
    registry.remove(wanted(1).key)
    registry.flush()
    assert told(folder, 5) == [0, 2, 3, 4]
    index = registry._backing.tier._keeper.opened().index
    index.set("totals", {"of": "no version"})
    registry.stats()
    assert registry._backing.tier.made_anew, "or this test shows nothing"
    for number in (2, 3, 4):
        with other.lease(wanted(number), lambda report, number=number: context(number, 8)):
            pass
        assert other.stats()["tiers"]["disk"]["contexts"] == 4
    other.flush()
    other.close()
    registry.flush()
    assert told(folder, 5) == [0, 2, 3, 4]


def failing_commit(monkeypatch):
    """The file is gone when the transaction fails."""
    before = Rows.remove

    def remove(rows, entry):
        before(rows, entry)
        raise OSError("the disk is full")

    monkeypatch.setattr(Rows, "remove", remove)


def interrupted(monkeypatch):
    def unlink(tidying, entry):
        tidying._folder.path(entry.key).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(Tidying, "_unlink", unlink)


@pytest.mark.parametrize("after", ["a flush", "asked again", "opened again"])
@pytest.mark.parametrize("fails", [failing_commit, interrupted])
def test_a_removal_that_fails_when_the_file_is_gone_is_finished(registry, folder, monkeypatch, fails, after):
    load(registry, 3)
    registry.close()
    again = ContextRegistry(CPU, folder)  # which has nothing in its memory
    with monkeypatch.context() as patch:
        fails(patch)
        with pytest.raises((OSError, KeyboardInterrupt)):
            again.remove(wanted(1).key)
    if after == "a flush":
        again.flush()
    elif after == "asked again":
        with suppress(InputError):  # the index was mended before
            again.remove(wanted(1).key)
        again.flush()
    else:
        again._cleaning._timer.cancel()
        again = ContextRegistry(CPU, folder)
    assert told(folder, 3) == [0, 2]
    again.close()


def damage(registry, number):
    path = registry._backing.tier.folder.path(wanted(number).key)
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    registry.verify(wanted(number).key)


def an_index_set_aside(registry, folder):
    registry._backing.tier._keeper.opened().index.set("totals", {"of": "no version"})
    registry.stats()
    assert list((folder / "quarantine").iterdir())


def an_older_file(registry, folder):
    damage(registry, 1)
    load(registry, 3)
    assert list((folder / "quarantine").iterdir())


def a_name_that_no_row_knows(registry, folder):
    names = registry._backing.names
    (label,) = names.of(None, "page 1")
    names.write(names.give(replace(label, name="another")))


def what_a_killed_writer_has_left(registry, folder):
    (path,) = (path for path in (folder / "names").iterdir() if b'page 1"' in path.read_bytes())
    path.with_name(f".{path.stem}").write_bytes(path.read_bytes())


def a_report_of_its_build(registry, folder):
    registry._backing.tier.builders.report(wanted(1).key, {"stage": "score", "done": 1, "total": 2})


BESIDE = [an_index_set_aside, an_older_file, a_name_that_no_row_knows, what_a_killed_writer_has_left, a_report_of_its_build]


@pytest.mark.parametrize("ends", ["killed", "killed before names", "closed"])
@pytest.mark.parametrize("beside", BESIDE)
def test_nothing_beside_a_context_tells_of_it_when_it_is_gone(registry, folder, monkeypatch, beside, ends):
    load(registry, 3)
    beside(registry, folder)
    if ends == "killed before names":
        monkeypatch.setattr(Names, "take", lambda names, label: None)
    registry.remove(wanted(1).key)
    monkeypatch.undo()
    if ends == "closed":
        registry.close()
    else:
        registry._cleaning._timer.cancel()
        ContextRegistry(CPU, folder).close()
    assert told(folder, 3) == [0, 2]
    assert b'"another' not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("beside", [an_index_set_aside, an_older_file])
def test_nothing_tells_of_a_name_that_was_dropped(registry, folder, beside):
    load(registry, 3)
    registry.readmit(wanted(1).key)
    with registry.lease(replace(wanted(1), name="another"), lambda report: context(1, 8)):
        pass
    registry.flush()
    beside(registry, folder)
    registry.remove("page 1")
    registry.flush()
    assert registry.one("another").key == wanted(1).key
    files = [path for path in folder.rglob("*") if path.is_file() and b'page 1"' in path.read_bytes()]
    assert files == []


def test_a_catalog_that_could_not_be_written_is_written_later(registry, folder, monkeypatch):
    load(registry, 1)
    with registry.lease(replace(wanted(0), name="another"), lambda report: context(0, 8)):
        pass
    registry.close()
    again = ContextRegistry(CPU, folder)
    with monkeypatch.context() as patch:

        def full(*args):
            raise OSError(errno.ENOSPC, "the disk is full")

        patch.setattr(leaving, "copy_with_catalog", full)
        again.remove("another")
        again.flush()
        again.flush()
    again._cleaning.now()
    assert [path.name for path in folder.rglob("*") if path.is_file() and b'another"' in path.read_bytes()] == []
    again.close()


@pytest.mark.parametrize("loaded", ["before the removal", "while it runs"])
def test_a_name_that_another_process_gives_is_not_taken_with_the_old_context(registry, folder, monkeypatch, loaded):
    """It is given, and written after the removal."""
    load(registry, 3)
    other, taken, take = ContextRegistry(CPU, folder), threading.Event(), Names.take
    other._writing.thread.submit(taken.wait)

    def give():
        with other.lease(replace(wanted(2), name="page 1"), lambda report: context(2, 8)):
            pass

    def late(names, label):
        give()
        take(names, label)

    if loaded == "before the removal":
        give()
        registry.remove(wanted(1).key)
    else:
        monkeypatch.setattr(Names, "take", late)
        registry.remove(wanted(1).key)
        monkeypatch.undo()
    taken.set()
    other.close()
    registry.flush()
    assert registry.one("page 1").key == wanted(2).key
    assert told(folder / "blobs", 3) == [0, 2]


def test_a_name_of_a_context_that_another_process_removes_is_not_written_after_that(registry, folder):
    load(registry, 3)
    other, removed = ContextRegistry(CPU, folder), threading.Event()
    other._writing.thread.submit(removed.wait)
    with other.lease(replace(wanted(1), name="another"), lambda report: context(1, 8)):
        pass
    registry.remove(wanted(1).key)
    registry.flush()
    removed.set()
    other.close()
    assert told(folder, 3) == [0, 2]
    assert b'"another' not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_who_lists_misses_nothing_that_is_used_meanwhile(registry, folder, monkeypatch):
    monkeypatch.setattr(Connected, "PAGE", 2)
    load(registry, 30)
    touched, entry = [], Rows.entry

    def touch(rows, key):
        if not touched and key == wanted(20).key:
            touched.append(key)
            for number in (3, 25, 29):
                registry._backing.tier.touch(wanted(number).key)
        return entry(rows, key)

    monkeypatch.setattr(Rows, "entry", touch)
    assert len(registry._backing.tier._leaving._entries(lambda entry: True)) == 30
    assert touched
    touched.clear()
    assert len(registry._backing.tier.entries()) == 30
    assert touched


def test_what_is_known_of_a_context_whose_file_was_lost_is_removed_by_its_key(registry, folder):
    load(registry, 3)
    registry.pin(wanted(1).key)
    registry.close()
    again = ContextRegistry(CPU, folder)
    damage(again, 1)
    assert again.remove(wanted(1).key).pinned
    again.flush()
    assert told(folder, 3) == [0, 2]
    with pytest.raises(InputError):
        again.remove(wanted(1).key)
    again.close()


def ways_to_find(registry, name):
    return {
        "key": registry.find(wanted(1).key),
        "short key": registry.find(wanted(1).key[:10]),
        "name": registry.find(name),
        "list": registry.contexts(),
        "latest": registry.contexts(5),
    }


@pytest.mark.parametrize("gone", ["removed", "forgotten"])
def test_what_is_deleted_elsewhere_is_found_no_more_in_memory(registry, folder, gone):
    """Though it is there still, for who has a handle."""
    load(registry, 2)
    other = ContextRegistry(CPU, folder)
    with other.lease(replace(wanted(1), tags=("Ottoline 1.",)), lambda report: context(1, 8)):
        pass
    other.flush()
    name = "page 1"
    if gone == "forgotten":
        registry._backing.tier.unname(wanted(1).key, name)
        for label in registry._backing.names.of(None, name):
            registry._backing.names.take(label)
        registry.forget(lambda key, tag: tag == "Ottoline 1.")
    else:
        registry.remove(wanted(1).key)
    assert {way: [e.key for e in found] for way, found in ways_to_find(other, name).items()} == {
        "key": [], "short key": [], "name": [], "list": [wanted(0).key], "latest": [wanted(0).key],
    }  # fmt: skip
    assert other.is_removed(wanted(1).key, 1.0)
    other.close()
    registry.flush()
    assert told(folder, 2) == [0]


def test_what_the_budget_of_the_disk_has_dropped_is_found_in_memory(registry, folder):
    load(registry, 2)
    tier = ContextRegistry(CPU, folder)
    with tier._backing.tier._keeper.changing() as rows:
        tier._backing.tier._tidying.drop(rows, rows.entry(wanted(1).key))
    tier.close()
    assert all(wanted(1).key in [entry.key for entry in found] for found in ways_to_find(registry, "page 1").values())
    assert not registry.is_removed(wanted(1).key, 1.0)


@pytest.mark.parametrize("evicted", [False, True])
def test_what_is_loaded_again_after_others_have_deleted_it_has_nothing_of_before(registry, folder, evicted):
    other = ContextRegistry(CPU, folder)
    with other.lease(replace(wanted(1), name="the old", tags=("Ottoline 1.",)), lambda report: context(1, 8)):
        pass
    other.pin("the old")
    other.flush()
    registry.remove(wanted(1).key)
    other.readmit(wanted(1).key)
    with other.lease(replace(wanted(1), name="after"), lambda report: context(1, 8)):
        pass
    if evicted:  # by the budget of the disk, before it is written again
        other.flush()
        with other._backing.tier._keeper.changing() as rows:
            other._backing.tier._tidying.drop(rows, rows.entry(wanted(1).key))
    other.close()
    registry.flush()
    now = ContextRegistry(CPU, folder)
    entries = now.contexts()
    assert [(set(e.names), e.former, e.tags, e.pinned) for e in entries] == ([] if evicted else [({"after"}, (), (), False)])
    now.close()
    assert [path.name for path in folder.rglob("*") if path.is_file() and b'the old"' in path.read_bytes()] == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("until", ["while it is removed", "while it is cleaned up"])
def test_a_name_that_cannot_be_read_for_a_moment_is_taken_when_it_can_be(registry, folder, monkeypatch, number, until):
    load(registry, 2)
    registry._backing.names._seen.clear()

    def unreadable(path):
        raise OSError(number, "for a moment")

    def take(names, label):
        monkeypatch.setattr(disk_names, "read_text", unreadable)
        taken(names, label)

    if until == "while it is removed":
        taken = Names.take
        monkeypatch.setattr(Names, "take", take)
        with pytest.raises(OSError, match="for a moment"):
            registry.remove(wanted(1).key)
    else:
        monkeypatch.setattr(disk_names, "read_text", unreadable)
        registry.remove(wanted(1).key)
        registry.flush()
    monkeypatch.undo()
    registry.flush()
    assert told(folder, 2) == [0]
