"""What users hand in, sorted into documents and messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.prompting.documents import Document, as_document, check_metadata
from kvzip_memory.prompting.messages import Message, as_message, check_messages


def read_source(source: Any) -> tuple[list[Document], list[Message]]:
    """Sort a source given by a user into documents or messages; one of the two lists is empty.

    Accepts a string, a path, a document (LangChain's, LlamaIndex's or ours), a message (a mapping with role and
    content, LangChain's or LlamaIndex's), or a sequence of documents or of messages.

    Raises:
        InputError: nothing to read, an unknown type, an unreadable file, or documents mixed with messages.
    """
    items = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    documents, messages = [], []
    for number, item in enumerate(items, 1):
        message = as_message(item, f"message {number}")
        if message is None:
            documents.append(as_document(item, f"document {number}"))
        else:
            messages.append(message)
    if documents and messages:
        raise InputError(f"{len(documents)} documents and {len(messages)} messages in one source; load them as two contexts")
    for number, document in enumerate(documents, 1):
        if not document.text.strip():
            where = f" {document.name!r}" if document.name else f" {number} of {len(documents)}" if len(documents) > 1 else ""
            raise InputError(f"document{where} is empty; there is nothing to load")
    check_metadata(documents)
    if messages:
        check_messages(messages)
    elif not documents:
        raise InputError("the source is an empty list; there is nothing to load")
    return documents, messages
