"""A tenant sees and touches only its own: whatever it calls about another's things is answered as if these had never existed.

The ways in are enumerated from the code: a public method, property, option or command that is in no table fails a test.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from langchain_core.messages import HumanMessage
from langchain_core.runnables import Runnable
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import TextNode
from typer.testing import CliRunner

import langchain_kvzip
import llama_index_kvzip
import synthetic
from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, CorruptFileError, InputError, KVzipEngine, Reply, Session, turns
from kvzip_memory.cli import app
from kvzip_memory.conversations import Memory
from kvzip_memory.registry import EVERYONE, ContextRegistry, Wanted, forgotten
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.disk.layout import blobs
from kvzip_memory.registry.disk.names import Label
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.holders import Naming, document_tag, thread_tag
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware, create_memory_tools
from llama_index_kvzip import KVzipChatEngine, KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine, KVzipSynthesizer
from llama_index_kvzip.messages import CONTEXT_KEY

QUESTION = "Who?"
FEW = {"max_new_tokens": 3}


@dataclass
class Things:
    """What a tenant has, and all that another may know or hold of it."""

    engine: KVzipEngine
    handle: CompressedContext
    child: CompressedContext
    session: Session
    name: str
    tag: str
    session_id: str
    document: str
    saved: Path
    damaged: str

    @property
    def key(self) -> str:
        return self.handle.key

    @property
    def references(self) -> list[str]:
        return [self.name, self.key, self.key[:8], self.key[:12], self.child.key, self.tag, self.session_id]

    @property
    def typed(self) -> list[str]:
        return [self.name, self.key, self.key[:8]]

    @property
    def stored(self) -> str:
        """In the folder."""
        return f"contexts/blobs/{self.key[:2]}/{self.key}.safetensors"

    @property
    def secrets(self) -> dict[str, str]:
        """What tells of them, and what stands for it where two answers are compared; the longest first."""
        told = {
            self.key: "KEY",
            self.child.key: "CHILD",
            self.key[:12]: "DIGITS",
            self.child.key[:12]: "CHILD'S DIGITS",
            self.key[:8]: "FEW DIGITS",
            self.stored: "STORED",
            str(self.saved): "SAVED",
            self.name: "NAME",
            self.tag: "TAG",
            self.session_id: "SESSION",
            self.document: "DOCUMENT",
            self.damaged: "DAMAGED",
        }
        return dict(sorted(told.items(), key=lambda item: -len(item[0])))


def things(engine: KVzipEngine, folder: Path, who: str) -> Things:
    """All that a tenant can have; ``who`` is of three letters, so that two tenants' are of one size."""
    tag, session_id = thread_tag(who), f"session of {who}"
    handle = engine.load(f"{who} {TEXT}", name=f"diary of {who}", tags=[tag, document_tag(who)])
    talk = engine.load([{"role": "user", "content": f"I am {who}."}, {"role": "assistant", "content": "Hello."}], tags=tag)
    child = engine.extend(talk, [{"role": "user", "content": "And I like tea."}], name=f"talk of {who}", tags=tag, share=True)
    session = engine.session(handle)
    session.ask(QUESTION, **FEW)
    create_memory_tools(engine)[0].invoke({"name": f"page of {who}", "text": f"{who}'s page. " * 9})
    record = {"turns": [{"role": "user", "content": f"{who} was here."}]}
    said = turns.TurnsFile.of(engine.cache_dir, engine.registry.tenant, "history", session_id)  # type: ignore[arg-type]
    said.append(record, f"memory history: {session_id}", None)
    saved = handle.save(folder / f"{who}.safetensors")
    bad = engine.load(f"Damaged. {who} {TEXT}", tags=tag)
    engine.registry.flush()
    disk = engine.registry._backing.tier
    assert disk is not None
    blob = disk.folder.path(bad.key)
    blob.write_bytes(blob.read_bytes()[:-9])
    assert engine.registry.verify(bad.key)
    return Things(engine, handle, child, session, f"diary of {who}", tag, session_id, f"page of {who}", saved, bad.key)


@dataclass
class Other:
    """The one who calls, and all ways it has; what it has itself is as much."""

    engine: KVzipEngine
    folder: Path
    model: Path
    own: CompressedContext = None  # type: ignore[assignment]

    def begin(self) -> None:
        """Have one context and nothing else, as before whatever was tried."""
        for entry in self.registry.contexts():
            if ([*entry.names], entry.tags, entry.pinned) != (["own"], ("own",), False):
                self.registry.remove(entry.key)
        if not self.registry.contexts():
            self.own = self.engine.load(TEXT, name="own", tags="own")
            self.registry.flush()

    @property
    def registry(self) -> ContextRegistry:
        return self.engine.registry

    @property
    def chat(self) -> KVzipChatModel:
        return KVzipChatModel(engine=self.engine, max_tokens=3, contexts_by_name=True)

    @property
    def llm(self) -> KVzipLLM:
        return KVzipLLM(engine=self.engine, max_tokens=3, contexts_by_name=True)

    @property
    def block(self) -> KVzipMemoryBlock:
        return KVzipMemoryBlock(llm=self.llm)

    def command(self, *args: str) -> Any:
        done = CliRunner().invoke(app, [*args, "--cache-dir", str(self.folder), "--json"], env={"KVZIP_MEMORY_TENANT": "bob"})
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, re.sub(r'"(ms|used|created)": (\{[^}]*\}|"[^"]*")', "", done.output)


@dataclass
class World:
    a: Things
    never: Things
    b: Other
    before: dict[str, Any]  # all that the first has


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two tenants of one process, one model and one folder; and the things of a third who never was there."""
    folder, elsewhere = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("elsewhere")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ann, eve = (KVzipEngine(model, tokenizer, 0.4, cache_dir=path, tenant=who) for path, who in ((folder, "ann"), (elsewhere, "eve")))
    bob = KVzipEngine(model, tokenizer, 0.4, cache_dir=folder, tenant="bob")
    model.save_pretrained(elsewhere / "model")
    tokenizer.save_pretrained(elsewhere / "model")
    (elsewhere / "page.txt").write_text(TEXT)
    a, never = things(ann, elsewhere, "ann"), things(eve, elsewhere, "eve")
    yield World(a, never, Other(bob, folder, elsewhere / "model"), state(a))
    for engine in (ann, eve, bob):
        engine.close()


# -- what is seen ------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """What a caller learns of a result."""
    if isinstance(value, CompressedContext):
        return ["context", value.key, value.name, value.n_tokens, plain(value.sources)]
    if isinstance(value, Reply):
        return ["reply", value.text, value.receipt.key]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(each) for name, each in asdict(value).items() if name != "used"}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return re.sub(r" at 0x[0-9a-f]+", "", str(getattr(value, "content", value)))


def outcome(call: Callable[[], Any]) -> str:
    try:
        value = call()
        return json.dumps(["returned", plain([*value] if isinstance(value, Iterator) else value)], default=str)
    except Exception as error:
        return json.dumps(["raised", type(error).__name__, str(error)])


def without(said: str, of: Things) -> str:
    for told, stands in of.secrets.items():
        said = said.replace(json.dumps(told)[1:-1], stands)
    return said


def state(of: Things) -> dict[str, Any]:
    """All that a tenant has, as it is in the folder and as its engine tells it."""
    registry, folder = of.engine.registry, of.engine.cache_dir
    registry.flush()
    assert folder is not None
    entries = {entry.key: {**asdict(entry), "used": 0} for entry in registry.contexts()}
    mine = [session for session in turns.sessions(folder) if turns.is_of(folder, session, registry.tenant)]
    disk = registry._backing.tier
    assert disk is not None
    return {
        "entries": entries,
        "tiers": {key: registry.tiers(key) for key in entries},
        "files": {key: disk.folder.path(key).read_bytes() for key in entries if disk.has(key)},
        "quarantine": registry.quarantine(),
        "left": {held.key: {*registry._backing.notes().left(held.key, held.tags)} for held in registry._memory.in_memory()},
        "name": of.engine.get(of.name).key,
        "removed": [registry.is_removed(key) for key in entries],
        "turns": [session.file.path.read_bytes() for session in mine],
        "documents": create_memory_tools(of.engine)[1].invoke({}),
    }


# -- the ways in -------------------------------------------------------------------------------------------------------


def each(call: Callable[[Any], Any], values: Iterable[Any]) -> Any:
    return [outcome(partial(call, value)) for value in values]


def block(reference: str) -> HumanMessage:
    return HumanMessage([{"type": "file", "file_id": reference}, {"type": "text", "text": QUESTION}])


def blocks(b: Other, x: Things, ask: Callable[[Any, Any], Any] = lambda model, messages: model.invoke(messages)) -> Any:
    return each(lambda reference: ask(b.chat, [block(reference)]), x.references)


def told(reference: str) -> list[ChatMessage]:
    return [ChatMessage("", role="system", additional_kwargs={CONTEXT_KEY: reference}), ChatMessage(QUESTION)]


def run(work: Any) -> Any:
    import asyncio

    async def wait() -> Any:
        found = await work()
        return [piece async for piece in found] if hasattr(found, "__aiter__") else found

    return asyncio.run(wait())


Way = Callable[[Other, Things], Any] | None

#: Takes nothing of another's, and gives nothing of what is stored.
NOTHING: Way = None

WAYS: dict[type, dict[str, Way]] = {
    KVzipEngine: {
        "aextend": lambda b, x: run(lambda: b.engine.aextend(x.handle, "More.")),
        "aforget": lambda b, x: run(lambda: b.engine.aforget(x.tag)),
        "agenerate": lambda b, x: run(lambda: b.engine.agenerate(x.handle, QUESTION, **FEW)),
        "ajoin": lambda b, x: run(lambda: b.engine.ajoin([x.handle, x.handle])),
        "aload": lambda b, x: run(lambda: b.engine.aload(TEXT, name=x.name)),
        "cache_dir": NOTHING,
        "close": NOTHING,
        "count_tokens": NOTHING,
        "extend": lambda b, x: each(lambda c: b.engine.extend(c, "More."), [x.handle, x.child, x.session.context]),
        "fingerprint": NOTHING,
        "forget": lambda b, x: each(b.engine.forget, [x.tag, document_tag("ann"), *x.references, f"memory history: {x.session_id}"]),
        "from_pretrained": NOTHING,
        "generate": lambda b, x: each(lambda c: b.engine.generate(c, QUESTION, **FEW), [x.handle, x.child]),
        "join": lambda b, x: each(lambda c: b.engine.join([c, c]), [*x.references, x.handle, x.child]),
        "get": lambda b, x: each(b.engine.get, x.references),
        "guidance": NOTHING,
        "leave_behind": lambda b, x: each(lambda key: b.engine.leave_behind(key, [x.tag]), [x.key, x.child.key]),
        "load": lambda b, x: [
            b.engine.load(TEXT, name=x.name, tags=[x.tag, x.key]),
            outcome(lambda: b.engine.load(TEXT, name=x.key)),
            b.engine.load(TEXT, name=x.key[:12]),
            b.engine.get(x.key[:12]),
            outcome(lambda: b.engine.get(x.key)),
        ],
        "load_marked": lambda b, x: b.engine.load_marked(
            [{"role": "user", "content": [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}]}], tags=x.tag
        ),
        "loads": NOTHING,
        "logits": lambda b, x: b.engine.logits(x.handle, [5]),
        "max_running": NOTHING,
        "model": NOTHING,
        "one_context": lambda b, x: each(lambda r: b.engine.one_context([r], by_name=True), [*x.references, x.handle])
        + each(lambda r: b.engine.one_context([b.own, r], by_name=False), [x.key, x.handle]),
        "open": lambda b, x: each(b.engine.open, [b.folder / x.stored, x.saved]),
        "places": NOTHING,
        "prompt_ids": lambda b, x: b.engine.prompt_ids(x.handle, QUESTION),
        "ratio": NOTHING,
        "read_calls": NOTHING,
        "registry": NOTHING,
        "relevance": lambda b, x: b.engine.relevance([(x.handle, [(0, 5)])], QUESTION),
        "session": lambda b, x: each(lambda c: b.engine.session(c).ask(QUESTION, **FEW), [x.handle, x.session.context]),
        "shared": lambda b, x: b.engine.shared.keys(),
        "stats": lambda b, x: b.engine.stats()["tiers"],
        "stored_prefix": lambda b, x: b.engine.stored_prefix([*x.handle.token_ids.tolist(), 5]),
        "stream": lambda b, x: b.engine.stream(x.handle, QUESTION, **FEW),
        "text_ids": NOTHING,
        "token_offsets": NOTHING,
        "tokenizer": NOTHING,
        "tool_form": NOTHING,
        "window": NOTHING,
    },
    ContextRegistry: {
        "check_changeable": NOTHING,
        "check_disk": NOTHING,
        "checksums": NOTHING,
        "check_fits": NOTHING,
        "close": NOTHING,
        "contexts": lambda b, x: [entry.tenant for entry in b.registry.contexts()],
        "device": NOTHING,
        "find": lambda b, x: each(b.registry.find, x.references),
        "flush": NOTHING,
        "forget": lambda b, x: [len(b.registry.forget(let_go).deleted) for let_go in (lambda key, tag: tag != "own", Naming(x.tag))],
        "gc": lambda b, x: b.registry.gc(),
        "at_once": NOTHING,
        "guest": NOTHING,
        "wait_for_room": NOTHING,
        "is_empty": lambda b, x: b.registry.is_empty(),
        "is_held": NOTHING,
        "is_removed": lambda b, x: each(b.registry.is_removed, x.references),
        "join": lambda b, x: each(lambda key: b.registry.join(key, ["bob's"]), [x.key, x.child.key]),
        "lease": lambda b, x: leased(b, x),
        "leave": lambda b, x: each(lambda key: b.registry.leave(key, [x.tag, document_tag("ann")]), [x.key, x.child.key]),
        "loaded": lambda b, x: each(b.registry.loaded, x.references),
        "longest_prefix": lambda b, x: b.registry.longest_prefix(x.handle.identity, [*x.handle.token_ids.tolist(), 5]),
        "looked_up": lambda b, x: each(b.registry.looked_up, x.references),
        "no_disk": NOTHING,
        "one": lambda b, x: each(b.registry.one, x.references),
        "pin": lambda b, x: each(b.registry.pin, x.references),
        "quarantine": lambda b, x: b.registry.quarantine(),
        "readmit": lambda b, x: each(b.registry.readmit, [x.key, x.child.key]),
        "remove": lambda b, x: each(b.registry.remove, x.references),
        "stats": lambda b, x: b.registry.stats()["tiers"],
        "tenant": NOTHING,
        "tiers": lambda b, x: each(b.registry.tiers, x.references),
        "ttl": NOTHING,
        "untag": lambda b, x: each(lambda key: b.registry.untag(key, x.tag), [x.key, x.child.key]),
        "use_again": lambda b, x: each(b.registry.use_again, x.references),
        "verify": lambda b, x: each(b.registry.verify, x.references),
        "write": NOTHING,
        "with_room": lambda b, x: b.registry.with_room(
            Wanted(x.key, x.handle.identity, "0" * 64, x.name, (x.tag,))
        ) == Wanted(x.key, x.handle.identity, "0" * 64, x.name, (x.tag,)),
    },
    # What the holder of an object reads of it is in his hands; given to an engine of another tenant it is of no use.
    CompressedContext: {
        "all_parts": lambda b, x: each(b.registry.find, [part.key for part in x.child.all_parts]),
        "as_block": lambda b, x: b.chat.invoke([HumanMessage([x.handle.as_block(), {"type": "text", "text": QUESTION}])]),
        "coarsest": NOTHING,
        "codec": NOTHING,
        "created": NOTHING,
        "dense_nbytes": NOTHING,
        "expires": NOTHING,
        "fitted": NOTHING,
        "states": NOTHING,
        "identity": lambda b, x: b.registry.longest_prefix(x.handle.identity, [*x.handle.token_ids.tolist(), 5]),
        "is_one": NOTHING,
        "is_shareable": NOTHING,
        "kept_pairs": NOTHING,
        "key": lambda b, x: b.engine.get(x.handle.key),
        "layers": NOTHING,
        "lease": lambda b, x: leased(b, x),
        "n_tokens": NOTHING,
        "name": lambda b, x: b.engine.get(x.name),
        "nbytes": NOTHING,
        "parts": lambda b, x: each(b.registry.find, [part.key for part in x.child.parts]),
        "protected": NOTHING,
        "ratio": NOTHING,
        "receipt": lambda b, x: b.engine.get(x.handle.receipt.key),  # type: ignore[union-attr, arg-type]
        "recipe": NOTHING,
        "save": lambda b, x: b.engine.open(x.saved),
        "shared_nbytes": NOTHING,
        "shift": NOTHING,
        "nearer": NOTHING,
        "saved": NOTHING,
        "positions": NOTHING,
        "shifts": NOTHING,
        "shared_tokens": NOTHING,
        "sources": NOTHING,
        "storage": lambda b, x: leased(b, x),
        "token_ids": lambda b, x: b.engine.generate(None, x.handle.token_ids.tolist(), **FEW),  # type: ignore[arg-type]
        "total_pairs": NOTHING,
    },
    Session: {
        "ask": lambda b, x: b.engine.generate(x.session, QUESTION, **FEW),  # type: ignore[arg-type]
        "context": lambda b, x: b.engine.session(x.session.context),
        "fold": lambda b, x: b.engine.extend(x.session, "More."),  # type: ignore[arg-type]
        "fork": lambda b, x: b.engine.session(x.session.fork()),  # type: ignore[arg-type]
        "n_tokens": NOTHING,
        "reset": NOTHING,
        "stream": NOTHING,
        "stream_ids": NOTHING,
    },
    Memory: {"recall": lambda b, x: recalled(b, x)},
    KVzipChatModel: {
        "aload_documents": lambda b, x: run(lambda: b.chat.aload_documents(TEXT, name=x.name)),
        "behind": NOTHING,
        "bind_tools": NOTHING,
        "cache_dir": NOTHING,
        "context": lambda b, x: KVzipChatModel(engine=b.engine, context=x.handle, max_tokens=3).invoke(QUESTION),
        "contexts_by_name": lambda b, x: each(
            lambda r: KVzipChatModel(engine=b.engine, max_tokens=3).invoke([block(r)]), x.references
        ),
        "engine": NOTHING,
        "engines": NOTHING,
        "get_num_tokens_from_messages": lambda b, x: b.chat.get_num_tokens_from_messages([block(x.key)]),
        "get_token_ids": NOTHING,
        "given_engine": NOTHING,
        "load_documents": lambda b, x: [b.chat.load_documents(TEXT, name=x.name), outcome(lambda: b.chat.load_documents(TEXT, name=x.key))],
        "max_tokens": NOTHING,
        "model_kwargs": NOTHING,
        "model_name": NOTHING,
        "no_repeat_ngram_size": NOTHING,
        "ratio": NOTHING,
        "repetition_penalty": NOTHING,
        "reuse": lambda b, x: b.chat.invoke(f"{x.name[-3:]} {TEXT}").usage_metadata["input_token_details"],  # type: ignore[index]
        "seed": NOTHING,
        "stop": NOTHING,
        "streaming": NOTHING,
        "temperature": NOTHING,
        "tool_call_parser": NOTHING,
        "top_k": NOTHING,
        "top_p": NOTHING,
        "with_context": lambda b, x: each(lambda r: b.chat.with_context(r).invoke(QUESTION), [*x.references, x.handle])
        + each(lambda r: b.chat.with_context([b.own, r]).invoke(QUESTION), [*x.references, x.handle]),
        "with_structured_output": lambda b, x: b.chat.with_structured_output({"type": "string"}).invoke([block(x.key)]),
        # LangChain's own
        "abatch": lambda b, x: run(lambda: b.chat.abatch([[block(x.key)]])),
        "ainvoke": lambda b, x: run(lambda: b.chat.ainvoke([block(x.key)])),
        "astream": lambda b, x: run(lambda: achieved(b.chat.astream([block(x.key)]))),
        "batch": lambda b, x: b.chat.batch([[block(x.key)]]),
        "invoke": lambda b, x: blocks(b, x),
        "stream": lambda b, x: blocks(b, x, lambda model, messages: list(model.stream(messages))),
    },
    KVzipMemoryMiddleware: {
        "aforget": lambda b, x: run(lambda: KVzipMemoryMiddleware().aforget(x.tag.removeprefix("thread: "), b.chat)),
        "awrap_model_call": NOTHING,  # as wrap_model_call, whose _recalled it has
        "forget": lambda b, x: each(lambda t: KVzipMemoryMiddleware().forget(t, b.chat), [x.tag.removeprefix("thread: "), x.name]),
        "state_schema": NOTHING,
        "trace_policy": NOTHING,
        "wrap_model_call": lambda b, x: recalled(b, x),
    },
    KVzipLLM: {
        "achat": lambda b, x: run(lambda: b.llm.achat(told(x.key))),
        "acomplete": lambda b, x: run(lambda: b.llm.with_context(x.handle).acomplete(QUESTION)),
        "astream_chat": lambda b, x: run(lambda: b.llm.astream_chat(told(x.key))),
        "astream_complete": lambda b, x: run(lambda: b.llm.with_context(x.handle).astream_complete(QUESTION)),
        "chat": lambda b, x: each(lambda r: b.llm.chat(told(r)), x.references),
        "class_name": NOTHING,
        "complete": lambda b, x: b.llm.with_context(x.handle).complete(QUESTION),
        "context": lambda b, x: KVzipLLM(engine=b.engine, context=x.handle).complete(QUESTION),
        "custom_model_dump": NOTHING,
        "get_tool_calls_from_response": NOTHING,
        "metadata": NOTHING,
        "stream_chat": lambda b, x: each(lambda r: list(b.llm.stream_chat(told(r))), x.references),
        "stream_complete": lambda b, x: list(b.llm.with_context(x.handle).stream_complete(QUESTION)),
        "stream_options": NOTHING,
        **dict.fromkeys(
            [
                "cache_dir", "contexts_by_name", "engine", "given_engine", "max_tokens", "model", "model_kwargs", "no_repeat_ngram_size",
                "ratio", "repetition_penalty", "reuse", "seed", "stop", "temperature", "top_k", "top_p",
            ],
            NOTHING,
        ),
        "with_context": lambda b, x: each(lambda r: b.llm.with_context(r).complete(QUESTION), [*x.references, x.handle])
        + each(lambda r: b.llm.with_context([b.own, r]).complete(QUESTION), [*x.references, x.handle]),
    },
    KVzipMemoryBlock: {
        "context": lambda b, x: each(lambda s: b.block.context(s), [x.session_id, x.tag]),
        "context_tokens": NOTHING,
        "forget": lambda b, x: each(lambda s: b.block.forget(s), [x.session_id, x.tag]),
        "llm": NOTHING,
        "name": lambda b, x: KVzipMemoryBlock(llm=b.llm, name=x.name).context(x.session_id),
        "ratio": NOTHING,
        # LlamaIndex' own
        "aget": lambda b, x: run(lambda: b.block.aget(session_id=x.session_id)),
    },
    KVzipQueryEngine: {
        "from_context": lambda b, x: each(
            lambda mode: KVzipQueryEngine.from_context(x.handle, [TextNode(text=TEXT)], llm=b.llm, response_mode=mode).query(QUESTION),
            ["compact", "no_text", "context_only"],
        ),
        "from_documents": lambda b, x: each(
            lambda name: KVzipQueryEngine.from_documents([TextNode(text=TEXT, id_="1")], llm=b.llm, name=name).query(QUESTION).response,
            [x.name, x.key],
        ),
    },
    KVzipChatEngine: {
        "from_context": lambda b, x: KVzipChatEngine.from_context(x.handle, [TextNode(text=TEXT)], llm=b.llm).chat(QUESTION),
        **dict.fromkeys(["achat", "astream_chat", "chat", "from_defaults", "reset", "stream_chat"], NOTHING),
    },
    # Its texts are those of the storage context that it is given.
    KVzipIndex: dict.fromkeys(
        [
            "adelete_nodes", "adelete_ref_doc", "ainsert", "ainsert_nodes", "arefresh_ref_docs", "as_chat_engine", "as_query_engine",
            "build_index_from_nodes", "forget",
            "as_retriever", "aupdate_ref_doc", "delete_nodes", "delete_ref_doc", "from_documents", "from_storage", "index_struct_cls",
            "insert", "insert_nodes", "parts", "ref_doc_info", "refresh_ref_docs", "set_index_id", "update_ref_doc",
        ],
        NOTHING,
    ),
    KVzipSynthesizer: {
        "forget": lambda b, x: each(KVzipSynthesizer(llm=b.llm).forget, [x.document, "ann", x.name]),
        **dict.fromkeys(["aget_response", "asynthesize", "get_response", "synthesize"], NOTHING),
    },
}  # fmt: skip

TOOLS: dict[str, Way] = {
    "load_document": lambda b, x: create_memory_tools(b.engine)[0].invoke({"name": x.document, "text": TEXT}),
    "list_documents": lambda b, x: create_memory_tools(b.engine)[1].invoke({}),
    "ask_document": lambda b, x: each(
        lambda name: create_memory_tools(b.engine, namespace="b")[2].invoke({"name": name, "question": QUESTION}),
        [x.document, [x.document], [x.key]],
    ),
    "forget_document": lambda b, x: create_memory_tools(b.engine, namespace="b")[3].invoke({"name": x.document}),
}

#: Of the whole folder, for operators.
FOLDER = {"gc", "stats", "doctor", "conversions"}

COMMANDS: dict[str, Way] = {
    "load": lambda b, x: b.command("load", str(b.model.parent / "page.txt"), "--model", str(b.model), "--name", x.name)[0],
    "ls": lambda b, x: [*each(lambda tag: b.command("ls", "--tag", tag), [x.tag, x.key]), len(json.loads(b.command("ls")[1]))],
    "show": lambda b, x: each(lambda r: b.command("show", r), x.typed),
    "pin": lambda b, x: each(lambda r: b.command("pin", r), x.typed),
    "unpin": lambda b, x: each(lambda r: b.command("unpin", r), x.typed),
    "rm": lambda b, x: (
        each(lambda r: b.command("rm", r), [*x.typed, f"memory history: {x.session_id}"])
        + each(lambda tag: b.command("rm", "--tag", tag), [x.tag, f"memory history: {x.session_id}"])
    ),
    "sessions": lambda b, x: b.command("sessions"),
    "verify": lambda b, x: [b.command("verify"), *each(lambda r: b.command("verify", r), x.typed)],
    **dict.fromkeys(FOLDER, NOTHING),
}


async def achieved(pieces: Any) -> Any:
    return [piece async for piece in pieces]


def leased(b: Other, x: Things) -> Any:
    """What another's handle asks its registry for, asked of one's own."""
    wanted: Wanted = x.handle.storage.step.wanted  # type: ignore[attr-defined]

    def build(report: Any) -> Any:
        raise KeyError("nothing is there")

    with b.registry.lease(wanted, build) as (context, _):
        return context


def recalled(b: Other, x: Things) -> Any:
    memory, handle = Memory(("messages", 2), ("messages", 1)), {"key": x.key, "messages": 1, "front": ""}
    said = [{"role": "user", "content": "Hello."}]
    return [outcome(lambda: memory.recall(b.engine, said, base=x.handle).context), memory.recall(b.engine, said, handle=handle).context]


CASES: dict[str, Way] = {
    **{f"{kind.__name__}.{name}": way for kind, ways in WAYS.items() for name, way in ways.items()},
    **{f"tool {name}": way for name, way in TOOLS.items()},
    **{f"command {name}": way for name, way in COMMANDS.items()},
}


# -- tests ---------------------------------------------------------------------------------------------------------------


def public(kind: type, world: World) -> set[str]:
    """Names of what a class has, with its fields; of one that is built upon a framework's, what is ours, and what it is asked by."""
    framework = [base for base in kind.__mro__[1:] if base.__module__.split(".")[0] in ("langchain", "langchain_core", "llama_index")]
    if framework:
        asked = {"invoke", "ainvoke", "stream", "astream", "batch", "abatch"} if issubclass(kind, Runnable) else {"aget"}
        ours = [base for base in kind.__mro__ if base.__module__.split(".")[0] == kind.__module__.split(".")[0]]
        names = {name for base in ours for name in (*vars(base), *inspect.get_annotations(base))} | (asked & {*dir(framework[0])})
    else:
        instances = {
            KVzipEngine: world.b.engine,
            ContextRegistry: world.b.registry,
            CompressedContext: world.a.handle,
            Session: world.a.session,
        }
        names = {*dir(kind), *vars(instances.get(kind, kind))}
    return {name for name in names if not name.startswith(("_", "model_")) or name in ("model_name", "model_kwargs")}


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_every_public_member_is_in_the_table(world: World, kind: type) -> None:
    assert public(kind, world) == WAYS[kind].keys()


def test_every_class_tool_and_command_is_in_a_table(world: World) -> None:
    shown = [getattr(module, name) for module in (langchain_kvzip, llama_index_kvzip) for name in module.__all__]
    assert {kind for kind in shown if inspect.isclass(kind)} <= WAYS.keys()
    assert {made for made in shown if not inspect.isclass(made)} == {create_memory_tools}
    assert {tool.name for tool in create_memory_tools(world.b.engine)} == TOOLS.keys()
    commands = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}  # type: ignore[union-attr]
    assert commands.keys() == COMMANDS.keys()
    assert {name for name, command in commands.items() if "tenant" not in inspect.signature(command).parameters} == FOLDER  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [name for name, way in CASES.items() if way is not NOTHING])
def test_another_s_things_are_as_what_never_existed(world: World, case: str, caplog: pytest.LogCaptureFixture) -> None:
    way, b = CASES[case], world.b
    assert way is not None
    caplog.set_level(logging.DEBUG)
    said = []
    for x in (world.never, world.a):
        b.begin()
        caplog.clear()
        answer = without(outcome(partial(way, b, x)), x)
        b.registry.flush()
        said.append((answer, [without(record.getMessage(), x) for record in caplog.records if "kvzip" in record.name]))
    assert said[0] == said[1]
    assert state(world.a) == world.before


def test_what_tells_of_the_whole_folder_names_nobody_s_things(world: World) -> None:
    b = world.b
    b.begin()
    told = [b.command(name) for name in sorted(FOLDER)]
    told += [b.engine.stats(), b.registry.stats(), b.registry.gc(), str(examine(b.folder / "contexts"))]
    assert not [secret for secret in world.a.secrets if secret in str(told)]


def test_all_is_there_and_answers_when_another_has_tried_everything(world: World) -> None:
    a = world.a
    expected = tiny_engine(ratio=0.4, tenant="ann", codec="auto")
    handle = expected.load(f"ann {TEXT}")
    assert handle.key == a.key
    assert a.engine.generate(a.engine.get(a.name), QUESTION, **FEW).text == expected.generate(handle, QUESTION, **FEW).text
    assert a.session.ask("And?", **FEW).finish_reason == "length"
    later = KVzipEngine(a.engine.model, a.engine.tokenizer, 0.4, cache_dir=a.engine.cache_dir, tenant="ann")
    assert later.get(a.name).key == later.get(a.key[:8]).key == a.key
    assert later.generate(later.get(a.key), QUESTION, **FEW).receipt.tier in ("device", "disk")
    assert a.engine.forget(a.tag).deleted


# -- what is said of damage ----------------------------------------------------------------------------------------------


def damage_a_row(prefix: str, contexts: Path) -> None:
    with closing(sqlite3.connect(contexts / "index/cache.db")) as db, db:
        db.execute("UPDATE Cache SET value = value || ' ' WHERE substr(key, 1, ?) = ?", (len(prefix), prefix))


def break_a_file(contexts: Path, *, indexed: bool) -> None:
    for path in blobs(contexts):
        path.write_bytes(path.read_bytes()[:5000])
    if not indexed:
        shutil.rmtree(contexts / "index")


def exchange_files(contexts: Path) -> None:
    one, other = blobs(contexts)
    shutil.copy(one, other)
    shutil.rmtree(contexts / "index")


def share_a_file(contexts: Path) -> None:
    next(blobs(contexts)).chmod(0o666)


ROWS = ["context:", "group:", "tokens:", "beginning:", "catalog:", "bad:", "lost:", "totals"]
DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"row {prefix}": partial(damage_a_row, prefix) for prefix in ROWS},
    "file": partial(break_a_file, indexed=True),
    "file without a row": partial(break_a_file, indexed=False),
    "files of each other's names": exchange_files,
    "a file that others can write": share_a_file,
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A folder with a row of every kind, all of them a tenant's; and its keys."""
    cache = tmp_path_factory.mktemp("ann's")
    engine = tiny_engine(cache_dir=cache, tenant="ann")
    keys = {engine.load(f"{number} {TEXT}", name=f"page {number}", tags="all").key for number in range(3)}
    bad = min(keys)
    disk = engine.registry._backing.tier
    assert disk is not None
    engine.registry.flush()
    disk.folder.path(bad).write_bytes(b"nothing")
    assert engine.registry.verify(bad)
    with disk._keeper.opened().transaction():
        disk._keeper.opened().index.set(f"catalog:{max(keys)}", {})
    engine.close()
    with closing(sqlite3.connect(cache / "contexts/index/cache.db")) as db:
        there = [key for (key,) in db.execute("SELECT key FROM Cache")]
    assert {key[: key.find(":") + 1] or key for key in there} == {*ROWS}
    return cache, keys


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("tenant", ["bob", None])
def test_what_is_damaged_of_another_is_told_without_its_key(
    damaged: tuple[Path, set[str]], case: str, tenant: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is logged or answered, by any thread; operators hear of the key."""
    (folder, keys), cache = damaged, tmp_path / "cache"
    shutil.copytree(folder, cache)
    DAMAGE[case](cache / "contexts")
    shutil.copytree(cache, again := tmp_path / "again")
    caplog.set_level(logging.DEBUG)
    engine = tiny_engine(cache_dir=cache, tenant=tenant)
    registry = engine.registry
    calls: list[Callable[[], Any]] = [
        lambda: engine.load(TEXT, name="mine", tags="all").receipt,
        *(registry.contexts, registry.flush, registry.quarantine, lambda: engine.forget("all"), registry.gc, engine.stats),
        *(lambda: registry.no_disk, engine.close),
    ]
    said = [outcome(call) for call in calls]
    said += [record.getMessage() for record in caplog.records if "kvzip" in record.name]
    assert not [line for line in said for key in keys if key[:12] in line]
    caplog.clear()
    operators = ContextRegistry(torch.device("cpu"), again / "contexts", tenant=EVERYONE)
    told = [str(operators.no_disk), *map(str, operators.quarantine())]
    operators.close()
    told += [record.getMessage() for record in caplog.records if "kvzip" in record.name]
    assert [line for line in told for key in keys if key in line]


def test_what_is_in_the_folder_and_not_one_s_own_is_opened_like_what_is_not_there(damaged: tuple[Path, set[str]], tmp_path: Path) -> None:
    """Of every file of every kind, sound, damaged at any place, of another tenant or of none's, by whatever path."""
    cache = tmp_path / "cache"
    shutil.copytree(damaged[0], cache)
    ann, bob = (tiny_engine(cache_dir=cache, tenant=who) for who in ("ann", "bob"))
    own = bob.load(TEXT, name="mine")
    for engine in (ann, bob):
        turns.TurnsFile.of(cache, engine.registry.tenant, "history", "s").append({"turns": []}, "memory history: s", None)
        engine.registry.flush()
    disk = bob.registry._backing.tier
    assert disk is not None
    path = disk.folder.path(own.key)
    assert bob.open(path).key == own.key
    everything = {each for each in cache.rglob("*") if each != path}
    assert {each.parent.name for each in everything} >= {"contexts", "names", "memory", "locks", "index", "quarantine"}
    (tmp_path / "link").symlink_to(cache)
    for stored in sorted(everything):
        for each in (stored, tmp_path / "link" / stored.relative_to(cache), cache / "memory" / ".." / stored.relative_to(cache)):
            with pytest.raises(FileNotFoundError) as told:
                bob.open(each)
            assert type(told.value) is FileNotFoundError
            assert str(told.value) == f"[Errno 2] No such file or directory: '{each}'"
    body = path.read_bytes()
    for damage in range(0, len(body), len(body) // 40):
        for changed, errors in ((body[:damage], (FileNotFoundError,)), (flipped(body, damage), (FileNotFoundError, CorruptFileError))):
            path.write_bytes(changed)
            with pytest.raises(errors):
                bob.open(path)
    path.write_bytes(flipped(body, len(body) // 2))
    with pytest.raises(CorruptFileError):  # whose header says whose it is
        bob.open(path)
    with pytest.raises(FileNotFoundError):
        ann.open(path)
    for engine in (ann, bob):
        engine.close()


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


# -- one by one ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notes", [1000, 2])
def test_who_forgets_a_tag_forgets_it_for_no_other_tenant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: int) -> None:
    monkeypatch.setattr(forgotten, "_LIMIT", notes)
    ann, bob = (tiny_engine(cache_dir=tmp_path, ratio=0.4, tenant=who) for who in ("ann", "bob"))
    context = ann.load(TEXT, tags=["thread: 1"])
    ann.registry.flush()
    for tag in ("thread: 1", "thread: 2", "thread: 3", "thread: 4"):
        bob.forget(tag)
    DiskTier(tmp_path / "contexts").remove(context.key)  # to make room
    assert [entry.tags for entry in ann.registry.contexts()] == [("thread: 1",)]  # in memory alone
    operator = ContextRegistry(torch.device("cpu"), tmp_path / "contexts", tenant=EVERYONE)
    operator.forget(Naming("thread: 1"))
    assert ann.registry.contexts() == []  # nobody holds it


def test_a_name_is_no_key_and_a_whole_key_is_no_name(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    key, other = engine.load(TEXT).key, engine.load(f"Other. {TEXT}")
    for name in (key, other.key, 64 * "0"):
        for give in (lambda name: engine.load(TEXT, name=name), lambda name: engine.extend(other, "More.", name=name)):
            with pytest.raises(InputError, match="has the form of a key; put something before its 64 digits"):
                give(name)
    engine.load(TEXT, name=f"sha256:{key}")
    assert engine.get(f"sha256:{key}").key == key
    label = engine.registry._backing.names.of(None, f"sha256:{key}")[0]
    engine.registry._backing.names.give(Label(key, None, label.family, other.key))  # by an earlier version
    assert engine.get(key).key == key
    engine.registry.remove(key)
    with pytest.raises(InputError, match=f"no context '{key}'"):
        engine.get(key)


def test_what_is_no_tenant_s_may_be_given_to_every_engine(tmp_path: Path) -> None:
    common, bob = tiny_engine(cache_dir=tmp_path, ratio=0.4), tiny_engine(cache_dir=tmp_path, ratio=0.4, tenant="bob")
    handbook = common.load(TEXT, name="handbook")
    answer = common.generate(handbook, QUESTION, **FEW).text
    for given in (handbook, bob.open(handbook.save(tmp_path / "file"))):
        assert bob.generate(given, QUESTION, **FEW).text == answer
        assert bob.extend(given, "More.").identity["tenant"] == bob.registry.tenant
    for reference in ("handbook", handbook.key):  # but not found
        with pytest.raises(InputError, match="no context"):
            bob.get(reference)
    with pytest.raises(InputError, match="no context"):
        common.generate(bob.load(TEXT), QUESTION)


def test_who_waits_for_a_process_that_is_stopped_builds_at_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4, tenant="bob")
    expected = tiny_engine(ratio=0.4, tenant="bob").load(TEXT)
    engine.registry._memory.wait_s = 0.1
    locks = tmp_path / "contexts" / "locks"
    with FileLock(locks / f"{expected.key[:3]}.lock"):
        (locks / f"{expected.key[:3]}.progress").write_text(json.dumps({"key": 64 * "a", "stage": "theirs", "done": 1, "total": 2}))
        context = engine.load(TEXT)
        engine.registry.flush()
        assert (context.key, context.receipt.tier) == (expected.key, "built")  # type: ignore[union-attr]
        assert engine.registry.tiers(context.key) == ["device", "disk"]
    assert f"context {context.key[:12]} is built here: nothing was heard of it for 0.1 s" in caplog.text
    assert "theirs" not in caplog.text


def test_who_hears_of_the_build_goes_on_waiting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = ContextRegistry(torch.device("cpu"), tmp_path, wait_s=0.0)
    wanted, disk, told = synthetic.wanted(1), registry._backing.tier, list[int]()
    assert disk is not None
    with FileLock(tmp_path / "locks" / f"{wanted.key[:3]}.lock") as lock:
        disk.builders.report(wanted.key, {"stage": "score", "done": 0, "total": 9})

        def waiting(*progress: Any) -> None:
            told.append(progress[1])
            disk.builders.report(wanted.key, {"stage": "score", "done": len(told), "total": 9})
            if len(told) == 4:
                lock.release()

        with registry.lease(wanted, lambda report: synthetic.context(1), waiting):
            pass
    assert told == [0, 1, 2, 3]
    assert "nothing was heard" not in caplog.text


def test_agents_of_two_tenants_do_not_wait_for_each_other(tmp_path: Path) -> None:
    ann, bob = (tiny_engine(cache_dir=tmp_path, ratio=0.4, tenant=who) for who in ("ann", "bob"))
    for engine in (ann, bob):
        create_memory_tools(engine)[0].invoke({"name": "page", "text": TEXT})
    assert len([*(tmp_path / "locks").glob("tools-*.lock")]) == 2
