"""KVzip-compressed contexts for LlamaIndex."""

from llama_index_kvzip.index import KVzipIndex
from llama_index_kvzip.llm import KVzipLLM
from llama_index_kvzip.query_engine import KVzipQueryEngine

__all__ = ["KVzipIndex", "KVzipLLM", "KVzipQueryEngine"]
