"""How many documents a context takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from llama_index.core.schema import BaseNode

from kvzip_memory import InputError, KVzipEngine
from kvzip_memory.frameworks.options import is_whole
from kvzip_memory.prompting.cleaning import clean, cleaned
from kvzip_memory.prompting.documents import as_document
from kvzip_memory.prompting.frames import header
from kvzip_memory.prompting.window import FREE_TOKENS
from kvzip_memory.registry.holders import document_tag, together
from kvzip_memory.system.printable import logger_of
from llama_index_kvzip.llm import KVzipLLM

logger = logger_of(__name__)

Node = TypeVar("Node", bound=BaseNode)

_RANDOM = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

# Tokens that the template around all documents may take, and more documents than a context has.
_HEAD, _MANY = 64, 9999


def readable(nodes: Sequence[BaseNode]) -> list[BaseNode]:
    """The nodes that have a text. A warning names the others, such as the blank pages of a scan: there is nothing to read in them."""
    if blank := [node.ref_doc_id or node.node_id for node in nodes if not node.get_content().strip()]:
        logger.warning("left out, since they have no text: %s", blank)
    return [node for node in nodes if node.get_content().strip()]


def encodable(node: Node) -> Node:
    """A node, or a copy of it as it is read if it holds half a surrogate pair: LlamaIndex would fail to hash it."""
    try:
        node.hash  # noqa: B018
        return node
    except UnicodeEncodeError:
        copy, where = node.model_copy(deep=True), f"document {node.node_id!r}"
        copy.metadata = cleaned(node.metadata, where)
        copy.set_content(clean(node.get_content(), where))
        return copy


def tag_of(nodes: Sequence[BaseNode], *more: str) -> str:
    """The tag of a context of these nodes: it goes when one of their documents is forgotten."""
    return together(*more, *map(document_of, nodes))


def document_of(node: BaseNode) -> str:
    """The tag of a node's document, the same at every run: its id, unless that is a random one; then its file, or a hash of it."""
    source = node.source_node
    id_ = source.node_id if source else node.node_id
    if _RANDOM.fullmatch(id_):
        metadata = {**node.metadata, **(source.metadata if source else {})}
        named = next((str(metadata[key]) for key in ("file_path", "file_name", "source", "url") if metadata.get(key)), None)
        id_ = named or (source.hash if source and source.hash else node.hash)
    return document_tag(clean(id_, "a document's id"))


def room(llm: KVzipLLM, system: str | None = None, context_tokens: int | None = None) -> int:
    """Tokens for documents and their headers in a context of ``context_tokens``, or of what the window leaves.

    Raises:
        InputError: ``context_tokens`` is no whole number, or the window has no room for so many beside a question and an answer of
            ``llm.max_tokens``.
    """
    most = llm.engine.window - FREE_TOKENS - llm.max_tokens
    if context_tokens is not None and not (is_whole(context_tokens) and 0 < context_tokens <= most):
        given = f"{context_tokens:,}" if is_whole(context_tokens) else repr(context_tokens)
        raise InputError(
            f"context_tokens is {given}; give a whole number; the window leaves 1 to {most:,} beside a question and its answer"
        )
    return (context_tokens or most) - _HEAD - (_n_tokens(llm.engine, system) if system else 0)


def size(engine: KVzipEngine, node: BaseNode) -> int:
    """Tokens that a document and its header take of :func:`room`, at most."""
    document = as_document(node)
    return _n_tokens(engine, header(_MANY, document.name or f"document {_MANY}")) + _n_tokens(engine, document.text)


def _n_tokens(engine: KVzipEngine, text: str) -> int:
    return len(engine.text_ids(text))
