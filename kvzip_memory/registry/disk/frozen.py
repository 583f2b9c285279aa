"""The index of a folder that cannot be written, such as contexts baked into an image: its rows, in memory."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from urllib.parse import quote

from diskcache.core import MODE_RAW

from kvzip_memory.registry.disk.index import Index, IndexDamagedError, check_plain
from kvzip_memory.registry.disk.schema import oddity
from kvzip_memory.system.checksums import PLAIN, Checksums
from kvzip_memory.system.forks import refuse_after_fork, unforked
from kvzip_memory.system.locks import QUIET_S


def why_read_only(root: Path) -> str | None:
    """Why nothing can be stored in a folder that holds contexts; None if it can, or if there is no such folder."""
    if not (root / "blobs").is_dir():
        return None
    needed = [root / name for name in ("blobs", "index", "locks", "index/cache.db")]
    needed += [root] if not all(path.is_dir() for path in needed[:3]) else []
    for path in needed:
        if path.exists() and not os.access(path, os.W_OK):
            return f"{path} cannot be written by user {os.geteuid()}"
    return None


class FrozenIndex(Index):
    """Rows of an index as they were when it was opened. What is written to them is seen by this process alone."""

    def __init__(self, folder: Path, checksums: Checksums = PLAIN) -> None:
        self._lock, self._open, self._checksums = threading.RLock(), None, checksums
        refuse_after_fork(self, "_lock")
        self._rows = _Rows(_sound_rows(folder / "cache.db", checksums))

    def keys(self, prefix: str, newest_first: bool = False) -> Iterator[str]:
        found = [*self._rows][:: -1 if newest_first else 1]
        return (key[len(prefix) :] for key in found if key.startswith(prefix))


class _Rows(dict[str, str]):
    """What :class:`Index` uses of diskcache."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def delete(self, key: str) -> None:
        self.pop(key, None)

    def transact(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None: ...


def _sound_rows(database: Path, checksums: Checksums) -> dict[str, str]:
    """What can be read: with what SQLite has not put into the file yet if it can open that here, else without."""
    try:
        check_plain(database.parent)
    except IndexDamagedError:
        return {}
    for how in ("mode=ro", "immutable=1"):
        address = f"file:{quote(str(database))}?{how}"
        with suppress(sqlite3.Error), unforked(), closing(sqlite3.connect(address, uri=True, timeout=QUIET_S)) as opened:
            if oddity(opened) is not None:
                return {}
            found = opened.execute("SELECT key, value FROM Cache WHERE raw = 1 AND mode = ? ORDER BY rowid", (MODE_RAW,)).fetchall()
            return {key: value for key, value in found if _is_sound(key, value, checksums)}
    return {}


def _is_sound(key: object, value: object, checksums: Checksums) -> bool:
    if type(key) is not str or type(value) is not str:
        return False
    try:
        Index.unpacked(key, value, checksums)
    except IndexDamagedError:
        return False
    return True
