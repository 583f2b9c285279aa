"""Turns of conversations that integrations keep beside the contexts made of them: as text, a file a session, in ``cache_dir/memory``.

A record is a line of JSON. The first is ``{"session": its name, "ttl": seconds or null}``; those of turns and contexts are their writer's,
and a context's key is under ``"context"``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.registry import ContextRegistry

logger = logging.getLogger(__name__)


class TurnsFile:
    """The file of a session. It expires with its session's ``ttl``, so many seconds after the last record."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, cache_dir: Path, *identity: str | None) -> TurnsFile:
        """The file of what has these names, which cannot be told from the file's."""
        return cls(cache_dir / "memory" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.jsonl")

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """The records, and how many bytes they take; a damaged line is left out with a warning."""
        content = self.path.read_bytes() if self.path.exists() else b""
        records = []
        for line in filter(None, content.splitlines()):
            try:
                records.append(json.loads(line))
            except ValueError:  # the process was killed while it wrote
                logger.warning("%s: a damaged line is left out", self.path)
        return [record for record in records if isinstance(record, dict)], len(content)

    def write(self, record: Mapping[str, Any], session: str, ttl: float | None) -> None:
        """Add a record, behind the first one if there is none yet."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        records = [record] if self.size() else [{"session": session, "ttl": ttl}, record]
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            file.write("".join(f"\n{json.dumps(record)}" for record in records).encode())  # in front, as the last line may be damaged
            file.flush()
            os.fsync(file.fileno())

    def size(self) -> int:
        with suppress(OSError):
            return self.path.stat().st_size
        return 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def remove_if_older(self, ttl: float) -> None:
        """Delete it if the last record is older than so many seconds."""
        with suppress(FileNotFoundError):
            if self.path.stat().st_mtime + ttl < time.time():
                self.remove()


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
    for path in (cache_dir / "memory").glob("*.jsonl"):
        with suppress(FileNotFoundError):  # removed meanwhile
            file, written = TurnsFile(path), path.stat().st_mtime
            records, nbytes = file.read()
            first = next((record for record in records if "session" in record), {})
            turns = sum(len(said) for record in records if isinstance(said := record.get("turns"), list))
            keys = frozenset(str(record["context"]) for record in records if "context" in record)
            expires = written + ttl if isinstance(ttl := first.get("ttl"), int | float) else None
            found.append(Session(file, str(first.get("session", path.stem)), turns, keys, nbytes, written, expires))
    return iter(sorted(found, key=lambda session: -session.written))


def find(cache_dir: Path, reference: str) -> Session | None:
    """The session of a name, or of a file whose name begins so (8 digits at least).

    Raises:
        InputError: several.
    """
    named = [s for s in sessions(cache_dir) if s.name == reference or (len(reference) >= 8 and s.file.path.stem.startswith(reference))]
    if len(named) > 1:
        stems = [session.file.path.stem[:12] for session in named]
        raise InputError(f"{len(named)} sessions are called {reference!r}, of several tenants; give the file of one: {stems}")
    return named[0] if named else None


def remove_expired(cache_dir: Path) -> int:
    """Delete the turns of expired sessions; their contexts expire by themselves."""
    expired = [session for session in sessions(cache_dir) if session.expired]
    for session in expired:
        session.file.remove()
    return len(expired)


def erase(cache_dir: Path, tenant: str | None, name: str) -> int:
    """Delete the turns of a tenant's session, which its contexts are tagged with; how many there were."""
    found = [session for session in sessions(cache_dir) if session.name == name]
    names = [(name[:at], name[at + 2 :]) for at in range(len(name)) if name.startswith(": ", at)]
    paths = {TurnsFile.of(cache_dir, tenant, block.removeprefix("memory "), session_id).path for block, session_id in names}
    mine = [session for session in found if session.file.path in paths]
    for session in mine:
        session.file.remove()
    return sum(session.turns for session in mine)
