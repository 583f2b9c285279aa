"""KVzipQueryEngine: same answers as the engine, sources, streaming, async, tools."""

import asyncio

import pytest
from llama_index.core import Document
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.tools import QueryEngineTool

from conftest import TEXT
from kvzip_memory import KVzipEngine
from llama_index_kvzip import KVzipQueryEngine

DOCUMENTS = [
    Document(text="The keeper is Oriel. " * 6, metadata={"file_name": "a.txt"}),
    Document(text=TEXT, metadata={"file_name": "b.txt", "page": 2}),
]


@pytest.fixture
def query_engine(engine: KVzipEngine) -> KVzipQueryEngine:
    return KVzipQueryEngine.from_documents(DOCUMENTS, engine=engine, name="pages", ratio=0.4, max_new_tokens=12)


def test_a_query_gives_the_engines_answer_and_the_documents_as_sources(query_engine: KVzipQueryEngine, engine: KVzipEngine) -> None:
    response = query_engine.query("Who?")
    assert str(response) == engine.generate(query_engine.context, "Who?", max_new_tokens=12).text
    assert [node.node.ref_doc_id or node.node.node_id for node in response.source_nodes] == [d.doc_id for d in DOCUMENTS]
    assert [node.node.get_content() for node in response.source_nodes] == [d.text for d in DOCUMENTS]
    assert [node.node.metadata["file_name"] for node in response.source_nodes] == ["a.txt", "b.txt"]
    start, end = response.source_nodes[1].node.metadata["kvzip_tokens"]
    assert engine.tokenizer.decode(query_engine.context.token_ids[start:end]) == TEXT
    assert response.metadata["usage"]["cached_tokens"] == query_engine.context.n_tokens


def test_async_and_streaming_give_the_same(query_engine: KVzipQueryEngine, engine: KVzipEngine) -> None:
    expected = str(query_engine.query("When?"))
    assert str(asyncio.run(query_engine.aquery("When?"))) == expected
    streaming = KVzipQueryEngine(engine, query_engine.context, DOCUMENTS, streaming=True, max_new_tokens=12)
    response = streaming.query("When?")
    assert isinstance(response, StreamingResponse)
    assert "".join(response.response_gen) == expected
    assert len(response.source_nodes) == 2


def test_the_same_documents_again_are_found_not_built(query_engine: KVzipQueryEngine, engine: KVzipEngine) -> None:
    again = KVzipQueryEngine.from_documents(DOCUMENTS, engine=engine, ratio=0.4)
    assert again.context.key == query_engine.context.key
    assert again.context.receipt is not None
    assert again.context.receipt.hit


def test_it_serves_as_a_tool(query_engine: KVzipQueryEngine) -> None:
    tool = QueryEngineTool.from_defaults(query_engine, name="pages", description="the pages")
    assert tool.call("Who?").content == str(query_engine.query("Who?"))
