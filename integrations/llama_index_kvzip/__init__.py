"""KVzip-compressed contexts for LlamaIndex."""

from llama_index_kvzip.chat_engine import KVzipChatEngine
from llama_index_kvzip.index import KVzipIndex
from llama_index_kvzip.llm import KVzipLLM
from llama_index_kvzip.memory import KVzipMemoryBlock
from llama_index_kvzip.query_engine import KVzipQueryEngine
from llama_index_kvzip.synthesizer import KVzipSynthesizer

__all__ = ["KVzipChatEngine", "KVzipIndex", "KVzipLLM", "KVzipMemoryBlock", "KVzipQueryEngine", "KVzipSynthesizer"]
