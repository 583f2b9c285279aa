"""Who builds or writes a context, among threads and processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from kvzip_memory.registry.disk.facts import is_progress
from kvzip_memory.registry.disk.folder import Folder
from kvzip_memory.registry.disk.layout import files
from kvzip_memory.system.forks import refuse_after_fork
from kvzip_memory.system.locks import Hold, Together
from kvzip_memory.system.private import delete, read_text, write_text


class Builders:
    """Parts in the locks of keys, and notes of how far builds are. It owns what this process' threads hold of these locks."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._mutex = threading.Lock()
        self._stripes: WeakValueDictionary[str, Together] = WeakValueDictionary()
        refuse_after_fork(self, "_mutex")

    def hold(self, key: str) -> Hold:
        """A part in the lock of a key, not taken yet. Threads of this tier hold it together: they build other keys, or write the same."""
        with self._mutex:
            stripe = self._stripes.get(key[:3])
            if stripe is None:
                stripe = self._stripes[key[:3]] = Together(self._folder.lock(key))
            return Hold(stripe)

    def report(self, key: str, progress: Mapping[str, Any]) -> None:
        """Leave a note for other processes how far a build is."""
        with suppress(OSError):
            write_text(self.note_of(key), self._folder.checksums.seal("progress", key, json.dumps({"key": key, **progress})))

    def reported(self, key: str) -> dict[str, Any] | None:
        """What the process that builds ``key`` has last reported."""
        with suppress(OSError, ValueError, TypeError, RecursionError):  # the last: what is no note of ours
            note = json.loads(self._folder.checksums.unseal("progress", key, read_text(self.note_of(key))))
            return dict(note) if is_progress(note) and note["key"] == key else None
        return None

    def unreport(self, key: str) -> None:
        """Delete the note of a build."""
        if self.reported(key):
            delete(self.note_of(key))

    def unreport_all(self) -> None:
        """Delete the notes of all builds; those that are under way leave another one."""
        for note in files(self._folder.root, "locks"):
            if note.suffix == ".progress":
                delete(note)

    def note_of(self, key: str) -> Path:
        return self._folder.root / "locks" / f"{key[:3]}.progress"
