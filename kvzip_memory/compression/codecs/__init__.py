"""How are the kept pairs written? One method a file."""

from kvzip_memory.compression.codecs.base import Codec
from kvzip_memory.compression.codecs.half import HalfCodec
from kvzip_memory.compression.codecs.none import NoCodec
from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief

#: Codecs by name.
CODECS: dict[str, Codec] = {"none": NoCodec(), "fp16": HalfCodec()}

__all__ = ["CODECS", "Codec", "HalfCodec", "NoCodec", "codec_of"]


def codec_of(name: str) -> Codec:
    """The codec of a name.

    Raises:
        InputError: there is none.
    """
    if not isinstance(name, str) or name not in CODECS:
        raise InputError(f"codec {brief(name)} is unknown; use one of {', '.join(sorted(CODECS))}")
    return CODECS[name]
