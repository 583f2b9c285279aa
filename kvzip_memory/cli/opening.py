"""A cache folder opened for a command: its secret, and whose contexts and sessions are meant."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import typer

from kvzip_memory import turns
from kvzip_memory.errors import InputError
from kvzip_memory.registry import EVERYONE, ContextRegistry
from kvzip_memory.registry.backing import logger as disk_logger
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.identity import NOBODY, tenant_digest
from kvzip_memory.system.checksums import SHORTEST, Checksums
from kvzip_memory.system.printable import printable


def folder_secret() -> str | None:
    """The folder's secret, from the environment or from a file that only its owner can read: other users can see what a command was given.

    Raises:
        InputError: both are given, or the file cannot be read, can be by others, or holds too short a secret.
    """
    given, file = os.environ.get("KVZIP_MEMORY_SECRET"), os.environ.get("KVZIP_MEMORY_SECRET_FILE")
    if not file:
        return given or None
    if given:
        raise InputError("KVZIP_MEMORY_SECRET and KVZIP_MEMORY_SECRET_FILE are both set; one of them is enough")
    called = f"KVZIP_MEMORY_SECRET_FILE {file!r}"
    try:
        mode = os.stat(file).st_mode
        text = "" if stat.S_ISDIR(mode) or mode & 0o077 else Path(file).read_text().strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{called} cannot be read: {error}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{called} is a folder; give a file of mode 0600 that holds the secret")
    if mode & 0o077:
        raise InputError(f"{called} can be read by others; chmod 600 it")
    if len(text) < SHORTEST:
        found = f"holds {len(text)} characters" if text else "is empty"
        raise InputError(f"{called} {found}; give a secret of {SHORTEST} at least, such as secrets.token_hex() makes")
    return text


def folder_checksums() -> Checksums:
    return Checksums(folder_secret())


def registry_of(cache_dir: Path, tenant: str | None = EVERYONE) -> ContextRegistry:
    """The contexts of a tenant, by its digest.

    Raises:
        BadParameter: nothing is stored there, or it cannot be opened.
    """
    folder = cache_dir.expanduser() / "contexts"
    if not folder.is_dir():
        raise typer.BadParameter(f"nothing is stored at {folder}; give another --cache-dir", param_hint="--cache-dir")
    secret = folder_secret()
    with _errors_alone():
        registry = ContextRegistry(torch.device("cpu"), folder, tenant=tenant, secret=secret)
    if registry.no_disk is not None:
        raise typer.BadParameter(printable(registry.no_disk), param_hint="--cache-dir")
    registry.check_disk()
    return registry


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Nothing is logged of a folder that cannot be opened, which is the command's error. What else is to be said of one still is."""
    before, disk_logger.disabled = disk_logger.disabled, True
    try:
        yield
    finally:
        disk_logger.disabled = before


def contexts_of(cache_dir: Path, tenant: str | None) -> ContextRegistry:
    """The contexts of a tenant that was given as itself, by the beginning of its digest, or as ``-``; all of them if none was given.

    Raises:
        InputError: several tenants are meant.
    """
    registry = registry_of(cache_dir)
    if tenant is None:
        return registry
    if tenant == NOBODY:
        return registry_of(cache_dir, None)
    itself = str(tenant_digest(tenant))
    known = {entry.tenant for entry in registry.contexts() if entry.tenant is not None}
    meant = {itself} & known or {digest for digest in known if len(tenant) >= 8 and digest.startswith(tenant)}
    if len(meant) > 1:
        raise InputError(f"--tenant is the beginning of the digests of {len(meant)} tenants; give more digits")
    if not meant and KEY.fullmatch(tenant) and sessions_of(cache_dir, tenant) and not sessions_of(cache_dir, itself):
        meant = {tenant}
    return registry_of(cache_dir, meant.pop() if meant else itself)


def sessions_of(cache_dir: Path, tenant: str | None) -> list[turns.Session]:
    """A tenant's, by its digest, which only the whole of it finds."""
    folder = cache_dir.expanduser()
    return [session for session in turns.sessions(folder, folder_checksums()) if turns.is_of(folder, session, tenant)]


def owner_of(reference: str, tenant: str | None, cache_dir: Path) -> ContextRegistry:
    """The contexts of whom a name or key belongs to.

    Raises:
        InputError: it could be several tenants', or it is the beginning of several keys.
    """
    registry = contexts_of(cache_dir, tenant)
    found, labels = registry.looked_up(reference)
    if [entry.key for entry in found] == [reference]:
        return registry
    keys = sorted(entry.key for entry in found if entry.key.startswith(reference))
    if len(keys) > 1:
        raise InputError(f"{reference!r} is the beginning of {len(keys)} keys; give more digits of one of {', '.join(keys)}")
    named = {label.key: label.tenant for label in labels.values() if registry.tiers(label.key)}
    if keys and named.keys() - {*keys}:
        both = ", ".join(sorted({*keys, *named}))
        raise InputError(f"{reference!r} is a name and the beginning of a key; give the whole key of the one that is meant: {both}")
    whose = {entry.tenant for entry in found} | {*named.values()}
    check_one(f"{reference!r} is a name of contexts", whose)
    return registry_of(cache_dir, whose.pop()) if whose else registry


def check_one(what: str, whose: set[str | None]) -> None:
    """Raises:
    InputError: it is several tenants'.
    """
    if len(whose) > 1:
        digests = ", ".join(sorted(NOBODY if digest is None else digest[:12] for digest in whose))
        raise InputError(f"{what} of {len(whose)} tenants; say whose with --tenant, by itself or one of {digests}")
