"""Copies of what holds a model: chains, agents and engines of the frameworks copy it deeply, and it goes on answering."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from pydantic import BaseModel

from conftest import TEXT, tiny_engine
from kvzip_memory import KVzipEngine
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware
from llama_index_kvzip import KVzipLLM, KVzipQueryEngine
from test_llama_index import DOCUMENTS


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
