"""The rows of a disk tier's index, each looked at before it is used: contexts, lists of them, what is in quarantine, totals, notes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

from kvzip_memory.registry.disk import layout
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.facts import OddFactError, check_row, is_bad, is_forgotten, is_id, is_size
from kvzip_memory.registry.disk.index import Index, IndexDamagedError
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.identity import EVERYONE, family_of

_CONTEXT, _GROUP, _BAD, _TOKENS, _BEGINNING, _PART = "context:", "group:", "bad:", "tokens:", "beginning:", "part:"
_UNCLEAN = "unclean"  # the row that free pages may still hold what was forgotten, until the index is written anew
_FORGOTTEN = "forgotten"  # the row of the notes of operators; those of a tenant have its digest behind it
_LOST = "lost:"  # the row of a context whose file was lost, until it is built again
_CATALOG = "catalog:"  # of a context whose file names tags that its row has not
_GROUP_SIZE = 32  # contexts of one text that are remembered as such
_BEGINNING_SIZE = 4096  # contexts that share all or more than half of their tokens and are found by them, the latest
_PART_SIZE = 1 << 16  # contexts that share the pairs of one


class Rows:
    """An index by what its rows say. What several of them say together is changed inside a :meth:`transaction`.

    Raises:
        IndexDamagedError: from any method, when a row is not one of ours.
        IndexUnavailableError: from any method, when the index cannot be used now.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._noted: dict[str, tuple[str, Notes]] = {}  # what was last read of each row of notes, which are many

    def transaction(self) -> AbstractContextManager[None]:
        """All changes inside, or none; other processes wait."""
        return self.index.transaction()

    def have_totals(self) -> bool:
        return self.index.get("totals") is not None

    def are_new(self) -> bool:
        """Whether nothing was ever written. Inside a :meth:`transaction`.

        Raises:
            IndexDamagedError: there are rows, but not that of the totals.
        """
        if self.have_totals():
            return False
        if next(self.index.keys(""), None) is not None:
            raise IndexDamagedError("the row of totals is missing")
        return True

    # -- contexts ------------------------------------------------------------------------------------------------

    def contexts(self, newest_first: bool = False) -> Iterator[str]:
        """Keys of stored contexts, in the order of their use."""
        return self.index.keys(_CONTEXT, newest_first)

    def has(self, key: str) -> bool:
        """Whether there is a row of a stored context, whatever it says."""
        return self.index.get(_CONTEXT + key) is not None

    def entry(self, key: str) -> Entry | None:
        """A stored context."""
        return self._entry(key, _CONTEXT)

    def change(self, entry: Entry) -> None:
        """Write the row of a stored context anew, in its place."""
        self.index.set(_CONTEXT + entry.key, vars(entry))

    def add(self, entry: Entry) -> None:
        """File a context, as the most recently used one. Its bytes are counted by who calls."""
        self.index.move_to_end(_CONTEXT + entry.key, vars(entry))
        self._list_add(_GROUP + entry.group, entry.key)
        family, tokens = family_of(entry.identity), entry.identity.get("tokens", "")
        self._list_add(f"{_TOKENS}{family}:{tokens}", entry.key, _BEGINNING_SIZE)
        if entry.beginning:
            self._list_add(f"{_BEGINNING}{family}:{entry.beginning}", f"{entry.n_tokens}:{tokens[:8]}", _BEGINNING_SIZE)
        for part in entry.parts:
            self._list_add(_PART + part, entry.key, _PART_SIZE)

    def remove(self, entry: Entry) -> None:
        """A context is no longer stored, and its bytes are free."""
        self.index.delete(_CONTEXT + entry.key)
        self.index.delete(_CATALOG + entry.key)
        self._list_remove(_GROUP + entry.group, entry.key)
        for part in entry.parts:
            self._list_remove(_PART + part, entry.key)
        family, tokens = family_of(entry.identity), entry.identity.get("tokens", "")
        if not self._list_remove(f"{_TOKENS}{family}:{tokens}", entry.key):
            self._list_remove(f"{_BEGINNING}{family}:{entry.beginning}", f"{entry.n_tokens}:{tokens[:8]}")
        self.count(-entry.file_nbytes)

    def drop(self, key: str) -> None:
        """Delete the row of a context that is stored no more, and nothing else."""
        self.index.delete(_CONTEXT + key)

    def group(self, group: str) -> list[str]:
        """Keys of contexts of one text and tenant."""
        return self._items(_GROUP + group)

    def sharing(self, key: str) -> list[str]:
        """Keys of the contexts that share the pairs of one."""
        return [sharing for sharing in self._items(_PART + key) if self.has(sharing)]

    def with_tokens(self, family: str, tokens: str) -> list[str]:
        """Keys of contexts of one model and tenant with exactly these tokens."""
        return self._items(f"{_TOKENS}{family}:{tokens}")

    def lengths(self, family: str, begun: Iterable[str]) -> set[tuple[int, str]]:
        """Tokens, and the start of their digest, of the contexts of one model and tenant that are filed under one of these beginnings."""
        pairs = (item.partition(":") for each in begun for item in self._items(f"{_BEGINNING}{family}:{each}"))
        return {(int(n), start) for n, _, start in pairs if n.isdecimal()}

    # -- contexts whose files were lost --------------------------------------------------------------------------

    def lost_keys(self) -> Iterator[str]:
        return self.index.keys(_LOST)

    def lost(self, key: str) -> Entry | None:
        """What was known of a context whose file was lost."""
        return self._entry(key, _LOST)

    def remember_lost(self, entry: Entry) -> None:
        self.index.set(_LOST + entry.key, vars(entry))

    def forget_lost(self, key: str) -> None:
        self.index.delete(_LOST + key)

    # -- contexts whose files name tags that they have no more ---------------------------------------------------

    def stale_catalogs(self) -> list[str]:
        """Keys of the contexts."""
        keys = [*self.index.keys(_CATALOG)]
        for key in keys:
            if not KEY.fullmatch(key):
                raise IndexDamagedError(f"row {_CATALOG + key!r} is not one of ours")
        return keys

    def set_stale(self, key: str, stale: bool) -> None:
        if stale:
            self.index.set(_CATALOG + key, {})
        else:
            self.index.delete(_CATALOG + key)

    # -- files in quarantine -------------------------------------------------------------------------------------

    def bad_names(self) -> list[str]:
        """Names of files in quarantine."""
        return [*self.index.keys(_BAD)]

    def bad(self, name: str) -> dict[str, Any] | None:
        """What is known of a file in quarantine; its name is one of ours."""
        row = self.index.get(_BAD + name)
        if row is not None and not (layout.is_called("quarantine", name) and row.get("file") == name and is_bad(row)):
            raise IndexDamagedError(f"row {_BAD + name!r} is not one of ours")
        return None if row is None else {"key": name[:64], "reason": "unknown", "time": 0.0, "tenant": EVERYONE, **row}

    def all_bad(self) -> list[dict[str, Any]]:
        return [row for name in self.bad_names() if (row := self.bad(name)) is not None]

    def set_bad(self, row: Mapping[str, Any]) -> None:
        self.index.set(_BAD + row["file"], row)

    def remove_bad(self, row: Mapping[str, Any]) -> None:
        """A file is no longer in quarantine, and its bytes are free."""
        self.index.delete(_BAD + row["file"])
        self.count(-row["nbytes"])

    # -- totals --------------------------------------------------------------------------------------------------

    def totals(self) -> tuple[int, dict[str, int]]:
        """Bytes of what is stored or in quarantine, and of each file being written. They are counted once whatever happens to a writer."""
        row = self.index.get("totals")
        if row is None:
            raise IndexDamagedError("the row of totals is missing")
        writing, usage = row.get("writing"), row.get("usage", -1)
        if not (isinstance(writing, dict) and all(map(KEY.fullmatch, writing)) and all(map(is_size, [usage, *writing.values()]))):
            raise IndexDamagedError("the row of totals is not one of ours")
        return usage - sum(writing.values()), writing

    def usage(self) -> int:
        """Bytes of all of them."""
        stored, writing = self.totals()
        return stored + sum(writing.values())

    def set_totals(self, stored: int, writing: Mapping[str, int]) -> None:
        self.index.set("totals", {"usage": max(stored, 0) + sum(writing.values()), "writing": dict(writing)})

    def count(self, nbytes: int) -> None:
        """So many bytes more are stored or in quarantine, or fewer."""
        stored, writing = self.totals()
        self.set_totals(stored + nbytes, writing)

    # -- notes of what was forgotten -----------------------------------------------------------------------------

    def notes(self, tenant: str | None) -> Notes:
        """What was forgotten, by any process, of a tenant's."""
        operators = self._notes(_FORGOTTEN)
        return operators if tenant == EVERYONE else self._notes(_notes_of(tenant)).under(operators)

    def note(self, tenant: str | None, key: str = "", tag: str = "", when: float | None = None, here: bool = True) -> None:
        """Note that a tenant has forgotten something, see :meth:`Notes.with_note`; of which there is something ``here``, or has been."""
        row = _notes_of(tenant)
        notes = self._notes(row).with_note(key, tag, when)
        self._noted[row] = self.index.set(row, notes.row), notes
        if here:
            self.set_unclean()

    def all_notes(self) -> dict[str, Notes]:
        """What was forgotten, by row, of all tenants, as far as it is sound."""
        found = dict[str, Notes]()
        for tenant in self.index.keys(_FORGOTTEN):
            with suppress(IndexDamagedError):
                found[_FORGOTTEN + tenant] = self._notes(_FORGOTTEN + tenant)
        return found

    def set_notes(self, notes: Mapping[str, Notes]) -> None:
        for row, told in notes.items():
            self.index.set(row, told.row)

    def unclean(self) -> Mapping[str, Any] | None:
        """What tells that the index is to be written anew, as something was forgotten since; None if it is not."""
        return self.index.get(_UNCLEAN)

    def set_unclean(self) -> None:
        self.index.set(_UNCLEAN, {"since": time.time_ns()})

    def set_clean(self) -> None:
        self.index.delete(_UNCLEAN)

    def _notes(self, row: str) -> Notes:
        if (text := self.index.text(row)) is None:
            return Notes(None)
        before, notes = self._noted.get(row, ("", Notes(None)))
        if text != before:
            found = self.index.parsed(row, text)
            if not is_forgotten(found):
                raise IndexDamagedError("the row of what was forgotten is not one of ours")
            notes = Notes(found)
            self._noted[row] = text, notes
        return notes

    # -- small things --------------------------------------------------------------------------------------------

    def _entry(self, key: str, prefix: str) -> Entry | None:
        """A context's row; its key becomes a file name, so it must look like one of ours."""
        row = self.index.get(prefix + key)
        if row is None:
            return None
        try:
            check_row(row)
            entry = Entry(**{**row, "tags": tuple(row["tags"]), "former": ()})
        except (OddFactError, TypeError):
            raise IndexDamagedError(f"row {key!r} has other fields than a context's") from None
        if entry.key != key or not KEY.fullmatch(key):
            raise IndexDamagedError(f"row {key!r} is not one of ours")
        return entry

    def _items(self, key: str) -> list[str]:
        row = self.index.get(key)
        items = [] if row is None else row.get("keys")
        if not isinstance(items, list) or not all(map(is_id, items)):
            raise IndexDamagedError(f"row {key!r} is no list of ours")
        return items

    def _list_add(self, key: str, item: str, size: int = _GROUP_SIZE) -> None:
        keys = self._items(key)
        if not keys or keys[-1] != item:
            self.index.set(key, {"keys": [*(k for k in keys if k != item), item][-size:]})

    def _list_remove(self, key: str, item: str) -> bool:
        """Whether the list has other items."""
        keys = [k for k in self._items(key) if k != item]
        if keys:
            self.index.set(key, {"keys": keys})
        else:
            self.index.delete(key)
        return bool(keys)


def _notes_of(tenant: str | None) -> str:
    """Each tenant has a row of its own: a note of one is never read for another, nor drives out another's."""
    return _FORGOTTEN if tenant == EVERYONE else f"{_FORGOTTEN}:{tenant or ''}"
