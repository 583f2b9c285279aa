"""Turns of conversations that integrations keep beside the contexts made of them: as text, a file a session, in ``cache_dir/memory``.

A record is a line of JSON that begins with the checksum of its rest; with a secret, of the file's name, of the first line and of the byte
it begins at, too, so that none stands elsewhere than where it was written. The first one is ``{"session": its name, "ttl": seconds or null,
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
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_memory.errors import InputError, StorageError
from kvzip_memory.registry import EVERYONE, ContextRegistry
from kvzip_memory.registry.disk.facts import is_line
from kvzip_memory.registry.holders import unescaped
from kvzip_memory.system.checksums import PLAIN, Checksums, check_ours_alone
from kvzip_memory.system.findings import Finding
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.locks import held, lock_in
from kvzip_memory.system.paths import as_folder
from kvzip_memory.system.printable import brief, logger_of
from kvzip_memory.system.private import LIMIT, check_folder, check_size, delete, is_file, is_folder, make_folder, open_file, usable

logger = logger_of(__name__)

_FILE = re.compile(r"[0-9a-f]{64}\.jsonl")

#: The turns of a session may take so many bytes. They are originals that nothing could be made anew of, so none makes way for others.
LARGEST_SESSION = 16 << 20


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
        self._content, self._removed, self._written, self._lock = bytearray(), 0, 0.0, threading.Lock()
        refuse_after_fork(self, "_lock")

    def read(self, since: Mark | None = None) -> tuple[list[tuple[int, dict[str, Any]]], Mark]:
        """The records behind a mark, with the bytes they begin at, and the mark behind them; a damaged line is left out with a warning.

        If the mark has another ``head`` than before, the session was deleted, and these are all records it has got since.
        """
        stamp, head, at, content = self._behind(since or Mark())
        records = []
        for line in io.BytesIO(content):  # splitlines() would take a damaged byte for an end
            record = self._record(line, head if at else b"", at)
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
            InputError: turns that are none, or with which the session would have more than :data:`LARGEST_SESSION`.
            OSError: the disk's; no one reads what was written.
        """
        if not is_line(json.loads(text := json.dumps(record))):  # nobody would read it
            raise InputError(f"{brief(session)}: {brief(text)} are no turns; give messages with a role and a text")
        with self._locked():
            if still():
                if "turns" in record and (nbytes := self.nbytes()) + (more := len(text)) > LARGEST_SESSION:
                    raise InputError(
                        f"{brief(session)} has {nbytes:,} bytes of turns, and {more:,} more are to come; a session has at most "
                        f"{LARGEST_SESSION:,}: go on under another id, or delete its turns (block.forget, kvzip-memory rm)"
                    )
                self._add({"session": session, "ttl": ttl, "id": uuid.uuid4().hex}, record)

    def stamp(self) -> tuple[int, ...]:
        """Another one after each change."""
        return self._removed, len(self._content)

    def nbytes(self) -> int:
        """Bytes of all lines."""
        return len(self._content)

    def remove(self, if_older: float = float("-inf")) -> None:
        """Delete the session, if nothing has been added for so many seconds."""
        with self._locked():
            if self._content and self._written + if_older < time.time():
                self._content, self._removed = bytearray(), self._removed + 1

    def _locked(self) -> AbstractContextManager[object]:
        return self._lock

    def _behind(self, since: Mark) -> tuple[tuple[int, ...], bytes, int, bytes]:
        """The stamp, the first line, and what stands from which byte on: that of a mark, or 0 if the mark is of what was deleted."""
        stamp, content = self.stamp(), self._content
        head = bytes(content[: content.find(b"\n") + 1])
        at = since.end if head == since.head else 0
        return stamp, head, at, bytes(content[at:])

    def _add(self, first: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        head = bytes(self._content[: self._content.find(b"\n") + 1])
        self._content += self._lines(head, len(self._content), first, record)
        self._written = time.time()

    def _lines(self, head: bytes, at: int, first: Mapping[str, Any], record: Mapping[str, Any]) -> bytes:
        """A record as it is written at a byte; behind the first one if there is no first line yet."""
        if head:
            return self._line(record, head, at)
        head = self._line(first, b"", 0)
        return head + self._line(record, head, len(head))

    def _line(self, record: Mapping[str, Any], head: bytes, at: int) -> bytes:
        text = json.dumps(record).encode()
        return self._sum(text, head, at) + text[1:] + b"\n"

    def _record(self, line: bytes, head: bytes, at: int) -> dict[str, Any] | None:
        """What a line says, None if it is not whole, or stands elsewhere than where it was written."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(record, dict):
            return None
        if not self._is_sound(line, head, at, record):
            return None
        said = {name: value for name, value in record.items() if name not in ("crc", "hmac")}
        return said if is_line(said) else None

    def _is_sound(self, line: bytes, head: bytes, at: int, record: Mapping[str, Any]) -> bool:
        length = len(self._sum(b"", b"", 0))
        if "crc" not in record:
            return "hmac" not in record  # one of an earlier version has no checksum
        return line.startswith(self._sum(b"{" + line.rstrip(b"\n")[length:], head, at))

    def _sum(self, text: bytes, head: bytes, at: int) -> bytes:
        """What a line begins with."""
        return b'{"crc": "%08x", ' % zlib.crc32(text)


class TurnsFile(Turns):
    """The lines of a session, in a file. It expires with its session's ``ttl``, so many seconds after the last record.

    A folder that others can write, or anything else in its place or the file's, is neither read nor written: a StorageError says so.
    With a secret, others may write it, and what they have written is left out.
    """

    def __init__(self, path: Path, checksums: Checksums = PLAIN) -> None:
        self.path, self._checksums = path, checksums

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, cache_dir: str | Path, *identity: str | None, checksums: Checksums = PLAIN) -> TurnsFile:
        """The file of what has these names, which cannot be told from the file's."""
        return cls(_folder(cache_dir) / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.jsonl", checksums)

    def stamp(self) -> tuple[int, ...]:
        with suppress(OSError):
            return _stamp(self.path.lstat())
        return ()

    def nbytes(self) -> int:
        with suppress(OSError):
            return self.path.lstat().st_size
        return 0

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
        self.check()
        return held(lock_in(self.path.parent.parent, f"memory-{self.path.stem[:2]}"), "writing down a turn")

    def check(self) -> None:
        """Raises:
        StorageError: others can write the folder, we cannot read it, it is none, or has another secret.
        """
        folder = self.path.parent
        check_folder(folder)
        with usable(folder):
            check_ours_alone(folder.parent, folder, [self.path], folder.parent / "contexts", self._checksums)

    def _behind(self, since: Mark) -> tuple[tuple[int, ...], bytes, int, bytes]:
        self.check()
        try:
            descriptor = open_file(self.path)
        except FileNotFoundError:
            return (), b"", 0, b""
        with os.fdopen(descriptor, "rb") as file:
            if (nbytes := os.fstat(descriptor).st_size) > LIMIT:
                way_out = f"go on under another id, or delete it (kvzip-memory rm {self.path.stem[:12]})"
                raise StorageError(f"{self.path} has {nbytes:,} bytes of turns, and {LIMIT:,} at most are read; {way_out}")
            stamp, line = _stamp(os.fstat(file.fileno())), file.readline()
            head = line if line.endswith(b"\n") else b""
            at = since.end if head == since.head else 0
            file.seek(at)
            return stamp, head, at, file.read()

    def _add(self, first: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        make_folder(self.path.parent)
        descriptor = open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            head, whole = _ends(descriptor)
            if not head:  # or a first line that was not written whole, which no one has read
                os.ftruncate(descriptor, 0)
            end, at = b"" if whole or not head else b"\n", os.lseek(descriptor, 0, os.SEEK_END)
            lines = end + self._lines(head, at + len(end), first, record)
            check_size(self.path, at + len(lines))
            while lines:
                lines = lines[os.write(descriptor, lines) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not head:
            _fsync_folder(self.path.parent)

    def _sum(self, text: bytes, head: bytes, at: int) -> bytes:
        if not self._checksums.are_keyed:
            return super()._sum(text, head, at)
        return b'{"hmac": "%s", ' % self._checksums.of("turn", self.path.stem, "\n", head, f"{at}\n", text).encode()

    def _is_sound(self, line: bytes, head: bytes, at: int, record: Mapping[str, Any]) -> bool:
        if not self._checksums.are_keyed:
            return super()._is_sound(line, head, at, record)
        length = len(self._sum(b"", b"", 0))
        wanted = self._sum(b"{" + line.rstrip(b"\n")[length:], head, at)
        return self._checksums.same(line[:length].decode(errors="replace"), wanted.decode())


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _ends(descriptor: int) -> tuple[bytes, bool]:
    """The first line of a file, empty if it has no end, and whether the last one has one."""
    with open(descriptor, "rb", closefd=False) as file:
        head = file.readline()
        if not head.endswith(b"\n"):
            return b"", False
        file.seek(-1, os.SEEK_END)
        return head, file.read() == b"\n"


def _fsync_folder(folder: Path) -> None:
    """So that a new file is found after a loss of power; not every system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
            StorageError: as for :meth:`ContextRegistry.check_changeable`; nothing was deleted.
        """
        forgotten = registry.forget(lambda key, tag: key in self.keys and tag == self.name)
        self.file.remove()
        return len(forgotten.deleted)


def sessions(cache_dir: str | Path, checksums: Checksums = PLAIN) -> list[Session]:
    """All sessions with turns in a folder, the last one written first. Of one that cannot be read a warning says why.

    Args:
        cache_dir: as it was given to the engine.
        checksums: ``Checksums(secret)`` of a folder that has a secret.

    Raises:
        StorageError: others can write the folder, or it has another secret.
    """
    found, paths = [], _files(cache_dir)
    if paths:
        TurnsFile.of(cache_dir, checksums=checksums).check()
    for path in paths:
        with suppress(FileNotFoundError):  # removed meanwhile
            file, status = TurnsFile(path, checksums), path.lstat()
            try:
                records = [record for _, record in file.read()[0]]
            except FileNotFoundError:
                raise
            except OSError as error:  # the file's own: the others go on
                logger.warning("%s", error)
                records = []
            first = next((record for record in records if "session" in record), {})
            keys = frozenset(str(record["context"]) for record in records if "context" in record)
            expires = status.st_mtime + ttl if isinstance(ttl := first.get("ttl"), int | float) else None
            name = str(first.get("session", path.stem))
            found.append(Session(file, name, _count(records), keys, status.st_size, status.st_mtime, expires))
    return sorted(found, key=lambda session: -session.written)


def _count(records: Iterable[Mapping[str, Any]]) -> int:
    return sum(len(said) for record in records if isinstance(said := record.get("turns"), list))


def _folder(cache_dir: str | Path) -> Path:
    return as_folder(cache_dir, "cache_dir") / "memory"


def _files(cache_dir: str | Path) -> list[Path]:
    folder = _folder(cache_dir)
    with usable(folder):
        return [path for path in folder.iterdir() if _FILE.fullmatch(path.name) and is_file(path)] if is_folder(folder) else []


def usage(cache_dir: str | Path | None) -> dict[str, int]:
    """How many ``sessions`` there are in a folder, and the ``nbytes`` of their turns; none without a folder."""
    sizes = []
    for path in [] if cache_dir is None else _files(cache_dir):
        with suppress(FileNotFoundError):  # removed meanwhile
            sizes.append(path.lstat().st_size)
    return {"sessions": len(sizes), "nbytes": sum(sizes)}


def examine(cache_dir: str | Path, checksums: Checksums = PLAIN) -> list[Finding]:
    """What is to be said of the sessions in a folder."""
    found, expired, full = usage(cache_dir), 0, list[str]()
    if not found["sessions"]:
        return []
    for session in sessions(cache_dir, checksums):
        expired += session.expired
        full += [repr(session.name)] if session.nbytes > 0.9 * LARGEST_SESSION else []
    told = f"{found['sessions']:,} with {found['nbytes']:,} bytes of turns as text, beside disk_bytes"
    findings = [Finding("ok", "sessions", told)]
    if expired:
        findings.append(Finding("note", "expired", f"{expired} sessions", "run gc to delete their turns"))
    if full:
        way_out = "go on under another id, or rm it"
        findings.append(Finding("note", "sessions", f"nearly {LARGEST_SESSION:,} bytes, the limit: {', '.join(full[:10])}", way_out))
    return findings


def find(cache_dir: str | Path, reference: str, tenant: str | None = EVERYONE, checksums: Checksums = PLAIN) -> Session | None:
    """The session of a name, or of a file whose name begins so (8 digits at least); of a tenant, if its digest is given.

    Raises:
        InputError: several.
    """
    found = [session for session in sessions(cache_dir, checksums) if is_of(cache_dir, session, tenant)]
    named = [s for s in found if s.name == reference or (len(reference) >= 8 and s.file.path.stem.startswith(reference))]
    if len(named) > 1:
        stems = [session.file.path.stem[:12] for session in named]
        raise InputError(f"{len(named)} sessions are called {reference!r}, of several tenants; give the file of one: {stems}")
    return named[0] if named else None


def is_of(cache_dir: str | Path, session: Session, tenant: str | None) -> bool:
    """Whether a session is a tenant's."""
    return tenant == EVERYONE or session.file.path in _files_of(cache_dir, tenant, session.name)


def remove_expired(cache_dir: str | Path, checksums: Checksums = PLAIN) -> int:
    """Delete the turns of expired sessions; their contexts expire by themselves."""
    expired = [(session, session.expires) for session in sessions(cache_dir, checksums) if session.expires is not None and session.expired]
    for session, expires in expired:
        session.file.remove(if_older=expires - session.written)
    return len(expired)


def erase(cache_dir: str | Path, tenant: str | None, name: str, checksums: Checksums = PLAIN) -> int:
    """Delete the turns of a tenant's session, which its contexts are tagged with; how many there were."""
    if tenant == EVERYONE:
        files = [session.file for session in sessions(cache_dir, checksums) if session.name == name]
    else:  # whatever else lies there
        files = [TurnsFile(path, checksums) for path in _files_of(cache_dir, tenant, name) if is_file(path)]
    turns = 0
    for file in files:
        with suppress(OSError):  # it is deleted, whatever is in it
            turns += _count(record for _, record in file.read()[0])
        file.remove()
    return turns


def _files_of(cache_dir: str | Path, tenant: str | None, name: str) -> set[Path]:
    """Where the turns of a tenant's session of a name may be."""
    names = [(unescaped(name[:at]), unescaped(name[at + 2 :])) for at in range(len(name)) if name.startswith(": ", at)]
    return {TurnsFile.of(cache_dir, tenant, block.removeprefix("memory "), session_id).path for block, session_id in names}
