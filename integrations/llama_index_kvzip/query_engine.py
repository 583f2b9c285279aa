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
from llama_index.core.prompts.mixin import PromptDictType, PromptMixinType
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from pydantic import BaseModel

from kvzip_memory import CompressedContext, InputError
from kvzip_memory.bridge import result_of
from kvzip_memory.context import checked_context
from kvzip_memory.frameworks.options import checked_flag
from llama_index_kvzip.llm import KVzipLLM, given_or_set
from llama_index_kvzip.options import ANSWER_OPTIONS, known_options
from llama_index_kvzip.packing import encodable, readable, tag_of
from llama_index_kvzip.sources import Part, Ranking, whole
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

# Makes the metadata of a response from the calls that were made.
Facts = Callable[..., dict[str, Any]]

_ONE_ANSWER = (ResponseMode.COMPACT, ResponseMode.TREE_SUMMARIZE)
_MODES = (*_ONE_ANSWER, ResponseMode.ACCUMULATE, ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY)
_COMBINE = (
    "A question was answered from {count} parts of the documents, each without the others.\n\n{answers}\n\n"
    "Question: {question}\n\nGive one answer to the question. Leave out parts that do not know it."
)


class KVzipQueryEngine(BaseQueryEngine):
    """Answers every question from compressed contexts that hold all documents; one of them, as a rule, and one model call.

    .. code-block:: python

        documents = SimpleDirectoryReader("contracts").load_data()
        query_engine = KVzipQueryEngine.from_documents(documents, llm=llm)
        print(query_engine.query("Who signed the lease?"))

    Where there are several contexts and the question is about one of them alone, as its words and the attention it pays agree, only that
    is asked. Otherwise all are asked at one time and one more call combines their answers. ``metadata["parts"]`` shows
    which were asked and what they said. More answers than a prompt takes are combined a few at a time before, and none of them is longer
    than a quarter of the window. ``metadata["usage"]`` sums up all calls.

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
        output_cls: a Pydantic class; ``response`` is an object of it, in a ``PydanticResponse``, and its JSON is what is streamed. Where
            several contexts are asked, it is what the last call gives.
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
        self._quarter = self._llm.engine.window // 4

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
            answers: list[ChatResponse] = []
            response: RESPONSE_TYPE
            if self._asks_each(parts):
                with ThreadPoolExecutor(len(parts)) as pool:
                    runs = [pool.submit(contextvars.copy_context().run, self._ask, part, question) for part in parts]
                    answers = [run.result() for run in runs]
            calls = rest = answers
            while count := self._combined_before(question, rest):
                said = self._llm.with_context(None).chat([ChatMessage(_combined(question, rest[:count]))], **self._options_of_part())
                calls, rest = [*calls, said], [*rest[count:], said]
            if not parts:
                response = StreamingResponse(_empty()) if self._streaming else Response(_EMPTY)
            elif self._mode not in _ONE_ANSWER:
                response = Response(self._listed(nodes, answers), nodes, _metadata(parts, nodes, answers, answers))
            else:
                llm, asked = self._last_call(parts, question, rest)
                response = self._answered(llm, asked, nodes, partial(_metadata, parts, nodes, answers), calls)
            event.on_end(payload={EventPayload.RESPONSE: response})
            return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self._event(query_bundle) as event:
            question = query_bundle.query_str
            parts, nodes = await result_of(self._llm.engine.loads, self._aimed, question)
            answers: list[ChatResponse] = []
            response: RESPONSE_TYPE
            if self._asks_each(parts):
                asked, options = [ChatMessage(question)], self._options_of_part()
                answers = await asyncio.gather(*(self._llm.with_context(p.context).achat(asked, **options) for p in parts))
            calls = rest = answers
            while count := self._combined_before(question, rest):
                asked = [ChatMessage(_combined(question, rest[:count]))]
                said = await self._llm.with_context(None).achat(asked, **self._options_of_part())
                calls, rest = [*calls, said], [*rest[count:], said]
            if not parts:
                response = AsyncStreamingResponse(_aempty()) if self._streaming else Response(_EMPTY)
            elif self._mode not in _ONE_ANSWER:
                response = Response(self._listed(nodes, answers), nodes, _metadata(parts, nodes, answers, answers))
            else:
                llm, asked = self._last_call(parts, question, rest)
                response = await self._aanswered(llm, asked, nodes, partial(_metadata, parts, nodes, answers), calls)
            event.on_end(payload={EventPayload.RESPONSE: response})
            return response

    def _answered(
        self, llm: KVzipLLM, asked: list[ChatMessage], nodes: list[NodeWithScore], facts: Facts, calls: Sequence[ChatResponse]
    ) -> RESPONSE_TYPE:
        """The one answer, by the last call behind ``calls``."""
        if self._output_cls is not None:
            call = {**object_call(self._output_cls, asked), **self._options}
            if self._streaming:
                return StreamedObject(json_pieces(llm.stream_chat_with_tools(**call)), nodes, facts(), output_cls=self._output_cls)
            last = llm.chat_with_tools(**call)
            return PydanticResponse(object_of(self._output_cls, last), nodes, facts([*calls, last]))
        if self._streaming:
            pieces = (piece.delta or "" for piece in llm.stream_chat(asked, **self._options))
            return StreamingResponse(pieces, nodes, facts())
        last = llm.chat(asked, **self._options)
        return Response(last.message.content, nodes, facts([*calls, last]))

    async def _aanswered(
        self, llm: KVzipLLM, asked: list[ChatMessage], nodes: list[NodeWithScore], facts: Facts, calls: Sequence[ChatResponse]
    ) -> RESPONSE_TYPE:
        if self._output_cls is not None:
            call = {**object_call(self._output_cls, asked), **self._options}
            if self._streaming:
                responses = await llm.astream_chat_with_tools(**call)
                return AsyncStreamedObject(ajson_pieces(responses), nodes, facts(), output_cls=self._output_cls)
            last = await llm.achat_with_tools(**call)
            return PydanticResponse(object_of(self._output_cls, last), nodes, facts([*calls, last]))
        if self._streaming:
            pieces = (piece.delta or "" async for piece in await llm.astream_chat(asked, **self._options))
            return AsyncStreamingResponse(pieces, nodes, facts())
        last = await llm.achat(asked, **self._options)
        return Response(last.message.content, nodes, facts([*calls, last]))

    def _asks_each(self, parts: Sequence[Part]) -> bool:
        """Whether the contexts are asked by themselves, with or without a call for all of them behind."""
        return (self._mode == ResponseMode.ACCUMULATE and len(parts) > 0) or (self._mode in _ONE_ANSWER and len(parts) > 1)

    def _options_of_part(self) -> dict[str, Any]:
        """Options of a call whose answer is combined with others."""
        if self._mode == ResponseMode.ACCUMULATE:
            return self._options
        limit: int = self._llm.stream_options(self._options)["max_new_tokens"]
        return {**self._options, "max_tokens": min(limit, self._quarter)}

    def _combined_before(self, question: str, answers: Sequence[ChatResponse]) -> int:
        """How many answers, two or more, are combined before the others since no prompt takes all; 0 if one does."""
        if self._mode == ResponseMode.ACCUMULATE:
            return 0
        room = self._llm.engine.window - self._options_of_part()["max_tokens"]
        for count in range(3, len(answers) + 1):
            if self._llm.engine.count_tokens([{"role": "user", "content": _combined(question, answers[:count])}]) > room:
                return count - 1
        return 0

    def _last_call(self, parts: Sequence[Part], question: str, answers: Sequence[ChatResponse]) -> tuple[KVzipLLM, list[ChatMessage]]:
        """What gives the one answer, and what it is asked."""
        if len(parts) == 1:
            return self._llm.with_context(parts[0].context), [ChatMessage(question)]
        return self._llm.with_context(None), [ChatMessage(_combined(question, answers))]

    def _listed(self, nodes: Sequence[NodeWithScore], answers: Sequence[ChatResponse]) -> str:
        """The text of the modes that do not give one answer, as LlamaIndex forms it."""
        if self._mode == ResponseMode.ACCUMULATE:
            said = (f"Response {i}: {answer.message.content}" for i, answer in enumerate(answers, 1))
            return "\n---------------------\n".join(said)
        return "\n\n".join(node.node.get_content() for node in nodes) if self._mode == ResponseMode.CONTEXT_ONLY else ""

    def _event(self, query_bundle: QueryBundle) -> Any:
        return self.callback_manager.event(CBEventType.QUERY, payload={EventPayload.QUERY_STR: query_bundle.query_str})

    def _aimed(self, question: str) -> tuple[Sequence[Part], list[NodeWithScore]]:
        """The parts to ask, and the sources."""
        parts = self._parts()
        if self._mode in _ONE_ANSWER and len(parts) > 1 and (only := self._sources.about_one(parts, question)):
            parts = [only]
        return parts, self._sources(parts, question)

    def _ask(self, part: Part, question: str) -> ChatResponse:
        return self._llm.with_context(part.context).chat([ChatMessage(question)], **self._options_of_part())

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


def _combined(question: str, answers: Sequence[ChatResponse]) -> str:
    numbered = "\n\n".join(f"Answer {i}: {answer.message.content}" for i, answer in enumerate(answers, 1))
    return _COMBINE.format(count=len(answers), answers=numbered, question=question)


def _metadata(
    parts: Sequence[Part], nodes: Sequence[NodeWithScore], answers: Sequence[ChatResponse], calls: Sequence[ChatResponse] = ()
) -> dict[str, Any]:
    facts: dict[str, Any] = {node.node.node_id: node.node.metadata for node in nodes}
    facts["parts"] = [{"context": part.context.key, "ref_doc_ids": [node.node.ref_doc_id for node in part.nodes]} for part in parts]
    for asked, answer in zip(facts["parts"], answers, strict=False):  # no answers of parts if one was asked, which gave the answer
        asked["answer"] = answer.message.content
    if calls:
        raws: list[Any] = [call.raw for call in calls]
        usage: Counter[str] = Counter()
        for raw in raws:
            usage.update(raw["usage"])
        facts |= {"usage": dict(usage), "finish_reason": raws[-1]["finish_reason"]}
    return facts
