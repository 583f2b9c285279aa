"""Copies of what holds a model: chains, agents and engines of the frameworks copy it deeply, and it goes on answering."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import ChatMemoryBuffer, Memory
from pydantic import BaseModel

from conftest import TEXT, tiny_engine
from documents import DOCUMENTS
from kvzip_memory import KVzipEngine, NotPicklableError
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware
from llama_index_kvzip import KVzipChatEngine, KVzipLLM, KVzipQueryEngine


class Out(BaseModel):
    lit: bool


@pytest.fixture(scope="module")
def engine() -> KVzipEngine:
    return tiny_engine()


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipChatModel:
    return KVzipChatModel(engine=engine, max_tokens=4).with_context(engine.load(TEXT, ratio=0.4))


def test_chains_and_agents_of_a_chat_model_are_copied(llm: KVzipChatModel) -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{q}")])
    chain: Any = prompt | llm.bind(max_tokens=3) | StrOutputParser()
    assert copy.deepcopy(chain).invoke({"q": "Who?"}) == chain.invoke({"q": "Who?"})
    structured = llm.with_structured_output(bool)
    assert copy.deepcopy(structured).invoke("Is it?", max_tokens=200) == structured.invoke("Is it?", max_tokens=200)
    agent = create_agent(llm, tools=[], middleware=[KVzipMemoryMiddleware()])
    copied = create_agent(copy.deepcopy(llm), tools=[], middleware=[copy.deepcopy(KVzipMemoryMiddleware())])
    asked: Any = {"messages": [("user", "Who?")]}
    assert copied.invoke(asked)["messages"][-1].text == agent.invoke(asked)["messages"][-1].text
    assert llm.model_copy(deep=True).engine is llm.engine


async def test_agents_and_query_engines_of_an_llm_are_copied(engine: KVzipEngine) -> None:
    llm = KVzipLLM(engine=engine, ratio=0.4, max_tokens=4)
    query_engine = KVzipQueryEngine.from_documents(DOCUMENTS, llm=llm)
    assert str(copy.deepcopy(query_engine._llm).complete("Who?")) == str(llm.complete("Who?"))
    agent = FunctionAgent(llm=llm, tools=[])
    assert str(await agent.model_copy(deep=True).run("Who?")) == str(await agent.run("Who?"))
    structured = llm.as_structured_llm(Out)
    assert copy.deepcopy(structured).llm.engine is engine


@pytest.mark.parametrize("where", ["in memory", "in a file"])
async def test_a_conversation_that_was_begun_is_copied_and_goes_on_apart(engine: KVzipEngine, tmp_path: Path, where: str) -> None:
    llm = KVzipLLM(engine=engine, max_tokens=4)
    uri = f"sqlite+aiosqlite:///{tmp_path / 'chats.db'}"
    memory = None if where == "in memory" else Memory.from_defaults(async_database_uri=uri, token_limit=500)
    chat = KVzipChatEngine.from_context(engine.load(TEXT, ratio=0.4), llm=llm, memory=memory)
    chat.chat("Who?")
    twin, said = copy.deepcopy(chat), [message.content for message in chat.chat_history]
    assert [message.content for message in twin.chat_history] == said
    assert (twin._memory.token_limit, twin._llm.engine) == (chat._memory.token_limit, engine)  # type: ignore[attr-defined]
    assert str(await twin.achat("And when?")) == str(chat.chat("And when?"))
    twin.chat("Where?")
    assert ([len(each.chat_history) for each in (chat, twin)], len(said)) == ([4, 6], 2)
    again = copy.deepcopy(twin)
    assert copy.deepcopy(engine.registry) is engine.registry
    twin.reset()
    assert [len(each.chat_history) for each in (chat, twin, again)] == [4, 0, 6]


def test_a_memory_that_cannot_be_copied_says_so(engine: KVzipEngine) -> None:
    class Odd(ChatMemoryBuffer):
        def __deepcopy__(self, memo: Any = None) -> Any:
            raise TypeError("cannot pickle 'module' object")

    llm, context = KVzipLLM(engine=engine, max_tokens=4), engine.load(TEXT, ratio=0.4)
    plain = KVzipChatEngine.from_context(context, llm=llm, memory=ChatMemoryBuffer.from_defaults(token_limit=500))
    plain.chat("Who?")
    assert [message.content for message in copy.deepcopy(plain).chat_history] == [message.content for message in plain.chat_history]
    with pytest.raises(NotPicklableError, match="a Odd cannot be copied"):
        copy.deepcopy(KVzipChatEngine.from_context(context, llm=llm, memory=Odd.from_defaults(token_limit=500)))
