"""A folder's index in processes that are forked: no lock is taken for one of the child's, and nothing that it writes is lost."""

import os
import sqlite3
import threading
import time
from contextlib import closing

import pytest

from forking import forked, outcome
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.system import forks
from synthetic import CPU, in_a_process, load, wanted


def use(folder, number):
    registry = ContextRegistry(CPU, folder)
    load(registry, number)
    registry.flush()
    names = sorted(name for entry in registry.contexts() for name in entry.names)
    registry.close()
    return names


def during(folder, held_by, answers):
    """A child is forked while another thread is inside the index."""
    registry = ContextRegistry(CPU, folder)
    load(registry, 0)
    registry.flush()
    index = registry._backing.tier._keeper.opened().index
    begun = threading.Event()

    def hold():
        if held_by == "a transaction":
            with index.transaction():
                index.set("held", {"by": "the parent"})
                begun.set()
                time.sleep(0.5)
        elif held_by == "a reader":
            rows = index.keys("")
            next(rows)
            begun.set()
            time.sleep(0.5)
        else:
            begun.set()
            for _ in range(20):
                index.rewrite()

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    child = forked(lambda: use(folder, 1))
    said = outcome(child)
    thread.join()
    held = index.get("held")
    registry.close()
    answers.put((said, held))


@pytest.mark.parametrize("held_by", ["a transaction", "a reader", "a rewriting"])
def test_a_child_uses_the_index_whatever_its_parent_was_doing(tmp_path, held_by):
    said, held = in_a_process(during, tmp_path / "contexts", held_by)
    assert said == "['page 0', 'page 1']"
    assert held == ({"by": "the parent"} if held_by == "a transaction" else None)


def outlived(folder, answers):
    """A child goes on writing when its parent, which had the index open before, has closed it."""
    registry = ContextRegistry(CPU, folder)
    load(registry, 0)
    registry.flush()
    here, there = os.pipe()

    def go_on():
        mine = ContextRegistry(CPU, folder)
        load(mine, 1)
        mine.flush()
        os.read(here, 1)  # until the parent has closed it
        for number in range(2, 6):
            load(mine, number)
        mine.flush()
        for number in range(6):
            mine.pin(wanted(number).key)
        mine._backing.tier.close()  # the writer's connection is open still

    child = forked(go_on)
    time.sleep(0.5)
    registry.close()
    os.write(there, b".")
    said = outcome(child)
    with closing(sqlite3.connect(folder / "index" / "cache.db")) as database:
        (sound,) = database.execute("PRAGMA integrity_check").fetchone()
    after = ContextRegistry(CPU, folder)
    answers.put((said, sound, sorted((entry.name, entry.pinned) for entry in after.contexts()), after._backing.tier.made_anew))


def test_what_a_child_writes_is_there_when_its_parent_has_closed_the_index(tmp_path):
    said, sound, entries, made_anew = in_a_process(outlived, tmp_path / "contexts")
    assert (said, sound, made_anew) == ("None", "ok", False)
    assert entries == [(f"page {i}", True) for i in range(6)]


def storm(folder, answers):
    """Threads write while others fork."""
    registry = ContextRegistry(CPU, folder)
    done, wrong = threading.Event(), []

    def work(first):
        number = first
        while not done.is_set():
            try:
                load(registry, number % 8)
                registry.pin(wanted(number % 8).key, number % 3 == 0)
                registry.contexts()
            except BaseException as error:
                wrong.append(repr(error))
            number += 1

    def fork():
        said.extend(outcome(forked(lambda: len(use(folder, 1)) > 0)) for _ in range(8))

    said = []
    load(registry, 1)
    registry.flush()
    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    forkers = [threading.Thread(target=fork) for _ in range(2)]
    for thread in [*workers, *forkers]:
        thread.start()
    for thread in forkers:
        thread.join()
    done.set()
    for thread in workers:
        thread.join()
    registry.close()
    answers.put((said, wrong, forks._inside, forks._forking))


def test_threads_write_while_others_fork(tmp_path):
    said, wrong, inside, forking = in_a_process(storm, tmp_path / "contexts")
    assert said == 16 * ["True"]
    assert wrong == []
    assert (inside, forking) == (0, False)


def late(answers):
    """A fork does not wait for ever."""
    free = threading.Event()

    def hold():
        with forks.unforked:
            free.wait()

    forks._WAIT_S = 0.2
    thread = threading.Thread(target=hold)
    thread.start()
    while not forks._inside:
        time.sleep(0.01)
    said = outcome(forked(lambda: forks._inside))
    free.set()
    thread.join()
    answers.put((said, forks._inside, forks._forking))


def test_a_fork_waits_no_longer_than_it_says():
    assert in_a_process(late) == ("0", 0, False)
