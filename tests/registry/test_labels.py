"""What names mean, in the folder: what is remembered of files that were read is no older than they are."""

import os

import pytest

from kvzip_memory.registry.disk.names import Label, Names

HOUR_NS = 3600 * 10**9


def label(name, key="a", family="0"):
    return Label(name, None, family * 64, key * 64)


def give(names, *args):
    names.write(names.give(label(*args)))


def known(names):
    return sorted((label.name, label.key[0]) for label in names.all())


@pytest.fixture
def folder(tmp_path):
    for part in ("names", "locks"):
        (tmp_path / part).mkdir(mode=0o700)
    return tmp_path


def settle(folder):
    for path in (folder / "names").iterdir():
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - HOUR_NS))


def one(names, name):
    (found,) = names.of(None, name)
    return found


def given_again(names, name):
    """What a name meant until it was given again, to the same context."""
    before = one(names, name)
    give(Names(names._root), name)
    return before


CHANGES = {
    "a name more": (lambda names: give(names, "third"), [("first", "a"), ("second", "b"), ("third", "a")]),
    "another context": (lambda names: give(names, "first", "c"), [("first", "c"), ("second", "b")]),
    "another model": (lambda names: give(names, "first", "c", "1"), [("first", "a"), ("first", "c"), ("second", "b")]),
    "a name taken away": (lambda names: names.take(one(names, "first")), [("second", "b")]),
    "a name given again meanwhile": (lambda names: names.take(given_again(names, "first")), [("first", "a"), ("second", "b")]),
    "none": (lambda names: None, [("first", "a"), ("second", "b")]),
}


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_read_is_remembered_until_it_changes(folder, change, mine, settled):
    names = Names(folder)
    give(names, "first"), give(names, "second", "b")
    if settled:
        settle(folder)
    assert known(names) == [("first", "a"), ("second", "b")]
    act, then = CHANGES[change]
    act(names if mine else Names(folder))
    assert known(names) == then == known(Names(folder))


@pytest.mark.parametrize("given_by", ["this process", "another", "this process, not written"])
def test_all_names_of_some_contexts(folder, given_by):
    names = Names(folder)
    give(names, "second", "b"), give(names, "third", "c")
    if given_by == "this process, not written":
        names.give(label("first"))
    else:
        give(names if given_by == "this process" else Names(folder), "first")
    assert sorted((found.name, found.key[0]) for found in names.all()) == [("first", "a"), ("second", "b"), ("third", "c")]


def test_files_as_they_were_are_not_read_again(folder, monkeypatch):
    names = Names(folder)
    give(names, "first"), give(names, "second", "b")
    settle(folder)
    read, before = [], Names._read
    monkeypatch.setattr(Names, "_read", lambda self, file, strict=False: read.append(file) or before(self, file, strict))
    expected = known(names)
    assert len(read) == 2
    assert known(names) == expected
    assert len(read) == 2
    give(names, "third")
    read.clear()
    known(names), known(names)
    assert read == 2 * read[:1], "one that was just written may be written again without showing it"


def test_what_cannot_be_read_now_is_read_the_next_time(folder, monkeypatch):
    names = Names(folder)
    give(names, "first")
    settle(folder)
    with monkeypatch.context() as patch:
        patch.setattr("kvzip_memory.registry.disk.names.read_text", lambda path: (_ for _ in ()).throw(OSError("too many open files")))
        assert known(names) == []
    assert known(names) == [("first", "a")]
