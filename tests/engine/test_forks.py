"""Processes that are forked while others answer and build: nothing hangs in the child, nothing is harmed in the parent."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import pytest
import torch

import kvzip_memory
from conftest import ROOT, TESTS
from kvzip_memory import KVzipEngine
from kvzip_memory.prompting.guidance import Guidance
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.session import Session
from kvzip_memory.streaming import Stream
from synthetic import in_a_process

SOURCES = [ROOT / "kvzip_memory", ROOT / "integrations"]

#: An engine with all that belongs to it, every lock of which is held by another thread when ``child`` forks.
BEGIN = """
import asyncio, json, os, signal, sys, tempfile, threading, time
from pathlib import Path
from conftest import (TESTS, TEXT, tiny_engine, tiny_model, tiny_tokenizer)
from kvzip_memory import CompressedContext, KVzipEngine, KVzipError
from kvzip_memory.system import forks
from kvzip_memory.errors import ForkedError
from kvzip_memory.inference.generation import GenerationParams
from kvzip_memory.registry import Wanted

MARKED = [{"role": "user", "content": [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}]}]
folder = Path(sys.argv[1])
engine = tiny_engine(max_running=2, cache_dir=folder)
context = engine.load(TEXT, name="lamp")
engine.registry.flush()
session = engine.session(context)
session.ask("Who?", max_new_tokens=2)
stream = engine.stream(context, "Who?", max_new_tokens=2)
begun = engine.stream(context, "Who?", max_new_tokens=1500)
next(begun)


def child(*ways):
    "What comes of each way in a child: its error, or what it gives. One that hangs is the last."
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        signal.alarm(60)
        for way in ways:
            try:
                said = way()
                said = "works" if said is None else said
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, (json.dumps(str(said)) + "\\n").encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        said = [json.loads(line) for line in file]
    _, status = os.waitpid(pid, 0)
    return said if status == 0 else [*said, f"hung: {status}"]
"""

HOLD = """
held, free = threading.Event(), threading.Event()

def hold():
    locks = [value for owner in list(forks._actions) for value in vars(owner).values() if hasattr(value, "acquire")]
    for lock in locks:
        if not lock.acquire(timeout=0.2):
            print("held already", lock, file=sys.stderr)
    held.set()
    free.wait()
    for lock in locks:
        lock.release()
"""


def run(script: str, folder: Path) -> Any:
    """What a script finds, as a program of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", f"{script}\nprint(json.dumps(said))", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def do(script: str, folder: Path, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.argv[1:] = [str(folder)]
    names: dict[str, Any] = {}
    exec(script, names)
    answers.put(names["said"])


def is_lock(node: ast.AST) -> TypeGuard[ast.Assign]:
    return isinstance(node, ast.Assign) and any(f"threading.{kind}(" in ast.unparse(node) for kind in ("Lock", "RLock", "Condition"))


def keepers_of_locks(function: ast.FunctionDef) -> Iterator[str]:
    """Where a function puts locks that it has made: fields of its own object, and whatever else by name."""
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    locks = {node.targets[0].id for node in assigned if is_lock(node) and isinstance(node.targets[0], ast.Name)}
    shared = {name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names}
    yield from locks & shared
    for node in assigned:
        if isinstance(node.value, ast.Name) and node.value.id in locks:
            for target in node.targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield target.attr
                elif isinstance(target, (ast.Attribute, ast.Subscript)):
                    yield ast.unparse(target.value)


def test_every_lock_that_an_object_keeps_refuses_in_a_child() -> None:
    kept, refused = set(), set()
    for path in (path for folder in SOURCES for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node)
            if isinstance(node, ast.FunctionDef):
                kept |= {(path.stem, owner) for owner in keepers_of_locks(node)}
            if isinstance(node, ast.Module):
                kept |= {(path.stem, line.targets[0].id) for line in node.body if is_lock(line) and isinstance(line.targets[0], ast.Name)}
            if is_lock(node) and not isinstance(node.targets[0], ast.Name):
                targets = [leaf for leaf in ast.walk(node.targets[0]) if isinstance(leaf, ast.Attribute)]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                kept |= {(path.stem, t.attr) for t, v in zip(targets, values, strict=True) if "threading." in ast.unparse(v)}
            if isinstance(node, ast.Assign) and "ThreadPoolExecutor(" in text and isinstance(node.targets[0], ast.Attribute):
                kept.add((path.stem, node.targets[0].attr))
            if isinstance(node, ast.AnnAssign) and "default_factory=threading.RLock" in text:
                kept.add((path.stem, ast.unparse(node.target)))
            if isinstance(node, ast.Global) and "after_in_child=" in path.read_text():  # a new one in each child
                refused |= {(path.stem, name) for name in node.names}
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("refuse_after_fork", "after_fork"):
                refused |= {(path.stem, arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
                if "LazyEngine" in text:  # which begins anew
                    refused.add((path.stem, "_lock"))
    assert len(kept) >= 10
    assert {("forks", "_table"), ("forks", "_mine"), ("forks", "_locks")} <= kept
    assert kept <= refused


#: What the public methods of an object are given, None for what needs no process' help.
WAYS: dict[type, tuple[str, dict[str, str | None]]] = {
    KVzipEngine: (
        "engine",
        {
            "aextend": "asyncio.run(engine.aextend(context, [('user', 'And?')]))",
            "aforget": "asyncio.run(engine.aforget('ana'))",
            "agenerate": "asyncio.run(engine.agenerate(context, 'Who?'))",
            "ajoin": "asyncio.run(engine.ajoin([context, context]))",
            "aload": "asyncio.run(engine.aload(TEXT))",
            "close": None,
            "count_tokens": None,
            "extend": "engine.extend(context, ['More.'])",
            "forget": "engine.forget('ana')",
            "from_pretrained": None,
            "generate": "engine.generate(context, 'Who?')",
            "get": "engine.get('lamp')",
            "join": "engine.join([context, context])",
            "leave_behind": "engine.leave_behind(context.key, ['ana'])",
            "load": "engine.load(TEXT)",
            "load_marked": "engine.load_marked(MARKED)",
            "logits": "engine.logits(context, [1])",
            "one_context": "engine.one_context(['lamp'])",
            "open": "engine.open('file')",
            "prompt_ids": None,
            "read_calls": None,
            "relevance": "engine.relevance([(context, [(0, 5)])], 'Who?')",
            "session": "engine.session(context).ask('Who?')",
            "stats": "engine.stats()",
            "stored_prefix": "engine.stored_prefix([1])",
            "stream": "list(engine.stream(context, 'Who?'))",
            "text_ids": None,
            "token_offsets": None,
        },
    ),
    ContextRegistry: (
        "registry",
        {
            "check_changeable": "registry.check_changeable()",
            "check_disk": "registry.check_disk()",
            "check_fits": None,
            "close": None,
            "contexts": "registry.contexts()",
            "find": "registry.find('lamp')",
            "forget": "registry.forget(lambda key, tag: True)",
            "flush": "registry.flush()",
            "gc": "registry.gc()",
            "is_empty": "registry.is_empty()",
            "is_removed": None,
            "join": "registry.join(context.key, ['ana'])",
            "at_once": "registry.at_once(True).__enter__()",
            "guest": "registry.guest(0).__enter__()",
            "wait_for_room": "registry.wait_for_room(0.0)",
            "lease": "context.lease().__enter__()",
            "leave": "registry.leave(context.key, ['ana'])",
            "loaded": "registry.loaded('lamp')",
            "longest_prefix": "registry.longest_prefix({}, [1])",
            "looked_up": "registry.looked_up('lamp')",
            "one": "registry.one('lamp')",
            "pin": "registry.pin('lamp')",
            "quarantine": "registry.quarantine()",
            "readmit": "registry.readmit('lamp')",
            "remove": "registry.remove('lamp')",
            "stats": "registry.stats()",
            "tiers": "registry.tiers('lamp')",
            "untag": "registry.untag('lamp', 'x')",
            "use_again": "registry.use_again('lamp')",
            "verify": "registry.verify('lamp')",
            "with_room": "registry.with_room(Wanted('lamp', {}, 'lamp', name='x'))",
            "write": None,
        },
    ),
    Session: (
        "session",
        {
            "ask": "session.ask('Who?')",
            "fold": "session.fold(0)",
            "fork": "session.fork()",
            "reset": "session.reset()",
            "stream": "list(session.stream('Who?'))",
            "stream_ids": "list(session.stream_ids([1], GenerationParams.of({})))",
        },
    ),
    Stream: (
        "stream",
        {
            "cancel": None,
            "close": None,
            "in_this_thread": None,
            "whole": "stream.whole()",
            "with_reasoning": None,
        },
    ),
    Guidance: (
        "guidance",
        {
            "free_text": None,
            "json": "guidance.json({'type': 'string'})",
            "lark": "guidance.lark('start: \"a\"')",
            "literal": None,
        },
    ),
}
MORE = {
    "a stream that was begun": "next(begun)",
    "layers": "context.layers",
    "save": "context.save('file')",
}


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_every_public_method_is_among_the_ways(kind: type) -> None:
    public = {name for name, value in inspect.getmembers(kind, callable) if not name.startswith("_")}
    assert public == WAYS[kind][1].keys()


def test_no_way_in_hangs_in_a_child_of_a_process_all_of_whose_locks_are_held(tmp_path: Path) -> None:
    ways = {f"{name}.{method}": way for name, methods in WAYS.values() for method, way in methods.items() if way is not None} | MORE
    idle = ["engine.close()", "registry.close()", "stream.close()", "begun.close()", "begun.cancel()", "context.name"]
    script = f"""{BEGIN}
registry, guidance = engine.registry, engine.guidance
{HOLD}
holder = threading.Thread(target=hold)
holder.start()
held.wait()
said = dict(zip({list(ways)!r}, child(*[lambda way=way: eval(way) for way in {list(ways.values())!r}])))
said["idle"] = child(*[lambda way=way: (eval(way), None)[1] for way in {idle!r}])
free.set()
holder.join()
said["parent"] = session.ask("And?", max_new_tokens=2).finish_reason
begun.close()
"""
    said = in_a_process(do, script, tmp_path)
    assert said.pop("parent") == "length"
    assert said.pop("idle") == ["works"] * len(idle)
    assert said.keys() == ways.keys(), said
    wrong = {name: answer for name, answer in said.items() if not answer.startswith("ForkedError")}
    assert not wrong
    assert all("make an engine in each process, with the same cache_dir" in answer for answer in said.values())


FRAMEWORKS = f"""{BEGIN}
from langchain_kvzip import KVzipChatModel, create_memory_tools
from llama_index.core import Document
from llama_index.core.llms import ChatMessage
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipMemoryBlock

llm, chat = KVzipLLM(engine=engine, max_tokens=2), KVzipChatModel(engine=engine, max_tokens=2)
index = KVzipIndex.from_documents([Document(text=TEXT, doc_id="a")], llm=llm)
retriever, query_engine, chat_engine = index.as_retriever(), index.as_query_engine(), index.as_chat_engine()
block = KVzipMemoryBlock(llm=llm)
asyncio.run(block.aput([ChatMessage("Hello."), ChatMessage("Hello!", role="assistant")]))
tools = {{tool.name: tool for tool in create_memory_tools(engine)}}
known = tools["load_document"].invoke({{"name": "page", "text": TEXT}})
{HOLD}
holder = threading.Thread(target=hold)
holder.start()
held.wait()
ways = [
    lambda: chat.invoke("Who?"),
    lambda: list(chat.with_context(context).stream("Who?")),
    lambda: asyncio.run(chat.ainvoke("Who?")),
    lambda: chat.load_documents(TEXT),
    lambda: llm.chat([ChatMessage("Who?")]),
    lambda: asyncio.run(llm.achat([ChatMessage("Who?")])),
    lambda: query_engine.query("Who?"),
    lambda: asyncio.run(query_engine.aquery("Who?")),
    lambda: retriever.retrieve("Who?"),
    lambda: asyncio.run(retriever.aretrieve("Who?")),
    lambda: chat_engine.chat("Who?"),
    lambda: asyncio.run(chat_engine.achat("Who?")),
    lambda: chat_engine.reset(),
    lambda: index.insert(Document(text="New.")),
    lambda: index.delete_ref_doc("a"),
    lambda: asyncio.run(block.aget()),
    lambda: block.forget(),
    *[lambda tool=tool: tool.invoke({{"name": "page", "text": TEXT, "question": "Who?"}}) for tool in tools.values()],
]
said = child(*ways)
assert len(said) == len(ways), said
free.set()
holder.join()
begun.close()
assert chat.invoke("Who?").content
"""


def test_frameworks_objects_refuse_as_well(tmp_path: Path) -> None:
    said = in_a_process(do, FRAMEWORKS, tmp_path)
    assert [answer for answer in said if "make an engine in each process" not in answer] == []


OWN = f"""{BEGIN}
import multiprocessing
from kvzip_memory.frameworks.engines import LazyEngine
from filelock import FileLock
from tqdm import tqdm

expected = engine.generate(context, "Who?", max_new_tokens=6).text
model, tokenizer = tiny_model(), tiny_tokenizer()
begun.close()
lazy = LazyEngine()
lazy.get(lambda: engine)
wrong, done, answered = [], threading.Event(), [0, 0]

def answer():
    while not done.is_set():
        if engine.generate(context, "Who?", max_new_tokens=6).text != expected:
            wrong.append("parent")
        answered[0] += 1

def build():
    while not done.is_set():
        engine.load(f"Page {{answered[1]}}. " + TEXT)
        answered[1] += 1

def own():
    mine, found = KVzipEngine(model, tokenizer, cache_dir=folder), None
    while found is None:
        try:
            found = mine.get("lamp")
        except KVzipError as error:  # on a busy machine the others may have the index for a second
            if "holds the index" not in str(error):
                raise
    if mine.generate(found, "Who?", max_new_tokens=6).text != expected:
        return "another answer"
    if not mine.load(f"Page of {{os.getpid()}}. " + TEXT).receipt.tier == "built":
        return "nothing built"
    if lazy.get(lambda: mine) is not mine:
        return "the parent's engine"
    mine.close()

def process():
    said = own()
    sys.exit(0 if said is None else said)

def bars():  # of somebody else; children share this lock
    with tqdm.get_lock():
        done.wait()

locked = engine.registry._backing.tier.folder.lock("f" * 64)
locked.acquire()
threads = [threading.Thread(target=work) for work in (answer, answer, build, build, bars)]
for thread in threads:
    thread.start()
said = [said for _ in range(3) for said in child(own)]
workers = [multiprocessing.get_context("fork").Process(target=process) for _ in range(2)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join(60)
said += [worker.exitcode for worker in workers]
if (pid := os.fork()) == 0:  # one that ends as a program does, with all that it has
    signal.alarm(20)
    sys.exit(7)
said.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
other = FileLock(locked.lock_file, thread_local=False)
try:
    other.acquire(timeout=0)
    said.append("the child gave the parent's lock back")
except TimeoutError:
    said.append("locked")
before = list(answered)
while min(now - then for now, then in zip(answered, before)) < 2:
    time.sleep(0.01)
done.set()
for thread in threads:
    thread.join()
engine.close()
said += wrong
"""


def test_a_child_has_an_engine_of_its_own_and_the_parent_goes_on_unharmed(tmp_path: Path) -> None:
    assert run(OWN, tmp_path) == ["works", "works", "works", 0, 0, 7, "locked"]


def test_the_error_is_exported() -> None:
    assert issubclass(kvzip_memory.ForkedError, kvzip_memory.KVzipError)
