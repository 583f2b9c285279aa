"""The disk tier behind the memory, used as far as there is one and it works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvzip_memory.errors import StorageError
from kvzip_memory.registry.counts import Counts
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.layout import without_keys
from kvzip_memory.registry.disk.names import Names
from kvzip_memory.registry.disk.store import CheckLayers, DiskTier
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.identity import EVERYONE, family_of
from kvzip_memory.system.checksums import Checksums
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.private import usable

logger = logger_of(__name__)


class Backing:
    """A disk tier that may be missing or fail: contexts are then served from memory, with a warning and a counter.

    It owns no lock; the tier has its own.

    Args:
        folder: of the disk tier, None for none.
        budget: its bytes, None for no limit.
        tenant: whose contexts are found, listed and changed.
        checksums: with a secret, nothing is used that was not written with it.
        check: as for :class:`DiskTier`.
        counts: ``disk_errors`` and ``quarantined`` are counted there.

    Attributes:
        tier: None if there is no folder, it cannot be used, or it was closed; :attr:`no_disk` says why.
        names: what names mean; of the tier, or in memory.
    """

    def __init__(
        self, folder: Path | None, budget: int | None, tenant: str | None, checksums: Checksums, check: CheckLayers | None, counts: Counts
    ) -> None:
        self.folder, self.budget, self.tenant, self._counts = folder, budget, tenant, counts
        self.tier: DiskTier | None = None
        self.no_disk = None if folder else "no cache_dir was given"
        self._warned: set[str] = set()
        self._notes = Notes(None)
        refuse_after_fork(self, "tier")
        if folder is not None:
            try:
                with usable(folder):
                    self.tier = DiskTier(folder.expanduser().absolute(), budget, tenant, checksums, check)
                self._counts.add("disk_errors", int(self.tier.read_only is not None))
                self._counts.add("quarantined", self.tier.quarantined)
            except OSError as error:
                self.no_disk = self.without_keys(error)
                self.failed("open", error)
        self.names = Names() if self.tier is None else self.tier.names

    def attempt(self, what: str, use: Callable[[DiskTier], Any]) -> Any:
        """Use the disk tier; None, a warning and a counter if it fails, None if there is none."""
        if self.tier is None:
            return None
        try:
            return use(self.tier)
        except OSError as error:
            self.failed(what, error)
            return None

    def failed(self, what: str, error: Exception) -> None:
        self._counts.add("disk_errors")
        reason = re.sub(r"[0-9a-f]{64}|\d+", "", str(error))
        if reason not in self._warned:  # once for each reason, not for each context
            self._warned.add(reason)
            logger.warning("disk tier: cannot %s: %s; contexts are served from memory", what, self.without_keys(error))

    def let_go(self, why: str) -> DiskTier | None:
        """There is no disk tier from now on; the one that was, for who closes it."""
        tier, self.tier, self.no_disk = self.tier, None, why
        return tier

    def without_keys(self, error: Exception) -> str:
        """It may be of any tenant's file that lies in the folder."""
        return str(error) if self.tenant == EVERYONE else without_keys(str(error))

    def notes(self) -> Notes:
        """What was forgotten, as it was when it could last be read."""
        self._notes = self.attempt("read", lambda disk: disk.notes()) or self._notes
        return self._notes

    def has(self, key: str) -> bool:
        """Whether a context's file is on disk."""
        return bool(self.attempt("search", lambda disk: disk.has(key)))

    def told(self, entry: Entry) -> Entry:
        """An entry with the names that are still its own, apart from those that others have now."""
        names = self.names.still(entry.tenant, entry.names, family_of(entry.identity), entry.key) if entry.names else {}
        return replace(entry, names=names, former=tuple(name for name in entry.names if name not in names))

    def mine(self, entry: Entry) -> bool:
        """Whether a context is the tenant's."""
        return self.tenant in (EVERYONE, entry.tenant)

    def usable(self) -> DiskTier | None:
        """The disk tier; None if no folder was given.

        Raises:
            StorageError: a folder was given, and there is no disk tier: what is stored in it would stay as it is.
        """
        tier = self.tier
        if self.folder is not None and tier is None:
            why = f"what lies in {self.folder} cannot be deleted or changed, and nothing was: {self.no_disk}"
            raise StorageError(f"{why}; then make the engine again")
        return tier

    def check_readable(self) -> None:
        """Raises:
        StorageError: the folder that was given cannot be used.
        OSError: what is on disk cannot be listed now.
        """
        if (tier := self.usable()) is not None:
            tier.usage()

    def changeable(self) -> DiskTier | None:
        """The disk tier, of which several things are to be changed and none left half done; None if no folder was given.

        Raises:
            StorageError: what is on disk cannot be changed now: another process holds the index, or the folder cannot be written or used.
        """
        if (tier := self.usable()) is not None:
            tier.check_changeable()
        return tier
