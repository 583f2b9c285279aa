"""What belongs to whoever loads a text, and not to the bytes that are shared: its name, its sources, and how old it may be."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from conftest import TEXT, tiny_engine
from kvzip_memory import CompressedContext, Document, InputError, KVzipEngine, StorageError
from kvzip_memory.cli import app
from kvzip_memory.registry.disk.names import Names

OLD, NEW, OTHER = TEXT, "New. " + TEXT, "Other. " + TEXT


def blob(folder: Path, context: CompressedContext) -> Path:
    return folder / "contexts" / "blobs" / context.key[:2] / f"{context.key}.safetensors"


def lose_index(folder: Path) -> None:
    for path in (folder / "contexts" / "index").iterdir():
        path.unlink()


def shrink_disk(folder: Path, old: CompressedContext) -> None:
    """Another process uses the older text and then has room for two."""
    engine = tiny_engine(cache_dir=folder, ratio=0.4)
    engine.get(old.key)
    engine.registry.flush()
    disk = engine.registry._backing.tier
    assert disk is not None
    disk._tidying.budget = disk.usage() + 10_000
    engine.load(OTHER)
    engine.close()


# -- a name is one context -----------------------------------------------------------------------------------------

# How the newest text of a name goes, given the folder, the older text and the newer one.
GOES: dict[str, Callable[[Path, CompressedContext, CompressedContext], Any]] = {
    "removed by its name": lambda folder, old, new: tiny_engine(cache_dir=folder).registry.remove("page"),
    "removed by its key": lambda folder, old, new: tiny_engine(cache_dir=folder).registry.remove(new.key),
    "removed by the command": lambda folder, old, new: CliRunner().invoke(app, ["rm", "page", "--cache-dir", str(folder)]),
    "evicted": lambda folder, old, new: shrink_disk(folder, old),
    "lost": lambda folder, old, new: blob(folder, new).unlink(),
}


@pytest.mark.parametrize("how", GOES)
def test_no_older_text_answers_for_a_name_whose_context_is_gone(tmp_path: Path, how: str) -> None:
    behind, engine = tiny_engine(cache_dir=tmp_path, ratio=0.4), tiny_engine(cache_dir=tmp_path, ratio=0.4)
    old = behind.load(OLD, name="page")  # and has it in memory under that name
    behind.close()
    behind.registry._backing.tier = tiny_engine(cache_dir=tmp_path).registry._backing.tier
    new = engine.load(NEW, name="page")
    assert new.key != old.key
    engine.close()
    GOES[how](tmp_path, old, new)
    assert not blob(tmp_path, new).exists()
    lookers = [behind, tiny_engine(cache_dir=tmp_path, ratio=0.4)]
    for engine in [*lookers, None]:
        if engine is None:  # the last one finds another index
            lose_index(tmp_path)
            engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
        with pytest.raises(InputError, match=f"no context 'page'.*{old.key[:12]}"):
            engine.get("page")
        assert engine.registry.find("page") == []
        assert engine.get(old.key).key == old.key
        assert {entry.key: (dict(entry.names), entry.former) for entry in engine.registry.contexts()}[old.key] == ({}, ("page",))
    listed = CliRunner().invoke(app, ["ls", "--cache-dir", str(tmp_path)], env={"COLUMNS": "200"})
    assert "was page" in listed.stdout
    assert engine.load(NEW, name="page").key == engine.get("page").key == new.key
    assert engine.load(OLD, name="page").key == engine.get("page").key == old.key
    engine.registry.flush()
    assert tiny_engine(cache_dir=tmp_path).get("page").key == old.key


def test_in_memory_alone_a_name_is_one_context_too() -> None:
    engine = tiny_engine(ratio=0.4)
    old, new = engine.load(OLD, name="page"), engine.load(NEW, name="page")
    assert (engine.get("page").key, [entry.former for entry in engine.registry.contexts()]) == (new.key, [(), ("page",)])
    engine.registry.remove("page")
    with pytest.raises(InputError, match="no context 'page'"):
        engine.get("page")
    engine.load(NEW, name="page")
    small = tiny_engine(ratio=0.4, device_bytes=round(2.5 * old.nbytes))
    for text, name in ((OLD, "page"), (NEW, "page"), (OLD, None), (OTHER, None)):  # the last pushes the second out
        small.load(text, name=name)
    with pytest.raises(InputError, match="no context 'page'"):
        small.get("page")
    assert small.registry._backing.names._new == {}  # nothing is kept of what is lost


@pytest.mark.parametrize("removed", [False, True])
def test_what_is_written_late_does_not_take_a_name_back(tmp_path: Path, removed: bool) -> None:
    slow, fast, go_on = tiny_engine(cache_dir=tmp_path, ratio=0.4), tiny_engine(cache_dir=tmp_path, ratio=0.4), threading.Event()
    slow.registry._writing.thread.submit(go_on.wait)
    slow.load(OLD, name="page")
    new = fast.load(NEW, name="page")
    fast.registry.flush()
    if removed:
        fast.registry.remove("page")
    go_on.set()
    slow.registry.flush()
    for engine in (slow, fast, tiny_engine(cache_dir=tmp_path)):
        assert [entry.key for entry in engine.registry.find("page")] == ([] if removed else [new.key])
    slow.close()
    fast.close()


@pytest.mark.parametrize("hours", [-2, 2])
@pytest.mark.parametrize("disk", [True, False])
def test_a_clock_that_is_put_does_not_bring_an_older_text_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int, disk: bool
) -> None:
    real, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + shift[0])
    engine = tiny_engine(cache_dir=tmp_path if disk else None, ratio=0.4)
    for text, at in ((OLD, 0), (NEW, hours), (OLD, 0), (NEW, -hours)):
        shift[0] = 3600.0 * at
        loaded = engine.load(text, name="page")
        assert engine.get("page").key == loaded.key
        engine.registry.flush()
        assert engine.get("page").key == loaded.key
        if disk:
            assert tiny_engine(cache_dir=tmp_path).get("page").key == loaded.key
    engine.close()


def test_a_name_is_of_one_context_for_each_model_and_tenant(tmp_path: Path) -> None:
    engines = [tiny_engine(cache_dir=tmp_path, ratio=0.4, tenant=tenant) for tenant in ("ann", "bob")]
    engines.append(tiny_engine("qwen2", cache_dir=tmp_path, ratio=0.4, tenant="ann"))
    contexts = [engine.load(f"{number} {TEXT}", name="page") for number, engine in enumerate(engines)]
    for engine in engines:
        engine.registry.flush()
    for engine, context in zip(engines, contexts, strict=True):
        assert engine.get("page").key == context.key
    engines[2].registry.remove(contexts[2].key)
    assert [engines[i].get("page").key for i in (0, 1)] == [contexts[0].key, contexts[1].key]
    with pytest.raises(InputError, match="1 of other models are"):
        engines[2].get("page")


def test_removing_says_what_was_removed_and_what_is_left(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    old, new = engine.load(OLD, name="page"), engine.load(NEW, name="page")
    engine.close()
    told = CliRunner().invoke(app, ["rm", "page", "--cache-dir", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    assert f"deleted page, {new.key[:12]}" in told
    assert f"{old.key[:12]}, which was page before, stays" in told


def test_a_name_that_was_taken_away_is_not_on_disk(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    engine.load(Document(TEXT, "ward.txt", {"patient": "Ottoline"}), name="case Ottoline")
    engine.registry.flush()
    names = tmp_path / "contexts" / "names"
    assert any("Ottoline" in path.read_text() for path in names.iterdir())
    engine.registry.remove("case Ottoline")
    assert not any("Ottoline" in path.read_text() for path in names.iterdir())
    engine.close()


def test_a_name_that_is_left_of_a_context_can_be_removed(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    first = engine.load(TEXT, name="lamp-7f3")
    engine.registry.flush()
    assert engine.registry._backing.tier is not None
    engine.registry._backing.tier.remove(first.key)  # as a full disk does
    engine.close()
    other = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    with pytest.raises(InputError, match="lamp-7f3"):
        other.registry.remove("lamp-7f3")
    assert not [path for path in tmp_path.rglob("*.json") if b"lamp-7f3" in path.read_bytes()]
    other.close()


def test_a_handle_has_the_name_it_was_got_by_whatever_others_load_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (tiny_engine(cache_dir=tmp_path, ratio=0.4) for _ in range(2))
    first = one.load(Document(text=TEXT, name="a.txt"), name="lamp")
    one.registry.flush()
    of, count = Names.of, list[str]()

    def then(names: Names, tenant: str | None, name: str) -> Any:
        labels = of(names, tenant, name)
        if names is one.registry._backing.names:
            count.append(name)
            if len(count) == 1:
                other.load(Document(text="Boat. " + TEXT, name="b.txt"), name="lamp")
                other.registry.flush()
        return labels

    monkeypatch.setattr(Names, "of", then)
    found = one.get("lamp")
    monkeypatch.undo()
    assert count
    told = (found.key, found.name, [source.name for source in found.sources])
    now = one.get("lamp")
    assert told in ((first.key, "lamp", ["a.txt"]), (now.key, "lamp", ["b.txt"]))
    assert now.key != first.key
    one.close()
    other.close()


def test_a_name_is_kept_when_it_cannot_be_removed_and_removed_at_the_next_try(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = engine.load(TEXT, name="lamp")
    engine.load(TEXT, name="buoy")
    engine.registry.flush()
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        for _ in range(2):
            with pytest.raises(StorageError, match="try again"):
                engine.registry.remove("lamp")
        holder.execute("ROLLBACK")
    with FileLock(tmp_path / "contexts" / "locks" / "names.lock", thread_local=False), pytest.raises(OSError, match="lock"):
        engine.registry.remove("lamp")
    assert engine.get("lamp").key == context.key
    engine.registry.remove("lamp")
    with pytest.raises(InputError, match="no context 'lamp'"):
        tiny_engine(cache_dir=tmp_path, ratio=0.4).get("lamp")
    assert engine.get("buoy").key == context.key
    engine.close()


@pytest.mark.parametrize("harm", ["cut", "changed", "linked", "empty"])
def test_a_damaged_name_means_nothing_and_is_written_anew(tmp_path: Path, harm: str) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = engine.load(TEXT, name="page")
    engine.registry.flush()
    (file,) = (tmp_path / "contexts" / "names").iterdir()
    text = file.read_text()
    if harm == "linked":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_text({"cut": text[:-9], "changed": text.replace(context.key, "0" * 64), "empty": ""}[harm])
    with pytest.raises(InputError, match="no context 'page'"):
        engine.get("page")
    engine.load(TEXT, name="page")
    engine.registry.flush()
    assert tiny_engine(cache_dir=tmp_path).get("page").key == context.key
    engine.close()


# -- sources -------------------------------------------------------------------------------------------------------

ANN, BOB = {"user": "ann-private"}, {"user": "bob-private"}


def told(context: CompressedContext) -> list[tuple[str, Any]]:
    return [(source.name, dict(source.metadata)) for source in context.sources]


def says(value: Any) -> bool:
    """Whether anything private is in a value, however deep."""
    return "private" in repr([value.name, value.sources, value.receipt, value.identity])


def both(engine: KVzipEngine, **options: Any) -> tuple[CompressedContext, CompressedContext]:
    """One text as two users' documents."""
    ann = engine.load(Document(TEXT, "ann-private.txt", ANN), name="ann", **options)
    bob = engine.load(Document(TEXT, "bob-private.txt", BOB), name="bob", **options)
    assert ann.key == bob.key
    return ann, bob


@pytest.mark.parametrize("disk", [True, False])
def test_everybody_has_the_sources_that_they_loaded(tmp_path: Path, disk: bool) -> None:
    engine = tiny_engine(cache_dir=tmp_path if disk else None, ratio=0.4)
    ann, bob = both(engine)
    assert (told(ann), told(bob)) == ([("ann-private.txt", ANN)], [("bob-private.txt", BOB)])
    again = engine.load(TEXT)
    assert told(again) == [("document 1", {})]
    places = [(source.start, source.end) for source in ann.sources]

    def check(engine: KVzipEngine) -> None:
        assert told(engine.get("ann")) == told(ann)
        assert told(engine.get("bob")) == told(bob)
        for shared in (engine.get(ann.key), engine.stored_prefix([*ann.token_ids.tolist(), 5])):
            assert shared is not None
            assert told(shared) == [("document 1", {})]
            assert not says(shared)
            assert [(source.start, source.end) for source in shared.sources] == places

    check(engine)
    if not disk:
        return
    engine.close()
    check(tiny_engine(cache_dir=tmp_path, ratio=0.4))
    lose_index(tmp_path)
    check(tiny_engine(cache_dir=tmp_path, ratio=0.4))
    assert b"private" not in blob(tmp_path, ann).read_bytes()


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
@pytest.mark.parametrize("how", ["load", "get"])
def test_what_is_done_to_a_handles_metadata_is_nobody_elses(tmp_path: Path, how: str, disk: bool) -> None:
    engine = tiny_engine(**({"cache_dir": tmp_path} if disk else {}))
    mine, odd = {"who": {"names": ["Ana"]}}, {(1, 2): {3}, "who": "Bob"}
    loaded = engine.load(Document(TEXT, "page", mine), name="page")
    handle = loaded if how == "load" else engine.get("page")
    handle.sources[0].metadata["who"]["names"].append("Bob")
    handle.sources[0].metadata.update(odd)
    mine["who"]["names"].append("Cy")
    assert told(engine.get("page")) == [("page", {"who": {"names": ["Ana"]}})]
    engine.close()
    if disk:
        assert told(tiny_engine(cache_dir=tmp_path).get("page")) == [("page", {"who": {"names": ["Ana"]}})]


def test_sources_follow_a_text_that_grows_is_cut_folded_and_saved(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path / "cache", ratio=0.6, refit="none")
    ann, bob = both(engine)
    session = engine.session(bob)
    session.ask("Who?", max_new_tokens=2)
    made = {
        "cut": engine.load(Document(TEXT, "bob-private.txt", BOB), ratio=0.3, name="cut"),
        "more turns": engine.extend(bob, [{"role": "user", "content": "Thanks."}], name="more turns"),
        "more documents": engine.extend(bob, Document("A boat.", "boat", {"of": "bob-private"}), name="more documents"),
        "folded": session.fold(0, name="folded"),
    }
    assert made["cut"].receipt.shrunk_from == 0.6  # type: ignore[union-attr]
    shared = {name: [("document 1", {})] for name in made} | {"more documents": [("document 1", {}), ("boat", {})]}
    own = {name: [("bob-private.txt", BOB)] for name in made}
    own["more documents"] = [("bob-private.txt", BOB), ("boat", {"of": "bob-private"})]
    engine.registry.flush()
    for reader in (engine, tiny_engine(cache_dir=tmp_path / "cache", ratio=0.6)):
        for name, context in made.items():
            if "disk" not in engine.registry.tiers(context.key) and reader is not engine:
                assert name == "cut"  # which is in memory alone
                continue
            assert told(context) == told(reader.get(name)) == own[name], name
            assert told(reader.get(context.key)) == shared[name], name
            assert not says(reader.get(context.key))
    for file in (tmp_path / "cache" / "contexts" / "blobs").rglob("*.safetensors"):
        assert b"private" not in file.read_bytes()
    assert told(engine.open(ann.save(tmp_path / "ann.safetensors"))) == told(ann)
    grown = engine.extend(engine.open(tmp_path / "ann.safetensors"), [{"role": "user", "content": "More."}])
    assert told(grown) == told(ann)
    assert not says(engine.get(grown.key))


def test_a_context_that_only_a_handle_keeps_is_found_by_its_key_without_what_is_private() -> None:
    engine = tiny_engine(ratio=0.4)
    ann, bob = both(engine)
    key = ann.key
    engine.registry.remove("ann")
    engine.registry.remove("bob")
    engine.registry.readmit(key)
    found = engine.get(key)
    assert not says(found)
    del ann, bob
    assert engine.get(key).key == key  # it is still held, by what was found


def test_names_in_the_text_itself_are_everybodys(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    context = engine.load([Document(TEXT, "a.txt", ANN), Document("A boat.", None, BOB)])
    engine.registry.flush()
    for reader in (engine, tiny_engine(cache_dir=tmp_path)):
        assert told(reader.get(context.key)) == [("a.txt", {}), ("document 2", {})]
    engine.close()


# -- age -----------------------------------------------------------------------------------------------------------


class Clock:
    """Hours since now, to be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hours = 0.0
        began = time.time()
        monkeypatch.setattr(time, "time", lambda: began + 3600 * self.hours)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def moved(engine: KVzipEngine, context: CompressedContext) -> CompressedContext:
    """A context that was pushed out to disk and came back."""
    engine.registry.flush()
    engine.registry._memory.device.budget = context.nbytes
    engine.load(OTHER[: len(TEXT)])
    assert engine.registry.tiers(context.key) == ["disk"]
    engine.get(context.key)
    return context


def folded(engine: KVzipEngine, context: CompressedContext) -> CompressedContext:
    session = engine.session(context)
    session.ask("Who?", max_new_tokens=2)
    return session.fold(0)


MADE: dict[str, Callable[[KVzipEngine, CompressedContext], CompressedContext]] = {
    "as it is": lambda engine, context: context,
    "moved": moved,
    "cut": lambda engine, context: engine.load(TEXT, ratio=0.2),
    "grown": lambda engine, context: engine.extend(context, [{"role": "user", "content": "Thanks."}]),
    "folded": folded,
}


@pytest.mark.parametrize("way", MADE)
@pytest.mark.parametrize("with_ttl", [True, False])
def test_a_context_is_as_old_as_the_reading_of_its_text(tmp_path: Path, clock: Clock, way: str, with_ttl: bool) -> None:
    """Whoever stores it, and whatever is made of it."""
    writer = tiny_engine(cache_dir=tmp_path, ratio=0.6, refit="none")
    writer.load(TEXT)
    writer.close()
    clock.hours = 0.7
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.6, refit="none", ttl=3600 if with_ttl else None)
    context = engine.load(TEXT)
    assert context.receipt.tier == "disk"  # type: ignore[union-attr]
    made = MADE[way](engine, context)
    engine.close()
    clock.hours = 1.2
    readers = [tiny_engine(cache_dir=tmp_path, ratio=0.6, refit="none", ttl=3600)] + ([engine] if with_ttl else [])
    for reader in readers:
        with pytest.raises(InputError, match="stored"):
            reader.get(made.key)
        assert reader.stored_prefix([*made.token_ids.tolist(), 5], 0.1) is None
    reader = readers[0]
    assert reader.load(TEXT).receipt.tier == "built"  # type: ignore[union-attr]
    assert engine.generate(made, "Who?", max_new_tokens=1).receipt.tier == ("built" if with_ttl else "device")
    reader.close()


def test_an_engine_without_a_ttl_keeps_to_that_of_whoever_stored(tmp_path: Path, clock: Clock) -> None:
    writer, engine = (tiny_engine(cache_dir=tmp_path, ratio=0.6, refit="none", ttl=ttl) for ttl in (3600, None))
    writer.load(TEXT)
    writer.registry.flush()
    cut = engine.load(TEXT, ratio=0.3)
    assert cut.receipt.shrunk_from == 0.6  # type: ignore[union-attr]
    clock.hours = 1.1
    for ratio in (0.3, 0.6):
        assert engine.load(TEXT, ratio=ratio).receipt.tier == "built"  # type: ignore[union-attr]


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_is_put_makes_no_context_last(tmp_path: Path, clock: Clock, hours: int) -> None:
    clock.hours = hours
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.6, ttl=3600)
    engine.load(TEXT)
    engine.registry.flush()
    clock.hours = 0
    assert engine.load(TEXT).receipt.tier == "built"  # type: ignore[union-attr]
    assert engine.load(TEXT).receipt.tier == "device"  # type: ignore[union-attr]
    engine.close()


def test_answers_that_go_on_keep_no_old_context_for_others(clock: Clock) -> None:
    engine = tiny_engine(ratio=0.6, ttl=3600)
    context = engine.load(TEXT)
    with context.lease():
        clock.hours = 1.1
        assert engine.load(TEXT).receipt.tier == "built"  # type: ignore[union-attr]
        assert engine.stats()["tiers"]["device"]["nbytes"] == 2 * context.nbytes
        with context.lease() as lease:
            assert lease.receipt.tier == "device"
    assert engine.stats()["tiers"]["device"]["nbytes"] == context.nbytes


def test_the_age_is_in_the_file_where_no_index_is_needed(tmp_path: Path, clock: Clock) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.6)
    key = engine.load(TEXT).key
    engine.close()
    clock.hours = 0.9
    lose_index(tmp_path)
    os.utime(next((tmp_path / "contexts" / "blobs").rglob("*.safetensors")))
    later = tiny_engine(cache_dir=tmp_path, ratio=0.6, ttl=3600)
    (entry,) = later.registry.contexts()
    assert time.time() - entry.created == pytest.approx(0.9 * 3600, abs=60)
    assert later.get(key).created == entry.created


@pytest.mark.parametrize("name", ["", "A" * 64, "aB" * 32, "0" * 64])
def test_no_way_in_takes_an_empty_name_or_one_of_the_form_of_a_key(name: str, tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    context = engine.load("A page. " * 9)
    session = engine.session(context)
    session.ask("Who?", max_new_tokens=2)
    ways: dict[str, Callable[[], object]] = {
        "load": lambda: engine.load("Another page. " * 9, name=name),
        "load, found": lambda: engine.load("A page. " * 9, name=name),
        "extend": lambda: engine.extend(context, "More. " * 9, name=name),
        "join": lambda: engine.join([context, context], name=name),
        "fold": lambda: session.fold(keep=0, name=name),
    }
    for way, give in ways.items():
        with pytest.raises(InputError, match="the form of a key" if name else "the name is empty; give a text, or None for none"):
            give()
        assert [entry.key for entry in engine.registry.contexts()] == [context.key], way
    engine.close()


@pytest.mark.parametrize("tenant", ["", "-"])
def test_no_tenant_is_called_by_what_stands_for_none(tenant: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give None for none"):
        tiny_engine(cache_dir=tmp_path, tenant=tenant)
    with pytest.raises(InputError, match="give None for none"):
        KVzipEngine.from_pretrained(tmp_path / "no model", tenant=tenant)


def test_what_is_not_seen_is_told(tmp_path: Path) -> None:
    tiny_engine(cache_dir=tmp_path).load(TEXT, name="page")
    engine = tiny_engine(cache_dir=tmp_path)
    engine.close()
    with pytest.raises(InputError, match=r"'page'.* only what is in memory is seen: the registry was closed"):
        engine.get("page")
    with pytest.raises(InputError, match=r"'page'.* only what is in memory is seen: no cache_dir was given"):
        tiny_engine().get("page")
