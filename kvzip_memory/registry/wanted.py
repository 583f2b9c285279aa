"""What is asked of a registry, and what names, tags, ages and sizes may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvzip_memory.context import LONGEST_NAME, CompressedContext, Source
from kvzip_memory.errors import InputError
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.holders import JOINT, LARGEST_HOLDERS
from kvzip_memory.system.printable import brief, printable

#: Called by a build: stage, tokens done, tokens in all.
Report = Callable[[str, int, int], None]
Build = Callable[[Report], CompressedContext]

#: One call may give so many tags.
MOST_TAGS = 256

#: Seconds that a ``ttl`` may be: a hundred years.
TTL_LIMIT = 100 * 365 * 86400


@dataclass(frozen=True)
class Wanted:
    """A context that is asked for.

    Attributes:
        key: its key.
        identity: the fields the key was made of.
        group: digest of the text and the tenant: what the nearest stored context is looked for by.
        name: alias to give it.
        tags: free words to give it.
        sources: the documents, by the names and with the metadata that whoever gives the name knows them by.
        origin: tags that it gets only if it is built: those of who has loaded it first, if it was lost.
        loaded: of one that is asked for again, when it was loaded, in seconds since the epoch; None while it is being loaded.

    Raises:
        InputError: a name or tag that cannot be stored, or a name that is empty or a key.
    """

    key: str
    identity: Mapping[str, Any]
    group: str
    name: str | None = None
    tags: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    origin: tuple[str, ...] = ()
    loaded: float | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        for tag in self.tags:
            check_tag(tag)


def check_text(name: str) -> None:
    """Raises:
    InputError: a name or tag that cannot be stored, such as a file's that is not UTF-8, or one that is too long.
    """
    try:
        if len(name) > LONGEST_NAME:
            raise InputError(f"the name or tag {name[:80]!r}... has {len(name):,} characters; give one of at most {LONGEST_NAME:,}")
        name.encode()
    except (UnicodeEncodeError, AttributeError, TypeError):
        raise InputError(f"{brief(name)} is not text that can be stored; give another name") from None


def check_tag(tag: str) -> None:
    """Raises:
    InputError: a tag that cannot be stored, or of which a part cannot, see :func:`check_text`; or one that is longer than all may be.
    """
    for part in tag.split(JOINT) if isinstance(tag, str) else [tag]:
        check_text(part)
    if len(tag) > LARGEST_HOLDERS:
        raise InputError(
            f"the tag {tag[:80]!r}... has {len(tag):,} characters; a context's may have {LARGEST_HOLDERS:,}: load fewer documents"
        )


def check_name(name: str) -> None:
    """Raises:
    InputError: a name that cannot be stored, see :func:`check_text`, that is empty, or that is a whole key, in whichever case: it would be
        found in the place of a context of that key.
    """
    check_text(name)
    if not name:
        raise InputError("the name is empty; give a text, or None for none")
    if KEY.fullmatch(name.lower()):
        raise InputError(f"the name {name!r} has the form of a key; put something before its 64 digits")


def check_ttl(ttl: float | None) -> float | None:
    """A ``ttl`` as it was given.

    Raises:
        InputError: no number of seconds above 0 and up to :data:`TTL_LIMIT`.
    """
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= TTL_LIMIT:
        raise InputError(f"ttl is {printable(brief(ttl))}; give seconds above 0, at most {TTL_LIMIT:,} (100 years), or None for never")
    return ttl


def not_stored(reference: str) -> InputError:
    return InputError(f"no context {reference!r} is stored; give a name, a key, or the first 8 digits of a key at least")


_UNITS = {"": 1, **{f"{p}{b}": (1024 if b == "ib" else 1000) ** i for i, p in enumerate("kmgt", 1) for b in ("", "b", "ib")}, "b": 1}
# Of a size; what a number of 64 bits can hold has 20.
_DIGITS = 32


def parse_bytes(name: str, size: int | str | None) -> int | None:
    """Bytes of ``4_000_000``, ``"4GB"`` (powers of 1000) or ``"4GiB"`` (of 1024); None stays None.

    Raises:
        InputError: no size.
    """
    if size is None:
        return None
    text = brief(size) if isinstance(size, int) else str(size).lower()
    match = re.fullmatch(r"\s*([\d_]*\.?\d+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNITS or len(match[1]) > _DIGITS:
        raise InputError(f'{name} is {brief(size)}; give bytes as a number or a size such as "4GiB"')
    return int(float(match[1].replace("_", "")) * _UNITS[match[2]])
