"""What nobody waits for any more: every async way in, cancelled at every moment, and streams that are left."""

from __future__ import annotations

import _thread
import ast
import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from llama_index.core import Document, PromptTemplate
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import BaseModel

from conftest import ROOT, TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.system.calls import LOOK_S
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware, create_memory_tools
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine, KVzipSynthesizer

SOURCES = [ROOT / "kvzip_memory", ROOT / "integrations"]
DOCUMENTS = [Document(text="The keeper is Oriel. " * 6, doc_id="a"), Document(text=TEXT, doc_id="b")]
THIRD = Document(text="The boat is green. " * 8, doc_id="c")
MARKED = [
    {"role": "user", "content": [{"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Who?"}]}
]
#: What a block of messages says that a middleware is to fold.
TALK = [("user" if i % 2 == 0 else "assistant", f"Line {i}. " + "word " * 12) for i in range(9)]


MODEL = tiny_model(num_hidden_layers=2)


class Lease(BaseModel):
    """Who signed."""

    by: Literal["Ito", "Abe"]


async def read(pieces: Any) -> list[Any]:
    return [piece async for piece in pieces]


async def read_response(response: Awaitable[Any]) -> list[Any]:
    return await read((await response).async_response_gen())


class Made:
    """An engine and what is over it; of the indexes those that a way in names."""

    def __init__(self, way: Callable[[Made], Awaitable[Any]] | None = None) -> None:
        named = ("index", "split") if way is None else way.__code__.co_names
        self.engine = KVzipEngine(MODEL, tiny_tokenizer(), max_running=1)
        self.chat = KVzipChatModel(engine=self.engine, ratio=0.4, max_tokens=12)
        self.llm = KVzipLLM(engine=self.engine, ratio=0.4, max_tokens=12)
        self.context = self.engine.load(TEXT, name="lamp")
        if "index" in named:
            self.index = KVzipIndex.from_documents(DOCUMENTS, llm=self.llm)
        if "split" in named:
            self.split = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=self.llm, context_tokens=450)
        self.nodes = [NodeWithScore(node=TextNode(text=f"Page {i}. " * 20)) for i in range(2)]

    def query(self, **options: Any) -> KVzipQueryEngine:
        return KVzipQueryEngine.from_context(self.context, DOCUMENTS, llm=self.llm, **options)

    def tool(self, name: str) -> Any:
        return next(tool for tool in create_memory_tools(self.engine) if tool.name == name)

    async def retold(self) -> None:
        block = KVzipMemoryBlock(llm=self.llm)
        self.engine.shared.pop("llama_index.memory", None)
        await block.aput([ChatMessage(f"Line {i}.", role="assistant" if i % 2 else "user") for i in range(4)])
        await block.aget()

    async def remembered(self) -> Any:
        memory = Memory.from_defaults(token_limit=200, token_flush_size=50, memory_blocks=[KVzipMemoryBlock(llm=self.llm)])
        for i in range(6):
            await memory.aput(ChatMessage(f"Line {i}. " * 8, role="assistant" if i % 2 else "user"))
        return await self.llm.achat([*await memory.aget(), ChatMessage("Who?")])


def agent(made: Made) -> Any:
    return create_agent(made.chat, tools=[], middleware=[KVzipMemoryMiddleware(trigger=("messages", 4), keep=("messages", 2))])


async def joining(made: Made) -> Any:
    return await made.engine.ajoin([made.context, await made.engine.aload("Another. " * 30, ratio=0.5)])


#: Ways to ask, by every async function of ours that they go through.
WAYS: dict[str, tuple[str, Callable[[Made], Awaitable[Any]]]] = {
    "aload": ("library.aload", lambda made: made.engine.aload("Another. " * 30, ratio=0.5)),
    "aextend": ("library.aextend", lambda made: made.engine.aextend(made.context, [Document(text="And more. " * 30)])),
    "ajoin": ("library.ajoin", joining),
    "agenerate": ("engine.agenerate bridge.result_of bridge.pieces_of", lambda made: made.engine.agenerate(made.context, "word " * 120)),
    "aload_documents": ("chat_models.aload_documents", lambda made: made.chat.aload_documents(["Another. " * 30])),
    "ainvoke": (
        "chat_models._agenerate chat_models._agenerate_with_cache chat_models._astream",
        lambda made: made.chat.with_context(made.context).ainvoke("Who?"),
    ),
    "abatch": ("chat_models.abatch", lambda made: made.chat.with_context(made.context).abatch(["Who?"])),
    "ainvoke with a mark": ("", lambda made: made.chat.ainvoke(MARKED)),
    "astream": ("", lambda made: read(made.chat.astream("Who?"))),
    "structured": (
        "structured._atransform",
        lambda made: read(made.chat.model_copy(update={"max_tokens": 120}).with_structured_output(Lease).astream("Who?")),
    ),
    "middleware": ("middleware.awrap_model_call", lambda made: agent(made).ainvoke({"messages": TALK})),
    "load_document": ("memory_tools.later", lambda made: made.tool("load_document").ainvoke({"name": "x", "text": "Another. " * 30})),
    "achat": ("llm.achat llm._aanswer answers.alast", lambda made: made.llm.achat([ChatMessage("Who?")])),
    "astream_chat": ("llm.astream_chat", lambda made: awaited(made.llm.astream_chat([ChatMessage("Who?")]))),
    "acomplete": ("llm.acomplete", lambda made: made.llm.acomplete("Who?")),
    "astream_complete": ("llm.astream_complete llm.completions", lambda made: awaited(made.llm.astream_complete("Who?"))),
    "astream_structured_predict": (
        "llm._structured_astream_call",
        lambda made: awaited(made.llm.astream_structured_predict(Lease, PromptTemplate("Who?"), {"max_tokens": 120})),
    ),
    "aput": ("memory._aput memory._aget", lambda made: made.retold()),
    "memory": ("", lambda made: made.remembered()),
    "aquery": (
        "query_engine._aquery query_engine._aanswered query_engine._aanswers query_engine._aempty",
        lambda made: made.query().aquery("Who?"),
    ),
    "aquery of several contexts": ("", lambda made: made.split.as_query_engine().aquery("Who?")),
    "aquery with sources": ("", lambda made: made.query(source_top_k=1).aquery("Who?")),
    "streamed aquery": ("", lambda made: read_response(made.query(streaming=True).aquery("Who?"))),
    "object": (
        "structured.ajson_pieces structured._heard structured.get_response",
        lambda made: read_response(made.query(streaming=True, output_cls=Lease, max_tokens=120).aquery("Who?")),
    ),
    "asynthesize": ("synthesizer.asynthesize", lambda made: KVzipSynthesizer(made.llm).asynthesize("Who?", made.nodes)),
    "aget_response": ("synthesizer.aget_response", lambda made: KVzipSynthesizer(made.llm).aget_response("Who?", ["One. " * 20])),
    "aretrieve": ("retriever._aretrieve", lambda made: made.index.as_retriever(source_top_k=1)._aretrieve(QueryBundle("Who?"))),
    "ainsert": ("index.ainsert", lambda made: made.index.ainsert(THIRD)),
    "ainsert_nodes": ("index.ainsert_nodes", lambda made: made.index.ainsert_nodes([TextNode(text=THIRD.text, id_="c/0")])),
    "aupdate_ref_doc": ("index.aupdate_ref_doc", lambda made: made.index.aupdate_ref_doc(Document(text="New. " * 40, doc_id="a"))),
    "arefresh_ref_docs": ("index.arefresh_ref_docs", lambda made: made.index.arefresh_ref_docs([*DOCUMENTS, THIRD])),
    "chat engine": (
        "chat_engine.achat chat_engine._anext chat_engine._aasked chat_engine.aput bridge.finished",
        lambda made: made.index.as_chat_engine().achat("Who?"),
    ),
    **{
        f"chat engine {mode}": ("", lambda made, mode=mode: made.index.as_chat_engine(mode, source_top_k=1).achat("Who?"))
        for mode in ("context", "condense_question", "condense_plus_context")
    },
    "streamed chat engine": (
        "chat_engine.astream_chat chat_engine.write chat_engine.async_response_gen",
        lambda made: told(made.index.as_chat_engine()),
    ),
}
#: These compute nothing.
IDLE = {"index.adelete_nodes", "index.adelete_ref_doc", "library.aforget", "middleware.aforget"}


async def awaited(pieces: Awaitable[AsyncIterator[Any]]) -> list[Any]:
    return await read(await pieces)


async def told(chat_engine: Any) -> list[str]:
    return await read((await chat_engine.astream_chat("Who?")).async_response_gen())


def test_every_async_function_of_ours_is_among_the_ways() -> None:
    ours = set()
    for path in (path for folder in SOURCES for path in folder.rglob("*.py")):
        ours |= {f"{path.stem}.{node.name}" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.AsyncFunctionDef)}
    assert ours == IDLE | {name for names, _ in WAYS.values() for name in names.split()}


@contextmanager
def watched(engine: KVzipEngine, at: Callable[[int], None]) -> Iterator[list[int]]:
    """Numbers of the model's forwards as they begin; ``at`` is called with each."""
    begun: list[int] = []

    def begin(*args: object) -> None:
        begun.append(len(begun))
        at(begun[-1])

    hook = engine.model.base_model.register_forward_pre_hook(begin)
    try:
        yield begun
    finally:
        hook.remove()


BEFORE: set[threading.Thread] = set()


def answering() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(("kvzip-answer", "kvzip-load"))}


@pytest.fixture(autouse=True)
def what_other_tests_have_left() -> None:
    BEFORE.clear()
    BEFORE.update(answering())


def in_use(engine: KVzipEngine) -> dict[str, Any]:
    """Places, leases, builds and threads."""
    registry, model = engine.registry, engine._model
    return {
        "running": model._admission.running,
        "waiting": [*model._admission.waiting, *model.places.waiting, *model.loads.waiting],
        "places": [model.places.running, model.loads.running, model._builders.running],
        "leases": sum(held.users for tier in (registry._memory.device, registry._memory.host) for held in tier.held.values()),
        "flights": list(registry._memory.flights),
        "reserved": [registry._memory.device.reserved, registry._memory.host.reserved],
        "rows": list(model._batcher._waiting),
        "threads": [thread.name for thread in answering() - BEFORE],
    }


NOTHING = {"running": 0, "waiting": [], "places": [0, 0, 0], "leases": 0, "flights": [], "reserved": [0, 0], "rows": [], "threads": []}


async def freed(engine: KVzipEngine) -> None:
    deadline = time.monotonic() + 20
    while in_use(engine) != NOTHING and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
    assert in_use(engine) == NOTHING


async def cancelled_at(made: Made, way: Callable[[Made], Awaitable[Any]], number: int) -> int:
    """Cancel when a forward begins; how many begin after that."""
    loop, gone = asyncio.get_running_loop(), threading.Event()
    task: asyncio.Future[Any] = loop.create_future()

    def at(now: int) -> None:
        if now == number:
            loop.call_soon_threadsafe(task.cancel)
            assert gone.wait(20)

    with watched(made.engine, at) as begun:
        task = asyncio.ensure_future(way(made))
        with pytest.raises(asyncio.CancelledError):
            await task
        gone.set()
        await freed(made.engine)
        return len(begun) - 1 - number


@pytest.mark.parametrize("name", WAYS)
async def test_what_is_cancelled_ends_within_a_forward_at_every_moment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvzip_memory.inference.modeling.CHUNK_TOKENS", 128)  # so that questions and builds take several
    _, way = WAYS[name]
    made = Made(way)
    expected = made.engine.generate(made.context, "Who?", max_new_tokens=6).text
    with watched(made.engine, lambda number: None) as begun:
        await way(made)
    await freed(made.engine)
    for number in sorted({0, len(begun) // 2, len(begun) - 1}):
        made = Made(way)
        assert await cancelled_at(made, way, number) <= 1
        assert (await made.engine.agenerate(made.context, "Who?", max_new_tokens=6)).text == expected
        await asyncio.wait_for(way(made), 60)  # nothing is left half done
        await freed(made.engine)


@pytest.mark.parametrize("name", WAYS)
async def test_what_is_cancelled_while_it_waits_for_its_turn_leaves_nothing(name: str) -> None:
    _, way = WAYS[name]
    made = Made(way)
    with made.engine.stream(None, "Go on.", max_new_tokens=1500) as running:
        next(running)
        task = asyncio.ensure_future(way(made))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(task), 0.05)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await freed(made.engine)
    await asyncio.wait_for(way(made), 60)


class Gated:
    """A scorer that waits for a sign; as good as any."""

    def __init__(self) -> None:
        from kvzip_memory.compression.scorers import KVzipScorer

        self._scorer, self.begun, self.go = KVzipScorer(), threading.Semaphore(0), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score(self, *args: Any, **kwargs: Any) -> Any:
        self.begun.release()
        assert self.go.wait(60)
        return self._scorer.score(*args, **kwargs)


async def begun(scorer: Gated) -> None:
    while not scorer.begun.acquire(blocking=False):
        await asyncio.sleep(0.002)


async def test_a_build_goes_on_for_those_who_wait_for_it_and_is_given_up_when_nobody_does() -> None:
    scorer = Gated()
    engine = tiny_engine(scorer=scorer)
    first = asyncio.create_task(engine.aload(TEXT))
    await begun(scorer)
    others = [asyncio.create_task(engine.aload(TEXT)) for _ in range(2)]
    while not any(len(flight.waiters) == 2 for flight in engine.registry._memory.flights.values()):
        await asyncio.sleep(0.002)
    for task in (first, others[0]):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    scorer.go.set()
    context: CompressedContext = await others[1]
    assert engine.stats()["built"] == 1
    assert context.receipt is not None
    assert context.receipt.hit

    scorer.go.clear()
    doomed = [asyncio.create_task(engine.aload("Another. " * 30)) for _ in range(2)]
    await begun(scorer)
    while not any(flight.waiters for flight in engine.registry._memory.flights.values()):
        await asyncio.sleep(0.002)
    for task in doomed:
        task.cancel()
    await asyncio.gather(*doomed, return_exceptions=True)
    await asyncio.sleep(2 * LOOK_S)  # the one that waits looks so often
    scorer.go.set()
    await freed(engine)
    assert engine.stats()["built"] == 1


async def test_a_shielded_load_goes_on() -> None:
    scorer = Gated()
    engine = tiny_engine(scorer=scorer)
    loading = asyncio.ensure_future(engine.aload(TEXT))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.shield(loading)
    scorer.go.set()
    assert (await loading).key == engine.load(TEXT).key
    assert engine.stats()["built"] == 1


async def test_two_timeouts_block_no_engine_of_two_places() -> None:
    engine = tiny_engine(max_running=2)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await engine.agenerate(None, "Go on.", max_new_tokens=1800)
    await freed(engine)
    assert (await engine.agenerate(None, "Who?", max_new_tokens=4)).finish_reason


async def test_a_full_pool_of_the_loop_stops_nobody() -> None:
    engine, go = tiny_engine(), threading.Event()
    context = engine.load(TEXT)
    loop = asyncio.get_running_loop()
    busy = [loop.run_in_executor(None, go.wait) for _ in range(64)]
    try:
        assert (await asyncio.wait_for(engine.agenerate(context, "Who?", max_new_tokens=4), 30)).finish_reason
        assert (await asyncio.wait_for(engine.aload(TEXT), 30)).key == context.key
    finally:
        go.set()
        await asyncio.gather(*busy)


@pytest.mark.parametrize("how", ["cancel", "close", "drop", "leave the generator"])
@pytest.mark.parametrize("number", [0, 1, 3])
async def test_a_stream_that_is_left_ends_within_a_forward(how: str, number: int) -> None:
    engine = tiny_engine(max_running=1)
    context = engine.load(TEXT)
    expected = engine.generate(context, "Who?", max_new_tokens=6).text
    reached, gone = threading.Event(), threading.Event()

    def at(now: int) -> None:
        if now == number:
            reached.set()
            assert gone.wait(20)

    with watched(engine, at) as forwards:
        session = engine.session(context)
        stream: Any = session.stream("Who?", max_new_tokens=1500)
        pieces = KVzipChatModel(engine=engine, max_tokens=1500).with_context(context).stream("Who?")
        reading: Any = stream if how != "leave the generator" else pieces
        thread = threading.Thread(target=next, args=(reading, None), daemon=True)
        thread.start()
        assert reached.wait(20)
        if how == "cancel":
            stream.cancel()
        elif how == "close":
            threading.Thread(target=stream.close).start()
        gone.set()
        thread.join(20)
        if how == "drop":
            del thread
            del stream, reading
        elif how == "leave the generator":
            pieces.close()
            stream.close()
        before = len(forwards)
        await freed(engine)
        assert len(forwards) - before <= 1
    assert session.ask("Who?", max_new_tokens=6).text == expected if how != "leave the generator" else True
    assert engine.generate(context, "Who?", max_new_tokens=6).text == expected


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_a_chat_engines_answer_whose_pieces_are_left_is_taken_back(how: str) -> None:
    made = Made()
    llm = KVzipLLM(engine=made.engine, max_tokens=600)
    chat_engine = KVzipIndex.from_documents(DOCUMENTS, llm=llm).as_chat_engine()
    if how == "sync":
        pieces = chat_engine.stream_chat("Who?").response_gen
        next(pieces)
        pieces.close()
    else:
        apieces = (await chat_engine.astream_chat("Who?")).async_response_gen()
        await anext(apieces)
        await apieces.aclose()
    await freed(made.engine)
    assert chat_engine.chat_history == []
    chat_engine._llm = chat_engine._llm.model_copy(update={"max_tokens": 6})
    assert str(await chat_engine.achat("Who?"))
    assert len(chat_engine.chat_history) == 2


@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("asks", ["generate", "load"])
async def test_an_interrupted_call_leaves_nothing(asks: str, number: int) -> None:
    engine = tiny_engine(max_running=1)
    context = engine.load(TEXT)
    expected = engine.generate(context, "Who?", max_new_tokens=6).text

    def at(now: int) -> None:
        if now == number:
            _thread.interrupt_main()

    def ask() -> object:
        if asks == "load":
            return engine.load("Another page. " * 80)
        return engine.generate(context, "Who?", max_new_tokens=1500)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's would only cancel this task
    try:
        with watched(engine, at), pytest.raises(KeyboardInterrupt):
            ask()
    finally:
        signal.signal(signal.SIGINT, before)
    await freed(engine)
    assert engine.generate(context, "Who?", max_new_tokens=6).text == expected
    assert engine.load("Another page. " * 80).n_tokens


async def test_a_cancelled_change_of_an_index_leaves_it_as_it_was() -> None:
    made = Made()
    before = made.index.ref_doc_info.keys()
    await cancelled_at(made, WAYS["ainsert"][1], 1)
    assert made.index.ref_doc_info.keys() == before
    assert made.index.docstore.get_document_hash("c") is None


#: Changes of an index that need no forward: what they read is loaded already.
CHANGES: dict[str, Callable[[KVzipIndex], Awaitable[Any]]] = {
    "ainsert": lambda index: index.ainsert(THIRD),
    "ainsert_nodes": lambda index: index.ainsert_nodes([TextNode(text="The boat is green. " * 8, id_="c/0")]),
    "adelete_nodes": lambda index: index.adelete_nodes(index.ref_doc_info["a"].node_ids, delete_from_docstore=True),
    "adelete_ref_doc": lambda index: index.adelete_ref_doc("a"),
    "adelete_ref_doc with its text": lambda index: index.adelete_ref_doc("a", delete_from_docstore=True),
    "aupdate_ref_doc": lambda index: index.aupdate_ref_doc(Document(text="New. " * 40, doc_id="a")),
    "arefresh_ref_docs": lambda index: index.arefresh_ref_docs([Document(text="New. " * 40, doc_id="a"), DOCUMENTS[1], THIRD]),
}


def state(made: Made, index: KVzipIndex) -> dict[str, Any]:
    """What an index has, in the words of its documents."""
    texts = {id_: [index.docstore.get_node(node).get_content() for node in info.node_ids] for id_, info in index.ref_doc_info.items()}
    hashes = {id_: index.docstore.get_document_hash(id_) for id_ in "abc"}
    stored = sorted(node.get_content() for node in index.docstore.docs.values())
    return {"texts": texts, "hashes": hashes, "docstore": stored, "answer": str(index.as_query_engine().query("Who?"))}


def keys(made: Made) -> list[str]:
    return sorted(entry.key for entry in made.engine.registry.contexts())


@pytest.mark.parametrize("name", CHANGES)
async def test_a_change_that_is_cancelled_before_its_first_write_changes_nothing(name: str) -> None:
    made = Made()
    await CHANGES[name](KVzipIndex.from_documents(DOCUMENTS, llm=made.llm))
    before = state(made, made.index)
    with made.index._lock:  # another thread's change is under way
        task = asyncio.ensure_future(CHANGES[name](made.index))
        while made.engine._model.loads.running == 0:
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await freed(made.engine)
    assert state(made, made.index) == before


@pytest.mark.parametrize("name", [name for name in CHANGES if "delete" in name])
async def test_a_deletion_that_has_begun_is_finished(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, twin, loop = Made(), Made(), asyncio.get_running_loop()
    await CHANGES[name](twin.index)
    unchanged, gone = KVzipIndex._delete_node, threading.Event()

    def delete(self: KVzipIndex, node_id: str, **options: Any) -> None:
        unchanged(self, node_id, **options)
        loop.call_soon_threadsafe(task.cancel)
        assert gone.wait(20)

    monkeypatch.setattr(KVzipIndex, "_delete_node", delete)
    task = asyncio.ensure_future(CHANGES[name](made.index))
    with pytest.raises(asyncio.CancelledError):
        await task
    gone.set()
    await freed(made.engine)
    assert state(made, made.index) == state(twin, twin.index)
    assert keys(made) == keys(twin)


@pytest.mark.parametrize(("forgets", "wait"), [("engine", "flush"), ("tool", "check_changeable")])
async def test_what_is_cancelled_before_it_forgets_forgets_nothing(forgets: str, wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    await made.tool("load_document").ainvoke({"name": "page", "text": "A page. " * 30})
    before = keys(made)
    reached, go = threading.Event(), threading.Event()
    unchanged = getattr(ContextRegistry, wait)

    def waiting(self: ContextRegistry) -> None:
        reached.set()
        assert go.wait(20)
        unchanged(self)

    monkeypatch.setattr(ContextRegistry, wait, waiting)
    ask = made.engine.aforget("memory:agent:page") if forgets == "engine" else made.tool("forget_document").ainvoke({"name": "page"})
    task = asyncio.ensure_future(ask)
    while not reached.is_set():
        await asyncio.sleep(0.002)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await freed(made.engine)
    assert keys(made) == before
