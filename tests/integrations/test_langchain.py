"""KVzipChatModel in chains: same answers as the engine, usage, streaming, async, and the LLM cache."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonschema import Draft202012Validator
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import BaseModel

import kvzip_memory.model_identity
from conftest import CHATML, TEXT, tiny_engine
from guiding import babble
from kvzip_memory import CompressedContext, InputError, KVzipEngine, UnfinishedError
from kvzip_memory.model_identity import model_identity
from kvzip_memory.prompting.messages import as_message
from langchain_kvzip import ChatKVzip, KVzipChatModel
from templates import GEMMA2, LLAMA31, MISTRAL_V01


@pytest.fixture
def context(engine: KVzipEngine) -> CompressedContext:
    return engine.load(TEXT, ratio=0.4)


@pytest.fixture
def llm(engine: KVzipEngine, context: CompressedContext) -> KVzipChatModel:
    return KVzipChatModel(engine=engine, max_tokens=12).with_context(context)


def test_a_chain_gives_the_engines_answers(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "{q}")]) | llm | StrOutputParser()
    expected = [engine.generate(context, q, max_new_tokens=12).text for q in ("Who?", "When?")]
    assert chain.batch([{"q": "Who?"}, {"q": "When?"}]) == expected
    assert asyncio.run(chain.ainvoke({"q": "Who?"})) == expected[0]
    assert "".join(chain.stream({"q": "When?"})) == expected[1]


def test_system_and_earlier_turns_follow_the_context(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("Who?"), AIMessage("He."), HumanMessage([{"type": "text", "text": "When?"}])]
    plain = [("system", "Be brief."), ("user", "Who?"), ("assistant", "He."), ("user", "When?")]
    expected = engine.generate(context, [{"role": r, "content": c} for r, c in plain], max_new_tokens=12)
    assert llm.invoke(messages).content == expected.text


def test_usage_counts_the_context_as_read_from_cache(llm: KVzipChatModel, context: CompressedContext) -> None:
    reply = llm.invoke("Who?")
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["input_token_details"] == {"cache_read": context.n_tokens, "cache_creation": 0}
    assert reply.usage_metadata["input_tokens"] > context.n_tokens
    assert reply.usage_metadata["output_tokens"] == 12
    assert reply.response_metadata["finish_reason"] == "length"
    assert reply.response_metadata["kvzip"]["context"] == context.key
    assert "model_provider" not in reply.response_metadata
    chunks = list(llm.stream("Who?"))
    assert sum(1 for chunk in chunks if chunk.usage_metadata) == 1
    assert chunks[-1].chunk_position == "last"


def test_call_options_override_fields(llm: KVzipChatModel) -> None:
    whole = str(llm.invoke("Who?").content)
    assert llm.invoke("Who?", stop=[whole[4:7]]).content == whole[: whole.index(whole[4:7])]
    assert llm.invoke("Who?", max_tokens=3).usage_metadata["output_tokens"] == 3  # type: ignore[index]
    assert llm.bind(temperature=1.0, seed=5).invoke("Who?").content == llm.invoke("Who?", temperature=1.0, seed=5).content


async def test_async_streaming_gives_the_same_and_leaves_the_loop_free(llm: KVzipChatModel) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    task = asyncio.create_task(tick())
    pieces = [chunk.text async for chunk in llm.astream("Who?")]
    task.cancel()
    assert "".join(pieces) == llm.invoke("Who?").content
    assert ticks > len(pieces)


def test_two_contexts_never_share_a_cached_answer(llm: KVzipChatModel, engine: KVzipEngine) -> None:
    cache = InMemoryCache()
    one = llm.model_copy(update={"cache": cache})
    other = one.with_context(engine.load("Another page. " * 9, ratio=0.4))
    assert one.invoke("Who?").content != other.invoke("Who?").content
    assert one.invoke("Who?").content == llm.invoke("Who?").content


def test_copies_share_one_engine_and_weights_load_on_first_use(smollm2_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    made = []

    def from_pretrained(model: str, **options: object) -> KVzipEngine:
        made.append(model)
        return tiny_engine()

    monkeypatch.setattr(KVzipEngine, "from_pretrained", from_pretrained)
    llm = ChatKVzip(model=str(smollm2_path), max_tokens=3)
    configurable = llm.configurable_fields(temperature=ConfigurableField(id="temperature"), model_name=ConfigurableField(id="model"))
    copies: list[Any] = [llm.with_context(None), llm.model_copy(), configurable]
    copies += [configurable.with_config(configurable={"temperature": heat}) for heat in (0.5, 0.7)]
    assert not made
    for copy in [*reversed(copies), llm]:
        assert copy.invoke("Who?").usage_metadata["output_tokens"] == 3
    assert made == [str(smollm2_path)]
    configurable.with_config(configurable={"model": "other"}).invoke("Who?")
    assert made == [str(smollm2_path), "other"]


async def test_weights_are_hashed_for_a_cache_of_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(
        kvzip_memory.model_identity, "model_identity", lambda *args: hashed.append(threading.current_thread()) or model_identity(*args)
    )
    llm = KVzipChatModel(engine=tiny_engine(), max_tokens=3)
    await llm.ainvoke("Who?")
    assert threading.main_thread() not in hashed
    cache = InMemoryCache()
    for engine in (tiny_engine(), tiny_engine("qwen2")):
        reply = KVzipChatModel(engine=engine, max_tokens=3, cache=cache).invoke("Who?")
        assert reply.text == engine.generate(None, "Who?", max_new_tokens=3).text
        again = KVzipChatModel(engine=engine, max_tokens=3, cache=cache).invoke("Who?")
        assert again.usage_metadata["total_cost"] == 0  # type: ignore[typeddict-item, index] # LangChain's mark of a hit


def test_what_cannot_be_sent_is_refused(llm: KVzipChatModel) -> None:
    with pytest.raises(InputError, match="'image_url'"):
        llm.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])
    assert llm.invoke([HumanMessage("a"), AIMessageChunk(content="b"), HumanMessage("c")]).content
    with pytest.raises(ValueError, match="model="):
        KVzipChatModel()
    with pytest.raises(ValueError, match="max_token'"):
        KVzipChatModel(engine=llm.engine, max_token=3)
    with pytest.raises(ValueError, match="ratio is 30"):
        KVzipChatModel(engine=llm.engine, ratio=30)
    with pytest.raises(InputError, match="3 is no context, but of type int"):
        llm.with_context(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tools"):
        llm.bind_tools([], tool_choice="any")


def test_texts_and_files_are_documents(llm: KVzipChatModel, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(TEXT)
    assert llm.load_documents(TEXT).n_tokens == llm.engine.load([TEXT]).n_tokens
    assert llm.load_documents(tmp_path / "page.md").sources[0].name == "page.md"


def test_a_schema_needs_no_title(llm: KVzipChatModel) -> None:
    schema = {"type": "object", "properties": {"wound": {"type": "boolean"}}, "required": ["wound"]}
    for method in ("json_schema", "function_calling"):
        assert "wound" in llm.with_structured_output(schema, method=method).invoke("Is it?", max_tokens=200)


class Node(BaseModel):
    """A node of a tree."""

    value: Literal[1]
    children: list[Node]


WHOLE = [
    Node,
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}}},
    {"anyOf": [{"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}, {"type": "object", "maxProperties": 0}]},
    {"type": "array", "items": {"enum": [1, 2]}},
    {"enum": ["a", "b"]},
]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", WHOLE, ids=["recursive", "values", "ref", "anyOf", "array", "enum"])
def test_no_part_of_a_schema_is_lost(llm: KVzipChatModel, engine: KVzipEngine, schema: Any, method: str) -> None:
    if method == "json_schema":
        guiding = llm.with_structured_output(schema).first.kwargs["response_format"]["json_schema"]["schema"]  # type: ignore[attr-defined]
    else:
        bound = llm.with_structured_output(schema, method=method).first  # type: ignore[attr-defined]
        guiding = bound.kwargs["tools"][0]["function"]["parameters"]
        guiding = guiding.get("properties", {}).get("value", guiding) if schema in WHOLE[-2:] else guiding  # those are no objects
    grammar, answers = engine.guidance.json(guiding), set()
    validator = Draft202012Validator(schema if isinstance(schema, dict) else schema.model_json_schema())
    for seed in range(20):
        with suppress(UnfinishedError):
            answers.add(babble(engine, grammar, seed, limit=60).text)
    for answer in answers:
        validator.validate(json.loads(answer))
    assert len(answers) > 1 or "$ref" in guiding


def test_a_model_is_told_the_schema_behind_a_tools_result_too(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    call = {"name": "Node", "args": {}, "id": "1"}
    messages = [HumanMessage("Who?"), AIMessage("", tool_calls=[call]), ToolMessage("rain", tool_call_id="1")]
    schema = {"type": "object", "properties": {"wound": {"enum": [True]}}, "required": ["wound"]}
    model = llm.bind_tools([Node], response_format=schema, tool_choice="none")
    reply = model.invoke(messages, max_tokens=100)
    told = f"rain\n\nAnswer with one JSON object that validates against this JSON schema: {json.dumps(schema)}"
    tools = model.kwargs["tools"]  # type: ignore[attr-defined]
    turns = [as_message(message) for message in [*messages[:2], ToolMessage(told, tool_call_id="1")]]
    ids = engine.prompt_ids(context, [turn for turn in turns if turn], tools)
    assert reply.usage_metadata["input_tokens"] == context.n_tokens + len(ids)  # type: ignore[index]


@pytest.mark.parametrize("template", [CHATML, GEMMA2, MISTRAL_V01, LLAMA31], ids=["chatml", "gemma 2", "mistral 0.1", "llama 3.1"])
def test_messages_are_trimmed_by_the_models_own_count(template: str) -> None:
    llm = KVzipChatModel(engine=tiny_engine(template=template))
    messages = [SystemMessage("Be brief."), HumanMessage("Who? " * 30), AIMessage("He. " * 30), HumanMessage("When?")]
    limit = llm.get_num_tokens_from_messages(messages) // 2
    assert llm.get_num_tokens_from_messages([]) == 0
    for options in ({"strategy": "first"}, {"strategy": "first", "allow_partial": True}, {"include_system": True, "allow_partial": True}):
        kept = trim_messages(messages, max_tokens=limit, token_counter=llm, **options)
        assert 0 < len(kept) < 4
        assert llm.get_num_tokens_from_messages(kept) <= limit
    assert trim_messages(messages, max_tokens=1, token_counter=llm, allow_partial=True) == []
