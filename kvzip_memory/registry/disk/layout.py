"""Which files and folders of a disk tier's folder look like ours. What does not is left alone, counted nowhere, and told by ``doctor``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from kvzip_memory.system.private import is_file, is_folder, usable

KEY = re.compile("[0-9a-f]{64}")
#: Folders that are made.
FOLDERS = ("blobs", "blobs/.tmp", "names", "index", "locks", "quarantine")
_TEMPORARY = re.compile(r"[0-9a-f]{64}(\.catalog)?(\.[0-9a-f]{8})?\.tmp")
_BLOB_FOLDER = re.compile("[0-9a-f]{2}")
_OLD_INDEX = re.compile(r"index\.[0-9]+")
_FILES = {
    "": re.compile(r"FORMAT|\.FORMAT\.[0-9a-f]{32}|SECRET|\.SECRET\.[0-9a-f]{32}"),
    "tmp": _TEMPORARY,  # of older versions
    "blobs/.tmp": _TEMPORARY,
    "names": re.compile(r"[0-9a-f]{64}\.json|\.[0-9a-f]{64}"),
    "index": re.compile(r"cache\.db(-wal|-shm|-journal)?"),
    "locks": re.compile(r"([0-9a-f]{3}|names|index)\.lock|[0-9a-f]{3}\.progress"),
    "quarantine": re.compile(r"[0-9a-f]{64}\.[0-9]+\.safetensors"),
}


def without_keys(text: str) -> str:
    """A message in which no context, name or group can be told by its digest, nor by the beginning of that."""
    return re.sub("[0-9a-f]{12,}", "…", text)


def files(root: Path, folder: str) -> Iterator[Path]:
    """Files of ours in a folder of the layout."""
    return _named(root / folder, _FILES[folder])


def entries(root: Path, folder: str) -> Iterator[os.DirEntry[str]]:
    """The same, for who looks at thousands of them."""
    return _entries(root / folder, _FILES[folder])


def is_called(folder: str, name: str) -> bool:
    """Whether a file of ours in that folder can have that name."""
    return _FILES[folder].fullmatch(name) is not None


def blobs(root: Path, start: str = "") -> Iterator[Path]:
    """Files of contexts whose keys have this start, two digits of it at most."""
    for folder in _blob_folders(root):
        if folder.name.startswith(start):
            yield from _named(folder, re.compile(rf"{folder.name}[0-9a-f]{{62}}\.safetensors"))


def old_indexes(root: Path) -> list[Path]:
    """Indexes in quarantine, the latest last."""
    found = [path for path in _in(root / "quarantine") if _OLD_INDEX.fullmatch(path.name) and is_folder(path)]
    return sorted(found, key=lambda path: int(path.name.partition(".")[2]))


def files_of_index(folder: Path) -> Iterator[Path]:
    """What an index consists of, whatever each of it is."""
    return (path for path in _in(folder) if _FILES["index"].fullmatch(path.name))


def strangers(root: Path) -> list[Path]:
    """What does not look like ours: other names, and links, pipes and folders in a file's place."""
    folders = [path for name in ("tmp", *FOLDERS) if is_folder(path := root / name)]
    ours = {*folders, *_blob_folders(root), *old_indexes(root), *blobs(root)}
    ours |= {path for name in _FILES for path in files(root, name)}
    ours |= {path for folder in old_indexes(root) for path in files_of_index(folder) if is_file(path)}
    return sorted(path for folder in (root, *folders, *_blob_folders(root), *old_indexes(root)) for path in _in(folder) if path not in ours)


def _blob_folders(root: Path) -> Iterator[Path]:
    return (path for path in _in(root / "blobs") if _BLOB_FOLDER.fullmatch(path.name) and is_folder(path))


def _named(folder: Path, names: re.Pattern[str]) -> Iterator[Path]:
    return (Path(entry.path) for entry in _entries(folder, names))


def _entries(folder: Path, names: re.Pattern[str]) -> Iterator[os.DirEntry[str]]:
    if not is_folder(folder):
        return
    with usable(folder), os.scandir(folder) as found:
        for entry in found:
            if names.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield entry


def _in(folder: Path) -> list[Path]:
    with usable(folder):
        return [*folder.iterdir()] if is_folder(folder) else []
