"""The tools by which an agent loads documents and asks them."""

import os
import re
import signal
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

import writers
from conftest import tiny_engine, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.errors import StorageError
from langchain_kvzip import KVzipChatModel, create_memory_tools
from langchain_kvzip.folders import read_below
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
    load.invoke({"name": "other", "text": "Another. " * 9})
    both = engine.join([engine.load(text) for text in ("Another. " * 9, "A page. " * 9)])
    said = engine.generate(both, "Who?", max_new_tokens=5).text
    assert ask.invoke({"name": ["other", "page"], "question": "Who?"}) == said
    assert "no name is given" in ask.invoke({"name": [], "question": "Who?"})
    assert "no document 'private'" in ask.invoke({"name": ["page", "private"], "question": "Who?"})
    assert "is forgotten" in forget.invoke({"name": "other"})  # and what was joined with it
    assert [entry.tags for entry in engine.registry.contexts()] == [("memory:agent:page",), ()]
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


HOSTILE = {
    "nul": "a\0b",
    "long": "x" * 100_000,
    "a long part": "a/" + "x" * 300,
    "deep": "a/" * 5_000 + "b",
    "half a pair": "x\ud83d",
    "lines": "a\nb\r\x1b[2J",
    "up": "../secret.txt",
    "down and up": "inner/../page.txt",
    "here": ".",
    "nothing": "",
    "slashes": "//page.txt",
    "backslashes": "..\\secret.txt",
    "folder": "inner",
    "loop": "loop",
    "loops": "loop/loop/page.txt",
    "link": "link.txt",
    "linked folder": "linked/secret.txt",
    "pipe": "pipe",
    "file as folder": "page.txt/page.txt",
    "not ours to read": "locked.txt",
    "bytes": "bytes.bin",
}


def hostile_folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("A secret. " * 9)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "page.txt").write_text("A page. " * 9)
    (folder / "inner" / "page.txt").write_text("An inner page. " * 9)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    (folder / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "locked.txt").write_text("locked")
    (folder / "locked.txt").chmod(0)
    return folder


@pytest.mark.parametrize("hostile", HOSTILE)
def test_whatever_an_agent_says_is_answered_without_a_path(hostile: str, tmp_path: Path) -> None:
    engine, name = tiny_engine(cache_dir=tmp_path / "cache"), HOSTILE[hostile]
    files = create_memory_tools(engine, folder=hostile_folder(tmp_path))
    texts = create_memory_tools(engine, namespace="texts", max_tokens=2)
    told = [files[0].invoke({"path": name})]
    if hostile != "not ours to read" or os.getuid():  # root reads everything
        assert "is kept" not in told[0]
    told += [tool.invoke({"name": name, "question": name, "text": name}) for tool in (*texts[:1], *texts[2:], *texts[:1])]
    told += [files[0].invoke({"path": "inner/page.txt"}), files[1].invoke({}), texts[1].invoke({})]
    assert "is kept" in told[-3]
    assert [line for line in told if str(tmp_path) in line or tmp_path.name in line] == []
    assert [tag for entry in engine.registry.contexts() for tag in entry.tags if "secret" in tag and "secret" not in name] == []


def test_arguments_of_other_types_are_told(engine: KVzipEngine) -> None:
    for tool in create_memory_tools(engine):
        for given in ({"name": 5}, {"name": None, "text": ["x"], "question": {}}, {"path": 1}):
            assert isinstance(tool.invoke(given), str)


def test_what_goes_wrong_on_disk_is_told_without_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    tools = create_memory_tools(engine, max_tokens=2)
    tools[0].invoke({"name": "page", "text": "A page. " * 9})
    raised: list[Exception] = [
        PermissionError(13, "Permission denied", str(tmp_path / "contexts")),
        OSError(f"cannot write {tmp_path / 'contexts'}"),
        StorageError(f"the index in {tmp_path / 'contexts'} is held; try again"),
        InputError(f"cannot read {str(Path('/srv/else/page.txt'))!r} as text"),
    ]
    for error in raised:

        def fails(*args: object, error: Exception = error, **given: object) -> None:
            raise error

        for name in ("contexts", "forget", "flush"):
            monkeypatch.setattr(engine.registry, name, fails)
        told = [tool.invoke({"name": "page", "text": "B page. " * 9, "question": "Who?"}) for tool in tools]
        assert not [text for text in told if str(tmp_path) in text or "/srv" in text]
        assert len([text for text in told if "denied" in text or "cannot" in text or "try again" in text]) == 4, told
        monkeypatch.undo()


def test_a_file_that_is_changed_for_a_link_meanwhile_is_not_read(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "elsewhere"
    for place, text in ((folder / "a" / "b", "A page."), (secret / "b", "secret")):
        place.mkdir(parents=True)
        (place / "page.txt").write_text(text)
    over, read = threading.Event(), set[bytes | None]()

    def swap() -> None:
        while not over.is_set():
            (folder / "a").rename(folder / "kept")
            (folder / "a").symlink_to(secret)
            (folder / "a").unlink()
            (folder / "kept").rename(folder / "a")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(100_000):
            read.add(read_below(folder, "a/b/page.txt"))
            if number > 3000 and b"A page." in read:
                break
    finally:
        over.set()
        thread.join()
    assert read <= {None, b"A page."}
    assert b"A page." in read


@pytest.mark.parametrize("text", ["my password is 8306", "page.txt"])
def test_a_text_that_is_a_files_name_is_in_no_log(
    text: str, tmp_path: Path, engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).write_text("A page.")
    with caplog.at_level("DEBUG"):
        create_memory_tools(engine)[0].invoke({"name": "a", "text": text})
        assert "of that name" not in caplog.text  # whoever may ask a model learns nothing of files either
        engine.load(text)
        engine.load([text, "More."])
    assert caplog.text.count("there is a file of that name") == 2
    assert text not in caplog.text


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
