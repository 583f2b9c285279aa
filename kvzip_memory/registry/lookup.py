"""Contexts found, or built exactly once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from kvzip_memory.compression.shrink import obstacle, shrink
from kvzip_memory.context import CompressedContext, Lease, Receipt
from kvzip_memory.errors import InputError
from kvzip_memory.registry.backing import Backing
from kvzip_memory.registry.beginnings import beginnings
from kvzip_memory.registry.catalogue import Catalogue
from kvzip_memory.registry.counts import Counts
from kvzip_memory.registry.disk.entry import Entry, is_past
from kvzip_memory.registry.disk.store import AbsentError, DiskTier, NotStoredError
from kvzip_memory.registry.flights import Flight
from kvzip_memory.registry.identity import explain, family_of, is_whose, only_ratio_differs
from kvzip_memory.registry.memory import Memory, as_entry
from kvzip_memory.registry.room import Moves
from kvzip_memory.registry.tier import Use
from kvzip_memory.registry.wanted import Build, Report, Wanted, not_stored
from kvzip_memory.registry.writing import Writing
from kvzip_memory.system import calls
from kvzip_memory.system.locks import Hold, Notice
from kvzip_memory.system.printable import logger_of

logger = logger_of(__name__)

_POLL_S = 0.05


@dataclass
class Story:
    """What a lookup found on its way."""

    tier: str = "built"
    reason: str | None = None
    absent: bool = False  # nothing of its key is on disk: the reason is that of what is near it
    differs: tuple[str, ...] = ()
    shrunk_from: float | None = None
    ms: dict[str, float] = field(default_factory=dict)


class Lookup:
    """Looks for a context on the device, on the host, on disk and in finer ones, and has it built where it is nowhere.

    Of many who ask at once one brings it: of the threads the one whose flight it is, of the processes the one that holds the lock of its
    key. Flights are in the memory, under its lock; what one lookup finds on its way is a :class:`Story` of its own.
    """

    def __init__(self, memory: Memory, backing: Backing, writing: Writing, moves: Moves, catalogue: Catalogue, counts: Counts) -> None:
        self._memory, self._backing, self._writing, self._moves = memory, backing, writing, moves
        self._catalogue, self._counts = catalogue, counts

    @contextmanager
    def lease(self, wanted: Wanted, build: Build, waiting: Report | None = None) -> Iterator[tuple[CompressedContext, Lease]]:
        """A context on the device, see :meth:`~kvzip_memory.registry.registry.ContextRegistry.lease`."""
        if not is_whose(wanted.identity, self._backing.tenant):
            raise not_stored(wanted.key)
        story = Story()
        with self._memory.using() as use:
            if self._memory.begun(use, wanted.key):
                story.tier, story.ms["wait"] = "device", 0.0
                self._counts.add("hits.device")
            else:
                with calls.waiting():
                    self._acquire(use, wanted, build, waiting or (lambda *progress: None), story)
            held = use.held
            assert held is not None
            self._catalogue.annotate(held, wanted)
            if held.key in self._writing.unstored:
                self._writing.store_later([held])
            receipt = Receipt(
                wanted.key,
                hit=story.tier != "built",
                tier=story.tier,
                reason=story.reason,
                differs=story.differs,
                shrunk_from=story.shrunk_from,
                nbytes=held.nbytes,
                ms=story.ms,
                fitted=held.context.fitted,
            )
            with held.context.lease() as resident:
                yield held.context, Lease(resident.layers, receipt, resident.states)

    def _acquire(self, use: Use, wanted: Wanted, build: Build, waiting: Report, story: Story) -> None:
        """Begin to use a context on the device. One thread at a time brings it; who waited tries for itself when that one failed."""
        began, flight = time.perf_counter(), Flight()
        try:
            while not (there := self._memory.begun(use, wanted.key)):
                calls.check()
                with self._memory.changed:
                    other = self._memory.flights.setdefault(wanted.key, flight)
                    if other is flight:
                        break
                    self._moves.check_patience(wanted.key)
                    if self._waits_for_us(other.thread, flight.thread):
                        said = "this text is being loaded by the very thread that asks for it, or by one that waits for it"
                        raise InputError(f"{said}; do not load it where texts are scored or progress is shown")
                    self._memory.awaited[flight.thread] = other.thread
                    other.waiters.add(use)
                    progress = other.progress
                    del other  # a flight goes with the frame of the thread that flies
                    try:
                        self._memory.changed.wait(calls.LOOK_S)
                    finally:
                        self._memory.awaited.pop(flight.thread, None)
                waiting(*progress)
            if there or self._memory.begun(use, wanted.key):  # landed in between
                story.tier, story.ms["wait"] = "device", 1e3 * (time.perf_counter() - began)
            else:
                with calls.within(left=flight.unwanted(calls.left())):
                    self._bring(use, flight, wanted, build, waiting, story)
            self._counts.add(story.tier if story.tier == "built" else f"hits.{story.tier}")
        finally:
            if self._memory.flights.get(wanted.key) is flight:
                with self._memory.changed:
                    del self._memory.flights[wanted.key]
                    self._memory.changed.notify_all()

    def _waits_for_us(self, thread: int, us: int) -> bool:
        """Whether a thread is ours, or waits for one that is."""
        seen = set[int]()
        while thread != us and thread in self._memory.awaited and thread not in seen:
            seen.add(thread)
            thread = self._memory.awaited[thread]
        return thread == us

    def _bring(self, use: Use, flight: Flight, wanted: Wanted, build: Build, waiting: Report, story: Story) -> None:
        """Bring a context to the device and begin to use it."""
        began = time.perf_counter()
        try:
            if self._moves.from_host(use, wanted.key):
                story.tier = "host"
                return
            if self._from_disk(use, wanted, story):
                return
            if (context := self._from_finer(wanted, story)) is not None:
                self._moves.admit(use, wanted, context)
                return
        finally:
            story.ms["load"] = 1e3 * (time.perf_counter() - began)
        self._built(use, flight, wanted, build, waiting, story)

    def _from_disk(self, use: Use, wanted: Wanted, story: Story) -> bool:
        if (missed := self._moves.from_disk(use, wanted)) is not None:
            story.reason, story.absent = str(missed), isinstance(missed, AbsentError)
            return False
        story.tier, story.reason, story.differs = "disk", None, ()
        return True

    def _from_finer(self, wanted: Wanted, story: Story) -> CompressedContext | None:
        """A context of a smaller ratio out of a stored one of a larger, which is read but not kept."""
        near = self._near(wanted)
        ratio = wanted.identity["ratio"]
        finer = [(i["ratio"], key) for key, i in near if i["ratio"] > ratio and only_ratio_differs(i, wanted.identity)]
        in_the_way = obstacle(wanted.identity) if finer else None
        for finer_ratio, key in [] if in_the_way else sorted(finer):
            with self._borrowed(key) as (source, tier):
                context = None if source is None else shrink(source, wanted.key, wanted.identity)
            if context is not None:
                story.tier, story.reason, story.shrunk_from = tier, None, finer_ratio
                self._counts.add("shrunk")
                return context
        if story.absent or self._backing.tier is None:
            story.differs, text = explain(wanted.identity, [identity for _, identity in near], self._named_identities(wanted))
            text += f", since {in_the_way}" if in_the_way and story.differs == ("ratio",) else ""
            story.reason = text if self._backing.tier is not None else f"{text}; {story.reason}"
        return None

    @contextmanager
    def _borrowed(self, key: str) -> Iterator[tuple[CompressedContext | None, str]]:
        """A context as it lies in a tier, without moving it."""
        with self._memory.using() as use:
            with self._memory.changed:
                for tier in self._memory.tiers:
                    if (held := tier.held.get(key)) is not None and self._memory.alive(held):
                        use.begin(held)
                        break
                else:
                    held = None
            if held is not None:
                yield held.context, tier.name
                return
        context, disk = None, self._backing.tier
        if disk is not None:
            with suppress(NotStoredError):
                context = disk.get(key, torch.device("cpu"), ttl=self._memory.ttl)
        yield context, "disk"

    def _near(self, wanted: Wanted) -> list[tuple[str, Mapping[str, Any]]]:
        """Keys and identities of the stored contexts of the same text and tenant."""
        with self._memory.changed:
            held = [h for tier in self._memory.tiers for h in tier.filing.of_text(wanted.group)]
        found = {h.key: h.context.identity for h in self._catalogue.without_deleted(held)}
        for entry in self._backing.attempt("search", lambda disk: disk.group(wanted.group)) or ():
            found.setdefault(entry.key, entry.identity)
        found.pop(wanted.key, None)
        return list(found.items())

    def _named_identities(self, wanted: Wanted) -> list[Mapping[str, Any]]:
        """Identities of the tenant's contexts that have the wanted name."""
        return [] if wanted.name is None else [entry.identity for entry in self._catalogue.labelled(self._catalogue.labels(wanted.name))]

    def _built(self, use: Use, flight: Flight, wanted: Wanted, build: Build, waiting: Report, story: Story) -> None:
        """Build, unless another process does so first; its writing to disk goes on behind the answer."""
        disk = self._backing.tier
        hold = disk.builders.hold(wanted.key) if disk is not None and disk.read_only is None else None
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
                    disk.builders.report(wanted.key, {"stage": stage, "done": done, "total": total})

            context = build(report)
            story.ms |= dict(context.receipt.ms) if context.receipt else {}
            self._moves.admit(use, wanted, context)
            if hold is not None:
                assert use.held is not None
                handed_over = self._writing.write_behind(use.held, hold if hold.mine else None) and hold.mine
        finally:
            if hold is not None and not handed_over:
                hold.release()

    def _found_elsewhere(self, use: Use, hold: Hold, wanted: Wanted, waiting: Report, story: Story) -> bool:
        """Whether another process has built a context meanwhile; if not, its lock is ours, once nobody else holds it.

        A lock goes with the process that held it: a dead builder is replaced at the next look, and one that is stopped, or that builds
        something else under the same lock, when nothing was heard of this context for ``wait_s``. It is then built twice, which does no
        harm.
        """
        disk = self._backing.tier
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
                note = disk.builders.reported(wanted.key) or {}
                if note != told:
                    told, heard = note, time.monotonic()
                elif time.monotonic() - heard >= self._memory.wait_s:
                    logger.warning("context %s is built here: nothing was heard of it for %g s", wanted.key[:12], self._memory.wait_s)
                    return False
                waiting(str(note.get("stage", "waiting")), int(note.get("done", 0)), int(note.get("total", 0)))
                time.sleep(_POLL_S)
        except OSError as error:
            self._backing.failed("lock", error)
            return False
        finally:
            story.ms["wait"] = 1e3 * (time.perf_counter() - began)

    def longest_prefix(
        self, model_fields: Mapping[str, Any], ids: Sequence[int], fits: Callable[[Entry], bool] = lambda entry: True
    ) -> Entry | None:
        """The context of a model with the most tokens that ``ids`` begin with, and go on after; the finest of it.

        Args:
            fits: whether a context may be used at all; one that may not makes way for a shorter one.
        """
        family, begun = family_of({**model_fields, "tenant": self._backing.tenant}), beginnings(ids)
        with self._memory.changed:
            near = [h for tier in self._memory.tiers for h in tier.filing.begun_with(family, begun) if h.context.n_tokens < len(ids)]
        held = [as_entry(h) for h in self._catalogue.without_deleted(near)]
        known = {(entry.n_tokens, entry.identity.get("tokens", "")[:8]) for entry in held}
        known |= self._backing.attempt("search", lambda disk: disk.lengths(family, begun)) or set()
        tokens, hasher, done, found = np.asarray(ids, dtype=np.int32), hashlib.sha256(), 0, []
        for n in sorted({n for n, _ in known if n < len(ids)}):
            hasher.update(tokens[done:n].tobytes())
            done = n
            if (n, hasher.hexdigest()[:8]) in known:
                found.append(hasher.hexdigest())
        for digest in reversed(found):
            entries = [entry for entry in held if entry.identity.get("tokens") == digest]
            entries += self._backing.attempt("search", partial(DiskTier.with_tokens, family=family, tokens=digest)) or []
            if good := [e for e in entries if not is_past(e.created, e.expires, self._memory.ttl) and fits(e)]:
                return max(good, key=lambda entry: entry.fineness)
        return None
