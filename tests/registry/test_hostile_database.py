"""Databases in an index's place that hold more than rows: nothing of it is computed, obeyed or set, and the index is made anew."""

import os
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from test_hostile_folders import within

from kvzip_memory import StorageError
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk.index import Index
from kvzip_memory.registry.disk.schema import KNOWN, SETTINGS, digest_of
from kvzip_memory.registry.disk.store import DiskTier
from synthetic import CPU, load, wanted

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "
COLUMNS = (
    "i AS rowid, 'k' AS key, 1 AS raw, 0 AS store_time, NULL AS expire_time, 0 AS access_time, 0 AS access_count, NULL AS tag, 0 AS size"
)
DATABASES: dict[str, list[str]] = {
    "an endless view": ["DROP TABLE Cache", f"CREATE VIEW Cache AS {ENDLESS} {COLUMNS}, 1 AS mode, NULL AS filename, 'v' AS value FROM n"],
    "endless settings": ["DROP TABLE Settings", f"CREATE VIEW Settings AS {ENDLESS} 'key' || i AS key, i AS value FROM n"],
    "an endless trigger": [f"CREATE TRIGGER more AFTER INSERT ON Cache BEGIN UPDATE Cache SET size = ({ENDLESS} sum(i) FROM n); END"],
    "a trigger of a known name": [
        "DROP TRIGGER Settings_count_insert",
        f"CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache BEGIN UPDATE Cache SET size = ({ENDLESS} sum(i) FROM n); END",
    ],
    "an index of what is computed": ["CREATE INDEX more ON Cache (upper(key))"],
    "a table with a check": [
        "DROP TABLE Cache",
        "CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key BLOB CHECK (key = zeroblob(900000000)))",
    ],
    **{
        f"setting {key}": [f"INSERT OR REPLACE INTO Settings VALUES ('{key}', {value})"]
        for key, value in {
            **{"transact": "'x'", "close": "'x'", "get": "1", "_sql": "1", "_local": "1", "disk_put": "1", "__class__": "1"},
            **{"sqlite_cache_size": "-9000000", "sqlite_locking_mode": "'EXCLUSIVE'", "sqlite_journal_mode": "'off'", "sqlite_x": "x'00'"},
            **{"disk_pickle_protocol": "'x'", "sqlite_mmap_size": "1e300", "sqlite_synchronous": "'x'", "count": "'x'", "tag_index": "1"},
            **{"cull_limit": "1000", "size_limit": "1", "eviction_policy": "'least-recently-used'", "statistics": "1"},
        }.items()
    },
}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", DATABASES)
def test_nothing_but_rows_is_taken_from_a_database(tmp_path: Path, kind: str, read_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ContextRegistry(CPU, tmp_path)
    for number in (1, 2):
        load(registry, number)
    registry.flush()
    registry.close()
    with closing(sqlite3.connect(tmp_path / "index" / "cache.db", isolation_level=None)) as database:
        for statement in DATABASES[kind]:
            database.execute(statement)
        assert database.execute("PRAGMA locking_mode").fetchone() == ("normal",)
    if read_only:
        monkeypatch.setattr("os.access", lambda path, mode: False)
    with within(20):
        for _ in range(2):
            registry = ContextRegistry(CPU, tmp_path)
            assert registry.no_disk is None
            assert [load(registry, number) for number in (1, 2)] == ["disk", "disk"]
            load(registry, 3)
            registry.flush()
            assert {entry.key for entry in registry.contexts()} >= {wanted(1).key, wanted(2).key}
            with pytest.raises(StorageError, match="cannot be written") if read_only else nullcontext():
                registry.gc()
            registry.close()


def test_all_that_diskcache_makes_is_known(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index.set("context:x", {})
    with closing(sqlite3.connect(tmp_path / "cache.db")) as database:
        made = {name: digest_of(sql) for name, sql in database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")}
        settings = dict(database.execute("SELECT key, value FROM Settings"))
    assert made == KNOWN
    assert settings["sqlite_mmap_size"] == 0  # a file that is cut short while it is mapped would end the process
    assert {*settings} == SETTINGS
    index.close()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_database_that_is_cut_short_while_it_is_open_ends_no_process(tmp_path: Path, size: int) -> None:
    disk = DiskTier(tmp_path)
    registry = ContextRegistry(CPU, tmp_path)
    load(registry, 1)
    registry.flush()
    os.truncate(tmp_path / "index" / "cache.db", size)
    with within(20):
        assert load(registry, 1) in ("device", "disk")
        load(registry, 2)
        registry.flush()
        registry.contexts()
        registry.gc()
        registry.close()
        disk.close()
