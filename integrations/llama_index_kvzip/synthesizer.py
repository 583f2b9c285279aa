"""A LlamaIndex response synthesizer that reads retrieved nodes as compressed contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, StreamingResponse
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.llms import LLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle, QueryType, TextNode
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index_instrumentation import get_dispatcher

from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.registry.holders import document_tag
from llama_index_kvzip.llm import given_or_set
from llama_index_kvzip.options import ANSWER_OPTIONS, known_options
from llama_index_kvzip.packing import readable, room
from llama_index_kvzip.placing import Placing
from llama_index_kvzip.query_engine import KVzipQueryEngine
from llama_index_kvzip.reading import Reading
from llama_index_kvzip.sources import Part
from llama_index_kvzip.structured import unwrapped

_dispatcher = get_dispatcher(__name__)


class KVzipSynthesizer(BaseSynthesizer):
    """Answers from the nodes that any index retrieves. The same set of nodes is read once, whatever their order and scores.

    .. code-block:: python

        index = SummaryIndex.from_documents(documents)
        query_engine = index.as_query_engine(llm=llm, response_synthesizer=KVzipSynthesizer(llm))
        print(query_engine.query("Who signed the lease?"))

    Nodes are read in the order of their documents and of their places in them, each under the title, file name or source in its
    metadata; what does not fit into one context goes into several, asked as by :class:`KVzipQueryEngine`: joined. ``source_nodes`` are the
    retrieved nodes with their scores. An index whose nodes are other ones for every question gains nothing: each set is built.

    Args:
        llm: what reads and answers, None is ``Settings.llm``; its ``ratio`` applies. ``llm.as_structured_llm(cls)`` answers with objects.
        system: a system prompt that is put first and never evicted.
        streaming: stream the answer.
        options: of :class:`KVzipQueryEngine`, such as ``source_top_k`` and ``output_cls``, or of every call, such as ``max_tokens``.

    Raises:
        InputError: as for :class:`KVzipQueryEngine`.
        WindowError: by every call: a node that is too long for a context.
        BudgetError, ModelError: by every call, as for :meth:`KVzipEngine.load`.
    """

    def __init__(self, llm: LLM | None = None, *, system: str | None = None, streaming: bool = False, **options: Any) -> None:
        llm, options = given_or_set(llm), known_options(options, ANSWER_OPTIONS)
        self._model, output_cls = unwrapped(llm, options.get("output_cls"))
        super().__init__(llm=self._model, callback_manager=llm.callback_manager, streaming=streaming, output_cls=output_cls)
        self._system, self._options = system, {**options, "output_cls": output_cls, "streaming": streaming}
        self._top_k = options.get("source_top_k")
        KVzipQueryEngine(self._model, tuple, **self._options)  # tells at once what is wrong with them

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from nodes; ``response_kwargs`` are options of the call."""
        nodes = _readable(nodes)
        reader = self._reader(nodes, response_kwargs)  # tells at once what is wrong with them
        if not nodes:
            return super().synthesize(query, nodes, additional_source_nodes)
        with self._event(query) as (bundle, end):
            response = reader.query(bundle)
            return end(self._with_sources(response, nodes, additional_source_nodes))

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """:meth:`synthesize` in a thread."""
        nodes = _readable(nodes)
        reader = self._reader(nodes, response_kwargs)
        if not nodes:
            return await super().asynthesize(query, nodes, additional_source_nodes)
        with self._event(query) as (bundle, end):
            response = await reader.aquery(bundle)
            return end(self._with_sources(response, nodes, additional_source_nodes))

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answer from texts."""
        nodes = _readable(_nodes(text_chunks))
        reader = self._reader(nodes, response_kwargs)
        return _said(reader.query(query_str) if nodes else super().synthesize(query_str, nodes))

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """:meth:`get_response` in a thread."""
        nodes = _readable(_nodes(text_chunks))
        reader = self._reader(nodes, response_kwargs)
        return _said(await (reader.aquery(query_str) if nodes else super().asynthesize(query_str, nodes)))

    def forget(self, document_id: str) -> None:
        """Delete the contexts with nodes of a document, also other synthesizers'; what was loaded under a name or other tags stays.

        Args:
            document_id: the nodes' ``ref_doc_id``; for a random one, which is another one at the next run, the ``file_path``,
                ``file_name``, ``source`` or ``url`` of their metadata, the first that is there.

        Raises:
            StorageError: as for :meth:`KVzipEngine.forget`.
        """
        self._model.engine.forget(document_tag(clean(document_id, "a document's id")))

    def _reader(self, nodes: Sequence[NodeWithScore], options: dict[str, Any]) -> KVzipQueryEngine:
        return KVzipQueryEngine(
            self._model, lambda: self._parts([node.node for node in nodes]), **{**self._options, **known_options(options, ANSWER_OPTIONS)}
        )

    def _parts(self, nodes: Sequence[BaseNode]) -> list[Part]:
        groups = Placing(self._model.engine, room(self._model, self._system)).together(sorted(nodes, key=_place))
        return Reading(self._model, self._system).parts(groups, apart=len(groups) > 1)

    def _with_sources(self, response: RESPONSE_TYPE, nodes: Sequence[NodeWithScore], more: Sequence[NodeWithScore] | None) -> RESPONSE_TYPE:
        found = nodes if self._top_k is None else response.source_nodes
        response.source_nodes = [*found, *(more or ())]
        response.metadata = {**(response.metadata or {}), **{node.node.node_id: node.node.metadata for node in response.source_nodes}}
        return response

    @contextmanager
    def _event(self, query: QueryType) -> Iterator[tuple[QueryBundle, Callable[[RESPONSE_TYPE], RESPONSE_TYPE]]]:
        """What LlamaIndex' own synthesizers tell callbacks and instrumentation."""
        bundle = QueryBundle(query) if isinstance(query, str) else query
        _dispatcher.event(SynthesizeStartEvent(query=query))
        with self.callback_manager.event(CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: bundle.query_str}) as event:

            def end(response: RESPONSE_TYPE) -> RESPONSE_TYPE:
                event.on_end(payload={EventPayload.RESPONSE: response})
                _dispatcher.event(SynthesizeEndEvent(query=query, response=response))
                return response

            yield bundle, end

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """There is no prompt to change: the question goes to the model as it is."""


def _place(node: BaseNode) -> tuple[str, int, str]:
    """Sorts nodes by what is in them and not by ids, which differ between two indices of the same documents."""
    document = node.source_node
    return (document.hash if document and document.hash else "", getattr(node, "start_char_idx", None) or 0, node.hash)


def _nodes(texts: Sequence[str]) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text)) for text in texts]


def _readable(nodes: Sequence[NodeWithScore]) -> list[NodeWithScore]:
    read = {id(node) for node in readable([scored.node for scored in nodes])}
    return [scored for scored in nodes if id(scored.node) in read]


def _said(response: RESPONSE_TYPE) -> RESPONSE_TEXT_TYPE:
    if isinstance(response, StreamingResponse):
        return response.response_gen
    if isinstance(response, AsyncStreamingResponse):
        return response.async_response_gen()
    return response.response or ""
