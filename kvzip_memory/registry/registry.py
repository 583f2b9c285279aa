"""The registry: finds contexts, has them built once, and places them in tiers: device, host, disk."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import torch

from kvzip_memory import calls
from kvzip_memory.calls import Left
from kvzip_memory.checksums import Checksums
from kvzip_memory.compression.shrink import shrink
from kvzip_memory.context import CompressedContext, Lease, Receipt, Source
from kvzip_memory.errors import BudgetError, InputError, StorageError
from kvzip_memory.forks import is_parents, refuse_after_fork
from kvzip_memory.locks import Hold, Notice
from kvzip_memory.printable import logger_of, printable
from kvzip_memory.private import usable
from kvzip_memory.registry.beginnings import beginnings
from kvzip_memory.registry.disk import CheckLayers, DiskTier, Entry, NotStoredError, is_past, latest
from kvzip_memory.registry.facts import LATEST
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.holders import JOINT, LARGEST_HOLDERS, MARKED, LetGo, check_room, has_room, is_held, without
from kvzip_memory.registry.identity import EVERYONE, explain, family_of, is_whose, only_ratio_differs
from kvzip_memory.registry.index import IndexHeldError
from kvzip_memory.registry.layout import KEY, without_keys
from kvzip_memory.registry.memory import Held, MemoryTier, Room, Use, settle, to_device, to_host
from kvzip_memory.registry.names import Label, Names
from kvzip_memory.sharing import Shared
from kvzip_memory.sources import LONGEST_NAME

logger = logger_of(__name__)

#: Called by a build: stage, tokens done, tokens in all.
Report = Callable[[str, int, int], None]
Build = Callable[[Report], CompressedContext]

_POLL_S = 0.05

#: One call may give so many tags.
MOST_TAGS = 256

#: Seconds that a ``ttl`` may be: a hundred years.
TTL_LIMIT = 100 * 365 * 86400


@dataclass(frozen=True)
class Wanted:
    """A context that is asked for.

    Attributes:
        key: its key.
        identity: the fields the key was made of.
        group: digest of the text and the tenant: what the nearest stored context is looked for by.
        name: alias to give it.
        tags: free words to give it.
        sources: the documents, by the names and with the metadata that whoever gives the name knows them by.
        origin: tags that it gets only if it is built: those of who has loaded it first, if it was lost.
        loaded: of one that is asked for again, when it was loaded, in seconds since the epoch; None while it is being loaded.

    Raises:
        InputError: a name or tag that cannot be stored, or a name that is empty or a key.
    """

    key: str
    identity: Mapping[str, Any]
    group: str
    name: str | None = None
    tags: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    origin: tuple[str, ...] = ()
    loaded: float | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        for tag in self.tags:
            check_tag(tag)


@dataclass(frozen=True)
class Forgotten:
    """What :meth:`ContextRegistry.forget` has done: contexts that were deleted, and those that others hold; as they were."""

    deleted: tuple[Entry, ...]
    kept: tuple[Entry, ...]


@dataclass
class _Flight:
    """A context on its way to the device: one thread brings it, others wait."""

    progress: tuple[str, int, int] = ("", 0, 0)
    waiters: WeakSet[Use] = field(default_factory=WeakSet)

    def unwanted(self, left: Left | None) -> Left | None:
        """Set when nobody waits for it: neither the call that brings it, which has ``left``, nor others."""
        return None if left is None else _Unwanted(self, left)


@dataclass
class _Unwanted:
    flight: _Flight
    left: Left

    def is_set(self) -> bool:
        return self.left.is_set() and not self.flight.waiters


@dataclass
class _Story:
    """What a lookup found on its way."""

    tier: str = "built"
    reason: str | None = None
    differs: tuple[str, ...] = ()
    shrunk_from: float | None = None
    ms: dict[str, float] = field(default_factory=dict)


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
    ) -> None:
        self.tenant, self.checksums = tenant, Checksums(secret)
        self.device, self.ttl, self._wait_s = device, check_ttl(ttl), wait_s
        self._device = MemoryTier("device", parse_bytes("device_bytes", device_bytes))
        self._host = MemoryTier("host", parse_bytes("host_bytes", host_bytes))
        self._changed = threading.Condition()
        self._flights: WeakValueDictionary[str, _Flight] = WeakValueDictionary()
        self._removed: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kvzip-disk")
        self._warned: set[str] = set()
        self._unstored: set[str] = set()  # keys of contexts that could not be stored when they were built
        self._untold: dict[str, tuple[dict[str, float], dict[str, float]]] = {}  # names and tags that could not be written to the index
        self._disk: DiskTier | None = None
        self._folder = folder
        self.no_disk = None if folder else "no cache_dir was given"
        refuse_after_fork(self, "_changed", "_writer", "_disk")
        self._disk_bytes = budget = parse_bytes("disk_bytes", disk_bytes)
        if folder is not None:
            try:
                with usable(folder):
                    self._disk = DiskTier(folder.expanduser().absolute(), budget, tenant, self.checksums, check)
                self._count("disk_errors", int(self._disk.read_only is not None))
                self._count("quarantined", self._disk.quarantined)
            except OSError as error:
                self.no_disk = self._without_keys(error)
                self._disk_failed("open", error)
        self._names = Names() if self._disk is None else self._disk.names

    # -- asking --------------------------------------------------------------------------------------------------

    @contextmanager
    def lease(self, wanted: Wanted, build: Build, waiting: Report | None = None) -> Iterator[tuple[CompressedContext, Lease]]:
        """The context on the device, found or built, and kept there while the block runs.

        Args:
            wanted: what is asked for.
            build: makes it if nobody has it; called by one thread of one process.
            waiting: told how far the build of another thread or process is, a few times a second.

        Raises:
            BudgetError: larger than the device tier, or other answers use all of it for longer than ``wait_s``.
            InputError: another tenant's; as for :meth:`one`.
        """
        if not is_whose(wanted.identity, self.tenant):
            raise _not_stored(wanted.key)
        story = _Story()
        with self._using() as use:
            if self._begun(use, wanted.key):
                story.tier, story.ms["wait"] = "device", 0.0
                self._count("hits.device")
            else:
                with calls.waiting():
                    self._acquire(use, wanted, build, waiting or (lambda *progress: None), story)
            held = use.held
            assert held is not None
            self._annotate(held, wanted)
            if held.key in self._unstored:
                self._store_later([held])
            receipt = Receipt(
                wanted.key,
                hit=story.tier != "built",
                tier=story.tier,
                reason=story.reason,
                differs=story.differs,
                shrunk_from=story.shrunk_from,
                nbytes=held.nbytes,
                ms=story.ms,
            )
            with held.context.lease() as resident:
                yield held.context, Lease(resident.layers, receipt)

    @contextmanager
    def _using(self) -> Iterator[Use]:
        """A use, of nothing yet, that has ended when the block has."""
        use = Use()
        try:
            yield use
        finally:
            self._let_go(use)

    def _let_go(self, use: Use) -> None:
        with self._changed:
            if (held := use.end()) is not None:
                if not held.users:
                    held.room = None
                    if held.key in self._removed:
                        self._drop(held)
                self._changed.notify_all()

    def _acquire(self, use: Use, wanted: Wanted, build: Build, waiting: Report, story: _Story) -> None:
        """Begin to use a context on the device. One thread at a time brings it; who waited tries for itself when that one failed."""
        began, flight = time.perf_counter(), _Flight()
        try:
            while not (there := self._begun(use, wanted.key)):
                calls.check()
                with self._changed:
                    other = self._flights.setdefault(wanted.key, flight)
                    if other is flight:
                        break
                    other.waiters.add(use)
                    progress = other.progress
                    del other  # a flight goes with the frame of the thread that flies
                    self._changed.wait(calls.LOOK_S)
                waiting(*progress)
            if there or self._begun(use, wanted.key):  # landed in between
                story.tier, story.ms["wait"] = "device", 1e3 * (time.perf_counter() - began)
            else:
                with calls.within(left=flight.unwanted(calls.left())):
                    self._bring(use, flight, wanted, build, waiting, story)
            self._count(story.tier if story.tier == "built" else f"hits.{story.tier}")
        finally:
            if self._flights.get(wanted.key) is flight:
                with self._changed:
                    del self._flights[wanted.key]
                    self._changed.notify_all()

    def _begun(self, use: Use, key: str) -> bool:
        """Begin to use a context that is on the device; False if it is not."""
        with self._changed:
            held = self._device.held.get(key)
            if held is None or not self._alive(held):
                return False
            use.begin(held)
            held.used = time.time()
            self._device.held.move_to_end(key)
            return True

    def _alive(self, held: Held) -> bool:
        """False, and gone, if it has expired; answers that read it end as they began. With the lock held."""
        if not is_past(held.context.created, held.context.expires, self.ttl):
            return True
        self._drop(held)
        return False

    def _drop(self, held: Held) -> None:
        """Let go of a context in memory, if it is still there; its bytes stay counted while it is read. With the lock held."""
        for tier in (self._device, self._host):
            if tier.held.get(held.key) is held:
                tier.take(held)
                if held.users:
                    held.room = Room()
                    tier.keep(held.room, held.nbytes)
                self._names_left(held)

    def _names_left(self, held: Held) -> None:
        family = family_of(held.context.identity)
        for name in held.names:
            self._names.lose(held.context.identity.get("tenant"), name, family, held.key)

    def _bring(self, use: Use, flight: _Flight, wanted: Wanted, build: Build, waiting: Report, story: _Story) -> None:
        """Bring a context to the device and begin to use it."""
        began = time.perf_counter()
        try:
            if self._from_host(use, wanted.key):
                story.tier = "host"
                return
            if self._from_disk(use, wanted, story):
                return
            if (context := self._from_finer(wanted, story)) is not None:
                self._admit(use, wanted, context)
                return
        finally:
            story.ms["load"] = 1e3 * (time.perf_counter() - began)
        self._built(use, flight, wanted, build, waiting, story)

    def _admit(self, use: Use, wanted: Wanted, context: CompressedContext) -> None:
        """Move a context that was just built or cut to the device. It is as old as its text's reading."""
        created = context.created or time.time()
        until = [context.expires] if context.expires is not None else []
        expires = min([*until, created + self.ttl, LATEST]) if self.ttl is not None else context.expires
        context = replace(context, created=created, expires=expires)
        with self._room(self._device) as room:
            self._reserve(self._device, context.nbytes, room)
            self._move_in(use, room, wanted, context)

    def _move_in(self, use: Use, room: Room, wanted: Wanted, context: CompressedContext, entry: Entry | None = None) -> None:
        """Move a context to the device, into its room there."""
        moved, now = to_device(context, self.device), time.time()
        if entry is not None:
            held = Held(moved, wanted.group, dict(entry.names), dict.fromkeys(entry.tags, now), pinned=entry.pinned, stored=now)
        else:
            names = {} if wanted.name is None else {wanted.name: now}
            loaded = wanted.loaded or now
            tags = dict.fromkeys([*wanted.tags, *wanted.origin], loaded)
            held = Held(moved, wanted.group, names, tags, loaded=loaded, stored=wanted.loaded)
        with self._changed:
            self._device.add(held, room)
            use.begin(held)

    def _from_host(self, use: Use, key: str) -> bool:
        with self._using() as source, self._room(self._device) as room:
            with self._changed:
                held = self._host.held.get(key)
                if held is None or not self._alive(held):
                    return False
                source.begin(held)
            self._reserve(self._device, held.nbytes, room)
            moved = to_device(held.context, self.device)
            with self._changed:
                held.context = moved
                self._device.add(held, room)
                self._host.take(held)
                use.begin(held)
        self._count("promotions")
        return True

    def _from_disk(self, use: Use, wanted: Wanted, story: _Story) -> bool:
        disk = self._disk
        if disk is None:
            story.reason = f"there is no disk tier ({self.no_disk})"
            return False
        before = disk.quarantined
        with self._room(self._device) as room:

            def admit(nbytes: int) -> None:  # once the file has told its size, before its pairs are read
                self._reserve(self._device, nbytes, room)

            try:
                context = disk.get(wanted.key, self.device, admit, self.ttl)  # layer by layer, each uploaded while the next is read
            except NotStoredError as error:
                story.reason = str(error)
                self._count("quarantined", disk.quarantined - before)
                return False
            self._move_in(use, room, wanted, context, self._try("read", lambda disk: disk.entry(wanted.key)))
        story.tier, story.reason, story.differs = "disk", None, ()
        with suppress(RuntimeError):  # closed meanwhile
            self._writer.submit(self._touch, wanted.key, {}, {})
        return True

    def _from_finer(self, wanted: Wanted, story: _Story) -> CompressedContext | None:
        """A context of a smaller ratio out of a stored one of a larger, which is read but not kept."""
        near = self._near(wanted)
        ratio = wanted.identity["ratio"]
        finer = [(i["ratio"], key) for key, i in near if i["ratio"] > ratio and only_ratio_differs(i, wanted.identity)]
        for finer_ratio, key in sorted(finer):
            with self._borrowed(key) as (source, tier):
                context = None if source is None else shrink(source, wanted.key, wanted.identity)
            if context is not None:
                story.tier, story.reason, story.shrunk_from = tier, None, finer_ratio
                self._count("shrunk")
                return context
        if story.reason == "not stored" or self._disk is None:
            story.differs, text = explain(wanted.identity, [identity for _, identity in near], self._named_identities(wanted))
            story.reason = text if self._disk is not None else f"{text}; {story.reason}"
        return None

    @contextmanager
    def _borrowed(self, key: str) -> Iterator[tuple[CompressedContext | None, str]]:
        """A context as it lies in a tier, without moving it."""
        with self._using() as use:
            with self._changed:
                for tier in (self._device, self._host):
                    if (held := tier.held.get(key)) is not None and self._alive(held):
                        use.begin(held)
                        break
                else:
                    held = None
            if held is not None:
                yield held.context, tier.name
                return
        context, disk = None, self._disk
        if disk is not None:
            with suppress(NotStoredError):
                context = disk.get(key, torch.device("cpu"), ttl=self.ttl)
        yield context, "disk"

    def _near(self, wanted: Wanted) -> list[tuple[str, Mapping[str, Any]]]:
        """Keys and identities of the stored contexts of the same text and tenant."""
        with self._changed:
            held = [h for tier in (self._device, self._host) for h in tier.catalogue.of_text(wanted.group)]
            found = {h.key: h.context.identity for h in held}
        for entry in self._try("search", lambda disk: disk.group(wanted.group)) or ():
            found.setdefault(entry.key, entry.identity)
        found.pop(wanted.key, None)
        return list(found.items())

    def _named_identities(self, wanted: Wanted) -> list[Mapping[str, Any]]:
        """Identities of the tenant's contexts that have the wanted name."""
        return [] if wanted.name is None else [entry.identity for entry in self._labelled(self._labels(wanted.name))]

    # -- building ------------------------------------------------------------------------------------------------

    def _built(self, use: Use, flight: _Flight, wanted: Wanted, build: Build, waiting: Report, story: _Story) -> None:
        """Build, unless another process does so first; its writing to disk goes on behind the answer."""
        disk = self._disk
        hold = disk.hold(wanted.key) if disk is not None and disk.read_only is None else None
        handed_over = False
        try:
            if hold is not None and self._found_elsewhere(use, hold, wanted, waiting, story):
                return
            last_note = 0.0

            def report(stage: str, done: int, total: int) -> None:
                nonlocal last_note
                flight.progress = (stage, done, total)
                if hold is not None and hold.mine and disk is not None and time.monotonic() - last_note > 0.5:
                    last_note = time.monotonic()
                    disk.report(wanted.key, {"stage": stage, "done": done, "total": total})

            context = build(report)
            story.ms |= dict(context.receipt.ms) if context.receipt else {}
            self._admit(use, wanted, context)
            if hold is not None:
                assert use.held is not None
                handed_over = self._write_behind(use.held, hold if hold.mine else None) and hold.mine
        finally:
            if hold is not None and not handed_over:
                hold.release()

    def _found_elsewhere(self, use: Use, hold: Hold, wanted: Wanted, waiting: Report, story: _Story) -> bool:
        """Whether another process has built a context meanwhile; if not, its lock is ours, once nobody else holds it.

        A lock goes with the process that held it: a dead builder is replaced at the next look, and one that is stopped, or that builds
        something else under the same lock, when nothing was heard of this context for ``wait_s``. It is then built twice, which does no
        harm.
        """
        disk = self._disk
        if disk is None:  # closed meanwhile
            return False
        began, heard = time.perf_counter(), time.monotonic()
        told: dict[str, Any] = {}
        notice = Notice("waiting for another process that builds or writes context %s, or one whose lock it shares", wanted.key[:12])
        try:
            while True:
                calls.check()
                mine = hold.acquire()
                if disk.has(wanted.key) and self._from_disk(use, wanted, story):
                    return True
                if mine:
                    return False
                notice.look()
                note = disk.reported(wanted.key) or {}
                if note != told:
                    told, heard = note, time.monotonic()
                elif time.monotonic() - heard >= self._wait_s:
                    logger.warning("context %s is built here: nothing was heard of it for %g s", wanted.key[:12], self._wait_s)
                    return False
                waiting(str(note.get("stage", "waiting")), int(note.get("done", 0)), int(note.get("total", 0)))
                time.sleep(_POLL_S)
        except OSError as error:
            self._disk_failed("lock", error)
            return False
        finally:
            story.ms["wait"] = 1e3 * (time.perf_counter() - began)

    def _write_behind(self, held: Held, hold: Hold | None = None) -> bool:
        """Store a context in the background. It stays in memory until that is done, and its lock is held; False after :meth:`close`."""
        use = Use()

        def write() -> None:
            try:
                if not self.is_removed(held.key):
                    self._stored_unless_there(held) if hold is None else self._store(held)
            finally:
                if hold is not None:
                    hold.release()
                self._let_go(use)

        try:
            with self._changed:
                use.begin(held)
            self._writer.submit(write)
        except RuntimeError:  # closed meanwhile: it stays in memory
            self._let_go(use)
            return False
        except BaseException:
            self._let_go(use)
            raise
        return True

    def _store_later(self, unstored: Sequence[Held]) -> None:
        """Try again, in the background, to store contexts for which the index was not free."""
        for held in unstored:
            self._unstored.discard(held.key)
            self._write_behind(held)

    def _store(self, held: Held) -> bool:
        """Write a context to the disk tier; False, a warning and a counter if that fails."""
        began = time.perf_counter()
        try:
            if (disk := self._disk) is None:
                return False
            disk.check_free()  # before anything is copied
            notes = disk.notes()
            if self._is_forgotten(held, notes):
                return False
            tags, pinned = dict(held.tags) if held.stored is None else notes.left(held.key, held.tags), held.pinned
            disk.put(to_host(held.context), held.group, names=held.names, tags=sorted(tags), pinned=pinned)
            if self.is_removed(held.key) or self._is_forgotten(held, disk.notes()):  # meanwhile
                disk.remove(held.key)
                return False
            if held.pinned != pinned:
                disk.pin(held.key, held.pinned)
            for tag in tags.keys() - held.tags.keys():
                disk.untag(held.key, tag)
        except Exception as error:  # also if there is no memory for a copy
            self._disk_failed("store", error)
            if isinstance(error, IndexHeldError):
                self._unstored.add(held.key)
            return False
        held.stored = time.time()
        self._unstored.discard(held.key)
        self._count("stored")
        self._count("stored.ms", round(1e3 * (time.perf_counter() - began)))
        return True

    def _is_forgotten(self, held: Held, notes: Notes) -> bool:
        """Whether a context that was on disk was deleted there by whoever had it, and not loaded here since."""
        if held.stored is None:
            return False
        if held.loaded <= notes.deleted(held.key):
            return True
        taken = max((notes.taken(held.key, tag) for tag in held.tags), default=0.0)
        return held.loaded <= taken and not is_held(self._told(_entry(held)).names, held.pinned, notes.left(held.key, held.tags))

    # -- room ----------------------------------------------------------------------------------------------------

    @contextmanager
    def guest(self, nbytes: int) -> Iterator[None]:
        """Count a context on the device that is not in the tier, and make room for it there, while the block runs.

        Raises:
            BudgetError: see :meth:`lease`.
        """
        room = Room()
        try:
            with calls.waiting():
                self._reserve(self._device, nbytes, room)
            yield
        finally:
            with self._changed:
                self._device.give_back(room)
                self._changed.notify_all()

    def check_fits(self, nbytes: int) -> None:
        """Raises:
        BudgetError: a context of so many bytes could never be on the device.
        """
        budget = self._device.budget
        if budget is not None and nbytes > budget:
            raise BudgetError(
                f"the context takes about {nbytes:,} bytes; device_bytes is {budget:,}: raise it, keep a smaller ratio, or load less"
            )

    def with_room(self, wanted: Wanted) -> Wanted:
        """What is asked for, if the context can get its name and tags beside those it has; marks of conversations that it has no room for
        are left out, as many others hold it then.

        Raises:
            InputError: too many, see :func:`~kvzip_memory.registry.holders.check_room`.
        """
        if wanted.name is None and not wanted.tags:
            return wanted
        here = self._in_memory([wanted.key])
        known = _entry(here[0]) if here else self._try("read", lambda disk: disk.entry(wanted.key))
        if known is None:
            return wanted
        if wanted.name is not None and not has_room(known.names, [wanted.name]):  # others may have some of these names now
            check_room("names", self._told(known).names, [wanted.name], "load it without one, or take some away (kvzip-memory rm)")
        if MARKED in wanted.tags and not has_room(known.tags, wanted.tags):
            return replace(wanted, tags=(MARKED,))
        check_room("tags", known.tags, wanted.tags, "load it without, or forget some (engine.forget)")
        return wanted

    @contextmanager
    def _room(self, tier: MemoryTier) -> Iterator[Room]:
        """Room, none yet, for a move to a tier. When the block ends it is given back, unless the context has moved in.

        A context leaves a tier only when it has arrived in the next: after a failure it is where it was.
        """
        room = Room()
        try:
            yield room
        except BaseException:
            with self._changed:
                settle(self._device, self._host, self.device)
            raise
        finally:
            with self._changed:
                tier.give_back(room)
                self._changed.notify_all()

    def _reserve(self, tier: MemoryTier, nbytes: int, room: Room) -> None:
        """Make room in a tier, moving down what was used longest ago; waits while others use all of it.

        Raises:
            BudgetError: nobody uses what takes the room, or they do for longer than ``wait_s``.
        """
        if tier is self._device:
            self.check_fits(nbytes)
        began = time.monotonic()
        notice = Notice("waiting for room for %s bytes in the %s tier, all of which answers use", f"{nbytes:,}", tier.name)
        while not self._reserved(tier, nbytes, room):
            calls.check()
            with self._changed:
                if tier.has_room(nbytes) or self._victim(tier) is not None:
                    continue
                waited, passing = time.monotonic() - began, tier.reserved  # of contexts that come, or leave with their users
                users = sum(held.users > 0 for held in tier.held.values())
                if waited >= self._wait_s or (users == 0 and not passing and len(self._flights) <= 1):
                    raise BudgetError(
                        f"no room for {nbytes:,} bytes in the {tier.name} tier: {users} contexts in use, "
                        f"{sum(held.pinned for held in tier.held.values())} pinned and {passing:,} bytes of others that come or leave take "
                        f"{tier.nbytes:,} of {tier.budget:,} bytes (waited {waited:.0f} s); end some answers, unpin, or raise "
                        f"{tier.name}_bytes"
                    )
                notice.look()
                self._changed.wait(min(self._wait_s - waited, calls.LOOK_S))

    def _reserved(self, tier: MemoryTier, nbytes: int, room: Room) -> bool:
        """Keep bytes in a tier, moving down what was used longest ago; False if that is not to be had without waiting."""
        while True:
            with self._using() as leaving:
                with self._changed:
                    if tier.has_room(nbytes):
                        tier.keep(room, nbytes)
                        return True
                    victim = self._victim(tier)
                    if victim is None:
                        return False
                    leaving.begin(victim)  # nobody else moves it
                self._move_down(victim, tier)

    def _victim(self, tier: MemoryTier) -> Held | None:
        """The context that leaves a tier next. With the lock held."""
        return tier.victim(lambda held: held.key not in self._flights and not (held.pinned and not self._on_disk(held.key)))

    def _on_disk(self, key: str) -> bool:
        return bool(self._try("search", lambda disk: disk.has(key)))

    def _move_down(self, victim: Held, tier: MemoryTier) -> None:
        """From the device to the host if there is room, else to disk; it stays if somebody begins to read it meanwhile.

        Outside the lock: answers go on. The caller uses the victim.
        """
        if tier is self._device and self._moved_to_host(victim):
            return
        if self._on_disk(victim.key):
            self._try("touch", lambda disk: disk.touch(victim.key))
            end = "evictions"
        else:
            end = "spills.disk" if self._stored_unless_there(victim) else "dropped"
        with self._changed:
            if victim.users == 1:
                self._counts[end] += 1
                tier.take(victim)
                if end == "dropped":
                    self._names_left(victim)

    def _moved_to_host(self, victim: Held) -> bool:
        """Whether a context was moved to the host, or need not move any more; False if there is no room for it."""
        budget = self._host.budget
        if budget is not None and victim.nbytes > budget:
            return False
        with self._room(self._host) as room:
            if not self._reserved(self._host, victim.nbytes, room):
                return False
            try:
                moved = to_host(victim.context)
            except (MemoryError, RuntimeError, OSError) as error:  # no memory for it, whatever the budget says
                if not self._on_disk(victim.key):
                    raise
                logger.warning("a context of %s bytes was not moved to the host: %s", f"{victim.nbytes:,}", error)
                return False
            with self._changed:
                if victim.users == 1:
                    victim.context = moved
                    self._host.add(victim, room)
                    self._device.take(victim)
                    self._counts["spills.host"] += 1
        return True

    def _stored_unless_there(self, held: Held) -> bool:
        """Whether a context is on disk, or was stored now.

        Under the lock of its key if that is free. Who holds it builds or writes this context, or another one that shares the lock: to
        wait for it, perhaps with a lock of our own, could be for ever, and to write a context twice does no harm.
        """
        disk = self._disk
        if disk is None:
            return False
        if disk.has(held.key):
            return True
        hold = disk.hold(held.key)
        try:
            if disk.read_only is None:
                hold.acquire()
            return disk.has(held.key) or self._store(held)
        except OSError as error:
            self._disk_failed("store", error)
            return False
        finally:
            hold.release()

    # -- the catalogue -------------------------------------------------------------------------------------------

    def contexts(self, limit: int | None = None) -> list[Entry]:
        """What is stored, in memory or on disk, the most recently used first."""
        stored = self._try("list", lambda disk: disk.entries(limit, self._mine)) or []
        return self._merged(stored, self._in_memory())[::-1][:limit]

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
        labels = [] if KEY.fullmatch(reference) else self._labels(reference)
        found: list[Entry] = []
        if len(reference) >= 8:
            stored = self._try("find", lambda disk: disk.starting_with(reference)) or []
            found = self._merged(stored, [h for h in self._in_memory() if h.key.startswith(reference)])
        return found or self._labelled(labels), {label.key: label for label in labels}

    def _labels(self, name: str) -> list[Label]:
        """What a name means, one label for each model, the last loaded last; also of contexts that are no longer stored."""
        return self._names.everyones(name) if self.tenant == EVERYONE else self._names.of(self.tenant, name)

    def _labelled(self, labels: Sequence[Label]) -> list[Entry]:
        """The contexts of names, in their order, as far as they are stored and have them still."""
        keys = [label.key for label in labels]
        stored = [entry for key in keys if (entry := self._try("find", partial(DiskTier.entry, key=key))) is not None]
        return sorted(self._merged(stored, self._in_memory(keys)), key=lambda entry: keys.index(entry.key))

    def _in_memory(self, keys: Iterable[str] | None = None) -> list[Held]:
        """Contexts in memory, of these keys or all, without those that were deleted."""
        with self._changed:
            tiers = (self._host.held, self._device.held)
            found = [h for t in tiers for h in t.values()] if keys is None else [t[k] for k in keys for t in tiers if k in t]
            return [h for h in found if h.context.key not in self._removed] if self._removed else found

    def _merged(self, stored: list[Entry], in_memory: list[Held]) -> list[Entry]:
        """Entries of the disk tier and of memory together, by their last use."""
        found, notes = {entry.key: entry for entry in stored}, self._notes()
        with self._changed:
            for held in dict.fromkeys([*self._in_memory([*found]), *in_memory]):
                entry = replace(_entry(held), tags=tuple(sorted(notes.left(held.key, held.tags))))
                on_disk = found.get(held.key)
                if on_disk:  # which may not have been told of the last use yet
                    names, tags = latest(on_disk.names, entry.names), tuple(sorted({*on_disk.tags, *entry.tags}))
                    entry = replace(on_disk, names=names, tags=tags, used=max(entry.used, on_disk.used))
                found[held.key] = entry
        return sorted(map(self._told, filter(self._mine, found.values())), key=lambda entry: entry.used)

    def _told(self, entry: Entry) -> Entry:
        """An entry with the names that are still its own, apart from those that others have now."""
        names = self._names.still(entry.tenant, entry.names, family_of(entry.identity), entry.key) if entry.names else {}
        return replace(entry, names=names, former=tuple(name for name in entry.names if name not in names))

    def _mine(self, entry: Entry) -> bool:
        return self.tenant in (EVERYONE, entry.tenant)

    def longest_prefix(
        self, model_fields: Mapping[str, Any], ids: Sequence[int], fits: Callable[[Entry], bool] = lambda entry: True
    ) -> Entry | None:
        """The context of a model with the most tokens that ``ids`` begin with, and go on after; the finest of it.

        Args:
            fits: whether a context may be used at all; one that may not makes way for a shorter one.
        """
        family, begun = family_of({**model_fields, "tenant": self.tenant}), beginnings(ids)
        with self._changed:
            near = [h for tier in (self._device, self._host) for h in tier.catalogue.begun_with(family, begun)]
            held = [_entry(h) for h in near if h.context.n_tokens < len(ids) and h.key not in self._removed]
        known = {(entry.n_tokens, entry.identity.get("tokens", "")[:8]) for entry in held}
        known |= self._try("search", lambda disk: disk.lengths(family, begun)) or set()
        tokens, hasher, done, found = np.asarray(ids, dtype=np.int32), hashlib.sha256(), 0, []
        for n in sorted({n for n, _ in known if n < len(ids)}):
            hasher.update(tokens[done:n].tobytes())
            done = n
            if (n, hasher.hexdigest()[:8]) in known:
                found.append(hasher.hexdigest())
        for digest in reversed(found):
            entries = [entry for entry in held if entry.identity.get("tokens") == digest]
            entries += self._try("search", partial(DiskTier.with_tokens, family=family, tokens=digest)) or []
            if good := [e for e in entries if not is_past(e.created, e.expires, self.ttl) and fits(e)]:
                return max(good, key=lambda entry: entry.fineness)
        return None

    def check_disk(self) -> None:
        """Raises:
        StorageError: the folder that was given cannot be used.
        OSError: what is on disk cannot be listed now.
        """
        self._check_usable()
        if self._disk is not None:
            self._disk.usage()

    def check_changeable(self) -> None:
        """To be called before several things are changed of which none may be left half done.

        Raises:
            StorageError: what is on disk cannot be changed now: another process holds the index, or the folder cannot be written or used.
        """
        self._check_usable()
        if self._disk is not None:
            self._disk.check_changeable()

    def _check_usable(self) -> None:
        """Raises:
        StorageError: a folder was given, and there is no disk tier: what is stored in it would stay as it is.
        """
        if self._folder is not None and self._disk is None:
            why = f"what lies in {self._folder} cannot be deleted or changed, and nothing was: {self.no_disk}"
            raise StorageError(f"{why}; then make the engine again")

    @property
    def is_held(self) -> bool:
        """Whether another process keeps the index of the folder locked, as of when it was last used."""
        return self._disk is not None and self._disk.is_held

    def is_empty(self) -> bool:
        """Whether no tier holds anything, of whichever tenant."""
        with self._changed:
            if self._device.held or self._host.held:
                return False
        return self._try("count", lambda disk: disk.is_empty()) is not False

    def one(self, reference: str) -> Entry:
        """The latest context of a name or key.

        Raises:
            InputError: nothing is stored under it.
        """
        found = self.find(reference)
        if not found:
            raise _not_stored(reference)
        return found[-1]

    def tiers(self, key: str) -> list[str]:
        """The tiers a context is in."""
        with self._changed:
            found = [tier.name for tier in (self._device, self._host) if key in tier.held]
        return [*found, *(["disk"] if self._try("find", lambda disk: disk.holds(key)) else [])]

    def pin(self, reference: str, pinned: bool = True) -> Entry:
        """Never lose a context: it may move down to disk, not out of it. Without a disk tier it stays in memory.

        Raises:
            InputError: nothing is stored under the reference.
            StorageError: the disk tier cannot note it now; nothing was changed.
        """
        self._check_usable()
        self.flush()
        entry = self.one(reference)

        def change(held: Held) -> None:
            held.pinned = pinned

        with self._changing(entry.key, change):
            if self._disk is not None:
                self._disk.pin(entry.key, pinned)
        return replace(entry, pinned=pinned)

    @contextmanager
    def _changing(self, key: str, change: Callable[[Held], object]) -> Iterator[None]:
        """Change a context in memory, before the block does so on disk, for it may just be being written; if that fails it is as it was."""
        with self._changed:
            before = [(held, held.pinned, dict(held.tags)) for held in self._here(key)]
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
        self._check_usable()
        self.flush()
        with self._changing(key, lambda held: held.tags.pop(tag, None)):
            if self._disk is not None:
                self._disk.untag(key, tag)

    def remove(self, reference: str) -> Entry:
        """Delete a context from every tier. One in use goes on in memory until its answer has ended.

        Whoever still has it may go on asking; it is then built for each answer and stored no more, until it is loaded again.
        A context of several names that is given by one of them only loses that name; give its key to delete it. What was loaded under the
        name before stays, and is found by its key.

        Returns:
            The context with the names that it has still, none if it was deleted.

        Raises:
            InputError: nothing is stored under the reference; a name that is left of a context is deleted.
            StorageError: as for :meth:`check_changeable`; nothing was deleted.
            OSError: its file or that of its name cannot be deleted.
        """
        self.flush()
        self.check_changeable()
        try:
            entry = self.one(reference)
        except InputError:
            for label in self._labels(reference):
                self._names.take(label.tenant, label.name, label.family, label.key)
            raise
        names = {name: time for name, time in entry.names.items() if name != reference}
        if names and reference in entry.names:
            self._unname(entry, reference)
            return replace(entry, names=names)
        with self._deleting(entry.key):
            if self._disk is not None:
                self._disk.remove(entry.key, for_good=True)
        with self._changed:
            self._untold.pop(entry.key, None)
            for held in self._here(entry.key):
                held.names, held.tags, held.pinned = {}, {}, False  # of one that is loaded again while it is still in use
        for label in [label for label in self._names.all() if label.key == entry.key]:
            self._names.take(label.tenant, label.name, label.family, label.key)
        self._try("clean", lambda disk: disk.clean(entry.key))
        return replace(entry, names={})

    def _here(self, key: str) -> list[Held]:
        """A context as it is in memory. With the lock held."""
        return [tier.held[key] for tier in (self._device, self._host) if key in tier.held]

    @contextmanager
    def _deleting(self, key: str) -> Iterator[None]:
        """Drop a context from memory when the block has deleted it on disk; whoever loads it from the block's beginning on has it stored.

        When the block fails the context stays, and what it has deleted is written again.
        """
        with self._changed:
            self._removed.add(key)
        try:
            yield
        except BaseException:
            self.readmit(key)
            self._write_again(key)
            raise
        with self._changed:
            for held in self._here(key) if key in self._removed else ():
                if not held.users:
                    self._drop(held)
            self._changed.notify_all()

    def _write_again(self, key: str) -> None:
        """Store a context that is in memory, if its file is not there."""
        for held in [] if self._on_disk(key) else self._in_memory([key]):
            held.stored = None
            self._write_behind(held)

    def leave(self, key: str, tags: Collection[str]) -> bool:
        """Take tags from a context, and delete it if nobody else holds it, by a name, a pin or another tag; whether it was deleted.

        Raises:
            StorageError: another process holds the index of the folder; nothing was deleted.
            OSError: its file cannot be deleted.
        """

        def let_go(key: str, tag: str) -> bool:
            return tag in tags

        self.flush()
        notes = self._notes()
        with self._changed:
            here = self._in_memory([key])
            rest = [notes.left(key, held.tags).keys() - set(tags) for held in here]
            stays = any(is_held(self._told(_entry(h)).names, h.pinned, left) for h, left in zip(here, rest, strict=True))
        if key in self._untold:
            names, told = self._untold[key]
            self._untold[key] = names, {tag: given for tag, given in told.items() if tag not in tags}
        with self._deleting(key):
            deleted = not stays if self._disk is None else self._disk.let_go(key, let_go, stays)
            if not deleted:
                self.readmit(key)
        with self._changed:
            for held in here:
                held.tags = {tag: given for tag, given in held.tags.items() if tag not in tags}
        if deleted and not self.is_removed(key):  # loaded meanwhile
            self._write_again(key)
        return deleted

    def forget(self, let_go: LetGo) -> Forgotten:
        """Take the tags that are let go of from all contexts, and delete those that nobody else holds, by a name, a pin or another tag.

        Of these neither text, ids nor pairs are left in the folder or, once answers from them have ended, in memory. A process that has
        one in its memory answers from it until it leaves that, and does not write it again.

        Raises:
            StorageError: as for :meth:`check_changeable`; nothing was deleted.
            OSError: a file cannot be deleted; those before it were.
        """
        self.flush()
        self.check_changeable()
        named = {label.key for label in self._names.all()}
        deleted, kept = self._disk.forget(let_go, self._mine, named) if self._disk is not None else ([], [])
        notes = self._notes()  # also of what others have forgotten
        gone, stays = {entry.key: entry for entry in deleted}, {entry.key: entry for entry in kept}
        again = list[Held]()
        with self._changed:
            self._changed.wait_for(lambda: not gone.keys() & self._flights.keys(), self._wait_s)  # on the way to another tier
            for held in [held for tier in (self._device, self._host) for held in tier.held.values()]:
                entry = _entry(held)
                left = notes.left(held.key, held.tags)
                rest = without(tuple(left), held.key, let_go)
                if not self._mine(entry) or (len(rest) == len(entry.tags) and held.key not in gone):
                    continue
                held.tags = {tag: left[tag] for tag in rest}
                if held.key in named or is_held(self._told(entry).names, held.pinned and held.key not in gone, held.tags):
                    if gone.pop(held.key, None) is not None:  # somebody has got it in memory, while its file was being deleted
                        again.append(held)
                    stays[held.key] = entry
                elif held.key not in stays:  # only in memory
                    gone[held.key] = entry
            for held in [held for tier in (self._device, self._host) for held in tier.held.values() if held.key in gone]:
                if not held.users:
                    self._drop(held)
            self._removed |= gone.keys()
            self._unstored -= gone.keys()
            self._changed.notify_all()
        for held in again:
            held.stored = None
            self._write_behind(held)
        self.flush()
        if self._disk is not None:  # what was being written meanwhile
            self._disk.forget_again(gone, let_go)
        return Forgotten(tuple(gone.values()), tuple(stays.values()))

    def join(self, key: str, tags: Sequence[str]) -> None:
        """Hold a context by further tags, if it has any and has room for more. One without is whoever's has loaded it, and not to be
        forgotten by one that has found it."""
        with self._changed:
            here = self._here(key)
        entry = None if here else self._try("read", lambda disk: disk.entry(key))
        known = {tag for held in [*here, *([entry] if entry else [])] for tag in held.tags}
        if not known or not has_room(known, tags):
            return
        with self._changed:
            for held in here:
                held.tags |= dict.fromkeys(tags, time.time())
        self._touch_behind(key, tags=tags)

    def _unname(self, entry: Entry, name: str) -> None:
        key = entry.key
        if self._disk is not None:
            self._disk.unname(key, name)
        self._names.take(entry.tenant, name, family_of(entry.identity), entry.key)
        with self._changed:
            for held in self._here(key):
                held.names = {other: time for other, time in held.names.items() if other != name}

    def is_removed(self, key: str) -> bool:
        """Whether a context was deleted here and not loaded again."""
        return key in self._removed

    def readmit(self, key: str) -> None:
        """A context that was deleted may be stored again."""
        with self._changed:
            self._removed.discard(key)

    def verify(self, reference: str) -> str | None:
        """Check every byte of a stored context: None if it is sound, else what is wrong; it is in quarantine then."""
        self.flush()
        entry = self.one(reference)
        return self._disk.verify(entry.key) if self._disk is not None else None

    def gc(self) -> dict[str, int]:
        """Delete from disk what is expired or quarantined, but not another tenant's, orphaned, or left by killed processes.

        Raises:
            StorageError: as for :meth:`check_changeable`, and nothing was deleted; or a file cannot be, and those before it were.
        """
        self.check_changeable()
        if self._disk is None:
            return {}
        with usable(self._disk.root):
            return self._disk.gc()

    def quarantine(self) -> list[dict[str, Any]]:
        """Files that failed their checks: key, file, nbytes, reason, time, tenant. Whose is not known is told to operators only."""
        return self._try("list", lambda disk: disk.quarantine()) or []

    def stats(self) -> dict[str, Any]:
        """Bytes, budgets and contexts of every tier, and what has happened since the registry was made.

        ``lookups`` is the sum of ``hits`` over the tiers and ``built``; ``misses`` counts builds by the first field
        that differed. Bytes and contexts on disk are those of the folder, which all tenants share as they do its budget; where a folder
        that was given cannot be used they are 0, and ``unusable`` says why.
        """
        with self._changed:
            counts = Counter(self._counts)
            tiers: dict[str, dict[str, Any]] = {
                tier.name: {"nbytes": tier.nbytes, "budget": tier.budget, "contexts": len(tier.held)} for tier in (self._device, self._host)
            }
        if self._disk is not None:
            usage = self._try("measure", lambda disk: disk.usage())
            tiers["disk"] = {"nbytes": usage, "budget": self._disk.budget, "contexts": self._try("count", lambda disk: disk.count())}
        elif self._folder is not None:
            tiers["disk"] = {"nbytes": 0, "budget": self._disk_bytes, "contexts": 0, "unusable": self.no_disk}
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
        """Wait until everything built so far is on disk, as far as that can be."""
        if self._disk is not None:
            with self._changed:
                self._store_later([held for key in [*self._unstored] for held in self._here(key)])
            with suppress(RuntimeError):  # closed meanwhile
                self._writer.submit(self._tell).result()  # one thread, in order

    def close(self) -> None:
        """Flush and let go of the folder. What is in memory stays usable, what is built from now on stays there.

        An index that another process holds is waited for a second; a warning says how many contexts are then not on disk. A process that
        was forked has nothing to close.
        """
        if is_parents(self):
            return
        if self._disk is not None:
            self._store_later([held for held in self._in_memory() if held.pinned and not self._on_disk(held.key)])
        self.flush()
        if self._unstored:
            logger.warning("%d contexts are not on disk, as another process holds the index", len(self._unstored))
        disk, self._disk, self.no_disk = self._disk, None, "the registry was closed"
        if disk is not None:
            self._writer.submit(disk.close)  # SQLite's connections belong to their threads
            disk.close()
        self._writer.shutdown()

    # -- small things --------------------------------------------------------------------------------------------

    def _annotate(self, held: Held, wanted: Wanted) -> None:
        """Give a context the name and tags it was asked for by, beside those it has."""
        if wanted.loaded is not None:  # an answer
            return
        names, label = {}, None
        if wanted.name is not None:
            told = tuple((source.name, source.metadata) for source in wanted.sources)
            identity = wanted.identity
            label = self._names.give(Label(wanted.name, identity.get("tenant"), family_of(identity), held.key, sources=told))
            names = {label.name: label.loaded}
        with self._changed:
            held.loaded = time.time()
            held.tags |= dict.fromkeys(wanted.tags, held.loaded)
            held.names = held.names | names
        self._touch_behind(held.key, names, wanted.tags, label)

    def _touch_behind(
        self, key: str, names: Mapping[str, float] | None = None, tags: Sequence[str] = (), label: Label | None = None
    ) -> None:
        """Tell the disk tier, behind the answer, that a context was loaded, and what names and tags it has got."""
        now = time.time()

        def touch() -> None:
            if label is not None:
                self._try("name", lambda disk: disk.names.write(label))
            entry = self._try("read", lambda disk: disk.entry(key)) if tags else None
            if names or (tags and (entry is None or not set(tags) <= set(entry.tags))):
                self._touch(key, names or {}, dict.fromkeys(tags, now))
            for held in [] if self._on_disk(key) else self._in_memory([key]):  # it may have been deleted there meanwhile
                if names or tags or held.stored is not None:
                    with self._using() as use:
                        with self._changed:
                            use.begin(held)
                        self._stored_unless_there(held)

        if self._disk is not None:
            with suppress(RuntimeError):  # closed meanwhile
                self._writer.submit(touch)

    def _touch(self, key: str, names: Mapping[str, float], tags: Mapping[str, float]) -> None:
        """What cannot be told now is told by the next touch or flush, unless it is forgotten before. In the writer's thread."""
        told_names, told_tags = self._untold.get(key, ({}, {}))
        self._untold[key] = names, tags = latest(told_names, names), latest(told_tags, tags)

        def tell(disk: DiskTier) -> None:
            disk.touch(key, names=names, tags=disk.notes().left(key, tags) if tags else ())
            del self._untold[key]

        self._try("touch", tell)

    def _tell(self) -> None:
        """Write down the names, and what contexts have got, that could not be written before. In the writer's thread."""
        self._try("name", lambda disk: disk.names.write_all())
        for key in [*self._untold]:
            self._touch(key, {}, {})

    def _notes(self) -> Notes:
        """What was forgotten, as far as it can be read."""
        return self._try("read", lambda disk: disk.notes()) or Notes(None)

    def _try(self, what: str, use: Callable[[DiskTier], Any]) -> Any:
        """Use the disk tier; None, a warning and a counter if it fails, None if there is none."""
        if self._disk is None:
            return None
        try:
            return use(self._disk)
        except OSError as error:
            self._disk_failed(what, error)
            return None

    def _disk_failed(self, what: str, error: Exception) -> None:
        self._count("disk_errors")
        reason = re.sub(r"[0-9a-f]{64}|\d+", "", str(error))
        if reason not in self._warned:  # once for each reason, not for each context
            self._warned.add(reason)
            logger.warning("disk tier: cannot %s: %s; contexts are served from memory", what, self._without_keys(error))

    def _without_keys(self, error: Exception) -> str:
        """It may be of any tenant's file that lies in the folder."""
        return str(error) if self.tenant == EVERYONE else without_keys(str(error))

    def _count(self, what: str, n: int = 1) -> None:
        with self._changed:
            self._counts[what] += n


def _entry(held: Held) -> Entry:
    context = held.context
    return Entry(
        context.key,
        context.identity,
        held.group,
        0,
        held.nbytes,
        context.n_tokens,
        context.ratio,
        held.names,
        tuple(sorted(held.tags)),
        held.pinned,
        context.created,
        held.used,
        context.expires,
        context.coarsest,
    )


def check_text(name: str) -> None:
    """Raises:
    InputError: a name or tag that cannot be stored, such as a file's that is not UTF-8, or one that is too long.
    """
    try:
        if len(name) > LONGEST_NAME:
            raise InputError(f"the name or tag {name[:80]!r}... has {len(name):,} characters; give one of at most {LONGEST_NAME:,}")
        name.encode()
    except (UnicodeEncodeError, AttributeError, TypeError):
        raise InputError(f"{name!r} is not text that can be stored; give another name") from None


def check_tag(tag: str) -> None:
    """Raises:
    InputError: a tag that cannot be stored, or of which a part cannot, see :func:`check_text`; or one that is longer than all may be.
    """
    for part in tag.split(JOINT) if isinstance(tag, str) else [tag]:
        check_text(part)
    if len(tag) > LARGEST_HOLDERS:
        raise InputError(
            f"the tag {tag[:80]!r}... has {len(tag):,} characters; a context's may have {LARGEST_HOLDERS:,}: load fewer documents"
        )


def check_name(name: str) -> None:
    """Raises:
    InputError: a name that cannot be stored, see :func:`check_text`, that is empty, or that is a whole key, in whichever case: it would be
        found in the place of a context of that key.
    """
    check_text(name)
    if not name:
        raise InputError("the name is empty; give a text, or None for none")
    if KEY.fullmatch(name.lower()):
        raise InputError(f"the name {name!r} has the form of a key; put something before its 64 digits")


def check_ttl(ttl: float | None) -> float | None:
    """A ``ttl`` as it was given.

    Raises:
        InputError: no number of seconds above 0 and up to :data:`TTL_LIMIT`.
    """
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= TTL_LIMIT:
        raise InputError(f"ttl is {printable(repr(ttl)[:80])}; give seconds above 0, at most {TTL_LIMIT:,} (100 years), or None for never")
    return ttl


def _not_stored(reference: str) -> InputError:
    return InputError(f"no context {reference!r} is stored; give a name, a key, or the first 8 digits of a key at least")


_UNITS = {"": 1, **{f"{p}{b}": (1024 if b == "ib" else 1000) ** i for i, p in enumerate("kmgt", 1) for b in ("", "b", "ib")}, "b": 1}


def parse_bytes(name: str, size: int | str | None) -> int | None:
    """Bytes of ``4_000_000``, ``"4GB"`` (powers of 1000) or ``"4GiB"`` (of 1024); None stays None.

    Raises:
        InputError: no size.
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*([\d_]*\.?\d+)\s*([a-z]*)\s*", str(size).lower())
    if match is None or match[2] not in _UNITS:
        raise InputError(f'{name} is {size!r}; give bytes as a number or a size such as "4GiB"')
    return int(float(match[1].replace("_", "")) * _UNITS[match[2]])
