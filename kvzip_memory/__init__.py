"""Whole documents and conversations as KVzip-compressed KV caches, loaded once and asked many times."""

from kvzip_memory.context import CompressedContext, Receipt, Source
from kvzip_memory.engine import KVzipEngine
from kvzip_memory.errors import (
    BudgetError,
    CorruptFileError,
    ForkedError,
    IdentityMismatchError,
    InputError,
    KVzipError,
    ModelError,
    NotPicklableError,
    QueueFullError,
    SessionBusyError,
    StorageError,
    UnfinishedError,
    UnsupportedModelError,
    WindowError,
)
from kvzip_memory.prompting.documents import Document
from kvzip_memory.session import Session
from kvzip_memory.streaming import Reply, Stream, Usage

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CompressedContext",
    "CorruptFileError",
    "Document",
    "ForkedError",
    "IdentityMismatchError",
    "InputError",
    "KVzipEngine",
    "KVzipError",
    "ModelError",
    "NotPicklableError",
    "QueueFullError",
    "Receipt",
    "Reply",
    "Session",
    "SessionBusyError",
    "Source",
    "StorageError",
    "Stream",
    "UnfinishedError",
    "UnsupportedModelError",
    "Usage",
    "WindowError",
]
