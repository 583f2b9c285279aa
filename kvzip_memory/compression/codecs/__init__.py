"""How are the kept pairs written? One method a file."""

from kvzip_memory.compression.codecs.base import Codec
from kvzip_memory.compression.codecs.none import NoCodec

__all__ = ["Codec", "NoCodec"]
