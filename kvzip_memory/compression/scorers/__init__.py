"""How important is a pair? One method a file."""

from kvzip_memory.compression.scorers import kvzip
from kvzip_memory.compression.scorers.base import Scorer
from kvzip_memory.compression.scorers.kvzip import KVzipScorer

#: Version of each method's scores, by its name.
VERSIONS = {"kvzip": kvzip.VERSION}

__all__ = ["VERSIONS", "KVzipScorer", "Scorer"]
