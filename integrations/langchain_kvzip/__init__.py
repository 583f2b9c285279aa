"""KVzip-compressed contexts for LangChain."""

from typing import TYPE_CHECKING, Any

from langchain_kvzip.chat_models import ChatKVzip, KVzipChatModel
from langchain_kvzip.memory_tools import create_memory_tools

if TYPE_CHECKING:
    from langchain_kvzip.middleware import KVzipMemoryMiddleware

__all__ = ["ChatKVzip", "KVzipChatModel", "KVzipMemoryMiddleware", "create_memory_tools"]


def __getattr__(name: str) -> Any:
    if name != "KVzipMemoryMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from langchain_kvzip.middleware import KVzipMemoryMiddleware
    except ModuleNotFoundError as error:
        raise ImportError("KVzipMemoryMiddleware works with LangChain's agents: pip install 'kvzip-memory[agents]'") from error
    return KVzipMemoryMiddleware
