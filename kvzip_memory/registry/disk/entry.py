"""What is known about a stored context without reading its pairs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvzip_memory.context import CompressedContext, parts_of
from kvzip_memory.registry.identity import other_version


@dataclass(frozen=True, repr=False)
class Entry:
    """What the index knows about a stored context.

    Attributes:
        key: the context's.
        identity: the fields of the key.
        group: digest of the text the context was made of, and of the tenant.
        file_nbytes: bytes on disk.
        nbytes: bytes in memory.
        n_tokens: tokens it stands for.
        ratio: fraction of pairs kept.
        names: the names it has, and when it was last loaded under each, in seconds since the epoch.
        tags: free words given by the user.
        pinned: never evicted.
        created: when its text was read, seconds since the epoch; 0.0: not known.
        used: seconds since the epoch of the last use that reached the disk tier.
        expires: seconds since the epoch, None for never.
        coarsest: as of the context; None in rows of an earlier version.
        former: names it was loaded under that another context has now. Rows of the index have them among the ``names``.
        beginning: what it is filed under, see :mod:`~kvzip_memory.registry.beginnings`; empty in rows of an earlier version.
    """

    key: str
    identity: Mapping[str, Any]
    group: str
    file_nbytes: int
    nbytes: int
    n_tokens: int
    ratio: float
    names: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    pinned: bool = False
    created: float = 0.0
    used: float = 0.0
    expires: float | None = None
    coarsest: float | None = None
    former: tuple[str, ...] = ()
    beginning: str = ""

    def __repr__(self) -> str:
        shares = f", sharing {len(self.parts)} parts" if self.parts else ""
        size = f"{max(self.nbytes, self.file_nbytes) / 1e6:.1f} MB"
        return f"<Entry {self.name or self.key[:12]!r} {self.n_tokens:,} tokens, ratio {self.ratio:g}, {size}{shares}>"

    @property
    def name(self) -> str | None:
        """The name it was last loaded under."""
        return max(self.names, key=self.names.__getitem__, default=None)

    @property
    def tenant(self) -> str | None:
        return self.identity.get("tenant")

    @property
    def parts(self) -> tuple[str, ...]:
        """Keys of the contexts whose pairs it shares."""
        return tuple(part.key for part in parts_of(self.identity))

    @property
    def other_version(self) -> Literal["older", "newer"] | None:
        """Whether an older or a newer version of kvzip-memory stored it, so that no text finds it here; None: this one."""
        return other_version(self.identity)

    @property
    def heard(self) -> float:
        """When it was last heard of, by the clocks of those who used it: seconds since the epoch. A deletion is later than that."""
        return max(self.used, *self.names.values(), 0.0)

    @property
    def expired(self) -> bool:
        return is_past(self.created, self.expires)

    @property
    def fineness(self) -> float:
        """The smallest ratio at which any of its pairs were compressed; 0.0: not known."""
        if self.coarsest is None:
            return self.ratio if self.identity.get("parent") is None else 0.0
        return self.coarsest


def is_past(created: float, expires: float | None, ttl: float | None = None) -> bool:
    """Whether a context is older than whoever stored it, or asks with a ``ttl``, wants it.

    A clock that was put back does not make it last: what was made so far in the future counts as old, too.
    """
    limits = [limit for limit in (None if expires is None else expires - created, ttl) if limit is not None]
    return bool(limits) and abs(time.time() - created) > min(limits)


def entry_of(context: CompressedContext, group: str, names: Mapping[str, float], tags: tuple[str, ...], pinned: bool) -> Entry:
    """What is known of a context that is not in a file yet."""
    return Entry(
        key=context.key,
        identity=context.identity,
        group=group,
        file_nbytes=0,
        nbytes=context.nbytes,
        n_tokens=context.n_tokens,
        ratio=context.ratio,
        names=names,
        tags=tags,
        pinned=pinned,
        created=context.created,
        expires=context.expires,
        coarsest=context.coarsest,
    )


def completed(entry: Entry, known: Entry | None) -> Entry:
    """An entry made from a file or anew, with what an earlier row knew."""
    if known is None:
        return entry
    tags, used = tuple(sorted({*entry.tags, *known.tags})), max(entry.used, known.used)
    return replace(entry, names=latest(entry.names, known.names), tags=tags, pinned=entry.pinned or known.pinned, used=used)


def latest(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Names of both, each with its later time."""
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}
