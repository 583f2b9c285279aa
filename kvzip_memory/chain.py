"""How a context that was lost is made again: from the nearest of its ancestors that is stored, one step after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kvzip_memory.context import CompressedContext, Layers, Lease, Recipe, Resident, Source, Writer, as_told, parts_of, seen_from
from kvzip_memory.errors import BudgetError, InputError
from kvzip_memory.registry import BusyError, ContextRegistry, Report, Wanted
from kvzip_memory.system import calls
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.sharing import Shared

logger = logger_of(__name__)

# So often nobody is seen to use the room that is not there before that is believed: others come and go.
_TRIES = 5

# Why a context is built for one answer, and so is what shares it.
_REMOVED, _UNSTORED = "removed", "unstored"


Make = Callable[["Step", tuple[CompressedContext, ...], Report], CompressedContext]


@dataclass(frozen=True, repr=False, eq=False)
class Step(Shared):
    """How one context is made of its parent and its own tokens. Holds nothing of what its ancestors hold.

    Attributes:
        registry: where it is looked for and stored.
        wanted: what is asked for there.
        make: builds it of this step and of what it is made of, whose pairs are on the device: the parent, if there is one, and then those
            that have what it shares.
        parent: None without one; a context that holds its pairs itself, if it was opened from a file.
        ids: ``[m]`` int32 on the host, behind the parent's; None if nobody has given the text.
        protected: as of the context.
        keep: spans ``[start, end)`` of the context that are never evicted either.
        recipe: as of the context.
        sources: the documents behind the parent's, as the text tells them.
        before: the contexts that have what it shares, the last of them often its parent; none if it shares nothing.
        stored: whether the registry is to have it.
    """

    registry: ContextRegistry
    wanted: Wanted
    make: Make
    parent: Step | CompressedContext | None = None
    ids: Tensor | None = None
    protected: int = 0
    keep: tuple[tuple[int, int], ...] = ()
    recipe: Recipe | None = None
    sources: tuple[Source, ...] = ()
    before: tuple[Step | CompressedContext, ...] = ()
    stored: bool = True

    @property
    def levels(self) -> int:
        """How deep what it shares is shared in its turn."""
        return 1 + max((before.levels for before in self.before if isinstance(before, Step)), default=0)

    _way_out = CompressedContext._way_out


class _ParentLostError(InputError):
    """A context must be built and its parent is not there; raised where locks are held, and seen to where they are not."""


class Managed(Shared):
    """The storage of a loaded context: in the registry, which moves it as it sees fit; made again if it was lost."""

    _way_out = CompressedContext._way_out

    def __init__(self, step: Step, context: CompressedContext) -> None:
        wanted = step.wanted
        origin = tuple({*wanted.tags, *wanted.origin})
        loaded = step.registry.loaded(wanted.key) or time.time()
        self.step = replace(step, wanted=replace(wanted, name=None, tags=(), origin=origin, sources=(), loaded=loaded))
        like = context.storage
        self.nbytes, self.shared_nbytes = like.nbytes, like.shared_nbytes
        self.kept_pairs, self.full_heads = like.kept_pairs, like.full_heads
        self.write: Writer | None = step.registry.write
        self._bare = replace(context, storage=Resident(()), sources=as_told(context.sources), name=None, receipt=None)

    def handle(self, **fields: Any) -> CompressedContext:
        """What users hold: with the name, the sources and the receipt of theirs, or else as the text tells it."""
        return replace(self._bare, storage=self, **fields)

    @contextmanager
    def lease(self, key: str) -> Iterator[Lease]:
        with leased(self.step) as (_, lease):
            yield lease


@contextmanager
def leased(step: Step, waiting: Report | None = None, guest: str | None = None) -> Iterator[tuple[CompressedContext, Lease]]:
    """A lease of a context, found or made, and of what it shares, which is brought first and held for as long as it is.

    Args:
        guest: why it is built for one answer, None if that is not known yet.

    Yields:
        The context, which holds its pairs itself, and the lease.
    """
    with ExitStack() as held:
        found, bases, guest = dict[str, Layers](), list[CompressedContext](), guest or (None if step.stored else _UNSTORED)
        if step.before and _is_removed(step):
            guest = _REMOVED
        for before, (base, lease) in zip(step.before, _together(step, waiting, held, guest), strict=True):
            bases.append(base)
            if lease.receipt.reason in (_REMOVED, _UNSTORED):
                guest = lease.receipt.reason
            if isinstance(before, Step) and _is_removed(before):  # by another process
                guest = _REMOVED
            found |= dict(zip([*(part.key for part in base.parts), base.key], lease.parts, strict=True))
        wanted = [(part, found[part.key]) for part in parts_of(step.wanted.identity)]
        shared = tuple(seen_from(layers, part.first) for part, layers in wanted)
        context, lease = held.enter_context(_leased(step, waiting, bases, shared, guest))
        for before in step.before:
            if isinstance(before, Step):
                before.registry.use_again(before.wanted.key)  # so that what shares it leaves first
        yield _behind(shared, context, lease)


def _is_removed(step: Step) -> bool:
    """Whether a context was removed since it was loaded, or what it shares."""
    return step.registry.is_removed(step.wanted.key, step.wanted.loaded, [part.key for part in parts_of(step.wanted.identity)])


def _grows_from_removed(step: Step) -> bool:
    """Whether a context would be built of one that was removed: of its parent, or of what that is to be built of."""
    parent = step.parent
    while isinstance(parent, Step) and not parent.registry.find(parent.wanted.key):
        if _is_removed(parent):
            return True
        parent = parent.parent
    return False


def _together(step: Step, waiting: Report | None, held: ExitStack, guest: str | None) -> list[tuple[CompressedContext, Lease]]:
    """Leases of what a context shares, all or none: who has some of them waits for no room, which others may hold who wait for these.
    What a removed one shares is stored no more than itself, unless it still is."""
    began, alone = time.monotonic(), 0
    while True:
        with ExitStack() as taken:
            found = list[tuple[CompressedContext, Lease]]()
            try:
                for before in step.before:
                    with step.registry.at_once(bool(found)):
                        found.append(taken.enter_context(_whole(before, waiting, guest)))
            except BudgetError as error:
                if not found:
                    raise
                if isinstance(error, BusyError):  # for as long as that takes
                    began = time.monotonic()
            else:
                held.push(taken.pop_all())
                return found
            count = len(found)
            del found
            taken.close()
            alone = 0 if step.registry.wait_for_room(began) else alone + 1
            if alone > _TRIES:
                raise BudgetError(
                    f"context {step.wanted.key[:12]} shares the pairs of {len(step.before)} contexts, and there was room on the device for "
                    f"{count} of them; end some answers, unpin, or raise device_bytes"
                )


@contextmanager
def _whole(step: Step | CompressedContext, waiting: Report | None, guest: str | None) -> Iterator[tuple[CompressedContext, Lease]]:
    if isinstance(step, Step):
        alone = guest == _REMOVED and not step.registry.find(step.wanted.key)
        with leased(step, waiting, guest if alone else None) as found:
            yield found
    else:
        with step.lease() as lease:
            yield step, lease


def _behind(shared: tuple[Layers, ...], context: CompressedContext, lease: Lease) -> tuple[CompressedContext, Lease]:
    """A context and its lease with what it shares."""
    if not shared:
        return context, lease
    shifts, nearer = context.shifts, context.nearer
    storage = Resident(lease.layers, None, lease.states, shared, shifts, nearer)
    return replace(context, storage=storage), replace(lease, before=shared, shifts=shifts, nearer=nearer)


@contextmanager
def _leased(
    step: Step,
    waiting: Report | None,
    bases: Sequence[CompressedContext] = (),
    shared: tuple[Layers, ...] = (),
    guest: str | None = None,
) -> Iterator[tuple[CompressedContext, Lease]]:
    """A lease of a context's own pairs. A parent is brought once its child is not found, and no lock for building that is held.

    Several keys share one lock, so whoever holds one must not wait for another: the parent may have to be built, too. No more than one
    ancestor is held at a time, and none while the context is used.

    Args:
        bases: what is held already, of which the last may be the parent.
        shared: what the context shares, and all of its ancestors that share anything.
        guest: why the context is built for one answer, as what it shares was.
    """
    path, parent, below = [step], list[CompressedContext](), ExitStack()
    try:
        while True:
            current = path[-1]
            if isinstance(current.parent, CompressedContext):
                parent = [current.parent]
            elif bases and current.before and current.parent is current.before[-1]:
                parent = [bases[-1]]
            above = ExitStack()
            try:
                found = above.enter_context(_one(current, parent, bases, below, waiting, guest))
            except _ParentLostError:
                assert isinstance(current.parent, Step)
                path.append(current.parent)
                continue
            except BudgetError:
                if not parent or parent[0] in (current.parent, *bases[-1:]):
                    raise
                below.close()  # it was found after all, and its parent takes the room that it waits for
                parent.clear()
                continue
            below.close()
            path.pop()
            if not path:
                below, parent = above, []
                yield found
                return
            below, parent = above, [_behind(shared if current.before else (), *found)[0]]
            del found  # nothing but the lease holds its pairs
    finally:
        below.close()


@contextmanager
def _one(
    step: Step,
    parent: list[CompressedContext],
    bases: Sequence[CompressedContext],
    below: ExitStack,
    waiting: Report | None,
    guest: str | None,
) -> Iterator[tuple[CompressedContext, Lease]]:
    """A lease of a context, made of its parent if it is not stored; the parent may leave before the child moves in."""
    registry, key = step.registry, step.wanted.key

    def build(report: Report) -> CompressedContext:
        if step.parent is not None and not parent:
            raise _ParentLostError(f"context {key[:12]} is no longer stored; load its text again")
        with below:
            return step.make(step, (*([parent.pop()] if parent else []), *bases), report)

    guest = guest or (None if step.stored else _UNSTORED) or (_REMOVED if registry.is_removed(key) else None)
    grows = not guest and not registry.find(key) and _grows_from_removed(step)
    if guest or grows:
        with calls.waiting():
            context = build(lambda *progress: None)
        if guest == _REMOVED:
            logger.warning("context %s was removed, or what it shares; it is built for one answer and not stored", key[:12])
        with registry.guest(context.nbytes), context.lease() as lease:
            ms = context.receipt.ms if context.receipt else {}
            receipt = replace(lease.receipt, hit=False, tier="built", reason=guest or _REMOVED, ms=ms)
            yield context, replace(lease, receipt=receipt)
        return
    with registry.lease(step.wanted, build, waiting) as found:
        yield found
