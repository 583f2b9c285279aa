"""KVzipSynthesizer: answers, sources and contexts of retrieved nodes; sync, async and streamed; several contexts."""

from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex, get_response_synthesizer
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import Field

from conftest import TEXT
from documents import DOCUMENTS
from kvzip_memory import InputError, KVzipEngine, WindowError
from llama_index_kvzip import KVzipLLM, KVzipSynthesizer


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=12)


def chunks(documents: list[Document] = DOCUMENTS) -> list[NodeWithScore]:
    """Pieces of documents as a retriever gives them, the last one best."""
    nodes = SentenceSplitter(chunk_size=40, chunk_overlap=0).get_nodes_from_documents(documents)
    return [NodeWithScore(node=node, score=float(i)) for i, node in enumerate(nodes)]


def test_the_same_nodes_are_read_once_in_the_order_of_their_documents(llm: KVzipLLM, engine: KVzipEngine) -> None:
    nodes, synthesizer = chunks(), KVzipSynthesizer(llm)
    assert isinstance(synthesizer, BaseSynthesizer)
    response = synthesizer.synthesize("Who?", nodes[::-1])
    context = engine.get(engine.registry.contexts()[-1].key)
    read = engine.tokenizer.decode(context.token_ids)
    for document in DOCUMENTS:
        places = [read.index(scored.node.text) for scored in nodes if scored.node.ref_doc_id == document.doc_id]
        assert len(places) > 1
        assert places == sorted(places)
    assert str(response) == engine.generate(context, "Who?", max_new_tokens=12).text
    assert response.source_nodes == nodes[::-1]
    assert response.metadata["usage"]["cached_tokens"] == context.n_tokens
    assert set(response.metadata) >= {scored.node.node_id for scored in nodes}
    # other order, other scores, other ids: another index of the same documents
    again = chunks([Document(text=document.text, metadata=document.metadata) for document in DOCUMENTS])
    assert str(synthesizer.synthesize("Who?", again)) == str(response)
    assert engine.stats()["built"] == 1
    synthesizer.synthesize("Who?", nodes[1:])
    assert engine.stats()["built"] == 2


async def test_it_is_a_drop_in(llm: KVzipLLM, engine: KVzipEngine) -> None:
    index = SummaryIndex.from_documents(DOCUMENTS)
    expected = str(index.as_query_engine(llm=llm, response_synthesizer=KVzipSynthesizer(llm)).query("Who?"))
    query_engine = index.as_query_engine(llm=llm, response_synthesizer=KVzipSynthesizer(llm, streaming=True))
    response = query_engine.query("Who?")
    assert isinstance(response, StreamingResponse)
    assert "".join(response.response_gen) == expected
    assert [source.node.ref_doc_id for source in response.source_nodes] == ["a", "b"]
    aresponse = await query_engine.aquery("Who?")
    assert isinstance(aresponse, AsyncStreamingResponse)
    assert "".join([piece async for piece in aresponse.async_response_gen()]) == expected
    plain = KVzipSynthesizer(llm)
    assert str(await index.as_query_engine(llm=llm, response_synthesizer=plain).aquery("Who?")) == expected
    assert engine.stats()["built"] == 1
    extra = NodeWithScore(node=TextNode(text="seen elsewhere"), score=0.5)
    assert plain.synthesize("Who?", chunks(), additional_source_nodes=[extra]).source_nodes[-1] == extra
    assert len(str(plain.synthesize("Who?", chunks(), max_tokens=2))) < len(expected)
    # as LlamaIndex' own where there is nothing
    assert str(plain.synthesize("Who?", [])) == str(get_response_synthesizer(llm=llm).synthesize("Who?", []))
    assert str(await plain.asynthesize("Who?", [])) == "Empty Response"


async def test_texts_alone(llm: KVzipLLM) -> None:
    synthesizer, texts = KVzipSynthesizer(llm), [document.text for document in DOCUMENTS]
    said = synthesizer.get_response("Who?", texts)
    assert isinstance(said, str)
    assert await synthesizer.aget_response("Who?", texts[::-1]) == said
    assert "".join(KVzipSynthesizer(llm, streaming=True).get_response("Who?", texts)) == said


async def test_nodes_without_text_are_left_out(llm: KVzipLLM, engine: KVzipEngine) -> None:
    synthesizer, blank, empty = KVzipSynthesizer(llm), NodeWithScore(node=TextNode(text="\n")), "Empty Response"
    expected = synthesizer.synthesize("Who?", chunks())
    response = await synthesizer.asynthesize("Who?", [blank, *chunks(), blank])
    assert str(response) == str(expected)
    assert len(response.source_nodes) == len(chunks())
    assert engine.stats()["built"] == 1
    assert str(synthesizer.synthesize("Who?", [blank])) == str(await synthesizer.asynthesize("Who?", [blank])) == empty
    for texts in ([], [" "]):
        assert synthesizer.get_response("Who?", texts) == await synthesizer.aget_response("Who?", texts) == empty
    streaming = KVzipSynthesizer(llm, streaming=True)
    assert "".join(streaming.get_response("Who?", [])) == empty
    assert "".join([piece async for piece in await streaming.aget_response("Who?", [])]) == empty


def test_nodes_beyond_a_window_go_into_several_contexts(llm: KVzipLLM, engine: KVzipEngine) -> None:
    nodes = [NodeWithScore(node=TextNode(text=f"{i}. {TEXT}")) for i in range(6)]
    response = KVzipSynthesizer(llm).synthesize("Who?", nodes)
    (asked,) = response.metadata["parts"]
    assert len(engine.registry.contexts()) == 6
    assert 2 <= len(asked["ref_doc_ids"]) < 6
    assert response.metadata["usage"]["prompt_tokens"] <= engine.window - llm.max_tokens
    with pytest.raises(WindowError, match="split the text"):
        KVzipSynthesizer(llm).synthesize("Who?", [NodeWithScore(node=TextNode(text=TEXT * 8))])


def test_passages_of_pieces_have_their_places_in_the_document(llm: KVzipLLM) -> None:
    text = "\n\n".join(
        f"The keeper of station {i} is called K{i}, he lives there by himself, and the lamp is his friend." for i in range(8)
    )
    pieces = SentenceSplitter(chunk_size=100, chunk_overlap=0).get_nodes_from_documents([Document(text=text, doc_id="all")])
    assert len(pieces) > 1
    nodes = [NodeWithScore(node=piece) for piece in pieces]
    sources = KVzipSynthesizer(llm, source_top_k=100).synthesize("Who keeps station 6?", nodes).source_nodes
    assert {source.node.ref_doc_id for source in sources} == {"all"}
    assert all(text[source.node.start_char_idx : source.node.end_char_idx] == source.node.text for source in sources)
    assert max(source.node.end_char_idx for source in sources) == len(text)


def test_it_tells_who_listens(llm: KVzipLLM) -> None:
    class Names(BaseEventHandler):
        seen: list[str] = Field(default_factory=list)

        def handle(self, event: Any, **kwargs: Any) -> None:
            self.seen.append(type(event).__name__)

    debug, names, dispatcher = LlamaDebugHandler(print_trace_on_end=False), Names(), get_dispatcher()
    llm.callback_manager = CallbackManager([debug])
    dispatcher.add_event_handler(names)
    try:
        KVzipSynthesizer(llm).synthesize("Who?", chunks())
    finally:
        dispatcher.event_handlers.remove(names)
    (pair,) = debug.get_event_pairs(CBEventType.SYNTHESIZE)
    assert len(pair) == 2
    assert [name for name in names.seen if name.startswith("Synth")] == ["SynthesizeStartEvent", "SynthesizeEndEvent"]


def test_what_is_wrong_is_told_at_once(llm: KVzipLLM) -> None:
    with pytest.raises(InputError, match="source_top_k is 0"):
        KVzipSynthesizer(llm, source_top_k=0)
