"""KVzipChatEngine: conversations over documents."""

import pytest
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms import ChatMessage

from kvzip_memory import InputError, KVzipEngine
from llama_index_kvzip import KVzipIndex, KVzipLLM
from test_llama_index import DOCUMENTS, THIRD


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=12)


async def test_a_chat_engine_answers_from_documents_and_history(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    chat_engine, model = index.as_chat_engine(system_prompt="Be brief."), llm.with_context(index.parts()[0].context)
    said = [ChatMessage("Be brief.", role="system"), ChatMessage("Who?")]
    first = chat_engine.chat("Who?")
    assert str(first) == model.chat(said).message.content
    said += [ChatMessage(str(first), role="assistant"), ChatMessage("When?")]
    expected = str(model.chat(said).message.content)
    assert str(await chat_engine.achat("When?")) == expected
    assert [message.role.value for message in chat_engine.chat_history] == ["user", "assistant"] * 2
    assert [node.node.ref_doc_id for node in first.source_nodes] == ["a", "b"]
    streamed = chat_engine.stream_chat("When?", chat_history=said[1:3])
    assert "".join(streamed.response_gen) == expected
    assert len(streamed.source_nodes) == 2
    astreamed = await chat_engine.astream_chat("When?", chat_history=said[1:3])
    assert "".join([piece async for piece in astreamed.async_response_gen()]) == expected
    chat_engine.reset()
    assert str(chat_engine.chat("Who?")) == str(first)


def test_a_conversation_has_one_context(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450)
    with pytest.raises(InputError, match="2 contexts"):
        index.as_chat_engine()
    assert str(index.as_chat_engine(ChatMode.CONDENSE_QUESTION).chat("Who?")) == str(index.as_query_engine().query("Who?"))
