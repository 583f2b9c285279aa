"""No method of the integrations swallows an option: each that takes any keyword, found by looking, refuses one that nobody knows."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.documents import Document as LangChainDocument
from llama_index.core import Document
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import BaseModel

import langchain_kvzip
import llama_index_kvzip
from conftest import TEXT, results, tiny_engine
from kvzip_memory import InputError
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipChatEngine, KVzipIndex, KVzipLLM, KVzipQueryEngine, KVzipSynthesizer

X: dict[str, Any] = {"nonsense": 3}
SAID = [ChatMessage("Who?")]
NEW = Document(text="The boat is green.", doc_id="c")
NODES = [TextNode(text="The boat is green.")]

# Called by LlamaIndex with what is another's: all blocks of a memory and all transformations of a pipeline get the same options.
FOR_ALL = {"KVzipMemoryBlock._aget", "WholeDocuments.__call__"}
# Behind those that refuse.
INNER = {
    *("KVzipIndex._insert", "KVzipIndex._delete_node", "KVzipChatModel._get_ls_params"),
    *("KVzipChatModel._generate_with_cache", "KVzipChatModel._agenerate_with_cache"),
}


class Out(BaseModel):
    lit: bool


class Made:
    """What the methods are asked of."""

    def __init__(self) -> None:
        self.engine = tiny_engine()
        self.llm, self.chat = KVzipLLM(engine=self.engine, max_tokens=4), KVzipChatModel(engine=self.engine, max_tokens=4)
        self.index = KVzipIndex.from_documents([Document(text=TEXT, doc_id="a")], llm=self.llm)
        self.node_ids = self.index.ref_doc_info["a"].node_ids
        self.synthesizer = KVzipSynthesizer(self.llm)
        self.found = [NodeWithScore(node=NODES[0])]


CALLS: dict[str, Callable[[Made], Any]] = {
    "KVzipChatModel.load_documents": lambda m: m.chat.load_documents(TEXT, **X),
    "KVzipChatModel.aload_documents": lambda m: m.chat.aload_documents([LangChainDocument(TEXT)], **X),
    "KVzipChatModel._stream": lambda m: m.chat.stream("Who?", **X),
    "KVzipChatModel._generate": lambda m: m.chat.invoke("Who?", **X),
    "KVzipChatModel._astream": lambda m: m.chat.astream("Who?", **X),
    "KVzipChatModel._agenerate": lambda m: m.chat.ainvoke("Who?", **X),
    "KVzipChatModel.abatch": lambda m: m.chat.abatch(["Who?"], **X),
    "KVzipChatModel.bind_tools": lambda m: m.chat.bind_tools([Out], **X).invoke("Who?"),
    "KVzipChatModel.with_structured_output": lambda m: m.chat.with_structured_output(Out, **X),
    "KVzipChatEngine.from_defaults": lambda m: KVzipChatEngine.from_defaults(**X),
    "KVzipIndex.__init__": lambda m: KVzipIndex(NODES, llm=m.llm, **X),
    "KVzipIndex.from_documents": lambda m: KVzipIndex.from_documents([NEW], llm=m.llm, **X),
    "KVzipIndex.from_storage": lambda m: KVzipIndex.from_storage(m.index.storage_context, llm=m.llm, **X),
    "KVzipIndex.build_index_from_nodes": lambda m: m.index.build_index_from_nodes(NODES, **X),
    "KVzipIndex.insert": lambda m: m.index.insert(NEW, **X),
    "KVzipIndex.ainsert": lambda m: m.index.ainsert(NEW, **X),
    "KVzipIndex.insert_nodes": lambda m: m.index.insert_nodes(NODES, **X),
    "KVzipIndex.ainsert_nodes": lambda m: m.index.ainsert_nodes(NODES, **X),
    "KVzipIndex.delete_nodes": lambda m: m.index.delete_nodes(m.node_ids, **X),
    "KVzipIndex.adelete_nodes": lambda m: m.index.adelete_nodes(m.node_ids, **X),
    "KVzipIndex.delete_ref_doc": lambda m: m.index.delete_ref_doc("a", **X),
    "KVzipIndex.adelete_ref_doc": lambda m: m.index.adelete_ref_doc("a", **X),
    "KVzipIndex.update_ref_doc": lambda m: m.index.update_ref_doc(NEW, **X),
    "KVzipIndex.aupdate_ref_doc": lambda m: m.index.aupdate_ref_doc(NEW, **X),
    "KVzipIndex.refresh_ref_docs": lambda m: m.index.refresh_ref_docs([NEW], **X),
    "KVzipIndex.arefresh_ref_docs": lambda m: m.index.arefresh_ref_docs([NEW], **X),
    "KVzipIndex.as_retriever": lambda m: m.index.as_retriever(**X),
    "KVzipIndex.as_query_engine": lambda m: m.index.as_query_engine(**X),
    "KVzipIndex.as_chat_engine": lambda m: m.index.as_chat_engine(**X),
    "KVzipLLM.chat": lambda m: m.llm.chat(SAID, **X),
    "KVzipLLM.stream_chat": lambda m: m.llm.stream_chat(SAID, **X),
    "KVzipLLM.achat": lambda m: m.llm.achat(SAID, **X),
    "KVzipLLM.astream_chat": lambda m: m.llm.astream_chat(SAID, **X),
    "KVzipLLM.complete": lambda m: m.llm.complete("Who?", **X),
    "KVzipLLM.stream_complete": lambda m: m.llm.stream_complete("Who?", **X),
    "KVzipLLM.acomplete": lambda m: m.llm.acomplete("Who?", **X),
    "KVzipLLM.astream_complete": lambda m: m.llm.astream_complete("Who?", **X),
    "KVzipLLM._prepare_chat_with_tools": lambda m: m.llm.chat_with_tools([], "Who?", **X),
    "KVzipLLM.get_tool_calls_from_response": lambda m: m.llm.get_tool_calls_from_response(m.llm.chat(SAID), False, **X),
    "KVzipLLM._structured_stream_call": lambda m: m.llm.stream_structured_predict(Out, PromptTemplate("Who?"), llm_kwargs=X),
    "KVzipLLM._structured_astream_call": lambda m: m.llm.astream_structured_predict(Out, PromptTemplate("Who?"), llm_kwargs=X),
    "KVzipQueryEngine.__init__": lambda m: KVzipQueryEngine(m.llm, m.index.parts, **X),
    "KVzipQueryEngine.from_context": lambda m: KVzipQueryEngine.from_context(m.index.parts()[0].context, llm=m.llm, **X),
    "KVzipQueryEngine.from_documents": lambda m: KVzipQueryEngine.from_documents([NEW], llm=m.llm, **X),
    "KVzipSynthesizer.__init__": lambda m: KVzipSynthesizer(m.llm, **X),
    "KVzipSynthesizer.synthesize": lambda m: m.synthesizer.synthesize("Who?", m.found, **X),
    "KVzipSynthesizer.asynthesize": lambda m: m.synthesizer.asynthesize("Who?", [], **X),
    "KVzipSynthesizer.get_response": lambda m: m.synthesizer.get_response("Who?", [], **X),
    "KVzipSynthesizer.aget_response": lambda m: m.synthesizer.aget_response("Who?", [TEXT], **X),
}
# LlamaIndex' options within options, and the older names of its methods.
DEEPER: dict[str, Callable[[Made], Any]] = {
    "insert_kwargs": lambda m: m.index.update_ref_doc(NEW, insert_kwargs=X),
    "delete_kwargs": lambda m: m.index.update_ref_doc(NEW, delete_kwargs=X),
    "refresh": lambda m: m.index.refresh([NEW], update_kwargs={"delete_kwargs": X}),
    "refresh, insert": lambda m: m.index.refresh_ref_docs([NEW], insert_kwargs=X),
    "update": lambda m: m.index.update(NEW, **X),
    "no documents": lambda m: m.synthesizer.synthesize("Who?", [], **X),
    **{f"chat engine {mode}": lambda m, mode=mode: m.index.as_chat_engine(chat_mode=mode, **X) for mode in ("context", "simple")},
}


def taking_any_keyword() -> Iterator[str]:
    for package in (langchain_kvzip, llama_index_kvzip):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for kind in vars(importlib.import_module(module.name)).values():
                if not isinstance(kind, type) or kind.__module__ != module.name or getattr(kind, "_is_protocol", False):
                    continue
                for name, member in vars(kind).items():
                    method = inspect.unwrap(getattr(member, "__func__", member)) if not isinstance(member, property) else None
                    if not inspect.isfunction(method) or method.__module__ != module.name:
                        continue
                    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in inspect.signature(method).parameters.values()):
                        yield f"{kind.__name__}.{name}"


def test_all_that_take_any_keyword_are_here() -> None:
    assert set(taking_any_keyword()) - FOR_ALL - INNER == set(CALLS)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.mark.parametrize("call", [*CALLS.values(), *DEEPER.values()], ids=[*CALLS, *DEEPER])
def test_an_unknown_option_is_told(made: Made, call: Callable[[Made], Any]) -> None:
    before = [len(made.index.docstore.docs), len(made.engine.registry.contexts())]
    with pytest.raises((InputError, TypeError), match=r"options \['nonsense'\] are unknown|argument 'nonsense'|needs a context"):
        asyncio.run(results(call(made)))
    assert [len(made.index.docstore.docs), len(made.engine.registry.contexts())] == before


def test_what_llama_index_s_users_give_an_update_is_taken(made: Made) -> None:
    index = KVzipIndex.from_documents([Document(text=TEXT, doc_id="a")], llm=KVzipLLM(engine=made.engine, max_tokens=4))
    forgetting = {"delete_kwargs": {"delete_from_docstore": True}}
    assert index.refresh_ref_docs([Document(text="Now another.", doc_id="a")], update_kwargs=forgetting) == [True]
    index.update_ref_doc(Document(text="And another.", doc_id="a"), **forgetting)
    with pytest.raises(InputError, match="an update forgets"):
        index.update_ref_doc(Document(text="And one more.", doc_id="a"), delete_kwargs={"delete_from_docstore": False})
    assert [node.get_content() for node in index.docstore.docs.values()] == ["And another."]


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.index.as_retriever(**X),
        lambda m: m.index.as_query_engine(**X),
        lambda m: m.index.as_chat_engine(**X),
        lambda m: m.index.as_chat_engine(chat_mode="context", **X),
        lambda m: KVzipQueryEngine(m.llm, m.index.parts, **X),
        lambda m: KVzipSynthesizer(m.llm, **X),
    ],
)
def test_the_known_options_are_all_named(made: Made, call: Callable[[Made], Any]) -> None:
    with pytest.raises(InputError, match=r"unknown; known are .*'node_parser'.*'similarity_top_k'.*'source_top_k'"):
        call(made)
