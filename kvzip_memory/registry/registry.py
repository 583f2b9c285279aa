"""The registry: finds contexts, has them built once, and places them in tiers: device, host, disk."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from kvzip_memory import calls
from kvzip_memory.calls import Left
from kvzip_memory.compression.shrink import shrink
from kvzip_memory.context import CompressedContext, Lease, Receipt
from kvzip_memory.errors import BudgetError, InputError
from kvzip_memory.forks import is_parents, refuse_after_fork
from kvzip_memory.locks import Notice
from kvzip_memory.locks import held as holding
from kvzip_memory.registry.disk import DiskTier, Entry, NotStoredError, latest
from kvzip_memory.registry.identity import explain, family_of, only_ratio_differs
from kvzip_memory.registry.index import IndexHeldError
from kvzip_memory.registry.memory import Held, MemoryTier, to_device, to_host
from kvzip_memory.sharing import Shared

logger = logging.getLogger(__name__)

#: Called by a build: stage, tokens done, tokens in all.
Report = Callable[[str, int, int], None]
Build = Callable[[Report], CompressedContext]

#: The tenant of operators: lists and finds the contexts of all.
EVERYONE = "*"

_POLL_S = 0.05


@dataclass(frozen=True)
class Wanted:
    """A context that is asked for.

    Attributes:
        key: its key.
        identity: the fields the key was made of.
        group: digest of the text and the tenant: what the nearest stored context is looked for by.
        name: alias to give it.
        tags: free words to give it.

    Raises:
        InputError: a name or tag that cannot be stored.
    """

    key: str
    identity: Mapping[str, Any]
    group: str
    name: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in (self.name or "", *self.tags):
            check_text(text)


@dataclass
class _Flight:
    """A context on its way to the device: one thread brings it, others wait."""

    progress: tuple[str, int, int] = ("", 0, 0)
    error: Exception | None = None
    waiters: set[object] = field(default_factory=set)

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
        ttl: seconds after which a context is no longer used, None for never.
        wait_s: seconds to wait for room while other answers use all of a tier.
        tenant: digest of the tenant whose contexts are listed and found by name; :data:`EVERYONE` for operators.
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
    ) -> None:
        self.tenant = tenant
        self.device, self.ttl, self._wait_s = device, ttl, wait_s
        self._device = MemoryTier("device", parse_bytes("device_bytes", device_bytes))
        self._host = MemoryTier("host", parse_bytes("host_bytes", host_bytes))
        self._changed = threading.Condition()
        self._flights: dict[str, _Flight] = {}
        self._removed: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kvzip-disk")
        self._warned: set[str] = set()
        self._unstored: set[str] = set()  # keys of contexts that could not be stored when they were built
        self._disk: DiskTier | None = None
        self.no_disk = None if folder else "no cache_dir was given"
        refuse_after_fork(self, "_changed", "_writer", "_disk")
        budget = parse_bytes("disk_bytes", disk_bytes)
        if folder is not None:
            try:
                self._disk = DiskTier(folder.expanduser().absolute(), budget)
            except OSError as error:
                self.no_disk = str(error)
                self._disk_failed("open", error)

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
        """
        story = _Story()
        with ExitStack() as leased:
            held = self._resident(wanted.key)
            if held is None:
                with calls.waiting():
                    held = self._acquire(wanted, build, waiting or (lambda *progress: None), story)
                    leased.callback(self._let_go, held)
            else:
                leased.callback(self._let_go, held)
                story.tier, story.ms["wait"] = "device", 0.0
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

    def _let_go(self, held: Held) -> None:
        with self._changed:
            held.users -= 1
            if held.key in self._removed and not held.users:
                self._drop(held)
            self._changed.notify_all()

    def _resident(self, key: str) -> Held | None:
        """A context that is on the device, in use from now on."""
        with self._changed:
            held = self._device.held.get(key)
            if held is None or not self._alive(held):
                return None
            held.users += 1
            held.used = time.time()
            self._device.held.move_to_end(key)
            self._counts["hits.device"] += 1
            return held

    def _acquire(self, wanted: Wanted, build: Build, waiting: Report, story: _Story) -> Held:
        """A context in use from now on, once it is on the device."""
        began, me = time.perf_counter(), object()
        flight: _Flight | None = None
        try:
            while True:
                calls.check()
                with self._changed:
                    if (held := self._resident(wanted.key)) is not None:
                        story.tier, story.ms["wait"] = "device", 1e3 * (time.perf_counter() - began)
                        return held
                    flight = self._flights.get(wanted.key)
                    if flight is None:
                        mine = self._flights[wanted.key] = _Flight()
                        break
                    flight.waiters.add(me)
                    self._changed.wait(calls.LOOK_S)
                    error = flight.error
                waiting(*flight.progress)
                if error is not None:
                    raise error
        finally:
            if flight is not None:
                flight.waiters.discard(me)
        with calls.within(left=mine.unwanted(calls.left())):
            return self._fly(mine, wanted, build, waiting, story)

    def _alive(self, held: Held) -> bool:
        """False, and gone, if it has expired. With the lock held."""
        if held.expires is None or held.expires >= time.time() or held.users:
            return True
        self._drop(held)
        return False

    def _drop(self, held: Held) -> None:
        """Let go of a context in memory, if it is still there. With the lock held."""
        for tier in (self._device, self._host):
            if tier.held.get(held.key) is held:
                tier.take(held.key)
                tier.reserved -= held.nbytes

    def _fly(self, flight: _Flight, wanted: Wanted, build: Build, waiting: Report, story: _Story) -> Held:
        try:
            held = self._bring(flight, wanted, build, waiting, story)
        except BaseException as error:
            with self._changed:
                flight.error = error if isinstance(error, Exception) else None  # after a KeyboardInterrupt the next one tries
                del self._flights[wanted.key]
                self._changed.notify_all()
            raise
        with self._changed:
            held.users += 1
            self._device.add(held)
            self._counts[story.tier if story.tier == "built" else f"hits.{story.tier}"] += 1
            del self._flights[wanted.key]
            self._changed.notify_all()
        return held

    def _bring(self, flight: _Flight, wanted: Wanted, build: Build, waiting: Report, story: _Story) -> Held:
        """The context on the device, its bytes reserved there."""
        began = time.perf_counter()
        try:
            if (held := self._from_host(wanted.key)) is not None:
                story.tier = "host"
                return held
            if (held := self._from_disk(wanted, story)) is not None:
                return held
            if (context := self._from_finer(wanted, story)) is not None:
                return self._admitted(wanted, context)
        finally:
            story.ms["load"] = 1e3 * (time.perf_counter() - began)
        return self._built(flight, wanted, build, waiting, story)

    def _admitted(self, wanted: Wanted, context: CompressedContext) -> Held:
        """A context that was just built, moved to the device."""
        self._reserve(self._device, context.nbytes)
        return self._moved_in(wanted, context)

    def _moved_in(self, wanted: Wanted, context: CompressedContext, entry: Entry | None = None) -> Held:
        """A context on the device, where its bytes are reserved."""
        try:
            moved = to_device(context, self.device)
        except BaseException:
            self._unreserve(self._device, context.nbytes)
            raise
        if entry is not None:
            return Held(moved, wanted.group, dict(entry.names), entry.tags, pinned=entry.pinned, expires=entry.expires)
        expires = None if self.ttl is None else time.time() + self.ttl
        names = {} if wanted.name is None else {wanted.name: time.time()}
        return Held(moved, wanted.group, names, wanted.tags, expires=expires)

    def _from_host(self, key: str) -> Held | None:
        with self._changed:
            held = self._host.held.get(key)
            if held is None or not self._alive(held):
                return None
            self._host.take(key)
        try:
            self._reserve(self._device, held.nbytes)
        except BaseException:
            with self._changed:
                self._host.add(held)
            raise
        moved = to_device(held.context, self.device)
        self._unreserve(self._host, held.nbytes)
        held.context = moved
        self._count("promotions")
        return held

    def _from_disk(self, wanted: Wanted, story: _Story) -> Held | None:
        if self._disk is None:
            story.reason = f"there is no disk tier ({self.no_disk})"
            return None
        before, reserved = self._disk.quarantined, 0

        def admit(nbytes: int) -> None:  # once the file has told its size, before its pairs are read
            nonlocal reserved
            self._reserve(self._device, nbytes)
            reserved = nbytes

        try:
            context = self._disk.get(wanted.key, self.device, admit)  # layer by layer, each uploaded while the next is read
        except BaseException as error:
            self._unreserve(self._device, reserved)
            if not isinstance(error, NotStoredError):
                raise
            story.reason = str(error)
            self._count("quarantined", self._disk.quarantined - before)
            return None
        story.tier, story.reason, story.differs = "disk", None, ()
        held = self._moved_in(wanted, context, self._try("read", lambda disk: disk.entry(wanted.key)))
        self._touch_behind(wanted.key)
        return held

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
        with self._changed:
            for tier in (self._device, self._host):
                if (held := tier.held.get(key)) is not None and self._alive(held):
                    held.users += 1
                    break
            else:
                held = None
        if held is None:
            context = None
            if self._disk is not None:
                with suppress(NotStoredError):
                    context = self._disk.get(key, torch.device("cpu"))
            yield context, "disk"
            return
        try:
            yield held.context, tier.name
        finally:
            with self._changed:
                held.users -= 1
                self._changed.notify_all()

    def _near(self, wanted: Wanted) -> list[tuple[str, Mapping[str, Any]]]:
        """Keys and identities of the stored contexts of the same text and tenant."""
        with self._changed:
            held = [h for tier in (self._device, self._host) for h in tier.held.values()]
            found = {h.key: h.context.identity for h in held if h.group == wanted.group}
        for entry in self._try("search", lambda disk: disk.group(wanted.group)) or ():
            found.setdefault(entry.key, entry.identity)
        found.pop(wanted.key, None)
        return list(found.items())

    def _named_identities(self, wanted: Wanted) -> list[Mapping[str, Any]]:
        """Identities of the tenant's contexts that have the wanted name."""
        return [] if wanted.name is None else [entry.identity for entry in self.find(wanted.name)]

    # -- building ------------------------------------------------------------------------------------------------

    def _built(self, flight: _Flight, wanted: Wanted, build: Build, waiting: Report, story: _Story) -> Held:
        """Build, unless another process does so first; its writing to disk goes on behind the answer."""
        lock, found = self._builders_lock(wanted, waiting, story)
        if found is not None:
            return found
        last_note = 0.0

        def report(stage: str, done: int, total: int) -> None:
            nonlocal last_note
            flight.progress = (stage, done, total)
            if lock is not None and self._disk is not None and time.monotonic() - last_note > 0.5:
                last_note = time.monotonic()
                self._disk.report(wanted.key, {"stage": stage, "done": done, "total": total})

        handed_over = False
        try:
            context = build(report)
            story.ms |= dict(context.receipt.ms) if context.receipt else {}
            held = self._admitted(wanted, context)
            if lock is not None:
                self._write_behind(held, lock)
                handed_over = True
            return held
        finally:
            if lock is not None and not handed_over:
                lock.release()

    def _builders_lock(self, wanted: Wanted, waiting: Report, story: _Story) -> tuple[FileLock | None, Held | None]:
        """The lock of a key, once nobody else holds it; or the context, if another process built it meanwhile.

        A lock goes with the process that held it: a dead builder is replaced at the next look.
        """
        if self._disk is None:
            return None, None
        began = time.perf_counter()
        lock = self._disk.lock(wanted.key)
        notice = Notice("waiting for another process that builds or writes context %s, or one whose lock it shares", wanted.key[:12])
        try:
            while True:
                calls.check()
                with suppress(Timeout):
                    lock.acquire(timeout=0)
                if self._disk.has(wanted.key) and (held := self._from_disk(wanted, story)) is not None:
                    lock.release()
                    return None, held
                if lock.is_locked:
                    return lock, None
                notice.look()
                note = self._disk.reported(wanted.key) or {}
                waiting(str(note.get("stage", "waiting")), int(note.get("done", 0)), int(note.get("total", 0)))
                time.sleep(_POLL_S)
        except OSError as error:
            self._disk_failed("lock", error)
            return None, None
        except BaseException:
            lock.release()
            raise
        finally:
            story.ms["wait"] = 1e3 * (time.perf_counter() - began)

    def _write_behind(self, held: Held, lock: FileLock) -> None:
        """Store a context in the background. It stays in memory until that is done, and the lock is held."""
        held.users += 1

        def write() -> None:
            try:
                if not self.is_removed(held.key):
                    self._store(held)
            finally:
                lock.release()
                self._let_go(held)

        try:
            self._writer.submit(write)
        except RuntimeError:  # closed meanwhile: it stays in memory
            lock.release()
            self._let_go(held)

    def _store_later(self, unstored: Sequence[Held]) -> None:
        """Try again, in the background, to store contexts for which the index was not free. With them in use, or the lock held."""
        with self._changed:
            for held in unstored:
                self._unstored.discard(held.key)
                held.users += 1

        def write(held: Held) -> None:
            try:
                if not self.is_removed(held.key):
                    self._stored_under_lock(held)
            finally:
                self._let_go(held)

        for held in unstored:
            try:
                self._writer.submit(write, held)
            except RuntimeError:  # closed meanwhile
                self._let_go(held)

    def _store(self, held: Held) -> bool:
        """Write a context to the disk tier; False, a warning and a counter if that fails."""
        ttl = None if held.expires is None else max(0.0, held.expires - time.time())
        began = time.perf_counter()
        try:
            if self._disk is None:
                return False
            self._disk.check_free()  # before anything is copied
            self._disk.put(to_host(held.context), held.group, names=held.names, tags=held.tags, ttl=ttl)
        except (OSError, BudgetError) as error:
            self._disk_failed("store", error)
            if isinstance(error, IndexHeldError):
                self._unstored.add(held.key)
            return False
        self._unstored.discard(held.key)
        self._count("stored")
        self._count("stored.ms", round(1e3 * (time.perf_counter() - began)))
        return True

    # -- room ----------------------------------------------------------------------------------------------------

    def check_fits(self, nbytes: int) -> None:
        """Raises:
        BudgetError: a context of so many bytes could never be on the device.
        """
        budget = self._device.budget
        if budget is not None and nbytes > budget:
            raise BudgetError(
                f"the context takes about {nbytes:,} bytes; device_bytes is {budget:,}: raise it, keep a smaller ratio, or load less"
            )

    def _reserve(self, tier: MemoryTier, nbytes: int) -> None:
        """Make room in a tier, moving down what was used longest ago; waits while answers use all of it."""
        if tier is self._device:
            self.check_fits(nbytes)
        deadline = time.monotonic() + self._wait_s
        notice = Notice("waiting for room for %s bytes in the %s tier, all of which answers use", f"{nbytes:,}", tier.name)
        while True:
            calls.check()
            with self._changed:
                if tier.has_room(nbytes):
                    tier.reserved += nbytes
                    return
                victim = self._taken(tier)
                if victim is None:
                    remaining = deadline - time.monotonic()
                    users = sum(held.users > 0 for held in tier.held.values())
                    if remaining <= 0 or (users == 0 and len(self._flights) <= 1):
                        raise BudgetError(
                            f"no room for {nbytes:,} bytes in the {tier.name} tier: {users} contexts in use and "
                            f"{sum(held.pinned for held in tier.held.values())} pinned take {tier.nbytes:,} of {tier.budget:,} bytes "
                            f"(waited {self._wait_s:g} s); end some answers, unpin, or raise {tier.name}_bytes"
                        )
                    notice.look()
                    self._changed.wait(min(remaining, calls.LOOK_S))
                    continue
            self._move_down(victim, tier)

    def _unreserve(self, tier: MemoryTier, nbytes: int) -> None:
        with self._changed:
            tier.reserved -= nbytes
            self._changed.notify_all()

    def _taken(self, tier: MemoryTier) -> Held | None:
        """A victim, out of its tier and in flight. With the lock held."""
        victim = tier.victim(lambda held: held.key not in self._flights and not (held.pinned and not self._on_disk(held.key)))
        if victim is not None:
            tier.take(victim.key)
            self._flights[victim.key] = _Flight()
        return victim

    def _on_disk(self, key: str) -> bool:
        return bool(self._try("search", lambda disk: disk.has(key)))

    def _move_down(self, victim: Held, tier: MemoryTier) -> None:
        """From the device to the host if there is room, else to disk. Outside the lock: answers go on meanwhile."""
        try:
            if tier is self._device and self._room_on_host(victim.nbytes):
                victim.context = to_host(victim.context)
                with self._changed:
                    self._host.add(victim)
                    self._counts["spills.host"] += 1
            elif self._on_disk(victim.key):
                self._try("touch", lambda disk: disk.touch(victim.key))
                self._count("evictions")
            elif self._disk is not None and self._stored_under_lock(victim):
                self._count("spills.disk")
            else:
                self._count("dropped")
        finally:
            with self._changed:
                tier.reserved -= victim.nbytes
                del self._flights[victim.key]
                self._changed.notify_all()

    def _stored_under_lock(self, held: Held) -> bool:
        assert self._disk is not None
        try:
            with holding(self._disk.lock(held.key), f"building or writing context {held.key[:12]}", self._wait_s):
                return self._disk.has(held.key) or self._store(held)
        except (OSError, Timeout) as error:
            self._disk_failed("store", error)
            return False

    def _room_on_host(self, nbytes: int) -> bool:
        """Reserve host bytes, moving older ones to disk; False if there is no room without waiting."""
        budget = self._host.budget
        if budget is not None and nbytes > budget:
            return False
        while True:
            with self._changed:
                if self._host.has_room(nbytes):
                    self._host.reserved += nbytes
                    return True
                victim = self._taken(self._host)
                if victim is None:
                    return False
            self._move_down(victim, self._host)

    # -- the catalogue -------------------------------------------------------------------------------------------

    def contexts(self, limit: int | None = None) -> list[Entry]:
        """What is stored, in memory or on disk, the most recently used first."""
        stored = self._try("list", lambda disk: disk.entries(limit, self._mine)) or []
        return self._merged(stored, lambda held: True)[::-1][:limit]

    def find(self, reference: str) -> list[Entry]:
        """Contexts by name, the last one loaded under it last, or by key or its beginning (8 digits at least), the last used last.

        Raises:
            InputError: the reference is no text.
        """
        check_text(reference)
        by_key = len(reference) >= 8
        stored = (by_key and self._try("find", lambda disk: disk.starting_with(reference))) or []
        if not stored:
            stored = self._try("find", lambda disk: self._named(disk, reference)) or []
        found = self._merged(stored, lambda held: reference in held.names or (by_key and held.key.startswith(reference)))
        return sorted(found, key=lambda entry: entry.names[reference]) if all(reference in entry.names for entry in found) else found

    def _merged(self, stored: list[Entry], wanted: Callable[[Held], bool]) -> list[Entry]:
        """Entries of the disk tier and of memory together, by their last use."""
        found = {entry.key: entry for entry in stored}
        with self._changed:
            for held in [
                h
                for tier in (self._host, self._device)
                for h in tier.held.values()
                if h.key in found or (wanted(h) and h.key not in self._removed)
            ]:
                entry = _entry(held)
                on_disk = found.get(held.key)
                if on_disk:  # which may not have been told of the last use yet
                    names, tags = latest(on_disk.names, entry.names), tuple(sorted({*on_disk.tags, *entry.tags}))
                    entry = replace(on_disk, names=names, tags=tags, used=max(entry.used, on_disk.used))
                found[held.key] = entry
        return sorted(filter(self._mine, found.values()), key=lambda entry: entry.used)

    def _named(self, disk: DiskTier, name: str) -> list[Entry]:
        if self.tenant != EVERYONE:
            return disk.named(name, self.tenant)
        return disk.named(name) or disk.entries(None, lambda entry: name in entry.names)[::-1]

    def _mine(self, entry: Entry) -> bool:
        return self.tenant in (EVERYONE, entry.tenant)

    def longest_prefix(self, model_fields: Mapping[str, Any], ids: Sequence[int]) -> Entry | None:
        """The context of a model with the most tokens that ``ids`` begin with, and go on after; the largest ratio of it.

        On disk the latest 4,096 contexts of a model are looked at.
        """
        with self._changed:
            held = [_entry(h) for tier in (self._device, self._host) for h in tier.held.values() if h.context.n_tokens < len(ids)]
        family = family_of({**model_fields, "tenant": self.tenant})
        held = [entry for entry in held if family_of(entry.identity) == family]
        known = {(entry.n_tokens, entry.identity.get("tokens", "")[:8]) for entry in held}
        known |= self._try("search", lambda disk: disk.lengths(family)) or set()
        tokens, hasher, done, found = np.asarray(ids, dtype=np.int32), hashlib.sha256(), 0, []
        for n in sorted({n for n, _ in known if n < len(ids)}):
            hasher.update(tokens[done:n].tobytes())
            done = n
            if (n, hasher.hexdigest()[:8]) in known:
                found.append(hasher.hexdigest())
        for digest in reversed(found):
            entries = [entry for entry in held if entry.identity.get("tokens") == digest]
            entries += self._try("search", partial(DiskTier.with_tokens, family=family, tokens=digest)) or []
            if usable := [entry for entry in entries if not entry.expired]:
                return max(usable, key=lambda entry: entry.ratio)
        return None

    def check_disk(self) -> None:
        """Raises:
        OSError: what is on disk cannot be listed now.
        """
        if self._disk is not None:
            self._disk.usage()

    def check_changeable(self) -> None:
        """To be called before several things are changed of which none may be left half done.

        Raises:
            StorageError: what is on disk cannot be changed now, as another process holds the index.
        """
        if self._disk is not None:
            self._disk.check_changeable()

    @property
    def is_held(self) -> bool:
        """Whether another process keeps the index of the folder locked, as of when it was last used."""
        return self._disk is not None and self._disk.is_held

    def is_empty(self) -> bool:
        """Whether no tier holds anything."""
        with self._changed:
            if self._device.held or self._host.held:
                return False
        return not self._try("count", lambda disk: disk.count())

    def one(self, reference: str) -> Entry:
        """The latest context of a name or key.

        Raises:
            InputError: nothing is stored under it.
        """
        found = self.find(reference)
        if not found:
            raise InputError(f"no context {reference!r} is stored; give a name, a key, or the first 8 digits of a key at least")
        return found[-1]

    def tiers(self, key: str) -> list[str]:
        """The tiers a context is in."""
        with self._changed:
            found = [tier.name for tier in (self._device, self._host) if key in tier.held]
        return [*found, *(["disk"] if self._try("find", lambda disk: disk.has(key)) else [])]

    def pin(self, reference: str, pinned: bool = True) -> Entry:
        """Never lose a context: it may move down to disk, not out of it. Without a disk tier it stays in memory.

        Raises:
            InputError: nothing is stored under the reference.
            StorageError: the disk tier cannot note it now; nothing was changed.
        """
        self.flush()
        entry = self.one(reference)
        if self._disk is not None:
            self._disk.pin(entry.key, pinned)
        with self._changed:
            for tier in (self._device, self._host):
                if entry.key in tier.held:
                    tier.held[entry.key].pinned = pinned
        return replace(entry, pinned=pinned)

    def untag(self, key: str, tag: str) -> None:
        """Take a tag from a context.

        Raises:
            StorageError: the disk tier cannot note it now; nothing was changed.
        """
        self.flush()
        if self._disk is not None:
            self._disk.untag(key, tag)
        with self._changed:
            for held in [tier.held[key] for tier in (self._device, self._host) if key in tier.held]:
                held.tags = tuple(other for other in held.tags if other != tag)

    def remove(self, reference: str) -> Entry:
        """Delete a context from every tier. One in use goes on in memory until its answer has ended.

        Whoever still has it may go on asking; it is then built for each answer and stored no more, until it is loaded again.
        A context of several names that is given by one of them only loses that name; give its key to delete it.

        Returns:
            The context with the names that it has still, none if it was deleted.

        Raises:
            InputError: nothing is stored under the reference.
            StorageError: another process holds the index of the folder; nothing was deleted.
            OSError: its file cannot be deleted.
        """
        self.flush()
        entry = self.one(reference)
        names = {name: time for name, time in entry.names.items() if name != reference}
        if names and reference in entry.names:
            self._unname(entry.key, reference)
            return replace(entry, names=names)
        if self._disk is not None:
            self._disk.remove(entry.key)
        with self._changed:
            self._removed.add(entry.key)
            for held in [tier.held[entry.key] for tier in (self._device, self._host) if entry.key in tier.held]:
                if not held.users:
                    self._drop(held)
            self._changed.notify_all()
        return replace(entry, names={})

    def _unname(self, key: str, name: str) -> None:
        if self._disk is not None:
            self._disk.unname(key, name)
        with self._changed:
            for held in [tier.held[key] for tier in (self._device, self._host) if key in tier.held]:
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
        """Delete from disk what is expired, quarantined, orphaned or left by killed processes."""
        return self._try("gc", lambda disk: disk.gc()) or {}

    def quarantine(self) -> list[dict[str, Any]]:
        """Files that failed their checks: key, file, nbytes, reason, time."""
        return self._try("list", lambda disk: disk.quarantine()) or []

    def stats(self) -> dict[str, Any]:
        """Bytes, budgets and contexts of every tier, and what has happened since the registry was made.

        ``lookups`` is the sum of ``hits`` over the tiers and ``built``; ``misses`` counts builds by the first field
        that differed.
        """
        with self._changed:
            counts = Counter(self._counts)
            tiers: dict[str, dict[str, Any]] = {
                tier.name: {"nbytes": tier.nbytes, "budget": tier.budget, "contexts": len(tier.held)} for tier in (self._device, self._host)
            }
        if self._disk is not None:
            usage = self._try("measure", lambda disk: disk.usage())
            tiers["disk"] = {"nbytes": usage, "budget": self._disk.budget, "contexts": self._try("count", lambda disk: disk.count())}
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
                self._store_later([h for tier in (self._device, self._host) for h in tier.held.values() if h.key in self._unstored])
            self._writer.submit(lambda: None).result()  # one thread, in order

    def close(self) -> None:
        """Flush and let go of the folder. What is in memory stays usable, what is built from now on stays there.

        An index that another process holds is waited for a second; a warning says how many contexts are then not on disk. A process that
        was forked has nothing to close.
        """
        if is_parents(self):
            return
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
        if wanted.name is None and set(wanted.tags) <= set(held.tags):
            return
        names = {} if wanted.name is None else {wanted.name: time.time()}
        with self._changed:
            held.tags = tuple(sorted({*held.tags, *wanted.tags}))
            held.names = held.names | names
        self._touch_behind(held.key, names, wanted.tags)

    def _touch_behind(self, key: str, names: Mapping[str, float] | None = None, tags: Sequence[str] = ()) -> None:
        """Tell the disk tier, behind the answer, that a context was used, and what names and tags it has got."""
        if self._disk is not None:
            with suppress(RuntimeError):  # closed meanwhile
                self._writer.submit(self._try, "touch", lambda disk: disk.touch(key, names=names, tags=tags))

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
            logger.warning("disk tier: cannot %s: %s; contexts are served from memory", what, error)

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
        held.tags,
        held.pinned,
        held.used,
        held.used,
        held.expires,
    )


def check_text(name: str) -> None:
    """Raises:
    InputError: a name or tag that cannot be stored, such as a file's that is not UTF-8.
    """
    try:
        name.encode()
    except (UnicodeEncodeError, AttributeError):
        raise InputError(f"{name!r} is not text that can be stored; give another name") from None


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
