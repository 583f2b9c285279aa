"""Answers that are values of a type: the JSON schema that guides them, and what reads them."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic.v1
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables.utils import AddableDict
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.json import parse_partial_json
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import is_typeddict

from kvzip_memory import InputError

# The only argument of a tool whose answer is no object.
_VALUE = "value"

_NOTHING = object()


class _Guiding(GenerateJsonSchema):
    """Pydantic's schemas, as far as they guide: without titles of fields, which only say their names once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def decimal_schema(self, schema: Any) -> Any:
        """A number; the other form, any text, says nothing of a number."""
        made = super().decimal_schema(schema)
        return made.get("anyOf", [made])[0]

    def set_schema(self, schema: Any) -> Any:
        """Without ``uniqueItems``, which guidance cannot keep to and a set needs not: it drops what comes twice."""
        return {key: value for key, value in super().set_schema(schema).items() if key != "uniqueItems"}

    def frozenset_schema(self, schema: Any) -> Any:
        return {key: value for key, value in super().frozenset_schema(schema).items() if key != "uniqueItems"}

    def enum_schema(self, schema: Any) -> Any:
        for member in schema["members"]:
            if not isinstance(member.value, str | int | float | bool | None):
                raise InputError(f"{member} has the value {member.value!r}, which no JSON stands for; use texts or numbers")
        return super().enum_schema(schema)


@dataclass(frozen=True)
class Wanted:
    """What an answer is to be.

    Attributes:
        schema: of its JSON.
        read: makes the value of the JSON's text; raises whatever is wrong with it.
    """

    schema: dict[str, Any]
    read: Callable[[str], Any] = json.loads

    @classmethod
    def of(cls, wanted: Any) -> Wanted:
        """What is asked for by a Pydantic class or any other type that Pydantic validates, a ``TypedDict``, a function, a tool, or a JSON
        schema, whose answers stay dictionaries.

        Raises:
            InputError: none of these, or a type of values that JSON does not have.
        """
        is_v1 = isinstance(wanted, type) and issubclass(wanted, pydantic.v1.BaseModel)
        try:
            if (own := own_schema(wanted)) is not None:
                read = TypeAdapter(wanted).validate_json if isinstance(wanted, type) else json.loads
                return cls({key: own[key] for key in ("title", "description") if key in own} | own, read)
            if is_v1 or isinstance(wanted, dict | BaseTool) or is_typeddict(wanted) or inspect.isroutine(wanted):
                return cls(convert_to_json_schema(wanted), wanted.parse_raw if is_v1 else json.loads)
            if isinstance(wanted, str) or wanted is None:
                raise TypeError("no type")
            adapter = TypeAdapter(wanted)
            return cls(adapter.json_schema(schema_generator=_Guiding), adapter.validate_json)
        except InputError:
            raise
        except Exception as error:  # of LangChain or Pydantic, in many kinds
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"answers cannot be {str(wanted)[:80]} ({reason}); give a type that Pydantic validates, a TypedDict, or a JSON schema"
            ) from error

    @property
    def is_object(self) -> bool:
        return _is_object(self.schema, self.schema)

    @property
    def traced(self) -> dict[str, Any]:
        """The schema for LangChain's traces, which knows types by one name: several are said as ``anyOf``."""
        kinds = self.schema.get("type", "")
        if isinstance(kinds, str):
            return dict(self.schema)
        several = {"anyOf": [{"type": kind} for kind in kinds]} if isinstance(kinds, list) else {}
        return {**{key: value for key, value in self.schema.items() if key != "type"}, **several}

    def as_format(self, told: bool) -> dict[str, Any]:
        """OpenAI's ``response_format``, of which the model is ``told`` or not."""
        named = {"name": self.schema.get("title", "answer"), "schema": self.schema}
        return {"type": "json_schema" if told else "json_object", "json_schema": named}

    def as_tool(self) -> dict[str, Any]:
        """A tool whose call is the answer: its arguments, or if that is no object, the only one of them."""
        about = {key: value for key, value in self.schema.items() if key in ("title", "description")}
        parameters = {key: value for key, value in self.schema.items() if key not in about}
        if not self.is_object:
            shared = {key: value for key, value in parameters.items() if key in ("$defs", "definitions")}
            value = {key: value for key, value in parameters.items() if key not in shared}
            parameters = {"type": "object", "properties": {_VALUE: value}, "required": [_VALUE], **shared}
        elif "properties" in parameters:
            parameters = {"type": "object", **parameters}
        function = {"name": about.pop("title", "answer"), **about, "parameters": parameters}
        return {"type": "function", "function": function}


def own_schema(schema: Any) -> dict[str, Any] | None:
    """A Pydantic class's own schema, or a dictionary that is one. What LangChain makes of it lacks references to itself and keywords."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema(schema_generator=_Guiding)
    if isinstance(schema, dict) and schema.get("type") != "function" and not {"name", "toolSpec"} & schema.keys():
        return schema
    return None


def _is_object(schema: Any, root: Mapping[str, Any], depth: int = 0) -> bool:
    """Whether all that validates are objects, as far as the schema tells at once."""
    if not isinstance(schema, Mapping) or depth > 16:  # a reference to itself
        return False
    if isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for step in reference.removeprefix("#").split("/")[1:]:
            target = target.get(step) if isinstance(target, Mapping) else None
        return _is_object(target, root, depth + 1)
    if "type" in schema or "properties" in schema:  # properties without a type are meant as an object's
        return schema.get("type", "object") == "object"
    parts = {key: [_is_object(part, root, depth + 1) for part in schema[key]] for key in ("anyOf", "oneOf", "allOf") if schema.get(key)}
    return any(any(found) if key == "allOf" else all(found) for key, found in parts.items())


class AnswerParser(BaseTransformOutputParser[Any]):
    """Makes a message's text, or the call in it, the value that was asked for.

    Raises:
        OutputParserException: it is none.
    """

    wanted: Any
    in_call: bool = False
    include_raw: bool = False
    """Give ``{"raw", "parsed", "parsing_error"}``, whatever is wrong with the answer."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        generation = result[0]
        message = generation.message if isinstance(generation, ChatGeneration) else AIMessage(generation.text)
        if self.include_raw:
            return {"raw": message, **self._parsed(message)}
        return self._so_far(message) if partial else self._read(message)

    def parse(self, text: str) -> Any:
        return self.parse_result([Generation(text=text)])

    def _read(self, message: BaseMessage) -> Any:
        text = str(message.text)
        try:
            if unfinished := message.response_metadata.get("kvzip", {}).get("unfinished"):
                raise ValueError(unfinished)
            if self.in_call:
                text = json.dumps(self._arguments(message))
            return self.wanted.read(text)
        except Exception as error:  # validators of a class raise what they like
            raise OutputParserException(f"the answer is not what was asked for: {error}", llm_output=text) from error

    def _arguments(self, message: BaseMessage) -> Any:
        if not isinstance(message, AIMessage) or not message.tool_calls:
            raise ValueError("it calls no tool")
        arguments = message.tool_calls[0]["args"]
        return arguments if self.wanted.is_object else arguments[_VALUE]

    def _so_far(self, message: BaseMessage) -> Any:
        """The value of what there is, if it is one already."""
        try:
            value = self._arguments(message) if self.in_call else parse_partial_json(str(message.text))
            return self.wanted.read(json.dumps(value))
        except Exception:
            return _NOTHING

    def _parsed(self, message: BaseMessage) -> dict[str, Any]:
        try:
            return {"parsed": self._read(message), "parsing_error": None}
        except OutputParserException as error:
            return {"parsed": None, "parsing_error": error}

    # LangChain's own ends a stream without a word where the last value is none.

    def _shown(self, chunk: BaseMessage, whole: BaseMessage, before: Any) -> Any:
        if self.include_raw:
            return AddableDict(raw=chunk)
        value = self._so_far(whole)
        return _NOTHING if value == before else value

    def _last(self, whole: BaseMessage, before: Any) -> Any:
        if self.include_raw:
            return AddableDict(self._parsed(whole))
        value = self._read(whole)
        return _NOTHING if value == before else value

    def _transform(self, input: Iterator[str | BaseMessage]) -> Iterator[Any]:
        whole: Any = None
        before: Any = _NOTHING
        for chunk in input:
            message: Any = AIMessage(chunk) if isinstance(chunk, str) else chunk
            whole = message if whole is None else whole + message
            if (value := self._shown(message, whole, before)) is not _NOTHING:
                yield (before := value)
        if whole is not None and (value := self._last(whole, before)) is not _NOTHING:
            yield value

    async def _atransform(self, input: AsyncIterator[str | BaseMessage]) -> AsyncIterator[Any]:
        whole: Any = None
        before: Any = _NOTHING
        async for chunk in input:
            message: Any = AIMessage(chunk) if isinstance(chunk, str) else chunk
            whole = message if whole is None else whole + message
            if (value := self._shown(message, whole, before)) is not _NOTHING:
                yield (before := value)
        if whole is not None and (value := self._last(whole, before)) is not _NOTHING:
            yield value
