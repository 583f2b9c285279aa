"""Who holds a context: its names, a pin, and its tags.

A tag stands for one who has loaded the context: a conversation, a document, an agent. One of several parts, :func:`together`, stands for
several things that only together have it, as the documents of one context: whoever forgets one of them lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kvzip_memory.errors import InputError

#: So many names may a context gather, and so many tags, with so many characters in all.
MOST_HOLDERS, LARGEST_HOLDERS = 10_000, 1 << 20

#: Stands between the parts of a tag.
JOINT = " | "

#: Says how a context was made; nobody's.
MARKED = "cache_control"

#: Whether a context, by its key, is let go of by a tag of it.
LetGo = Callable[[str, str], bool]


def together(*parts: str) -> str:
    """The tag of things that only together have a context."""
    return JOINT.join(sorted(set(parts)))


def escaped(id_: str) -> str:
    """An id as it stands in a tag, where a bar would part it."""
    return id_.replace("%", "%25").replace("|", "%7C")


def unescaped(id_: str) -> str:
    return id_.replace("%7C", "|").replace("%25", "%")


def parts(tag: str) -> set[str]:
    return set(tag.split(JOINT))


@dataclass(frozen=True)
class Naming:
    """Let go by the tags that name all that ``tag`` names."""

    tag: str

    def __call__(self, key: str, other: str) -> bool:
        return parts(self.tag.strip()) <= parts(other)


def without(tags: Collection[str], key: str, let_go: LetGo) -> tuple[str, ...]:
    """The tags of a context by which it is not let go of."""
    return tuple(tag for tag in tags if not let_go(key, tag))


def has_room(known: Collection[str], given: Collection[str]) -> bool:
    """Whether a context can get names, or tags, beside those it has."""
    new = set(given).difference(known)
    return not new or (len(known) + len(new) <= MOST_HOLDERS and sum(map(len, known)) + sum(map(len, new)) <= LARGEST_HOLDERS)


def check_room(what: str, known: Collection[str], given: Sequence[str], way_out: str) -> None:
    """Raises:
    InputError: a context would have too many names, or too many tags.
    """
    if not has_room(known, given):
        raise InputError(
            f"the context has {len(known):,} {what} of {sum(map(len, known)):,} characters, and there is no room for {len(given):,} more; "
            f"it may have {MOST_HOLDERS:,} of {LARGEST_HOLDERS:,} characters: {way_out}"
        )


def thread_tag(thread_id: str = "") -> str:
    """Of what was read for a conversation; all of those without an id are one."""
    return f"thread: {escaped(thread_id)}".strip()


def document_tag(document_id: str) -> str:
    """Of what was read of a document."""
    return f"document: {escaped(document_id)}"


def is_held(names: Collection[str], pinned: bool, tags: Collection[str]) -> bool:
    """Whether anybody has a context."""
    return bool(names) or pinned or bool(set(tags) - {MARKED})
