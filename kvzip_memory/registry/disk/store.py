"""The disk tier: one safetensors file a context under a hard budget, and an index beside them.

A context is served from its blob alone, found by its key; the index only decides what is evicted and what is listed.
So nothing wrong can come out of a damaged index.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kvzip_memory.context import CompressedContext, RaggedLayer, States
from kvzip_memory.errors import CorruptFileError
from kvzip_memory.registry.beginnings import beginning
from kvzip_memory.registry.disk import layout
from kvzip_memory.registry.disk.builders import Builders
from kvzip_memory.registry.disk.entry import Entry, entry_of, is_past, latest
from kvzip_memory.registry.disk.files import PreparedFile, UnreadableHereError, read_context
from kvzip_memory.registry.disk.folder import Folder
from kvzip_memory.registry.disk.index import IndexUnavailableError
from kvzip_memory.registry.disk.keeper import Keeper, needs_index
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.disk.leaving import Leaving
from kvzip_memory.registry.disk.names import Label, Names
from kvzip_memory.registry.disk.putting import Putting
from kvzip_memory.registry.disk.tidying import Tidying
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.holders import LetGo
from kvzip_memory.registry.identity import EVERYONE, is_whose
from kvzip_memory.system.checksums import PLAIN, Checksums
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.private import is_file

logger = logger_of(__name__)

#: Looks at layers that were read from a path, and raises a CorruptFileError.
CheckLayers = Callable[[Sequence[RaggedLayer], States, str], None]


class NotStoredError(Exception):
    """No usable context of this key on disk; says why."""


class AbsentError(NotStoredError):
    """There is none of this key, usable or not."""

    def __init__(self) -> None:
        super().__init__("not stored")


class DiskTier:
    """Contexts in a folder that any number of processes share.

    Args:
        root: the folder.
        budget: bytes that blobs, files being written and quarantined files may take together; None for no limit. The
            index itself (about 2 kB a context) is not counted.
        tenant: digest of whose contexts are read, listed and changed; room is made by those of all.
        checksums: with a secret, nothing is used that was not written with it; the folder may then be one that others can write.
        check: looks at the layers of a context that was asked for, and raises a CorruptFileError if they are none of the model's.

    Raises:
        OSError: the folder cannot be made.
        StorageError: it is of a newer version or has another secret, others can write it, or something else is where a folder or file of
            ours belongs.
    """

    def __init__(
        self,
        root: Path,
        budget: int | None = None,
        tenant: str | None = EVERYONE,
        checksums: Checksums = PLAIN,
        check: CheckLayers | None = None,
    ) -> None:
        self.folder = Folder(root, tenant, checksums)
        self.names = Names(root, self.folder.read_only is not None, checksums)
        self._tidying = Tidying(self.folder, budget)
        self.builders = Builders(self.folder)
        self._keeper = Keeper(self.folder, self._tidying, self.names)
        self._leaving = Leaving(self.folder, self._keeper, self._tidying, self.names, self.builders)
        self._putting = Putting(self.folder, self._keeper, self._tidying)
        self._check = check
        if self.read_only is not None:
            logger.warning("%s: the contexts in it are used, and none is stored or changed", self.read_only)
            return
        with suppress(IndexUnavailableError):  # what is stored can be read without it
            self._tidy()

    @property
    def root(self) -> Path:
        return self.folder.root

    @property
    def read_only(self) -> str | None:
        """Why nothing can be stored or changed in the folder; None if it can."""
        return self.folder.read_only

    @property
    def budget(self) -> int | None:
        return self._tidying.budget

    @property
    def quarantined(self) -> int:
        """Files that this process has taken out of use."""
        return self._tidying.quarantined

    @property
    def made_anew(self) -> bool:
        """Whether this process has found the index damaged."""
        return self._keeper.made_anew

    @property
    def is_held(self) -> bool:
        """Whether another process held the index when it was last used."""
        return self._keeper.is_held

    @needs_index
    def _tidy(self) -> None:
        """What killed processes have left, when a folder is opened."""
        self._keeper.tidy()
        self._leaving.tidy()

    # -- contexts ------------------------------------------------------------------------------------------------

    def get(
        self, key: str, device: torch.device, admit: Callable[[int], None] | None = None, ttl: float | None = None
    ) -> CompressedContext:
        """The context stored under ``key``, every byte of it checked.

        Args:
            admit: told the bytes it will take in memory before they are read.
            ttl: seconds since its text was read after which it is not wanted; None for any age.

        Raises:
            NotStoredError: there is none, or it cannot be used; a damaged one is in quarantine then.
        """

        def checked(facts: Mapping[str, Any]) -> None:
            if is_past(facts["created"], facts["expires"]):
                with suppress(OSError):
                    self._leaving.remove(key, expired=True)
                raise NotStoredError("expired")
            if is_past(facts["created"], None, ttl):
                raise NotStoredError(f"expired: its text was read more than ttl={ttl:g} s ago")
            if admit is not None:
                admit(facts["nbytes"])

        return self._read(key, device, checked, self._check)

    def _read(
        self, key: str, device: torch.device, admit: Callable[[Mapping[str, Any]], None] | None = None, check: CheckLayers | None = None
    ) -> CompressedContext:
        def checked(facts: Mapping[str, Any]) -> None:
            if not is_whose(facts["identity"], self.folder.tenant):
                raise AbsentError()
            if admit is not None:
                admit(facts)

        path = self.folder.path(key)
        if not self.folder.inside(path):
            raise NotStoredError(f"{path.parent} is no folder of ours; what it leads to is not read")
        if os.path.lexists(path) and not is_file(path):
            kind = "a symbolic link" if path.is_symlink() else "no file"
            raise NotStoredError(f"{path} is {kind}, where a file of ours belongs; it is left alone")
        try:
            context = read_context(path, device, follow_links=False, admit=checked, checksums=self.folder.checksums)
            if context.key != key:
                raise CorruptFileError(f"{path}: holds the context {context.key[:12]}")
            if check is not None:
                check(context.layers, context.states, str(path))
        except FileNotFoundError:
            raise AbsentError() from None
        except OSError as error:
            logger.warning("cannot read stored context %s: %s", key[:12], error)
            raise NotStoredError(f"stored file unreadable: {error}") from None
        except CorruptFileError as error:
            if not isinstance(error, UnreadableHereError):
                self._quarantine(key, str(error))
            raise NotStoredError(f"stored file unusable: {error}") from None
        return context

    def put(
        self,
        context: CompressedContext,
        group: str,
        *,
        names: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        pinned: bool = False,
        locked: bool = True,
    ) -> None:
        """Store a context that holds its pairs itself. The caller holds its lock, see :class:`Builders`, if that is ``locked``.

        Raises:
            BudgetError, OSError: it cannot be written, see :meth:`Putting.put`; nothing has changed.
        """
        self.folder.check_writable()
        given = dict(names or {}), tuple(tags)
        prepared = PreparedFile(context, {"group": group, "names": given[0], "tags": list(given[1])}, self.folder.checksums)
        entry = replace(
            entry_of(context, group, *given, pinned),
            file_nbytes=prepared.nbytes,
            used=time.time(),
            beginning=beginning(context.token_ids.numpy()),
        )
        self._putting.put(prepared, entry, locked)

    def _quarantine(self, key: str, reason: str) -> None:
        """Take a file out of use and remember why. In a folder that cannot be written it stays, and is refused again."""
        try:
            moved = self._keeper.set_aside(key, reason)
        except IndexUnavailableError:
            return
        if not moved:
            logger.debug("%s; another process has moved it", reason)

    def has(self, key: str) -> bool:
        """Whether a context's file is there."""
        return self.folder.has(key)

    def holds(self, key: str) -> bool:
        """:meth:`has`, of a context of the tenant's."""
        if not (there := self.folder.has(key)) or self.folder.tenant == EVERYONE:
            return there
        entry = self.folder.entry_of_file(self.folder.path(key))
        return entry is not None and self.folder.is_mine(entry)

    def verify(self, key: str) -> str | None:
        """Check every byte of a stored context: None if it is sound, else what is wrong; a damaged one is in quarantine then."""
        try:
            parts = self._read(key, torch.device("cpu")).parts
        except NotStoredError as error:
            return str(error)
        lost = [part.key[:12] for part in parts if not self.has(part.key)]
        return f"what it shares is not stored: {', '.join(lost)}; load the texts of these again" if lost else None

    @needs_index
    def entry(self, key: str) -> Entry | None:
        """The row of a context of the tenant's."""
        entry = self._keeper.opened().entry(key)
        return entry if entry is not None and self.folder.is_mine(entry) else None

    @needs_index
    def entries(self, limit: int | None = None, wanted: Callable[[Entry], bool] = lambda entry: True) -> list[Entry]:
        """Stored contexts, the most recently used first."""
        rows = self._keeper.opened()
        keys = reversed([*rows.contexts()]) if limit is None else rows.contexts(newest_first=True)
        found = (entry for key in keys if (entry := self.entry(key)) is not None and wanted(entry))
        return list(islice(found, limit))

    @needs_index
    def group(self, group: str) -> list[Entry]:
        """Stored contexts of one text and tenant."""
        return self._listed(self._keeper.opened().group(group))

    @needs_index
    def lengths(self, family: str, begun: Iterable[str]) -> set[tuple[int, str]]:
        """Tokens, and the start of their digest, of the contexts of one model and tenant that are filed under one of these beginnings."""
        return self._keeper.opened().lengths(family, begun)

    @needs_index
    def with_tokens(self, family: str, tokens: str) -> list[Entry]:
        """Stored contexts of exactly these tokens."""
        return self._listed(self._keeper.opened().with_tokens(family, tokens))

    def _listed(self, keys: Iterable[str]) -> list[Entry]:
        return [entry for key in keys if (entry := self.entry(key)) is not None]

    def sharing(self, key: str) -> list[Entry]:
        """Stored contexts that share the pairs of one."""
        return self._leaving.sharing(key)

    @needs_index
    def starting_with(self, prefix: str) -> list[Entry]:
        """Stored contexts whose key starts with ``prefix``."""
        if KEY.fullmatch(prefix):
            return [entry] if (entry := self.entry(prefix)) is not None else []
        if not re.fullmatch("[0-9a-f]+", prefix):
            return []
        keys = sorted(path.stem for path in layout.blobs(self.folder.root, prefix[:2]) if path.name.startswith(prefix))
        return self._listed(keys)

    @needs_index
    def notes(self) -> Notes:
        """What was forgotten, by any process, of the tenant's."""
        return self._keeper.opened().notes(self.folder.tenant)

    @needs_index
    def quarantine(self) -> list[dict[str, Any]]:
        """What was taken out of use: key, file, nbytes, reason, time, tenant. Of what it is not known whose it was operators hear alone."""
        return [row for row in self._keeper.opened().all_bad() if is_whose(row, self.folder.tenant)]

    @needs_index
    def usage(self) -> int:
        """Bytes of blobs, files being written and quarantined files, as counted."""
        return self._keeper.opened().usage()

    def is_empty(self) -> bool:
        return next(self.folder.blobs(), None) is None

    def count(self) -> int:
        return sum(1 for _ in self.folder.blobs())

    def measured(self) -> int:  # of :meth:`usage`, from the files
        return self.folder.measured()

    # -- changes -------------------------------------------------------------------------------------------------

    @needs_index
    def touch(self, key: str, *, names: Mapping[str, float] | None = None, tags: Iterable[str] = ()) -> None:
        """Make a context the most recently used one; give it names or tags. A file without a row gets one."""
        rows = self._keeper.opened()
        with rows.transaction():
            entry = rows.entry(key)
            if entry is None:
                if (entry := self.folder.entry_of_file(self.folder.path(key))) is None or not self.folder.is_mine(entry):
                    return
                stored, writing = rows.totals()
                usage = stored + sum(writing.values())
                if key in writing or (self.budget is not None and usage + entry.file_nbytes > self.budget):
                    return
                rows.set_totals(stored + entry.file_nbytes, writing)
            elif not self.folder.is_mine(entry):
                return
            elif not entry.beginning and (read := self.folder.entry_of_file(self.folder.path(key))) is not None:
                entry = replace(entry, beginning=read.beginning)
            tags = tuple(sorted({*entry.tags, *tags}))
            rows.add(replace(entry, used=time.time(), names=latest(entry.names, names or {}), tags=tags))

    def pin(self, key: str, pinned: bool) -> None:
        self._change(key, lambda entry: replace(entry, pinned=pinned))

    def untag(self, key: str, tag: str) -> None:
        self._change(key, lambda entry: replace(entry, tags=tuple(other for other in entry.tags if other != tag)), tag)

    def unname(self, key: str, name: str) -> None:
        self._change(key, lambda entry: replace(entry, names={n: when for n, when in entry.names.items() if n != name}), in_file=True)

    @needs_index
    def _change(self, key: str, change: Callable[[Entry], Entry], forgotten: str = "", in_file: bool = False) -> None:
        """Change a context's row, later its file's catalog, or the row of one that was lost; and note the tag that is forgotten by that."""
        self.folder.check_writable()
        rows = self._keeper.opened()
        with rows.transaction():
            if (entry := rows.entry(key)) is not None and self.folder.is_mine(entry):
                rows.change(change(entry))
                if in_file:
                    rows.set_stale(key, True)
                    rows.set_unclean()
                    self._tidying.drop_bad(rows, lambda bad: time.time() if bad == key else 0.0)
            if (lost := rows.lost(key)) is not None and self.folder.is_mine(lost):
                rows.remember_lost(change(lost))
            if forgotten:
                rows.note(self.folder.tenant, key, forgotten)

    def remove(self, key: str, for_good: float | None = None) -> Entry | None:
        """Delete a context, see :meth:`Leaving.remove`."""
        return self._leaving.remove(key, for_good)

    def known(self, key: str) -> Entry | None:
        """What is known of a context, see :meth:`Leaving.known`."""
        return self._leaving.known(key)

    def name(self, label: Label) -> None:
        """Write down a name that was given, see :meth:`Leaving.name`."""
        self._leaving.name(label)

    def clean(self) -> bool:
        """Delete what is left of contexts that were deleted, see :meth:`Leaving.clean`."""
        return self._leaving.clean()

    def forget(self, let_go: LetGo, mine: Callable[[Entry], bool], named: Collection[str] = ()) -> tuple[list[Entry], list[Entry]]:
        """Take tags from contexts, and delete those that nobody holds then. Nothing of these stays in the folder: the quarantine is
        emptied, the index is written anew, and so is the header of a file that stays.

        Args:
            let_go: which tags of which contexts.
            mine: whose contexts may be changed.
            named: keys that names mean, whatever their rows say.

        Returns:
            What was deleted, and what has lost a tag and stays; as they were.

        Raises:
            IndexUnavailableError: the index cannot be changed now.
            StorageError: something in the quarantine cannot be deleted; nothing else was, either.
        """
        return self._leaving.forget(let_go, mine, named)

    def let_go(self, key: str, let_go: LetGo, stays: bool = False) -> bool:
        """Take tags from a context, and delete it if nobody else holds it, here or where it ``stays``; whether it is gone."""
        return self._leaving.let_go(key, let_go, stays)

    def forget_again(self, keys: Iterable[str], let_go: LetGo) -> None:
        """Delete those of the contexts that were stored since and that nobody else holds."""
        for key in keys:
            if self.folder.has(key):
                self._leaving.let_go(key, let_go, for_good=True)

    def note_taken(self, tags: Mapping[str, Collection[str]]) -> None:
        """Note, for others who have them in memory, which tags were taken from contexts that are not on disk."""
        self._leaving.note_taken(tags)

    def gc(self, old: bool = False) -> dict[str, int]:
        """Delete expired contexts, what dead writers left, quarantined files, and whatever has no row; count exactly.

        Args:
            old: delete also what older versions have stored, unless it is pinned.

        Returns:
            How many of each were deleted, and the bytes freed.
        """
        before = self.folder.measured()
        self._keeper.collect_dead_writers()
        found = {"expired": 0, **({"old": 0} if old else {}), "quarantined": 0, "orphaned": 0}
        for entry in self.entries():
            if entry.expired:
                found["expired"] += self.remove(entry.key) is not None
            elif old and entry.other_version == "older" and not entry.pinned:
                found["old"] += self.remove(entry.key) is not None
        found["orphaned"] = self._keeper.reconcile()
        found["quarantined"] = self._keeper.empty_quarantine()
        with suppress(OSError):  # others are writing
            self.names.gc(self.folder.has)
        return {**found, "bytes": before - self.folder.measured()}

    def check_free(self) -> None:
        """Raises:
        IndexUnavailableError: another process held the index when it was last used, and holds it still.
        """
        self._keeper.check_free()

    def check_changeable(self) -> None:
        """Raises:
        IndexUnavailableError: the index cannot be changed now; a process that holds it is waited for a second.
        """
        self._keeper.check_changeable()

    def close(self) -> None:
        self._keeper.close()
