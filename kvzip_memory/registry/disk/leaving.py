"""Tags taken from stored contexts, and contexts deleted that nobody holds then."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace

from filelock import Timeout

from kvzip_memory.errors import CorruptFileError
from kvzip_memory.registry.disk.builders import Builders
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.files import copy_with_catalog, replace_with
from kvzip_memory.registry.disk.folder import Folder
from kvzip_memory.registry.disk.index import IndexUnavailableError
from kvzip_memory.registry.disk.keeper import Keeper, needs_index
from kvzip_memory.registry.disk.names import Label, Names
from kvzip_memory.registry.disk.rows import Rows
from kvzip_memory.registry.disk.tidying import Tidying
from kvzip_memory.registry.holders import LetGo, Naming, is_held, without
from kvzip_memory.registry.identity import family_of
from kvzip_memory.system.locks import QUIET_S, held
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.private import delete, usable

logger = logger_of(__name__)


class Leaving:
    """Lets go of contexts, and of every word that the folder has of who held them. It owns nothing."""

    def __init__(self, folder: Folder, keeper: Keeper, tidying: Tidying, names: Names, builders: Builders) -> None:
        self._folder, self._keeper, self._tidying, self._names = folder, keeper, tidying, names
        self._builders = builders

    def forget(self, let_go: LetGo, mine: Callable[[Entry], bool], named: Collection[str]) -> tuple[list[Entry], list[Entry]]:
        """Let go of contexts, see :meth:`~kvzip_memory.registry.disk.store.DiskTier.forget`."""
        self._folder.check_writable()
        with usable(self._folder.root / "quarantine"):
            self._keeper.empty_quarantine()
        if isinstance(let_go, Naming):
            self._note_all(let_go.tag.strip())
        self._keeper.tidy()  # a whole file without a row gets one, by which it is found
        changed = [entry for entry in self._entries(mine) if without(entry.tags, entry.key, let_go) != entry.tags]
        gone = dict[str, Entry]()
        for entry in changed:
            sharing = self.sharing(entry.key)
            if self.let_go(entry.key, let_go, entry.key in named, for_good=True):
                gone |= {entry.key: entry, **{other.key: other for other in sharing}}
        kept = [entry for entry in changed if entry.key not in gone]
        deleted = [*(gone | self._let_go_lost(let_go, mine)).values()]
        self._keeper.empty_quarantine()  # of what was found damaged meanwhile
        self._builders.unreport_all()
        self._keeper.rewrite(self._write_catalogs())
        return deleted, kept

    @needs_index
    def _entries(self, mine: Callable[[Entry], bool]) -> list[Entry]:
        rows = self._keeper.opened()
        found = [entry for key in rows.contexts() if (entry := rows.entry(key)) is not None][::-1]
        return [entry for entry in found if self._folder.is_mine(entry) and mine(entry)]

    @needs_index
    def let_go(self, key: str, let_go: LetGo, stays: bool = False, for_good: bool = False) -> bool:
        """Take tags from a context, and delete it if nobody else holds it, here or where it ``stays``; whether it is gone.

        Other processes do not write again what was to be gone ``for_good``, and its file's catalog is to name the tags no more. What shares
        it goes with it then, whoever holds that; otherwise it stays for as long as anything does.
        """
        with self._keeper.changing() as rows:
            if (entry := rows.entry(key)) is None or not self._folder.is_mine(entry):
                if (lost := rows.lost(key)) is not None and self._folder.is_mine(lost):
                    rows.remember_lost(replace(lost, tags=without(lost.tags, key, let_go)))
                return not stays
            rest = without(entry.tags, key, let_go)
            if for_good and not isinstance(let_go, Naming):
                for tag in set(entry.tags) - set(rest):
                    rows.note(self._folder.tenant, key, tag)
            entry = replace(entry, tags=rest)
            if stays or self._is_held(entry) or (not for_good and rows.sharing(key)):
                rows.change(entry)
                if for_good:
                    rows.set_stale(key, True)
                return False
            for going in [*self._sharing(rows, key), entry]:
                if for_good:
                    rows.note(self._folder.tenant, going.key, when=max(time.time(), going.heard))
                self._tidying.drop(rows, going)
                rows.forget_lost(going.key)
            return True

    @needs_index
    def sharing(self, key: str) -> list[Entry]:
        """Stored contexts that share the pairs of one."""
        return self._sharing(self._keeper.opened(), key)

    @staticmethod
    def _sharing(rows: Rows, key: str) -> list[Entry]:
        return [entry for sharing in rows.sharing(key) if (entry := rows.entry(sharing)) is not None]

    @needs_index
    def note_taken(self, tags: Mapping[str, Collection[str]]) -> None:
        """Note which tags were taken from contexts of which nothing is on disk."""
        with self._keeper.changing() as rows:
            for key, taken in tags.items():
                for tag in taken:
                    rows.note(self._folder.tenant, key, tag, here=False)

    @needs_index
    def remove(self, key: str, for_good: float | None = None, expired: bool = False) -> Entry | None:
        """Delete a context; None if there was none, it is another tenant's, or nobody can read whose it is.

        Args:
            for_good: when somebody has begun to delete it, if other processes are not to write it again.
            expired: only if it is.
        """
        path, known = self._folder.path(key), None
        try:
            with self._keeper.changing() as rows:
                known = self._known(rows, key) or (self._folder.entry_of_file(path) if self._folder.has(key) else None)
                if known is not None and not self._folder.is_mine(known):
                    return None
                if expired and ((now := self._folder.entry_of_file(path)) is None or not now.expired):  # stored anew meanwhile
                    return None
                rows.forget_lost(key)
                if for_good is not None:
                    rows.note(self._folder.tenant, key, when=for_good)
                if (entry := rows.entry(key)) is not None:
                    self._tidying.drop(rows, entry)
                elif known is not None and self._folder.has(key):
                    delete(path)
        except BaseException:
            if known is not None and for_good is not None and not self._folder.has(key):  # too late: clean() goes on
                with suppress(OSError), self._keeper.changing() as rows:
                    rows.note(self._folder.tenant, key, when=for_good)
            raise
        return known

    @needs_index
    def known(self, key: str) -> Entry | None:
        """What is known of a context of the tenant's, also of one whose file was lost."""
        found = self._known(self._keeper.opened(), key)
        return found if found is not None and self._folder.is_mine(found) else None

    def _known(self, rows: Rows, key: str) -> Entry | None:
        return rows.entry(key) or rows.lost(key)

    @needs_index
    def _let_go_lost(self, let_go: LetGo, mine: Callable[[Entry], bool]) -> dict[str, Entry]:
        """The same for contexts whose files were lost, and what shares them, which is deleted."""
        deleted = dict[str, Entry]()
        with self._keeper.changing() as rows:
            for key in [*rows.lost_keys()]:
                entry = rows.lost(key)
                if entry is None or not mine(entry) or without(entry.tags, key, let_go) == entry.tags:
                    continue
                entry = replace(entry, tags=without(entry.tags, key, let_go))
                if self._is_held(entry):
                    rows.remember_lost(entry)
                    continue
                for going in self._sharing(rows, key):
                    deleted[going.key] = going
                    rows.note(self._folder.tenant, going.key, when=max(time.time(), going.heard))
                    self._tidying.drop(rows, going)
                rows.forget_lost(key)
                rows.note(self._folder.tenant, key)
        return deleted

    def _is_held(self, entry: Entry) -> bool:
        """Whether anybody has a context. A row has former names, too, which mean others now."""
        return is_held(self._names.still(entry.tenant, entry.names, family_of(entry.identity), entry.key), entry.pinned, entry.tags)

    @needs_index
    def _note_all(self, tag: str) -> None:
        """Note that a tag was taken from all contexts."""
        rows = self._keeper.opened()
        with rows.transaction():
            rows.note(self._folder.tenant, tag=tag)

    @needs_index
    def _write_catalogs(self) -> bool:
        """Bring the catalogs of files up to date with their rows, also where that has failed before; whether all are."""
        done = True
        for key in self._keeper.opened().stale_catalogs():
            try:
                with held(self._folder.lock(key), "building or writing a context", QUIET_S):
                    self._write_catalog(key)
            except (OSError, Timeout, CorruptFileError) as error:
                done, why = False, self._folder.told(str(error))  # no key: it may be another tenant's
                logger.warning("the file of a context that others have still names a tag or name that was forgotten: %s", why)
        return done

    @needs_index
    def _write_catalog(self, key: str) -> None:
        """The copy is not counted in the budget. It is renamed beside its row: what is deleted meanwhile stays so."""
        path, temporary = self._folder.path(key), self._folder.temporary(f"{key}.catalog")
        entry = self._keeper.opened().entry(key)
        try:
            if entry is not None and self._folder.inside(path):
                catalog = {name: getattr(entry, name) for name in ("group", "names", "tags")}
                nbytes = copy_with_catalog(path, temporary, catalog, self._folder.checksums)
            with self._keeper.changing() as rows:
                now = rows.entry(key)
                if now is not None and entry is not None and (now.names, now.tags) == (entry.names, entry.tags) and temporary.exists():
                    replace_with(path, temporary)
                    rows.change(replace(now, file_nbytes=nbytes))
                    rows.count(nbytes - now.file_nbytes)
                    rows.set_stale(key, False)
                elif now is None:
                    rows.set_stale(key, False)
        finally:
            temporary.unlink(missing_ok=True)

    def name(self, label: Label) -> None:
        """Write down a name that was given, but not of a context that was deleted since."""
        if self._is_gone(label):
            self._names.drop(label)
            return
        self._names.write(label)
        if self._is_gone(label):  # meanwhile
            self._names.take(label)

    def _is_gone(self, label: Label) -> bool:
        with suppress(IndexUnavailableError):
            notes = self._keeper.sound(lambda: self._keeper.opened().notes(self._folder.tenant))
            return label.loaded < notes.noted(label.key)
        return False

    def tidy(self) -> None:
        """Clean up behind processes that were killed."""
        if self._keeper.is_unclean():
            self.clean()

    def clean(self) -> bool:
        """Delete what the folder still says of contexts that were deleted, by whomever: their names, what there is in quarantine,
        catalogs of others, free pages of the index. False if something is left, as another process was in the way.

        Raises:
            OSError: something cannot be deleted or written now.
        """
        deleted = self._keeper.drop_deleted()
        self._builders.unreport_all()  # they name keys
        left: OSError | None = None
        try:
            self._names.sweep()
            for label in self._names.all(strict=True):
                if label.loaded < deleted(label.key):
                    self._names.take(label)
        except OSError as error:  # the rest does not wait for it
            left = error
        done = self._keeper.rewrite(self._write_catalogs() and left is None)
        if left is not None:
            raise left
        return done
