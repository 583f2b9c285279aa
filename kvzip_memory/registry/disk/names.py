"""What names mean: for every tenant and model one context each, the one that was last loaded under the name.

A file a name, written whole and renamed into place, beside the contexts and not in them or in the index. So what is left of an older text
cannot take its name back: not its file when the index is made anew, nor the memory of another process. A name whose context is no longer
stored finds nothing. One that was taken away leaves a note, under a digest and without the name itself, that is a moment later than the
name was given: a process that is still writing that comes too late.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from kvzip_memory.registry.disk.facts import is_label
from kvzip_memory.registry.disk.layout import KEY, entries
from kvzip_memory.system.checksums import PLAIN, Checksums
from kvzip_memory.system.digests import digest
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.locks import QUIET_S, held
from kvzip_memory.system.private import delete, read_text, write_text

_TICK = 1e-6  # seconds between two that are told apart
_DAY = 86400.0
_SETTLED_NS = 2 * 10**9  # a file that was written before that would show that it was written again: clocks of file systems tick slowly


@dataclass(frozen=True)
class Label:
    """What a name means.

    Attributes:
        name: empty in the note of one that was taken away.
        tenant: digest of the tenant whose name it is.
        family: digest of the model and the tenant that can use the context.
        key: the context's; empty once the name was taken away.
        loaded: when it was loaded under the name: seconds since the epoch, but always later than what the name meant before.
        sources: name and metadata of each document, as whoever gave the name loaded them.
    """

    name: str
    tenant: str | None
    family: str
    key: str
    loaded: float = 0.0
    sources: tuple[tuple[str, Mapping[str, Any]], ...] = ()


class Names:
    """Safe for threads, and for processes over one folder. What could not be written is known to this process alone.

    Args:
        root: of the disk tier, which has folders ``names`` and ``locks``; None keeps names in memory.
        read_only: names are read, and what is given is known to this process alone.
        checksums: how those of files are made.
    """

    def __init__(self, root: Path | None = None, read_only: bool = False, checksums: Checksums = PLAIN) -> None:
        self._root, self._read_only, self._checksums = root, read_only, checksums
        self._new: dict[str, dict[str, Label]] = {}  # by file and family; what is not written yet
        self._seen: dict[str, tuple[tuple[int, ...], dict[str, Label]]] = {}  # what files said, and their facts then
        self._lock = threading.Lock()
        refuse_after_fork(self, "_lock")

    def of(self, tenant: str | None, name: str) -> list[Label]:
        """What a tenant's name means, one label for each model, the last loaded last."""
        return _in_order(self._known(_file_of(tenant, name)).values())

    def still(self, tenant: str | None, names: Iterable[str], family: str, key: str) -> dict[str, float]:
        """Those of ``names`` that mean the context still, and when each was given."""
        labels = (label for name in names for label in self.of(tenant, name))
        return {label.name: label.loaded for label in labels if (label.key, label.family) == (key, family)}

    def everyones(self, name: str) -> list[Label]:
        """What a name means to all tenants, the last loaded last."""
        return _in_order(label for label in self.all() if label.name == name)

    def all(self, strict: bool = False) -> Iterator[Label]:
        """What every name means.

        Raises:
            OSError: a file cannot be read now, if ``strict``; after the names of all others.
        """
        new, seen, unread = self._all()
        for file, known in seen.items():
            yield from _in_order(_latest(known, new.get(file, {})).values())
        if strict and unread is not None:
            raise unread

    def give(self, label: Label, after: float = 0.0) -> Label:
        """Give a name to a context, for this process; with its time set, which is later than ``after``. :meth:`write` tells the others."""
        before = self._known(_file_of(label.tenant, label.name)).get(label.family)
        return self._newer(label, max(time.time(), after, 0.0 if before is None else before.loaded))

    def _newer(self, label: Label, than: float) -> Label:
        with self._lock:
            label = replace(label, loaded=_after(than))
            self._new.setdefault(_file_of(label.tenant, label.name), {})[label.family] = label
        return label

    def unwritten(self) -> list[Label]:
        """What was given here and could not be written yet."""
        with self._lock:
            return [label for new in self._new.values() for label in new.values() if label.key]

    def drop(self, label: Label) -> None:
        """Do not write what was given."""
        self._forget(_file_of(label.tenant, label.name), label)

    def write(self, label: Label, over: Label | None = None) -> None:
        """Write down what was given, unless the name was given to another context since.

        Args:
            over: what the name must mean, as far as is written; None for anything.

        Raises:
            OSError: it cannot be written now, or another process has been writing for a second.
        """
        if self._root is None or self._read_only:
            return
        file = _file_of(label.tenant, label.name)
        written = label if label.key else replace(label, name="", sources=())
        with self._writing():
            known = self._read(file, strict=True)
            now = known.get(label.family)
            if now is None or (now.loaded < label.loaded and (over is None or _are_one(over, now))):
                self._write(file, {**known, label.family: written})
        self._forget(file, label)

    def take(self, taken: Label) -> None:
        """Take a name away from a context, unless it was given again since, to that one or another.

        Raises:
            OSError: see :meth:`write`; or it cannot be read now what the name means.
        """
        file, family = _file_of(taken.tenant, taken.name), taken.family
        now = self._known(file, strict=True).get(family)
        if now is None or not _are_one(taken, now):
            return
        before = self._new.get(file, {}).get(family)
        if family not in self._read(file, strict=True):  # it could not be written
            self._forget(file, now)
            return
        label = self._newer(replace(taken, key="", sources=()), taken.loaded)
        try:
            self.write(label, taken)
            before = None
        finally:
            self._forget(file, label)
            if before is not None:
                with self._lock:
                    self._new.setdefault(file, {}).setdefault(family, before)

    def lose(self, tenant: str | None, name: str, family: str, key: str) -> None:
        """A context has left the memory: with it goes its name, if that is written nowhere."""
        file = _file_of(tenant, name)
        label = self._new.get(file, {}).get(family)
        if label is not None and label.key == key:
            self._forget(file, label)

    def gc(self, is_stored: Callable[[str], bool]) -> None:
        """Delete what has meant nothing for a day: names of contexts that are not stored, and notes of those that were taken away."""
        self.sweep()
        for file in self._facts():
            with self._writing():
                known = self._read(file)
                kept = {f: label for f, label in known.items() if is_stored(label.key) or abs(time.time() - label.loaded) < _DAY}
                if kept != known:
                    self._write(file, kept)

    def sweep(self) -> None:
        """Delete what writers have left that were killed."""
        left = [entry.name for entry in entries(self._root, "names") if entry.name.startswith(".")] if self._root is not None else []
        for name in left:
            with self._writing():
                delete(self._path(name).with_name(name))

    def _all(self) -> tuple[dict[str, dict[str, Label]], dict[str, dict[str, Label]], OSError | None]:
        """By file and family what was given here, and what files say: those that are as they were the last time are not read again. And why
        one cannot be read now."""
        with self._lock:
            new = {file: dict(labels) for file, labels in self._new.items()}
        settled = time.time_ns() - _SETTLED_NS
        facts = self._facts()  # after: what is written meanwhile leaves the memory
        seen = {file: known for file, known in self._seen.items() if known[0] == facts.get(file)}
        unread = None
        for file in {*facts, *new} - {*seen}:
            try:
                seen[file] = facts.get(file, ()), self._read(file, strict=True)
            except OSError as error:
                seen[file], unread = ((), {}), error
        self._seen = {file: (fact, known) for file, (fact, known) in seen.items() if known and fact and fact[0] < settled}
        return new, {file: known for file, (_, known) in seen.items()}, unread

    def _known(self, file: str, strict: bool = False) -> dict[str, Label]:
        """By family what the file says, or what was given later."""
        with self._lock:
            new = dict(self._new.get(file, {}))
        return _latest(self._read(file, strict), new)  # after: what is written meanwhile leaves the memory when it is in the file

    def _forget(self, file: str, label: Label) -> None:
        """Leave to the file what was given here, unless something else was given since."""
        with self._lock:
            new = self._new.get(file, {})
            if new.get(label.family) is label:
                del new[label.family]
                if not new:
                    del self._new[file]

    # -- files ---------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, tuple[int, ...]]:
        """By file what is another once it was written anew."""
        facts = dict[str, tuple[int, ...]]()
        for entry in entries(self._root, "names") if self._root is not None else ():
            if entry.name.endswith(".json"):
                with suppress(OSError):  # there no more
                    status = entry.stat(follow_symlinks=False)
                    facts[entry.name.removesuffix(".json")] = status.st_mtime_ns, status.st_ino, status.st_size
        return facts

    def _path(self, file: str) -> Path:
        assert self._root is not None
        return self._root / "names" / f"{file}.json"

    def _writing(self) -> Any:
        assert self._root is not None
        return held(FileLock(self._root / "locks" / "names.lock", thread_local=False, mode=0o600), "writing names", QUIET_S)

    def _read(self, file: str, strict: bool = False) -> dict[str, Label]:
        """By family; nothing if it is not there, or not what we wrote.

        Raises:
            OSError: it cannot be read now, if ``strict``.
        """
        if self._root is None:
            return {}
        try:
            labels = map(_label, json.loads(self._checksums.unseal("names", file, read_text(self._path(file)))))
            return {label.family: label for label in labels}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, RecursionError) as error:  # what cannot be read means nothing
            if strict and isinstance(error, OSError) and error.errno not in (None, errno.ELOOP):
                raise
            return {}

    def _write(self, file: str, known: Mapping[str, Label]) -> None:
        path = self._path(file)
        if not known:
            delete(path)
            return
        text = json.dumps([vars(label) for label in known.values()], default=str)
        temporary = path.with_name(f".{file}")  # one writer at a time
        write_text(temporary, self._checksums.seal("names", file, text))
        os.replace(temporary, path)


def _are_one(one: Label, other: Label) -> bool:
    """Whether a name was given only once."""
    return (one.key, one.loaded) == (other.key, other.loaded)


def _label(row: Any) -> Label:
    """Raises:
    ValueError: it is none of ours.
    """
    if not is_label(row) or not (row["key"] == "" or KEY.fullmatch(row["key"])):
        raise ValueError("a field of another kind")
    return Label(**{**row, "sources": tuple(map(tuple, row["sources"]))})


def _latest(known: Mapping[str, Label], new: Mapping[str, Label]) -> dict[str, Label]:
    """By family what a file says, or what was given later."""
    later = {family: label for family, label in new.items() if family not in known or known[family].loaded < label.loaded}
    return {**known, **later}


def _after(loaded: float) -> float:
    return max(loaded + _TICK, math.nextafter(loaded, math.inf))  # far in the future a tick is too little to tell apart


def _file_of(tenant: str | None, name: str) -> str:
    return digest(["name", tenant, name])


def _in_order(labels: Iterable[Label]) -> list[Label]:
    return sorted((label for label in labels if label.key), key=lambda label: label.loaded)
