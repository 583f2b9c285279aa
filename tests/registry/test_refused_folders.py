"""A ``cache_dir`` that was given and cannot be used: what is asked of what lies in it is refused, never told to be done."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from prometheus_client import CollectorRegistry

from conftest import tiny_engine
from kvzip_memory import KVzipEngine, StorageError
from kvzip_memory.metrics import export_metrics
from kvzip_memory.registry import Forgotten
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware, create_memory_tools
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipSynthesizer

SECRET = "the secret of a folder, long enough"

#: How a folder comes to be refused: what is done to it, and the secret of the engine that finds it so.
REFUSED: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "others can write it": (lambda folder: folder.chmod(0o777), None),
    "another secret": (lambda folder: None, SECRET),
    "another layout": (lambda folder: (folder / "contexts" / "FORMAT").write_text("99\n"), None),
    "closed": (lambda folder: None, None),
}

CHANGES: dict[str, Callable[[KVzipEngine, str], object]] = {
    "forget": lambda engine, key: engine.forget("red"),
    "registry.forget": lambda engine, key: engine.registry.forget(lambda key, tag: tag == "red"),
    "remove": lambda engine, key: engine.registry.remove(key),
    "pin": lambda engine, key: engine.registry.pin(key),
    "unpin": lambda engine, key: engine.registry.pin(key, pinned=False),
    "untag": lambda engine, key: engine.registry.untag(key, "red"),
    "gc": lambda engine, key: engine.registry.gc(),
    "check_changeable": lambda engine, key: engine.registry.check_changeable(),
    "check_disk": lambda engine, key: engine.registry.check_disk(),
    "middleware.forget": lambda engine, key: KVzipMemoryMiddleware().forget("ana", model=KVzipChatModel(engine=engine)),
    "synthesizer.forget": lambda engine, key: KVzipSynthesizer(llm=KVzipLLM(engine=engine)).forget("a"),
}


def refused(folder: Path, how: str) -> KVzipEngine:
    """An engine that has a context in memory, and a folder with the same one that it may not use."""
    engine = tiny_engine(cache_dir=folder)
    engine.load("A page. " * 9, tags="red")
    engine.close()
    spoil, secret = REFUSED[how]
    spoil(folder)
    engine = tiny_engine(cache_dir=folder, secret=secret)
    engine.load("A page. " * 9, tags="red")
    if how == "closed":
        engine.close()
    return engine


@pytest.fixture(params=REFUSED)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVzipEngine]:
    engine = refused(tmp_path / "cache", request.param)
    yield engine
    engine.close()


def state(engine: KVzipEngine) -> Any:
    assert engine.cache_dir is not None
    files = {path: path.read_bytes() for path in engine.cache_dir.rglob("*") if path.is_file() and path.suffix != ".lock"}
    return files, [(entry.key, entry.tags, entry.pinned) for entry in engine.registry.contexts()]


def test_what_could_not_be_changed_is_refused_and_all_is_as_it_was(engine: KVzipEngine) -> None:
    (entry,), before = engine.registry.contexts(), state(engine)
    for name, change in CHANGES.items():
        with pytest.raises(StorageError) as told:
            change(engine, entry.key)
        assert str(engine.registry.no_disk) in str(told.value), name
        assert "then make the engine again" in str(told.value), name
        assert state(engine) == before, name
    assert engine.generate(engine.get(entry.key), "Who?", max_new_tokens=2).receipt


def test_statistics_have_the_disk_and_say_why_it_is_not_used(engine: KVzipEngine) -> None:
    disk = engine.stats()["tiers"]["disk"]
    assert (disk["nbytes"], disk["contexts"], disk["unusable"]) == (0, 0, engine.registry.no_disk)
    registry = CollectorRegistry()
    export_metrics(engine, registry=registry)
    assert registry.get_sample_value("kvzip_tier_bytes", {"engine": "default", "tier": "disk"}) == 0


def test_without_a_folder_nothing_is_refused() -> None:
    engine = tiny_engine()
    key = engine.load("A page. " * 9, tags="red").key
    assert "disk" not in engine.stats()["tiers"]
    engine.registry.pin(key)
    engine.registry.pin(key, pinned=False)
    assert engine.registry.gc() == {}
    assert [entry.key for entry in engine.forget("red").deleted] == [key]
    assert engine.forget("red") == Forgotten((), ())


def test_an_agent_is_not_told_that_a_document_is_kept_or_forgotten(engine: KVzipEngine) -> None:
    load, _, _, forget = create_memory_tools(engine)
    before = state(engine)
    said = load.invoke({"name": "page", "text": "Another page. " * 9})
    assert "is kept" not in said
    assert "cannot be deleted or changed" in said
    assert state(engine) == before
    assert "is forgotten" not in forget.invoke({"name": "page"})


def test_an_agent_is_told_of_a_document_that_is_not_on_disk(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, disk_bytes=1000)
    load = create_memory_tools(engine)[0]
    assert "in memory only, until this process ends" in load.invoke({"name": "page", "text": "A page. " * 9})
    engine.close()


def test_an_index_keeps_a_document_that_could_not_be_forgotten(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path / "cache")
    index = KVzipIndex.from_documents([Document(text="A page. " * 9, id_="a")], llm=KVzipLLM(engine=engine))
    engine.close()
    with pytest.raises(StorageError, match="closed"):
        index.delete_ref_doc("a", delete_from_docstore=True)
    assert [*index.ref_doc_info] == ["a"]


def test_a_middleware_of_several_models_forgets_of_all_or_of_none(tmp_path: Path) -> None:
    sound, closed = (tiny_engine(cache_dir=tmp_path / name) for name in ("a", "b"))
    middleware = KVzipMemoryMiddleware()
    middleware._engines |= {sound, closed}
    context = sound.load("A page. " * 9, tags="thread: ana")
    closed.close()
    with pytest.raises(StorageError):
        middleware.forget("ana")
    assert sound.get(context.key).key == context.key
    sound.close()
