"""How important is a pair? One method a file."""

from kvzip_memory.compression.methods import Methods
from kvzip_memory.compression.scorers import kvzip
from kvzip_memory.compression.scorers.base import Scorer
from kvzip_memory.compression.scorers.kvzip import KVzipScorer

#: Scorers by name.
SCORERS: Methods[Scorer] = Methods("scorer", ("cost", "score"), (dict,), {"kvzip": KVzipScorer})

#: Version of each method's scores, by its name.
VERSIONS = {"kvzip": kvzip.VERSION}

__all__ = ["SCORERS", "VERSIONS", "KVzipScorer", "Scorer"]
