"""The files of a disk tier's folder: where they lie, what they say of themselves, and the locks beside them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kvzip_memory.errors import CorruptFileError
from kvzip_memory.registry.beginnings import beginning
from kvzip_memory.registry.disk import layout
from kvzip_memory.registry.disk.entry import Entry
from kvzip_memory.registry.disk.files import open_context, read_header, read_token_ids
from kvzip_memory.registry.disk.frozen import why_read_only
from kvzip_memory.registry.disk.index import IndexUnavailableError
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.disk.version import check_version
from kvzip_memory.registry.identity import EVERYONE, is_whose, key_of
from kvzip_memory.system.checksums import Checksums, check_ours_alone
from kvzip_memory.system.private import check_folder, is_file, is_folder, make_folder


class Folder:
    """A folder of the layout, made if it is not there. It is never locked as a whole: files have locks by their keys.

    Args:
        root: the folder.
        tenant: digest of whose contexts are told of.
        checksums: how those of files are made.

    Attributes:
        read_only: why nothing can be stored or changed in it; None if it can.

    Raises:
        OSError: it cannot be made.
        StorageError: it is of a newer version or has another secret, others can write it, or something else is where a folder of ours
            belongs.
    """

    def __init__(self, root: Path, tenant: str | None, checksums: Checksums) -> None:
        self.root, self.tenant, self.checksums = root, tenant, checksums
        folders = [root, *(root / name for name in layout.FOLDERS)]
        for folder in folders:
            check_folder(folder)
        check_ours_alone(root.parent, root, (path for path in root.rglob("*")), root, checksums)
        self.read_only = why_read_only(root)
        for folder in folders:
            if self.read_only is None:
                make_folder(folder)
            if folder is root:
                self.check_version()

    def check_version(self) -> None:
        """Raises:
        StorageError: see :func:`~kvzip_memory.registry.disk.version.check_version`.
        """
        check_version(self.root, self.checksums, self.read_only is not None)

    def check_writable(self) -> None:
        """Raises:
        IndexUnavailableError: the folder is read-only.
        """
        if self.read_only is not None:
            raise IndexUnavailableError(f"{self.read_only}: contexts in it are used, and cannot be stored, changed or deleted")

    def told(self, message: str, whose: str | None = EVERYONE) -> str:
        """A message as the tenant may hear it: it names no key of what is not known to be its own."""
        return message if self.tenant in (EVERYONE, whose) else layout.without_keys(message)

    def is_mine(self, entry: Entry) -> bool:
        """Whether a context is the tenant's."""
        return is_whose(entry.identity, self.tenant)

    # -- where files lie -----------------------------------------------------------------------------------------

    def path(self, key: str) -> Path:
        """Raises:
        ValueError: it is no key.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key, which has 64 hex digits")
        return self.root / "blobs" / key[:2] / f"{key}.safetensors"

    def inside(self, path: Path) -> bool:
        """Whether a blob's folder is one of ours, or none yet, and no link to somewhere else."""
        return is_folder(path.parent.parent) and (not os.path.lexists(path.parent) or is_folder(path.parent))

    def has(self, key: str) -> bool:
        return KEY.fullmatch(key) is not None and self.inside(self.path(key)) and is_file(self.path(key))

    def temporary(self, key: str) -> Path:
        """A new name for the file of a context while it is written."""
        return self.root / "blobs" / ".tmp" / f"{key}.{uuid.uuid4().hex[:8]}.tmp"

    def blobs(self) -> Iterator[Path]:
        """Files of contexts."""
        return layout.blobs(self.root)

    def temporaries(self) -> Iterator[Path]:
        """Files being written: theirs are named after the key. The first folder is that of older versions."""
        for folder in ("tmp", "blobs/.tmp"):
            yield from layout.files(self.root, folder)

    def quarantined(self) -> Iterator[Path]:
        """Files that were taken out of use."""
        return layout.files(self.root, "quarantine")

    def measured(self) -> int:
        """Bytes of all of them."""
        sizes: dict[int, int] = {}
        for files in (self.temporaries(), self.blobs(), self.quarantined()):  # the way a file goes; one that moves meanwhile counts once
            for path in files:
                with suppress(FileNotFoundError):
                    status = path.lstat()
                    sizes[status.st_ino] = status.st_size
        return sum(sizes.values())

    # -- what they say -------------------------------------------------------------------------------------------

    def entry_of_file(self, path: Path) -> Entry | None:
        """An entry from a file's header, None if there is no sound one."""
        try:
            return self.read_entry(path) if self.inside(path) else None
        except (OSError, CorruptFileError):
            return None

    def read_entry(self, path: Path) -> Entry:
        """Raises:
        CorruptFileError: it is no sound context of its name.
        OSError: it cannot be read.
        """
        with open_context(path, follow_links=False) as file:
            facts = read_header(file, path, self.checksums)
            status, token_ids = os.fstat(file.fileno()), read_token_ids(file, facts)
        if (key := key_of(facts["identity"])) != path.stem:
            raise CorruptFileError(f"{path}: holds the context {key[:12]}")
        catalog = facts["catalog"]
        return Entry(
            key=path.stem,
            identity=facts["identity"],
            group=str(catalog.get("group", "")),
            file_nbytes=status.st_size,
            nbytes=facts["nbytes"],
            n_tokens=facts["n_tokens"],
            ratio=facts["ratio"],
            names=catalog.get("names", {}),
            tags=tuple(catalog.get("tags", ())),
            created=facts["created"],
            used=min(max(status.st_mtime, 0.0), time.time()),  # which anybody can set
            expires=facts["expires"],
            coarsest=facts["coarsest"],
            beginning=beginning(token_ids),
        )

    # -- locks ---------------------------------------------------------------------------------------------------

    def lock(self, key: str) -> FileLock:
        """Held while a context is built or written; gone with the process that held it."""
        return FileLock(self.root / "locks" / f"{key[:3]}.lock", thread_local=False, mode=0o600)

    def delete_dead(self, temporary: Path) -> bool:
        """Delete a file being written if its writer is gone."""
        try:
            with self.lock(temporary.name).acquire(timeout=0):
                temporary.unlink(missing_ok=True)
                return True
        except (Timeout, OSError):  # the latter: what is where its lock belongs cannot be locked
            return False
