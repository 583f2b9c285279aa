"""Paths that are handed in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief


def as_path(value: Any, where: str) -> Path:
    """A path as the file system can hold it, with ``~`` for the user's own folder.

    Raises:
        InputError: it cannot.
    """
    try:
        path = Path(os.path.expanduser(Path(value)))
        if b"\0" in os.fsencode(path):
            raise ValueError("it has a null character")
        return path
    except (TypeError, ValueError) as error:  # half of a surrogate pair is the latter, too
        raise InputError(f"{where} is {brief(value)}, which names no file ({error}); give another path") from error


def as_folder(value: Any, where: str) -> Path:
    """A folder, wherever the process goes later; see :func:`as_path`."""
    return as_path(value, where).absolute()
