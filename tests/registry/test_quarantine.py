"""What is damaged or odd is set aside with its reason, within the budget and freed first; what only cannot be read now is left alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_odd_facts import FORGERIES, forge

from kvzip_memory import StorageError
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk import files as context_files
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.disk.files import PreparedFile
from kvzip_memory.registry.disk.store import DiskTier
from synthetic import CPU, context, load, wanted


def filled(root: Path, *numbers: int, budget: int | None = None) -> dict[int, Path]:
    registry = ContextRegistry(CPU, root, disk_bytes=budget)
    for number in numbers:
        load(registry, number)
    registry.flush()
    assert registry._backing.tier is not None
    paths = {number: registry._backing.tier.folder.path(wanted(number).key) for number in numbers}
    registry.close()
    return paths


def lose_row(root: Path, key: str) -> None:
    disk = DiskTier(root)
    index = disk._keeper.opened().index
    index.delete("context:" + key)
    disk._tidying.doubtful = False
    index.close()


WITHOUT_A_ROW: dict[str, Callable[[Path, str], object]] = {
    "the row is gone": lose_row,
    "the index is gone": lambda root, key: shutil.rmtree(root / "index"),
    "the index is damaged": lambda root, key: (root / "index" / "cache.db").write_bytes(b"no database"),
}


@pytest.mark.parametrize("how", WITHOUT_A_ROW)
@pytest.mark.parametrize("forgery", ["negative nbytes", "no facts", "extents that lie"])
def test_a_broken_file_without_a_row_is_set_aside_with_its_reason(tmp_path: Path, how: str, forgery: str) -> None:
    path = filled(tmp_path, 1, 2)[1]
    WITHOUT_A_ROW[how](tmp_path, wanted(1).key)
    FORGERIES[forgery][0](path)
    broken = path.read_bytes()
    disk = DiskTier(tmp_path)
    [bad] = disk.quarantine()
    assert bad["key"] == wanted(1).key
    assert "no version of ours" in bad["reason"] or "not a context file" in bad["reason"]
    assert (tmp_path / "quarantine" / bad["file"]).read_bytes() == broken
    assert disk.usage() == disk.measured()
    disk.close()
    [finding] = [finding for finding in examine(tmp_path) if finding.what == "quarantine"]
    assert bad["reason"].split(": ", 1)[1] in finding.found
    disk = DiskTier(tmp_path)
    assert disk.gc()["quarantined"] >= 1  # an index that was set aside counts, too
    assert disk.quarantine() == []
    assert disk.usage() == disk.measured() == disk.folder.path(wanted(2).key).stat().st_size


def test_what_is_in_quarantine_is_freed_first_and_takes_no_room_of_contexts(tmp_path: Path) -> None:
    paths = filled(tmp_path, 1, 2, 3)
    size = paths[1].stat().st_size
    registry = ContextRegistry(CPU, tmp_path, disk_bytes=3 * size)
    forge(paths[3], lambda facts: facts.update(ratio="x"))
    assert registry.verify(wanted(3).key)
    assert len(registry.quarantine()) == 1
    load(registry, 4)
    registry.flush()
    assert registry.quarantine() == []
    assert {entry.key for entry in registry.contexts()} == {wanted(number).key for number in (1, 2, 4)}
    registry.close()


def test_a_broken_file_beyond_the_budget_is_deleted_and_its_reason_stays(tmp_path: Path) -> None:
    paths = filled(tmp_path, 1, 2)
    lose_row(tmp_path, wanted(1).key)
    os.truncate(paths[1], 9 << 30)
    size = paths[2].stat().st_size
    disk = DiskTier(tmp_path, 2 * size)
    [bad] = disk.quarantine()
    assert bad["nbytes"] == 0
    assert bad["reason"]
    assert disk.usage() == disk.measured() == size


@pytest.mark.parametrize("how", WITHOUT_A_ROW)
def test_a_file_that_cannot_be_read_now_is_left_alone(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path, 1, 2)[1]
    whole = path.read_bytes()
    WITHOUT_A_ROW[how](tmp_path, wanted(1).key)

    def fails(path_: Path, follow_links: bool) -> None:
        raise OSError(24, "Too many open files", str(path_))

    with monkeypatch.context() as patch:
        patch.setattr("kvzip_memory.registry.disk.folder.open_context", fails)
        disk = DiskTier(tmp_path)
        assert disk.quarantine() == []
        disk.close()
    assert path.read_bytes() == whole
    assert DiskTier(tmp_path).get(wanted(1).key, torch.device("cpu")).key == wanted(1).key


@pytest.mark.parametrize("how", WITHOUT_A_ROW)
def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path, how: str) -> None:
    path = filled(tmp_path, 1, 2)[1]
    WITHOUT_A_ROW[how](tmp_path, wanted(1).key)
    forge(path, lambda facts: facts["identity"].update(format=99))
    whole = path.read_bytes()
    for _ in range(2):
        disk = DiskTier(tmp_path)
        assert disk.quarantine() == []
        assert disk.usage() == disk.measured()
        disk.gc()
        disk.close()
    assert path.read_bytes() == whole


def test_a_header_that_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_files, "LARGEST_HEADER", 1 << 14)
    with pytest.raises(StorageError, match=r"header of [\d,]+ bytes, more than the 16,384"):
        PreparedFile(context(1), {"group": "", "names": {"x" * 4000: 1.0, "y" * 4000: 1.0}, "tags": ["z" * 9000]})
    assert os.listdir(tmp_path) == []


def test_a_name_that_would_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip_memory.system import private

    monkeypatch.setattr(private, "LIMIT", 1000)
    path = tmp_path / "file"
    private.write_text(path, "as it was")
    with pytest.raises(StorageError, match="1,000"):
        private.write_text(path, "x" * 1001)
    assert private.read_text(path) == "as it was"


def test_a_file_that_grows_in_quarantine_takes_no_room(tmp_path: Path) -> None:
    paths = filled(tmp_path, 1, 2)
    size = paths[2].stat().st_size
    disk = DiskTier(tmp_path, 2 * size)
    disk._quarantine(wanted(1).key, "as damage does")
    [bad] = disk.quarantine()
    disk.close()
    os.truncate(tmp_path / "quarantine" / bad["file"], 9 << 30)
    disk = DiskTier(tmp_path, 2 * size)
    assert disk.usage() == disk.measured() == size
    assert [row["reason"] for row in disk.quarantine()] == ["as damage does"]
