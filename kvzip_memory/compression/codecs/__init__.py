"""How are the kept pairs written? One method a file."""

from kvzip_memory.compression.codecs.base import Codec
from kvzip_memory.compression.codecs.fitted import CODECS, FittedCodec
from kvzip_memory.compression.codecs.half import HalfCodec
from kvzip_memory.compression.codecs.none import NoCodec

__all__ = ["CODECS", "Codec", "FittedCodec", "HalfCodec", "NoCodec"]
