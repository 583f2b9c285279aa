"""What is not removed is kept, whatever else is removed beside it, at the same time or before."""

import errno
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from kvzip_memory.errors import InputError
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk import names as disk_names
from kvzip_memory.registry.disk import tidying
from kvzip_memory.registry.disk.files import PreparedFile, UnreadableHereError
from kvzip_memory.registry.disk.folder import Folder
from kvzip_memory.registry.disk.index import check_plain
from kvzip_memory.registry.disk.keeper import Keeper
from kvzip_memory.registry.disk.names import Names
from kvzip_memory.system.private import check_file, check_folder
from synthetic import CPU, context, wanted


def load(registry, number, name, *tags):
    registry.readmit(wanted(number).key)
    with registry.lease(replace(wanted(number), name=name, tags=tags), lambda report: context(number, 8)):
        pass


def evict(registry, number):
    """As the budget of the disk does."""
    tier = registry._backing.tier
    with tier._keeper.changing() as rows:
        tier._tidying.drop(rows, rows.entry(wanted(number).key))


def found(registry, name):
    return [(entry.key, entry.tags) for entry in registry.find(name)]


@pytest.mark.parametrize("error", [UnreadableHereError("of a newer version"), OSError(errno.EIO, "for a moment")])
def test_a_file_of_which_nobody_can_tell_whose_it_is(folder, monkeypatch, error):
    other, asked = ContextRegistry(CPU, folder, tenant="b"), wanted(1, tenant="b")
    with other.lease(asked, lambda report: replace(context(1, 8), key=asked.key, identity=asked.identity)):
        pass
    other.close()
    for path in (folder / "index").iterdir():
        path.unlink()
    (folder / "index").rmdir()

    def unreadable(self, path):
        raise error

    monkeypatch.setattr(Folder, "read_entry", unreadable)
    registry = ContextRegistry(CPU, folder, tenant="a")
    with pytest.raises(InputError):
        registry.remove(asked.key)
    assert registry._backing.has(asked.key)
    registry.close()


@pytest.mark.parametrize("told", [False, True], ids=["told later", "told at once"])
@pytest.mark.parametrize("name", ["first", "second"])
def test_what_is_loaded_again_from_memory_while_it_is_removed(two, folder, monkeypatch, name, told):
    registry, _ = two
    load(registry, 1, "first")
    registry.flush()
    changing, again = Keeper.changing, threading.Thread(target=load, args=(registry, 1, name, "again"))

    def late(keeper):
        with suppress(RuntimeError):  # it has run
            again.start()
            again.join()
            if told:
                registry._writing.flush()
        return changing(keeper)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "changing", late)
        registry.remove(wanted(1).key)
    registry.flush()
    assert found(registry, name) == [(wanted(1).key, ("again",))]
    registry.close()
    after = ContextRegistry(CPU, folder)
    assert found(after, name) == [(wanted(1).key, ("again",))]
    after.close()


def test_what_could_not_be_removed(two, monkeypatch):
    registry, other = two
    load(registry, 1, "first", "red"), load(registry, 2, "second")
    registry.flush()

    def immutable(path):
        raise PermissionError(errno.EPERM, "immutable", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(tidying, "delete", immutable)
        with pytest.raises(PermissionError):
            registry.remove("first")
    load(other, 1, None)
    evict(other, 1)
    registry.remove("second")
    registry.flush()
    assert found(other, "first") == found(registry, "first") == [(wanted(1).key, ("red",))]


@pytest.mark.parametrize("then", ["stored", "on a full disk", "evicted"])
def test_what_another_process_loads_again_whose_clock_is_behind(two, monkeypatch, then):
    registry, other = two
    load(registry, 1, "first"), load(registry, 2, "second")
    registry.remove("first")
    registry.flush()

    def full(self, path):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        now = time.time
        patch.setattr(disk_names.time, "time", lambda: now() - 0.5)
        if then == "on a full disk":
            patch.setattr(PreparedFile, "write", full)
        load(other, 1, "first", "red")
        other.flush()
    if then == "evicted":
        evict(other, 1)
    registry.remove("second")
    registry.flush()
    assert found(other, "first") == [(wanted(1).key, ("red",))]
    other.close()
    if then == "stored":
        assert found(registry, "first") == [(wanted(1).key, ("red",))]


def test_what_is_written_to_an_index_that_another_process_has_made_anew(two, folder):
    registry, other = two
    for number in (1, 2, 3):
        load(registry, number, f"page {number}")
    registry.flush()
    load(other, 2, "page 2")
    other.flush()
    registry._backing.tier._keeper.opened().index.set("totals", {"of": "no version"})
    registry.stats()
    assert registry._backing.tier.made_anew, "or this test shows nothing"
    other.pin("page 2")
    load(other, 3, "page 3", "late")
    other.flush()
    assert registry.one("page 2").pinned
    assert registry.one("page 3").tags == ("late",)


@pytest.mark.parametrize("damaged", ["a row of notes", "a row of notes and the totals"])
def test_notes_of_others_when_some_are_damaged(two, damaged):
    registry, other = two
    load(registry, 1, "first"), load(registry, 2, "second")
    load(other, 1, "first")
    other.pin("first")
    registry.remove("first")
    registry.flush()
    rows = registry._backing.tier._keeper.opened()
    rows.index._rows.set("forgotten:x", "rubbish")
    if "totals" in damaged:
        rows.index.set("totals", {"of": "no version"})
    registry.stats(), other.stats()
    registry.remove("second")
    registry.flush()
    assert registry._backing.tier.made_anew == ("totals" in damaged)
    other.close()
    assert registry.find(wanted(1).key) == []


def test_a_name_that_is_written_just_when_its_context_is_removed(two, folder, monkeypatch):
    registry, other = two
    load(registry, 1, "first")
    registry.flush()
    write, removed = Names.write, []

    def late(names, label, over=None):
        if names is other._backing.names and not removed:
            removed.append(label)
            registry.remove(wanted(1).key)
            registry.flush()
        write(names, label, over)

    monkeypatch.setattr(Names, "write", late)
    load(other, 1, "second")
    other.flush()
    other.close(), registry.close()
    assert removed
    assert [path.name for path in folder.rglob("*") if path.is_file() and b'"second"' in path.read_bytes()] == []


def test_thousands_of_removals_are_cleaned_up_before_their_notes_are_gone(two, folder, monkeypatch):
    registry, _ = two
    monkeypatch.setattr("kvzip_memory.registry.forgotten._LIMIT", 20)
    monkeypatch.setattr("kvzip_memory.registry.cleaning._MOST", 10)
    for number in range(40):
        load(registry, number, f"page {number}")
    registry.flush()
    path = registry._backing.tier.folder.path(wanted(0).key)
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    registry.verify(wanted(0).key)
    load(registry, 0, "page 0")
    for number in range(40):
        registry.remove(wanted(number).key)
        time.sleep(0.02)
    registry.flush()
    assert list((folder / "quarantine").iterdir()) == []


def test_a_file_of_names_that_cannot_be_read_now_is_not_written_over(two, folder, monkeypatch):
    registry, other = two
    load(registry, 1, "first")
    registry.flush()

    def unreadable(path):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(disk_names, "read_text", unreadable)
        with pytest.raises(OSError, match="too many"):
            other._backing.names.write(disk_names.Label("first", None, "1" * 64, wanted(2).key, time.time()))
    assert found(registry, "first") == [(wanted(1).key, ())]


def test_rows_are_never_read_by_halves(two):
    """What a listing counts is what is there, while others use it."""
    registry, other = two
    for number in range(12):
        load(registry, number, f"page {number}")
    registry.flush()
    done, counts = threading.Event(), set()

    def use():
        number = 0
        while not done.is_set():
            load(other, number % 12, f"page {number % 12}")
            number += 1

    thread = threading.Thread(target=use)
    thread.start()
    for _ in range(50):
        counts.add(len(registry._backing.tier.entries()))
    done.set()
    thread.join()
    assert counts == {12}


def test_threads_go_on_while_another_process_makes_the_index_anew(two):
    registry, other = two
    for number in range(4):
        load(registry, number, f"page {number}")
    registry.flush()
    done, wrong = threading.Event(), []

    def use():
        while not done.is_set():
            try:
                assert len(other.contexts()) == 4
                other.pin("page 1", not other.one("page 1").pinned)
            except BaseException as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        registry._backing.tier._keeper.opened().index.set("totals", {"of": "no version"})
        registry.stats()
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("check", [check_plain, check_file, check_folder])
def test_what_is_just_deleted_is_not_in_the_way(tmp_path, monkeypatch, check):
    """As SQLite does with its journal, which made a sound index look damaged."""
    path = tmp_path / "cache.db-journal"
    there = os.path.lexists

    def deleted(asked):
        answer = there(asked)
        if asked == path and answer:
            path.rmdir() if path.is_dir() else path.unlink()
        return answer

    monkeypatch.setattr(os.path, "lexists", deleted)
    path.mkdir() if check is check_folder else path.touch()
    check(tmp_path if check is check_plain else path)


def test_an_index_that_is_made_anew_is_filled_by_who_knows_what_was_in_it(two, folder, monkeypatch):
    """Another process opens it before."""
    registry, other = two
    load(registry, 1, "first")
    registry.pin("first")
    load(registry, 2, "second")
    load(other, 2, "second")
    registry.remove("second")
    registry.flush()
    third, fill = threading.Thread(target=lambda: ContextRegistry(CPU, folder).close()), Keeper._fill

    def late(keeper, salvaged, notes):
        if salvaged:
            third.start()
            time.sleep(0.3)
        fill(keeper, salvaged, notes)

    monkeypatch.setattr(Keeper, "_fill", late)
    registry._backing.tier._keeper.opened().index.set("totals", {"of": "no version"})
    registry.stats()
    third.join()
    assert [entry.pinned for entry in registry.contexts()] == [True]
    assert other._backing.notes().noted(wanted(2).key) > 0
    assert other.find(wanted(2).key) == []
