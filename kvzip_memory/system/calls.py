"""What somebody waits for: a call. It ends soon after nobody waits for it any more, and keeps nobody from running while it waits itself.

Who holds a place never waits for memory, that is for room in a tier, for a build or for a file: it gives its places up before, and has the
first ones that are free afterwards. So those that hold places always go on, and those that hold memory and wait for a place get one:
nobody waits for ever. Both are kept in a context variable, which reaches everything that is done for the call in its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol

#: A wait for something that cannot be woken looks so often, in seconds, whether anybody still waits for the call.
LOOK_S = 0.2

#: Where one thread waits until another puts None there; that waits for nothing, so it may happen while garbage is collected.
Gate = SimpleQueue[None]


class Cancelled(BaseException):
    """Nobody waits for the call any more. Not an Exception: it is no failure that somebody could handle."""


class Left(Protocol):
    """Whether nobody waits any more, such as a :class:`threading.Event`."""

    def is_set(self) -> bool: ...


class Place(Protocol):
    """Something that as many have as can run."""

    def away(self) -> AbstractContextManager[None]:
        """Around a block in which others may have it."""


@dataclass(frozen=True)
class _Call:
    left: Left | None = None
    places: tuple[Place, ...] = ()
    started: Callable[[Any], None] | None = None


_call: ContextVar[_Call] = ContextVar("kvzip_memory.call", default=_Call())  # noqa: B039 (it is frozen)


@contextmanager
def within(left: Left | None = None, place: Place | None = None, started: Callable[[Any], None] | None = None) -> Iterator[None]:
    """The block belongs to a call.

    Args:
        left: set when nobody waits for it any more; None if that is as around the block.
        place: that it holds, beside those around the block.
        started: told of each stream of an answer that the block makes; None as around the block.
    """
    call = _call.get()
    places = call.places if place is None else (*call.places, place)
    token = _call.set(_Call(call.left if left is None else left, places, started or call.started))
    try:
        yield
    finally:
        _call.reset(token)


def left() -> Left | None:
    """Set when nobody waits for this call any more; None for one that ends by itself."""
    return _call.get().left


def check() -> None:
    """Raises:
    Cancelled: nobody waits for this call any more.
    """
    call = _call.get()
    if call.left is not None and call.left.is_set():
        raise Cancelled


def has_place() -> bool:
    """Whether this call has waited for its turn already, wherever that was."""
    return bool(_call.get().places)


def started(stream: Any) -> None:
    """An answer has been asked for; it ends with the call."""
    call = _call.get()
    if call.started is not None:
        call.started(stream)


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for memory: others may have this call's places meanwhile.

    Raises:
        Cancelled: nobody waits for the call any more; its places are not taken again.
    """
    call = _call.get()
    token = _call.set(replace(call, places=()))
    try:
        with ExitStack() as away:
            for place in reversed(call.places):
                away.enter_context(place.away())
            yield
            check()
    finally:
        _call.reset(token)


def pass_through(gate: Gate) -> None:
    """Wait until somebody opens a gate.

    Raises:
        Cancelled: nobody waits for the call any more.
    """
    while True:
        try:
            return gate.get(timeout=None if left() is None else LOOK_S)
        except Empty:
            check()
