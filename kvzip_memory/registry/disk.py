"""The disk tier: one safetensors file a context under a hard budget, and an index beside them.

Layout of the folder (0700, files 0600)::

    FORMAT                        version of this layout; a newer one is left alone
    SECRET                        if it was made with one, what only the same one gives
    blobs/ab/<key>.safetensors    the contexts; each file says itself what it is and is checked whole before it is used
    blobs/.tmp/                   files being written: beside the others, for blobs/ may be a mount of its own
    names/                        what each name means, see :mod:`~kvzip_memory.registry.names`
    index/                        diskcache: one row a context, in the order of use; can be made anew from the blobs
    locks/                        one file lock for each 3 hex digits of a key, held while a context is built or written
    quarantine/                   files that failed their checks, with the reason in the index

What does not look like that, see :mod:`~kvzip_memory.registry.layout`, is left alone and counted nowhere.

A context is served from its blob alone, found by its key; the index only decides what is evicted and what is listed.
So nothing wrong can come out of a damaged index.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import torch
from filelock import FileLock, Timeout

from kvzip_memory.checksums import PLAIN, Checksums, check_ours_alone, check_secret, mark_secret
from kvzip_memory.context import CompressedContext, RaggedLayer
from kvzip_memory.errors import BudgetError, CorruptFileError, StorageError
from kvzip_memory.forks import refuse_after_fork
from kvzip_memory.locks import QUIET_S, Hold, Together, held
from kvzip_memory.printable import logger_of
from kvzip_memory.private import check_file, check_folder, delete, is_file, is_folder, make_folder, read_text, usable, write_text
from kvzip_memory.registry import layout
from kvzip_memory.registry.beginnings import beginning
from kvzip_memory.registry.facts import OddFactError, check_row, is_bad, is_forgotten, is_id, is_progress, is_size
from kvzip_memory.registry.files import (
    PreparedFile,
    UnreadableHereError,
    copy_with_catalog,
    open_context,
    read_context,
    read_header,
    read_token_ids,
    replace_with,
)
from kvzip_memory.registry.forgotten import Notes
from kvzip_memory.registry.frozen import FrozenIndex, why_read_only
from kvzip_memory.registry.holders import LetGo, Naming, is_held, without
from kvzip_memory.registry.identity import EVERYONE, family_of, is_whose, key_of
from kvzip_memory.registry.index import HELD, Index, IndexDamagedError, IndexHeldError, IndexUnavailableError, is_free
from kvzip_memory.registry.layout import KEY
from kvzip_memory.registry.names import Names

logger = logger_of(__name__)

LAYOUT, WITH_SECRET = 1, 2  # the latter, so that versions that know of no secret leave the folder alone
_CONTEXT, _GROUP, _BAD, _TOKENS, _BEGINNING = "context:", "group:", "bad:", "tokens:", "beginning:"
_FORGOTTEN = "forgotten"  # the row of the notes of operators; those of a tenant have its digest behind it
_LOST = "lost:"  # the row of a context whose file was lost, until it is built again
_CATALOG = "catalog:"  # of a context whose file names tags that its row has not
#: Looks at layers that were read from a path, and raises a CorruptFileError.
CheckLayers = Callable[[Sequence[RaggedLayer], str], None]
P = ParamSpec("P")
T = TypeVar("T")
_GROUP_SIZE = 32  # contexts of one text that are remembered as such
_BEGINNING_SIZE = 4096  # contexts that share all or more than half of their tokens and are found by them, the latest


@dataclass(frozen=True)
class Entry:
    """What the index knows about a stored context.

    Attributes:
        key: the context's.
        identity: the fields of the key.
        group: digest of the text the context was made of, and of the tenant.
        file_nbytes: bytes on disk.
        nbytes: bytes in memory.
        n_tokens: tokens it stands for.
        ratio: fraction of pairs kept.
        names: the names it has, and when it was last loaded under each, in seconds since the epoch.
        tags: free words given by the user.
        pinned: never evicted.
        created: when its text was read, seconds since the epoch; 0.0: not known.
        used: seconds since the epoch of the last use that reached the disk tier.
        expires: seconds since the epoch, None for never.
        coarsest: as of the context; None in rows of an earlier version.
        former: names it was loaded under that another context has now. Rows of the index have them among the ``names``.
        beginning: what it is filed under, see :mod:`~kvzip_memory.registry.beginnings`; empty in rows of an earlier version.
    """

    key: str
    identity: Mapping[str, Any]
    group: str
    file_nbytes: int
    nbytes: int
    n_tokens: int
    ratio: float
    names: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    pinned: bool = False
    created: float = 0.0
    used: float = 0.0
    expires: float | None = None
    coarsest: float | None = None
    former: tuple[str, ...] = ()
    beginning: str = ""

    @property
    def name(self) -> str | None:
        """The name it was last loaded under."""
        return max(self.names, key=self.names.__getitem__, default=None)

    @property
    def tenant(self) -> str | None:
        return self.identity.get("tenant")

    @property
    def expired(self) -> bool:
        return is_past(self.created, self.expires)

    @property
    def fineness(self) -> float:
        """The smallest ratio at which any of its pairs were compressed; 0.0: not known."""
        if self.coarsest is None:
            return self.ratio if self.identity.get("parent") is None else 0.0
        return self.coarsest


def is_past(created: float, expires: float | None, ttl: float | None = None) -> bool:
    """Whether a context is older than whoever stored it, or asks with a ``ttl``, wants it.

    A clock that was put back does not make it last: what was made so far in the future counts as old, too.
    """
    limits = [limit for limit in (None if expires is None else expires - created, ttl) if limit is not None]
    return bool(limits) and abs(time.time() - created) > min(limits)


class NotStoredError(Exception):
    """No usable context of this key on disk; says why."""


def _needs_index(method: Callable[Concatenate[DiskTier, P], T]) -> Callable[Concatenate[DiskTier, P], T]:
    """Make a damaged index anew from the blobs and try again, once. One that is held is left alone until it is free."""

    @wraps(method)
    def guarded(self: DiskTier, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except IndexHeldError:
            self._note_held()
            raise
        except IndexDamagedError as error:
            try:
                self._replace_index(str(error))
                return method(self, *args, **kwargs)
            except IndexDamagedError as again:
                raise IndexUnavailableError(f"the index cannot be made anew: {self._told(str(again))}") from again

    return guarded


class DiskTier:
    """Contexts in a folder that any number of processes share.

    Args:
        root: the folder.
        budget: bytes that blobs, files being written and quarantined files may take together; None for no limit. The
            index itself (about 2 kB a context) is not counted.
        tenant: digest of whose contexts are read, listed and changed; room is made by those of all.
        checksums: with a secret, nothing is used that was not written with it; the folder may then be one that others can write.
        check: looks at the layers of a context that was asked for, and raises a CorruptFileError if they are none of the model's.

    Raises:
        OSError: the folder cannot be made.
        StorageError: it is of a newer version or has another secret, others can write it, or something else is where a folder or file of
            ours belongs.
    """

    def __init__(
        self,
        root: Path,
        budget: int | None = None,
        tenant: str | None = EVERYONE,
        checksums: Checksums = PLAIN,
        check: CheckLayers | None = None,
    ) -> None:
        self.root, self.budget, self.tenant, self._checksums, self._check = root, budget, tenant, checksums, check
        self.quarantined = 0  # files, by this process
        self.made_anew = False  # whether this process has found the index damaged
        self._mutex, self._putting = threading.Lock(), threading.Lock()
        refuse_after_fork(self, "_mutex", "_putting")
        self._stripes: WeakValueDictionary[str, Together] = WeakValueDictionary()
        folders = [root, *(root / name for name in layout.FOLDERS)]
        for folder in folders:
            check_folder(folder)
        check_ours_alone(root.parent, root, (path for path in root.rglob("*")), root, checksums)
        #: Why nothing can be stored or changed in the folder; None if it can.
        self.read_only = why_read_only(root)
        self.names = Names(root, self.read_only is not None, checksums)
        for folder in folders:
            if self.read_only is None:
                make_folder(folder)
            if folder is root:
                self._check_layout()
        self._index: Index | None = None
        self._opened_file: int | None = None
        self._held = False  # by another process, when last looked at
        self._owed: set[str] = set()  # keys of files of ours that were not written, and for which bytes are counted still
        self._mending = False
        self._doubtful = False  # whether files were changed and their rows, after a failure, were not
        if self.read_only is not None:
            logger.warning("%s: the contexts in it are used, and none is stored or changed", self.read_only)
            return
        with suppress(IndexUnavailableError):  # what is stored can be read without it
            self._tidy()

    def _check_layout(self) -> None:
        path = self.root / "FORMAT"
        try:
            written = int(read_text(path))
            if written < 1:
                raise ValueError("no version")
        except FileNotFoundError:
            check_secret(self.root, self._checksums)
            if self.read_only is not None:
                return
            mark_secret(self.root, self._checksums)
            temporary = self.root / f".FORMAT.{uuid.uuid4().hex}"
            write_text(temporary, f"{WITH_SECRET if self._checksums.are_keyed else LAYOUT}\n")
            os.replace(temporary, path)
            return
        except ValueError:
            raise StorageError(f"{path} does not hold a version number; remove the folder, or give another cache_dir") from None
        if written > WITH_SECRET:
            raise StorageError(f"{self.root} has layout {written}, newer than the {WITH_SECRET} this version knows; upgrade kvzip-memory")
        if written == WITH_SECRET and not os.path.lexists(self.root / "SECRET"):  # which is there before FORMAT is
            raise StorageError(f"{self.root} was made with a secret, and its file SECRET is gone; put that back, or give another cache_dir")
        check_secret(self.root, self._checksums)

    def _told(self, message: str, whose: str | None = EVERYONE) -> str:
        """A message as the tenant may hear it: it names no key of what is not known to be its own."""
        return message if self.tenant in (EVERYONE, whose) else layout.without_keys(message)

    def path(self, key: str) -> Path:
        """Raises:
        ValueError: it is no key.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key, which has 64 hex digits")
        return self.root / "blobs" / key[:2] / f"{key}.safetensors"

    # -- contexts ------------------------------------------------------------------------------------------------

    def get(
        self, key: str, device: torch.device, admit: Callable[[int], None] | None = None, ttl: float | None = None
    ) -> CompressedContext:
        """The context stored under ``key``, every byte of it checked.

        Args:
            admit: told the bytes it will take in memory before they are read.
            ttl: seconds since its text was read after which it is not wanted; None for any age.

        Raises:
            NotStoredError: there is none, or it cannot be used; a damaged one is in quarantine then.
        """

        def checked(facts: Mapping[str, Any]) -> None:
            if is_past(facts["created"], facts["expires"]):
                with suppress(OSError):
                    self.remove(key)
                raise NotStoredError("expired")
            if is_past(facts["created"], None, ttl):
                raise NotStoredError(f"expired: its text was read more than ttl={ttl:g} s ago")
            if admit is not None:
                admit(facts["nbytes"])

        return self._read(key, device, checked, self._check)

    def _read(
        self, key: str, device: torch.device, admit: Callable[[Mapping[str, Any]], None] | None = None, check: CheckLayers | None = None
    ) -> CompressedContext:
        def checked(facts: Mapping[str, Any]) -> None:
            if not is_whose(facts["identity"], self.tenant):
                raise NotStoredError("not stored")
            if admit is not None:
                admit(facts)

        path = self.path(key)
        if not self._inside(path):
            raise NotStoredError(f"{path.parent} is no folder of ours; what it leads to is not read")
        if os.path.lexists(path) and not is_file(path):
            kind = "a symbolic link" if path.is_symlink() else "no file"
            raise NotStoredError(f"{path} is {kind}, where a file of ours belongs; it is left alone")
        try:
            context = read_context(path, device, follow_links=False, admit=checked, checksums=self._checksums)
            if context.key != key:
                raise CorruptFileError(f"{path}: holds the context {context.key[:12]}")
            if check is not None:
                check(context.layers, str(path))
        except FileNotFoundError:
            raise NotStoredError("not stored") from None
        except OSError as error:
            logger.warning("cannot read stored context %s: %s", key[:12], error)
            raise NotStoredError(f"stored file unreadable: {error}") from None
        except CorruptFileError as error:
            if not isinstance(error, UnreadableHereError):
                self._quarantine(key, str(error))
            raise NotStoredError(f"stored file unusable: {error}") from None
        return context

    def _inside(self, path: Path) -> bool:
        """Whether a blob's folder is one of ours, or none yet, and no link to somewhere else."""
        return is_folder(path.parent.parent) and (is_folder(path.parent) or not os.path.lexists(path.parent))

    def has(self, key: str) -> bool:
        return KEY.fullmatch(key) is not None and self._inside(self.path(key)) and is_file(self.path(key))

    def holds(self, key: str) -> bool:
        """:meth:`has`, of a context of the tenant's."""
        if not self.has(key):
            return False
        return self.tenant == EVERYONE or ((entry := self._entry_of_file(self.path(key))) is not None and self._is_mine(entry))

    def _is_mine(self, entry: Entry) -> bool:
        return is_whose(entry.identity, self.tenant)

    def put(
        self,
        context: CompressedContext,
        group: str,
        *,
        names: Mapping[str, float] | None = None,
        tags: Iterable[str] = (),
        pinned: bool = False,
    ) -> None:
        """Store a context that holds its pairs itself. The caller holds its :meth:`lock`.

        Raises:
            BudgetError: it does not fit, or only pinned contexts could make room.
            OSError: it cannot be written; nothing has changed.
        """
        self._check_writable()
        catalog = {"group": group, "names": dict(names or {}), "tags": list(tags)}
        prepared = PreparedFile(context, catalog, self._checksums)
        entry = Entry(
            context.key,
            context.identity,
            group,
            prepared.nbytes,
            context.nbytes,
            context.n_tokens,
            context.ratio,
            dict(names or {}),
            tuple(tags),
            pinned,
            created=context.created,
            used=time.time(),
            expires=context.expires,
            coarsest=context.coarsest,
            beginning=beginning(context.token_ids.numpy()),
        )
        path, temporary = self.path(context.key), self._temporary(context.key)
        if not self._inside(path):
            raise StorageError(f"{path.parent} is no folder of ours; nothing is written there")
        check_file(path)
        with self._putting:  # two writers of one key would have one reservation
            try:
                self._owed.discard(entry.key)
                self._reserve(entry)
                for left in self._temporaries():  # by a writer of this key that was killed
                    if left.name.startswith(f"{entry.key}."):
                        left.unlink(missing_ok=True)
                make_folder(path.parent)
                prepared.write(path, temporary)
                self._insert(entry)
            except BaseException:
                self._owed.add(entry.key)
                self._doubtful |= os.path.lexists(path) or os.path.lexists(temporary)
                with suppress(OSError):
                    self._opened()
                raise

    def _temporary(self, key: str) -> Path:
        return self.root / "blobs" / ".tmp" / f"{key}.{uuid.uuid4().hex[:8]}.tmp"

    def _check_writable(self) -> None:
        """Raises:
        IndexUnavailableError: the folder is read-only.
        """
        if self.read_only is not None:
            raise IndexUnavailableError(f"{self.read_only}: contexts in it are used, and cannot be stored, changed or deleted")

    def _temporaries(self) -> Iterator[Path]:
        """Files being written: theirs are named after the key. The first folder is that of older versions."""
        for folder in ("tmp", "blobs/.tmp"):
            yield from layout.files(self.root, folder)

    @contextmanager
    def _changing_files(self) -> Iterator[Index]:
        """A transaction that deletes or moves files. If it fails the rows are as before and the files are not: see :meth:`_mend`."""
        self._check_writable()
        index = self._opened()
        try:
            with index.transaction():
                yield index
        except BaseException:
            self._doubtful = True
            raise

    def _mend(self) -> None:
        """After a failure: give back what is counted for files that were not written, and make rows and files agree.

        If that fails too it is tried again at the next use.
        """
        while self._owed:
            key = next(iter(self._owed))
            self._unreserve(key)
            self._owed.discard(key)
        if self._doubtful:
            self._reconcile()
            self._doubtful = False

    @_needs_index
    def _reserve(self, entry: Entry) -> None:
        """Make room for a file and count it as being written."""
        self._collect_dead_writers()
        with self._changing_files() as index:
            old = _entry(index, entry.key)
            self._make_room(index, entry, old.file_nbytes if old else 0)
            if old is not None:
                self._drop(index, old)
                index.set(_LOST + old.key, asdict(old))
            stored, writing = self._totals(index)
            self._set_totals(index, stored, {**writing, entry.key: entry.file_nbytes})

    def _make_room(self, index: Index, new: Entry, replaced: int) -> None:
        """Delete what was used longest ago until ``new`` fits in place of ``replaced`` bytes; nothing if it cannot."""
        if self.budget is None:
            return
        nbytes = new.file_nbytes
        if nbytes > self.budget:
            raise BudgetError(
                f"the context takes {nbytes:,} bytes on disk; disk_bytes is {self.budget:,}: raise it or keep a smaller ratio"
            )
        stored, writing = self._totals(index)
        usage = stored + sum(nbytes for key, nbytes in writing.items() if key != new.key) - replaced
        victims: list[Callable[[], None]] = []
        for name in list(index.keys(_BAD)) if usage + nbytes > self.budget else ():  # what is in quarantine goes first
            if usage + nbytes > self.budget and (bad := _bad(index, name)) is not None and bad["nbytes"]:
                victims.append(partial(self._drop_bad, index, bad))
                usage -= bad["nbytes"]
        for key in index.keys(_CONTEXT) if usage + nbytes > self.budget else ():
            entry = _entry(index, key)
            if entry is None or entry.pinned or entry.key == new.key:
                continue
            victims.append(partial(self._drop, index, entry))
            usage -= entry.file_nbytes
            if usage + nbytes <= self.budget:
                break
        if usage + nbytes > self.budget:
            raise BudgetError(
                f"no room for {nbytes:,} bytes on disk: pinned contexts and files being written take {usage:,} of "
                f"disk_bytes={self.budget:,}; unpin some or raise disk_bytes"
            )
        for drop in victims:
            drop()

    @_needs_index
    def _unreserve(self, key: str) -> None:
        index = self._opened()
        with index.transaction():
            stored, writing = self._totals(index)
            writing.pop(key, None)
            self._set_totals(index, stored, writing)

    def _insert(self, entry: Entry) -> None:
        """Turn the reservation into a row. The file is there, so it has some patience."""
        for _ in range(9):
            with suppress(IndexHeldError):
                return self._insert_now(entry)
            time.sleep(QUIET_S)
        self._insert_now(entry)

    @_needs_index
    def _insert_now(self, entry: Entry) -> None:
        with self._changing_files() as index:
            stored, writing = self._totals(index)
            if writing.pop(entry.key, None) is None:
                if index.get(_CONTEXT + entry.key) is not None:
                    return  # the index was made anew from the blobs in between
                self._make_room(index, entry, 0)  # another process took us for dead, and has given the room away
                stored, writing = self._totals(index)
            self._set_totals(index, stored + entry.file_nbytes, writing)
            self._add(index, _completed(entry, _entry(index, entry.key, _LOST)))
            index.delete(_LOST + entry.key)

    def _add(self, index: Index, entry: Entry) -> None:
        index.move_to_end(_CONTEXT + entry.key, asdict(entry))
        _list_add(index, _GROUP + entry.group, entry.key)
        family, tokens = family_of(entry.identity), entry.identity.get("tokens", "")
        _list_add(index, f"{_TOKENS}{family}:{tokens}", entry.key, _BEGINNING_SIZE)
        if entry.beginning:
            _list_add(index, f"{_BEGINNING}{family}:{entry.beginning}", f"{entry.n_tokens}:{tokens[:8]}", _BEGINNING_SIZE)

    def _drop(self, index: Index, entry: Entry) -> None:
        """Delete a context: first the file, so that bytes are never free before they are free."""
        self._unlink(entry)
        index.delete(_CONTEXT + entry.key)
        index.delete(_CATALOG + entry.key)
        _list_remove(index, _GROUP + entry.group, entry.key)
        family, tokens = family_of(entry.identity), entry.identity.get("tokens", "")
        if not _list_remove(index, f"{_TOKENS}{family}:{tokens}", entry.key):
            _list_remove(index, f"{_BEGINNING}{family}:{entry.beginning}", f"{entry.n_tokens}:{tokens[:8]}")
        stored, writing = self._totals(index)
        self._set_totals(index, stored - entry.file_nbytes, writing)

    def _unlink(self, entry: Entry) -> None:
        path = self.path(entry.key)
        if self._inside(path) and is_file(path):
            self._doubtful |= path.lstat().st_size != entry.file_nbytes  # somebody has changed it; what was counted for it is not known
            delete(path)

    def _drop_bad(self, index: Index, row: Mapping[str, Any]) -> None:
        delete(self.root / "quarantine" / row["file"])
        index.delete(_BAD + row["file"])
        stored, writing = self._totals(index)
        self._set_totals(index, stored - row["nbytes"], writing)

    def _quarantine(self, key: str, reason: str) -> None:
        """Take a file out of use and remember why. In a folder that cannot be written it stays, and is refused again."""
        try:
            moved = self._set_aside(key, reason)
        except IndexUnavailableError:
            return
        if not moved:
            logger.debug("%s; another process has moved it", reason)

    @_needs_index
    def _set_aside(self, key: str, reason: str) -> bool:
        path = self.path(key)
        with self._changing_files() as index:
            stored, writing = self._totals(index)
            entry = _entry(index, key)
            counted = entry.file_nbytes if entry is not None else 0
            try:
                size = path.lstat().st_size
                nbytes = self._bury(
                    index, path, reason, stored + sum(writing.values()) - counted, self.tenant if entry is None else entry.tenant
                )
            except OSError:  # another process has done it, or may not
                return False
            if entry is not None:
                self._doubtful |= entry.file_nbytes != size
                self._drop(index, entry)
                index.set(_LOST + key, asdict(entry))
            stored, writing = self._totals(index)
            self._set_totals(index, stored + nbytes, writing)
        return True

    def _bury(self, index: Index, path: Path, reason: str, usage: int, tenant: str | None) -> int:
        """Move a file to quarantine and note the reason; it is deleted where it does not fit into the budget beside what is used.

        Returns:
            Bytes that it takes there.

        Raises:
            OSError: it cannot be moved, or is there no more.
        """
        name, nbytes = f"{path.stem}.{time.time_ns()}.safetensors", path.lstat().st_size
        if self.budget is not None and usage + nbytes > self.budget:  # it has grown, or never had a row
            path.unlink()
            nbytes = 0
        elif not _moved(path, self.root / "quarantine" / name):
            nbytes = 0
        index.set(_BAD + name, {"key": path.stem, "file": name, "nbytes": nbytes, "reason": reason, "time": time.time(), "tenant": tenant})
        self.quarantined += 1
        logger.warning("%s; moved to quarantine", self._told(reason, tenant))
        return nbytes

    # -- the index -----------------------------------------------------------------------------------------------

    @_needs_index
    def entry(self, key: str) -> Entry | None:
        """The row of a context of the tenant's."""
        entry = _entry(self._opened(), key)
        return entry if entry is not None and self._is_mine(entry) else None

    @_needs_index
    def entries(self, limit: int | None = None, wanted: Callable[[Entry], bool] = lambda entry: True) -> list[Entry]:
        """Stored contexts, the most recently used first."""
        keys = self._opened().keys(_CONTEXT, newest_first=True)
        found = (entry for key in keys if (entry := self.entry(key)) is not None and wanted(entry))
        return list(islice(found, limit))

    @_needs_index
    def group(self, group: str) -> list[Entry]:
        """Stored contexts of one text and tenant."""
        return self._listed(_GROUP + group)

    @_needs_index
    def lengths(self, family: str, begun: Iterable[str]) -> set[tuple[int, str]]:
        """Tokens, and the start of their digest, of the contexts of one model and tenant that are filed under one of these beginnings."""
        index = self._opened()
        pairs = (item.partition(":") for each in begun for item in _items(index, f"{_BEGINNING}{family}:{each}"))
        return {(int(n), start) for n, _, start in pairs if n.isdecimal()}

    @_needs_index
    def with_tokens(self, family: str, tokens: str) -> list[Entry]:
        """Stored contexts of exactly these tokens."""
        return self._listed(f"{_TOKENS}{family}:{tokens}")

    def _listed(self, key: str) -> list[Entry]:
        entries = [self.entry(k) for k in _items(self._opened(), key)]
        return [entry for entry in entries if entry is not None]

    @_needs_index
    def starting_with(self, prefix: str) -> list[Entry]:
        """Stored contexts whose key starts with ``prefix``."""
        if KEY.fullmatch(prefix):
            return [entry] if (entry := self.entry(prefix)) is not None else []
        if not re.fullmatch("[0-9a-f]+", prefix):
            return []
        keys = sorted(path.stem for path in layout.blobs(self.root, prefix[:2]) if path.name.startswith(prefix))
        return [entry for key in keys if (entry := self.entry(key)) is not None]

    @_needs_index
    def touch(self, key: str, *, names: Mapping[str, float] | None = None, tags: Iterable[str] = ()) -> None:
        """Make a context the most recently used one; give it names or tags. A file without a row gets one."""
        index = self._opened()
        with index.transaction():
            entry = _entry(index, key)
            if entry is None:
                if (entry := self._entry_of_file(self.path(key))) is None or not self._is_mine(entry):
                    return
                stored, writing = self._totals(index)
                usage = stored + sum(writing.values())
                if key in writing or (self.budget is not None and usage + entry.file_nbytes > self.budget):
                    return
                self._set_totals(index, stored + entry.file_nbytes, writing)
            elif not self._is_mine(entry):
                return
            elif not entry.beginning and (read := self._entry_of_file(self.path(key))) is not None:
                entry = replace(entry, beginning=read.beginning)
            tags = tuple(sorted({*entry.tags, *tags}))
            self._add(index, replace(entry, used=time.time(), names=latest(entry.names, names or {}), tags=tags))

    def pin(self, key: str, pinned: bool) -> None:
        self._change(key, lambda entry: replace(entry, pinned=pinned))

    def untag(self, key: str, tag: str) -> None:
        self._change(key, lambda entry: replace(entry, tags=tuple(other for other in entry.tags if other != tag)), tag)

    def unname(self, key: str, name: str) -> None:
        self._change(key, lambda entry: replace(entry, names={other: when for other, when in entry.names.items() if other != name}))

    @_needs_index
    def _change(self, key: str, change: Callable[[Entry], Entry], forgotten: str = "") -> None:
        """Change a context's row, or that of one whose file was lost, and note the tag that is forgotten by that."""
        self._check_writable()
        index = self._opened()
        with index.transaction():
            for prefix in (_CONTEXT, _LOST):
                if (entry := _entry(index, key, prefix)) is not None and self._is_mine(entry):
                    index.set(prefix + key, asdict(change(entry)))
            if forgotten:
                self._note(index, key, forgotten)

    @_needs_index
    def remove(self, key: str, for_good: bool = False) -> bool:
        """Delete a context; False if there was none. One that somebody wants to be gone is not written again by other processes."""
        with self._changing_files() as index:
            known = _entry(index, key) or _entry(index, key, _LOST) or (self._entry_of_file(self.path(key)) if self.has(key) else None)
            if known is not None and not self._is_mine(known):
                return False
            index.delete(_LOST + key)
            if for_good:
                self._note(index, key)
            if (entry := _entry(index, key)) is not None:
                self._drop(index, entry)
                return True
        existed = self.has(key)
        if existed:
            delete(self.path(key))
        return existed

    def clean(self, key: str) -> None:
        """Overwrite what the index and notes of its build say of a context that was removed for good."""
        if self.reported(key):
            delete(self._note_of(key))
        self._rewrite_index()

    def forget(self, let_go: LetGo, mine: Callable[[Entry], bool], named: Collection[str] = ()) -> tuple[list[Entry], list[Entry]]:
        """Take tags from contexts, and delete those that nobody holds then. Nothing of these stays in the folder: the quarantine is
        emptied, the index is written anew, and so is the header of a file that stays.

        Args:
            let_go: which tags of which contexts.
            mine: whose contexts may be changed.
            named: keys that names mean, whatever their rows say.

        Returns:
            What was deleted, and what has lost a tag and stays; as they were.

        Raises:
            IndexUnavailableError: the index cannot be changed now.
            StorageError: something in the quarantine cannot be deleted; nothing else was, either.
        """
        self._check_writable()
        with usable(self.root / "quarantine"):
            self._empty_quarantine()
        if isinstance(let_go, Naming):
            self._note_all(let_go.tag)
        self._tidy_now()  # a whole file without a row gets one, by which it is found
        changed = [entry for entry in self.entries(None, mine) if without(entry.tags, entry.key, let_go) != entry.tags]
        deleted = [entry for entry in changed if self.let_go(entry.key, let_go, entry.key in named, for_good=True)]
        kept = [entry for entry in changed if entry not in deleted]
        self._let_go_lost(let_go, mine)
        self._empty_quarantine()  # of what was found damaged meanwhile
        for note in layout.files(self.root, "locks"):  # builds that are under way leave another one
            if note.suffix == ".progress":
                delete(note)
        self._write_catalogs()
        self._rewrite_index()
        return deleted, kept

    def forget_again(self, keys: Iterable[str], let_go: LetGo) -> None:
        """Delete those of the contexts that were stored since and that nobody else holds."""
        for key in keys:
            if self.has(key):
                self.let_go(key, let_go, for_good=True)

    def _is_held(self, entry: Entry) -> bool:
        """Whether anybody has a context. A row has former names, too, which mean others now."""
        return is_held(self.names.still(entry.tenant, entry.names, family_of(entry.identity), entry.key), entry.pinned, entry.tags)

    @_needs_index
    def let_go(self, key: str, let_go: LetGo, stays: bool = False, for_good: bool = False) -> bool:
        """Take tags from a context, and delete it if nobody else holds it, here or where it ``stays``; whether it is gone.

        Other processes do not write again what was to be gone ``for_good``, and its file's catalog is to name the tags no more.
        """
        with self._changing_files() as index:
            if (entry := _entry(index, key)) is None or not self._is_mine(entry):
                if (lost := _entry(index, key, _LOST)) is not None and self._is_mine(lost):
                    index.set(_LOST + key, asdict(replace(lost, tags=without(lost.tags, key, let_go))))
                return not stays
            rest = without(entry.tags, key, let_go)
            if for_good and not isinstance(let_go, Naming):
                for tag in set(entry.tags) - set(rest):
                    self._note(index, key, tag)
            entry = replace(entry, tags=rest)
            if stays or self._is_held(entry):
                index.set(_CONTEXT + key, asdict(entry))
                if for_good:
                    index.set(_CATALOG + key, {})
                return False
            if for_good:
                self._note(index, key)
            self._drop(index, entry)
            index.delete(_LOST + key)
            return True

    @_needs_index
    def _let_go_lost(self, let_go: LetGo, mine: Callable[[Entry], bool]) -> None:
        """The same for contexts whose files were lost."""
        index = self._opened()
        with index.transaction():
            for key in [*index.keys(_LOST)]:
                entry = _entry(index, key, _LOST)
                if entry is None or not mine(entry) or without(entry.tags, key, let_go) == entry.tags:
                    continue
                entry = replace(entry, tags=without(entry.tags, key, let_go))
                if self._is_held(entry):
                    index.set(_LOST + key, asdict(entry))
                else:
                    index.delete(_LOST + key)
                    self._note(index, key)

    @_needs_index
    def notes(self) -> Notes:
        """What was forgotten, by any process, of the tenant's."""
        return self._notes_in(self._opened())

    def _notes_in(self, index: Index) -> Notes:
        operators = _notes(index, _FORGOTTEN)
        return operators if self.tenant == EVERYONE else _notes(index, self._notes_row, operators)

    @property
    def _notes_row(self) -> str:
        """Each tenant has a row of its own: a note of one is never read for another, nor drives out another's."""
        return _FORGOTTEN if self.tenant == EVERYONE else f"{_FORGOTTEN}:{self.tenant or ''}"

    def _note(self, index: Index, key: str = "", tag: str = "") -> None:
        notes = self._notes_in(index)
        notes.add(key, tag)
        index.set(self._notes_row, notes.row)

    @_needs_index
    def _note_all(self, tag: str) -> None:
        index = self._opened()
        with index.transaction():
            self._note(index, tag=tag)

    @_needs_index
    def _write_catalogs(self) -> None:
        """Bring the catalogs of files up to date with their rows, also where that has failed before."""
        for key in [*self._opened().keys(_CATALOG)]:
            if not KEY.fullmatch(key):
                raise IndexDamagedError(f"row {_CATALOG + key!r} is not one of ours")
            try:
                with held(self.lock(key), "building or writing a context", QUIET_S):
                    self._write_catalog(key)
            except (OSError, Timeout, CorruptFileError) as error:
                # no key: it may be another tenant's
                logger.warning("the file of a context that others have still names a tag that was forgotten: %s", self._told(str(error)))

    @_needs_index
    def _write_catalog(self, key: str) -> None:
        """The copy is not counted in the budget. It is renamed beside its row: what is deleted meanwhile stays so."""
        path, temporary = self.path(key), self._temporary(f"{key}.catalog")
        entry = _entry(self._opened(), key)
        try:
            if entry is not None and self._inside(path):
                catalog = {name: getattr(entry, name) for name in ("group", "names", "tags")}
                nbytes = copy_with_catalog(path, temporary, catalog, self._checksums)
            with self._changing_files() as index:
                now = _entry(index, key)
                if now is not None and entry is not None and (now.names, now.tags) == (entry.names, entry.tags) and temporary.exists():
                    replace_with(path, temporary)
                    index.set(_CONTEXT + key, asdict(replace(now, file_nbytes=nbytes)))
                    stored, writing = self._totals(index)
                    self._set_totals(index, stored + nbytes - now.file_nbytes, writing)
                    index.delete(_CATALOG + key)
                elif now is None:
                    index.delete(_CATALOG + key)
        finally:
            temporary.unlink(missing_ok=True)

    @_needs_index
    def _rewrite_index(self) -> None:
        try:
            self._opened().rewrite()
        except IndexHeldError:
            logger.warning("another process reads the index of %s: until that is written anew, free pages of it may hold tags", self.root)

    @_needs_index
    def quarantine(self) -> list[dict[str, Any]]:
        """What was taken out of use: key, file, nbytes, reason, time, tenant. Of what it is not known whose it was operators hear alone."""
        index = self._opened()
        rows = [_bad(index, name) for name in index.keys(_BAD)]
        return [row for row in rows if row is not None and is_whose(row, self.tenant)]

    @_needs_index
    def usage(self) -> int:
        """Bytes of blobs, files being written and quarantined files, as counted."""
        stored, writing = self._totals(self._opened())
        return stored + sum(writing.values())

    def is_empty(self) -> bool:
        return next(self._blobs(), None) is None

    def count(self) -> int:
        """Stored contexts."""
        return sum(1 for _ in self._blobs())

    def measured(self) -> int:
        """The same bytes as :meth:`usage`, measured from the files."""
        sizes: dict[int, int] = {}
        for files in (self._temporaries(), self._blobs(), self._quarantined()):  # the way a file goes; one that moves meanwhile counts once
            for path in files:
                with suppress(FileNotFoundError):
                    status = path.lstat()
                    sizes[status.st_ino] = status.st_size
        return sum(sizes.values())

    def gc(self) -> dict[str, int]:
        """Delete expired contexts, what dead writers left, quarantined files, and whatever has no row; count exactly.

        Returns:
            How many of each were deleted, and the bytes freed.
        """
        before = self.measured()
        self._collect_dead_writers()
        found = {"expired": 0, "quarantined": 0, "orphaned": 0}
        for entry in self.entries():
            if entry.expired:
                found["expired"] += self.remove(entry.key)
        found["orphaned"] = self._reconcile()
        found["quarantined"] = self._empty_quarantine()
        with suppress(OSError):  # others are writing
            self.names.gc(self.has)
        return {**found, "bytes": before - self.measured()}

    @_needs_index
    def _empty_quarantine(self) -> int:
        count, others = 0, set[str]()
        with self._changing_files() as index:
            for name in list(index.keys(_BAD)):
                if (row := _bad(index, name)) is None:
                    continue
                if row["tenant"] == EVERYONE or is_whose(row, self.tenant):
                    self._drop_bad(index, row)
                    count += 1
                else:
                    others.add(row["file"])
        for path in self._quarantined():
            if path.name not in others:
                path.unlink(missing_ok=True)
                count += 1
        for folder in layout.old_indexes(self.root):
            _remove_index(folder)
            count += 1
        return count

    @_needs_index
    def _reconcile(self) -> int:
        """Make rows and files agree after a process was killed: a row whose file is gone goes too, a whole file without
        a row gets one, a broken one goes to quarantine, and bytes are counted anew from the files. What cannot be read now stays.

        Returns:
            Files deleted.
        """
        deleted = 0
        with self._changing_files() as index:
            _, writing = self._totals(index)
            rows, blobs = set(index.keys(_CONTEXT)), {path.stem: path for path in self._blobs()}
            for key in rows - blobs.keys() - writing.keys():
                if (entry := _entry(index, key)) is not None:
                    self._drop(index, entry)
            bad = [row for name in list(index.keys(_BAD)) if (row := _bad(index, name)) is not None]
            stored = sum(self._measured_bad(index, row) for row in bad)
            stored += sum(path.lstat().st_size for key, path in blobs.items() if key in rows and key not in writing)
            for key in blobs.keys() - rows - writing.keys():
                usage = stored + sum(writing.values())
                with suppress(FileNotFoundError):
                    entry, nbytes = self._entry_or_buried(index, blobs[key], usage)
                    if entry is not None and self.budget is not None and usage + nbytes > self.budget:
                        delete(blobs[key])
                        deleted += 1
                        continue
                    if entry is not None:
                        self._add(index, entry)
                    stored += nbytes
            for path in self._temporaries():
                if path.name[:64] not in writing and (".catalog." not in path.name or self._delete_dead(path)):
                    path.unlink(missing_ok=True)
                    deleted += 1
            listed = {*index.keys(_BAD)}
            for path in self._quarantined():
                if path.name not in listed:
                    stored += self._listed_as_bad(index, path, stored + sum(writing.values()))
            self._set_totals(index, stored, writing)
        return deleted

    def _entry_or_buried(self, index: Index, path: Path, usage: int) -> tuple[Entry | None, int]:
        """The entry of a file without a row, None of one that is of no use, and its bytes; a broken one goes to quarantine.

        Raises:
            FileNotFoundError: it is there no more.
        """
        try:
            entry = self._read_entry(path)
            return entry, entry.file_nbytes
        except FileNotFoundError:
            raise
        except CorruptFileError as error:
            if not isinstance(error, UnreadableHereError):
                with suppress(OSError):
                    return None, self._bury(index, path, str(error), usage, EVERYONE)
        except OSError as error:
            logger.warning("%s", self._told(f"cannot read stored context {path.stem[:12]}: {error}"))
        return None, path.lstat().st_size

    def _measured_bad(self, index: Index, row: Mapping[str, Any]) -> int:
        """Bytes that a file in quarantine takes; one that has grown there is deleted, and its reason stays."""
        path = self.root / "quarantine" / row["file"]
        nbytes = path.lstat().st_size if is_file(path) else 0
        if nbytes > row["nbytes"]:
            delete(path)
            nbytes = 0
        if nbytes != row["nbytes"]:
            index.set(_BAD + row["file"], {**row, "nbytes": nbytes})
        return nbytes

    def _listed_as_bad(self, index: Index, path: Path, usage: int) -> int:
        """Give a file in quarantine a row, for whoever moved it was killed, or the index is new; its bytes, if there is room."""
        nbytes = path.lstat().st_size
        if self.budget is not None and usage + nbytes > self.budget:
            path.unlink(missing_ok=True)
            return 0
        index.set(_BAD + path.name, {"key": path.name[:64], "file": path.name, "nbytes": nbytes, "reason": "unknown", "time": 0.0})
        return nbytes

    def verify(self, key: str) -> str | None:
        """Check every byte of a stored context: None if it is sound, else what is wrong (it is in quarantine then)."""
        try:
            self._read(key, torch.device("cpu"))
        except NotStoredError as error:
            return str(error)
        return None

    def close(self) -> None:
        if self._index is not None:
            self._index.close()

    # -- locks and building --------------------------------------------------------------------------------------

    def lock(self, key: str) -> FileLock:
        """Held while a context is built or written; gone with the process that held it."""
        return FileLock(self.root / "locks" / f"{key[:3]}.lock", thread_local=False, mode=0o600)

    def hold(self, key: str) -> Hold:
        """A part in the lock of a key, not taken yet. Threads of this tier hold it together: they build other keys, or write the same."""
        with self._mutex:
            stripe = self._stripes.get(key[:3])
            if stripe is None:
                stripe = self._stripes[key[:3]] = Together(self.lock(key))
            return Hold(stripe)

    def report(self, key: str, progress: Mapping[str, Any]) -> None:
        """Leave a note for other processes how far a build is."""
        with suppress(OSError):
            write_text(self._note_of(key), self._checksums.seal("progress", key, json.dumps({"key": key, **progress})))

    def reported(self, key: str) -> dict[str, Any] | None:
        """What the process that builds ``key`` has last reported."""
        with suppress(OSError, ValueError, TypeError, RecursionError):  # the last: what is no note of ours
            note = json.loads(self._checksums.unseal("progress", key, read_text(self._note_of(key))))
            return dict(note) if is_progress(note) and note["key"] == key else None
        return None

    def _note_of(self, key: str) -> Path:
        return self.root / "locks" / f"{key[:3]}.progress"

    # -- keeping the index sound ---------------------------------------------------------------------------------

    def check_free(self) -> None:
        """Raises:
        IndexUnavailableError: another process held the index when it was last used, and holds it still.
        """
        if self._held:
            if not is_free(self.root / "index"):
                raise IndexHeldError()
            self._held = False
            logger.warning("the index of %s is free again", self.root)

    @_needs_index
    def check_changeable(self) -> None:
        """Raises:
        IndexUnavailableError: the index cannot be changed now; a process that holds it is waited for a second.
        """
        self._check_writable()
        self._opened()
        if not is_free(self.root / "index", QUIET_S):
            raise IndexHeldError

    def _opened(self) -> Index:
        if self.read_only is not None:
            if self._index is None:
                self._index = self._frozen()
            return self._index
        self.check_free()
        if self._index is None:
            self._open_index()
        if self._index is None:
            raise IndexUnavailableError("the index could not be opened")
        if (self._owed or self._doubtful) and not self._mending:
            self._mending = True
            try:
                with suppress(OSError):
                    self._mend()
            finally:
                self._mending = False
        return self._index

    def _frozen(self) -> Index:
        """The rows of a folder that cannot be written; from the files what has none."""
        index = FrozenIndex(self.root / "index", self._checksums)
        rows, blobs = set(index.keys(_CONTEXT)), {path.stem: path for path in self._blobs()}
        for key in rows - blobs.keys():
            index.delete(_CONTEXT + key)
        for key in blobs.keys() - rows:
            if (entry := self._entry_of_file(blobs[key])) is not None:
                self._add(index, entry)
        self._set_totals(index, sum(path.lstat().st_size for path in blobs.values()), {})
        return index

    @property
    def is_held(self) -> bool:
        """Whether another process held the index when it was last used."""
        return self._held

    def _note_held(self) -> None:
        if not self._held:
            self._held = True
            logger.warning("%s for a second: %s; until it is free contexts are stored in memory only", HELD, self.root / "index")

    @_needs_index
    def _tidy(self) -> None:
        """What killed processes have left, when a folder is opened."""
        self._opened()
        self._tidy_now()

    def _tidy_now(self) -> None:
        self._collect_dead_writers()
        self._reconcile()

    def _open_index(self) -> None:
        self._opened_file = self._index_file()
        try:
            self._index = Index(self.root / "index", self._checksums)
            self._opened_file = self._index_file()
            self._start_index()
        except IndexDamagedError as error:
            self._replace_index(str(error))

    def _start_index(self, salvaged: Mapping[str, Entry] | None = None) -> None:
        """Rows of a new index from the blobs; of an empty folder, none.

        Args:
            salvaged: what was known of some contexts and is not in their files.
        """
        index = self._index
        assert index is not None
        if index.get("totals") is not None:
            return
        with index.transaction():
            if index.get("totals") is not None:
                return
            if next(index.keys(""), None) is not None:
                raise IndexDamagedError("the row of totals is missing")
            stored = 0
            found: list[Entry] = []
            for path in [*self._blobs()]:
                with suppress(FileNotFoundError):
                    entry, nbytes = self._entry_or_buried(index, path, stored)
                    found += [entry] if entry is not None else []
                    stored += nbytes
            entries = [_completed(entry, (salvaged or {}).get(entry.key)) for entry in found]
            given: dict[str, dict[str, float]] = {}
            for label in self.names.all():
                given.setdefault(label.key, {})[label.name] = label.loaded
            entries = [replace(entry, names=latest(entry.names, given.get(entry.key, {}))) for entry in entries]
            for entry in sorted(entries, key=lambda entry: entry.used):
                self._add(index, entry)
            listed = {*index.keys(_BAD)}
            writing = {path.name[:64]: path.lstat().st_size for path in self._temporaries() if not self._delete_dead(path)}
            for path in self._quarantined():
                if path.name not in listed:
                    stored += self._listed_as_bad(index, path, stored + sum(writing.values()))
            self._set_totals(index, stored, writing)

    def _delete_dead(self, temporary: Path) -> bool:
        """Delete a file being written if its writer is gone."""
        try:
            with self.lock(temporary.name).acquire(timeout=0):
                temporary.unlink(missing_ok=True)
                return True
        except (Timeout, OSError):  # the latter: what is where its lock belongs cannot be locked
            return False

    def _replace_index(self, reason: str) -> None:
        """Set a damaged index aside and make it anew; one process does, the others open what it made."""
        with held(FileLock(self.root / "locks" / "index.lock", thread_local=False, mode=0o600), "making a damaged index anew"):
            salvaged = self._salvaged()
            with suppress(Exception):
                if self._index is not None:
                    self._index.close()
            self._index = None
            if self._index_file() == self._opened_file:
                logger.warning(
                    "the index of %s is damaged (%s); made anew from the stored contexts, with the pins and later names of %d",
                    self.root,
                    self._told(reason),
                    len(salvaged),
                )
                _moved(self.root / "index", self.root / "quarantine" / f"index.{time.time_ns()}")
                make_folder(self.root / "index")
                for older in layout.old_indexes(self.root)[:-1]:
                    _remove_index(older)
                self.made_anew = True
            self._opened_file = self._index_file()
            self._index = Index(self.root / "index", self._checksums)
            self._start_index(salvaged)

    def _salvaged(self) -> dict[str, Entry]:
        """The contexts' rows of a damaged index that are sound."""
        index, found = self._index, dict[str, Entry]()
        if index is None:
            return found
        with suppress(Exception):  # SQLite may fail in any way
            for key in index.keys(_CONTEXT):
                with suppress(IndexDamagedError):
                    if (entry := _entry(index, key)) is not None:
                        found[key] = entry
        return found

    def _index_file(self) -> int | None:
        """The inode of the index: another one means that another process has made it anew."""
        try:
            return (self.root / "index" / "cache.db").lstat().st_ino
        except OSError:
            return None

    def _collect_dead_writers(self) -> None:
        """Free what was reserved by processes that no longer hold their lock."""
        for key in self._writing():
            with suppress(Timeout, OSError), self.lock(key).acquire(timeout=0):
                for path in self._temporaries():
                    if path.name.startswith(key):
                        path.unlink(missing_ok=True)
                self._unreserve(key)

    @_needs_index
    def _writing(self) -> dict[str, int]:
        return self._totals(self._opened())[1]

    def _totals(self, index: Index) -> tuple[int, dict[str, int]]:
        """Bytes of what is stored or in quarantine, and of each file being written. They are counted once whatever happens to a writer."""
        row = index.get("totals")
        if row is None:
            raise IndexDamagedError("the row of totals is missing")
        writing, usage = row.get("writing"), row.get("usage", -1)
        if not (isinstance(writing, dict) and all(map(KEY.fullmatch, writing)) and all(map(is_size, [usage, *writing.values()]))):
            raise IndexDamagedError("the row of totals is not one of ours")
        return usage - sum(writing.values()), writing

    def _set_totals(self, index: Index, stored: int, writing: Mapping[str, int]) -> None:
        index.set("totals", {"usage": max(stored, 0) + sum(writing.values()), "writing": dict(writing)})

    def _blobs(self) -> Iterator[Path]:
        return layout.blobs(self.root)

    def _quarantined(self) -> Iterator[Path]:
        return layout.files(self.root, "quarantine")

    def _entry_of_file(self, path: Path) -> Entry | None:
        """An entry from a file's header, None if there is no sound one."""
        try:
            return self._read_entry(path) if self._inside(path) else None
        except (OSError, CorruptFileError):
            return None

    def _read_entry(self, path: Path) -> Entry:
        """Raises:
        CorruptFileError: it is no sound context of its name.
        OSError: it cannot be read.
        """
        with open_context(path, follow_links=False) as file:
            facts = read_header(file, path, self._checksums)
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


def _entry(index: Index, key: str, prefix: str = _CONTEXT) -> Entry | None:
    """A context's row; its key becomes a file name, so it must look like one of ours."""
    row = index.get(prefix + key)
    if row is None:
        return None
    try:
        check_row(row)
        entry = Entry(**{**row, "tags": tuple(row["tags"]), "former": ()})
    except (OddFactError, TypeError):
        raise IndexDamagedError(f"row {key!r} has other fields than a context's") from None
    if entry.key != key or not KEY.fullmatch(key):
        raise IndexDamagedError(f"row {key!r} is not one of ours")
    return entry


def _bad(index: Index, name: str) -> dict[str, Any] | None:
    """The row of a quarantined file.

    Raises:
        IndexDamagedError: it is not one of ours; its name becomes a file's.
    """
    row = index.get(_BAD + name)
    if row is not None and not (layout.is_called("quarantine", name) and row.get("file") == name and is_bad(row)):
        raise IndexDamagedError(f"row {_BAD + name!r} is not one of ours")
    return None if row is None else {"key": name[:64], "reason": "unknown", "time": 0.0, "tenant": EVERYONE, **row}


def _completed(entry: Entry, known: Entry | None) -> Entry:
    """An entry made from a file or anew, with what an earlier row knew."""
    if known is None:
        return entry
    tags, used = tuple(sorted({*entry.tags, *known.tags})), max(entry.used, known.used)
    return replace(entry, names=latest(entry.names, known.names), tags=tags, pinned=entry.pinned or known.pinned, used=used)


def latest(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Names of both, each with its later time."""
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def _items(index: Index, key: str) -> list[str]:
    row = index.get(key)
    items = [] if row is None else row.get("keys")
    if not isinstance(items, list) or not all(map(is_id, items)):
        raise IndexDamagedError(f"row {key!r} is no list of ours")
    return items


def _notes(index: Index, row: str, operators: Notes | None = None) -> Notes:
    found = index.get(row)
    if found is not None and not is_forgotten(found):
        raise IndexDamagedError("the row of what was forgotten is not one of ours")
    return Notes(found, operators)


def _list_add(index: Index, key: str, item: str, size: int = _GROUP_SIZE) -> None:
    keys = _items(index, key)
    if not keys or keys[-1] != item:
        index.set(key, {"keys": [*(k for k in keys if k != item), item][-size:]})


def _list_remove(index: Index, key: str, item: str) -> bool:
    """Whether the list has other items."""
    keys = [k for k in _items(index, key) if k != item]
    if keys:
        index.set(key, {"keys": keys})
    else:
        index.delete(key)
    return bool(keys)


def _moved(path: Path, target: Path) -> bool:
    """Move a file or folder that is of no more use; False if it had to be deleted, as it lies on another file system.

    Raises:
        OSError: neither is possible.
    """
    try:
        os.replace(path, target)
        return True
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
    for each in layout.files_of_index(path) if is_folder(path) else [path]:
        delete(each)
    return False


def _remove_index(folder: Path) -> None:
    """Delete an index that was set aside; what else is in it stays."""
    for path in layout.files_of_index(folder):
        delete(path)
    with suppress(OSError):
        folder.rmdir()
