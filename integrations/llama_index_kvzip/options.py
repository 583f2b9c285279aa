"""Options of an index and of what is made of it: those that are known, and an error for all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from inspect import signature
from typing import Any

from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.chat_engine.types import ChatMode

from kvzip_memory import InputError
from kvzip_memory.frameworks.options import CALL_OPTIONS, renamed
from llama_index_kvzip.filters import Choice

INDEX_OPTIONS = {"llm", "system", "context_tokens", "joinable"}
INDEX_OPTIONS |= {"index_struct", "objects", "storage_context", "callback_manager", "show_progress"}
_CHOICE_OPTIONS = {"filters", "doc_ids"}
_RANKING_OPTIONS = {"source_top_k", "similarity_top_k", "node_parser"}
SOURCE_OPTIONS = {*_RANKING_OPTIONS, *_CHOICE_OPTIONS}
CONVERSATION_OPTIONS = {"memory", "chat_history", "system_prompt", *SOURCE_OPTIONS}
ANSWER_OPTIONS = {"response_mode", "streaming", "output_cls", "callback_manager", "reuse", *_RANKING_OPTIONS, *CALL_OPTIONS}
QUERY_OPTIONS = {*ANSWER_OPTIONS, *_CHOICE_OPTIONS}
CHAT_ENGINES: dict[str, Any] = {
    ChatMode.SIMPLE: SimpleChatEngine,
    ChatMode.CONTEXT: ContextChatEngine,
    ChatMode.CONDENSE_QUESTION: CondenseQuestionChatEngine,
    ChatMode.CONDENSE_PLUS_CONTEXT: CondensePlusContextChatEngine,
}
CHAT_OPTIONS = {name for kind in CHAT_ENGINES.values() for name in signature(kind.from_defaults).parameters}
CHAT_OPTIONS -= {"llm", "query_engine", "retriever", "kwargs"}


def check_names(given: Iterable[str], known: Set[str]) -> None:
    if unknown := sorted(set(given) - known):
        raise InputError(f"options {unknown} are unknown; {f'known are {sorted(known)}' if known else 'there are none'}")


def known_options(given: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    """The options under our names.

    Raises:
        InputError: one is unknown, or was given twice with different values.
    """
    options = renamed(given)
    top_k = options.pop("similarity_top_k", None)  # LlamaIndex' name
    if top_k is not None:
        if options.get("source_top_k") not in (None, top_k):
            raise InputError(
                f"similarity_top_k is {top_k} and source_top_k is {options['source_top_k']}; they are one option, give it once"
            )
        options["source_top_k"] = top_k
    check_names(options, known)
    return options


def chosen(options: dict[str, Any]) -> Choice:
    """The documents that are chosen; these options are taken out."""
    return Choice(**{name: options.pop(name) for name in _CHOICE_OPTIONS if name in options})


def check_update_options(options: Mapping[str, Any]) -> None:
    """LlamaIndex' options of an update say whether its text is forgotten, as it is here always."""
    check_names(options, {"insert_kwargs", "delete_kwargs"})
    check_names(options.get("insert_kwargs", {}), set())
    check_names(options.get("delete_kwargs", {}), {"delete_from_docstore"})
    if options.get("delete_kwargs", {}).get("delete_from_docstore", True) is not True:
        raise InputError(
            "delete_from_docstore=False keeps the text of the version before, which an update forgets; insert another document"
        )


def check_index_options(options: Mapping[str, Any], own: object = None) -> None:
    """Options of an index; of ``transformations`` only its own."""
    if options.get("transformations") not in (None, own):
        raise InputError("transformations are not supported, since documents are read whole; apply them to the documents before")
    if "ratio" in options:
        raise InputError("ratio is the llm's: KVzipLLM(..., ratio=...)")
    check_names(options, INDEX_OPTIONS | {"transformations"})
