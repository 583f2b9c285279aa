"""Moves between the tiers, and room for them under hard budgets."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from kvzip_memory.context import CompressedContext
from kvzip_memory.errors import BudgetError
from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.counts import Counts
from kvzip_memory.registry.disk.facts import LATEST
from kvzip_memory.registry.disk.store import NotStoredError
from kvzip_memory.registry.memory import Memory
from kvzip_memory.registry.tier import Held, MemoryTier, Room, Use, settle, to_device, to_host
from kvzip_memory.registry.wanted import Wanted
from kvzip_memory.registry.writing import Writing
from kvzip_memory.system import calls
from kvzip_memory.system.locks import Notice
from kvzip_memory.system.printable import logger_of

logger = logger_of(__name__)

# Whether what is not there at once is not waited for.
_IMPATIENT: ContextVar[bool] = ContextVar("kvzip_memory_impatient", default=False)


class BusyError(BudgetError):
    """What is not waited for is being brought by another thread."""


class Moves:
    """Moves contexts up to the device, and down when a tier is full: what was used longest ago leaves first.

    It owns nothing: what lies where is the memory's, and is changed under its lock; copies are made outside it.
    """

    def __init__(self, memory: Memory, backing: Backing, writing: Writing, counts: Counts) -> None:
        self._memory, self._backing, self._writing, self._counts = memory, backing, writing, counts

    @contextmanager
    def guest(self, nbytes: int) -> Iterator[None]:
        """Count a context on the device that is not in the tier, and make room for it there, while the block runs.

        Raises:
            BudgetError: see :meth:`lease`.
        """
        room = Room()
        try:
            with calls.waiting():
                self._reserve(self._memory.device, nbytes, room)
            yield
        finally:
            with self._memory.changed:
                self._memory.device.give_back(room)
                self._memory.changed.notify_all()

    def check_fits(self, nbytes: int) -> None:
        """Raises:
        BudgetError: a context of so many bytes could never be on the device.
        """
        budget = self._memory.device.budget
        if budget is not None and nbytes > budget:
            raise BudgetError(
                f"the context takes about {nbytes:,} bytes; device_bytes is {budget:,}: raise it, keep a smaller ratio, or load less"
            )

    def admit(self, use: Use, wanted: Wanted, context: CompressedContext) -> None:
        """Move a context that was just built or cut to the device. It is as old as its text's reading."""
        created = context.created or time.time()
        until = [context.expires] if context.expires is not None else []
        expires = min([*until, created + self._memory.ttl, LATEST]) if self._memory.ttl is not None else context.expires
        context = replace(context, created=created, expires=expires)
        with self.room(self._memory.device) as room:
            self._reserve(self._memory.device, context.nbytes, room)
            now = time.time()
            loaded = wanted.loaded or now
            names = {} if wanted.name is None else {wanted.name: now}
            tags = dict.fromkeys([*wanted.tags, *wanted.origin], loaded)
            self._move_in(use, room, Held(context, wanted.group, names, tags, loaded=loaded, stored=wanted.loaded))

    def _move_in(self, use: Use, room: Room, held: Held) -> None:
        """Move a context to the device, into its room there."""
        held.context = to_device(held.context, self._memory.where)
        with self._memory.changed:
            self._memory.device.add(held, room)
            use.begin(held)

    def from_host(self, use: Use, key: str) -> bool:
        """Bring a context from the host and begin to use it; False if it is not there."""
        with self._memory.using() as source, self.room(self._memory.device) as room:
            with self._memory.changed:
                held = self._memory.host.held.get(key)
                if held is None or not self._memory.alive(held):
                    return False
                source.begin(held)
            self._reserve(self._memory.device, held.nbytes, room)
            moved = to_device(held.context, self._memory.where)
            with self._memory.changed:
                held.context = moved
                self._memory.device.add(held, room)
                self._memory.host.take(held)
                use.begin(held)
        self._counts.add("promotions")
        return True

    def from_disk(self, use: Use, wanted: Wanted) -> NotStoredError | None:
        """Bring a context from disk and begin to use it; else why that cannot be."""
        disk = self._backing.tier
        if disk is None:
            return NotStoredError(f"there is no disk tier ({self._backing.no_disk})")
        before, there = disk.quarantined, time.time()
        notes = self._backing.notes()
        with self.room(self._memory.device) as room:

            def admit(nbytes: int) -> None:  # once the file has told its size, before its pairs are read
                self._reserve(self._memory.device, nbytes, room)

            try:  # layer by layer, each uploaded while the next is read
                context = disk.get(wanted.key, self._memory.where, admit, self._memory.ttl)
            except NotStoredError as error:
                self._counts.add("quarantined", disk.quarantined - before)
                return error
            entry = self._backing.attempt("read", lambda disk: disk.entry(wanted.key))
            given = () if entry is None else entry.tags  # a file that was just written may have no row yet
            there = notes.after(wanted.key, given, there)
            held = Held(context, wanted.group, tags=dict.fromkeys(given, there), loaded=there, stored=time.time())
            if entry is not None:
                held.names, held.pinned = dict(entry.names), entry.pinned
            self._move_in(use, room, held)
        self._writing.used_behind(wanted.key)
        return None

    @contextmanager
    def room(self, tier: MemoryTier) -> Iterator[Room]:
        """Room, none yet, for a move to a tier. When the block ends it is given back, unless the context has moved in.

        A context leaves a tier only when it has arrived in the next: after a failure it is where it was.
        """
        room = Room()
        try:
            yield room
        except BaseException:
            with self._memory.changed:
                settle(self._memory.device, self._memory.host, self._memory.where)
            raise
        finally:
            with self._memory.changed:
                tier.give_back(room)
                self._memory.changed.notify_all()

    @contextmanager
    def at_once(self, now: bool) -> Iterator[None]:
        """Do not wait for room in the block, if so ``now``: the caller holds room that others may wait for."""
        before = _IMPATIENT.set(now or _IMPATIENT.get())
        try:
            yield
        finally:
            _IMPATIENT.reset(before)

    def check_patience(self, key: str) -> None:
        """Raises:
        BusyError: the caller may not wait for who brings a context, and who may wait for what the caller holds.
        """
        if _IMPATIENT.get():
            raise BusyError(f"context {key[:12]} is being brought by another thread")

    def wait_for_room(self, began: float) -> bool:
        """Wait a little, for what others give back; False if that is no use: nobody uses any, or it ``began`` (``time.monotonic``) so long
        ago."""
        calls.check()
        if _IMPATIENT.get() or time.monotonic() - began >= self._memory.wait_s:
            return False
        with self._memory.changed:
            tier = self._memory.device
            if not tier.reserved and not self._memory.flights and not any(held.users for held in tier.held.values()):
                self._memory.changed.wait(random.uniform(0.001, 0.02))
                return False
            self._memory.changed.wait(random.uniform(0.2, 1.0) * calls.LOOK_S)  # not all at the same moment
        return True

    def _reserve(self, tier: MemoryTier, nbytes: int, room: Room) -> None:
        """Make room in a tier, moving down what was used longest ago; waits while others use all of it.

        Raises:
            BudgetError: nobody uses what takes the room, or they do for longer than ``wait_s``.
        """
        if tier is self._memory.device:
            self.check_fits(nbytes)
        began = time.monotonic()
        notice = Notice("waiting for room for %s bytes in the %s tier, all of which answers use", f"{nbytes:,}", tier.name)
        while not self._reserved(tier, nbytes, room):
            calls.check()
            with self._memory.changed:
                if tier.has_room(nbytes) or self._victim(tier) is not None:
                    continue
                waited, passing = time.monotonic() - began, tier.reserved  # of contexts that come, or leave with their users
                users = sum(held.users > 0 for held in tier.held.values())
                if waited >= self._memory.wait_s or _IMPATIENT.get() or (users == 0 and not passing and len(self._memory.flights) <= 1):
                    raise BudgetError(
                        f"no room for {nbytes:,} bytes in the {tier.name} tier: {users} contexts in use, "
                        f"{sum(held.pinned for held in tier.held.values())} pinned and {passing:,} bytes of others that come or leave take "
                        f"{tier.nbytes:,} of {tier.budget:,} bytes (waited {waited:.0f} s); end some answers, unpin, or raise "
                        f"{tier.name}_bytes"
                    )
                notice.look()
                self._memory.changed.wait(min(self._memory.wait_s - waited, calls.LOOK_S))

    def _reserved(self, tier: MemoryTier, nbytes: int, room: Room) -> bool:
        """Keep bytes in a tier, moving down what was used longest ago; False if that is not to be had without waiting."""
        while True:
            with self._memory.using() as leaving:
                with self._memory.changed:
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
        pinned = [held for each in self._memory.tiers for held in each.held.values() if held.pinned and not self._backing.has(held.key)]
        kept = {key for held in pinned for key in (held.key, *held.parts)}

        def may_leave(held: Held) -> bool:
            return held.key not in self._memory.flights and not (held.key in kept and not self._backing.has(held.key))

        return tier.victim(may_leave)

    def _move_down(self, victim: Held, tier: MemoryTier) -> None:
        """From the device to the host if there is room, else to disk; it stays if somebody begins to read it meanwhile.

        Outside the lock: answers go on. The caller uses the victim.
        """
        if tier is self._memory.device and self._moved_to_host(victim):
            return
        if self._backing.has(victim.key):
            self._backing.attempt("touch", lambda disk: disk.touch(victim.key))
            end = "evictions"
        else:
            end = "spills.disk" if self._writing.stored_unless_there(victim) else "dropped"
        with self._memory.changed:
            if victim.users == 1:
                self._counts.add(end)
                tier.take(victim)
                if end == "dropped":
                    self._memory.names_left(victim)

    def _moved_to_host(self, victim: Held) -> bool:
        """Whether a context was moved to the host, or need not move any more; False if there is no room for it."""
        budget = self._memory.host.budget
        if budget is not None and victim.nbytes > budget:
            return False
        with self.room(self._memory.host) as room:
            if not self._reserved(self._memory.host, victim.nbytes, room):
                return False
            try:
                moved = to_host(victim.context)
            except (MemoryError, RuntimeError, OSError) as error:  # no memory for it, whatever the budget says
                if not self._backing.has(victim.key):
                    raise
                logger.warning("a context of %s bytes was not moved to the host: %s", f"{victim.nbytes:,}", error)
                return False
            with self._memory.changed:
                if victim.users == 1:
                    victim.context = moved
                    self._memory.host.add(victim, room)
                    self._memory.device.take(victim)
                    self._counts.add("spills.host")
        return True
