"""A LlamaIndex query engine over whole documents: no chunks, no embeddings, one model call a question."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.llms import ChatMessage, ChatResponse
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.schema import BaseNode, NodeRelationship, NodeWithScore, QueryBundle, TextNode

from kvzip_memory import CompressedContext, InputError
from llama_index_kvzip.llm import KVzipLLM

_COMBINE = (
    "A question was answered from {count} parts of the documents, each without the others.\n\n{answers}\n\n"
    "Question: {question}\n\nGive one answer to the question. Leave out parts that do not know it."
)


@dataclass(frozen=True)
class Part:
    """A context and the nodes it was made of."""

    context: CompressedContext
    nodes: Sequence[NodeWithScore]


class KVzipQueryEngine(BaseQueryEngine):
    """Answers every question from compressed contexts that hold all documents; one of them, as a rule, and one model call.

    .. code-block:: python

        documents = SimpleDirectoryReader("contracts").load_data()
        query_engine = KVzipQueryEngine.from_documents(documents, llm=llm)
        print(query_engine.query("Who signed the lease?"))

    Where there are several contexts all are asked at one time and one more call combines their answers, which
    ``metadata["parts"]`` shows. ``metadata["usage"]`` sums up all calls.

    Args:
        llm: what answers.
        parts: gives the contexts to ask and their nodes, which are the ``source_nodes`` of every answer.
        streaming: return a :class:`StreamingResponse`, or an :class:`AsyncStreamingResponse`.
        options: of every call, such as ``max_tokens``, see :class:`KVzipLLM`, which tells the errors too.
    """

    def __init__(
        self,
        llm: KVzipLLM,
        parts: Callable[[], Sequence[Part]],
        *,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        super().__init__(callback_manager or llm.callback_manager)
        self._llm, self._parts, self._streaming, self._options = llm, parts, streaming, options

    @classmethod
    def from_context(
        cls, context: CompressedContext, documents: Sequence[BaseNode] = (), *, llm: KVzipLLM, **kwargs: Any
    ) -> KVzipQueryEngine:
        """Answer from a context that was made of these documents."""
        part = Part(context, sources(context, documents))
        return cls(llm, lambda: [part], **kwargs)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[BaseNode],
        *,
        llm: KVzipLLM,
        name: str | None = None,
        ratio: float | None = None,
        system: str | None = None,
        **kwargs: Any,
    ) -> KVzipQueryEngine:
        """Load the documents into one context, or find it if they were loaded before. Errors as ``engine.load``."""
        documents = list(documents)
        context = llm.engine.load(documents, name=name, ratio=llm.ratio if ratio is None else ratio, system=system)
        return cls.from_context(context, documents, llm=llm, **kwargs)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(query_bundle) as event:
            question, parts = query_bundle.query_str, self._checked_parts()
            answers: list[ChatResponse] = []
            llm, asked = self._llm.with_context(parts[0].context), question
            if len(parts) > 1:
                with ThreadPoolExecutor(len(parts)) as pool:
                    runs = [pool.submit(contextvars.copy_context().run, self._ask, part, question) for part in parts]
                    answers = [run.result() for run in runs]
                llm, asked = self._llm.with_context(None), _combined(question, answers)
            nodes = [node for part in parts for node in part.nodes]
            response: RESPONSE_TYPE
            if self._streaming:
                pieces = (piece.delta or "" for piece in llm.stream_chat([ChatMessage(asked)], **self._options))
                response = StreamingResponse(pieces, nodes, _metadata(parts, answers))
            else:
                last = llm.chat([ChatMessage(asked)], **self._options)
                response = Response(last.message.content, nodes, _metadata(parts, answers, last))
            event.on_end(payload={EventPayload.RESPONSE: response})
            return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(query_bundle) as event:
            question, parts = query_bundle.query_str, await asyncio.to_thread(self._checked_parts)
            answers: list[ChatResponse] = []
            llm, asked = self._llm.with_context(parts[0].context), question
            if len(parts) > 1:
                said = [ChatMessage(question)]
                answers = await asyncio.gather(*(self._llm.with_context(p.context).achat(said, **self._options) for p in parts))
                llm, asked = self._llm.with_context(None), _combined(question, answers)
            nodes = [node for part in parts for node in part.nodes]
            response: RESPONSE_TYPE
            if self._streaming:
                pieces = (piece.delta or "" async for piece in await llm.astream_chat([ChatMessage(asked)], **self._options))
                response = AsyncStreamingResponse(pieces, nodes, _metadata(parts, answers))
            else:
                last = await llm.achat([ChatMessage(asked)], **self._options)
                response = Response(last.message.content, nodes, _metadata(parts, answers, last))
            event.on_end(payload={EventPayload.RESPONSE: response})
            return response

    def _event(self, query_bundle: QueryBundle) -> Any:
        return self.callback_manager.event(CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str})

    def _checked_parts(self) -> Sequence[Part]:
        parts = self._parts()
        if not parts:
            raise InputError("there are no documents to answer from; insert some")
        return parts

    def _ask(self, part: Part, question: str) -> ChatResponse:
        return self._llm.with_context(part.context).chat([ChatMessage(question)], **self._options)

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """There is no prompt to change: the question goes to the model as it is."""


def sources(context: CompressedContext, documents: Sequence[BaseNode]) -> list[NodeWithScore]:
    """Whole documents as sources, with the tokens they cover; no score, since nothing was ranked."""
    spans = context.sources if len(context.sources) == len(documents) else [None] * len(documents)
    nodes = []
    for document, span in zip(documents, spans, strict=True):
        node = TextNode(text=document.get_content(), id_=document.node_id, metadata=dict(document.metadata))
        node.relationships[NodeRelationship.SOURCE] = document.source_node or document.as_related_node_info()
        if span is not None:
            node.metadata["kvzip_tokens"] = [span.start, span.end]
            node.excluded_llm_metadata_keys.append("kvzip_tokens")
            node.excluded_embed_metadata_keys.append("kvzip_tokens")
        nodes.append(NodeWithScore(node=node, score=None))
    return nodes


def _combined(question: str, answers: Sequence[ChatResponse]) -> str:
    numbered = "\n\n".join(f"Answer {i}: {answer.message.content}" for i, answer in enumerate(answers, 1))
    return _COMBINE.format(count=len(answers), answers=numbered, question=question)


def _metadata(parts: Sequence[Part], answers: Sequence[ChatResponse], last: ChatResponse | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {node.node.node_id: node.node.metadata for part in parts for node in part.nodes}
    if answers:
        facts["parts"] = [
            {"context": part.context.key, "ref_doc_ids": [node.node.ref_doc_id for node in part.nodes], "answer": answer.message.content}
            for part, answer in zip(parts, answers, strict=True)
        ]
    if last is not None and last.raw is not None:
        usage: Counter[str] = Counter()
        for response in (*answers, last):
            usage.update((response.raw or {})["usage"])
        facts |= {"usage": dict(usage), "finish_reason": last.raw["finish_reason"]}
    return facts
