"""The two tiers in memory, under one lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakValueDictionary

import torch

from kvzip_memory.registry.disk.entry import Entry, entry_of, is_past
from kvzip_memory.registry.disk.names import Names
from kvzip_memory.registry.flights import Flight
from kvzip_memory.registry.identity import family_of
from kvzip_memory.registry.removed import Removed
from kvzip_memory.registry.tier import Held, MemoryTier, Room, Use
from kvzip_memory.system.forks import refuse_after_fork


class Memory:
    """Contexts on the device and on the host. It owns the lock, :attr:`changed`: whatever is in the tiers, who uses it, what is on its
    way and what was removed is read and changed with it held. It is never held while something is read, written, moved or built.

    Args:
        where: what contexts are used on.
        device_bytes: budget of the device tier, None for no limit.
        host_bytes: the same of the host tier.
        names: lose those of contexts that leave the memory and are nowhere else.
        ttl: seconds after its text was read after which a context is no longer used; None for never.
        wait_s: seconds to wait for what others use.

    Attributes:
        changed: the lock; notified when a context, room or a flight has come or gone.
        device: the tier where contexts are used.
        host: the tier where they wait.
        flights: by their keys, contexts that a thread brings to the device; nobody else moves them.
        awaited: by threads that wait for a flight the threads that fly.
        removed: contexts that somebody wants to be gone.
    """

    def __init__(
        self,
        where: torch.device,
        device_bytes: int | None,
        host_bytes: int | None,
        names: Names,
        ttl: float | None,
        wait_s: float,
    ) -> None:
        self.where, self._names, self.ttl, self.wait_s = where, names, ttl, wait_s
        self.device, self.host = MemoryTier("device", device_bytes), MemoryTier("host", host_bytes)
        self.changed = threading.Condition()
        self.flights: WeakValueDictionary[str, Flight] = WeakValueDictionary()
        self.awaited: dict[int, int] = {}
        self.removed = Removed()
        refuse_after_fork(self, "changed")

    @property
    def tiers(self) -> tuple[MemoryTier, MemoryTier]:
        return self.device, self.host

    @contextmanager
    def using(self) -> Iterator[Use]:
        """A use, of nothing yet, that has ended when the block has."""
        use = Use()
        try:
            yield use
        finally:
            self.let_go(use)

    def let_go(self, use: Use) -> None:
        with self.changed:
            if (held := use.end()) is not None:
                if not held.users:
                    held.room = None
                    if held.key in self.removed:
                        self.drop(held)
                self.changed.notify_all()

    def begun(self, use: Use, key: str) -> bool:
        """Begin to use a context that is on the device; False if it is not."""
        with self.changed:
            held = self.device.held.get(key)
            if held is None or not self.alive(held):
                return False
            use.begin(held)
            held.used = time.time()
            self.device.held.move_to_end(key)
            return True

    def alive(self, held: Held) -> bool:
        """False, and gone, if it has expired; answers that read it end as they began. With the lock held."""
        if not is_past(held.context.created, held.context.expires, self.ttl):
            return True
        self.drop(held)
        return False

    def drop(self, held: Held) -> None:
        """Let go of a context in memory, if it is still there; its bytes stay counted while it is read. With the lock held."""
        for tier in self.tiers:
            if tier.held.get(held.key) is held:
                tier.take(held)
                if held.users:
                    held.room = Room()
                    tier.keep(held.room, held.nbytes)
                self.names_left(held)

    def names_left(self, held: Held) -> None:
        family = family_of(held.context.identity)
        for name in held.names:
            self._names.lose(held.context.identity.get("tenant"), name, family, held.key)

    def here(self, key: str) -> list[Held]:
        """A context as it is in memory. With the lock held."""
        return [tier.held[key] for tier in self.tiers if key in tier.held]

    def in_memory(self, keys: Iterable[str] | None = None) -> list[Held]:
        """Contexts in memory, of these keys or all, without those that were removed."""
        with self.changed:
            tiers = (self.host.held, self.device.held)
            found = [h for t in tiers for h in t.values()] if keys is None else [t[k] for k in keys for t in tiers if k in t]
            return [h for h in found if h.key not in self.removed]

    def readmit(self, key: str) -> None:
        """A context that was deleted may be stored again."""
        with self.changed:
            self.removed.readmit(key)


def as_entry(held: Held) -> Entry:
    """What is known of a context in memory, as the index would tell it."""
    return replace(entry_of(held.context, held.group, held.names, tuple(sorted(held.tags)), held.pinned), used=held.used)
