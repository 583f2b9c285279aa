"""Threads begun elsewhere: messages of all makers and frameworks, with blocks, calls and results in every form they have."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.messages import (
    ChatMessage as LangChainChatMessage,
)
from langchain_core.messages.content import KNOWN_BLOCK_TYPES
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    VideoBlock,
)
from llama_index.core.llms import ChatMessage

from conftest import CHATML, TEXT, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.prompting.frames import CUT
from kvzip_memory.prompting.messages import as_message, as_messages
from kvzip_memory.prompting.prompts import PromptBuilder
from kvzip_memory.prompting.tools import results_in_order
from langchain_kvzip import KVzipChatModel
from langchain_kvzip.messages import plain_messages
from llama_index_kvzip import KVzipLLM
from templates import CONTROL, HERMES, LLAMA3, MISTRAL, STRICT

# -- blocks ------------------------------------------------------------------------------------------------------

ERROR = object()
#: A block, and what it says in a message of an assistant, of a user, of a tool. None for a tool: the block as JSON.
BLOCKS: list[tuple[Any, Any, Any, Any]] = [
    # texts
    ("hi", "hi", "hi", "hi"),
    (None, "", "", ""),
    ({"type": "text", "text": "hi"}, "hi", "hi", "hi"),
    ({"type": "text"}, "", "", ""),
    ({"type": "text", "text": None}, "", "", ""),
    ({"type": "text", "text": "hi", "annotations": [{"type": "citation", "url": "x"}]}, "hi", "hi", "hi"),
    ({"type": "text", "text": {"value": "hi", "annotations": []}}, "hi", "hi", "hi"),  # OpenAI's Assistants
    ({"type": "input_text", "text": "hi"}, "hi", "hi", "hi"),
    ({"type": "output_text", "text": "hi", "annotations": []}, "hi", "hi", "hi"),
    ({"type": "refusal", "refusal": "no"}, "no", "no", "no"),
    ({"type": "text-plain", "text": "hi", "mime_type": "text/plain"}, "hi", "hi", "hi"),
    ({"type": "output_audio", "transcript": "hi", "data": "UklG"}, "hi", "hi", "hi"),
    ({"text": "hi"}, "hi", "hi", "hi"),  # Bedrock, Google
    ({"guardContent": {"text": {"text": "hi"}}}, "", "hi", None),
    ({"type": "guard_content", "guard_content": {"text": {"text": "hi"}}}, "", "hi", "hi"),
    ({"type": "non_standard", "value": {"type": "refusal", "refusal": "no"}}, "no", "no", "no"),
    (TextBlock(text="hi"), "hi", "hi", "hi"),
    (SimpleNamespace(type="text", text="hi"), "hi", "hi", "hi"),  # objects of makers' own libraries
    ({"cachePoint": {"type": "default"}}, "", "", ""),
    (CachePoint(cache_control=CacheControl(type="ephemeral")), "", "", ""),
    # thoughts
    ({"type": "reasoning", "reasoning": "hm"}, "", "", None),
    ({"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}, "", "", None),
    ({"type": "thinking", "thinking": "hm", "signature": "x"}, "", "", None),
    ({"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "", "", None),  # Mistral
    ({"type": "redacted_thinking", "data": "x"}, "", "", None),
    ({"type": "reasoning_content", "reasoning_content": {"text": "hm", "signature": "x"}}, "", "", None),
    ({"reasoningContent": {"reasoningText": {"text": "hm"}}}, "", "", None),
    ({"text": "hm", "thought": True}, "", "", None),  # Google
    (ThinkingBlock(content="hm"), "", "", ERROR),
    # calls
    ({"type": "tool_use", "id": "1", "name": "f", "input": {}}, "", "", None),
    ({"type": "tool_call", "id": "1", "name": "f", "args": {}}, "", "", None),
    ({"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}, "", "", None),
    ({"type": "invalid_tool_call", "id": "1", "name": "f", "args": "{", "error": "x"}, "", "", None),
    ({"toolUse": {"toolUseId": "1", "name": "f", "input": {}}}, "", "", None),
    ({"type": "tool_call_chunk", "id": "1", "name": "f", "args": "{", "index": 0}, "", "", None),
    ({"type": "input_json_delta", "partial_json": "{"}, "", "", None),
    # what makers run themselves
    ({"type": "server_tool_call", "id": "1", "name": "web_search", "args": {}}, "", ERROR, None),
    ({"type": "server_tool_call_chunk", "id": "1", "name": "web_search", "args": ""}, "", ERROR, None),
    ({"type": "server_tool_result", "tool_call_id": "1", "status": "success", "output": "x"}, "", ERROR, None),
    ({"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}}, "", ERROR, None),
    ({"type": "web_search_tool_result", "tool_use_id": "1", "content": []}, "", ERROR, None),
    ({"type": "web_search_call", "id": "1", "status": "completed"}, "", ERROR, None),
    ({"type": "file_search_call", "id": "1", "queries": ["x"]}, "", ERROR, None),
    ({"type": "computer_call", "id": "1", "action": {}}, "", ERROR, None),
    ({"type": "code_interpreter_call", "id": "1", "code": "x"}, "", ERROR, None),
    ({"type": "image_generation_call", "id": "1", "result": "x"}, "", ERROR, None),
    ({"type": "mcp_call", "id": "1", "name": "f", "arguments": "{}"}, "", ERROR, None),
    ({"type": "mcp_list_tools", "id": "1", "tools": []}, "", ERROR, None),
    ({"type": "mcp_approval_request", "id": "1", "name": "f"}, "", ERROR, None),
    ({"type": "mcp_tool_use", "id": "1", "name": "f", "input": {}}, "", ERROR, None),
    ({"type": "mcp_tool_result", "tool_use_id": "1", "content": []}, "", ERROR, None),
    ({"type": "tool_search_call", "id": "1", "arguments": {}}, "", ERROR, None),
    ({"type": "tool_search_output", "id": "1", "tools": []}, "", ERROR, None),
    ({"type": "local_shell_call", "id": "1"}, "", ERROR, None),
    ({"type": "executable_code", "executable_code": "x"}, "", ERROR, None),
    ({"type": "code_execution_result", "code_execution_result": "x", "outcome": 1}, "", ERROR, None),
    ({"executableCode": {"code": "x"}}, "", ERROR, None),
    ({"type": "citations", "citations": []}, "", ERROR, None),
    ({"type": "container_upload", "file_id": "x"}, "", ERROR, None),
    ({"type": "compaction", "content": "x"}, "", ERROR, None),
    ({"type": "non_standard", "value": {"a": 1}}, "", ERROR, '{"a": 1}'),
    ({"type": "non_standard", "value": 1}, "", ERROR, None),
    # what tools return
    ({"type": "json", "json": {"a": "é"}}, "", ERROR, '{"a": "é"}'),
    ({"json": {"a": 1}}, "", ERROR, '{"a": 1}'),
    ({"type": "search_result", "source": "x", "title": "t", "content": [{"type": "text", "text": "hi"}]}, "", ERROR, None),
    ({"a": 1, "file": "b.txt"}, "", ERROR, None),
    ({"text": "hi", "score": 1}, "hi", "hi", None),
    ({"type": "file", "name": "b.txt"}, "", ERROR, None),
    (5, "", ERROR, "5"),
    # images and the like
    ({"type": "image", "base64": "iVBO" * 99}, "", ERROR, '{"type": "image", "base64": "<396 bytes>"}'),
    ({"type": "image", "source": {"type": "url", "url": "http://x/y"}}, "", ERROR, None),
    ({"type": "image_url", "image_url": {"url": "http://x/y.png"}}, "", ERROR, None),
    ({"type": "input_image", "image_url": "http://x/y.png"}, "", ERROR, None),
    ({"image": {"format": "png", "source": {"bytes": b"x"}}}, "", ERROR, '{"image": {"format": "png", "source": {"bytes": "<1 bytes>"}}}'),
    ({"type": "audio", "url": "http://x/y.wav"}, "", ERROR, None),
    ({"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}, "", ERROR, None),
    ({"type": "video", "url": "http://x/y.mp4"}, "", ERROR, None),
    ({"type": "file", "base64": "x", "mime_type": "application/pdf"}, "", ERROR, None),
    ({"type": "input_file", "file_id": "x"}, "", ERROR, None),
    ({"type": "file_data", "file_uri": "gs://x"}, "", ERROR, None),
    ({"type": "media", "file_uri": "gs://x"}, "", ERROR, None),
    ({"inlineData": {"mimeType": "image/png", "data": "x"}}, "", ERROR, None),
    ({"type": "document", "source": {"type": "text", "data": "a b " * 99}}, "", ERROR, None),
    ({"type": "text-plain", "url": "http://x/y.txt", "mime_type": "text/plain"}, "", ERROR, None),
]  # fmt: skip


def read(block: Any, role: str) -> Any:
    message = as_message({"role": role, "content": ["a ", block, " z"]})
    assert message is not None
    return message["content"].replace(CUT, "")


@pytest.mark.parametrize(("block", "assistant", "user", "tool"), BLOCKS, ids=[str(block)[:50] for block, *_ in BLOCKS])
def test_blocks_of_every_maker(block: Any, assistant: str, user: Any, tool: Any) -> None:
    assert read(block, "assistant") == f"a {assistant} z"
    for role in ("user", "system", "developer"):
        if user is ERROR:
            with pytest.raises(InputError, match=r"of type '.+' are not supported \(a message\); send text"):
                read(block, role)
        else:
            assert read(block, role) == f"a {user} z"
    if isinstance(tool, str):
        alone = tool.startswith("{") or tool == "5"
        assert read(block, "tool") == (f"a \n{tool}\n z" if alone else f"a {tool} z")
    elif tool is None:
        assert json.loads(read(block, "tool").removeprefix("a ").removesuffix(" z")) == block


def test_the_table_has_every_kind_of_block() -> None:
    """Of LangChain's standard, and of LlamaIndex by the tests below."""
    assert {block["type"] for block, *_ in BLOCKS if isinstance(block, dict) and "type" in block} >= KNOWN_BLOCK_TYPES
    kinds = {
        TextBlock,
        ImageBlock,
        AudioBlock,
        VideoBlock,
        DocumentBlock,
        CachePoint,
        CitableBlock,
        CitationBlock,
        ThinkingBlock,
        ToolCallBlock,
    }
    assert set(get_args(get_args(ContentBlock)[0])) == kinds


LLAMA_INDEX = [
    ImageBlock(url="http://x/y.png"),
    AudioBlock(url="http://x/y.wav"),
    VideoBlock(url="http://x/y.mp4"),
    DocumentBlock(url="http://x/y.pdf"),
    CitableBlock(title="t", source="s", content=[TextBlock(text="cited")]),
    CitationBlock(title="t", source="s", cited_content=TextBlock(text="cited"), additional_location_info={}),
]


@pytest.mark.parametrize("block", LLAMA_INDEX, ids=lambda block: block.block_type)
def test_blocks_of_llama_index(engine: KVzipEngine, block: Any) -> None:
    blocks = [TextBlock(text="a"), block, TextBlock(text="z")]
    llm = KVzipLLM(engine=engine, max_tokens=3)
    for use in (engine.load, lambda messages: engine.generate(None, messages), llm.chat):
        with pytest.raises(InputError, match=rf"'{block.block_type}' are not supported \(message 1\)"):
            use([ChatMessage(role="user", blocks=blocks)])
    said = as_message(ChatMessage(role="assistant", blocks=blocks))
    assert said == {"role": "assistant", "content": "a\nz"}
    shown = as_message(ChatMessage(role="tool", blocks=blocks))
    assert shown is not None
    assert block.block_type in shown["content"]


@pytest.mark.parametrize(
    ("content", "role", "text"),
    [
        (None, "assistant", ""),
        (None, "tool", ""),
        (None, "user", ""),
        ([], "assistant", ""),
        ([], "tool", ""),
        ({"a": 1}, "tool", '{"a": 1}'),
        ({"type": "text", "text": "hi"}, "user", "hi"),
        ({"type": "text", "text": "hi"}, "assistant", "hi"),
        ([{"a": 1}, {"b": {1: [None, (2.5,)]}}], "tool", '{"a": 1}\n{"b": {"1": [null, [2.5]]}}'),
        ([1, True], "tool", "1\ntrue"),
        (4.5, "tool", "4.5"),
        (("a", "b"), "user", "ab"),
    ],
)
def test_content_need_not_be_a_string(content: Any, role: str, text: str) -> None:
    message = as_message({"role": role, "content": content})
    assert message is not None
    assert message["content"] == text


def test_results_that_a_user_gives() -> None:
    """As Anthropic and Bedrock have it."""
    for block in (
        {"type": "tool_result", "tool_use_id": "1", "content": "4"},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "4"}]},
        {"toolResult": {"toolUseId": "1", "content": [{"text": "4"}]}},
    ):
        message = as_message({"role": "user", "content": [block, block, {"type": "text", "text": "So?"}]})
        assert message == {"role": "user", "content": "\n".join([result("4"), result("4"), "So?"])}
        assert read(block, "assistant") == "a  z"


def test_a_message_of_llama_index_may_be_a_mapping() -> None:
    call = ToolCallBlock(tool_call_id="1", tool_name="f", tool_kwargs={"a": "b"})
    message = ChatMessage(role="assistant", blocks=[TextBlock(text="a"), ThinkingBlock(content="hm"), TextBlock(text="b"), call])
    assert as_message(message.model_dump()) == as_message(message)


def test_marks_stay_where_they_are() -> None:
    marked = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    for blocks in (["a", marked, "c"], ["a", "b", {"cachePoint": {"type": "default"}}, "c"]):
        assert as_message({"role": "user", "content": blocks}) == {"role": "user", "content": f"a{CUT}b{CUT}c"}
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    message = as_message(ChatMessage(role="user", blocks=[TextBlock(text="a"), TextBlock(text="b"), point, TextBlock(text="c")]))
    assert message == {"role": "user", "content": f"a{CUT}\nb{CUT}\nc"}


# -- what an assistant thought, refused and called ---------------------------------------------------------------

THOUGHTS: list[Any] = [
    AIMessage([{"type": "reasoning", "reasoning": "hm"}, "yes"]),
    AIMessage([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "yes"}]),
    AIMessage([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}, {"type": "text", "text": "yes"}]),
    AIMessage([{"type": "reasoning_content", "reasoning_content": {"text": "hm"}}, {"type": "text", "text": "yes"}]),
    AIMessage("yes", additional_kwargs={"reasoning_content": "hm"}),
    AIMessageChunk("yes", additional_kwargs={"reasoning": {"summary": [{"type": "summary_text", "text": "hm"}]}}),
    ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), TextBlock(text="yes")]),
    {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    {"role": "assistant", "content": "yes", "reasoning": "hm"},
    SimpleNamespace(role="assistant", content="yes", reasoning_content="hm"),
    {"role": "model", "content": [{"text": "hm", "thought": True}, {"text": "yes"}]},
    {"role": "assistant", "content": [{"reasoningContent": {"reasoningText": {"text": "hm"}}}, {"text": "yes"}]},
]


@pytest.mark.parametrize("message", THOUGHTS, ids=range(len(THOUGHTS)))
def test_what_was_thought_is_kept_apart(message: Any, engine: KVzipEngine) -> None:
    expected = {"role": "assistant", "content": "yes", "reasoning": "hm"}
    assert as_message(message) == as_message(expected) == expected
    asked = {"role": "user", "content": TEXT}
    assert engine.load([asked, message]).key == engine.load([asked, {"role": "assistant", "content": "yes"}]).key


def test_nothing_thought_is_no_thought() -> None:
    for block in ({"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": ""}, {"type": "reasoning", "summary": []}):
        assert as_message(AIMessage([block, "yes"])) == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "refusal": "no"},
        AIMessage("", additional_kwargs={"refusal": "no"}),
        SimpleNamespace(role="assistant", content=None, refusal="no", tool_calls=None),
        {"role": "assistant", "content": None, "audio": {"id": "1", "data": "x", "transcript": "no"}},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ],
)
def test_a_refusal_is_what_was_said(message: Any) -> None:
    assert as_message(message) == {"role": "assistant", "content": "no"}


OPENAI = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
OBJECT = SimpleNamespace(id="1", type="function", function=SimpleNamespace(name="f", arguments='{"a": "b"}'))
CALLS: list[Any] = [
    {"role": "assistant", "content": None, "tool_calls": [OPENAI]},
    {"role": "assistant", "tool_calls": [OPENAI]},
    {"role": "assistant", "content": "", "tool_calls": [OBJECT]},
    SimpleNamespace(role="assistant", content=None, tool_calls=[OBJECT]),  # of OpenAI's own library
    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": "b"}}]},
    {"role": "assistant", "content": [{"toolUse": {"toolUseId": "1", "name": "f", "input": {"a": "b"}}}]},
    {"role": "assistant", "content": [{"type": "function_call", "id": "fc_9", "call_id": "1", "name": "f", "arguments": '{"a": "b"}'}]},
    {"role": "assistant", "content": "", "additional_kwargs": {"tool_calls": [OPENAI]}},
    AIMessage("", tool_calls=[{"id": "1", "name": "f", "args": {"a": "b"}}]),
    AIMessage("", additional_kwargs={"tool_calls": [OPENAI]}),
    AIMessage.model_construct(content="", additional_kwargs={"tool_calls": [OPENAI]}),
    AIMessage([{"type": "tool_call", "id": "1", "name": "f", "args": {"a": "b"}}]),
    AIMessage("", invalid_tool_calls=[{"id": "1", "name": "f", "args": '{"a": "b"}', "error": None}]),
    ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [OPENAI]}),
    ChatMessage(None, role="assistant", additional_kwargs={"tool_calls": [OBJECT]}),
    ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_call_id="1", tool_name="f", tool_kwargs={"a": "b"})]),
    ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_call_id="1", tool_name="f", tool_kwargs='{"a": "b"}')]),
]


@pytest.mark.parametrize("message", CALLS, ids=range(len(CALLS)))
def test_calls_are_found_wherever_frameworks_have_them(message: Any) -> None:
    expected = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "name": "f", "arguments": {"a": "b"}}]}
    assert as_message(message) == as_message(expected) == expected


def test_a_call_of_the_old_form() -> None:
    call = {"name": "f", "arguments": '{"a": "b"}'}
    expected = {"role": "assistant", "content": "", "tool_calls": [{"id": None, "name": "f", "arguments": {"a": "b"}}]}
    for message in (
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "assistant", "function_call": call},
        AIMessage("", additional_kwargs={"function_call": call}),
        ChatMessage("", role="assistant", additional_kwargs={"function_call": call}),
    ):
        assert as_message(message) == expected
    for result in (FunctionMessage("4", name="f"), {"role": "function", "name": "f", "content": "4"}, ChatMessage("4", role="function")):
        assert as_message(result) == {"role": "tool", "content": "4", "tool_call_id": None}


BROKEN = ['{"a": ', "[1]", "not JSON", "[" * 100_000, '"{}"']


@pytest.mark.parametrize("template", [HERMES, LLAMA3, MISTRAL, CHATML, STRICT], ids=["hermes", "llama3", "mistral", "chatml", "strict"])
@pytest.mark.parametrize("arguments", BROKEN, ids=["cut", "list", "words", "deep", "string"])
def test_arguments_that_are_no_object_are_kept_as_text(template: str, arguments: str) -> None:
    broken = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}
    message = as_message(broken)
    assert message is not None
    assert message["tool_calls"] == [{"id": "1", "name": "f", "arguments": arguments}]
    thread = [{"role": "user", "content": "a"}, broken, {"role": "tool", "tool_call_id": "1", "content": "not JSON"}]
    if len(arguments) < 99:
        text = builder_of(template).tokenizer.decode(builder_of(template).question(None, thread))
        assert arguments in text.replace('\\"', '"')


def test_no_arguments_and_no_name() -> None:
    for arguments in ("", None):
        call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
        assert as_message({"role": "assistant", "tool_calls": [call]}) == {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "name": "f", "arguments": {}}],
        }
    nameless = AIMessage("hm", invalid_tool_calls=[{"id": "1", "name": None, "args": "{", "error": "x"}])
    assert as_message(nameless) == {"role": "assistant", "content": "hm"}


@pytest.mark.parametrize(
    "call", [None, "f", {}, {"type": "function_call"}, {"function": {"name": None}}, {"type": "tool_use", "name": 5}], ids=str
)
def test_a_call_that_names_no_tool_is_left_out_of_a_history(call: Any, engine: KVzipEngine) -> None:
    said = [{"role": "assistant", "content": "hm", "tool_calls": [call]}]
    if isinstance(call, dict) and "type" in call:
        said.append({"role": "assistant", "content": [{"type": "text", "text": "hm"}, call]})
    for message in said:
        assert as_message(message) == {"role": "assistant", "content": "hm"}
        asked = [{"role": "user", "content": "Who?"}, message, {"role": "user", "content": "And when?"}]
        assert engine.generate(None, asked, max_new_tokens=2).usage.output_tokens == 2


def test_a_file_that_a_tool_returned_is_what_it_said_and_no_context(engine: KVzipEngine) -> None:
    llm, context = KVzipChatModel(engine=engine, max_tokens=2), engine.load("Ms Ito approves travel. " * 9)
    call = AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "1"}])
    for file in ({"type": "file", "file_id": "abc"}, context.as_block()):
        asked: list[Any] = [HumanMessage("Who?"), call, ToolMessage([file], tool_call_id="1")]
        assert plain_messages(asked)[0][-1]["content"] == json.dumps(file)
        assert "context" not in llm.invoke(asked).response_metadata["kvzip"]
    for kind in (HumanMessage, SystemMessage):
        answer = llm.invoke([kind([context.as_block(), {"type": "text", "text": "Be brief."}]), HumanMessage("Who?")])
        assert answer.response_metadata["kvzip"]["context"] == context.key


# -- roles -------------------------------------------------------------------------------------------------------

ROLES = [
    ("developer", "system"),
    ("human", "user"),
    ("ai", "assistant"),
    ("model", "assistant"),
    ("chatbot", "assistant"),
    ("function", "tool"),
]


@pytest.mark.parametrize(("name", "role"), ROLES)
def test_a_role_may_have_another_name(name: str, role: str) -> None:
    given = [{"role": name, "content": "a"}, LangChainChatMessage("a", role=name)]
    if name not in ("human", "ai"):
        given.append(ChatMessage("a", role=name))
    for message in given:
        read = as_message(message)
        assert read is not None
        assert (read["role"], read["content"]) == (role, "a")


def test_developers_are_heard(engine: KVzipEngine) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    told = engine.prompt_ids(None, plain)
    assert engine.prompt_ids(None, [{**plain[0], "role": "developer"}, plain[1]]) == told
    assert engine.prompt_ids(None, [SystemMessage("Be brief.", additional_kwargs={"__openai_role__": "developer"}), plain[1]]) == told
    llm = KVzipChatModel(engine=engine, max_tokens=3)
    assert llm.invoke([("developer", "Be brief."), ("human", "Who?")]).content == engine.generate(None, plain, max_new_tokens=3).text


def test_what_a_system_message_asks_last_is_answered(engine: KVzipEngine) -> None:
    llm, llama = KVzipChatModel(engine=engine, max_tokens=5), KVzipLLM(engine=engine, max_tokens=5)
    asked = engine.generate(None, "Sum up.", max_new_tokens=5).text
    assert llm.invoke([SystemMessage("Sum up.")]).content == asked
    assert llama.chat([ChatMessage("Sum up.", role="system")]).message.content == asked
    assert llama.chat([ChatMessage("Sum up.", role="developer")]).message.content == asked
    assert engine.generate(None, [{"role": "developer", "content": "Sum up."}], max_new_tokens=5).text == asked
    assert [m["role"] for m in as_messages([SystemMessage("a"), SystemMessage("b")])] == ["system", "user"]
    context = engine.load(TEXT, ratio=0.5)
    assert (
        llm.with_context(context).invoke([SystemMessage("Sum up.")]).content == engine.generate(context, "Sum up.", max_new_tokens=5).text
    )
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    structured = llm.with_structured_output(schema)
    assert structured.invoke([SystemMessage("Sum up.")], max_tokens=99) == structured.invoke("Sum up.", max_tokens=99) == {"a": 1}
    talk = [HumanMessage("Who?"), AIMessage("He."), SystemMessage("Sum up.")]
    assert llm.invoke(talk).content == llm.invoke([*talk[:2], HumanMessage("Sum up.")]).content


# -- calls and results that have lost each other -----------------------------------------------------------------

USER, ANSWER, LAST = ({"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "4 degrees."), ("user", "z")])
CALL = [{"id": i, "name": "weather", "arguments": {"town": i}} for i in ("o", "r")]
ONE, BOTH = ({"role": "assistant", "content": "Well", "tool_calls": CALL[:count]} for count in (1, 2))
OSLO, ROME = ({"role": "tool", "tool_call_id": i, "content": text} for i, text in [("o", "4"), ("r", "9")])
NAMELESS = {**OSLO, "tool_call_id": None}
SHOWN = ["<tool_call>\n" + json.dumps({"name": "weather", "arguments": call["arguments"]}) + "\n</tool_call>" for call in CALL]


def result(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"


def builder_of(template: str) -> PromptBuilder:
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL.get(template, [])})
    return PromptBuilder(tokenizer)


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


THREADS: list[tuple[list[Any], list[Any]]] = [
    ([OSLO, ANSWER, LAST], [said("user", result("4")), ANSWER, LAST]),
    ([OSLO, ROME, LAST], [said("user", result("4")), said("user", result("9")), LAST]),
    ([USER, ANSWER, OSLO, LAST], [USER, ANSWER, said("user", result("4")), LAST]),
    ([USER, OSLO], [USER, said("user", result("4"))]),
    ([OSLO], [said("user", result("4"))]),
    ([USER, ONE, LAST], [USER, said("assistant", f"Well\n{SHOWN[0]}"), LAST]),
    ([USER, ONE, ANSWER, LAST], [USER, said("assistant", f"Well\n{SHOWN[0]}"), ANSWER, LAST]),
    ([USER, BOTH, LAST], [USER, said("assistant", "\n".join(["Well", *SHOWN])), LAST]),
    ([USER, BOTH, ROME, LAST], [USER, said("assistant", f"Well\n{SHOWN[0]}", tool_calls=CALL[1:]), ROME, LAST]),
    ([USER, BOTH, ROME, OSLO, LAST], [USER, BOTH, OSLO, ROME, LAST]),
    ([USER, ONE, NAMELESS, LAST], [USER, ONE, NAMELESS, LAST]),
    ([USER, BOTH, NAMELESS, NAMELESS, LAST], [USER, BOTH, NAMELESS, NAMELESS, LAST]),
    ([USER, BOTH, NAMELESS, LAST], [USER, BOTH, NAMELESS, LAST]),
    ([USER, ONE, OSLO], [USER, ONE, OSLO]),
    ([USER, ONE], [USER, ONE]),  # its results may come yet
]


@pytest.mark.parametrize(("thread", "shown"), THREADS, ids=range(len(THREADS)))
def test_what_has_lost_its_call_or_result_is_told_in_words(thread: list[Any], shown: list[Any]) -> None:
    assert results_in_order(thread) == shown


def test_a_template_of_single_calls_shows_what_is_left_one_by_one() -> None:
    first, second = ({"role": "assistant", "content": text, "tool_calls": [call]} for text, call in zip(["Well", ""], CALL, strict=True))
    shown = [first, NAMELESS, second, NAMELESS]
    assert results_in_order([BOTH, NAMELESS, NAMELESS], one_call=True) == shown
    assert results_in_order([BOTH, *[NAMELESS] * 3], one_call=True) == [*shown, said("user", result("4"))]
    told = said("assistant", f"Well\n{SHOWN[1]}", tool_calls=CALL[:1])
    assert results_in_order([BOTH, NAMELESS], one_call=True) == [told, NAMELESS]


@pytest.mark.parametrize("template", [HERMES, LLAMA3, MISTRAL, CHATML, STRICT], ids=["hermes", "llama3", "mistral", "chatml", "strict"])
def test_every_template_takes_what_is_left_of_a_thread(template: str) -> None:
    builder = builder_of(template)
    for thread, shown in THREADS[:-1]:
        if template is MISTRAL and [turn["role"] for turn in shown[-2:]] == ["tool", "user"]:
            continue  # its rule, also where nothing is missing: nothing a user says follows a result
        ids = builder.question(None, thread)
        assert ids == builder.question(None, shown)
        assert builder.count(thread) == len(ids)
        for end in range(1, len(thread)):
            before, after = thread[end - 1], thread[end]
            if template is not MISTRAL and not before.get("tool_calls") and (before["role"], after["role"]) != ("tool", "tool"):
                context = builder.conversation([message for item in thread[:end] if (message := as_message(item))])
                assert [*context.token_ids, *builder.question(context.recipe, thread[end:])] == ids


def test_a_trimmed_history_is_answered(engine: KVzipEngine) -> None:
    thread: list[BaseMessage] = [
        HumanMessage("How warm is Oslo?"),
        AIMessage("", tool_calls=[{"id": "1", "name": "weather", "args": {"town": "Oslo"}}]),
        ToolMessage("4", tool_call_id="1"),
        AIMessage("4 degrees."),
        HumanMessage("And now?"),
    ]
    llm, llama = KVzipChatModel(engine=engine, max_tokens=3), KVzipLLM(engine=engine, max_tokens=3)
    trimmed = trim_messages(thread, max_tokens=3, token_counter=len, strategy="last")
    assert isinstance(trimmed[0], ToolMessage)
    told = [said("user", result("4")), said("assistant", "4 degrees."), said("user", "And now?")]
    expected = engine.generate(None, told, max_new_tokens=3).text
    assert llm.invoke(trimmed).content == expected
    history = [ChatMessage("4", role="tool", additional_kwargs={"tool_call_id": "1"}), ChatMessage("4 degrees.", role="assistant")]
    assert llama.chat([*history, ChatMessage("And now?")]).message.content == expected
    context = engine.load(TEXT, ratio=0.5)
    assert llm.with_context(context).invoke(trimmed).content == engine.generate(context, told, max_new_tokens=3).text
    assert engine.load(trimmed[:2]).recipe.role == "assistant"


def test_a_thread_of_another_makers_model_goes_on(engine: KVzipEngine) -> None:
    llm = KVzipChatModel(engine=engine, max_tokens=3)
    answer = AIMessage(
        [
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"type": "text", "text": "He is ", "annotations": []},
            {"type": "image_generation_call", "id": "ig_1", "result": "x"},
            {"type": "file", "file_id": "file-of-theirs"},
            {"type": "text", "text": "Oriel."},
        ]
    )
    plain = [said("user", "Who?"), said("assistant", "He is Oriel."), said("user", "When?")]
    assert llm.invoke([HumanMessage("Who?"), answer, HumanMessage("When?")]).content == engine.generate(None, plain, max_new_tokens=3).text
    with pytest.raises(InputError, match=r"'image_url' are not supported \(message 2\)"):
        llm.invoke([SystemMessage("a"), HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])


def test_whatever_is_no_message_is_our_error() -> None:
    rng = random.Random(0)
    names = [
        "type",
        "content",
        "text",
        "tool_calls",
        "function",
        "arguments",
        "id",
        "thinking",
        "toolResult",
        "value",
        "cache_control",
        "json",
    ]
    fields = ["additional_kwargs", "blocks", "invalid_tool_calls", "function_call", "refusal", "audio", "reasoning", "tool_call_id"]
    words = ["text", "tool_use", "tool_result", "non_standard", "json", "image", "", "x\ud83d", "\ufeff", "{", None, 1, 2.5, True, b"x"]

    def anything(depth: int = 0) -> Any:
        kind = rng.randrange(4 if depth < 3 else 1)
        if kind == 1:
            return [anything(depth + 1) for _ in range(rng.randrange(3))]
        if kind == 2:
            return {rng.choice(names + fields): anything(depth + 1) for _ in range(rng.randrange(4))}
        if kind == 3:
            return SimpleNamespace(**{rng.choice(names): anything(depth + 1) for _ in range(2)})
        return rng.choice([*words, rng.choice(BLOCKS)[0]])

    read = 0
    for _ in range(3000):
        given = {"role": rng.choice(["user", "assistant", "tool"]), "content": anything()}
        given |= {name: anything() for name in [*fields, "tool_calls"] if rng.random() < 0.2}
        with suppress(InputError):
            message = as_message(given if rng.random() < 0.5 else SimpleNamespace(**given))
            assert message is not None
            json.dumps(message, ensure_ascii=False).encode()
            assert as_message(message) == message
            read += 1
    assert read > 1000


@pytest.mark.parametrize("result", ["", " "])
def test_a_tools_empty_result_is_a_result_behind_a_context_too(engine: KVzipEngine, result: str) -> None:
    asked = {"role": "user", "content": "Save it."}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "name": "save", "arguments": {"page": 3}}]}
    told = {"role": "tool", "content": result, "tool_call_id": "1"}
    talk = engine.load([asked], ratio=1.0)
    whole = engine.load([asked, call, told], ratio=1.0)
    grown = engine.extend(talk, [call, told])
    assert grown.token_ids.tolist() == whole.token_ids.tolist()
    texts = [
        engine.generate(talk, [call, told], max_new_tokens=8).text,
        engine.session(talk).ask([call, told], max_new_tokens=8).text,
        engine.generate(None, [asked, call, told], max_new_tokens=8, reuse=False).text,
    ]
    assert len({*texts}) == 1
