"""Answers that are objects of a Pydantic class."""

from __future__ import annotations

import json
import reprlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.base.llms.types import ChatResponse, ToolCallBlock
from llama_index.core.base.response.schema import AsyncStreamingResponse, PydanticResponse, StreamingResponse
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.program.function_program import get_function_tool
from pydantic import BaseModel

from kvzip_memory import InputError
from kvzip_memory.system.printable import brief
from llama_index_kvzip.llm import KVzipLLM, given_or_set


def unwrapped(llm: Any, output_cls: type[BaseModel] | None = None) -> tuple[KVzipLLM, type[BaseModel] | None]:
    """The model, ``Settings.llm`` for None, and the class of its answers if it is a ``StructuredLLM`` or a class is given.

    Raises:
        InputError: another model, or a class that is none of Pydantic's.
    """
    llm = given_or_set(llm)
    if isinstance(llm, StructuredLLM):
        llm, output_cls = llm.llm, output_cls or llm.output_cls
    if not isinstance(llm, KVzipLLM):
        raise InputError(
            f"llm is {reprlib.repr(llm)}; contexts are read by the model that made them: give a KVzipLLM over the same engine as llm=, or "
            "set Settings.llm to one"
        )
    if output_cls is not None and not (isinstance(output_cls, type) and issubclass(output_cls, BaseModel)):
        raise InputError(f"output_cls is {brief(output_cls)}; give a Pydantic class")
    return llm, output_cls


def object_call(output_cls: type[BaseModel], messages: Sequence[ChatMessage]) -> dict[str, Any]:
    """Arguments of a call with tools whose answer is the JSON of an object."""
    return {"tools": [get_function_tool(output_cls)], "chat_history": list(messages), "tool_required": True}


def object_of(output_cls: type[BaseModel], response: ChatResponse) -> BaseModel:
    """The object of a whole answer to such a call.

    Raises:
        pydantic.ValidationError: a check of the class that its JSON schema does not tell.
    """
    (call,) = (block for block in response.message.blocks if isinstance(block, ToolCallBlock))
    return output_cls.model_validate_json(json.dumps(call.tool_kwargs))


def _json_so_far(response: ChatResponse, before: str) -> str:
    """The JSON of the object's text; the last response of a stream, which holds it parsed, brings nothing new."""
    call = next((block for block in response.message.blocks if isinstance(block, ToolCallBlock)), None)
    return call.tool_kwargs if call is not None and isinstance(call.tool_kwargs, str) else before


def json_pieces(responses: Iterator[ChatResponse]) -> Generator[str, None, None]:
    """The object's JSON as it comes in the responses to such a call."""
    said = ""
    for response in responses:
        text = _json_so_far(response, said)
        yield text[len(said) :]
        said = text


async def ajson_pieces(responses: AsyncIterator[ChatResponse]) -> AsyncGenerator[str, None]:
    """:func:`json_pieces`, async."""
    said = ""
    async for response in responses:
        text = _json_so_far(response, said)
        yield text[len(said) :]
        said = text


@dataclass
class StreamedObject(StreamingResponse):
    """An object whose JSON is streamed; :attr:`response` is there at any time and reads what is left."""

    output_cls: type[BaseModel] = BaseModel

    def __post_init__(self) -> None:
        self._said: list[str] = []
        self.response_gen = self._heard(self.response_gen)

    def _heard(self, pieces: Iterator[str]) -> Generator[str, None, None]:
        for piece in pieces:
            self._said.append(piece)
            yield piece

    def __str__(self) -> str:
        for _ in self.response_gen:
            pass
        self.response_txt = "".join(self._said)
        return self.response_txt

    @property
    def response(self) -> BaseModel:
        """The object."""
        return self.output_cls.model_validate_json(str(self))

    def get_response(self) -> PydanticResponse:  # type: ignore[override]
        """The object as a response that is not streamed."""
        return PydanticResponse(self.response, self.source_nodes, self.metadata)


@dataclass
class AsyncStreamedObject(AsyncStreamingResponse):
    """An object whose JSON is streamed; :meth:`get_response` reads what is left."""

    output_cls: type[BaseModel] = BaseModel

    def __post_init__(self) -> None:
        super().__post_init__()
        self._said: list[str] = []
        self.response_gen = self._heard(self.response_gen)

    async def _heard(self, pieces: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        async for piece in pieces:
            self._said.append(piece)
            yield piece

    async def get_response(self) -> PydanticResponse:  # type: ignore[override]
        """The object as a response that is not streamed."""
        async for _ in self.response_gen:
            pass
        self.response_txt = "".join(self._said)
        return PydanticResponse(self.output_cls.model_validate_json(self.response_txt), self.source_nodes, self.metadata)
