"""Messages in: LangChain's as the engine takes them, and the contexts that blocks in them stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage
from langchain_core.runnables import ensure_config

from kvzip_memory import InputError
from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.prompting.messages import as_message, may_bring_contexts
from kvzip_memory.registry.holders import thread_tag

Message = TypeVar("Message", bound=BaseMessage)


def plain_messages(messages: Sequence[BaseMessage]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Messages for the engine, and the ids of the contexts that blocks in them stand for."""
    turns, file_ids = [], []
    for number, message in enumerate(messages, 1):
        if files := files_in(message):
            file_ids += [str(block["file_id"]) for block in files]
            message = without_files(message)
            if not message.content and message.type == "system":
                continue
        turn = as_message(message, f"message {number}")
        if turn is None:
            raise InputError(f"messages of type {message.type!r} are not supported; send human, ai, system and tool messages")
        turns.append(turn)
    return turns, file_ids


def files_in(message: BaseMessage) -> list[dict[str, Any]]:
    """The blocks of a message that stand for contexts. Those of what a model has made or a tool has returned do not."""
    blocks = message.content if isinstance(message.content, list) and may_bring_contexts(message) else []
    return [block for block in blocks if isinstance(block, dict) and block.get("type") == "file" and "file_id" in block]


def without_files(message: Message) -> Message:
    """A message without the blocks that stand for contexts."""
    files = files_in(message)
    return message.model_copy(update={"content": [block for block in message.content if block not in files]}) if files else message


def with_keys(message: BaseMessage, key_of: Callable[[str], str]) -> BaseMessage:
    """A message with the whole keys of contexts in the blocks that stand for them."""
    blocks = files_in(message)
    content = [{**block, "file_id": key_of(str(block["file_id"]))} if block in blocks else block for block in message.content]
    return message.model_copy(update={"content": content})


def thread_tags(run_manager: Any = None) -> list[str]:
    """The tag of the graph's thread that this is called in, if any; a call outside of a graph may have a ``thread_id`` in its metadata."""
    told = getattr(run_manager, "metadata", None) or {}
    thread_id = ensure_config().get("configurable", {}).get("thread_id") or told.get("thread_id")
    return [] if thread_id is None else [thread_tag(clean(str(thread_id), "thread_id"))]
