"""One registry has a context in memory while another one, as of another process, deletes it, loads it again or forgets something else."""

import time
from dataclasses import replace

import pytest

from conftest import TEXT, tiny_engine
from kvzip_memory.errors import StorageError
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.disk.index import IndexHeldError
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.holders import LARGEST_HOLDERS, Naming
from synthetic import CPU, context, token_ids, wanted

KEY = wanted(1).key


def load(registry, number=1, name=None, *tags, flush=True):
    registry.readmit(wanted(number).key)
    with registry.lease(replace(wanted(number), name=name, tags=tags), lambda report: context(number, 8)):
        pass
    if flush:
        registry.flush()


def answer(registry, loaded):
    """By who has a handle since then."""
    with registry.lease(replace(wanted(1), name=None, loaded=loaded), lambda report: context(1, 8)):
        pass
    registry.flush()


def evict(registry):
    """As the budget of the disk does."""
    registry.flush()
    tier = registry._backing.tier
    with tier._keeper.changing() as rows:
        tier._tidying.drop(rows, rows.entry(KEY))


def leave_the_memory(registry):
    with registry._memory.changed:
        for held in registry._memory.here(KEY):
            registry._memory.drop(held)


def forget(registry, tag):
    return registry.forget(lambda key, other: other == tag)


def told(folder, word):
    return [path.name for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def ways_to_find(registry, name=None):
    found = {"key": registry.find(KEY), "short key": registry.find(KEY[:10]), "list": registry.contexts(), "latest": registry.contexts(5)}
    prefix = registry.longest_prefix(wanted(1).identity, [*token_ids(1).tolist(), 5])
    found["prefix"] = [] if prefix is None else [prefix]
    found["finer"] = [entry for entry, _ in registry._lookup._near(replace(wanted(2), group=wanted(1).group))]
    return found if name is None else {**found, "name": registry.find(name)}


def nobody(found):
    return {way for way, contexts in found.items() if contexts} == set()


@pytest.fixture
def ahead(monkeypatch):
    """A clock that is an hour ahead, while called with True."""
    now = time.time

    def set_ahead(yes):
        monkeypatch.setattr(time, "time", (lambda: now() + 3600) if yes else now)

    return set_ahead


@pytest.mark.parametrize("by", ["remove", "forget", "forget of what is in memory alone"])
def test_what_is_deleted_is_found_in_no_way(two, by):
    one, other = two
    load(one, 1, None, "red") if "alone" in by else None
    load(other, 1, None, *([] if "alone" in by else ["red"]))
    if "alone" in by:
        evict(one)
    one.remove(KEY) if by == "remove" else one.forget(Naming("red"))
    assert nobody(ways_to_find(other))
    assert nobody(ways_to_find(one))


def test_who_forgets_something_else_deletes_nothing_that_has_lost_its_tag_before(two):
    one, other = two
    load(one, 1, "page", "red")
    answer(other, time.time())
    forget(one, "red")
    load(other, 2, "page")
    assert forget(other, "blue").deleted == ()
    assert one.tiers(KEY)[-1] == "disk"


def test_who_forgets_something_else_keeps_what_was_never_stored(two, folder, monkeypatch):
    one, _other = two
    monkeypatch.setattr("kvzip_memory.registry.forgotten._LIMIT", 3)
    small = ContextRegistry(CPU, folder, disk_bytes=10)
    load(small, 1, None, "keep")
    for number in range(10, 20):
        load(one, number)
        one.remove(wanted(number).key)
    assert forget(small, "other").deleted == ()
    assert [entry.tags for entry in small.find(KEY)] == [("keep",)]
    small.close()


@pytest.mark.parametrize("notes", ["are there", "are gone"])
def test_what_is_loaded_again_has_nothing_of_before(two, folder, notes, monkeypatch):
    one, other = two
    load(other, 1, "the old", "red")
    other.pin("the old")
    one.remove(KEY)
    if notes == "are gone":
        monkeypatch.setattr("kvzip_memory.registry.forgotten._LIMIT", 3)
        for number in range(10, 20):
            load(one, number)
            one.remove(wanted(number).key)
    load(other, 1, "after")
    other.close()
    one.flush()
    entry = one.one("after")
    assert (set(entry.names), entry.former, entry.tags, entry.pinned) == ({"after"}, (), (), False)
    assert told(folder, 'the old"') == []


def test_what_is_loaded_again_there_and_evicted_is_found_here(two):
    one, other = two
    load(other, 1, "first")
    one.remove(KEY)
    load(one, 1, "again")
    answer(other, time.time())
    evict(one)
    one.close()
    assert [entry.key for entry in other.find("again")] == [KEY]


def test_an_old_handle_takes_nothing_from_who_has_loaded_it_again(two):
    one, other = two
    load(other, 1, "first")
    old = time.time()
    one.remove(KEY)
    load(other, 1, "again")
    new = time.time()
    evict(other)
    leave_the_memory(other)
    answer(other, old)
    assert other.find("again") == []
    answer(other, new)
    assert [entry.key for entry in other.find("again")] == [KEY]


def test_what_was_deleted_by_a_clock_that_is_ahead_and_loaded_again_is_found(two, folder, ahead):
    one, other = two
    load(one, 1, "first")
    ahead(True)
    one.remove(KEY)
    ahead(False)
    third = ContextRegistry(CPU, folder)
    load(third, 1, "again", "red")
    third.close()
    answer(other, time.time())
    evict(one)
    assert [(entry.key, entry.tags) for entry in other.find("again")] == [(KEY, ("red",))]


def test_a_handle_of_what_was_deleted_by_a_clock_that_is_ahead_and_loaded_again_brings_it_back(two, ahead):
    one, other = two
    load(one, 1, "first")
    ahead(True)
    one.remove(KEY)
    ahead(False)
    load(other, 1, "again")
    loaded = max(time.time(), other.loaded(KEY))
    evict(other)
    leave_the_memory(other)
    answer(other, loaded)
    assert [entry.key for entry in other.find("again")] == [KEY]
    assert other.loaded(KEY) == loaded
    assert other.loaded(wanted(2).key) == 0.0


@pytest.mark.parametrize("given", ["loaded", "joined"])
def test_a_tag_that_was_forgotten_by_a_clock_that_is_ahead_can_be_given_again(two, ahead, given):
    one, other = two
    load(one, 1, "first", "other", "red")
    ahead(True)
    one.forget(Naming("red"))
    ahead(False)
    if given == "loaded":
        load(other, 1, "first", "red")
    else:
        other.join(KEY, ["red"])
        other.flush()
    assert one.one(KEY).tags == other.one(KEY).tags == ("other", "red")


def test_after_a_deletion_by_a_clock_that_is_ahead_others_are_loaded_as_ever(two, ahead, monkeypatch):
    one, other = two
    monkeypatch.setattr("kvzip_memory.registry.forgotten._LIMIT", 3)
    load(one, 9)
    ahead(True)
    one.remove(wanted(9).key)
    ahead(False)
    for number in range(10, 20):
        load(one, number)
        one.remove(wanted(number).key)
    load(other, 1, "page", "red")
    evict(one)
    assert [entry.tags for entry in other.find("page")] == [("red",)]


def test_what_was_loaded_by_a_clock_that_is_ahead_is_deleted(two, folder, ahead):
    one, other = two
    ahead(True)
    load(other, 1, "page", "red")
    ahead(False)
    one.remove(KEY)
    assert nobody(ways_to_find(other, "page"))
    other.close()
    one.flush()
    assert one.tiers(KEY) == []
    assert told(folder, "page") == told(folder, "red") == []


def test_while_the_notes_cannot_be_read_those_read_last_count(two, folder, monkeypatch):
    one, other = two
    load(other, 1, "the old", "red")
    other.pin("the old")
    one.remove(KEY)
    one.flush()
    assert nobody(ways_to_find(other, "the old"))

    def held(self):
        raise IndexHeldError

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "notes", held)
        assert nobody(ways_to_find(other, "the old"))
        load(other, 1, "after", flush=False)
    other.flush()
    other.close()
    entry = one.one("after")
    assert (set(entry.names), entry.former, entry.tags, entry.pinned) == ({"after"}, (), (), False)
    assert told(folder, 'the old"') == []


def test_tags_are_told_to_a_file_that_another_process_has_written_again(two, folder):
    one, other = two
    load(one, 1, "page", "red")
    evict(one)
    load(other, 1)
    one.close()
    assert other.one(KEY).tags == ("red",)
    after = ContextRegistry(CPU, folder)
    assert [entry.key for entry in forget(after, "red").kept] == [KEY]
    after.close()


def test_a_name_that_another_process_took_is_not_written_again(two, folder):
    one, other = two
    load(other, 1, "xname"), load(other, 1, "yname")
    one.remove("xname")
    evict(one)
    load(other, 1, "zname")
    other.close(), one.flush()
    assert told(folder, "xname") == []
    assert set(one.one(KEY).names) == {"yname", "zname"}


def test_a_name_that_no_row_has_goes_with_its_context_though_that_is_loaded_again(two, folder):
    one, other = two
    load(one, 1, "page")
    evict(one)
    load(other, 1)
    other.remove(KEY)
    load(other, 1)
    other.flush()
    assert other.find("page") == one.find("page") == []
    assert told(folder, 'page"') == []


def test_tags_of_what_was_removed_take_no_room(two):
    one, other = two
    tag = "t" * 4000
    many = LARGEST_HOLDERS // len(tag) - 2
    for start in range(0, many, 200):
        load(other, 1, None, *(f"{i}{tag}"[:4000] for i in range(start, min(many, start + 200))))
    one.remove(KEY)
    more = replace(wanted(1), name=None, tags=tuple(f"{i}new{tag}"[:4000] for i in range(100)))
    assert other.with_room(more) == more


@pytest.mark.parametrize("way", ["remove", "remove name", "pin", "untag", "forget"])
def test_what_is_done_while_the_registry_closes_is_done_or_refused(two, way, monkeypatch):
    one, other = two
    load(one, 1, "page", "red"), load(one, 1, "other")
    usable = Backing.usable

    def closes(backing):
        tier = usable(backing)
        monkeypatch.undo()
        one.close()
        return tier

    monkeypatch.setattr(Backing, "usable", closes)
    doing = {
        "remove": lambda: one.remove(KEY),
        "remove name": lambda: one.remove("other"),
        "pin": lambda: one.pin(KEY),
        "untag": lambda: one.untag(KEY, "red"),
        "forget": lambda: forget(one, "red"),
    }
    was = [(set(e.names), e.tags, e.pinned) for e in other.find(KEY)]
    done = {
        "remove": [],
        "remove name": [({"page"}, ("red",), False)],
        "pin": [({"page", "other"}, ("red",), True)],
        "untag": [({"page", "other"}, (), False)],
        "forget": [({"page", "other"}, (), False)],
    }
    try:
        doing[way]()
    except StorageError:
        assert [(set(e.names), e.tags, e.pinned) for e in other.find(KEY)] == was
    else:
        assert [(set(e.names), e.tags, e.pinned) for e in other.find(KEY)] == done[way]


def test_what_is_read_before_its_row_is_written_is_deleted_as_well(two, monkeypatch):
    one, other = two
    load(one, 1, "page", "red")
    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "entry", lambda tier, key: None)
        answer(other, time.time())
    assert other.tiers(KEY) == ["device", "disk"]
    one.remove(KEY)
    assert nobody(ways_to_find(other, "page"))
    other.close()
    assert one.tiers(KEY) == []


def let_go(how, tag):
    return Naming(tag) if how == "by name" else lambda key, other: other == tag


@pytest.mark.parametrize("how", ["by name", "by a function"])
def test_what_is_in_memory_alone_is_forgotten(two, how):
    one, other = two
    load(one, 1, None, "red")
    load(other, 1, None, "blue")
    load(one, 2, None, "red", "green")
    evict(one)
    forgotten = one.forget(let_go(how, "red"))
    assert [entry.key for entry in forgotten.deleted] == [KEY]
    assert one.tiers(KEY) == []
    assert one.is_removed(KEY)
    assert [held.tags.keys() for held in one._memory.here(wanted(2).key)] == [{"green"}]
    assert "blue" in other.one(KEY).tags  # nobody has asked to delete that


def test_who_joins_holds_though_what_it_has_in_memory_is_older(two):
    one, other = two
    load(one, 1, None, "red"), load(other, 1, None, "blue")
    other.forget(Naming("red"))
    one.join(KEY, [])
    one.join(KEY, ["green"])
    one.flush()
    assert other.one(KEY).tags == ("blue", "green")
    assert other.forget(Naming("blue")).deleted == ()


def test_a_tag_that_is_left_does_not_come_back_when_another_process_ends(two):
    one, other = two
    load(one, 1, None, "red", "blue")
    answer(other, time.time())
    one.leave(KEY, ["red"])
    other.close()
    assert one.one(KEY).tags == ("blue",)
    assert one.leave(KEY, ["blue"])


def test_blanks_around_what_is_forgotten_matter_nowhere(two):
    one, other = two
    load(one, 1, None, "red", "blue")
    answer(other, time.time())
    one.forget(Naming(" red "))
    assert other.one(KEY).tags == ("blue",)


def test_what_another_process_has_stored_first_is_deleted_as_well(two, monkeypatch):
    one, other = two
    put = DiskTier.put

    def held(tier, *args, **kwargs):
        if tier is one._backing.tier:
            raise IndexHeldError
        return put(tier, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "put", held)
        load(one, 1, None, "red")
    load(other, 1, None, "blue")
    one.flush()
    other.remove(KEY)
    assert nobody(ways_to_find(one))
    one.close()
    assert other.tiers(KEY) == []


def test_who_leaves_with_a_closed_registry_is_told(two):
    one, other = two
    load(one, 1, None, "red")
    one.close()
    with pytest.raises(StorageError):
        one.leave(KEY, ["red"])
    assert other.one(KEY).tags == ("red",)


def test_a_context_that_nobody_deleted_keeps_its_name_when_the_notes_are_gone(two, monkeypatch):
    one, other = two
    monkeypatch.setattr("kvzip_memory.registry.forgotten._LIMIT", 3)
    load(one, 1, "old", "red")
    one.pin(KEY)
    for number in range(10, 20):
        load(other, number)
        other.remove(wanted(number).key)
    load(one, 1, None, "green")
    evict(one)
    entry = one.one(KEY)
    assert (set(entry.names), entry.pinned) == ({"old"}, True)
    assert not one.leave(KEY, ["green"])


def test_a_handle_is_as_old_as_what_was_loaded(tmp_path, monkeypatch):
    """Not as old as itself: another process may have deleted that in between."""
    engine = tiny_engine(cache_dir=tmp_path)
    context = engine.load(TEXT)
    assert context.storage.step.wanted.loaded == engine.registry.loaded(context.key)
    engine.close()
