"""``.gguf`` files that were dequantised once, each into a folder in ``cache_dir/gguf`` that the model is read from ever after.

A folder is named after the sha256 of the file, and has a list of what is in it. It is written beside its place and renamed into it whole.
One that is damaged all the same is made anew. Nothing else is counted or freed here but what has such a name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kvzip_memory.errors import InputError, StorageError
from kvzip_memory.system.checksums import PLAIN
from kvzip_memory.system.findings import Finding, not_ours
from kvzip_memory.system.locks import SharedLock, held
from kvzip_memory.system.printable import logger_of
from kvzip_memory.system.private import (
    check_file,
    check_folder,
    check_not_shared,
    is_file,
    is_folder,
    make_folder,
    open_file,
    read_text,
    usable,
    write_text,
)

logger = logger_of(__name__)

#: Days after its last use when ``gc`` deletes one.
UNUSED_DAYS = 30
_NAME = re.compile(r".+-([0-9a-f]{64}|[0-9a-f]{16})-\w+-transformers-.+", re.DOTALL)  # the shorter digest is of earlier versions
_LIST, _STAGING = "CONVERSION", ".tmp-"
_TRIES = 3  # others may delete it in between


@dataclass(frozen=True)
class Conversion:
    """What was made of a ``.gguf`` file.

    Attributes:
        nbytes: bytes of its files.
        used: when it was last read, seconds since the epoch.
    """

    folder: Path
    nbytes: int
    used: float

    @property
    def name(self) -> str:
        return self.folder.name

    def remove(self) -> None:
        """Delete it.

        Raises:
            StorageError: a process makes or reads it, or there is something in it that is none of its files; nothing was deleted.
        """
        try:
            with held(_lock(self.folder), "making or reading it", 0.0):
                _delete(self.folder)
        except Timeout:
            raise StorageError(f"{self.name} is being made or read by a process; try again when that has its model") from None


def conversions(cache_dir: Path) -> list[Conversion]:
    """All of a folder, the last used first."""
    found = []
    for folder in _named(cache_dir, ""):
        with suppress(FileNotFoundError):  # deleted meanwhile
            mark = folder / _LIST
            used = (mark if is_file(mark) else folder).lstat().st_mtime
            found.append(Conversion(folder, sum(path.lstat().st_size for path in folder.iterdir() if is_file(path)), used))
    return sorted(found, key=lambda conversion: -conversion.used)


def find(cache_dir: Path, reference: str) -> Conversion:
    """The one whose name begins so.

    Raises:
        InputError: none, or several.
    """
    found = [conversion for conversion in conversions(cache_dir) if reference and conversion.name.startswith(reference)]
    if not found:
        names = ", ".join(conversion.name for conversion in conversions(cache_dir)) or "there is none"
        raise InputError(f"{reference!r} is the beginning of no conversion's name; give that of one of them: {names}")
    if len(found) > 1:
        names = ", ".join(conversion.name for conversion in found)
        raise InputError(f"{reference!r} is the beginning of {len(found)} conversions' names; give more of one of them: {names}")
    return found[0]


def gc(cache_dir: Path) -> tuple[int, int]:
    """Delete what was not read for :data:`UNUSED_DAYS`, and what killed processes have left; how many, and their bytes.

    Raises:
        StorageError: the folder cannot be written; nothing was deleted.
    """
    if is_folder(top := cache_dir / "gguf") and (why := _why_read_only(top)):
        raise StorageError(f"{why}: conversions in it are used, and cannot be deleted")
    count = freed = 0
    for staging in _named(cache_dir, _STAGING):
        with suppress(Timeout, OSError), held(_lock(staging.with_name(staging.name.removeprefix(_STAGING))), "making it", 0.0):
            freed += sum(path.lstat().st_size for path in staging.rglob("*") if is_file(path))
            shutil.rmtree(staging)
            count += 1
    for conversion in conversions(cache_dir):
        if abs(time.time() - conversion.used) > UNUSED_DAYS * 86400:
            with suppress(OSError):  # it is in use, or is not ours
                conversion.remove()
                count, freed = count + 1, freed + conversion.nbytes
    return count, freed


def examine(cache_dir: Path) -> list[Finding]:
    """What is to be said of a folder's conversions, and of what lies among them and is none."""
    try:
        found, strange = conversions(cache_dir), _strangers(cache_dir / "gguf")
    except OSError as error:
        return [Finding("problem", "conversions", str(error), "make the folder readable, or move it away")]
    told = f"{len(found):,} of .gguf files, {sum(conversion.nbytes for conversion in found):,} bytes, beside disk_bytes"
    return [*([Finding("ok", "conversions", told)] if found else []), *not_ours(path.relative_to(cache_dir) for path in strange)]


@contextmanager
def converted(cache_dir: Path, name: str, convert: Callable[[Path], object]) -> Iterator[Path]:
    """A conversion's folder, whole, and there for as long as the block runs; made if need be, by one process.

    One in a folder that we can only read is read as it is, and there for as long as its owner leaves it there.

    Args:
        name: of the folder.
        convert: writes files into the folder that it is given.

    Raises:
        StorageError: others can write the folder, something in it is not ours, or it cannot be written and the conversion is not in it.
    """
    folder = cache_dir / "gguf" / name
    check_not_shared(cache_dir, folder.parent)
    if why := _why_read_only(folder.parent):
        check_folder(folder.parent)
        with usable(folder):
            if not _is_whole(folder):
                raise StorageError(
                    f"{folder} is not there or damaged, and {why}; give a conversion's folder as model=, or another cache_dir"
                )
        yield folder
        return
    with usable(folder):
        make_folder(folder.parent)
    for _ in range(_TRIES):
        with held(SharedLock(f"{folder}.lock"), f"converting {name}"):
            if _is_whole(folder):
                with suppress(OSError):
                    os.utime(folder / _LIST)
                yield folder
                return
        with held(_lock(folder), f"converting {name}"):
            if not _is_whole(folder):
                _make(folder, convert)
    raise StorageError(f"{folder} is damaged each time that it was made; look after the disk, or give another cache_dir")


def _make(folder: Path, convert: Callable[[Path], object]) -> None:
    with usable(folder):
        if is_folder(folder):
            logger.warning("%s is damaged; it is made anew", folder)
            _delete(folder)
        logger.info("converting once into %s", folder)
        staging = _emptied(folder)
        make_folder(staging)
    try:
        convert(staging)
        files = {}
        for path in staging.iterdir():
            path.chmod(0o600)
            files[path.name] = [path.lstat().st_size, _checksum(path)]
        write_text(staging / _LIST, PLAIN.seal("conversion", folder.name, json.dumps(files)))
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether all files are there and as they were written; takes 0.1 s a GB that lies in memory.

    Raises:
        StorageError: there is something that is none of them, or that we cannot read.
    """
    check_folder(folder)
    if not is_folder(folder):
        return False
    with usable(folder):
        check_not_shared(folder.parent, folder, folder.iterdir())
        _check_ours(folder)
        files = _listed(folder)
        return files is not None and all(
            is_file(path := folder / name) and path.lstat().st_size == nbytes and _checksum(path) == checksum
            for name, (nbytes, checksum) in files.items()
        )


def _check_ours(folder: Path) -> None:
    """Raises:
    StorageError: there is something that is no file of the conversion, or nobody knows whose files they are.
    """
    for path in _strangers_in(folder):
        if path == folder:
            raise StorageError(f"{folder} is no conversion of ours, for it has no file {_LIST}; move it away")
        check_file(path)
        raise StorageError(f"{path} is no file of the conversion; move it away")


def _strangers_in(folder: Path) -> list[Path]:
    """What is none of a conversion's files, as far as is known: not where the list is damaged. The folder itself, if it has no list."""
    found = sorted(folder.iterdir())
    if not is_file(folder / _LIST):
        links = [path for path in found if not is_file(path)]
        return links if _is_earlier(folder) else [*links, folder]
    files = _listed(folder)
    return [path for path in found if not is_file(path) or (files is not None and path.name not in {_LIST, *files})]


def _strangers(top: Path) -> list[Path]:
    """The same of the folder of all conversions."""
    if not is_folder(top):
        return [top] if os.path.lexists(top) else []
    found = list[Path]()
    for path in sorted(top.iterdir()):
        name = path.name.removeprefix(_STAGING)
        if is_folder(path) and _NAME.fullmatch(name):
            found += _strangers_in(path) if path.name == name else []
        elif not (is_file(path) and path.suffix == ".lock" and _NAME.fullmatch(path.stem)):
            found.append(path)
    return found


def _listed(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Bytes and checksum of each file of a conversion, by their names; None if the list is damaged."""
    try:
        files = json.loads(PLAIN.unseal("conversion", folder.name, read_text(folder / _LIST)))
        return {name: (nbytes, checksum) for name, (nbytes, checksum) in files.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _is_earlier(folder: Path) -> bool:
    """Whether a conversion is of an earlier version, which had no lists."""
    match = _NAME.fullmatch(folder.name)
    return match is not None and len(match[1]) < 64


def _why_read_only(folder: Path) -> str | None:
    """Why nothing can be written in a folder, or it cannot be made; None if it can."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return None if os.access(there, os.W_OK) else f"{there} cannot be written by user {os.geteuid()}"


def _checksum(path: Path) -> str:
    checksum = PLAIN.begin("conversion")
    with os.fdopen(open_file(path), "rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()


def _delete(folder: Path) -> None:
    """Raises:
    StorageError: there is something that is no file of the conversion; nothing was deleted.
    """
    _check_ours(folder)
    os.replace(folder, gone := _emptied(folder))
    shutil.rmtree(gone)


def _emptied(folder: Path) -> Path:
    """Where a conversion is made or deleted, without what a killed process has left there."""
    staging = folder.with_name(_STAGING + folder.name)
    shutil.rmtree(staging, ignore_errors=True)
    return staging


def _lock(folder: Path) -> FileLock:
    return FileLock(f"{folder}.lock", mode=0o600)


def _named(cache_dir: Path, prefix: str) -> list[Path]:
    top = cache_dir / "gguf"
    found = [*top.iterdir()] if is_folder(top) else []
    starting = [path for path in found if path.name.startswith(_STAGING) == bool(prefix)]
    return [path for path in starting if _NAME.fullmatch(path.name.removeprefix(prefix)) and is_folder(path)]
