"""Texts and values as they are handed in, made such that they can be encoded and kept; within limits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief, logger_of

#: So many strings to keep may a call give.
MOST_KEPT = 1000
#: Values that are handed in have no more lists and mappings than this within one another, and no more of them; schemas and tools fewer.
DEEPEST, MOST_PARTS, MOST_OF_SCHEMA = 100, 1_000_000, 5_000
_LARGEST_NUMBER = 14_000  # bits; Python writes and reads none of more than 4,300 digits

logger = logger_of(__name__)

_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


def clean(text: str, where: str) -> str:
    """A text as it can be encoded: without the mark of a file's beginning (BOM), pairs of surrogates as the characters they stand for.

    A surrogate alone stands for none. Extractors of PDFs make them, and files read with ``surrogateescape``. It becomes U+FFFD, with a
    warning that names ``where`` the text is from and the place in it; one for each text, as conversations are read again every turn.
    """
    if not isinstance(text, str):
        raise InputError(f"{where} is {brief(text)}, of type {type(text).__name__}; give a text")
    text = text.lstrip("\ufeff")
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        places = [found.start() for found in _LONE_SURROGATE.finditer(text)]
        if places:
            warn_once(f"{where}: character {places[0]} is half of a surrogate pair; {len(places)} such are read as U+FFFD", hash(text))
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@lru_cache(maxsize=1024)
def warn_once(message: str, text: int) -> None:
    """A warning about a text, by its hash; one for each text, as conversations are read again every turn."""
    logger.warning(message)


class TooDeep(InputError):
    """A value with lists and mappings within one another deeper than :data:`DEEPEST`, or within themselves."""


def check_nesting(value: Any, where: str, most: int = MOST_PARTS) -> None:
    """Raises:
    TooDeep: lists and mappings within one another, or within themselves.
    InputError: more than ``most`` of them.
    """
    level, found = [*_parts_of([[value]])], 0
    for _ in range(DEEPEST):
        found += len(level)
        if found > most:
            raise InputError(f"{where} has more than {most:,} lists and mappings, or one that holds itself; give fewer")
        if not level:
            return
        level = [*islice(_parts_of(level), most + 1)]
    raise TooDeep(f"{where} has more than {DEEPEST} lists and mappings within one another, or one that holds itself; give it flatter")


def _parts_of(level: Iterable[Any]) -> Iterator[Any]:
    """Lists and mappings in others."""
    for item in level:
        for inner in item.values() if isinstance(item, Mapping) else item:
            if isinstance(inner, dict | list | tuple | Mapping):
                yield inner


def cleaned(value: Any, where: str, most: int = MOST_PARTS) -> Any:
    """A value as JSON can hold it, with every string in it as of :func:`clean`.

    Raises:
        InputError: as for :func:`check_nesting`.
    """
    check_nesting(value, where, most)
    return _cleaned(value, where)


def _cleaned(value: Any, where: str) -> Any:
    if isinstance(value, str):
        return clean(value, where)
    if isinstance(value, Mapping):
        return {clean(str(key), where): _cleaned(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, where) for item in value]
    if isinstance(value, int) and value.bit_length() > _LARGEST_NUMBER:
        raise InputError(f"{where} has a number of {value.bit_length():,} bits; give one of at most {_LARGEST_NUMBER:,}, or a text")
    return value if value is None or isinstance(value, int | float) else clean(str(value), where)


def as_texts(value: Any, where: str, most: int) -> list[str]:
    """A text, several, or None for none, as a list.

    Raises:
        InputError: anything else, or more than ``most`` texts.
    """
    given = [value] if isinstance(value, str) else value if isinstance(value, Iterable) else [] if value is None else [value]
    texts = list(islice(given, most + 1))
    if len(texts) > most:
        raise InputError(f"{where}: more than {most:,} texts were given; give fewer")
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} is {brief(value)}; give a text or a list of texts")
    return texts
