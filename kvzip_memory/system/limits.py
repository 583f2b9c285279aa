"""How much memory a process may use: in a container less than the machine has."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil


def host_nbytes(root: Path = Path("/")) -> int:
    """Bytes of the host's memory, or of the least limit of a cgroup that this process is in.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return min([int(psutil.virtual_memory().total), *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    """Limits of memory of the process's cgroups and of all above them, in both versions. No limit is "max", or a number beyond all memory.

    In a container the path in ``/proc/self/cgroup`` may be the host's, of which nothing is mounted: then the mount's root is ours.
    """
    limits = []
    for mount, limit, group in _groups(root):
        own = PurePosixPath(group.relative_to("/"))
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):
                limits.append(int((mount / folder / limit).read_text()))
    return limits


def _groups(root: Path) -> list[tuple[Path, str, PurePosixPath]]:
    """Where the controllers of memory are mounted, the name of the file with the limit, and the process's group there."""
    found = []
    mounted = root / "sys" / "fs" / "cgroup"
    with suppress(OSError, ValueError):
        for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = PurePosixPath(path)
            if ".." in group.parts or not group.is_absolute():  # of another namespace
                group = PurePosixPath("/")
            if not controllers:
                found += [(mounted, "memory.max", group), (mounted / "unified", "memory.max", group)]
            elif "memory" in controllers.split(","):
                found.append((mounted / "memory", "memory.limit_in_bytes", group))
    return found
