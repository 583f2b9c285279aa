"""The version of a disk tier's folder."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from kvzip_memory.errors import StorageError
from kvzip_memory.system.checksums import Checksums, check_secret, mark_secret
from kvzip_memory.system.private import read_text, write_text

LAYOUT, WITH_SECRET = 1, 2  # the latter, so that versions that know of no secret leave the folder alone


def check_version(root: Path, checksums: Checksums, read_only: bool) -> None:
    """Write down the version of a new folder; of one that is there, look at it.

    Raises:
        StorageError: it is of a newer version, or has another secret.
    """
    path = root / "FORMAT"
    try:
        written = int(read_text(path))
        if written < 1:
            raise ValueError("no version")
    except FileNotFoundError:
        check_secret(root, checksums)
        if read_only:
            return
        mark_secret(root, checksums)
        temporary = root / f".FORMAT.{uuid.uuid4().hex}"
        write_text(temporary, f"{WITH_SECRET if checksums.are_keyed else LAYOUT}\n")
        os.replace(temporary, path)
        return
    except ValueError:
        raise StorageError(f"{path} does not hold a version number; remove the folder, or give another cache_dir") from None
    if written > WITH_SECRET:
        raise StorageError(f"{root} has layout {written}, newer than the {WITH_SECRET} this version knows; upgrade kvzip-memory")
    if written == WITH_SECRET and not os.path.lexists(root / "SECRET"):  # which is there before FORMAT is
        raise StorageError(f"{root} was made with a secret, and its file SECRET is gone; put that back, or give another cache_dir")
    check_secret(root, checksums)
