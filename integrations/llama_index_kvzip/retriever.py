"""All or the chosen documents of an index for every question, or the passages that it is about most."""

from __future__ import annotations

from collections.abc import Callable

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle

from kvzip_memory.bridge import result_of
from llama_index_kvzip.sources import Part, Ranking


class DocumentRetriever(BaseRetriever):
    """Of an index as it is when it is asked.

    Args:
        parts: gives the contexts of the documents.
        sources: what of them is given.
    """

    def __init__(self, parts: Callable[[], list[Part]], sources: Ranking) -> None:
        super().__init__()
        self._parts, self._sources = parts, sources

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._sources(self._parts(), query_bundle.query_str)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await result_of(self._sources.engine.loads, self._retrieve, query_bundle)
