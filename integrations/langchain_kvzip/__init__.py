"""KVzip-compressed contexts for LangChain."""

from langchain_kvzip.chat_models import ChatKVzip, KVzipChatModel

__all__ = ["ChatKVzip", "KVzipChatModel"]
