"""How important is a pair? One method a file."""

from kvzip_memory.compression.scorers.base import Scorer
from kvzip_memory.compression.scorers.kvzip import KVzipScorer

__all__ = ["KVzipScorer", "Scorer"]
