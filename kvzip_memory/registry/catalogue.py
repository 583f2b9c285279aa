"""What is stored, by names, keys and tags."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial

from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.disk.entry import Entry, latest
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.disk.names import Label
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.holders import MARKED, check_room, has_room
from kvzip_memory.registry.identity import EVERYONE, family_of
from kvzip_memory.registry.memory import Memory, as_entry
from kvzip_memory.registry.removed import outlived, tags_left
from kvzip_memory.registry.tier import Held
from kvzip_memory.registry.wanted import Wanted, check_text, not_stored
from kvzip_memory.registry.writing import Writing


class Catalogue:
    """Contexts of memory and disk together: listed, found, named, tagged and pinned. It owns nothing."""

    def __init__(self, memory: Memory, backing: Backing, writing: Writing) -> None:
        self._memory, self._backing, self._writing = memory, backing, writing

    def contexts(self, limit: int | None = None) -> list[Entry]:
        """What is stored, in memory or on disk, the most recently used first."""
        stored = self._backing.attempt("list", lambda disk: disk.entries(limit, self._backing.mine)) or []
        return self._merged(stored, self._memory.in_memory())[::-1][:limit]

    def find(self, reference: str) -> list[Entry]:
        """Those of a key or its beginning (8 digits at least), the last used last; else the context of a name, one for each model, the last
        loaded last. What was loaded under the name before is found by its key only. A whole key is never taken for a name.

        Raises:
            InputError: the reference is no text.
        """
        return self.looked_up(reference)[0]

    def looked_up(self, reference: str) -> tuple[list[Entry], dict[str, Label]]:
        """:meth:`find`, and by their keys what was told of contexts of that name, as of the same moment."""
        check_text(reference)
        labels = [] if KEY.fullmatch(reference) else self.labels(reference)
        found: list[Entry] = []
        if len(reference) >= 8:
            stored = self._backing.attempt("find", lambda disk: disk.starting_with(reference)) or []
            found = self._merged(stored, [h for h in self._memory.in_memory() if h.key.startswith(reference)])
        return found or self.labelled(labels), {label.key: label for label in labels}

    def labels(self, name: str) -> list[Label]:
        """What a name means, one label for each model, the last loaded last; also of contexts that are no longer stored."""
        names, tenant = self._backing.names, self._backing.tenant
        return names.everyones(name) if tenant == EVERYONE else names.of(tenant, name)

    def labelled(self, labels: Sequence[Label]) -> list[Entry]:
        """The contexts of names, in their order, as far as they are stored and have them still."""
        keys = [label.key for label in labels]
        stored = [entry for key in keys if (entry := self._backing.attempt("find", partial(DiskTier.entry, key=key))) is not None]
        return sorted(self._merged(stored, self._memory.in_memory(keys)), key=lambda entry: keys.index(entry.key))

    def _merged(self, stored: list[Entry], in_memory: list[Held]) -> list[Entry]:
        """Entries of the disk tier and of memory together, by their last use."""
        found, notes = {entry.key: entry for entry in stored}, self._backing.notes()
        there = self._without_deleted(in_memory, notes, found)
        with self._memory.changed:
            for held in dict.fromkeys([*self._memory.in_memory([*found]), *there]):
                entry = replace(as_entry(held), tags=tuple(sorted(tags_left(held, notes))))
                on_disk = found.get(held.key)
                if on_disk:  # which may not have been told of the last use yet
                    names, tags = latest(on_disk.names, entry.names), tuple(sorted({*on_disk.tags, *entry.tags}))
                    entry = replace(on_disk, names=names, tags=tags, used=max(entry.used, on_disk.used))
                found[held.key] = entry
        return sorted(map(self._backing.told, filter(self._backing.mine, found.values())), key=lambda entry: entry.used)

    def without_deleted(self, in_memory: Sequence[Held]) -> Sequence[Held]:
        """Contexts in memory but those that were deleted, here or by another process, and not stored again."""
        return self._without_deleted(in_memory, self._backing.notes()) if in_memory else in_memory

    def _without_deleted(self, in_memory: Sequence[Held], notes: Notes, stored: Collection[str] = ()) -> list[Held]:
        """The same; of some it is known that they are stored."""
        is_removed, has = self._writing.is_removed, self._backing.has
        return [held for held in in_memory if held.key in stored or not is_removed(held, notes) or has(held.key)]

    def one(self, reference: str) -> Entry:
        """The latest context of a name or key.

        Raises:
            InputError: nothing is stored under it.
        """
        found = self.find(reference)
        if not found:
            raise not_stored(reference)
        return found[-1]

    def sharing(self, key: str) -> list[Entry]:
        """The contexts that share the pairs of one."""
        stored = self._backing.attempt("find", lambda disk: disk.sharing(key)) or []
        return self._merged(stored, [held for held in self._memory.in_memory() if key in held.parts])

    def tiers(self, key: str) -> list[str]:
        """The tiers a context is in."""
        with self._memory.changed:
            found = [tier.name for tier in self._memory.tiers if key in tier.held]
        return [*found, *(["disk"] if self._backing.attempt("find", lambda disk: disk.holds(key)) else [])]

    def with_room(self, wanted: Wanted) -> Wanted:
        """What is asked for, if the context can get its name and tags beside those it has; marks of conversations that it has no room for
        are left out, as many others hold it then.

        Raises:
            InputError: too many, see :func:`~kvzip_memory.registry.holders.check_room`.
        """
        if wanted.name is None and not wanted.tags:
            return wanted
        here = self._memory.in_memory([wanted.key])
        if here:
            known: Entry | None = replace(as_entry(here[0]), tags=tuple(tags_left(here[0], self._backing.notes())))
        else:
            known = self._backing.attempt("read", lambda disk: disk.entry(wanted.key))
        if known is None:
            return wanted
        if wanted.name is not None and not has_room(known.names, [wanted.name]):  # others may have some of these names now
            check_room("names", self._backing.told(known).names, [wanted.name], "load it without one, or take some away (kvzip-memory rm)")
        if MARKED in wanted.tags and not has_room(known.tags, wanted.tags):
            return replace(wanted, tags=(MARKED,))
        check_room("tags", known.tags, wanted.tags, "load it without, or forget some (engine.forget)")
        return wanted

    def annotate(self, held: Held, wanted: Wanted) -> None:
        """Give a context the name and tags it was asked for by, beside those it has."""
        if wanted.loaded is not None and wanted.loaded <= held.loaded:  # an answer
            return
        notes, key = self._backing.notes(), held.key
        is_stored, after = self._backing.has(key), notes.after(key, wanted.tags)
        if wanted.loaded is not None:  # by who has loaded it later than whoever brought it here
            with self._memory.changed:
                outlived(held, notes, is_stored)
                held.loaded = max(held.loaded, wanted.loaded)
            return
        names, label = {}, None
        if wanted.name is not None:
            told = tuple((source.name, deepcopy(source.metadata)) for source in wanted.sources)  # the handle has the others
            identity = wanted.identity
            given = Label(wanted.name, identity.get("tenant"), family_of(identity), key, sources=told)
            label = self._backing.names.give(given, after)
            names = {label.name: label.loaded}
        with self._memory.changed:
            outlived(held, notes, is_stored)
            held.loaded = max(time.time(), after)
            tags = dict.fromkeys(wanted.tags, held.loaded)
            held.tags |= tags
            held.names = held.names | names
        self._writing.touch_behind(key, names, tags, label)

    def join(self, key: str, tags: Sequence[str]) -> None:
        """Hold a context by further tags, if it has any and has room for more. One without is whoever's has loaded it, and not to be
        forgotten by one that has found it."""
        if not tags:
            return
        notes = self._backing.notes()
        with self._memory.changed:
            here = self._memory.here(key)
            known = {tag for held in here for tag in tags_left(held, notes)}
        if not known and (entry := self._backing.attempt("read", lambda disk: disk.entry(key))) is not None:
            known = {*entry.tags}
        if not known or not has_room(known, tags):
            return
        given = dict.fromkeys(tags, notes.after(key, tags, time.time()))
        with self._memory.changed:
            for held in here:
                held.tags |= given
        self._writing.touch_behind(key, tags=given)

    def pin(self, reference: str, pinned: bool = True) -> Entry:
        """Never lose a context: it may move down to disk, not out of it. Without a disk tier it stays in memory.

        Raises:
            InputError: nothing is stored under the reference.
            StorageError: the disk tier cannot note it now; nothing was changed.
        """
        tier = self._backing.usable()
        self._writing.flush()
        entry = self.one(reference)

        def change(held: Held) -> None:
            held.pinned = pinned

        with self._changing(entry.key, change):
            if tier is not None:
                tier.pin(entry.key, pinned)
        return replace(entry, pinned=pinned)

    @contextmanager
    def _changing(self, key: str, change: Callable[[Held], object]) -> Iterator[None]:
        """Change a context in memory, before the block does so on disk, for it may just be being written; if that fails it is as it was."""
        with self._memory.changed:
            before = [(held, held.pinned, dict(held.tags)) for held in self._memory.here(key)]
            for held, *_ in before:
                change(held)
        try:
            yield
        except BaseException:
            for held, pinned, tags in before:
                held.pinned, held.tags = pinned, tags
            raise

    def untag(self, key: str, tag: str) -> None:
        """Take a tag from a context.

        Raises:
            StorageError: the disk tier cannot note it now; nothing was changed.
        """
        tier = self._backing.usable()
        self._writing.flush()
        with self._changing(key, lambda held: held.tags.pop(tag, None)):
            if tier is not None:
                tier.untag(key, tag)
