"""Contexts on their way to the device, each brought by one thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import get_ident
from weakref import WeakSet

from kvzip_memory.registry.tier import Use
from kvzip_memory.system.calls import Left


@dataclass
class Flight:
    """A context on its way to the device: one thread brings it, others wait."""

    progress: tuple[str, int, int] = ("", 0, 0)
    thread: int = field(default_factory=get_ident)
    waiters: WeakSet[Use] = field(default_factory=WeakSet)

    def unwanted(self, left: Left | None) -> Left | None:
        """Set when nobody waits for it: neither the call that brings it, which has ``left``, nor others."""
        return None if left is None else _Unwanted(self, left)


@dataclass
class _Unwanted:
    flight: Flight
    left: Left

    def is_set(self) -> bool:
        return self.left.is_set() and not self.flight.waiters
