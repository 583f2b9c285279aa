"""Documents in one form: ours, LangChain's and LlamaIndex's, texts and files."""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_memory.context.facts import LONGEST_NAME
from kvzip_memory.errors import InputError
from kvzip_memory.prompting.cleaning import clean, cleaned
from kvzip_memory.system.printable import brief, logger_of

#: The names and metadata of all documents of a context may have so many characters as JSON.
LARGEST_METADATA = 8 << 20
#: Metadata of a document have no more lists and mappings.
MOST_OF_METADATA = 100_000

_JSON = json.JSONEncoder(default=str)

logger = logger_of(__name__)


@dataclass(frozen=True)
class Document:
    """A text to load, with the name and metadata that stay with the context as its source."""

    text: str
    name: str | None = None
    metadata: Mapping[str, Any] | None = None


def as_document(item: Any, where: str = "document") -> Document:
    """A document of ours, LangChain's or LlamaIndex's, a text or a path in one form, and all its texts as of :func:`clean`.

    Raises:
        InputError: none of these, or an unreadable file.
    """
    document = _document(item)
    if not isinstance(document.text, str):
        raise InputError(f"the text of {where} is a {type(document.text).__name__}, not a string")
    name = None if document.name is None else clean(str(document.name), f"the name of {where}")
    if name and len(name) > LONGEST_NAME:
        raise InputError(f"the name of {where}, {brief(name)}, has {len(name):,} characters; give one of at most {LONGEST_NAME:,}")
    where = f"document {name!r}" if name else where
    metadata = None if document.metadata is None else cleaned(document.metadata, f"metadata of {where}", MOST_OF_METADATA)
    return Document(clean(document.text, where), name, metadata)


def check_metadata(documents: Iterable[Any]) -> None:
    """Documents or sources of one context.

    Raises:
        InputError: their names and metadata are too large to be kept with it.
    """
    chars = 0
    for number, document in enumerate(documents, 1):
        for piece in _JSON.iterencode([document.name, document.metadata]):
            chars += len(piece)
            if chars > LARGEST_METADATA:
                raise InputError(
                    f"names and metadata of the first {number:,} documents of the context have more than {LARGEST_METADATA:,} characters "
                    "as JSON, which is the limit; keep less in metadata, or make several contexts"
                )


def _document(item: Any) -> Document:
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        if len(item) < 256 and "\n" not in item and os.path.isfile(item):  # unlike Path's it never raises: most texts are no names
            logger.warning("a text of %d characters is loaded; there is a file of that name: give a Path to load the file", len(item))
        return Document(item)
    if isinstance(item, Path):
        try:
            return Document(Path(os.path.expanduser(item)).read_text(encoding="utf-8-sig"), item.name, {"source": str(item)})
        except (OSError, ValueError) as error:  # not UTF-8, or no name at all
            raise InputError(f"cannot read {str(item)!r} as UTF-8 text: {error}") from error
    if hasattr(item, "page_content"):  # LangChain
        text = item.page_content
    elif hasattr(item, "get_content"):  # LlamaIndex
        text = item.get_content()
    else:
        raise InputError(f"cannot load a {type(item).__name__}; give a string, a path, documents or chat messages")
    metadata = dict(item.metadata or {})
    name = next((str(metadata[k]) for k in ("title", "file_name", "source") if metadata.get(k)), None)
    return Document(text, name, metadata)
