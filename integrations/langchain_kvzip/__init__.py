"""KVzip-compressed contexts for LangChain."""

from langchain_kvzip.chat_models import ChatKVzip, KVzipChatModel
from langchain_kvzip.memory_tools import create_memory_tools

__all__ = ["ChatKVzip", "KVzipChatModel", "create_memory_tools"]
