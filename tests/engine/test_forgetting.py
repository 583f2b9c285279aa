"""What was forgotten is nowhere in the folder: neither text, ids nor pairs, whichever way it came in and whatever happened to it."""

import ast
import asyncio
import gc
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core import Document, StorageContext
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from typer.testing import CliRunner

import kvzip_memory
from conftest import TEXT, tiny_engine
from kvzip_memory import BudgetError, CompressedContext, InputError, KVzipEngine, StorageError
from kvzip_memory.cli import app
from kvzip_memory.prompting import encoding as encoder
from kvzip_memory.registry.disk import leaving
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.disk.tidying import Tidying
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.holders import document_tag, thread_tag
from kvzip_memory.turns import sessions
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware, create_memory_tools
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipSynthesizer

SECRET = "Zwölf Hüte liegen im Turm, sagt Ana."
FILLER = "The lamp turns all night long. " * 14
WHO = "ana-7f3"


def traces(engine: KVzipEngine, texts: list[str]) -> dict[str, bytes]:
    """Bytes by which a text could be found: in encodings, and as ids of several widths."""
    found: dict[str, bytes] = {}
    for text in texts:
        for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "latin-1"):
            found[f"{text} {encoding}"] = text.encode(encoding)
        found[f"{text} json"] = json.dumps(text)[1:-1].encode()
        found[f"{text} json twice"] = json.dumps(json.dumps(text)[1:-1])[1:-1].encode()
        found[f"{text} hex"] = text.encode().hex().encode()
        ids = engine.tokenizer(text, add_special_tokens=False).input_ids
        for kind in ("<i4", "<i8", "<i2", ">i4"):
            found[f"{text} ids {kind}"] = np.array(ids, dtype=kind).tobytes()
        found[f"{text} ids json"] = ", ".join(map(str, ids)).encode()
    return found


def pairs(engine: KVzipEngine) -> dict[str, bytes]:
    """A key and a value of the secret in every layer of all contexts."""
    ids = np.array(engine.tokenizer(SECRET, add_special_tokens=False).input_ids, dtype=np.int32).tobytes()
    found = {}
    for entry in engine.registry.contexts():
        context = engine.get(entry.key)
        start = context.token_ids.numpy().tobytes().find(ids) // 4
        if start >= 0:
            with context.lease() as lease:
                for number, layer in enumerate(lease.layers):
                    rows = ((layer.positions >= start) & (layer.positions < start + len(ids) // 4)).nonzero()
                    for kind, tensor in (("keys", layer.keys), ("values", layer.values)) if len(rows) else ():
                        found[f"{entry.key[:8]} {kind} {number}"] = tensor[rows[0, 0]].cpu().numpy().tobytes()
    return found


def grep(folder: Path, wanted: dict[str, bytes]) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        found += [f"{wanted} in {path.name}" for name in wanted if name in str(path)]
        if path.is_file():
            content = path.read_bytes()
            found += [f"{name} in {path.relative_to(folder)}" for name, trace in wanted.items() if trace in content]
    return found


def remembered(engine: KVzipEngine) -> list[str]:
    """Texts whose ids an engine remembers."""
    held = gc.get_referents(engine._speech.now.prompts._encoder._remembered)
    return [text for rows in held if isinstance(rows, dict) for text in rows if isinstance(text, str)]


Way = Callable[[KVzipEngine], Callable[[], object]]
WAYS: dict[str, Way] = {}


def way(function: Way) -> Way:
    WAYS[function.__name__] = function
    return function


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for text in texts for role in ("user", "assistant")]


@way
def load(engine: KVzipEngine) -> Callable[[], object]:
    engine.load(f"{FILLER}{SECRET}", tags=WHO)
    return lambda: engine.forget(WHO)


@way
def load_of_two_ratios(engine: KVzipEngine) -> Callable[[], object]:
    for ratio in (0.8, 0.4):
        engine.load(f"{FILLER}{SECRET}", ratio=ratio, tags=[WHO, "red"] if ratio > 0.5 else WHO)
    return lambda: (engine.forget(WHO), engine.forget("red"))


@way
def extend(engine: KVzipEngine) -> Callable[[], object]:
    context = engine.load(turns(FILLER, SECRET), tags=WHO)
    for more in ("Well.", "And then?", "So it is."):
        context = engine.extend(context, turns(more), tags=WHO)
    return lambda: engine.forget(WHO)


@way
def fold(engine: KVzipEngine) -> Callable[[], object]:
    session = engine.session()
    for question in (FILLER, SECRET, "And?"):
        session.ask(question, max_new_tokens=4)
        session.fold(keep=0, tags=WHO)
    return lambda: engine.forget(WHO)


def agent_of(engine: KVzipEngine, *middleware: Any, **options: Any) -> Any:
    llm = KVzipChatModel(engine=engine, max_tokens=4, ratio=0.5)
    return create_agent(llm, tools=[], middleware=middleware, checkpointer=InMemorySaver(), **options)


@way
def middleware(engine: KVzipEngine) -> Callable[[], object]:
    memory = KVzipMemoryMiddleware(trigger=("messages", 4), keep=("messages", 2))
    agent = agent_of(engine, memory, system_prompt="You keep a lamp.")
    thread = {"configurable": {"thread_id": WHO}}
    for text in (SECRET, *"abcdef"):
        agent.invoke({"messages": [("user", text)]}, thread)
    agent.checkpointer.delete_thread(WHO)
    return lambda: memory.forget(WHO)


@way
def middleware_without_a_thread(engine: KVzipEngine) -> Callable[[], object]:
    memory = KVzipMemoryMiddleware(trigger=("messages", 4), keep=("messages", 2))
    llm = KVzipChatModel(engine=engine, max_tokens=4, ratio=0.5)
    create_agent(llm, tools=[], middleware=[memory]).invoke({"messages": turns(SECRET, "a", "b", "c")[:-1]})
    return lambda: memory.forget("")


def marked(text: str) -> HumanMessage:
    return HumanMessage([{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}])


@way
def marks(engine: KVzipEngine) -> Callable[[], object]:
    agent = agent_of(engine)
    for text in (f"{FILLER}{SECRET}", FILLER, FILLER):
        agent.invoke({"messages": [marked(text)]}, {"configurable": {"thread_id": WHO}})
    return lambda: engine.forget(f"thread: {WHO}")


@way
def marks_of_one_call(engine: KVzipEngine) -> Callable[[], object]:
    llm = KVzipChatModel(engine=engine, max_tokens=4, ratio=0.5)
    asyncio.run(llm.ainvoke([marked(f"{FILLER}{SECRET}")], {"metadata": {"thread_id": WHO}}))
    return lambda: engine.forget(f"thread: {WHO}")


@way
def memory_block(engine: KVzipEngine) -> Callable[[], object]:
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine, ratio=0.5, max_tokens=4))
    for text in (SECRET, "Well.", "So."):
        said = [ChatMessage(t["content"], role=t["role"], additional_kwargs={"session_id": WHO}) for t in turns(text)]
        asyncio.run(block.aput(said, from_short_term_memory=True, session_id=WHO))
    return lambda: block.forget(WHO)


@way
def memory_block_by_its_tag(engine: KVzipEngine) -> Callable[[], object]:
    memory_block(engine)
    return lambda: engine.forget(f"memory history: {WHO}")


@way
def synthesizer(engine: KVzipEngine) -> Callable[[], object]:
    llm = KVzipLLM(engine=engine, ratio=0.5, max_tokens=4)
    synthesizer = KVzipSynthesizer(llm)
    for ids in ((WHO,), (WHO, "other"), ("other", WHO, "third")):
        nodes = [TextNode(text=SECRET if id_ == WHO else f"Text of {id_}.", id_=id_) for id_ in ids]
        synthesizer.synthesize("Who?", [NodeWithScore(node=node, score=1.0) for node in nodes])
    return lambda: synthesizer.forget(WHO)


@way
def index(engine: KVzipEngine) -> Callable[[], object]:
    llm = KVzipLLM(engine=engine, ratio=0.5, max_tokens=4)
    documents = [Document(text=f"{FILLER}{SECRET}", doc_id=WHO), Document(text="The boat is green. " * 3, doc_id="boat")]
    for _ in range(3):  # as many starts of the program
        index = KVzipIndex.from_documents(documents, llm=llm)
        engine.shared.pop("llama_index.indexes")
    engine.shared["llama_index.indexes"] = {index}
    index.as_query_engine().query("Who?")
    return lambda: index.forget(WHO)


@way
def index_that_is_updated(engine: KVzipEngine) -> Callable[[], object]:
    llm = KVzipLLM(engine=engine, ratio=0.5, max_tokens=4)
    index = KVzipIndex.from_documents([Document(text=f"{FILLER}{SECRET}", doc_id="page"), Document(text="Boat.", doc_id="boat")], llm=llm)
    return lambda: index.update_ref_doc(Document(text=FILLER, doc_id="page"))


@way
def memory_tools(engine: KVzipEngine) -> Callable[[], object]:
    load_document, _, _, forget_document = create_memory_tools(engine, namespace="agent")
    load_document.invoke({"name": WHO, "text": f"{FILLER}{SECRET}"})
    return lambda: forget_document.invoke({"name": WHO})


def test_a_text_that_is_deleted_as_it_has_expired_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_LONG", 16)
    monkeypatch.setattr(encoder, "_REMEMBERED", 1000)
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5, ttl=60)
    engine.load(f"{FILLER}{SECRET}", name="page")
    engine.registry.flush()
    assert any(SECRET in text for text in remembered(engine))
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert engine.registry.gc()["expired"] == 1
    assert not any(SECRET in text for text in remembered(engine))
    engine.close()


@pytest.fixture(params=WAYS)
def filled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[KVzipEngine, Callable[[], object], dict[str, bytes]]]:
    """An engine that has read the secret in one way, and something else; how to forget it; and what must not be found then."""
    monkeypatch.setattr(encoder, "_LONG", 16)  # shorter texts are not remembered
    monkeypatch.setattr(encoder, "_REMEMBERED", 1000)
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    engine.load(TEXT, name="page")
    forget = WAYS[request.param](engine)
    engine.registry.flush()
    wanted = {**traces(engine, [SECRET, WHO]), **pairs(engine)}
    for entry in engine.registry.contexts():
        if entry.name != "page":
            facts = {entry.key, entry.group, entry.identity["text"], entry.identity["tokens"], entry.identity["tokens"][:8]}
            wanted |= {fact: fact.encode() for fact in facts - {""}}
    assert any("keys" in name for name in wanted)
    assert any("ids <i4" in name for name in grep(tmp_path, wanted))
    assert any("values" in name for name in grep(tmp_path, wanted))
    leaves = request.param in ("middleware", "memory_tools")  # contexts behind, and forgets as it goes
    assert leaves or any(SECRET in text for text in remembered(engine))
    yield engine, forget, wanted
    engine.close()


def test_nothing_of_it_is_in_the_folder_whichever_way_it_came_in(
    filled: tuple[KVzipEngine, Callable[[], object], dict[str, bytes]], tmp_path: Path
) -> None:
    engine, forget, wanted = filled
    forget()
    assert not any(SECRET in text for text in remembered(engine))
    assert grep(tmp_path, wanted) == []
    engine.close()
    assert grep(tmp_path, wanted) == []
    assert tiny_engine(cache_dir=tmp_path).get("page").n_tokens > 200
    assert all(WHO not in tag for entry in engine.registry.contexts() for tag in entry.tags)


def calls() -> Iterator[tuple[str, ast.Call]]:
    """All calls, outside of the engine, by which something becomes a context."""
    root = Path(kvzip_memory.__file__).parent
    for path in [*root.rglob("*.py"), *(root.parent / "integrations").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            making = ("load", "aload", "extend", "aextend", "join", "ajoin", "load_marked")
            of = ast.unparse(node.func.value)
            if "engine" in of and "registry" not in of and node.func.attr in making:
                yield f"{path.name}:{node.lineno}", node


def test_whoever_makes_a_context_tags_it() -> None:
    found = dict(calls())
    assert len(found) > 8
    untagged = [where for where, call in found.items() if not {"tags", "store", None} & {keyword.arg for keyword in call.keywords}]
    assert [where.partition(":")[0] for where in untagged] == ["llm.py"]  # marks of LlamaIndex' model, which knows no session


def test_what_others_hold_stays_until_the_last_of_them_forgets_it(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    contexts = [engine.load(f"{FILLER}{SECRET}", tags=tag) for tag in (WHO, "bob", "document: a | document: b", "cache_control")]
    assert len({context.key for context in contexts}) == 1
    for tag in (WHO, "document: b", "nobody's"):
        forgotten = engine.forget(tag)
        assert (len(forgotten.deleted), len(forgotten.kept)) == (0, tag != "nobody's")
    engine.registry.flush()
    assert [entry.tags for entry in engine.registry.contexts()] == [("bob", "cache_control")]
    assert grep(tmp_path, traces(engine, [WHO, "document: a"])) == []
    assert engine.registry.verify(contexts[0].key) is None
    assert engine.generate(contexts[0], "Who?", max_new_tokens=2).receipt.tier == "device"
    engine.close()
    later = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    assert later.load(f"{FILLER}{SECRET}").receipt.tier == "disk"
    assert later.registry.stats()["tiers"]["disk"]["nbytes"] == later.registry._backing.tier.measured()
    assert len(later.forget("bob").deleted) == 1
    assert grep(tmp_path, traces(engine, [SECRET])) == []
    assert later.load(f"{FILLER}{SECRET}").receipt.tier == "built"
    later.close()


@pytest.mark.parametrize("how", ["name", "pin"])
def test_a_name_and_a_pin_hold_too(tmp_path: Path, how: str) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    key = engine.load(f"{FILLER}{SECRET}", name="mine" if how == "name" else None, tags="ana").key
    if how == "pin":
        engine.registry.pin(key)
    assert len(engine.forget("ana").kept) == 1
    assert engine.get(key).key == key
    engine.registry.pin(key, False)
    engine.close()


def test_two_sessions_of_equal_turns_are_forgotten_one_by_one(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine, ratio=0.5, max_tokens=4))
    for who in ("ana", "bob"):
        said = [ChatMessage(t["content"], role=t["role"], additional_kwargs={"session_id": who}) for t in turns(SECRET)]
        asyncio.run(block.aput(said, from_short_term_memory=True, session_id=who))
    engine.registry.flush()
    block.forget("ana")
    assert block.context("bob") is not None
    assert [session.name for session in sessions(tmp_path)] == ["memory history: bob"]
    block.forget("bob")
    assert engine.registry.contexts() == []
    assert grep(tmp_path, traces(engine, [SECRET])) == []
    engine.close()


def test_two_threads_of_equal_turns_are_forgotten_one_by_one(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    memory = KVzipMemoryMiddleware(trigger=("messages", 4), keep=("messages", 2))
    agent = agent_of(engine, memory)
    for who in ("ana", "bob"):
        for text in (SECRET, "a", "b"):
            agent.invoke({"messages": [("user", text)]}, {"configurable": {"thread_id": who}})
    engine.registry.flush()
    assert [entry.tags for entry in engine.registry.contexts()] == [("thread: ana", "thread: bob")]
    memory.forget("ana")
    assert [entry.tags for entry in engine.registry.contexts()] == [("thread: bob",)]
    KVzipMemoryMiddleware().forget("bob", KVzipChatModel(engine=engine))
    assert grep(tmp_path, traces(engine, [SECRET])) == []
    with pytest.raises(InputError, match="model="):
        KVzipMemoryMiddleware().forget("bob")
    engine.close()


def test_documents_with_random_ids_are_known_by_what_they_are(tmp_path: Path) -> None:
    def opened() -> tuple[KVzipEngine, KVzipIndex]:
        engine = tiny_engine(cache_dir=tmp_path)
        llm = KVzipLLM(engine=engine, ratio=0.5, max_tokens=4)
        documents = [Document(text=f"{FILLER}{SECRET}", metadata={"file_name": "a.txt"}), Document(text="Boat. " * 9)]
        return engine, KVzipIndex.from_documents(documents, llm=llm)

    for _ in range(3):
        engine, index = opened()
        assert len([tag for entry in engine.registry.contexts() for tag in entry.tags]) == 1
        engine.close()
    engine, index = opened()
    assert engine.stats()["built"] == 0
    index.delete_ref_doc(next(iter(index.ref_doc_info)), delete_from_docstore=True)
    assert grep(tmp_path, traces(engine, [SECRET])) == []
    engine.close()


def test_an_index_with_an_id_keeps_what_another_one_forgets(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path / "cache")
    llm = KVzipLLM(engine=engine, ratio=0.5, max_tokens=4)
    documents = [Document(text=f"{FILLER}{SECRET}", doc_id="a")]
    for name in ("one", "two"):
        index = KVzipIndex.from_documents(documents, llm=llm)
        index.set_index_id(name)
        index.storage_context.persist(str(tmp_path / name))
    engine.close()
    del index

    def opened(name: str) -> tuple[KVzipEngine, KVzipIndex]:
        engine = tiny_engine(cache_dir=tmp_path / "cache")
        storage = StorageContext.from_defaults(persist_dir=str(tmp_path / name))
        return engine, KVzipIndex.from_storage(storage, llm=KVzipLLM(engine=engine, ratio=0.5, max_tokens=4))

    for name in ("one", "two"):
        engine, index = opened(name)
        index.parts()
        engine.close()
    engine, index = opened("one")
    index.forget("a")
    assert len(engine.registry.contexts()) == 1
    engine.close()
    engine, index = opened("two")
    index.parts()
    assert engine.stats()["built"] == 0
    index.forget("a")
    assert grep(tmp_path / "cache", traces(engine, [SECRET])) == []
    engine.close()


def test_the_command_line_forgets_by_tag(tmp_path: Path) -> None:
    for tenant in (None, "acme"):
        engine = tiny_engine(cache_dir=tmp_path, ratio=0.5, tenant=tenant)
        memory_block(engine)
        engine.load(FILLER, name="lamp", tags=["memory history: eve"])
        engine.close()

    def rm(*args: str) -> Any:
        out = CliRunner().invoke(app, ["rm", *args, "--cache-dir", str(tmp_path), "--json"])
        return json.loads(out.stdout) if out.exit_code == 0 else out

    assert "contexts of 2 tenants" in str(rm("--tag", f"memory history: {WHO}").exception)
    assert rm("--tag", f"memory history: {WHO}", "--tenant", "acme")["turns"] == 6
    assert len([*sessions(tmp_path)]) == 1
    gone = rm("--tag", f"memory history: {WHO}")
    assert (gone["turns"], len(gone["deleted"]), gone["kept"]) == (6, 3, [])
    assert grep(tmp_path, traces(engine, [SECRET, WHO])) == []
    assert "nothing is tagged" in str(rm("--tag", f"memory history: {WHO}").exception)
    assert rm("--tag", "memory history: eve", "--tenant", "acme")["kept"][0]["names"] == ["lamp"]
    for wrong in ((), ("lamp", "--tag", "x")):
        assert rm(*wrong).exit_code == 2


def test_what_damage_and_kills_have_left_is_forgotten_too(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    damaged, half, orphan = (engine.load(f"{FILLER}{SECRET}{n}", tags="ana").key for n in range(3))
    other = engine.load(f"{FILLER}{SECRET}", tags="bob").key
    engine.registry.flush()
    wanted = {**traces(engine, [SECRET]), **pairs(engine)}
    engine.close()
    folder = tmp_path / "contexts"

    def blob(key: str) -> Path:
        return folder / "blobs" / key[:2] / f"{key}.safetensors"

    content = blob(half).read_bytes()
    blob(damaged).write_bytes(blob(damaged).read_bytes()[:-9])
    os.chmod(blob(damaged), 0o600)
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    assert engine.registry.verify(damaged)  # to quarantine
    (folder / "quarantine" / f"{orphan}.1.safetensors").write_bytes(content)  # without a row
    engine.registry._backing.tier.folder.temporary(half).write_bytes(content[:-99])  # of a writer that was killed
    index = folder / "quarantine" / "index.1"
    index.mkdir()
    (index / "cache.db").write_bytes(SECRET.encode())
    with closing(sqlite3.connect(folder / "index" / "cache.db", isolation_level=None)) as database:
        database.execute("DELETE FROM Cache WHERE key = ?", (f"context:{orphan}",))  # killed before its row was there
    (folder / "locks" / f"{half[:3]}.progress").write_text(json.dumps({"key": half, "stage": SECRET}))
    assert len(engine.forget("ana").deleted) == 2  # the damaged one was gone
    assert {entry.key for entry in engine.registry.contexts()} == {other}
    engine.forget("bob")
    assert grep(tmp_path, {**wanted, **{key: key.encode() for key in (damaged, half, orphan, other)}}) == []
    with closing(sqlite3.connect(folder / "index" / "cache.db")) as database:
        assert {key for (key,) in database.execute("SELECT key FROM Cache")} == {"totals", "forgotten:"}
    engine.close()


def test_nothing_is_forgotten_by_halves_while_another_process_holds_the_index(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    forget = memory_block(engine)
    engine.registry.flush()
    before = engine.registry.contexts()
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        for action in (forget, lambda: engine.forget(f"memory history: {WHO}")):
            with pytest.raises(StorageError, match="try again when it is free"):
                action()
        holder.execute("ROLLBACK")
    assert engine.registry.contexts() == before
    assert len([*sessions(tmp_path)]) == 1
    forget()
    assert engine.registry.contexts() == []
    engine.close()


OTHER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from conftest import tiny_engine
engine = tiny_engine(cache_dir=Path({folder!r}), ratio=0.5)
context = engine.load({text!r})
print(context.receipt.tier, flush=True)
stream = engine.session(context).stream("Who?", max_new_tokens=9)
first = next(iter(stream))
sys.stdin.readline()
list(stream)
print(engine.generate(context, "And?", max_new_tokens=2).receipt.tier, flush=True)
for number in range(4):  # moves down what is in memory
    engine.registry._memory.device.budget = context.nbytes + 4096
    engine.load({text!r}.replace("lamp", f"lamp{{number}}"), ratio=0.4)
engine.close()
"""


def test_a_process_that_has_it_in_memory_goes_on_and_does_not_bring_it_back(tmp_path: Path) -> None:
    text = f"{FILLER}{SECRET}"
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    engine.load(text, tags="ana")
    engine.registry.flush()
    key = engine.registry.contexts()[0].key
    code = textwrap.dedent(OTHER).format(paths=sys.path, folder=str(tmp_path), text=text)
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "disk\n"
        engine.forget("ana")
        assert grep(tmp_path, traces(engine, [SECRET])) == []
        print(file=other.stdin, flush=True)
        assert other.stdout.readline() == "device\n"
        assert other.wait(60) == 0
    later = tiny_engine(cache_dir=tmp_path)
    assert later.registry.find(key) == []
    later.close()
    engine.close()


@pytest.mark.parametrize("reference", ["name", "key", "short key"])
@pytest.mark.parametrize("evicted", [False, True])
def test_what_another_process_has_removed_is_not_found_and_not_told_of(tmp_path: Path, reference: str, evicted: bool) -> None:
    """Not even by who has a handle of it, with which it is answered still."""
    one, other = tiny_engine(cache_dir=tmp_path / "contexts"), tiny_engine(cache_dir=tmp_path / "contexts")
    context = other.load(TEXT, name="lease")
    expected = other.generate(context, "Q?", max_new_tokens=4).text
    other.registry.flush()
    if evicted:
        other.registry._memory.drop(other.registry._memory.device.held[context.key])
    one.registry.remove(context.key)
    asked = {"name": "lease", "key": context.key, "short key": context.key[:12]}[reference]
    with pytest.raises(InputError) as refused:
        other.get(asked)
    assert "under their keys" not in str(refused.value)
    assert other.generate(context, "Q?", max_new_tokens=4).text == expected
    with pytest.raises(InputError):
        other.get(asked)
    assert other.registry.contexts() == one.registry.contexts() == []
    assert other.load(TEXT, name="again").key == context.key
    assert set(other.registry.one(context.key).names) == {"again"}
    assert other.get(context.key).key == other.get("again").key == context.key
    one.close(), other.close()


def test_a_context_in_use_is_gone_when_the_answer_has_ended(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    context = engine.load(f"{FILLER}{SECRET}", tags="ana")
    with context.lease():
        engine.forget("ana")
        assert engine.stats()["tiers"]["device"]["contexts"] == 1
    assert engine.stats()["tiers"]["device"] == {**engine.stats()["tiers"]["device"], "contexts": 0, "nbytes": 0}
    assert engine.load(f"{FILLER}{SECRET}", tags="ana").receipt.tier == "built"
    engine.close()


def test_what_is_built_again_after_it_was_evicted_is_still_whose_it_was(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    first = engine.load(turns(FILLER), tags="ana")
    last = engine.extend(first, turns(SECRET), tags="ana")
    engine.registry.flush()
    for key in (first.key, last.key):  # as a full disk and full memory do
        engine.registry._backing.tier.remove(key)
        with engine.registry._memory.changed:
            engine.registry._memory.drop(engine.registry._memory.device.held[key])
    engine.generate(last, "Who?", max_new_tokens=2)
    engine.registry.flush()
    assert [entry.tags for entry in engine.registry.contexts()] == [("ana",), ("ana",)]
    engine.forget("ana")
    assert grep(tmp_path, traces(engine, [SECRET])) == []
    engine.close()


def test_a_former_name_does_not_hold_an_older_text(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    older = engine.load(f"{FILLER}{SECRET}", name="page", tags="ana")
    engine.load(FILLER, name="page", tags="bob")
    engine.registry.flush()
    assert [entry.key for entry in engine.forget("ana").deleted] == [older.key]
    assert engine.get("page").key != older.key
    assert [entry.key for entry in engine.forget("bob").kept] == [engine.get("page").key]  # which its name holds


@pytest.mark.parametrize("id_", ["a|b.pdf", "a | thread: ana", "a | document: b", "50%7C"])
def test_an_id_with_bars_is_one_holder(tmp_path: Path, id_: str) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    for made_tag in (thread_tag, document_tag):
        tag, other = made_tag(id_), made_tag("ana")
        mine, theirs = engine.load(f"{FILLER}{tag}", tags=tag), engine.load(f"{FILLER}{other}", tags=other)
        for part in ("a", "b", "b.pdf", "ana"):
            engine.forget(made_tag(part))
        assert "disk" in engine.registry.tiers(mine.key)
        assert engine.registry.tiers(theirs.key) == []
        engine.forget(tag)
        assert engine.registry.tiers(mine.key) == []


def test_forgetting_beside_loads_leaves_nothing_deleted_on_disk_and_takes_nothing_of_others(tmp_path: Path) -> None:
    engine, stop, kept = tiny_engine(cache_dir=tmp_path, ratio=0.5), threading.Event(), list[str]()

    def load(number: int) -> None:
        turn = 0
        while not stop.is_set():
            engine.load(f"{FILLER}{number} {turn}", tags="ana")
            kept.append(engine.load(f"{FILLER}{number} {turn}", tags="bob").key)
            turn += 1

    threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        engine.forget("ana")
    stop.set()
    for thread in threads:
        thread.join()
    engine.forget("ana")
    engine.registry.flush()
    assert kept
    assert all("disk" in engine.registry.tiers(key) for key in kept)
    assert {entry.tags for entry in engine.registry.contexts()} == {("bob",)}


def test_what_is_loaded_under_a_name_is_on_disk_whatever_was_deleted_there(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    context = engine.load(FILLER, tags="ana")
    engine.registry.flush()
    with engine.stream(context, "hi", max_new_tokens=50) as stream:
        next(stream)
        engine.forget("ana")
        assert engine.generate(None, FILLER, max_new_tokens=1).receipt.key is None  # what was forgotten answers no one who has not got it
        engine.load(FILLER, name="page")
    engine.close()
    assert tiny_engine(cache_dir=tmp_path, ratio=0.5).get("page").key == context.key


@pytest.mark.parametrize("grows", ["extended", "extended twice", "folded"])
@pytest.mark.parametrize("by", ["this process", "another"])
@pytest.mark.parametrize("how", ["removed", "forgotten"])
def test_what_grows_from_something_deleted_is_not_stored_until_that_is_loaded_again(tmp_path: Path, how: str, by: str, grows: str) -> None:
    """It has the pairs of what was deleted in it, and none of its tags."""
    engine, other = (tiny_engine(cache_dir=tmp_path, ratio=0.5) for _ in range(2))

    def grown(context: CompressedContext) -> CompressedContext:
        if grows == "folded":
            session = engine.session(context)
            session.ask("Why?", max_new_tokens=2)
            return session.fold(keep=0)
        said = [{"role": "user", "content": "Hello?"}]
        first = engine.extend(context, said, share=False)
        return first if grows == "extended" else engine.extend(first, [{"role": "assistant", "content": "Yes."}, *said], share=False)

    said = [{"role": "user", "content": FILLER}, {"role": "assistant", "content": "Yes."}]
    context = engine.load(said, tags="ana")
    engine.registry.flush()
    deleting = engine if by == "this process" else other
    deleting.forget("ana") if how == "forgotten" else deleting.registry.remove(context.key)
    stale = grown(context)
    engine.registry.flush()
    assert engine.generate(stale, "Who?", max_new_tokens=2).text is not None
    assert [*engine.registry.contexts(), *other.registry.contexts(), *tmp_path.rglob("*.safetensors")] == []
    again = grown(engine.load(said))
    engine.registry.flush()
    assert again.key == stale.key
    assert again.key in {entry.key for entry in other.registry.contexts()}


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("by", ["this process", "another"])
def test_what_was_loaded_again_grows_for_handles_of_before(tmp_path: Path, by: str, written: bool) -> None:
    """Whether or not it is on the disk yet."""
    engine, other = (tiny_engine(cache_dir=tmp_path, ratio=0.5) for _ in range(2))
    said = [{"role": "user", "content": FILLER}, {"role": "assistant", "content": "Yes."}]
    before = engine.load(said, tags="ana")
    engine.registry.flush()
    (engine if by == "this process" else other).forget("ana")
    more = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    grown = engine.extend(before, more, name="lost")
    assert grown.receipt is not None
    assert grown.receipt.reason == "removed"
    engine.load(said, tags="ana")
    if written:
        engine.registry.flush()
    else:
        engine.registry._backing.tier.remove(before.key)  # type: ignore[union-attr]
    engine.extend(before, more, name="once")
    engine.extend(grown, more, name="twice")
    for name in ("once", "twice"):
        assert engine.get(name).name == name


def test_what_grew_before_its_parent_was_deleted_is_found(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    said = [{"role": "user", "content": FILLER}, {"role": "assistant", "content": "Yes."}]
    more = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    parent = engine.load(said, name="parent")
    child = engine.extend(parent, more, name="child")
    engine.registry.remove("parent")
    again = engine.extend(parent, more, name="again")
    assert again.receipt is not None
    assert (again.key, again.receipt.hit) == (child.key, True)
    assert engine.get("again").key == engine.get("child").key
    engine.extend(child, more, name="grandchild")
    assert engine.get("grandchild").n_tokens > child.n_tokens


def lose(engine: KVzipEngine, key: str) -> None:
    """As full memory does."""
    with engine.registry._memory.changed:
        engine.registry._memory.drop(engine.registry._memory.device.held[key])


def on_disk(engine: KVzipEngine) -> dict[str, tuple[str, ...]]:
    engine.registry.flush()
    return {entry.key: entry.tags for entry in engine.registry.contexts() if "disk" in engine.registry.tiers(entry.key)}


def test_a_question_elsewhere_does_not_store_what_was_forgotten(tmp_path: Path) -> None:
    one, other = (tiny_engine(cache_dir=tmp_path, ratio=0.5) for _ in range(2))
    context = other.load(f"{FILLER}{SECRET}", tags="ana")
    other.registry.flush()
    one.forget("ana")
    lose(other, context.key)
    answer = other.generate(context, "Who?", max_new_tokens=2)
    assert answer.receipt.tier == "built"
    assert on_disk(other) == {}
    assert other.generate(context, "Who?", max_new_tokens=2).receipt.tier == "device"
    lose(other, context.key)
    other.load(f"{FILLER}{SECRET}", tags="ana")  # which is another wish
    assert on_disk(other) == {context.key: ("ana",)}
    one.close()
    other.close()


def test_what_is_loaded_again_after_others_have_forgotten_is_stored_with_the_tags_it_has_got_since(tmp_path: Path) -> None:
    one, other = (tiny_engine(cache_dir=tmp_path, ratio=0.5) for _ in range(2))
    contexts = [other.load(f"{FILLER}{number}", tags="ana") for number in range(3)]
    other.registry.flush()
    one.forget("ana")
    other.load(f"{FILLER}0")
    other.load(f"{FILLER}1", tags="bob")
    other.registry._memory.device.budget = contexts[0].nbytes * 2
    other.load(f"{FILLER}3", tags="bob")  # moves down what is in memory
    other.load(f"{FILLER}4", tags="bob")
    stored = on_disk(other)
    assert stored[contexts[0].key] == ()
    assert stored[contexts[1].key] == ("bob",)
    assert contexts[2].key not in stored
    one.close()
    other.close()


def test_a_conversation_leaves_behind_only_what_nobody_else_has_got_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (tiny_engine(cache_dir=tmp_path, ratio=0.5) for _ in range(2))

    def grown(engine: KVzipEngine, text: str, tag: str) -> str:
        return engine.extend(engine.load(turns(FILLER), tags=tag), turns(text), tags=tag).key

    key, alone = grown(one, SECRET, "ana"), grown(one, "Boat.", "ana")
    find = one.registry.find

    def between(reference: str) -> Any:
        found = find(reference)
        grown(other, SECRET, "bob")
        other.registry.flush()
        return found

    monkeypatch.setattr(one.registry, "find", between)
    one.leave_behind(key, ["ana"])
    monkeypatch.undo()
    assert on_disk(one)[key] == ("bob",)
    one.leave_behind(alone, ["ana"])
    assert alone not in on_disk(one)
    assert one.registry.tiers(alone) == []
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        key = grown(one, "Gull.", "ana")
        one.registry.flush()
        holder.execute("BEGIN EXCLUSIVE")
        one.leave_behind(key, ["ana"])  # in vain
        holder.execute("ROLLBACK")
    assert on_disk(one)[key] == ("ana",)
    one.close()
    other.close()


def test_what_is_built_for_one_answer_counts_in_the_budget() -> None:
    engine = tiny_engine(ratio=0.5)
    context, other = engine.load(f"{FILLER}{SECRET}"), engine.load(FILLER)
    engine.registry.remove(context.key)
    engine.registry._memory.device.budget = context.nbytes + other.nbytes // 2
    with context.lease():
        assert engine.stats()["tiers"]["device"]["nbytes"] == context.nbytes
    assert engine.stats()["tiers"]["device"]["nbytes"] == 0
    engine.registry._memory.wait_s = 0.1
    with engine.load(FILLER).lease(), pytest.raises(BudgetError, match="no room"):
        engine.generate(context, "Who?", max_new_tokens=2)
    assert engine.generate(context, "Who?", max_new_tokens=2).receipt.reason == "removed"


def test_a_tag_that_could_not_be_written_is_written_when_the_index_is_free(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    context = engine.load(FILLER, tags="ana")
    engine.registry.flush()
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        engine.load(FILLER, tags="bob")
        engine.registry.flush()
        holder.execute("ROLLBACK")
    engine.close()
    assert on_disk(tiny_engine(cache_dir=tmp_path)) == {context.key: ("ana", "bob")}


def test_a_pinned_context_that_could_not_be_stored_is_stored_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvzip_memory.registry.disk.files.PreparedFile.write", full)
    context = engine.load(FILLER)
    engine.registry.pin(context.key)
    monkeypatch.undo()
    assert on_disk(engine) == {}
    engine.close()
    (entry,) = tiny_engine(cache_dir=tmp_path).registry.contexts()
    assert entry.key == context.key
    assert entry.pinned


# -- what other processes have in their memory ------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[KVzipEngine, KVzipEngine]]:
    """Over one folder, as two processes are."""
    one, other = (tiny_engine(cache_dir=tmp_path, ratio=0.5) for _ in range(2))
    yield one, other
    for engine in (one, other):
        engine.close()


Two = tuple[KVzipEngine, KVzipEngine]


def both_load(two: Two, *tags: str) -> str:
    """A text that every engine has in memory: the first with all tags, the second with none of its own."""
    for tag in tags or ((),):
        context = two[0].load(f"{FILLER}{SECRET}", tags=tag)
    two[0].registry.flush()
    two[1].load(f"{FILLER}{SECRET}")
    two[1].registry.flush()
    return context.key


def spill(engine: KVzipEngine) -> None:
    """Move down all that is in memory."""
    engine.registry._memory.device.budget = engine.stats()["tiers"]["device"]["nbytes"] + 4096
    for number in range(3):
        engine.load(f"{FILLER}{number}", tags="spill")
    engine.registry.flush()


@pytest.mark.parametrize("ended_by", ["forget", "leave"])
def test_a_tag_that_was_forgotten_elsewhere_holds_nothing_here(two: Two, ended_by: str) -> None:
    one, other = two
    key = both_load(two, "ana", "bob")
    other.forget("bob")
    gone = one.registry.leave(key, ["ana"]) if ended_by == "leave" else one.forget("ana").deleted
    assert gone
    assert key not in on_disk(one)


def test_who_loads_again_what_others_have_forgotten_has_it_again(two: Two) -> None:
    one, other = two
    key = both_load(two, "ana")
    other.load(f"{FILLER}{SECRET}", tags="bob")
    other.registry.flush()
    other.forget("ana")
    one.load(f"{FILLER}{SECRET}", tags="ana")
    assert on_disk(one)[key] == ("ana", "bob")
    other.forget("bob")
    other.forget("ana")
    assert on_disk(other) == {}
    one.load(f"{FILLER}{SECRET}", tags="ana")
    assert on_disk(one) == {key: ("ana",)}


def test_what_was_removed_in_use_and_is_loaded_again_is_stored_without_what_it_had(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    context = engine.load(FILLER, name="lamp", tags="ana")
    engine.registry.pin(context.key)
    with context.lease():
        engine.registry.remove(context.key)
        engine.load(FILLER)
    engine.close()
    (entry,) = tiny_engine(cache_dir=tmp_path).registry.contexts()
    assert (entry.key, entry.tags, entry.names, entry.former, entry.pinned) == (context.key, (), {}, (), False)


@pytest.mark.parametrize("tags", [(), ("ana",)])
def test_what_was_removed_is_not_written_again_by_others(two: Two, tags: tuple[str, ...], tmp_path: Path) -> None:
    one, other = two
    key = both_load(two, *tags)
    one.registry.remove(key)
    spill(other)
    assert key not in on_disk(other)
    other.load(f"{FILLER}{SECRET}")
    assert key in on_disk(other)


@pytest.mark.parametrize("how", ["pin", "name", "tag"])
def test_forgetting_something_else_costs_nobody_what_only_memory_has(two: Two, how: str) -> None:
    one, other = two
    context = other.load(FILLER, name="lamp" if how == "name" else None, tags="ana" if how == "tag" else ())
    if how == "pin":
        other.registry.pin(context.key)
    other.registry.flush()
    assert other.registry._backing.tier
    other.registry._backing.tier._quarantine(context.key, "as damage does")
    one.load("Boat. " * 40, tags="bob")
    one.forget("bob")
    other.close() if how == "pin" else spill(other)
    assert on_disk(one)[context.key] == (("ana",) if how == "tag" else ())


def test_what_is_being_written_while_others_forget_it_does_not_stay(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two
    key = both_load(two, "ana")
    assert other.registry._backing.tier
    other.registry._backing.tier.remove(key)  # as a full disk does
    put = DiskTier.put

    def beside(*args: Any, **options: Any) -> None:
        monkeypatch.undo()
        one.forget("ana")
        put(*args, **options)

    monkeypatch.setattr(DiskTier, "put", beside)
    held = other.registry._memory.device.held[key]
    held.tags = {"ana": held.loaded}
    spill(other)
    assert key not in on_disk(other)


@pytest.mark.parametrize("ended_by", ["remove", "forget"])
def test_a_file_that_is_copied_without_a_tag_does_not_come_back(two: Two, ended_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two
    key = both_load(two, "ana")
    other.load(f"{FILLER}{SECRET}", tags="bob")
    other.registry.flush()
    copy = leaving.copy_with_catalog

    def beside(*args: Any) -> int:
        monkeypatch.undo()
        nbytes = copy(*args)
        other.registry.remove(key) if ended_by == "remove" else other.forget("bob")
        return nbytes

    monkeypatch.setattr(leaving, "copy_with_catalog", beside)
    one.forget("ana")
    assert key not in on_disk(one)
    assert one.registry._backing.tier
    assert one.registry._backing.tier.usage() == one.registry._backing.tier.measured()


def test_a_catalog_that_could_not_be_written_is_written_by_the_next_forgetting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    for tag in ("ana-7f3", "bob"):
        engine.load(FILLER, tags=tag)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(leaving, "copy_with_catalog", full)
        engine.forget("ana-7f3")
    engine.forget("zzz")
    assert grep(tmp_path, {"tag": b"ana-7f3"}) == []
    engine.close()


@pytest.mark.parametrize("how", ["forget here", "forget there", "untag", "leave", "remove"])
def test_a_tag_that_could_not_be_written_is_not_written_once_it_is_forgotten(
    two: Two, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    key = both_load(two, "bob")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "touch", full)
        one.load(f"{FILLER}{SECRET}", tags="ana")
        one.registry.flush()
        patch.setattr(one.registry._writing, "tell", lambda: None)  # until it is done
        {
            "forget here": lambda: one.forget("ana"),
            "forget there": lambda: other.forget("ana"),
            "untag": lambda: one.registry.untag(key, "ana"),
            "leave": lambda: one.registry.leave(key, ["ana"]),
            "remove": lambda: one.registry.remove(key),
        }[how]()
    if how == "remove":
        one.load(f"{FILLER}{SECRET}")
    assert on_disk(one)[key] == (() if how == "remove" else ("bob",))


def test_a_name_that_is_in_no_row_holds_and_is_removed(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two
    key = both_load(two, "ana")

    def full(*args: Any, **options: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "touch", full)
        other.load(f"{FILLER}{SECRET}", name="lamp")
        other.registry._writing.thread.submit(lambda: None).result()
        assert one.forget("ana").deleted == ()
        assert one.get("lamp").key == key
    one.registry.remove(key)
    one.registry.flush()  # which looks at all names
    one.load(f"{FILLER}{SECRET}")
    with pytest.raises(InputError, match="lamp"):
        one.get("lamp")


def test_whoever_finds_a_context_holds_it_also_when_it_has_left_the_memory(two: Two) -> None:
    one, key = two[0], both_load(two, "ana")
    lose(one, key)
    one.registry.join(key, ["bob"])
    one.registry.flush()
    assert on_disk(one)[key] == ("ana", "bob")


def test_rows_of_contexts_whose_files_were_lost_change_too(two: Two) -> None:
    one, other = two
    key = both_load(two, "ana", "bob", "eve")
    one.registry.pin(key)
    assert other.registry._backing.tier
    other.registry._backing.tier._quarantine(key, "as damage does")
    one.registry.pin(key, False)
    one.registry.untag(key, "ana")
    assert not one.registry.leave(key, ["bob"])
    one.generate(one.get(key), "Who?", max_new_tokens=1)
    one.load(f"{FILLER}{SECRET}")
    assert on_disk(one)[key] == ("eve",)
    assert not one.registry.one(key).pinned


@pytest.mark.parametrize("action", ["remove", "leave"])
def test_what_could_not_be_deleted_is_still_there(tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5)
    context = engine.load(FILLER, tags="ana")
    engine.registry.flush()
    drop = Tidying.drop

    def half(*args: Any) -> None:
        drop(*args)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Tidying, "drop", half)
        with pytest.raises(OSError, match="Input/output"):
            engine.registry.remove(context.key) if action == "remove" else engine.registry.leave(context.key, ["ana"])
    assert on_disk(engine) == {context.key: ("ana",)}
    engine.close()


def test_notes_of_what_was_forgotten_are_not_endless() -> None:
    notes = Notes(None)
    notes = notes.with_note("a" * 64)
    first = time.time()
    for number in range(1200):
        notes = notes.with_note(tag=f"thread: {number}")
    notes = Notes(json.loads(json.dumps(notes.row)))
    now = time.time()
    assert len(notes.row["notes"]) == 1000
    assert notes.deleted("a" * 64) >= first - 1  # forgotten among the others: it may be later, never earlier
    assert notes.left("b" * 64, {"thread: 1100": first, "bob": now, "document: a | thread: 1100": first}) == {"bob": now}
    assert notes.deleted("b" * 64) < now
    assert Notes({"time": 5.0}).deleted("a") == 5.0
