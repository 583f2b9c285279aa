"""Filters and document ids: an index answers from the documents they allow, and no text of another one is in what is asked."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Document, StorageContext
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.core.vector_stores.types import VectorStoreQuery

from conftest import tiny_engine
from kvzip_memory import InputError, KVzipEngine
from llama_index_kvzip import KVzipIndex, KVzipLLM, KVzipSynthesizer
from llama_index_kvzip.filters import Choice

# -- what a filter means -----------------------------------------------------------------------------------------

VALUES: list[Any] = [None, "", "Ana", "ana", "An", 3, 3.0, 2, True, [], ["Ana", "Bo"], ["Bo"], [1, 2, 3], [2.5], {"Ana": 1}]
NODES = [
    TextNode(
        text="text",
        id_=f"n{number}",
        metadata={} if number == 0 else {"who": value},
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc{number % 3}")},
    )
    for number, value in enumerate([None, *VALUES])
]
FILTER_VALUES: list[Any] = [None, "", "Ana", "an", 3, 2.5, ["Ana"], ["Ana", "Cy"], [2, 3], []]


def stored(*nodes: TextNode) -> SimpleVectorStore:
    store = SimpleVectorStore()
    store.add([node.model_copy(update={"embedding": [1.0]}) for node in nodes])
    return store


STORES = {node.node_id: stored(node) for node in NODES}


def of_llama_index(filters: MetadataFilters, node: TextNode) -> bool | None:
    """Whether its in-memory store gives a node; None if it fails."""
    try:
        found = STORES[node.node_id].query(VectorStoreQuery(query_embedding=[1.0], similarity_top_k=1, filters=filters))
    except (TypeError, ValueError):
        return None
    return bool(found.ids)


def of_ours(filters: MetadataFilters, node: TextNode) -> bool | None:
    try:
        return Choice(filters)(node)
    except InputError:
        return None


@pytest.mark.parametrize("operator", FilterOperator)
def test_an_operator_means_what_it_means_to_llama_index(operator: FilterOperator) -> None:
    given_ones = set()
    for value, key in itertools.product(FILTER_VALUES, ["who", "doc_id", "ref_doc_id", "document_id", "_node_type", "missing"]):
        filters = MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])
        for node in NODES:
            expected = of_llama_index(filters, node)
            assert of_ours(filters, node) is expected, (operator, key, value, node.metadata)
            given_ones.add(expected)
    assert {True, False} <= given_ones


leaves = st.builds(
    MetadataFilter, key=st.sampled_from(["who", "missing"]), value=st.sampled_from(FILTER_VALUES), operator=st.sampled_from(FilterOperator)
)
conditions = st.sampled_from([*FilterCondition, None])


@settings(max_examples=150, deadline=None)
@given(st.builds(MetadataFilters, filters=st.lists(leaves, max_size=3), condition=conditions), st.sampled_from(NODES))
def test_conditions_mean_what_they_mean_to_llama_index(filters: MetadataFilters, node: TextNode) -> None:
    assert of_ours(filters, node) is of_llama_index(filters, node)


@st.composite
def groups(draw: st.DrawFn, depth: int = 2) -> MetadataFilters:
    inner = leaves if depth == 0 else st.one_of(leaves, groups(depth - 1))
    return MetadataFilters(filters=draw(st.lists(inner, min_size=1, max_size=3)), condition=draw(conditions))


def by_parts(filters: MetadataFilters, node: TextNode) -> bool | None:
    """A group of groups, each filter by LlamaIndex' store, which knows no groups in groups."""
    found = [
        by_parts(each, node) if isinstance(each, MetadataFilters) else of_llama_index(MetadataFilters(filters=[each]), node)
        for each in filters.filters
    ]
    if None in found:
        return None
    if filters.condition == FilterCondition.NOT:
        return not any(found)
    return any(found) if filters.condition == FilterCondition.OR else all(found)


@settings(max_examples=150, deadline=None)
@given(groups(), st.sampled_from(NODES))
def test_groups_may_lie_in_groups(filters: MetadataFilters, node: TextNode) -> None:
    assert of_ours(filters, node) is by_parts(filters, node)


def test_what_chooses_no_documents_is_refused() -> None:
    for wrong, way_out in (
        ({"filters": {"user": "ana"}}, "give MetadataFilters"),
        ({"filters": MetadataFilter(key="user", value="ana")}, "give MetadataFilters"),
        ({"doc_ids": "a"}, "a list of ids"),
        ({"doc_ids": [1]}, "a list of ids"),
        ({"doc_ids": 3}, "a list of ids"),
    ):
        with pytest.raises(InputError, match=way_out):
            Choice(**wrong)


# -- what is asked -----------------------------------------------------------------------------------------------

SECRETS = {"ana": "marigold", "bo": "tungsten", "cy": "saffron"}
DOCUMENTS = [
    Document(text=f"Note {n} of {user}. The word is {word}. " * 2, doc_id=f"{user}{n}", metadata={"user": user, "n": n})
    for n, (user, word) in itertools.product(range(2), SECRETS.items())
]


def of(user: str) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key="user", value=user)])


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=6)


class Seen:
    """All texts that a model was asked or answered over."""

    def __init__(self, engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        stream, relevance = KVzipEngine.stream, KVzipEngine.relevance

        def streamed(engine: KVzipEngine, context: Any, messages: Any, **options: Any) -> Any:
            self.texts.append(str(messages))
            self.add(engine, context)
            return stream(engine, context, messages, **options)

        def ranked(engine: KVzipEngine, passages: Any, question: Any) -> Any:
            for context, _ in passages:
                self.add(engine, context)
            return relevance(engine, passages, question)

        monkeypatch.setattr(KVzipEngine, "stream", streamed)
        monkeypatch.setattr(KVzipEngine, "relevance", ranked)

    def add(self, engine: KVzipEngine, context: Any) -> None:
        if context is not None:
            self.texts.append(engine.tokenizer.decode(context.token_ids))

    def words(self) -> set[str]:
        return {word for word in SECRETS.values() if any(word in text for text in self.texts)}


@pytest.fixture
def seen(engine: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(engine, monkeypatch)


def nodes_of(response: Any) -> list[Any]:
    return list(getattr(response, "source_nodes", response))


WAYS: dict[str, Callable[[KVzipIndex, dict[str, Any]], Any]] = {
    "query": lambda index, chosen: index.as_query_engine(**chosen).query("What is the word?"),
    "aquery": lambda index, chosen: asyncio.run(index.as_query_engine(**chosen).aquery("What is the word?")),
    "passages": lambda index, chosen: index.as_query_engine(similarity_top_k=1, **chosen).query("What is the word?"),
    "accumulate": lambda index, chosen: index.as_query_engine(response_mode="accumulate", **chosen).query("What is the word?"),
    "context only": lambda index, chosen: index.as_query_engine(response_mode="context_only", **chosen).query("What is the word?"),
    "stream": lambda index, chosen: streamed(index.as_query_engine(streaming=True, **chosen).query("What is the word?")),
    "retrieve": lambda index, chosen: index.as_retriever(**chosen).retrieve("What is the word?"),
    "aretrieve": lambda index, chosen: asyncio.run(index.as_retriever(similarity_top_k=2, **chosen).aretrieve("What is the word?")),
    "retriever query engine": lambda index, chosen: RetrieverQueryEngine(index.as_retriever(**chosen), KVzipSynthesizer(index._llm)).query(
        "What is the word?"
    ),
    "tool": lambda index, chosen: QueryEngineTool.from_defaults(index.as_query_engine(**chosen)).call("What is the word?").raw_output,
    "router": lambda index, chosen: RouterQueryEngine(
        Chosen.from_defaults(llm=index._llm), [QueryEngineTool.from_defaults(index.as_query_engine(**chosen))], index._llm
    ).query("What is the word?"),
    "chat": lambda index, chosen: index.as_chat_engine(**chosen).chat("What is the word?"),
    "achat": lambda index, chosen: asyncio.run(index.as_chat_engine(**chosen).achat("What is the word?")),
    **{
        f"chat {mode.value}": lambda index, chosen, mode=mode: index.as_chat_engine(chat_mode=mode, **chosen).chat("What is the word?")
        for mode in (ChatMode.CONTEXT, ChatMode.CONDENSE_QUESTION, ChatMode.CONDENSE_PLUS_CONTEXT)
    },
}


class Chosen(LLMSingleSelector):
    """Selects the only one, which a tiny model could not say."""

    def _select(self, choices: Any, query: Any) -> Any:
        from llama_index.core.base.base_selector import SelectorResult, SingleSelection

        return SelectorResult(selections=[SingleSelection(index=0, reason="")])


def streamed(response: Any) -> Any:
    list(response.response_gen)
    return response


@pytest.mark.parametrize("joined", [True, False], ids=["one context", "several contexts"])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_in_shows_another_user_s_document(llm: KVzipLLM, seen: Seen, way: str, joined: bool) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm, context_tokens=None if joined else 400)
    assert (len(index.parts()) == 1) is joined
    mine = [document.doc_id for document in DOCUMENTS if document.metadata["user"] == "ana"]
    for chosen in ({"filters": of("ana")}, {"doc_ids": mine}, {"doc_ids": mine, "filters": of("ana")}):
        seen.texts.clear()
        found = nodes_of(WAYS[way](index, chosen))
        assert found
        assert {node.node.metadata["user"] for node in found} == {"ana"}
        assert seen.words() <= {"marigold"}
        assert seen.texts or way in ("context only", "retrieve")
    seen.texts.clear()
    assert {node.node.metadata["user"] for node in nodes_of(WAYS["query"](index, {}))} == set(SECRETS)
    assert seen.words() == set(SECRETS.values())


def test_the_answer_is_that_of_an_index_of_these_documents_alone(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    alone = KVzipIndex.from_documents(
        [d for d in DOCUMENTS if d.metadata["user"] == "bo"], llm=KVzipLLM(engine=tiny_engine(), ratio=0.4, max_tokens=6)
    )
    theirs = index.as_query_engine(filters=of("bo"))
    assert str(theirs.query("What is the word?")) == str(alone.as_query_engine().query("What is the word?"))
    assert index.parts(Choice(of("bo")))[0].context.key == alone.parts()[0].context.key


def test_chosen_documents_are_read_once_and_packed(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm, context_tokens=400)
    contexts = [[node.node.ref_doc_id for node in part.nodes] for part in index.parts()]
    assert len(contexts) >= 2
    engine = llm.engine
    built = engine.stats()["built"]
    index.as_query_engine(doc_ids=contexts[0]).query("Which?")  # a whole context
    index.as_query_engine(filters=MetadataFilters(filters=[])).query("Which?")
    assert engine.stats()["built"] == built
    for _ in range(2):
        assert len(index.as_query_engine(filters=of("cy")).query("Which?").metadata["parts"]) == 1
    assert engine.stats()["built"] == built + 1
    again = KVzipIndex.from_storage(index.storage_context, llm=llm, context_tokens=400)
    again.as_query_engine(filters=of("cy")).query("Which?")
    assert engine.stats()["built"] == built + 1


def test_choices_see_changes_and_what_is_deleted_is_gone(llm: KVzipLLM, seen: Seen) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    query, retriever = index.as_query_engine(filters=of("ana")), index.as_retriever(filters=of("ana"))
    query.query("Which?")
    query_of_bo = index.as_query_engine(filters=of("bo"))
    query_of_bo.query("Which?")

    def ids() -> list[str]:
        return sorted(node.node.ref_doc_id for node in retriever.retrieve("Which?"))

    assert ids() == ["ana0", "ana1"]
    index.delete_ref_doc("ana0")
    assert ids() == ["ana1"]
    index.update_ref_doc(Document(text="Bo's again. The word is tungsten.", doc_id="ana1", metadata={"user": "bo"}))
    assert ids() == []
    assert str(query.query("Which?")) == "Empty Response"
    index.refresh_ref_docs([Document(text="New. The word is saffron.", doc_id="cy0", metadata={"user": "ana"})])
    assert ids() == ["cy0"]
    seen.texts.clear()
    query.query("Which?")
    assert seen.words() == {"saffron"}
    for id_ in list(index.ref_doc_info):
        index.delete_ref_doc(id_, delete_from_docstore=True)
    texts = [llm.engine.tokenizer.decode(llm.engine.get(entry.key).token_ids) for entry in llm.engine.registry.contexts()]
    assert not [text for text in texts if "marigold" in text or "tungsten" in text or "saffron" in text]


def test_metadata_that_is_changed_in_the_docstore_counts(llm: KVzipLLM) -> None:
    storage = StorageContext.from_defaults()
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm, storage_context=storage)
    retriever = index.as_retriever(filters=of("ana"))
    assert len(retriever.retrieve("Which?")) == 2
    for node in index.docstore.get_nodes(index.ref_doc_info["ana0"].node_ids):
        node.metadata = {**node.metadata, "user": "dan"}
        index.docstore.add_documents([node], allow_update=True)
    assert [node.node.ref_doc_id for node in retriever.retrieve("Which?")] == ["ana1"]


def test_nothing_is_chosen_by_an_empty_list_or_ids_of_others(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    for ids in ([], ["nobody's"]):
        assert index.as_retriever(doc_ids=ids).retrieve("Which?") == []
        assert str(index.as_query_engine(doc_ids=ids).query("Which?")) == "Empty Response"
        with pytest.raises(InputError, match=r"no documents to talk about.*choose others"):
            index.as_chat_engine(doc_ids=ids)
    greater = MetadataFilter(key="user", value=3, operator=FilterOperator.GT)
    with pytest.raises(InputError, match="cannot be applied to the metadata of document 'ana0'"):
        index.as_query_engine(filters=MetadataFilters(filters=[greater])).query("Which?")


def test_the_number_of_passages_has_llama_index_s_name_too(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    ours, theirs = index.as_retriever(source_top_k=2), index.as_retriever(similarity_top_k=2)
    assert [n.node_id for n in ours.retrieve("What is the word?")] == [n.node_id for n in theirs.retrieve("What is the word?")]
    assert len(index.as_query_engine(similarity_top_k=1).query("Which?").source_nodes) == 1
    assert len(index.as_chat_engine(similarity_top_k=1).chat("Which?").source_nodes) == 1
    for made in (index.as_retriever, index.as_query_engine, index.as_chat_engine):
        with pytest.raises(InputError, match="similarity_top_k is 2 and source_top_k is 3"):
            made(similarity_top_k=2, source_top_k=3)
        with pytest.raises(InputError, match="source_top_k is 0"):
            made(similarity_top_k=0)
