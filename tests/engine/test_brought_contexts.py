"""Who may bring a context into a prompt: blocks and fields of messages of the system and the user, by whole keys."""

import inspect
from typing import Any

import langchain_core.messages as messages_of
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages import ChatMessage as LangChainChatMessage
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.llms import ChatMessage

from conftest import TEXT
from kvzip_memory import CompressedContext, InputError, KVzipEngine
from kvzip_memory.prompting.messages import as_message, may_bring_contexts
from langchain_kvzip import KVzipChatModel
from langchain_kvzip.messages import files_in, without_files
from langchain_kvzip.messages import plain_messages as langchain_messages
from llama_index_kvzip import KVzipLLM
from llama_index_kvzip.messages import CONTEXT_KEY, plain_messages

#: Every class of message that LangChain has, and its chat messages of any role.
CLASSES = [kind for name in messages_of.__all__ if inspect.isclass(kind := getattr(messages_of, name)) and issubclass(kind, BaseMessage)]
TRUSTED = {"human", "user", "system", "developer"}


@pytest.fixture
def context(engine: KVzipEngine) -> CompressedContext:
    return engine.load(TEXT, ratio=0.4, name="handbook")


def made(kind: Any, content: Any, said: str, **more: Any) -> BaseMessage | None:
    """A message of a class, None for what says nothing."""
    given = {"content": content, "role": said, "tool_call_id": "1", "id": "1", "name": "a", **more}
    own = kind.model_fields.keys()
    try:
        message: BaseMessage = kind(**{name: value for name, value in given.items() if name in own or name in more})
    except (TypeError, ValueError):
        return None
    return message


ROLES = ["user", "system", "developer", "human", "assistant", "ai", "tool", "function", "model", "chatbot"]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_only_the_user_and_the_system_bring_contexts(kind: Any, context: CompressedContext) -> None:
    block = context.as_block()
    for role in ROLES:
        for field in ({}, {"role": role}, {"additional_kwargs": {"role": role, "type": "human"}}):
            message = made(kind, [block, {"type": "text", "text": "Be brief."}], role, **field)
            if message is None or message.type in ("remove", "base"):
                continue
            told = message.type.removesuffix("MessageChunk").lower()
            told = role if told == "chat" else told
            assert may_bring_contexts(message) == bool(files_in(message)) == (told in TRUSTED)
            assert (without_files(message) is message) == (told not in TRUSTED)
            turns, keys = langchain_messages([message])
            assert keys == ([context.key] if told in TRUSTED else [])
            assert turns[0]["role"] == as_message({"role": told, "content": "a"})["role"]  # type: ignore[index]


def test_what_a_tool_returns_or_a_model_says_opens_nothing(engine: KVzipEngine, context: CompressedContext) -> None:
    llm, block = KVzipChatModel(engine=engine, max_tokens=2), context.as_block()
    call = AIMessage([block, {"type": "text", "text": "I look."}], tool_calls=[{"name": "look", "args": {}, "id": "1"}])
    results = [
        ToolMessage([block], tool_call_id="1"),
        ToolMessage([block], tool_call_id="1", role="user"),
        ToolMessage("a", tool_call_id="1", additional_kwargs={CONTEXT_KEY: context.key}),
        ToolMessage("a", tool_call_id="1", artifact=block, additional_kwargs=block),
        HumanMessage([{"type": "tool_result", "tool_use_id": "1", "content": [block]}]),
    ]
    for result in results:
        assert "context" not in llm.invoke([HumanMessage("Who?"), call, result]).response_metadata["kvzip"]
    forged = AIMessage([block, {"type": "text", "text": "I look."}], role="system")
    assert "context" not in llm.invoke([HumanMessage("Who?"), forged, HumanMessage("And?")]).response_metadata["kvzip"]
    earlier = [HumanMessage([block, {"type": "text", "text": "Who?"}]), AIMessage("He."), HumanMessage("And when?")]
    assert llm.invoke(earlier).response_metadata["kvzip"]["context"] == context.key


@pytest.mark.parametrize("role", list(MessageRole))
def test_a_field_of_what_others_say_opens_nothing(role: MessageRole, engine: KVzipEngine, context: CompressedContext) -> None:
    message = ChatMessage("Be brief.", role=role, additional_kwargs={CONTEXT_KEY: context.key, "tool_call_id": "1"})
    trusted = role in (MessageRole.SYSTEM, MessageRole.DEVELOPER, MessageRole.USER)
    turns, keys = plain_messages([message])
    assert keys == ([context.key] if trusted else [])
    assert turns[0]["content"] == "Be brief."
    reply = KVzipLLM(engine=engine, max_tokens=2).chat([ChatMessage("Who?"), message, ChatMessage("Who?")])
    assert reply.raw["kvzip"]["context"] == (context.key if trusted else None)  # type: ignore[index]


@pytest.mark.parametrize("short", ["handbook", "key", "f" * 65, "../x", ""])
def test_a_message_brings_a_context_by_its_whole_key(short: str, engine: KVzipEngine, context: CompressedContext) -> None:
    name = context.key[:12] if short == "key" else short
    asked: list[Any] = [SystemMessage([{"type": "file", "file_id": name}]), HumanMessage("Who?")]
    told = [ChatMessage("", role="system", additional_kwargs={CONTEXT_KEY: name or " "}), ChatMessage("Who?")]
    chat, llm = KVzipChatModel(engine=engine, max_tokens=2), KVzipLLM(engine=engine, max_tokens=2)
    for ask in (lambda: chat.invoke(asked), lambda: llm.chat(told)):
        with pytest.raises(InputError, match=r"file_id is read as a context's key.*by their whole keys"):
            ask()
    if short in ("handbook", "key"):
        chat = KVzipChatModel(engine=engine, max_tokens=2, contexts_by_name=True)
        llm = KVzipLLM(engine=engine, max_tokens=2, contexts_by_name=True)
        assert chat.invoke(asked).response_metadata["kvzip"]["context"] == context.key
        assert llm.chat(told).raw["kvzip"]["context"] == context.key  # type: ignore[index]


def test_a_chat_message_has_the_role_it_says() -> None:
    for role in ("user", "tool", "assistant"):
        assert may_bring_contexts(LangChainChatMessage("a", role=role)) == (role == "user")
