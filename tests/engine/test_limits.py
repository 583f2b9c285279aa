"""The memory that a process may use, over trees of cgroups as containers and services have them."""

from pathlib import Path

import psutil
import pytest

from kvzip_memory.system.limits import host_nbytes

TOTAL = psutil.virtual_memory().total
V1_NONE = str(0x7FFFFFFFFFFFF000)
# what /proc/self/cgroup says, the files under /sys/fs/cgroup, the bytes
TREES: dict[str, tuple[str | None, dict[str, str], int]] = {
    "no cgroups": (None, {}, TOTAL),
    "v2, a container": ("0::/\n", {"memory.max": "2000000\n"}, 2000000),
    "v2, without a limit": ("0::/user.slice\n", {"user.slice/memory.max": "max\n"}, TOTAL),
    "v2, nested, the least is above": (
        "0::/a.slice/b.service/c\n",
        {"a.slice/memory.max": "1000000", "a.slice/b.service/memory.max": "max", "a.slice/b.service/c/memory.max": "3000000"},
        1000000,
    ),
    "v2, nested, the least is its own": ("0::/a/b\n", {"a/memory.max": "5000000", "a/b/memory.max": "3000000"}, 3000000),
    "v2, the host's path in a container": ("0::/docker/0123\n", {"memory.max": "2000000"}, 2000000),
    "v2, a path outside the namespace": ("0::/../../other\n", {"memory.max": "2000000"}, 2000000),
    "v1": (
        "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/x\n",
        {"memory/memory.limit_in_bytes": V1_NONE, "memory/docker/1/memory.limit_in_bytes": "2000000", "cpu,cpuacct/memory.max": "1"},
        2000000,
    ),
    "v1, in a container": ("4:memory:/docker/1\n", {"memory/memory.limit_in_bytes": "2000000\n"}, 2000000),
    "v1, without a limit": ("4:memory:/\n", {"memory/memory.limit_in_bytes": V1_NONE}, TOTAL),
    "both": ("4:memory:/a\n0::/a\n", {"memory/a/memory.limit_in_bytes": "3000000", "unified/a/memory.max": "2000000"}, 2000000),
    "a limit beyond the machine": ("0::/\n", {"memory.max": str(TOTAL * 2)}, TOTAL),
    "another's": ("0::/mine\n", {"other/memory.max": "5"}, TOTAL),
    "not a number": ("0::/\nnonsense", {"memory.max": "many"}, TOTAL),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_least_limit_counts(tree: str, tmp_path: Path) -> None:
    told, files, expected = TREES[tree]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    if told is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(told)
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host_nbytes(tmp_path) == expected
