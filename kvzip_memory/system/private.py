"""Files and folders that are ours alone: plain ones, 0600 and 0700 whatever the umask, in folders that nobody else can write.

What is a link, a pipe, a folder in a file's place or anything else is never followed, waited for, written or deleted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvzip_memory.errors import StorageError

LIMIT = 1 << 26  # bytes of a text of ours; far more than any has
_WAY_OUT = "remove it, or give another cache_dir"
_SHARED = "who could have any text of theirs in your answers"


def is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    """0 if it is not there. Asked once: others make and delete files meanwhile."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Says of what the block is not let to do where that is, and the way out.

    Raises:
        StorageError: the system refuses.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise
        where, why = error.filename or path, error.strerror
        raise StorageError(f"{where} cannot be used by user {os.geteuid()}: {why}; chmod or chown it, or give another cache_dir") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        StorageError: it is something else.
        OSError: it cannot be made.
    """
    try:
        with usable(path):
            path.mkdir(mode=0o700)
    except FileNotFoundError:
        make_folder(path.parent)
        make_folder(path)
    except FileExistsError:
        check_folder(path)
    else:
        path.chmod(0o700)  # a umask may have taken some of it


def check_folder(path: Path) -> None:
    """Raises:
    StorageError: it is there, and no folder of its own.
    """
    if (mode := _mode(path)) and not stat.S_ISDIR(mode):
        raise StorageError(f"{path} is {_kind(path)}, where a folder of ours belongs; {_WAY_OUT}")


def check_file(path: Path) -> None:
    """Raises:
    StorageError: it is there, and no plain file.
    """
    if (mode := _mode(path)) and not stat.S_ISREG(mode):
        raise StorageError(f"{path} is {_kind(path)}, where a file of ours belongs; {_WAY_OUT}")


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a plain file. One that is written may have no other name: that could be a file outside.

    Raises:
        StorageError: it is no file of ours.
        OSError: it cannot be opened.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    made = bool(flags & os.O_CREAT) and not os.path.lexists(path)
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError:
        check_file(path)
        with usable(path):
            raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or (writes and status.st_nlink > 1):
        os.close(descriptor)
        raise StorageError(f"{path} is {_kind(path)}, where a file of ours belongs; {_WAY_OUT}")
    if made:
        os.fchmod(descriptor, 0o600)
    return descriptor


def read_text(path: Path) -> str:
    """Raises:
    StorageError: it is no file of ours.
    OSError: it cannot be read.
    ValueError: it is no UTF-8.
    """
    with os.fdopen(open_file(path), "rb") as file:
        check_size(path, os.fstat(file.fileno()).st_size)
        return file.read().decode()


def write_text(path: Path, text: str) -> None:
    """Raises:
    StorageError: there is something that is no file of ours.
    OSError: it cannot be written.
    """
    data = text.encode()
    check_size(path, len(data))
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.truncate()
        file.write(data)


def check_size(path: Path, nbytes: int) -> None:
    """Raises:
    StorageError: more bytes than a text of ours is read with.
    """
    if nbytes > LIMIT:
        raise StorageError(f"{path} would take {nbytes:,} bytes, and a text of ours at most {LIMIT:,}; {_WAY_OUT}")


def delete(path: Path) -> None:
    """Delete a file if there is one; nothing else."""
    if is_file(path):
        path.unlink(missing_ok=True)


def check_not_shared(top: Path, folder: Path, within: Iterable[Path] = (), or_else: str = "") -> None:
    """Refuse what others can write. What another owner has and we can only read is not refused.

    Args:
        top: the folder that a user has given; where others can write and not rename, it does if ``folder`` is ours.
        folder: ours in it. What is in one that only we can enter is not looked at.
        within: what is in the folder.
        or_else: a further way out, for the message.

    Raises:
        StorageError: names the path, who can write it, and the way out.
    """
    ours = os.path.lexists(folder) and folder.lstat().st_uid in (0, os.geteuid())
    status = top.stat() if top.exists() else None
    if status is not None and not (status.st_mode & stat.S_ISVTX and (ours or not os.path.lexists(folder))):
        _check_not_shared(top, status, or_else)
    if os.path.lexists(folder):
        status = folder.lstat()
        _check_not_shared(folder, status, or_else)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            for path in within:
                with suppress(FileNotFoundError):  # deleted meanwhile
                    _check_not_shared(path, path.lstat(), or_else)


def _check_not_shared(path: Path, status: os.stat_result, or_else: str) -> None:
    if stat.S_ISLNK(status.st_mode):  # its mode says nothing, and it is not followed
        return
    if status.st_mode & 0o022:
        shown = stat.filemode(status.st_mode)
        raise StorageError(f"{path} can be written by others ({shown}), {_SHARED}; chmod go-w it, or give a cache_dir of your own{or_else}")
    if status.st_uid not in (0, os.geteuid()) and os.access(path, os.W_OK):
        raise StorageError(
            f"{path} can be written by user {os.geteuid()}, and belongs to user {status.st_uid}, {_SHARED}; chown it, "
            f"take the right to write away, or give a cache_dir of your own{or_else}"
        )


def _kind(path: Path) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFREG: "a file"}
    kind = kinds.get(stat.S_IFMT(_mode(path)), "a device or a socket")
    return "a file with several names" if kind == "a file" and path.lstat().st_nlink > 1 else kind
