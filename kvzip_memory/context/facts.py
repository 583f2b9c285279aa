"""What is known of a context beside its pairs: what was loaded, what follows, and how it came to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

#: A name or a tag may have so many characters.
LONGEST_NAME = 4096


@dataclass(frozen=True)
class Source:
    """One loaded document: its name, its metadata and the tokens it covers, ``[start, end)`` of the context.

    The name and the metadata are those of whoever loaded it. The text itself has no more than a name that is ``shown`` in a header.
    """

    name: str
    metadata: Mapping[str, Any]
    start: int
    end: int
    shown: bool = False


def as_told(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Sources as the text itself tells them, for those who share it: without what only their loader knows."""
    told = enumerate(sources, 1)
    return tuple(replace(source, name=source.name if source.shown else f"document {number}", metadata={}) for number, source in told)


class Part(NamedTuple):
    """What a context shares with others: the pairs of a stored context that are its own.

    Attributes:
        key: of that context.
        n_tokens: that these pairs stand for.
        shift: how far it has moved from where it was made, in positions.
        first: pairs at positions below it, of where they were made, are not seen: the template's head, which the first part has already,
            and tokens that a join has read again.
        nearer: how many positions nearer to what follows it is seen than it stands then, as contexts may share positions.
        joined: whether it was read behind other things than it stands behind, or stands among the parts before it.
    """

    key: str
    n_tokens: int
    shift: int = 0
    first: int = 0
    nearer: int = 0
    joined: bool = False

    def moved(self, by: int, nearer: int = 0) -> Part:
        """The same part in a join, so many positions farther on, and seen so much nearer."""
        return self._replace(shift=self.shift + by, nearer=self.nearer + nearer, joined=True)

    @property
    def told(self) -> list[str | int]:
        """As it stands in an identity."""
        if not (self.joined or self.shift or self.first or self.nearer):
            return [self.key, self.n_tokens]
        return [*self[:5]] if self.nearer else [*self[:4]]


def parts_of(identity: Mapping[str, Any]) -> tuple[Part, ...]:
    """What a context shares, as its identity says it, in the order in which it is seen; nothing for most."""
    return tuple(Part(*part)._replace(joined=len(part) > 2) for part in identity.get("parts") or ())


@dataclass(frozen=True)
class Recipe:
    """What follows a context's tokens, cut from the chat template once and never rendered again.

    A first question is ``opening + tokens(separator + question) + closing``; every later one starts with
    ``next_turn`` in the place of opening and separator.

    Attributes:
        opening: ids between the context and the first question (a user header after a conversation, else empty).
        separator: plain text put before the first question.
        closing: ids that end a user's turn and open the assistant's.
        next_turn: ids that end an assistant's turn and open the user's.
        role: whose turn the context ends in.
        tools: digest of the tools that are described in the context, None without any.
        tail: the text's last characters, if their tokens depend on what follows: they are not in the context and are read with
            that. Mostly none, or a full stop.
        system: the system prompt in the context, which some templates look at to write what follows.
    """

    opening: tuple[int, ...]
    separator: str
    closing: tuple[int, ...]
    next_turn: tuple[int, ...]
    role: str = "user"
    tools: str | None = None
    tail: str = ""
    system: str = ""


@dataclass(frozen=True)
class Receipt:
    """What one call reused or built.

    Attributes:
        key: the context's key, None for an answer without a context.
        hit: whether a stored context was used.
        tier: where it lay: ``"device"``, ``"host"``, ``"disk"``, ``"built"`` when it had to be computed, or ``"none"``
            when the call used no context.
        reason: why there was no hit, None on a hit.
        differs: on a miss, the fields of the identity in which the nearest stored context of the same text differs.
        shrunk_from: the ratio of the stored context this one was cut from, None if it was stored as it is.
        nbytes: bytes of the context in memory.
        ms: milliseconds by stage (``wait``, ``load``, ``prefill``, ``score``, ``evict``, ``decode``, ...).
        fitted: as of the context.
        read: tokens that this call read to build it: all of them, or those behind the context that it goes on from.
    """

    key: str | None
    hit: bool
    tier: str
    reason: str | None = None
    differs: tuple[str, ...] = ()
    shrunk_from: float | None = None
    nbytes: int = 0
    ms: Mapping[str, float] = field(default_factory=dict)
    fitted: tuple[tuple[int, int], ...] = ()
    read: int = 0
