"""Text files inside a folder, by names that somebody else gives."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

#: A file may have so many bytes.
LARGEST_FILE = 64 << 20

# No part of a way is followed elsewhere, and a pipe keeps nobody waiting.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_below(folder: Path, name: str, most: int = LARGEST_FILE) -> bytes | None:
    """What is in the file of a name below a folder, None if there is none that can be read; of a larger one ``most + 1`` bytes.

    Every folder on the way is opened below the one before it, and no link is followed, so that what is read is what was looked at
    and lies inside, whoever moves things about meanwhile.
    """
    parts = [part for part in name.split("/") if part != "."]
    if not parts or any(part in ("", "..") or "\0" in part for part in parts):
        return None
    with suppress(OSError, ValueError):  # the latter is of a name that no file could have
        below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for number, part in enumerate(parts, 1):
            try:
                following = os.open(part, _FLAGS | (os.O_DIRECTORY if number < len(parts) else 0), dir_fd=below)
            finally:
                os.close(below)
            below = following
        with os.fdopen(below, "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(most + 1)
    return None
