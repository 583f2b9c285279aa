"""Contexts that are deleted: removed, left behind, forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from kvzip_memory.errors import InputError
from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.catalogue import Catalogue
from kvzip_memory.registry.cleaning import Cleaning
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.disk.names import Label
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.holders import LetGo, Naming, is_held, without
from kvzip_memory.registry.identity import family_of
from kvzip_memory.registry.memory import Memory, as_entry
from kvzip_memory.registry.removed import tags_left
from kvzip_memory.registry.tier import Held
from kvzip_memory.registry.writing import Writing
from kvzip_memory.system.private import usable

_SHOWN = 5  # names of contexts in an error


@dataclass(frozen=True)
class Forgotten:
    """What :meth:`ContextRegistry.forget` has done: contexts that were deleted, also those that shared the pairs of one of them, and those
    that others hold; as they were."""

    deleted: tuple[Entry, ...]
    kept: tuple[Entry, ...]


class Forgetting:
    """Deletes contexts from every tier. It owns nothing: what was removed is noted in memory, and on disk for other processes.

    Args:
        forgets: called where contexts were deleted: who remembers something of their texts forgets it.
    """

    def __init__(
        self,
        memory: Memory,
        backing: Backing,
        writing: Writing,
        catalogue: Catalogue,
        cleaning: Cleaning,
        forgets: Callable[[], object] = lambda: None,
    ) -> None:
        self._memory, self._backing, self._writing, self._catalogue = memory, backing, writing, catalogue
        self._cleaning, self._forgets = cleaning, forgets

    def is_removed(self, key: str, loaded: float | None = None, parts: Iterable[str] = ()) -> bool:
        """See :meth:`~kvzip_memory.registry.registry.ContextRegistry.is_removed`."""
        if key in self._memory.removed and "disk" in self._catalogue.tiers(key):
            self._memory.readmit(key)
        if loaded is None:
            return key in self._memory.removed
        notes = self._backing.notes()
        if key in self._memory.removed:
            return True
        with self._memory.changed:
            here = self._memory.here(key)
        deleted = max(notes.noted(each) for each in (key, *parts))
        gone = deleted >= loaded or any(self._writing.is_removed(held, notes) for held in here)
        again = any(held.loaded > deleted and not self._writing.is_removed(held, notes) for held in here)
        return gone and not again and not self._backing.has(key)

    def remove(self, reference: str) -> Entry:
        """Delete a context, see :meth:`~kvzip_memory.registry.registry.ContextRegistry.remove`."""
        self._writing.flush()
        tier = self._backing.changeable()
        try:
            entry = self._catalogue.one(reference)
        except InputError:
            for label in self._catalogue.labels(reference):
                self._backing.names.take(label)
            if (gone := self._remove_rest(tier, reference)) is not None:
                return gone
            raise
        names = {name: time for name, time in entry.names.items() if name != reference}
        if names and reference in entry.names:
            self._unname(tier, entry, reference)
            return replace(entry, names=names)
        if sharing := self._catalogue.sharing(entry.key):
            shown = ", ".join(other.name or other.key[:12] for other in sharing[-_SHOWN:][::-1])
            more = f" and {len(sharing) - _SHOWN:,} others" if len(sharing) > _SHOWN else ""
            raise InputError(
                f"the pairs of context {entry.name or entry.key[:12]!r} are shared by {shown}{more}; delete those before. Or forget it by "
                "a tag: when nothing else holds it, no name either, it goes with all that share it"
            )
        labels = [label for name in entry.names for label in self._labels(entry, name)]
        try:
            with self._deleting(entry.key, bare=True) as began:
                if tier is not None:  # later than what was given before, though by whom whose clock is ahead
                    tier.remove(entry.key, max(began, entry.heard))
            for label in labels:
                self._backing.names.take(label)
        finally:
            self._cleaning.later()
        self._forgets()
        self._remove_fronts([entry])
        return replace(entry, names={})

    def _remove_rest(self, tier: DiskTier | None, key: str) -> Entry | None:
        """Delete what is left of a context whose file is gone; None if nothing is."""
        if tier is None or not KEY.fullmatch(key) or tier.known(key) is None:
            return None
        try:
            gone = tier.remove(key, time.time())
        finally:
            self._cleaning.later()
        return None if gone is None else replace(gone, names={})

    def _unname(self, tier: DiskTier | None, entry: Entry, name: str) -> None:
        key = entry.key
        if tier is not None:
            tier.unname(key, name)
        for label in self._labels(entry, name):
            self._backing.names.take(label)
        with self._memory.changed:
            for held in self._memory.here(key):
                held.names = {other: time for other, time in held.names.items() if other != name}
        self._cleaning.later()

    def _labels(self, entry: Entry, name: str) -> list[Label]:
        """A name as it means a context now; none if it does not."""
        of = entry.key, family_of(entry.identity)
        return [label for label in self._backing.names.of(entry.tenant, name) if (label.key, label.family) == of]

    @contextmanager
    def _deleting(self, key: str, bare: bool = False) -> Iterator[float]:
        """Drop a context from memory when the block has deleted it on disk; whoever loads it from the block's beginning on has it stored.

        When the block fails the context stays, and what it has deleted is written again.

        Args:
            bare: what it was given until now goes with it, and comes back when the block fails; whoever loads it gives it anew.

        Yields:
            When that began: what is loaded or given later is not deleted.
        """
        with self._memory.changed:
            began = time.time()
            self._memory.removed.add([key])
            had = [(held, held.names, held.tags, held.pinned) for held in self._memory.here(key)] if bare else []
            for held, *_ in had:
                held.names, held.tags, held.pinned = {}, {}, False
        try:
            yield began
        except BaseException:
            with self._memory.changed:
                for held, names, tags, pinned in had:
                    held.names, held.tags, held.pinned = {**names, **held.names}, {**tags, **held.tags}, pinned or held.pinned
            self._memory.readmit(key)
            self._writing.write_again(key)
            raise
        with self._memory.changed:
            if bare and key in self._memory.removed:
                self._writing.untell(key)
            for held in self._memory.here(key) if key in self._memory.removed else ():
                if not held.users:
                    self._memory.drop(held)
            self._memory.changed.notify_all()
            is_loaded = key not in self._memory.removed
        if is_loaded:
            self._writing.write_again(key)

    def collect(self, old: bool) -> dict[str, int]:
        """Delete from disk what has expired and what is left over, see :meth:`~kvzip_memory.registry.registry.ContextRegistry.gc`."""
        if (tier := self._backing.changeable()) is None:
            return {}
        try:
            with usable(tier.folder.root):
                return tier.gc(old)
        finally:
            self._forgets()

    def leave(self, key: str, tags: Collection[str]) -> bool:
        """Take tags from a context, and delete it if nobody else holds it, by a name, a pin or another tag; whether it was deleted.

        Raises:
            StorageError: another process holds the index of the folder; nothing was deleted.
            OSError: its file cannot be deleted.
        """

        def let_go(key: str, tag: str) -> bool:
            return tag in tags

        tier = self._backing.usable()
        self._writing.flush()
        notes = self._backing.notes()
        with self._memory.changed:
            here = self._memory.in_memory([key])
            rest = [tags_left(held, notes).keys() - set(tags) for held in here]
            stays = any(key in held.parts for held in self._memory.in_memory()) or any(
                is_held(self._backing.told(as_entry(h)).names, h.pinned, left) for h, left in zip(here, rest, strict=True)
            )
        self._writing.untell(key, tags)
        with self._deleting(key):
            deleted = not stays if tier is None else tier.let_go(key, let_go, stays)
            with self._memory.changed:
                for held in here:
                    held.tags = {tag: given for tag, given in held.tags.items() if tag not in tags}
            if not deleted:
                self._memory.readmit(key)
        self._forgets()
        return deleted

    def forget(self, let_go: LetGo) -> Forgotten:
        """Take the tags that are let go of from all contexts, and delete those that nobody else holds, by a name, a pin or another tag.

        Of these neither text, ids nor pairs are left in the folder or, once answers from them have ended, in memory. A process that has
        one in its memory answers from it until it leaves that, and does not write it again.

        Raises:
            StorageError: as for :meth:`check_changeable`; nothing was deleted.
            OSError: a file cannot be deleted; those before it were.
        """
        self._writing.flush()
        disk = self._backing.changeable()
        named, notes = {label.key for label in self._backing.names.all()}, self._backing.notes()  # of what others have forgotten
        deleted, kept = disk.forget(let_go, self._backing.mine, named) if disk is not None else ([], [])
        here_alone = dict[str, set[str]]()  # by key the tags of what is deleted that is on disk no more
        gone, stays = {entry.key: entry for entry in deleted}, {entry.key: entry for entry in kept}
        memory, again = self._memory, list[Held]()
        with memory.changed:
            memory.changed.wait_for(lambda: not gone.keys() & memory.flights.keys(), memory.wait_s)  # on the way to another tier
            for held in sorted((held for tier in memory.tiers for held in tier.held.values()), key=lambda held: len(held.parts)):
                entry = as_entry(held)
                if held.parts & gone.keys():
                    gone.setdefault(held.key, entry)
                    stays.pop(held.key, None)
                    continue
                left = tags_left(held, notes)
                rest = without(tuple(left), held.key, let_go)
                if not self._backing.mine(entry) or (len(rest) == len(left) and held.key not in gone):
                    continue
                held.tags = {tag: left[tag] for tag in rest}
                if held.key in named or is_held(self._backing.told(entry).names, held.pinned and held.key not in gone, held.tags):
                    if gone.pop(held.key, None) is not None:  # somebody has got it in memory, while its file was being deleted
                        again.append(held)
                    stays[held.key] = entry
                elif held.key not in stays:  # only in memory
                    gone[held.key] = entry
                    here_alone.setdefault(held.key, set()).update(left.keys() - set(rest))
            for held in [held for tier in memory.tiers for held in tier.held.values() if held.key in gone]:
                if not held.users:
                    memory.drop(held)
            memory.removed.add(gone)
            self._writing.unstored -= gone.keys()
            memory.changed.notify_all()
        for held in again:
            held.stored = None
            self._writing.write_behind(held)
        self._writing.flush()
        if disk is not None:  # what was being written meanwhile
            disk.forget_again(gone, let_go)
            if here_alone and not isinstance(let_go, Naming):  # that is noted of all contexts
                disk.note_taken(here_alone)
        labels = [label for entry in gone.values() for name in entry.names for label in self._labels(entry, name)]
        for label in labels:  # of what went along
            self._backing.names.take(label)
        if labels:
            self._cleaning.later()
        self._forgets()
        return Forgotten((*gone.values(), *self._remove_fronts(gone.values())), tuple(stays.values()))

    def _remove_fronts(self, deleted: Iterable[Entry]) -> list[Entry]:
        """Delete what deleted contexts were read behind and no others: the template's head, with its system prompt, and a preamble."""
        fronts = [key for entry in deleted if "shift" in entry.identity for key in (entry.identity["parent"], *entry.parts)]
        if not fronts:
            return []
        there = {entry.key: entry for entry in self._catalogue.contexts()}
        used = {key for entry in there.values() for key in (*entry.parts, entry.identity.get("parent"))}
        removed = []
        for entry in [there[key] for key in dict.fromkeys(fronts) if key in there and key not in used]:
            if not (entry.names or entry.tags or entry.pinned):
                with suppress(InputError):  # somebody has loaded another text behind it meanwhile
                    removed.append(self.remove(entry.key))
        return removed
