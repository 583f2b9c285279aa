"""KVzipQueryEngine and KVzipIndex: the engine's answers, sources, streaming, async, tools, several contexts, changes, restarts."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from llama_index.core import Document, StorageContext, SummaryIndex
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import TextNode
from llama_index.core.tools import QueryEngineTool

from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from documents import DOCUMENTS, THIRD
from families import tiny_family
from kvzip_memory import BudgetError, InputError, KVzipEngine, StorageError, WindowError
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipQueryEngine
from llama_index_kvzip.sources import Ranking


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=12)


@pytest.fixture
def query_engine(llm: KVzipLLM) -> KVzipQueryEngine:
    return KVzipQueryEngine.from_documents(DOCUMENTS, llm=llm, name="pages")


def test_a_query_gives_the_engines_answer_and_the_documents_as_sources(query_engine: KVzipQueryEngine, engine: KVzipEngine) -> None:
    response, context = query_engine.query("Who?"), engine.get("pages")
    assert str(response) == engine.generate(context, "Who?", max_new_tokens=12).text
    assert [node.node.ref_doc_id for node in response.source_nodes] == ["a", "b"]
    assert [node.node.get_content() for node in response.source_nodes] == [d.text for d in DOCUMENTS]
    assert [node.node.metadata["file_name"] for node in response.source_nodes] == ["a.txt", "b.txt"]
    start, end = response.source_nodes[1].node.metadata["kvzip_tokens"]
    assert engine.tokenizer.decode(context.token_ids[start:end]) == TEXT
    assert response.metadata["usage"]["cached_tokens"] == context.n_tokens


async def test_async_and_streaming_give_the_same(query_engine: KVzipQueryEngine, llm: KVzipLLM) -> None:
    expected = str(query_engine.query("When?"))
    assert str(await query_engine.aquery("When?")) == expected
    streaming = KVzipQueryEngine.from_documents(DOCUMENTS, llm=llm, streaming=True)
    response = streaming.query("When?")
    assert isinstance(response, StreamingResponse)
    assert "".join(response.response_gen) == expected
    assert len(response.source_nodes) == 2
    aresponse = await streaming.aquery("When?")
    assert isinstance(aresponse, AsyncStreamingResponse)
    assert "".join([piece async for piece in aresponse.async_response_gen()]) == expected


def test_it_serves_as_a_tool(query_engine: KVzipQueryEngine) -> None:
    tool = QueryEngineTool.from_defaults(query_engine, name="pages", description="the pages")
    assert tool.call("Who?").content == str(query_engine.query("Who?"))


async def test_response_modes(llm: KVzipLLM, engine: KVzipEngine) -> None:
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450)
    told = [engine.generate(part.context, "Who?", max_new_tokens=12).text for part in index.parts()]
    assert str(index.as_query_engine(response_mode="tree_summarize").query("Who?")) == str(index.as_query_engine().query("Who?"))
    accumulating = index.as_query_engine(response_mode="accumulate")
    listed = accumulating.query("Who?")
    assert str(listed) == f"Response 1: {told[0]}\n---------------------\nResponse 2: {told[1]}"
    assert listed.metadata["usage"]["completion_tokens"] == 24
    assert str(await accumulating.aquery("Who?")) == str(listed)
    counter = TokenCountingHandler()
    llm.callback_manager = CallbackManager([counter])
    silent = index.as_query_engine(response_mode=ResponseMode.NO_TEXT).query("Who?")
    assert (silent.response, len(silent.source_nodes)) == ("", 3)
    only = await index.as_query_engine(response_mode="context_only", source_top_k=1).aquery("Who is the keeper?")
    assert str(only) == only.source_nodes[0].node.text
    assert counter.llm_token_counts == []
    with pytest.raises(InputError, match="'refine' does not fit whole documents"):
        index.as_query_engine(response_mode="refine")
    with pytest.raises(InputError, match="cannot stream"):
        index.as_query_engine(response_mode="accumulate", streaming=True)


# -- KVzipIndex --------------------------------------------------------------------------------------------------


def test_an_index_holds_its_documents_in_one_context_and_asks_once(llm: KVzipLLM, query_engine: KVzipQueryEngine) -> None:
    counter = TokenCountingHandler()
    llm.callback_manager = CallbackManager([counter])
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    response = index.as_query_engine().query("Who?")
    assert str(response) == str(query_engine.query("Who?"))
    assert len(counter.llm_token_counts) == 2  # one for each of the two
    assert [node.node.ref_doc_id for node in index.as_retriever().retrieve("Who?")] == ["a", "b"]
    assert list(index.ref_doc_info) == ["a", "b"]


@pytest.mark.parametrize("joinable", [False, True])
async def test_documents_beyond_a_context_are_joined_for_a_question(llm: KVzipLLM, engine: KVzipEngine, joinable: bool) -> None:
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450, joinable=joinable)
    parts = index.parts()
    assert [[node.node.ref_doc_id for node in part.nodes] for part in parts] == [["a", "c"], ["b"]]
    stored = {entry.key for entry in engine.registry.contexts()}
    asked = Ranking(engine).about(parts, "Who?", engine.window)
    assert len(asked) == 2
    response = index.as_query_engine().query("Who?")
    assert {entry.key for entry in engine.registry.contexts()} == stored  # what one question is about is soon another thing
    nodes = [[node.node for node in part.nodes] for part in asked]
    contexts = [engine.load(of, ratio=0.4, joinable=True, preamble=joinable and number > 0) for number, of in enumerate(nodes)]
    join = engine.join(contexts)
    assert str(response) == engine.generate(join, "Who?", max_new_tokens=12).text
    ids = [node.node.ref_doc_id for part in asked for node in part.nodes]
    assert response.metadata["parts"] == [{"context": join.key, "ref_doc_ids": ids}]
    assert response.metadata["usage"]["completion_tokens"] == 12
    assert [node.node.ref_doc_id for node in response.source_nodes] == ids
    for node in response.source_nodes:
        start, end = node.node.metadata["kvzip_tokens"]
        assert engine.tokenizer.decode(join.token_ids[start:end]) == node.node.get_content()
    assert str(await index.as_query_engine().aquery("Who?")) == str(response)
    assert str(index.as_query_engine(streaming=True).query("Who?")) == str(response)


def test_a_question_joins_no_more_than_the_window_takes(llm: KVzipLLM, engine: KVzipEngine) -> None:
    documents = [Document(text=f"Text {i}. " * 40, doc_id=str(i)) for i in range(6)]
    index = KVzipIndex.from_documents(documents, llm=llm)
    lengths = [part.context.n_tokens for part in index.parts()]
    assert len(lengths) == 6
    for more in (12, 900):
        said = index.as_query_engine(max_tokens=more).query("Who?").metadata["parts"][0]["ref_doc_ids"]
        assert len(said) == (engine.window - 256 - more) // max(lengths)
        assert len(said) > 1


@pytest.mark.parametrize("why", ["model", "device"])
def test_where_no_join_is_possible_the_context_is_asked_that_the_question_is_about_most(why: str) -> None:
    options = {"device_bytes": "100kB"} if why == "device" else {}
    engine = KVzipEngine(tiny_family("qwen3_next" if why == "model" else "llama"), tiny_tokenizer(), progress=False, **options)
    llm = KVzipLLM(engine=engine, ratio=0.4, max_tokens=4)
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450)
    parts = index.parts()
    response = index.as_query_engine().query("Who?")
    most = Ranking(engine).about(parts, "Who?", engine.window)[-1]
    assert [part["context"] for part in response.metadata["parts"]] == [most.context.key]
    assert str(response) == engine.generate(most.context, "Who?", max_new_tokens=4).text


def test_changes_show_in_the_next_answer_and_rebuild_no_other_context(llm: KVzipLLM, engine: KVzipEngine) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm, context_tokens=450)
    query_engine = index.as_query_engine()

    def present() -> dict[str, str]:
        return {n.node.ref_doc_id: n.node.get_content() for n in query_engine.query("Who?").source_nodes}

    def read() -> list[str]:
        return [engine.tokenizer.decode(part.context.token_ids) for part in index.parts()]

    assert engine.stats()["built"] == len(read()) == 2
    index.insert(THIRD)
    assert sorted(present()) == ["a", "b", "c"]
    assert engine.stats()["built"] == 3  # a with c; b stayed
    index.update_ref_doc(Document(text="The boat is red. " * 8, metadata={"file_name": "c.txt"}, doc_id="c"))
    assert "red" in present()["c"]
    assert sum("The boat is red" in text for text in read()) == 1
    assert not any("green" in text for text in read())
    assert engine.stats()["built"] == 4
    index.delete_ref_doc("c", delete_from_docstore=True)
    assert present() == {d.doc_id: d.text for d in DOCUMENTS}
    assert engine.stats()["built"] == 5  # a alone; b stayed
    assert index.refresh_ref_docs([*DOCUMENTS, THIRD]) == [False, False, True]
    assert present()["c"] == THIRD.text
    index.delete_ref_doc("b", delete_from_docstore=True)
    assert list(present()) == ["a", "c"]


async def test_async_changes_leave_the_same_index(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    await index.ainsert(THIRD)
    await index.aupdate_ref_doc(Document(text="The boat is red. " * 8, doc_id="c"))
    await index.adelete_ref_doc("a")
    assert list(index.ref_doc_info) == ["b", "c"]
    assert "red" in index.docstore.get_node(*index.ref_doc_info["c"].node_ids).get_content()


def test_a_deleted_text_is_in_no_context_that_is_left(tmp_path: Path) -> None:
    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path / "cache"), ratio=0.4, max_tokens=12)
    engine = llm.engine
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450)
    index.insert(Document(text="The goat is grey. " * 4, doc_id="d"))

    def stored(text: str) -> int:
        engine.registry.flush()
        contexts = [engine.get(entry.key) for entry in engine.registry.contexts()]
        return sum(text in engine.tokenizer.decode(context.token_ids) for context in contexts)

    assert stored("goat") == 1
    index.delete_ref_doc("d")  # may be undone: the docstore still has it
    assert stored("goat") == 1
    index.storage_context.persist(tmp_path / "index")
    engine.close()

    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path / "cache"), ratio=0.4, max_tokens=12)
    engine = llm.engine
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path / "index"))
    index = KVzipIndex.from_storage(storage, llm=llm, context_tokens=450)
    index.delete_ref_doc("c", delete_from_docstore=True)
    assert engine.stats()["built"] == 0  # nothing was for that
    assert (stored("boat"), stored("goat"), stored(TEXT[:20])) == (0, 1, 1)
    index.delete_ref_doc("d", delete_from_docstore=True)
    assert (stored("boat"), stored("goat"), stored(TEXT[:20])) == (0, 0, 1)
    index.parts()
    assert engine.stats()["built"] == 1
    # what others have loaded, too, stays
    other = KVzipIndex.from_documents([DOCUMENTS[1]], llm=llm)
    KVzipQueryEngine.from_documents([DOCUMENTS[0]], llm=llm, name="mine")
    assert engine.stats()["built"] == 3  # by themselves, not to stand behind others
    index.delete_ref_doc("a", delete_from_docstore=True)
    index.delete_ref_doc("b", delete_from_docstore=True)
    assert (stored("keeper"), stored(TEXT[:20])) == (1, 1)
    assert len(other.parts()) == 1
    assert engine.stats()["built"] == 3


def test_a_renamed_index_forgets_what_it_loaded_before(tmp_path: Path) -> None:
    def index_of(llm: KVzipLLM) -> KVzipIndex:
        return KVzipIndex.from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path / "index")), llm=llm)

    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path / "cache"), ratio=0.4, max_tokens=12)
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm)
    index.set_index_id("contracts")
    index.delete_ref_doc("c", delete_from_docstore=True)
    assert llm.engine.registry.contexts() == []
    index.parts()
    index.set_index_id("leases")
    index.storage_context.persist(tmp_path / "index")
    llm.engine.close()
    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path / "cache"), ratio=0.4, max_tokens=12)
    index = index_of(llm)
    assert index.index_id == "leases"
    index.delete_nodes(index.ref_doc_info["a"].node_ids, delete_from_docstore=True)
    assert llm.engine.registry.contexts() == []
    assert llm.engine.stats()["built"] == 0


async def test_what_is_not_in_the_index_can_be_deleted_and_brought_back(llm: KVzipLLM, engine: KVzipEngine) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    ids = index.ref_doc_info["a"].node_ids
    index.delete_nodes([*ids, "nobody's"])
    await index.adelete_nodes(ids)
    assert list(index.ref_doc_info) == ["b"]
    assert index.docstore.get_node(*ids).get_content() == DOCUMENTS[0].text
    assert index.refresh_ref_docs(DOCUMENTS) == [True, False]  # the docstore has it, the index had not
    index.delete_ref_doc("a")
    index.update_ref_doc(Document(text="The keeper is Mira. " * 6, doc_id="a"))
    assert "Mira" in index.as_retriever().retrieve("Who?")[1].text
    index.delete_ref_doc("a")
    index.delete_ref_doc("a", delete_from_docstore=True)
    index.delete_ref_doc("a", delete_from_docstore=True)
    await index.adelete_nodes(["nobody's"], delete_from_docstore=True)
    assert index.docstore.get_document_hash("a") is None
    assert not any("Mira" in engine.tokenizer.decode(engine.get(entry.key).token_ids) for entry in engine.registry.contexts())
    assert [node.text for node in index.as_retriever().retrieve("Who?")] == [TEXT]


def test_another_index_over_the_same_storage_keeps_its_nodes(llm: KVzipLLM) -> None:
    storage = StorageContext.from_defaults()
    summary = SummaryIndex.from_documents(DOCUMENTS, storage_context=storage)
    index = KVzipIndex.from_documents(DOCUMENTS, storage_context=storage, llm=llm)
    expected = [node.text for node in summary.as_retriever().retrieve("Who?")]
    index.update_ref_doc(Document(text="The keeper is Mira. " * 6, doc_id="a"))
    assert index.refresh_ref_docs([THIRD]) == [True]
    index.delete_ref_doc("b")
    assert [node.text[:18] for node in index.as_retriever().retrieve("Who?")] == ["The keeper is Mira", "The boat is green."]
    assert [node.text for node in summary.as_retriever().retrieve("Who?")] == expected


def test_documents_of_one_id_are_all_there(llm: KVzipLLM) -> None:
    second = Document(text="The second page. " * 6, doc_id="a")
    index = KVzipIndex.from_documents([DOCUMENTS[0], second, DOCUMENTS[1]], llm=llm)
    third = Document(text="The third page. " * 6, doc_id="a")
    index.insert(third)
    texts = [document.text for document in (DOCUMENTS[0], second, DOCUMENTS[1], third)]
    assert [node.text for node in index.as_retriever().retrieve("Who?")] == texts
    assert [len(info.node_ids) for info in index.ref_doc_info.values()] == [3, 1]
    with pytest.raises(InputError, match=r"the ids \['a'\]"):
        index.refresh_ref_docs([DOCUMENTS[0], second])
    assert len(index.as_retriever().retrieve("Who?")) == 4
    index.delete_ref_doc("a", delete_from_docstore=True)
    assert list(index.ref_doc_info) == list(index.docstore.get_all_ref_doc_info()) == ["b"]


def test_a_document_without_text_is_left_out(llm: KVzipLLM, caplog: pytest.LogCaptureFixture) -> None:
    blank = Document(text=" \n", metadata={"file_name": "scan.pdf"}, doc_id="scan")
    index = KVzipIndex.from_documents([DOCUMENTS[0], blank, DOCUMENTS[1]], llm=llm)
    assert "left out, since they have no text: ['scan']" in caplog.text
    expected = KVzipIndex.from_documents(DOCUMENTS, llm=llm).as_query_engine().query("Who?")
    assert str(index.as_query_engine().query("Who?")) == str(expected)
    assert [node.node.ref_doc_id for node in index.as_retriever().retrieve("Who?")] == ["a", "b"]
    assert index.refresh_ref_docs([blank, *DOCUMENTS]) == [False, False, False]
    index.update_ref_doc(Document(text="The scan was read. " * 5, doc_id="scan"))
    assert len(index.as_retriever().retrieve("Who?")) == 3
    index.update_ref_doc(blank)
    index.delete_ref_doc("a")
    assert [node.node.ref_doc_id for node in index.as_retriever().retrieve("Who?")] == ["b"]
    query_engine = KVzipQueryEngine.from_documents([blank, *DOCUMENTS], llm=llm)
    assert [node.node.ref_doc_id for node in query_engine.query("Who?").source_nodes] == ["a", "b"]


def test_long_names_take_their_room(llm: KVzipLLM, engine: KVzipEngine) -> None:
    documents = [Document(text=f"Text {i}.", metadata={"source": f"https://example.org/{i}/" + "x" * 170}) for i in range(12)]
    room = engine.window - 256 - llm.max_tokens
    parts = KVzipIndex.from_documents(documents, llm=llm, context_tokens=room).parts()
    assert sum(len(part.nodes) for part in parts) == 12
    assert all(part.context.n_tokens <= room for part in parts)
    assert parts[0].context.n_tokens > room // 2


def test_a_restart_rebuilds_nothing(tmp_path: Path) -> None:
    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path / "cache"), ratio=0.4, max_tokens=12)
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450)
    expected = str(index.as_query_engine().query("Who?"))
    index.storage_context.persist(tmp_path / "index")
    llm.engine.close()
    later = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path / "cache"), ratio=0.4, max_tokens=12)
    storage = StorageContext.from_defaults(persist_dir=str(tmp_path / "index"))
    again = KVzipIndex.from_storage(storage, llm=later, context_tokens=450)
    assert str(again.as_query_engine().query("Who?")) == expected
    assert later.engine.stats()["built"] == 0
    assert again.index_id == index.index_id


def test_what_does_not_fit_is_refused_and_changes_nothing(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm, context_tokens=450)
    with pytest.raises(WindowError, match=r"'long' has about [0-9,]+ tokens"):
        index.insert(Document(text="word " * 200, doc_id="long"))
    with pytest.raises(WindowError, match="'a' has about"):
        index.update_ref_doc(Document(text="word " * 200, doc_id="a"))
    assert list(index.ref_doc_info) == ["a", "b"]
    assert index.docstore.get_node(*index.ref_doc_info["a"].node_ids).get_content() == DOCUMENTS[0].text
    with pytest.raises(InputError, match="context_tokens is 5,000"):
        KVzipIndex.from_documents(DOCUMENTS, llm=llm, context_tokens=5000)
    with pytest.raises(InputError, match="same engine"):
        index.as_query_engine(KVzipLLM(engine=tiny_engine()))
    with pytest.raises(InputError, match=r"options \['sparse_top_k'\] are unknown; known are .*'filters'"):
        index.as_query_engine(sparse_top_k=3)
    with pytest.raises(InputError, match="no documents to talk"):
        KVzipIndex.from_documents([], llm=llm).as_chat_engine()
    with pytest.raises(InputError, match=r"options \['nonsense'\] are unknown; known are .*'storage_context'"):
        KVzipIndex.from_documents(DOCUMENTS, llm=llm, nonsense=3)
    with pytest.raises(InputError, match="ratio is the llm's"):
        KVzipIndex(index_struct=index.index_struct, storage_context=index.storage_context, llm=llm, ratio=0.9)
    with pytest.raises(InputError, match="documents are read whole"):
        KVzipIndex.from_documents(DOCUMENTS, llm=llm, transformations=[SentenceSplitter()])
    with pytest.raises(InputError, match="0 indices"):
        KVzipIndex.from_storage(StorageContext.from_defaults(), llm=llm)


async def test_a_change_that_fails_leaves_the_documents_as_they_were(engine: KVzipEngine) -> None:
    budget = 3 * engine.load(DOCUMENTS, ratio=1.0).nbytes // 2  # the long one fits the window, not the device
    llm = KVzipLLM(engine=tiny_engine(device_bytes=budget), ratio=1.0, max_tokens=12)
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)

    def state() -> tuple[dict[str, str], list[str | None], dict[str, str], str]:
        told = index.storage_context.index_store.get_index_struct(index.index_id)
        texts = {node_id: node.get_content() for node_id, node in index.docstore.docs.items()}
        hashes = [index.docstore.get_document_hash(id_) for id_ in ("a", "b", "c", "new")]
        return texts, hashes, told.nodes_dict, str(index.as_query_engine().query("Who?"))

    before, long = state(), "The lamp was bought from the yard. " * 45
    changed, new = Document(text=long, doc_id="a"), Document(text=long, doc_id="new")
    for change in (
        lambda: asyncio.to_thread(index.update_ref_doc, changed),
        lambda: asyncio.to_thread(index.insert, new),
        lambda: asyncio.to_thread(index.insert, changed),
        lambda: asyncio.to_thread(index.refresh_ref_docs, [THIRD, changed]),
        lambda: asyncio.to_thread(index.insert_nodes, [TextNode(text=long, id_="new")]),
        lambda: asyncio.to_thread(KVzipIndex.from_documents, [changed, new], llm=llm, storage_context=index.storage_context),
        lambda: index.aupdate_ref_doc(changed),
        lambda: index.ainsert(new),
        lambda: index.arefresh_ref_docs([THIRD, changed]),
    ):
        with pytest.raises(BudgetError):
            await change()
        assert state() == before
    with pytest.raises(WindowError):
        await index.aupdate_ref_doc(Document(text=long * 100, doc_id="a"))
    assert state() == before
    assert await index.arefresh_ref_docs([*DOCUMENTS, THIRD]) == [False, False, True]


def test_a_refresh_builds_a_context_once(llm: KVzipLLM, engine: KVzipEngine) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    changed = Document(text="The keeper is Mira. " * 6, doc_id="a")
    assert index.refresh_ref_docs([changed, DOCUMENTS[1], THIRD]) == [True, False, True]
    assert engine.stats()["built"] == 2
    assert [node.node.ref_doc_id for node in index.as_retriever().retrieve("Who?")] == ["b", "a", "c"]


def test_threads_ask_while_the_index_changes(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    query_engine = index.as_query_engine(max_tokens=3)

    async def main() -> list[list[str]]:
        async def ask() -> list[str]:
            return [node.node.ref_doc_id for node in (await query_engine.aquery("Who?")).source_nodes]

        answers = await asyncio.gather(*(ask() for _ in range(3)), index.ainsert(THIRD), *(ask() for _ in range(3)))
        return [answer for answer in answers if answer is not None]

    assert all(answer in (["a", "b"], ["a", "b", "c"]) for answer in asyncio.run(main()))
    assert [node.node.ref_doc_id for node in query_engine.query("Who?").source_nodes] == ["a", "b", "c"]


def test_documents_that_cannot_be_deleted_now_stay(tmp_path: Path) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=KVzipLLM(engine=tiny_engine(cache_dir=tmp_path), max_tokens=4))
    engine = index._llm.engine
    engine.registry.flush()
    before = [part.context.key for part in index.parts()]
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="try again when it is free"):
            index.delete_ref_doc(DOCUMENTS[0].doc_id, delete_from_docstore=True)
        holder.execute("ROLLBACK")
    assert [part.context.key for part in index.parts()] == before
    index.delete_ref_doc(DOCUMENTS[0].doc_id, delete_from_docstore=True)
    assert before[0] not in {entry.key for entry in engine.registry.contexts()}
    engine.close()


def test_a_context_of_many_documents_is_let_go_with_each_of_them() -> None:
    """Its tag is longer than one that a caller gives."""
    llm = KVzipLLM(engine=KVzipEngine(tiny_model(max_position_embeddings=16384), tiny_tokenizer()), max_tokens=12)
    documents = [Document(text=f"note {i}", metadata={"file_path": f"/home/ana/handbook/chapters/section-{i:04d}.md"}) for i in range(90)]
    index = KVzipIndex.from_documents(documents, llm=llm)
    index.as_query_engine().query("What?")
    [context] = llm.engine.registry.contexts()
    assert len(context.tags[0]) > 4096
    llm.engine.forget("document: /home/ana/handbook/chapters/section-0007.md")
    assert llm.engine.registry.contexts() == []
