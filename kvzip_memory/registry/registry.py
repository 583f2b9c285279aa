"""The registry: finds contexts, has them built once, and places them in tiers: device, host, disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from kvzip_memory.context import CompressedContext, Lease
from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.catalogue import Catalogue
from kvzip_memory.registry.cleaning import Cleaning
from kvzip_memory.registry.counts import Counts
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.files import write_context
from kvzip_memory.registry.disk.names import Label
from kvzip_memory.registry.disk.store import CheckLayers
from kvzip_memory.registry.forgetting import Forgetting, Forgotten
from kvzip_memory.registry.holders import LetGo
from kvzip_memory.registry.lookup import Lookup
from kvzip_memory.registry.memory import Memory
from kvzip_memory.registry.room import Moves
from kvzip_memory.registry.wanted import Build, Report, Wanted, check_ttl, parse_bytes
from kvzip_memory.registry.writing import Writing
from kvzip_memory.system.checksums import Checksums
from kvzip_memory.system.flags import checked_flag
from kvzip_memory.system.forks import is_parents, refuse_after_fork
from kvzip_memory.system.sharing import Shared


class ContextRegistry(Shared):
    """Get-or-build by key over three tiers. Knows no model: whoever asks brings the function that builds.

    Budgets are hard: contexts arriving and leaving are counted too. When a tier is full its least recently used
    context moves down (device, host, disk) and comes back when it is asked for. A context that an answer reads is
    neither moved nor freed. Safe for threads; the disk tier for processes.

    Args:
        device: where contexts are used.
        folder: of the disk tier, None for none.
        device_bytes: budget of the device tier, such as ``"4GiB"``; None for no limit.
        host_bytes: budget of the host tier; 0 for none.
        disk_bytes: budget of the disk tier; None for no limit.
        ttl: seconds after its text was read after which a context is no longer used, whoever stored it, at most :data:`TTL_LIMIT`;
            None for never.
        wait_s: seconds to wait for room while other answers use all of a tier; and for another process of which nothing is heard.
        tenant: digest of the tenant whose contexts are found, listed and changed, by names, keys, tags or otherwise: another's is as if it
            had never existed. :data:`EVERYONE` for operators. Of the whole folder are :meth:`stats` of the disk tier, :meth:`is_empty`, and
            room: it is made where it was used longest ago, whoever's.
        secret: what is on disk is used only if it was written with it; None for none.
        check: as for :class:`DiskTier`.
        forgets: called where contexts were deleted: who remembers something of their texts forgets it.
    """

    _way_out = "make one in each process, over the same folder"

    def __init__(
        self,
        device: torch.device,
        folder: Path | None = None,
        *,
        device_bytes: int | str | None = None,
        host_bytes: int | str | None = 0,
        disk_bytes: int | str | None = None,
        ttl: float | None = None,
        wait_s: float = 60.0,
        tenant: str | None = None,
        secret: str | None = None,
        check: CheckLayers | None = None,
        forgets: Callable[[], object] = lambda: None,
    ) -> None:
        self.device, self.ttl = device, check_ttl(ttl)
        self.tenant, self.checksums = tenant, Checksums(secret)
        self._counts = Counts()
        device_budget, host_budget = parse_bytes("device_bytes", device_bytes), parse_bytes("host_bytes", host_bytes)
        self._backing = Backing(folder, parse_bytes("disk_bytes", disk_bytes), tenant, self.checksums, check, self._counts)
        self._memory = Memory(device, device_budget, host_budget, self._backing.names, self.ttl, wait_s)
        self._writing = Writing(self._memory, self._backing, self._counts)
        self._catalogue = Catalogue(self._memory, self._backing, self._writing)
        self._moves = Moves(self._memory, self._backing, self._writing, self._counts)
        self._lookup = Lookup(self._memory, self._backing, self._writing, self._moves, self._catalogue, self._counts)
        self._cleaning = Cleaning(self._backing)
        self._forgetting = Forgetting(self._memory, self._backing, self._writing, self._catalogue, self._cleaning, forgets)
        refuse_after_fork(self, "_backing", "_memory", "_writing", "_catalogue", "_moves", "_lookup", "_cleaning", "_forgetting")

    @property
    def no_disk(self) -> str | None:
        """Why there is no disk tier; None if there is."""
        return self._backing.no_disk

    # -- asking --------------------------------------------------------------------------------------------------

    def lease(self, wanted: Wanted, build: Build, waiting: Report | None = None) -> AbstractContextManager[tuple[CompressedContext, Lease]]:
        """The context on the device, found or built, and kept there while the block runs.

        Args:
            wanted: what is asked for.
            build: makes it if nobody has it; called by one thread of one process.
            waiting: told how far the build of another thread or process is, a few times a second.

        Raises:
            BudgetError: larger than the device tier, or other answers use all of it for longer than ``wait_s``.
            InputError: another tenant's; as for :meth:`one`.
        """
        return self._lookup.lease(wanted, build, waiting)

    def longest_prefix(
        self, model_fields: Mapping[str, Any], ids: Sequence[int], fits: Callable[[Entry], bool] = lambda entry: True
    ) -> Entry | None:
        """The context of a model with the most tokens that ``ids`` begin with, and go on after; the finest of it.

        Args:
            fits: whether a context may be used at all; one that may not makes way for a shorter one.
        """
        return self._lookup.longest_prefix(model_fields, ids, fits)

    def check_fits(self, nbytes: int) -> None:
        """Raises:
        BudgetError: a context of so many bytes could never be on the device.
        """
        self._moves.check_fits(nbytes)

    def guest(self, nbytes: int) -> AbstractContextManager[None]:
        """Count a context on the device that is not in the tier, and make room for it there, while the block runs.

        Raises:
            BudgetError: see :meth:`lease`.
        """
        return self._moves.guest(nbytes)

    def at_once(self, now: bool) -> AbstractContextManager[None]:
        """Do not wait for room in the block, if so ``now``: the caller holds room that others may wait for."""
        return self._moves.at_once(now)

    def wait_for_room(self, began: float) -> bool:
        """Wait a little, for what others give back; False if that is no use: nobody uses any, or it ``began`` (``time.monotonic``) so long
        ago."""
        return self._moves.wait_for_room(began)

    def is_removed(self, key: str, loaded: float | None = None, parts: Iterable[str] = ()) -> bool:
        """Whether a context was deleted here and loaded again neither here nor by another process.

        Args:
            loaded: when it was last loaded here, in seconds since the epoch: deleted by another process since then counts, too.
            parts: keys of what it shares, of which the same holds.
        """
        return self._forgetting.is_removed(key, loaded, parts)

    def use_again(self, key: str) -> None:
        """Make a context that is on the device the most recently used one there."""
        with self._memory.using() as use:
            self._memory.begun(use, key)

    def loaded(self, key: str) -> float:
        """When a context in memory was last loaded here, in seconds since the epoch; 0.0 if it is not there."""
        with self._memory.changed:
            return max((held.loaded for held in self._memory.here(key)), default=0.0)

    def readmit(self, key: str) -> None:
        """A context that was deleted may be stored again."""
        self._memory.readmit(key)

    # -- the catalogue -------------------------------------------------------------------------------------------

    def contexts(self, limit: int | None = None) -> list[Entry]:
        """What is stored, in memory or on disk, the most recently used first."""
        return self._catalogue.contexts(limit)

    def find(self, reference: str) -> list[Entry]:
        """Those of a key or its beginning (8 digits at least), the last used last; else the context of a name, one for each model, the last
        loaded last. What was loaded under the name before is found by its key only. A whole key is never taken for a name.

        Raises:
            InputError: the reference is no text.
        """
        return self._catalogue.find(reference)

    def looked_up(self, reference: str) -> tuple[list[Entry], dict[str, Label]]:
        """:meth:`find`, and by their keys what was told of contexts of that name, as of the same moment."""
        return self._catalogue.looked_up(reference)

    def one(self, reference: str) -> Entry:
        """The latest context of a name or key.

        Raises:
            InputError: nothing is stored under it.
        """
        return self._catalogue.one(reference)

    def tiers(self, key: str) -> list[str]:
        """The tiers a context is in."""
        return self._catalogue.tiers(key)

    def with_room(self, wanted: Wanted) -> Wanted:
        """What is asked for, if the context can get its name and tags beside those it has; marks of conversations that it has no room for
        are left out, as many others hold it then.

        Raises:
            InputError: too many, see :func:`~kvzip_memory.registry.holders.check_room`.
        """
        return self._catalogue.with_room(wanted)

    def pin(self, reference: str, pinned: bool = True) -> Entry:
        """Never lose a context: it may move down to disk, not out of it. Without a disk tier it stays in memory.

        Raises:
            InputError: nothing is stored under the reference.
            StorageError: the disk tier cannot note it now; nothing was changed.
        """
        return self._catalogue.pin(reference, checked_flag("pinned", pinned))

    def untag(self, key: str, tag: str) -> None:
        """Take a tag from a context.

        Raises:
            StorageError: the disk tier cannot note it now; nothing was changed.
        """
        self._catalogue.untag(key, tag)

    def join(self, key: str, tags: Sequence[str]) -> None:
        """Hold a context by further tags, if it has any and has room for more. One without is whoever's has loaded it, and not to be
        forgotten by one that has found it."""
        self._catalogue.join(key, tags)

    def remove(self, reference: str) -> Entry:
        """Delete a context from every tier. One in use goes on in memory until its answer has ended.

        One whose pairs others share stays for as long as they do.

        Whoever still has it may go on asking; it is then built for each answer and stored no more, until it is loaded again.
        A context of several names that is given by one of them only loses that name; give its key to delete it. What was loaded under the
        name before stays, and is found by its key.

        Returns:
            The context with the names that it has still, none if it was deleted.

        Raises:
            InputError: nothing is stored under the reference; a name that is left of a context is deleted. Or others share its pairs; it
                says which.
            StorageError: as for :meth:`check_changeable`; nothing was deleted.
            OSError: its file or that of its name cannot be deleted.
        """
        return self._forgetting.remove(reference)

    def leave(self, key: str, tags: Collection[str]) -> bool:
        """Take tags from a context, and delete it if nobody else holds it, by a name, a pin or another tag; whether it was deleted.

        Raises:
            StorageError: another process holds the index of the folder; nothing was deleted.
            OSError: its file cannot be deleted.
        """
        return self._forgetting.leave(key, tags)

    def forget(self, let_go: LetGo) -> Forgotten:
        """Take the tags that are let go of from all contexts, and delete those that nobody else holds, by a name, a pin or another tag, and
        all that share the pairs of one of these.

        Of these neither text, ids nor pairs are left in the folder or, once answers from them have ended, in memory. A process that has
        one in its memory answers from it until it leaves that, and does not write it again.

        Raises:
            StorageError: as for :meth:`check_changeable`; nothing was deleted.
            OSError: a file cannot be deleted; those before it were.
        """
        return self._forgetting.forget(let_go)

    # -- the folder ----------------------------------------------------------------------------------------------

    def check_disk(self) -> None:
        """Raises:
        StorageError: the folder that was given cannot be used.
        OSError: what is on disk cannot be listed now.
        """
        self._backing.check_readable()

    def check_changeable(self) -> None:
        """To be called before several things are changed of which none may be left half done.

        Raises:
            StorageError: what is on disk cannot be changed now: another process holds the index, or the folder cannot be written or used.
        """
        self._backing.changeable()

    @property
    def is_held(self) -> bool:
        """Whether another process keeps the index of the folder locked, as of when it was last used."""
        return self._backing.tier is not None and self._backing.tier.is_held

    def is_empty(self) -> bool:
        """Whether no tier holds anything, of whichever tenant."""
        with self._memory.changed:
            if self._memory.device.held or self._memory.host.held:
                return False
        return self._backing.attempt("count", lambda disk: disk.is_empty()) is not False

    def verify(self, reference: str) -> str | None:
        """Check every byte of a stored context: None if it is sound, else what is wrong; it is in quarantine then."""
        self._writing.flush()
        entry = self.one(reference)
        return self._backing.tier.verify(entry.key) if self._backing.tier is not None else None

    def gc(self, old: bool = False) -> dict[str, int]:
        """Delete from disk what is expired or quarantined, but not another tenant's, orphaned, or left by killed processes.

        Args:
            old: delete also what older versions of kvzip-memory have stored, which no text finds any more, unless it is pinned.

        Raises:
            StorageError: as for :meth:`check_changeable`, and nothing was deleted; or a file cannot be, and those before it were.
        """
        return self._forgetting.collect(checked_flag("old", old))

    def write(self, context: CompressedContext, path: Path) -> Path:
        """Write a context that holds its pairs itself to a file of the user's, with the registry's secret if it has one.

        Raises:
            OSError: as for :func:`~kvzip_memory.registry.disk.files.write_context`.
        """
        return write_context(context, path, self.checksums)

    def quarantine(self) -> list[dict[str, Any]]:
        """Files that failed their checks: key, file, nbytes, reason, time, tenant. Whose is not known is told to operators only."""
        return self._backing.attempt("list", lambda disk: disk.quarantine()) or []

    def stats(self) -> dict[str, Any]:
        """Bytes, budgets and contexts of every tier, and what has happened since the registry was made.

        Of each of the ``tiers`` ``nbytes``, ``budget`` and ``contexts``: on disk those of the folder, which all tenants share as they do
        its budget; where a folder that was given cannot be used they are 0, and ``unusable`` says why. ``lookups`` is the sum of ``hits``
        over the tiers and ``built``. Contexts that moved down are ``spills`` by where to, those that came up from the host
        ``promotions``; those that left the memory and are on disk ``evictions``, and those that were lost ``dropped``. ``shrunk`` were cut
        from finer ones, ``stored`` written to disk, ``quarantined`` found damaged there; ``disk_errors`` is how often the disk tier failed.
        """
        counts, memory, backing = self._counts.now(), self._memory, self._backing
        with memory.changed:
            tiers: dict[str, dict[str, Any]] = {
                tier.name: {"nbytes": tier.nbytes, "budget": tier.budget, "contexts": len(tier.held)} for tier in memory.tiers
            }
        if backing.tier is not None:
            usage = backing.attempt("measure", lambda disk: disk.usage())
            tiers["disk"] = {
                "nbytes": usage,
                "budget": backing.tier.budget,
                "contexts": backing.attempt("count", lambda disk: disk.count()),
            }
        elif backing.folder is not None:
            tiers["disk"] = {"nbytes": 0, "budget": backing.budget, "contexts": 0, "unusable": backing.no_disk}
        hits = {name: counts[f"hits.{name}"] for name in ("device", "host", "disk")}
        events = ("promotions", "evictions", "dropped", "shrunk", "stored", "quarantined", "disk_errors")
        return {
            "tiers": tiers,
            "lookups": sum(hits.values()) + counts["built"],
            "hits": hits,
            "built": counts["built"],
            "spills": {"host": counts["spills.host"], "disk": counts["spills.disk"]},
            **{event: counts[event] for event in events},
        }

    def flush(self) -> None:
        """Wait until everything built so far is on disk, and what was deleted is overwritten there, as far as that can be."""
        self._writing.flush()
        self._cleaning.now()

    def close(self) -> None:
        """Flush and let go of the folder. What is in memory stays usable, what is built from now on stays there.

        An index that another process holds is waited for a second; a warning says how many contexts are then not on disk. A process that
        was forked has nothing to close.
        """
        if not is_parents(self):
            self._cleaning.now()
            self._writing.close()
