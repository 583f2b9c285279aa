"""Query engines whose answers are objects of a class, and those that have nothing to read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import AsyncStreamingResponse, PydanticResponse, StreamingResponse
from llama_index.core.tools import QueryEngineTool
from pydantic import AfterValidator, BaseModel, ValidationError

from conftest import TEXT, tiny_engine
from documents import DOCUMENTS, THIRD
from kvzip_memory import InputError, UnfinishedError
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipQueryEngine, KVzipSynthesizer


class Lease(BaseModel):
    """Who signed what."""

    by: Literal["Ito", "Abe"]
    signed: bool


@pytest.fixture(scope="module")
def llm() -> KVzipLLM:
    return KVzipLLM(engine=tiny_engine(), ratio=0.4, max_tokens=100)


@pytest.fixture(scope="module")
def index(llm: KVzipLLM) -> KVzipIndex:
    return KVzipIndex.from_documents(DOCUMENTS, llm=llm)


def split(llm: KVzipLLM) -> KVzipIndex:
    return KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450)


def behind_another(llm: Any, **options: Any) -> BaseQueryEngine:
    return SummaryIndex.from_documents(DOCUMENTS).as_query_engine(llm=llm, response_synthesizer=KVzipSynthesizer(llm, **options))


MAKE: dict[str, Any] = {
    "index": lambda llm, **options: KVzipIndex.from_documents(DOCUMENTS, llm=llm).as_query_engine(output_cls=Lease, **options),
    "structured llm": lambda llm, **options: KVzipIndex.from_documents(DOCUMENTS, llm=llm).as_query_engine(
        llm.as_structured_llm(Lease), **options
    ),
    "several contexts": lambda llm, **options: split(llm).as_query_engine(output_cls=Lease, **options),
    "documents": lambda llm, **options: KVzipQueryEngine.from_documents(DOCUMENTS, llm=llm.as_structured_llm(Lease), **options),
    "synthesizer": lambda llm, **options: behind_another(llm, output_cls=Lease, **options),
    "synthesizer of a structured llm": lambda llm, **options: behind_another(llm.as_structured_llm(Lease), **options),
}


@pytest.mark.parametrize("kind", MAKE)
async def test_the_response_is_an_object_however_it_is_asked_for(llm: KVzipLLM, kind: str) -> None:
    query_engine, streaming = MAKE[kind](llm), MAKE[kind](llm, streaming=True)
    response = query_engine.query("Who signed?")
    assert isinstance(response, PydanticResponse)
    assert isinstance(response.response, Lease)
    assert len(response.source_nodes) >= 2
    assert response.metadata["usage"]["completion_tokens"] > 0  # type: ignore[index]
    assert (await query_engine.aquery("Who signed?")).response == response.response

    streamed = streaming.query("Who signed?")
    assert isinstance(streamed, StreamingResponse)
    pieces = list(streamed.response_gen)
    assert len(pieces) > 2
    assert Lease.model_validate_json("".join(pieces)) == response.response
    assert streamed.response == response.response
    assert streamed.get_response().response == response.response
    assert streaming.query("Who signed?").response == response.response  # without being iterated over
    assert str(streaming.query("Who signed?")) == "".join(pieces)
    assert len(streamed.source_nodes) == len(response.source_nodes)

    astreamed = await streaming.aquery("Who signed?")
    assert isinstance(astreamed, AsyncStreamingResponse)
    assert "".join([piece async for piece in astreamed.async_response_gen()]) == "".join(pieces)
    assert (await astreamed.get_response()).response == response.response
    assert (await (await streaming.aquery("Who signed?")).get_response()).response == response.response


def test_several_contexts_are_joined_for_an_object(llm: KVzipLLM) -> None:
    index = split(llm)
    assert len(index.parts()) == 2
    response = index.as_query_engine(output_cls=Lease).query("Who?")
    assert isinstance(response, PydanticResponse)
    assert isinstance(response.response, Lease)
    assert response.metadata["parts"] == index.as_query_engine().query("Who?").metadata["parts"]  # type: ignore[index]


def test_the_texts_of_a_synthesizer_are_objects_too(llm: KVzipLLM) -> None:
    assert isinstance(KVzipSynthesizer(llm, output_cls=Lease).get_response("Who?", [TEXT]), Lease)


def test_it_serves_as_a_tool(index: KVzipIndex) -> None:
    tool = QueryEngineTool.from_defaults(index.as_query_engine(output_cls=Lease), name="contracts", description="Answers.")
    Lease.model_validate_json(tool.call("Who signed?").content)


class Checked(BaseModel):
    by: Annotated[Literal["Ito"], AfterValidator(lambda value: 1 / 0 if not value else int(value))]


def test_what_is_wrong_is_told(index: KVzipIndex, llm: KVzipLLM) -> None:
    with pytest.raises(UnfinishedError):
        index.as_query_engine(output_cls=Lease, stop=["Ito", "Abe"]).query("Who?")
    with pytest.raises(ValidationError):
        index.as_query_engine(output_cls=Checked).query("Who?")
    with pytest.raises(InputError, match="'accumulate' lists answers as text"):
        index.as_query_engine(output_cls=Lease, response_mode="accumulate")
    for wrong in (dict, {"type": "object"}, Lease(by="Ito", signed=True)):
        with pytest.raises(InputError, match="give a Pydantic class"):
            index.as_query_engine(output_cls=wrong)
    with pytest.raises(InputError, match="as_query_engine takes as_structured_llm"):
        KVzipIndex.from_documents(DOCUMENTS, llm=llm.as_structured_llm(Lease))
    with pytest.raises(InputError, match="a chat engine answers in text"):
        index.as_chat_engine(llm=llm.as_structured_llm(Lease))
    with pytest.raises(InputError, match="same engine"):
        index.as_query_engine(KVzipLLM(engine=tiny_engine()).as_structured_llm(Lease))


@pytest.mark.parametrize("options", [{}, {"output_cls": Lease}, {"response_mode": "accumulate"}, {"response_mode": "no_text"}], ids=str)
async def test_an_empty_index_answers_as_llama_index_own_do(llm: KVzipLLM, options: dict[str, Any]) -> None:
    empty = KVzipIndex.from_documents([], llm=llm)
    own = SummaryIndex.from_documents([]).as_query_engine(llm=llm)
    query_engine = empty.as_query_engine(**options)
    expected = own.query("Who?")
    for response in (query_engine.query("Who?"), await query_engine.aquery("Who?")):
        assert response == expected
        assert response.response == "Empty Response"
    if options.get("response_mode") != "accumulate":
        streaming = empty.as_query_engine(streaming=True, **options)
        assert str(streaming.query("Who?")) == "Empty Response"
        assert "".join([piece async for piece in (await streaming.aquery("Who?")).async_response_gen()]) == "Empty Response"
    empty.insert(Document(text=TEXT))
    assert query_engine.query("Who?").source_nodes
    assert empty.as_retriever().retrieve("Who?")
