"""What was forgotten in a folder, told to processes that have it in their memory still: notes of when, by digests alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvzip_memory.registry.holders import parts
from kvzip_memory.system.digests import digest

_LIMIT = 1000  # notes that are kept, the latest
_DIGITS = 16


@dataclass(frozen=True)
class Note:
    """That something was forgotten.

    Attributes:
        time: seconds since the epoch.
        key: digest of the context's; empty if it is said of all.
        parts: digests of the parts of a tag, which every tag with these parts has lost; none: the context itself was deleted.
    """

    time: float
    key: str = ""
    parts: tuple[str, ...] = ()


class Notes:
    """The latest notes of a tenant in a folder, immutable. Of what there is no note any more everything may have been forgotten.

    Args:
        row: as :attr:`row` was; None where nothing was ever forgotten.
    """

    _operators: Notes | None = None

    def __init__(self, row: Mapping[str, Any] | None) -> None:
        row = row or {}
        self._before = float(row.get("before", row.get("time", 0.0)))  # the latter in rows of an earlier version
        self._notes = [Note(float(when), str(key), tuple(map(str, digests))) for when, key, digests in row.get("notes", ())]

    def under(self, operators: Notes) -> Notes:
        """These, together with those of who forgets for all tenants."""
        both = copy(self)
        both._operators = operators
        return both

    @property
    def row(self) -> dict[str, Any]:
        return {"before": self._before, "notes": [[note.time, note.key, note.parts] for note in self._notes]}

    def with_note(self, key: str = "", tag: str = "", when: float | None = None) -> Notes:
        """These and one more: that a tag was taken from a context, or from all; or that a context was deleted; now, or then."""
        what = _digest(key) if key else "", tuple(sorted(_digests(tag))) if tag else ()
        more = copy(self)
        more.__dict__.pop("deletions", None)
        more._notes = [
            *(note for note in self._notes if (note.key, note.parts) != what),
            Note(time.time() if when is None else when, *what),
        ]
        if len(more._notes) > _LIMIT:
            more._before = max(self._before, more._notes[-_LIMIT - 1].time)
            more._notes = more._notes[-_LIMIT:]
        return more

    def deleted(self, key: str) -> float:
        """When a context was last deleted, as far as is known: seconds since the epoch, 0.0 for never."""
        before = self._operators.deleted(key) if self._operators else 0.0
        return max(before, self.deletions.get(_digest(key), self._before))

    def noted(self, key: str) -> float:
        """When a context was last deleted, 0.0 if there is no note of it."""
        digest_of_key = _digest(key)
        return max(notes.deletions.get(digest_of_key, 0.0) for notes in (self, self._operators) if notes is not None)

    @cached_property
    def deletions(self) -> dict[str, float]:
        """By digest when contexts were deleted, as far as there is a note of it; see :func:`when_deleted`."""
        return {note.key: note.time for note in self._notes if note.key and not note.parts}

    def taken(self, key: str, tag: str) -> float:
        """The same of a tag of a context."""
        digests, keys = _digests(tag), ("", _digest(key))
        before = self._operators.taken(key, tag) if self._operators else 0.0
        return max(before, self._last(note for note in self._notes if note.parts and digests.issuperset(note.parts) and note.key in keys))

    def after(self, key: str, tags: Iterable[str] = (), now: float = 0.0) -> float:
        """A time, from ``now`` on, that is later than what was forgotten of a context and of these tags, by whoever's clock."""
        forgotten = max([self.deleted(key), *(self.taken(key, tag) for tag in tags)])
        return max(now, math.nextafter(forgotten, math.inf))

    def left(self, key: str, tags: Mapping[str, float]) -> dict[str, float]:
        """Those of a context's tags, with the times when they were given, that were not forgotten since."""
        deleted = self.deleted(key)
        return {tag: given for tag, given in tags.items() if given > max(deleted, self.taken(key, tag))}

    def _last(self, notes: Iterable[Note]) -> float:
        return max((note.time for note in notes), default=self._before)


def when_deleted(tenants: Iterable[Notes]) -> Callable[[str], float]:
    """Tells of a key when any of these tenants has deleted its context, 0.0 if there is no note of that."""
    found = dict[str, float]()
    for notes in tenants:
        for key, time_ in notes.deletions.items():
            found[key] = max(time_, found.get(key, 0.0))
    return lambda key: found.get(_digest(key), 0.0)


def _digests(tag: str) -> set[str]:
    return set(map(_digest, parts(tag)))


def _digest(of: str) -> str:
    return digest(["forgotten", of])[:_DIGITS]
