"""A LlamaIndex query engine over whole documents: no chunks, no embeddings, one model call a question."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE, AsyncStreamingResponse, PydanticResponse, Response, StreamingResponse
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.llms import LLM, ChatMessage, ChatResponse
from llama_index.core.node_parser import NodeParser
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from pydantic import BaseModel

from kvzip_memory import CompressedContext, InputError
from kvzip_memory.bridge import result_of
from kvzip_memory.context import checked_context
from kvzip_memory.prompting.window import FREE_TOKENS
from kvzip_memory.system.flags import checked_flag
from llama_index_kvzip.llm import given_or_set
from llama_index_kvzip.options import ANSWER_OPTIONS, known_options
from llama_index_kvzip.packing import encodable, readable, tag_of
from llama_index_kvzip.sources import Part, Ranking, joined_last, whole
from llama_index_kvzip.structured import (
    AsyncStreamedObject,
    StreamedObject,
    ajson_pieces,
    json_pieces,
    object_call,
    object_of,
    unwrapped,
)

# What LlamaIndex' own engines say where there is nothing to read.
_EMPTY = "Empty Response"

_ONE_ANSWER = (ResponseMode.COMPACT, ResponseMode.TREE_SUMMARIZE)
_MODES = (*_ONE_ANSWER, ResponseMode.ACCUMULATE, ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)


class KVzipQueryEngine(BaseQueryEngine):
    """Answers every question from compressed contexts that hold whole documents, in one model call.

    .. code-block:: python

        documents = SimpleDirectoryReader("contracts").load_data()
        query_engine = KVzipQueryEngine.from_documents(documents, llm=llm)
        print(query_engine.query("Who signed the lease?"))

    Where there are several contexts those are asked that the question is about, as its words and the attention it pays say, as many as
    the window takes: joined, see :meth:`KVzipEngine.join`, what it is about most next to it. ``metadata["parts"]`` shows what was asked.
    Of a model whose contexts cannot be joined the one is asked that it is about most.

    Where there are no documents the answer is LlamaIndex' "Empty Response".

    Args:
        llm: what answers, None is ``Settings.llm``; ``llm.as_structured_llm(cls)`` gives its ``output_cls``, too.
        parts: gives the contexts to ask and their nodes, which are the ``source_nodes`` of every answer.
        response_mode: ``"compact"`` and ``"tree_summarize"`` give one answer: all is read at one time, so they are the same.
            ``"accumulate"`` lists the answers from several contexts instead. ``"no_text"`` gives the sources and ``"context_only"``
            their texts, without a call. Other modes feed texts to the model piece by piece or not at all, which is not done here.
        streaming: return a :class:`StreamingResponse`, or an :class:`AsyncStreamingResponse`.
        source_top_k: make the ``source_nodes`` the so many passages that the question is about most, with scores; see
            :class:`~llama_index_kvzip.sources.Ranking`. ``similarity_top_k`` is another name of it.
        node_parser: splits documents into these passages; None takes paragraphs.
        output_cls: a Pydantic class; ``response`` is an object of it, in a ``PydanticResponse``, and its JSON is what is streamed.
        options: of every call, such as ``max_tokens``, see :class:`KVzipLLM`, which tells the errors too.

    Raises:
        InputError: unknown options, another ``response_mode``, ``"accumulate"`` with ``streaming`` or ``output_cls``, a ``streaming``
            that is neither True nor False, or a ``source_top_k`` that is no whole number of at least 1.
    """

    def __init__(
        self,
        llm: LLM | None,
        parts: Callable[[], Sequence[Part]],
        *,
        response_mode: ResponseMode | str = ResponseMode.COMPACT,
        streaming: bool = False,
        source_top_k: int | None = None,
        node_parser: NodeParser | None = None,
        output_cls: type[BaseModel] | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        options = known_options({**options, "source_top_k": source_top_k}, ANSWER_OPTIONS)
        source_top_k = options.pop("source_top_k")
        llm = given_or_set(llm)
        super().__init__(callback_manager or llm.callback_manager)
        self._llm, self._output_cls = unwrapped(llm, output_cls)
        self._parts, self._streaming, self._options = parts, checked_flag("streaming", streaming), options
        self._llm.stream_options(options)  # tells at once what is wrong with them
        self._mode = _checked_mode(response_mode, streaming, self._output_cls)
        self._sources = Ranking(self._llm.engine, source_top_k, node_parser)

    @classmethod
    def from_context(
        cls, context: CompressedContext, documents: Sequence[BaseNode] = (), *, llm: LLM | None = None, **kwargs: Any
    ) -> KVzipQueryEngine:
        """Answer from a context that was made of these documents."""
        made = cls(llm, lambda: [part], **kwargs)
        made._llm.engine.one_context([checked_context(context)])  # tells what is wrong with it
        part = Part(context, whole(context, documents))
        return made

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[BaseNode],
        *,
        llm: LLM | None = None,
        name: str | None = None,
        ratio: float | None = None,
        system: str | None = None,
        **kwargs: Any,
    ) -> KVzipQueryEngine:
        """Load the documents into one context, or find it if they were loaded before. Errors as ``engine.load``."""
        cls(llm, tuple, **kwargs)  # tells at once what is wrong with them
        documents = [encodable(document) for document in readable(documents)]
        model, _ = unwrapped(llm)
        ratio = model.ratio if ratio is None else ratio
        context = model.engine.load(documents, name=name, ratio=ratio, system=system, tags=tag_of(documents) if documents else ())
        return cls.from_context(context, documents, llm=llm, **kwargs)

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(query_bundle) as event:
            question = query_bundle.query_str
            parts, nodes = self._aimed(question)
            response: RESPONSE_TYPE
            if not parts:
                response = StreamingResponse(_empty()) if self._streaming else Response(_EMPTY)
            elif self._mode not in _ONE_ANSWER:
                answers = self._answers(parts, question) if self._mode == ResponseMode.ACCUMULATE else []
                response = Response(self._listed(nodes, answers), nodes, _metadata(parts, nodes, answers))
            else:
                response = self._answered(parts[0], question, nodes)
            event.on_end(payload={EventPayload.RESPONSE: response})
            return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(query_bundle) as event:
            question = query_bundle.query_str
            parts, nodes = await result_of(self._llm.engine.loads, self._aimed, question)
            response: RESPONSE_TYPE
            if not parts:
                response = AsyncStreamingResponse(_aempty()) if self._streaming else Response(_EMPTY)
            elif self._mode not in _ONE_ANSWER:
                answers = await self._aanswers(parts, question) if self._mode == ResponseMode.ACCUMULATE else []
                response = Response(self._listed(nodes, answers), nodes, _metadata(parts, nodes, answers))
            else:
                response = await self._aanswered(parts[0], question, nodes)
            event.on_end(payload={EventPayload.RESPONSE: response})
            return response

    def _answered(self, part: Part, question: str, nodes: list[NodeWithScore]) -> RESPONSE_TYPE:
        """The one answer."""
        llm, asked, facts = self._llm.with_context(part.context), [ChatMessage(question)], partial(_metadata, [part], nodes)
        if self._output_cls is not None:
            call = {**object_call(self._output_cls, asked), **self._options}
            if self._streaming:
                return StreamedObject(json_pieces(llm.stream_chat_with_tools(**call)), nodes, facts(), output_cls=self._output_cls)
            said = llm.chat_with_tools(**call)
            return PydanticResponse(object_of(self._output_cls, said), nodes, facts([said]))
        if self._streaming:
            pieces = (piece.delta or "" for piece in llm.stream_chat(asked, **self._options))
            return StreamingResponse(pieces, nodes, facts())
        said = llm.chat(asked, **self._options)
        return Response(said.message.content, nodes, facts([said]))

    async def _aanswered(self, part: Part, question: str, nodes: list[NodeWithScore]) -> RESPONSE_TYPE:
        llm, asked, facts = self._llm.with_context(part.context), [ChatMessage(question)], partial(_metadata, [part], nodes)
        if self._output_cls is not None:
            call = {**object_call(self._output_cls, asked), **self._options}
            if self._streaming:
                responses = await llm.astream_chat_with_tools(**call)
                return AsyncStreamedObject(ajson_pieces(responses), nodes, facts(), output_cls=self._output_cls)
            said = await llm.achat_with_tools(**call)
            return PydanticResponse(object_of(self._output_cls, said), nodes, facts([said]))
        if self._streaming:
            pieces = (piece.delta or "" async for piece in await llm.astream_chat(asked, **self._options))
            return AsyncStreamingResponse(pieces, nodes, facts())
        said = await llm.achat(asked, **self._options)
        return Response(said.message.content, nodes, facts([said]))

    def _answers(self, parts: Sequence[Part], question: str) -> list[ChatResponse]:
        """Each context's own."""
        if not parts:
            return []
        with ThreadPoolExecutor(len(parts)) as pool:
            runs = [pool.submit(contextvars.copy_context().run, self._ask, part, question) for part in parts]
            return [run.result() for run in runs]

    async def _aanswers(self, parts: Sequence[Part], question: str) -> list[ChatResponse]:
        asked = [ChatMessage(question)]
        return await asyncio.gather(*(self._llm.with_context(part.context).achat(asked, **self._options) for part in parts))

    def _listed(self, nodes: Sequence[NodeWithScore], answers: Sequence[ChatResponse]) -> str:
        """The text of the modes that do not give one answer, as LlamaIndex forms it."""
        if self._mode == ResponseMode.ACCUMULATE:
            said = (f"Response {i}: {answer.message.content}" for i, answer in enumerate(answers, 1))
            return "\n---------------------\n".join(said)
        return "\n\n".join(node.node.get_content() for node in nodes) if self._mode == ResponseMode.CONTEXT_ONLY else ""

    def _event(self, query_bundle: QueryBundle) -> Any:
        return self.callback_manager.event(CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str})

    def _aimed(self, question: str) -> tuple[Sequence[Part], list[NodeWithScore]]:
        """The parts to ask, one if there is to be one answer, and the sources."""
        parts = self._parts()
        if self._mode in _ONE_ANSWER and len(parts) > 1:
            engine = self._llm.engine
            tools = (
                [] if self._output_cls is None else [get_function_tool(self._output_cls).metadata.to_openai_tool(skip_length_check=True)]
            )
            asked = max(FREE_TOKENS, engine.count_tokens([{"role": "user", "content": question}], tools))
            behind = asked + self._llm.stream_options(self._options)["max_new_tokens"]
            parts = [joined_last(engine, self._sources.about(parts, question, engine.window - behind))]
        return parts, self._sources(parts, question)

    def _ask(self, part: Part, question: str) -> ChatResponse:
        return self._llm.with_context(part.context).chat([ChatMessage(question)], **self._options)

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """There is no prompt to change: the question goes to the model as it is."""


def _empty() -> Generator[str, None, None]:
    yield _EMPTY


async def _aempty() -> AsyncGenerator[str, None]:
    yield _EMPTY


def _checked_mode(mode: ResponseMode | str, streaming: bool, output_cls: type[BaseModel] | None) -> ResponseMode:
    if mode not in _MODES:  # strings equal the enumeration's members
        known = ", ".join(repr(known.value) for known in _MODES)
        raise InputError(f"response_mode {str(getattr(mode, 'value', mode))!r} does not fit whole documents; use one of {known}")
    if mode == ResponseMode.ACCUMULATE and streaming:
        raise InputError("response_mode 'accumulate' lists whole answers and cannot stream them; use 'compact', or do not stream")
    if mode == ResponseMode.ACCUMULATE and output_cls is not None:
        raise InputError("response_mode 'accumulate' lists answers as text; use 'compact' for an object of output_cls")
    return ResponseMode(mode)


def _metadata(parts: Sequence[Part], nodes: Sequence[NodeWithScore], answers: Sequence[ChatResponse] = ()) -> dict[str, Any]:
    facts: dict[str, Any] = {node.node.node_id: node.node.metadata for node in nodes}
    facts["parts"] = [{"context": part.context.key, "ref_doc_ids": [node.node.ref_doc_id for node in part.nodes]} for part in parts]
    if answers:
        raws: list[Any] = [answer.raw for answer in answers]
        usage: Counter[str] = Counter()
        for raw in raws:
            usage.update(raw["usage"])
        facts |= {"usage": dict(usage), "finish_reason": raws[-1]["finish_reason"]}
    return facts
