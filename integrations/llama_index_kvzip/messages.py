"""Messages in: LlamaIndex' as the engine takes them, and the contexts that some of them stand for."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage

from kvzip_memory.prompting.messages import Message, as_message, may_bring_contexts

#: In ``additional_kwargs`` of a system's or user's message: the key of a context that the message stands for.
CONTEXT_KEY = "kvzip_context"


def plain_messages(messages: Sequence[ChatMessage]) -> tuple[list[Message], list[str]]:
    """Messages for the engine, and the keys of the contexts that some of them stand for."""
    turns: list[Message] = []
    keys: list[str] = []
    for number, message in enumerate(messages, 1):
        key = message.additional_kwargs.get(CONTEXT_KEY)
        if key and may_bring_contexts(message):
            keys.append(str(key))
            if not message.content:
                continue
        turn = as_message(message, f"message {number}")
        assert turn is not None
        turns.append(turn)
    return turns, keys


def as_said(prompt: str) -> list[ChatMessage]:
    """A prompt as what the user says."""
    return [ChatMessage(prompt)]
