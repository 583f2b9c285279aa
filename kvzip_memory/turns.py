"""Turns of conversations that integrations keep beside the contexts made of them: as text, a file a session, in ``cache_dir/memory``.

A record is a line of JSON that begins with the checksum of its rest. The first one is ``{"session": its name, "ttl": seconds or null,
"id": hex}``; the others are turns, or what was made of them: a context's key is under ``"context"``. Lines are only ever added. So where
a turn stands, ``[byte its line begins at, number in the line]``, is the same for all processes, and what was made of which turns is said
by that and not by what a process has counted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.forks import refuse_after_fork
from kvzip_memory.locks import held, lock_in
from kvzip_memory.printable import logger_of
from kvzip_memory.private import check_folder, check_not_shared, check_size, delete, is_file, is_folder, make_folder, open_file, usable
from kvzip_memory.registry import EVERYONE, ContextRegistry
from kvzip_memory.registry.facts import is_line
from kvzip_memory.registry.holders import unescaped

logger = logger_of(__name__)

_FILE = re.compile(r"[0-9a-f]{64}\.jsonl")


@dataclass(frozen=True)
class Mark:
    """How far a session's lines were read.

    Attributes:
        head: the first line, which no two sessions share, nor one with itself once it was deleted.
        end: bytes.
        stamp: what :meth:`Turns.stamp` was.
    """

    head: bytes = b""
    end: int = 0
    stamp: tuple[int, ...] = ()


class Turns:
    """The lines of a session, in memory. Safe for threads; those of a :class:`TurnsFile` for processes, too, killed whenever it may be.

    A line is there for every reader as soon as :meth:`append` has returned. One that could not be written whole never is.
    """

    def __init__(self) -> None:
        self._content, self._removed, self._written, self._lock = b"", 0, 0.0, threading.Lock()
        refuse_after_fork(self, "_lock")

    def read(self, since: Mark | None = None) -> tuple[list[tuple[int, dict[str, Any]]], Mark]:
        """The records behind a mark, with the bytes they begin at, and the mark behind them; a damaged line is left out with a warning.

        If the mark has another ``head`` than before, the session was deleted, and these are all records it has got since.
        """
        stamp, head, at, content = self._behind(since or Mark())
        records = []
        for line in io.BytesIO(content):  # splitlines() would take a damaged byte for an end
            record = _record(line)
            if record is not None:
                records.append((at, record))
            elif not line.endswith(b"\n"):
                break  # being written, or its writer was killed
            elif line.strip():
                logger.warning("%s: a damaged line is left out", self)
            at += len(line)
        return records, Mark(head, at, stamp)

    def append(self, record: Mapping[str, Any], session: str, ttl: float | None, still: Callable[[], bool] = lambda: True) -> None:
        """Add a record, behind the first one if there is none yet. It is on disk when this returns.

        Args:
            still: asked when nobody else can add one; if it says no, nothing is added.

        Raises:
            OSError: the disk's; no one reads what was written.
        """
        line = _line(record)
        with self._locked():
            if still():
                self._add(_line({"session": session, "ttl": ttl, "id": uuid.uuid4().hex}), line)

    def stamp(self) -> tuple[int, ...]:
        """Another one after each change."""
        return self._removed, len(self._content)

    def remove(self, if_older: float = float("-inf")) -> None:
        """Delete the session, if nothing has been added for so many seconds."""
        with self._locked():
            if self._content and self._written + if_older < time.time():
                self._content, self._removed = b"", self._removed + 1

    def _locked(self) -> AbstractContextManager[object]:
        return self._lock

    def _behind(self, since: Mark) -> tuple[tuple[int, ...], bytes, int, bytes]:
        """The stamp, the first line, and what stands from which byte on: that of a mark, or 0 if the mark is of what was deleted."""
        stamp, content = self.stamp(), self._content
        head = content[: content.find(b"\n") + 1]
        at = since.end if head == since.head else 0
        return stamp, head, at, content[at:]

    def _add(self, first: bytes, line: bytes) -> None:
        self._content += line if self._content else first + line
        self._written = time.time()


class TurnsFile(Turns):
    """The lines of a session, in a file. It expires with its session's ``ttl``, so many seconds after the last record.

    A folder that others can write, or anything else in its place or the file's, is neither read nor written: a StorageError says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, cache_dir: Path, *identity: str | None) -> TurnsFile:
        """The file of what has these names, which cannot be told from the file's."""
        return cls(cache_dir / "memory" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.jsonl")

    def stamp(self) -> tuple[int, ...]:
        with suppress(OSError):
            return _stamp(self.path.lstat())
        return ()

    def remove(self, if_older: float = float("-inf")) -> None:
        with suppress(FileNotFoundError), usable(self.path):
            if self._is_older(if_older):
                with self._locked():
                    if self._is_older(if_older):  # nor was anything added while we waited
                        delete(self.path)

    def _is_older(self, seconds: float) -> bool:
        status = self.path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_mtime + seconds < time.time()

    def _locked(self) -> AbstractContextManager[object]:
        """Not a lock of the file itself, which another process may delete meanwhile."""
        self._check()
        return held(lock_in(self.path.parent.parent, f"memory-{self.path.stem[:2]}"), "writing down a turn")

    def _check(self) -> None:
        """Raises:
        StorageError: others can write the folder, or it is none.
        """
        folder = self.path.parent
        check_folder(folder)
        check_not_shared(folder.parent, folder, [self.path])

    def _behind(self, since: Mark) -> tuple[tuple[int, ...], bytes, int, bytes]:
        self._check()
        try:
            descriptor = open_file(self.path)
        except FileNotFoundError:
            return (), b"", 0, b""
        with os.fdopen(descriptor, "rb") as file:
            check_size(self.path, os.fstat(descriptor).st_size)
            stamp, line = _stamp(os.fstat(file.fileno())), file.readline()
            head = line if line.endswith(b"\n") else b""
            at = since.end if head == since.head else 0
            file.seek(at)
            return stamp, head, at, file.read()

    def _add(self, first: bytes, line: bytes) -> None:
        make_folder(self.path.parent)
        descriptor = open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            check_size(self.path, os.fstat(descriptor).st_size + len(first) + len(line))
            begun, whole = _ends(descriptor)
            if not begun:  # or a first line that was not written whole, which no one has read
                os.ftruncate(descriptor, 0)
            lines = (b"" if whole else b"\n") + line if begun else first + line
            while lines:
                lines = lines[os.write(descriptor, lines) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not begun:
            _fsync_folder(self.path.parent)


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _ends(descriptor: int) -> tuple[bool, bool]:
    """Whether the first line of a file has an end, and the last one."""
    with open(descriptor, "rb", closefd=False) as file:
        if not file.readline().endswith(b"\n"):
            return False, False
        file.seek(-1, os.SEEK_END)
        return True, file.read() == b"\n"


def _fsync_folder(folder: Path) -> None:
    """So that a new file is found after a loss of power; not every system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_SUM = b'{"crc": "%08x", '


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record).encode()
    return _SUM % zlib.crc32(text) + text[1:] + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says, None if it is not whole or not one of ours. One of an earlier version has no checksum."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    sum_ = record.pop("crc", None)
    text = b"{" + line.rstrip(b"\n")[len(_SUM % 0) :]
    return record if sum_ in (None, f"{zlib.crc32(text):08x}") and is_line(record) else None


@dataclass(frozen=True)
class Session:
    """What there is of a session in a folder.

    Attributes:
        name: what it is called, and its contexts are tagged with; the file's name where that is not known.
        keys: contexts that were made of its turns.
        written: when the last record was, seconds since the epoch.
        expires: when it is deleted, None for never.
    """

    file: TurnsFile
    name: str
    turns: int
    keys: frozenset[str]
    nbytes: int
    written: float
    expires: float | None

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires < time.time()

    def remove(self, registry: ContextRegistry) -> int:
        """Delete the contexts that only this session has loaded, how many, and then its turns, of which they could be made again.

        Raises:
            StorageError: another process holds the index of the folder; nothing was deleted.
        """
        forgotten = registry.forget(lambda key, tag: key in self.keys and tag == self.name)
        self.file.remove()
        return len(forgotten.deleted)


def sessions(cache_dir: Path) -> Iterator[Session]:
    """All sessions with turns in a folder, the last one written first."""
    found = []
    folder = cache_dir / "memory"
    with usable(folder):
        paths = [path for path in folder.iterdir() if _FILE.fullmatch(path.name) and is_file(path)] if is_folder(folder) else []
    for path in paths:
        with suppress(FileNotFoundError):  # removed meanwhile
            file, written = TurnsFile(path), path.lstat().st_mtime
            records, nbytes = [record for _, record in file.read()[0]], path.lstat().st_size
            first = next((record for record in records if "session" in record), {})
            turns = sum(len(said) for record in records if isinstance(said := record.get("turns"), list))
            keys = frozenset(str(record["context"]) for record in records if "context" in record)
            expires = written + ttl if isinstance(ttl := first.get("ttl"), int | float) else None
            found.append(Session(file, str(first.get("session", path.stem)), turns, keys, nbytes, written, expires))
    return iter(sorted(found, key=lambda session: -session.written))


def find(cache_dir: Path, reference: str, tenant: str | None = EVERYONE) -> Session | None:
    """The session of a name, or of a file whose name begins so (8 digits at least); of a tenant, if its digest is given.

    Raises:
        InputError: several.
    """
    named = [s for s in sessions(cache_dir) if s.name == reference or (len(reference) >= 8 and s.file.path.stem.startswith(reference))]
    named = [s for s in named if tenant == EVERYONE or s.file.path in _files_of(cache_dir, tenant, s.name)]
    if len(named) > 1:
        stems = [session.file.path.stem[:12] for session in named]
        raise InputError(f"{len(named)} sessions are called {reference!r}, of several tenants; give the file of one: {stems}")
    return named[0] if named else None


def remove_expired(cache_dir: Path) -> int:
    """Delete the turns of expired sessions; their contexts expire by themselves."""
    expired = [(session, session.expires) for session in sessions(cache_dir) if session.expires is not None and session.expired]
    for session, expires in expired:
        session.file.remove(if_older=expires - session.written)
    return len(expired)


def erase(cache_dir: Path, tenant: str | None, name: str) -> int:
    """Delete the turns of a tenant's session, which its contexts are tagged with; how many there were."""
    paths = _files_of(cache_dir, tenant, name)
    mine = [session for session in sessions(cache_dir) if session.name == name and session.file.path in paths]
    for session in mine:
        session.file.remove()
    return sum(session.turns for session in mine)


def _files_of(cache_dir: Path, tenant: str | None, name: str) -> set[Path]:
    """Where the turns of a tenant's session of a name may be."""
    names = [(unescaped(name[:at]), unescaped(name[at + 2 :])) for at in range(len(name)) if name.startswith(": ", at)]
    return {TurnsFile.of(cache_dir, tenant, block.removeprefix("memory "), session_id).path for block, session_id in names}
