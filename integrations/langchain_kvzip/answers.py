"""Answers out: the engine's pieces as LangChain's chunks, with tokens and facts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from kvzip_memory import CompressedContext, KVzipEngine, Reply, UnfinishedError
from kvzip_memory.prompting.call_reader import CallReader
from kvzip_memory.prompting.reasoning import Reasoning
from langchain_kvzip.options import CallOptions
from langchain_kvzip.structured import Wanted

# A model that is guided but not told of the schema answers badly: a small one repeats itself to the end.
_ASKED = "Answer with one JSON {} that validates against this JSON schema: {}"


def with_schema(turns: Sequence[Mapping[str, Any]], options: CallOptions) -> list[Mapping[str, Any]]:
    """Turns that tell the model of the schema behind what was said last, if it is to be told and that was not its own."""
    schema = options.stream["schema"]
    if not options.told or schema is None or not turns or turns[-1]["role"] == "assistant":
        return list(turns)
    asked = _ASKED.format("object" if Wanted(schema).is_object else "value", json.dumps(schema, ensure_ascii=False))
    return [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']}\n\n{asked}"}]


def chunks_of(
    engine: KVzipEngine,
    context: CompressedContext | None,
    turns: Sequence[Mapping[str, Any]],
    options: CallOptions,
    model_name: str,
    created: int,
) -> Iterator[ChatGenerationChunk]:
    """The answer to turns behind a context, of which ``created`` tokens were read in this call."""
    stream = options.stream
    reader = CallReader(stream["form"]) if stream["tools"] and stream["tool_choice"] != "none" else None
    called = False
    try:
        with engine.stream(context, with_schema(turns, options), **stream) as pieces:
            for piece in pieces.with_reasoning():
                if isinstance(piece, Reasoning):
                    yield ChatGenerationChunk(message=AIMessageChunk(content="", additional_kwargs={"reasoning_content": str(piece)}))
                    continue
                text, deltas = reader.push(piece) if reader else (piece, [])
                called |= bool(deltas)
                calls = [tool_call_chunk(name=d.name, args=d.arguments, id=d.id, index=d.index) for d in deltas]
                if text or calls:
                    yield ChatGenerationChunk(message=AIMessageChunk(content=text, tool_call_chunks=calls))
            reply = pieces.reply
    except UnfinishedError as error:
        if not options.keep_unfinished:
            raise
        facts = {"model_name": model_name, "finish_reason": "length", "kvzip": {"unfinished": str(error)}}
        yield ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata=facts, chunk_position="last"))
        return
    yield ChatGenerationChunk(
        message=AIMessageChunk(
            content=reader.flush() if reader else "",
            usage_metadata=_usage(reply, created),
            response_metadata=metadata_of(reply, model_name, called, created),
            chunk_position="last",
        )
    )


def metadata_of(reply: Reply, model_name: str, called: bool, created: int) -> dict[str, Any]:
    """What LangChain keeps of an answer beside its text, with what it reused or built under ``kvzip``."""
    receipt = reply.receipt
    facts: dict[str, Any] = {"tier": "built" if created else receipt.tier, "ms": {k: round(v, 1) for k, v in receipt.ms.items()}}
    metadata = {"model_name": model_name, "finish_reason": reply.finish_reason, "kvzip": facts}
    if called and reply.finish_reason != "forced":
        metadata["finish_reason"] = "tool_calls"
    if receipt.key is None:
        return metadata | {"model_provider": "kvzip"}
    facts |= {"context": receipt.key, "tokens": reply.usage.cached_tokens, "nbytes": receipt.nbytes}
    return metadata


def _usage(reply: Reply, created: int) -> UsageMetadata:
    usage = reply.usage
    return UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
        input_token_details={"cache_read": usage.cached_tokens - created, "cache_creation": created},
    )
