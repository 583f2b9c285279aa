"""How many documents a context takes."""

from __future__ import annotations

from llama_index.core.schema import BaseNode

from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.engine import FREE_TOKENS
from llama_index_kvzip.llm import KVzipLLM

# Tokens that a document's header may take, and the template around all documents.
_HEADER, _HEAD = 48, 64


def room(llm: KVzipLLM, system: str | None = None, context_tokens: int | None = None) -> int:
    """Tokens for documents and their headers in a context of ``context_tokens``, or of what the window leaves.

    Raises:
        InputError: the window has no room for ``context_tokens`` beside a question and an answer of ``llm.max_tokens``.
    """
    most = llm.engine.window - FREE_TOKENS - llm.max_tokens
    if context_tokens is not None and not 0 < context_tokens <= most:
        raise InputError(f"context_tokens is {context_tokens:,}; the window leaves 1 to {most:,} beside a question and its answer")
    return (context_tokens or most) - _HEAD - (_n_tokens(llm.engine, system) if system else 0)


def size(engine: KVzipEngine, node: BaseNode) -> int:
    """Tokens that a document takes of :func:`room`, at most."""
    return _HEADER + _n_tokens(engine, node.get_content())


def _n_tokens(engine: KVzipEngine, text: str) -> int:
    return len(engine.tokenizer(text, add_special_tokens=False).input_ids)
