"""A failure at every step of every move between tiers and of every operation on files: nothing is lost, and the sums are right.

The steps are found by running: a profiler numbers the calls that go out of the registry, and the same is run again once for each of
them, failing there.
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch

import synthetic
from conftest import STRESS
from kvzip_memory.context import storage_nbytes
from kvzip_memory.registry import ContextRegistry, room, writing
from kvzip_memory.registry.holders import Naming
from kvzip_memory.registry.tier import packed
from synthetic import CPU, context, load, wanted

OURS = str(Path(room.__file__).parent)
SIZE = synthetic.context(0).nbytes


def _sql_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("no space" if code == sqlite3.SQLITE_FULL else "disk I/O error")
    error.sqlite_errorcode = code
    return error


DISK = [partial(OSError, number, os.strerror(number)) for number in (errno.ENOSPC, errno.EIO, errno.EROFS)]
SQL = [partial(_sql_error, code) for code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)]

#: What may fail at a call, by the module it goes to; anything may be interrupted or find no memory.
FAULTS: dict[str, list[Callable[[], BaseException]]] = {
    **dict.fromkeys(("posix", "io", "pathlib", "os", "filelock"), DISK),
    **dict.fromkeys(("sqlite3", "diskcache"), SQL),
    "torch": [partial(torch.OutOfMemoryError, "out of memory")],
    "": [MemoryError, KeyboardInterrupt],
}

#: What is interrupted while it takes a lock or gives it back, Python's own locks never give back.
LOCKS = ("threading", "_thread")


def _module(function: Any) -> str:
    return str(getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__)


class Steps:
    """Calls out of the registry's modules, each place once; raises at one of them."""

    def __init__(self, fail: tuple[Any, ...] | None = None, error: Callable[[], BaseException] | None = None) -> None:
        self.seen: dict[tuple[Any, ...], None] = {}
        self._fail, self._error, self.failed, self._sql = fail, error, False, 0

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        ours = frame.f_code.co_filename.startswith(OURS)
        if event == "c_call" and getattr(what, "__self__", None).__class__.__module__ == "sqlite3":
            self._sql += 1
            place = ("SQL", self._sql, what.__name__, "sqlite3")
        elif event == "c_call" and ours:
            place = (frame.f_code.co_qualname, frame.f_lineno, what.__name__, _module(what))
        elif event == "call" and frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(OURS):
            place = (frame.f_back.f_code.co_qualname, frame.f_back.f_lineno, frame.f_code.co_qualname, frame.f_globals["__name__"])
        else:
            return
        if place[3] in LOCKS:
            return
        self.seen.setdefault(place)
        if place == self._fail and not self.failed:
            self.failed = True
            sys.setprofile(None)
            assert self._error is not None
            raise self._error()

    @contextmanager
    def watching(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


class Now:
    """An executor that runs things at once, in the thread that asks: their steps are steps of what is done."""

    def submit(self, work: Callable[..., Any], *args: Any) -> Any:
        work(*args)
        return self

    def result(self) -> None: ...

    def shutdown(self) -> None: ...


@pytest.fixture(autouse=True)
def two_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose contexts are copies, as with a GPU."""
    for module in (room, writing):
        monkeypatch.setattr(module, "to_host", packed)
    monkeypatch.setattr(room, "to_device", lambda context, device: packed(context))


def made(folder: Path | None, host: bool = True) -> ContextRegistry:
    """Room for one context on the device, and one on the host."""
    found = ContextRegistry(CPU, folder, device_bytes=SIZE, host_bytes=SIZE if host else 0, wait_s=0.0)
    found._writing.thread = Now()  # type: ignore[assignment]
    return found


def promote(found: ContextRegistry) -> None:
    load(found, 0)


def build(found: ContextRegistry) -> None:
    load(found, 2)


def reread(found: ContextRegistry) -> None:
    load(found, 3)


def remove(found: ContextRegistry) -> None:
    found.remove(wanted(0).key)


def collect(found: ContextRegistry) -> None:
    found.gc()


def forget(found: ContextRegistry) -> None:
    found.forget(Naming(TAG))


def leave(found: ContextRegistry) -> None:
    found.leave(wanted(4).key, [TAG])


def replaced(found: ContextRegistry) -> None:
    """Stored once more, as one that had expired is."""
    tier = found._backing.tier
    assert tier is not None
    tier.put(context(3), wanted(3).group)


def tag(found: ContextRegistry) -> None:
    """A context that only a tag holds, and one with a name that has it, too."""
    for number in (4, 0):
        with found.lease(replace(wanted(number), name=None, tags=(TAG,)), lambda report, number=number: context(number)):
            pass


def check(found: ContextRegistry) -> None:
    """The sums are those of what is there; everything can be had."""
    if any(held.users for tier in (found._memory.device, found._memory.host) for held in tier.held.values()) or found._memory.flights:
        gc.collect()  # what a frame in a ring of references had
    for tier in (found._memory.device, found._memory.host):
        lying = sum(
            storage_nbytes([t for layer in h.context.layers for t in layer.tensors()]) + h.context.token_ids.nbytes
            for h in tier.held.values()
        )
        assert tier.nbytes == lying, (tier.name, tier.nbytes, lying)
        assert tier.budget is None or tier.nbytes <= tier.budget
        assert not any(held.users for held in tier.held.values())
    assert not set(found._memory.device.held) & set(found._memory.host.held)
    assert not found._memory.flights
    if found._backing.tier is not None:
        assert found._backing.tier.usage() == found._backing.tier.measured()
        assert {entry.key for entry in found._backing.tier.entries()} == {path.stem for path in found._backing.tier.folder.blobs()}


CASES: dict[str, tuple[Callable[[ContextRegistry], None], bool]] = {
    "host to device, device to host": (promote, False),
    "built, two moves down": (build, False),
    "built, written": (build, True),
    "moved down to disk": (promote, True),
    "read from disk": (reread, True),
    "removed": (remove, True),
    "collected": (collect, True),
    "forgotten": (forget, True),
    "left": (leave, True),
    "stored in the place of an older one": (replaced, True),
}
TAG = "thread: ana-7f3"


@pytest.mark.parametrize("case", CASES)
def test_whatever_fails_nothing_is_lost_and_the_sums_are_right(case: str, tmp_path: Path) -> None:
    operation, on_disk = CASES[case]
    template = tmp_path / "template"
    if on_disk:
        before = made(template)
        for number in (3, 0, 1):
            load(before, number)
        before.close()

    def prepared(name: str) -> ContextRegistry:
        folder = tmp_path / name if on_disk else None
        if folder is not None:
            shutil.copytree(template, folder)
        found = made(folder)
        for number in (0, 1):  # one on the host, one on the device
            load(found, number)
        return found

    steps = Steps()
    found = prepared("counted")
    with steps.watching():
        operation(found)
    found.close()
    assert len(steps.seen) > 20
    faults = [(place, error) for place in steps.seen for error in [*FAULTS.get(place[3].split(".")[0], []), *FAULTS[""]]]
    chosen = faults if STRESS else Random(case).sample(faults, 25)
    for tried, (place, error) in enumerate(chosen):
        found = prepared(f"{tried}")
        fail = Steps(place, error)
        try:
            with suppress(BaseException), fail.watching():
                operation(found)
            assert fail.failed
            check(found)
            lost = [number for number in (0, 1) if not found.tiers(wanted(number).key) and not found.is_removed(wanted(number).key)]
            assert len(lost) <= found.stats()["dropped"] <= (not on_disk)
            if operation is replaced:
                assert load(found, 3) == "disk"
            for number in (0, 1, 2):
                load(found, number)
            check(found)
            if operation in (forget, leave):  # once more, and without a failure
                operation(found)
                assert "disk" not in found.tiers(wanted(4).key)
            found.close()
            if operation is forget:
                assert [path for path in (tmp_path / f"{tried}").rglob("*") if path.is_file() and TAG.encode() in path.read_bytes()] == []
            if on_disk:
                again = made(tmp_path / f"{tried}")
                for number in (0, 1, 2):
                    load(again, number)
                check(again)
                again.close()
                shutil.rmtree(tmp_path / f"{tried}")
        except BaseException as failure:
            failure.add_note(f"{place} {error}")
            raise
    if STRESS:
        print(f"\n{case}: {len(steps.seen)} steps, {len(faults)} failures")  # noqa: T201
