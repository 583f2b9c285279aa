"""A folder's index in processes that are forked: no lock is taken for one of the child's, and nothing that it writes is lost."""

import os
import random
import signal
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


def opened(folder):
    """A registry whose index this thread has open."""
    registry = ContextRegistry(CPU, folder)
    load(registry, 0)
    registry.flush()
    return registry, registry._backing.tier._keeper.opened().index


def is_quick():
    """Whether a fork in another thread waits for nobody."""
    thread = threading.Thread(target=lambda: outcome(forked(lambda: None)), daemon=True)
    thread.start()
    thread.join(30)
    return not thread.is_alive()


def during(folder, held_by, answers):
    """A child is forked while another thread is inside the index."""
    registry, index = opened(folder)
    begun, rest = threading.Event(), []

    def hold():
        if held_by == "a transaction":
            with index.transaction():
                index.set("held", {"by": "the parent"})
                begun.set()
                time.sleep(0.5)
        elif held_by == "a reader":
            with index.transaction():
                for number in range(250):
                    index.set(f"row {number}", {})
            rows = index.keys("row ")
            rest.append(next(rows))
            begun.set()
            time.sleep(0.5)
            rest.extend(rows)
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
    answers.put((said, held, rest, list(index.keys("row ")), registry._backing.tier.made_anew))
    registry.close()


@pytest.mark.parametrize("held_by", ["a transaction", "a reader", "a rewriting"])
def test_a_child_uses_the_index_whatever_its_parent_was_doing(tmp_path, held_by):
    said, held, read, there, made_anew = in_a_process(during, tmp_path / "contexts", held_by)
    assert said == "['page 0', 'page 1']"
    assert held == ({"by": "the parent"} if held_by == "a transaction" else None)
    assert held_by != "a reader" or (read == there and len(read) == 250)
    assert not made_anew


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
    answers.put((said, wrong, is_quick(), registry.stats()["disk_errors"]))


def test_threads_write_while_others_fork(tmp_path):
    said, wrong, quick, failed = in_a_process(storm, tmp_path / "contexts")
    assert said == 16 * ["True"]
    assert wrong == []
    assert quick
    assert failed == 0


def late(answers):
    """A fork does not wait for ever."""
    free, begun = threading.Event(), threading.Event()

    def hold():
        with forks.unforked():
            begun.set()
            free.wait()

    forks._WAIT_S = 0.2
    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()

    def inside():
        with forks.unforked():
            return is_quick()

    said = outcome(forked(inside))
    free.set()
    thread.join()
    forks._WAIT_S = 3600.0
    answers.put((said, is_quick()))


def test_a_fork_waits_no_longer_than_it_says():
    assert in_a_process(late) == ("True", True)


def interrupted(folder, answers):
    """Interrupts while the index is used, whenever they come: how many did, and whether a fork waits then."""
    _, index = opened(folder)
    forks._WAIT_S = 3600.0
    rng, count = random.Random(0), 0

    def interrupt(*args):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    for _ in range(3000):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-4))
                index.get("totals")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            count += 1
    answers.put((count, is_quick(), index.get("totals") is not None))
    answers.close()
    answers.join_thread()
    os._exit(0)  # a thread that waits would be waited for


def test_whatever_is_interrupted_nobody_who_forks_waits_for_it(tmp_path):
    count, quick, there = in_a_process(interrupted, tmp_path / "contexts")
    assert count > 30
    assert quick
    assert there


def waiting(folder, answers):
    """A fork waits for a thread inside the index, and is interrupted meanwhile."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    registry, index = opened(folder)
    begun = threading.Event()

    def hold():
        with index.transaction():
            begun.set()
            time.sleep(3.0)

    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    child, heard = None, False
    try:
        child = forked(lambda: use(folder, 1))
        time.sleep(30.0)
    except KeyboardInterrupt:
        heard = True
    said = outcome(child)
    thread.join()
    answers.put((heard, said, is_quick(), len(registry.contexts())))
    registry.close()


def test_an_interrupt_while_a_fork_waits_is_heard_afterwards(tmp_path):
    assert in_a_process(waiting, tmp_path / "contexts") == (True, "['page 0', 'page 1']", True, 2)


def test_a_connection_makes_no_index_where_there_is_none(tmp_path):
    registry, _ = opened(tmp_path / "contexts")
    index = tmp_path / "contexts" / "index"
    assert outcome(forked(lambda: None)) == "None"  # connections are opened again
    index.rename(index.with_name("elsewhere"))
    index.mkdir(mode=0o700)  # as another process does, before it has made the database
    registry.contexts()
    assert [path.stat().st_mode & 0o77 for path in index.iterdir()] == [0] * len(list(index.iterdir()))
    registry.close()
