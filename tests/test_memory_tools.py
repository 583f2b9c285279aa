"""The tools by which an agent loads documents and asks them."""

import re
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

import writers
from conftest import tiny_engine, tiny_tokenizer
from kvzip_memory import KVzipEngine
from langchain_kvzip import KVzipChatModel, create_memory_tools
from synthetic import processes


def test_an_agents_documents(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path / "cache")
    load, names, ask, forget = create_memory_tools(engine, max_tokens=5)
    assert [t.name for t in (load, names, ask, forget)] == ["load_document", "list_documents", "ask_document", "forget_document"]
    mine = engine.load("What the user has loaded. " * 9, name="private")
    assert names.invoke({}) == "no documents"
    assert "is kept" in load.invoke({"name": "page", "text": "A page. " * 9})
    assert re.fullmatch(r"page: \d+ tokens", names.invoke({}))
    assert ask.invoke({"name": "page", "question": "Who?"}) == engine.generate(engine.load("A page. " * 9), "Who?", max_new_tokens=5).text
    assert create_memory_tools(engine, namespace="else")[1].invoke({}) == "no documents"
    for tool in (ask, forget):
        assert "no document 'private'" in tool.invoke({"name": "private", "question": "Who?"})
    load.invoke({"name": "shared", "text": "Shared. " * 9})
    engine.load("Shared. " * 9, name="shared", tags="user")
    assert "is forgotten" in forget.invoke({"name": "shared"})
    assert engine.get("shared").receipt.tier == "device"  # type: ignore[union-attr]
    assert "is forgotten" in forget.invoke({"name": "page"})
    assert "no document 'page'" in ask.invoke({"name": "page", "question": "Who?"})
    assert engine.get("private").key == mine.key
    assert "empty" in load.invoke({"name": "nothing", "text": " "})
    assert "name is empty" in load.invoke({"name": " ", "text": "A page."})
    assert names.invoke({}) == "no documents"


@pytest.mark.parametrize("disk", [False, True])
def test_the_text_loaded_last_under_a_name_is_the_one(tmp_path: Path, disk: bool) -> None:
    engine = tiny_engine(cache_dir=tmp_path if disk else None)
    load, names, ask, forget = create_memory_tools(engine, max_tokens=5)
    one, two = "The first page. " * 9, "Another page. " * 12
    answers = {text: engine.generate(engine.load(text), "Who?", max_new_tokens=5).text for text in (one, two)}
    assert answers[one] != answers[two]
    for text in (one, two, one):
        load.invoke({"name": "page", "text": text})
        assert names.invoke({}) == f"page: {engine.load(text).n_tokens} tokens"
        assert ask.invoke({"name": "page", "question": "Who?"}) == answers[text]
    assert len(engine.registry.contexts()) == 1
    forget.invoke({"name": "page"})
    assert (names.invoke({}), engine.registry.contexts()) == ("no documents", [])


@pytest.mark.parametrize("disk", [False, True])
def test_names_of_one_text_are_apart(tmp_path: Path, disk: bool) -> None:
    engine, text = tiny_engine(cache_dir=tmp_path if disk else None), {"text": "A page. " * 9}
    load, names, _, forget = create_memory_tools(engine)
    other_load, other_names, _, other_forget = create_memory_tools(engine, namespace="agent:x")
    for name in ("x1", "x2"):
        load.invoke({"name": name, **text})
    other_load.invoke({"name": "y", **text})
    assert [line.split(":")[0] for line in names.invoke({}).splitlines()] == ["x1", "x2"]
    assert other_names.invoke({}).startswith("y: ")
    forget.invoke({"name": "x1"})
    assert names.invoke({}).startswith("x2: ")
    forget.invoke({"name": "x2"})
    assert names.invoke({}) == "no documents"
    if disk:  # another process sees the same
        engine.close()
        engine = tiny_engine(cache_dir=tmp_path)
        names, (_, other_names, _, other_forget) = create_memory_tools(engine)[1], create_memory_tools(engine, namespace="agent:x")
    assert names.invoke({}) == "no documents"
    assert other_names.invoke({}).startswith("y: ")
    other_forget.invoke({"name": "y"})
    assert engine.registry.contexts() == []


def test_an_agent_reads_files_of_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "page.txt").write_text("A page. " * 9)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    load, names, *_ = create_memory_tools(tiny_engine(), folder=folder)
    assert "is kept" in load.invoke({"path": "page.txt"})
    for path in ("../secret.txt", str(tmp_path / "secret.txt"), "link.txt", "nothing.txt"):
        assert "no file" in load.invoke({"path": path})
    assert names.invoke({}).startswith("page.txt: ")


def test_an_agent_calls_them(tmp_path: Path) -> None:
    llm = KVzipChatModel(engine=tiny_engine(), max_tokens=300)
    called = llm.bind_tools(create_memory_tools(llm.engine), tool_choice="list_documents").invoke("What is there?")
    assert called.tool_calls[0]["name"] == "list_documents"


def test_a_change_that_another_process_prevents_is_told_and_changes_nothing(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    load, names, _, forget = create_memory_tools(engine, max_tokens=5)
    load.invoke({"name": "page", "text": "A page. " * 9})
    engine.registry.flush()
    before = names.invoke({})
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        assert "try again when it is free" in load.invoke({"name": "page", "text": "Another page. " * 12})
        assert "try again when it is free" in forget.invoke({"name": "page"})
        assert names.invoke({}) == before
        assert len(engine.registry.contexts()) == 1
        holder.execute("ROLLBACK")
    assert "is forgotten" in forget.invoke({"name": "page"})
    engine.close()


def test_a_document_that_is_kept_outlives_its_process_and_others_of_its_name(tmp_path: Path) -> None:
    barrier, count = processes.Barrier(2), 10
    for after in (None, 1, 2, 3):  # how many exchanges it lives for
        together = barrier if after is None else None
        workers = [
            processes.Process(target=writers.keep_documents, args=(tmp_path, f"{who}{after}", count, together, after)) for who in ("a", "b")
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == (0 if after is None else -signal.SIGKILL)
        engine = KVzipEngine(writers.wide_model(), tiny_tokenizer(), cache_dir=tmp_path)
        listed = [line.split(":")[0] for line in create_memory_tools(engine)[1].invoke({}).splitlines()]
        assert listed == sorted(set(writers.acknowledged(tmp_path)))
        assert Counter(tag for entry in engine.registry.contexts() for tag in entry.tags) == dict.fromkeys(
            (f"memory:agent:{name}" for name in listed), 1
        )
        engine.close()
