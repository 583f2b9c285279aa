"""A LlamaIndex query engine over whole documents: no chunks, no embeddings, one model call a question."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.schema import Document, NodeWithScore, QueryBundle, TextNode

from kvzip_memory import CompressedContext, KVzipEngine, Reply


class KVzipQueryEngine(BaseQueryEngine):
    """Answers every question from one compressed context that holds all documents.

    .. code-block:: python

        documents = SimpleDirectoryReader("contracts").load_data()
        query_engine = KVzipQueryEngine.from_documents(documents, engine=engine)
        print(query_engine.query("Who signed the lease?"))

    Args:
        engine: the engine that loaded the context.
        context: what is answered from.
        documents: returned as ``source_nodes`` of every answer.
        streaming: return a :class:`StreamingResponse`.
        params: of the generation, see :class:`~kvzip_memory.generation.GenerationParams`.
    """

    def __init__(
        self,
        engine: KVzipEngine,
        context: CompressedContext,
        documents: Sequence[Document] = (),
        *,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **params: Any,
    ) -> None:
        super().__init__(callback_manager or CallbackManager())
        self._engine, self.context, self._streaming, self._params = engine, context, streaming, params
        spans = context.sources if len(context.sources) == len(documents) else [None] * len(documents)
        self._nodes = [_node(document, span) for document, span in zip(documents, spans, strict=True)]

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        *,
        engine: KVzipEngine,
        name: str | None = None,
        ratio: float | None = None,
        system: str | None = None,
        **kwargs: Any,
    ) -> KVzipQueryEngine:
        """Load the documents into one context, or find it if they were loaded before. Errors as ``engine.load``."""
        documents = list(documents)
        context = engine.load(documents, name=name, ratio=ratio, system=system)
        return cls(engine, context, documents, **kwargs)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str}) as event:
            stream = self._engine.stream(self.context, query_bundle.query_str, **self._params)
            response: RESPONSE_TYPE
            if self._streaming:
                response = StreamingResponse(
                    response_gen=(piece for piece in stream), source_nodes=self._nodes, metadata=self._metadata(None)
                )
            else:
                with stream:
                    text = "".join(stream)
                response = Response(text, source_nodes=self._nodes, metadata=self._metadata(stream.reply))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return await asyncio.to_thread(self._query, query_bundle)

    def _metadata(self, reply: Reply | None) -> dict[str, Any]:
        facts: dict[str, Any] = {node.node.node_id: node.node.metadata for node in self._nodes}
        if reply is not None:
            usage = reply.usage
            facts["usage"] = {
                "prompt_tokens": usage.input_tokens,
                "completion_tokens": usage.output_tokens,
                "total_tokens": usage.total_tokens,
                "cached_tokens": usage.cached_tokens,
            }
            facts["finish_reason"] = reply.finish_reason
        return facts

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """There is no prompt to change: the question goes to the model as it is."""


def _node(document: Document, span: Any) -> NodeWithScore:
    """The whole document as a source; no score, since nothing was ranked."""
    node = TextNode(text=document.text, id_=document.doc_id, metadata=dict(document.metadata))
    if span is not None:
        node.metadata["kvzip_tokens"] = [span.start, span.end]
        node.excluded_llm_metadata_keys.append("kvzip_tokens")
        node.excluded_embed_metadata_keys.append("kvzip_tokens")
    return NodeWithScore(node=node, score=None)
