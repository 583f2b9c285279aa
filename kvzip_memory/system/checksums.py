"""What tells that bytes are as we have written them: xxh3, which finds accidents; or, with a secret, HMAC-SHA256, which nobody can make who
has not got it."""

from __future__ import annotations

import hmac
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import xxhash

from kvzip_memory.errors import InputError, StorageError
from kvzip_memory.system.private import check_not_shared, read_text, write_text

#: Characters that a secret has at least.
SHORTEST = 16


class Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class Checksums:
    """Makes and checks them. Each is of one kind of thing, so that with a secret none can stand for another kind's.

    Args:
        secret: a text that only those have whose files are to be used; None for none. White space around it does not count.

    Attributes:
        name: what they are called in files.
        size: bytes.

    Raises:
        InputError: the secret is no text, or too short.
    """

    def __init__(self, secret: str | None = None) -> None:
        self._secret = None if secret is None else checked_secret(secret).strip().encode(errors="surrogatepass")
        self.name, self.size = ("xxh3", 8) if self._secret is None else ("hmac", 32)

    def __repr__(self) -> str:
        return f"<Checksums {self.name}>"

    @property
    def are_keyed(self) -> bool:
        return self._secret is not None

    def begin(self, kind: str) -> Hash:
        """A checksum of what comes in pieces."""
        return xxhash.xxh3_64() if self._secret is None else hmac.new(self._secret, f"{kind}\0".encode(), "sha256")

    def of(self, kind: str, *pieces: str | bytes) -> str:
        """The checksum of pieces behind each other, in hex digits."""
        checksum = self.begin(kind)
        for piece in pieces:
            checksum.update(piece.encode() if isinstance(piece, str) else piece)
        return checksum.hexdigest()

    def same(self, one: str, other: str) -> bool:
        """Whether two are equal, in a time that does not tell where they differ."""
        return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))

    def seal(self, kind: str, of: str, text: str) -> str:
        """A text behind its checksum, of which thing it is included."""
        return f"{self.of(kind, of, chr(10), text)}\n{text}"

    def unseal(self, kind: str, of: str, sealed: str) -> str:
        """Raises:
        ValueError: the checksum is wrong.
        """
        checksum, _, text = sealed.partition("\n")
        if not self.same(checksum, self.of(kind, of, "\n", text)):
            raise ValueError(f"the checksum of the {kind} is wrong")
        return text


#: Those of folders without a secret.
PLAIN = Checksums()


def checked_secret(secret: str) -> str:
    """Raises:
    InputError: it is no text, or so short that it could be guessed; says nothing of it.
    """
    if not isinstance(secret, str):
        raise InputError(f"secret is of type {type(secret).__name__}; give a text, of a SecretStr what get_secret_value() returns")
    if len(secret.strip()) < SHORTEST:
        raise InputError(f"secret has {len(secret.strip())} characters; give {SHORTEST} at least, such as secrets.token_hex() makes")
    return secret


#: How a secret is given.
_GIVEN = "secret=, in the shell KVZIP_MEMORY_SECRET_FILE"


def check_secret(folder: Path, checksums: Checksums) -> None:
    """Look whether what is in a disk tier's folder was stored with the secret that is given now, before any of it is taken for damaged.

    Raises:
        StorageError: with another one, with one and none is given, or without one. All of it is left as it is.
    """
    path, other = folder / "SECRET", "or give another cache_dir"
    made = any(os.path.lexists(folder / name) for name in ("FORMAT", "blobs"))  # looked for first, as SECRET is written before them
    if not os.path.lexists(path):
        if checksums.are_keyed and made:
            raise StorageError(f"{folder} was made without a secret, so that what is in it could be anybody's; give none, {other}")
    elif not checksums.are_keyed:
        raise StorageError(f"{folder} was made with a secret; give it ({_GIVEN}), {other}")
    else:
        mark = ""
        with suppress(ValueError):  # as wrong as any
            mark = read_text(path).strip()
        if not checksums.same(mark, checksums.of("folder")):
            raise StorageError(f"{folder} was made with another secret; give that, {other}")


def check_ours_alone(top: Path, folder: Path, within: Iterable[Path], contexts: Path, checksums: Checksums) -> None:
    """Refuse what others can write, where no secret tells what they have written; see
    :func:`~kvzip_memory.system.private.check_not_shared`.

    Args:
        contexts: the disk tier's folder, which says whether a secret is missing or could still be given.

    Raises:
        StorageError: as for :func:`check_secret`; or names the path, who can write it, and the way out.
    """
    check_secret(contexts, checksums)
    if not checksums.are_keyed:
        check_not_shared(top, folder, within, f"; or, as it is new, a secret ({_GIVEN})" if _is_new(contexts) else "")


def _is_new(folder: Path) -> bool:
    return not any(os.path.lexists(folder / made) for made in ("FORMAT", "blobs"))


def mark_secret(folder: Path, checksums: Checksums) -> None:
    """Note in a new folder with which secret it is made; nothing of it can be read there."""
    if checksums.are_keyed and not os.path.lexists(folder / "SECRET"):
        temporary = folder / f".SECRET.{uuid.uuid4().hex}"
        write_text(temporary, f"{checksums.of('folder')}\n")
        os.replace(temporary, folder / "SECRET")
