"""Answers out: the engine's pieces as LlamaIndex' responses, with tokens and facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.utils import parse_partial_json

from kvzip_memory import CompressedContext, KVzipEngine, Reply
from kvzip_memory.prompting.call_reader import CallReader
from kvzip_memory.prompting.messages import Message
from kvzip_memory.prompting.reasoning import Reasoning


def responses_of(
    engine: KVzipEngine,
    context: CompressedContext | None,
    turns: Sequence[Message],
    options: Mapping[str, Any],
    model: str,
    created: int,
) -> ChatResponseGen:
    """The answer to turns behind a context, of which ``created`` tokens were read in this call; ``options`` are those of
    :meth:`KVzipEngine.stream`."""
    reader = CallReader(engine.tool_form) if options["tools"] and options["tool_choice"] != "none" else None
    said, thought, calls = "", "", list[ToolCallBlock]()
    with engine.stream(context, turns, **options) as pieces:
        for piece in pieces.with_reasoning():
            if isinstance(piece, Reasoning):
                thought += piece
                yield _response(said, calls, "", thought=thought, thinking_delta=str(piece))
                continue
            text, deltas = reader.push(piece) if reader else (piece, [])
            said += text
            for delta in deltas:
                if delta.name:
                    calls.append(ToolCallBlock(tool_call_id=delta.id, tool_name=delta.name, tool_kwargs=""))
                if calls:
                    calls[-1] = calls[-1].model_copy(update={"tool_kwargs": f"{calls[-1].tool_kwargs}{delta.arguments}"})
            if text or deltas:
                yield _response(said, calls, text, thought=thought)
        rest = reader.flush() if reader else ""
        raw = _raw(pieces.reply, model, bool(calls), created)
        yield _response(said + rest, [_finished(call) for call in calls], rest, raw, thought=thought)


def _raw(reply: Reply, model: str, called: bool, created: int) -> dict[str, Any]:
    receipt = reply.receipt
    return {
        "model": model,
        "finish_reason": "tool_calls" if called and reply.finish_reason != "forced" else reply.finish_reason,
        "usage": usage_of(reply, created),
        "kvzip": {
            "context": receipt.key,
            "tier": "built" if created else receipt.tier,
            "nbytes": receipt.nbytes,
            "ms": dict(receipt.ms),
        },
    }


def usage_of(reply: Reply, created: int = 0) -> dict[str, int]:
    """Tokens of an answer under OpenAI's names, which LlamaIndex' counters read; ``cached_tokens`` are those that were reused,
    ``cache_creation_tokens`` those of a context that was ``created`` for it."""
    usage = reply.usage
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "cached_tokens": usage.cached_tokens - created,
        "cache_creation_tokens": created,
    }


def _response(
    said: str, calls: Sequence[ToolCallBlock], delta: str, raw: dict[str, Any] | None = None, thought: str = "", thinking_delta: str = ""
) -> ChatResponse:
    blocks: list[ContentBlock] = [TextBlock(text=said), *calls] if said or not calls else [*calls]
    if thought:
        blocks.insert(0, ThinkingBlock(content=thought))
    # Where LlamaIndex looks for whether there are calls; what they are is in the blocks.
    told = {"tool_calls": [call.model_dump() for call in calls]} if calls else {}
    message = ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=told)
    more = {"thinking_delta": thinking_delta} if thinking_delta else {}
    return ChatResponse(message=message, delta=delta, raw=raw, additional_kwargs=more)


def _finished(call: ToolCallBlock) -> ToolCallBlock:
    return call.model_copy(update={"tool_kwargs": json.loads(str(call.tool_kwargs) or "{}")})


def arguments_of(call: ToolCallBlock) -> dict[str, Any]:
    """A call's arguments; those that have come so far, if they are still written."""
    if isinstance(call.tool_kwargs, dict):
        return call.tool_kwargs
    try:
        arguments = parse_partial_json(call.tool_kwargs)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


def completion_of(response: ChatResponse) -> CompletionResponse:
    """A response as one to a prompt."""
    return CompletionResponse(text=response.message.content or "", delta=response.delta, raw=response.raw)


def last(responses: ChatResponseGen) -> ChatResponse:
    """The whole answer, of its pieces."""
    *_, last = responses
    return last.model_copy(update={"delta": None})


async def alast(responses: ChatResponseAsyncGen) -> ChatResponse:
    """:func:`last` of pieces that come in a thread."""
    *_, last = [response async for response in responses]
    return last.model_copy(update={"delta": None})
