"""Structured answers in LangChain: a value of the type that was asked for, or what is wrong with it."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal, NamedTuple, NewType

import jsonschema
import pydantic.v1
import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from pydantic import AfterValidator, BaseModel, ConfigDict, FiniteFloat, HttpUrl, Json, RootModel
from typing_extensions import TypedDict

from conftest import tiny_engine
from kvzip_memory import InputError, KVzipEngine, UnfinishedError
from langchain_kvzip import KVzipChatModel
from langchain_kvzip.structured import AnswerParser, Wanted

METHODS = ["json_schema", "function_calling"]


class Color(Enum):
    RED = "red"
    BLUE = 2


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


class Lamp(BaseModel):
    """A lamp."""

    color: Color
    lit: Literal[True]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    color: Color
    colors: frozenset[Color]


class Bell(BaseModel):
    rung: Literal["once", "twice"]


@dataclasses.dataclass
class Door:
    color: Color
    open: bool


class Place(NamedTuple):
    side: Literal["left", "right"]
    door: Door


class Colors(RootModel[list[Color]]):
    """Some colors."""


class Old(pydantic.v1.BaseModel):
    wound: bool


class Note(TypedDict):
    """A note."""

    color: Literal["red", "blue"]


Code = NewType("Code", int)
ONE_OF = {"oneOf": [{"enum": ["a", "b"]}, {"type": "boolean"}]}
REFERRED = {"$ref": "#/$defs/A", "$defs": {"A": {"enum": ["a"]}}}

WANTED: dict[str, tuple[Any, Any]] = {
    "enum": (Color, Color),
    "int enum": (Size, Size),
    "enum within": (Lamp, Lamp),
    "strict": (Strict, Strict),
    "root model": (Colors, Colors),
    "pydantic v1": (Old, Old),
    "dataclass": (Door, Door),
    "named tuple": (Place, Place),
    "typed dict": (Note, dict),
    "literal": (Literal["a", 1], str | int),
    "union of models": (Lamp | Bell, Lamp | Bell),
    "optional": (Lamp | None, Lamp | None),
    "list": (list[Bell], list),
    "numbers": (Annotated[list[int], pydantic.Field(max_length=2)], list),
    "set": (Annotated[set[Color], pydantic.Field(max_length=2)], set),
    "dict": (dict[str, bool], dict),
    "bool": (bool, bool),
    "new type": (Code, int),
    "decimal": (Annotated[Decimal, pydantic.Field(ge=0, le=9)], Decimal),
    "one of": (ONE_OF, str | bool),
    "reference": (REFERRED, str),
    "nothing but a type": ({"type": "boolean"}, bool),
}


@pytest.fixture(scope="module")
def llm() -> KVzipChatModel:
    return KVzipChatModel(engine=tiny_engine(), max_tokens=400, temperature=1.0, seed=4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", WANTED)
def test_an_answer_is_of_the_type_that_was_asked_for(llm: KVzipChatModel, kind: str, method: str) -> None:
    wanted, type_ = WANTED[kind]
    reader = llm.with_structured_output(wanted, method=method)
    answer = reader.invoke("Which?")
    assert isinstance(answer, type_)
    assert list(reader.stream("Which?"))[-1] == answer


async def test_an_answer_is_the_same_however_it_is_asked_for(llm: KVzipChatModel) -> None:
    for method in METHODS:
        reader = llm.with_structured_output(Lamp, method=method)
        answer = reader.invoke("Which?")
        assert await reader.ainvoke("Which?") == answer
        assert [part async for part in reader.astream("Which?")][-1] == answer
        told = llm.with_structured_output(Lamp, method=method, include_raw=True).invoke("Which?")
        assert told["parsed"] == answer
        assert isinstance(told["raw"], AIMessage)
        assert told["parsing_error"] is None


def test_a_response_format_may_be_any_of_these_types(llm: KVzipChatModel) -> None:
    assert llm.invoke("Which?", response_format=Color).text in ('"red"', "2")
    assert llm.invoke("Which?", response_format=list[Literal[1]]).text.startswith("[")
    for wrong in ({"type": "json_schema", "json_schema": {}}, {"type": "json_schema", "json_schema": None}):
        with pytest.raises(InputError, match="needs a JSON schema at"):
            llm.invoke("Which?", response_format=wrong)


@pytest.mark.parametrize("method", [*METHODS, "json_mode"])
@pytest.mark.parametrize("titled", [True, False])
@pytest.mark.parametrize("kinds", [["object", "null"], ["object"], ["integer", "null"], ["boolean"]], ids=str)
def test_a_schema_may_name_several_types(llm: KVzipChatModel, kinds: list[str], titled: bool, method: str) -> None:
    schema: dict[str, Any] = {"type": kinds, **({"title": "Lamp", "description": "A lamp."} if titled else {})}
    if "object" in kinds:
        schema |= {"properties": {"lit": {"type": "boolean"}}, "required": ["lit"], "additionalProperties": False}
    asking = llm.with_structured_output(schema, method=method)
    answer = asking.invoke("Is it lit?")
    jsonschema.validate(answer, schema)
    assert list(asking.stream("Is it lit?"))[-1] == answer
    assert llm.with_structured_output(schema, method=method, include_raw=True).invoke("Is it lit?")["parsed"] == answer


def test_a_tools_schema_may_name_several_types(llm: KVzipChatModel) -> None:
    tool = {"title": "light", "description": "Light it.", "type": ["object", "null"], "properties": {"lit": {"type": "boolean"}}}
    calling = llm.bind_tools([{**tool, "required": ["lit"]}], tool_choice="any").invoke("Light it.")
    assert [(call["name"], type(call["args"]["lit"])) for call in calling.tool_calls] == [("light", bool)]
    for wrong in ({**tool, "type": ["string", "null"]}, {**tool, "type": 5}, 5, {"type": ["object"]}):
        with pytest.raises(InputError, match="is no tool"):
            llm.bind_tools([wrong])  # type: ignore[list-item]


def test_a_model_is_told_that_a_value_is_asked_for(llm: KVzipChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def stream(engine: KVzipEngine, context: Any, turns: Any, **options: Any) -> Any:
        said.append(turns[-1]["content"])
        return unchanged(engine, context, turns, **options)

    unchanged = KVzipEngine.stream
    monkeypatch.setattr(KVzipEngine, "stream", stream)
    llm.with_structured_output(Color).invoke("Which?")
    llm.with_structured_output(Bell).invoke("Which?")
    assert [text.split()[5] for text in said] == ["value", "object"]


class Plain:
    def __init__(self, a: int) -> None: ...


class Odd(Enum):
    PAIR = (1, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [Plain, Odd, type, 3, "Lamp", None], ids=str)
def test_what_is_no_type_of_answers_is_refused(llm: KVzipChatModel, wanted: Any, method: str) -> None:
    with pytest.raises(InputError, match=r"answers cannot be|which no JSON stands for"):
        llm.with_structured_output(wanted, method=method)


def test_a_structured_call_takes_no_other_options(llm: KVzipChatModel) -> None:
    with pytest.raises(InputError, match=r"\['tools'\] are unknown"):
        llm.with_structured_output(Color, tools=[])
    assert isinstance(llm.with_structured_output(None, method="json_mode").invoke("Which?"), dict)


# -- what goes wrong with an answer ------------------------------------------------------------------------------


def refused(value: str) -> str:
    raise KeyError(value)


class Link(BaseModel):
    url: Annotated[Literal["nowhere"], AfterValidator(refused)]


class Far(BaseModel):
    """Its checks are not in its schema."""

    where: Annotated[Literal["x"], AfterValidator(lambda value: HttpUrl(value))]


FAILING = {"any error of a validator": Link, "a check that is not in the schema": Far}


async def every_way(reader: Runnable[Any, Any], **options: Any) -> list[Any]:
    """What comes of one question by all four methods; of streams the sum of what they give."""
    pieces = list(reader.stream("Which?", **options))
    apieces = [piece async for piece in reader.astream("Which?", **options)]
    return [
        reader.invoke("Which?", **options),
        await reader.ainvoke("Which?", **options),
        sum(pieces[1:], pieces[0]),
        sum(apieces[1:], apieces[0]),
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FAILING)
async def test_an_answer_that_does_not_become_the_type_is_an_output_parser_exception(llm: KVzipChatModel, kind: str, method: str) -> None:
    wanted = FAILING[kind]
    with pytest.raises(OutputParserException, match="not what was asked for"):
        llm.with_structured_output(wanted, method=method).invoke("Which?")
    with pytest.raises(OutputParserException, match="not what was asked for"):
        list(llm.with_structured_output(wanted, method=method).stream("Which?"))
    for told in await every_way(llm.with_structured_output(wanted, method=method, include_raw=True)):
        assert told["parsed"] is None
        assert isinstance(told["parsing_error"], OutputParserException)
        assert told["raw"].text or told["raw"].tool_calls


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (FiniteFloat, "1e999"),
        (Decimal, "1e999"),
        (Json, '"{"'),
        (int, "9" * 5000),
        ({"type": "integer"}, "9" * 5000),
        (dict[int, str], '{"a": ""}'),
    ],
    ids=["float", "decimal", "json", "int", "any", "key"],
)
def test_what_guidance_allows_and_a_type_does_not_is_an_output_parser_exception(wanted: Any, text: str) -> None:
    parser = AnswerParser(wanted=Wanted.of(wanted))
    for answer in (AIMessage(text), text):
        with pytest.raises(OutputParserException, match="not what was asked for"):
            parser.invoke(answer)
    with pytest.raises(OutputParserException, match="it calls no tool"):
        AnswerParser(wanted=Wanted.of(wanted), in_call=True).invoke(AIMessage(text))


@pytest.mark.parametrize("method", METHODS)
async def test_a_cut_answer_is_told_beside_what_there_is_of_it(llm: KVzipChatModel, method: str) -> None:
    with pytest.raises(UnfinishedError):
        llm.with_structured_output(Lamp, method=method).invoke("Which?", stop=["lor"])
    for told in await every_way(llm.with_structured_output(Lamp, method=method, include_raw=True), stop=["lor"]):
        assert told["parsed"] is None
        assert "was cut by a stop string" in str(told["parsing_error"])
        assert told["raw"].response_metadata["finish_reason"] == "length"
        assert told["raw"].text == ("" if method == "function_calling" else '{"co')
