"""What can be wrong with a cache folder, and what to do about it. Looks, and changes nothing but what opening repairs.

Of contexts it reads no pairs; :meth:`~kvzip_memory.registry.ContextRegistry.verify` does.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from kvzip_memory.registry.disk.index import HELD, IndexHeldError
from kvzip_memory.registry.disk.layout import strangers
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.system.checksums import PLAIN, Checksums
from kvzip_memory.system.findings import Finding, not_ours
from kvzip_memory.system.private import usable

_SHOWN = 10  # damaged files
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"}


def examine(root: Path, checksums: Checksums = PLAIN) -> list[Finding]:
    """Findings about a disk tier's folder, the worst first."""
    if not root.is_dir():
        return [Finding("note", "folder", f"{root} does not exist", "nothing was stored yet, or under another cache_dir")]
    findings = [*_private(root, checksums), _file_system(root), _space(root)]
    try:
        with usable(root):
            disk = DiskTier(root, None, checksums=checksums)
            findings += [_index(disk), *_contents(disk), *not_ours(path.relative_to(root) for path in strangers(root))]
            disk.close()
    except OSError as error:
        return [Finding("problem", "folder", str(error), "nothing of it is read or written until then"), *findings]
    return sorted(findings, key=lambda finding: ("problem", "note", "ok").index(finding.level))


def _private(root: Path, checksums: Checksums) -> list[Finding]:
    """Who else can read and write the folder. Without a secret, opening it refuses what others can write, and says so."""
    status = root.stat()
    if status.st_uid != os.geteuid() and not os.access(root, os.W_OK):
        return [Finding("note", "owner", f"{root} belongs to user {status.st_uid}, and can only be read: it is used as it is")]
    findings = []
    if checksums.are_keyed and (who := _who_else_writes(root) or _who_else_writes(root.parent)):
        advice = "what others put there is not used; where they should not delete either, give a cache_dir of your own"
        findings.append(Finding("note", "writable", f"{who}: they can delete what is in it, and fill it", advice))
    elif status.st_uid not in (0, os.geteuid()):
        return [Finding("problem", "owner", f"{root} belongs to user {status.st_uid}", "give every user a cache_dir of their own")]
    if stat.S_IMODE(status.st_mode) & 0o077:
        shown = stat.filemode(status.st_mode)
        return [*findings, Finding("problem", "permissions", f"{shown}: others can read your texts", f"chmod 700 {root}")]
    return findings or [Finding("ok", "permissions", "readable and writable by you only")]


def _who_else_writes(folder: Path) -> str | None:
    """Who can change a folder beside us, None if nobody; in one with the sticky bit others cannot touch what is ours."""
    status = folder.stat()
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        return f"{folder} can be written by others ({stat.filemode(status.st_mode)})"
    return f"{folder} belongs to user {status.st_uid}" if status.st_uid not in (0, os.geteuid()) else None


def _file_system(root: Path) -> Finding:
    kind, longest = "unknown", ""
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, where, this, *_ = line.split()
            if root.resolve().is_relative_to(where) and len(where) >= len(longest):
                kind, longest = this, where
    if kind in _NETWORK:
        return Finding("problem", "file system", kind, "file locks and SQLite are not safe there; use a local folder a machine")
    return Finding("ok", "file system", kind)


def _space(root: Path) -> Finding:
    usage = shutil.disk_usage(root)
    found = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f}"
    if usage.free < 0.02 * usage.total:
        return Finding("problem", "space", found, "contexts cannot be stored soon; free some, or lower disk_bytes")
    return Finding("ok", "space", found)


def _index(disk: DiskTier) -> Finding:
    try:
        counted, measured = disk.usage(), disk.measured()
    except IndexHeldError:
        advice = f"contexts are served, but none is stored; find out who has {disk.root / 'index'} open"
        return Finding("problem", "index", HELD, advice)
    except OSError as error:
        return Finding("problem", "index", f"cannot be used: {error}", "contexts are served, but none is stored; make the folder writable")
    if disk.read_only is not None:
        return Finding("note", "index", disk.read_only, "contexts are used, and none is stored; make the folder writable to store more")
    if disk.made_anew:
        return Finding("note", "index", "was damaged; made anew from the stored contexts just now", "pin again what you had pinned")
    if counted != measured:
        return Finding(
            "note", "index", f"counts {counted:,} bytes, the files have {measured:,}", "other processes are writing; else run gc"
        )
    return Finding("ok", "index", f"{counted:,} bytes, as the files have")


def _contents(disk: DiskTier) -> list[Finding]:
    findings = []
    with suppress(OSError):
        entries, bad = disk.entries(), disk.quarantine()
        expired, pinned = sum(e.expired for e in entries), sum(e.pinned for e in entries)
        findings.append(Finding("ok", "contexts", f"{len(entries)} stored, {pinned} pinned"))
        if expired:
            findings.append(Finding("note", "expired", f"{expired} contexts", "run gc to delete them"))
        if bad:
            # No whole key, by which a context is opened.
            named = [f"{row['file'][:12]}* ({row['reason'].split(': ', 1)[-1]})" for row in bad[:_SHOWN]]
            more = f" and {len(bad) - _SHOWN} others" if len(bad) > _SHOWN else ""
            advice = "a context is built again when its text is loaded; look at the disk, then run gc to delete the files"
            findings.append(
                Finding(
                    "note",
                    "quarantine",
                    f"{len(bad)} files, named by their keys: {', '.join(named)}{more}; in {disk.root / 'quarantine'}",
                    advice,
                )
            )
    return findings
