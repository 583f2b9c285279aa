"""The command line, doctor and metrics."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import StorageError, __version__
from kvzip_memory.cli import app, console
from kvzip_memory.registry.doctor import examine


def run(folder: Path, *args: str, code: int = 0) -> Any:
    out = CliRunner().invoke(app, [*args, "--cache-dir", str(folder), "--json"])
    assert out.exit_code == code, out.output
    return json.loads(out.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    engine = tiny_engine(cache_dir=tmp_path / "cache", ratio=0.4)
    engine.load(TEXT, name="page", tags=["red"])
    engine.load(TEXT + "More.", name="longer")
    engine.close()
    return tmp_path / "cache"


def test_the_version_is_told_and_help_without_arguments() -> None:
    out = CliRunner().invoke(app, ["--version"])
    assert (out.exit_code, out.stdout) == (0, f"kvzip-memory {__version__}\n")
    assert version("kvzip-memory") == __version__
    for arguments in ([], ["--help"]):
        out = CliRunner().invoke(app, arguments)
        assert "Contexts in a cache folder" in out.output
        assert "--version" in out.output


def test_contexts_are_listed_shown_pinned_and_deleted(folder: Path) -> None:
    assert [e["names"] for e in run(folder, "ls")] == [["longer"], ["page"]]
    assert [e["names"] for e in run(folder, "ls", "--tag", "red")] == [["page"]]
    assert [e["names"] for e in run(folder, "ls", "--limit", "1")] == [["longer"]]
    shown = run(folder, "show", "page")
    assert shown["identity"]["ratio"] == 0.4
    assert run(folder, "show", shown["key"][:8])["key"] == shown["key"]
    assert run(folder, "pin", "page")["pinned"]
    assert run(folder, "show", "page")["pinned"]
    assert not run(folder, "unpin", "page")["pinned"]
    assert run(folder, "stats")["contexts"] == 2
    assert run(folder, "rm", "page")["key"] == shown["key"]
    assert [e["names"] for e in run(folder, "ls")] == [["longer"]]
    missing = CliRunner().invoke(app, ["show", "page", "--cache-dir", str(folder)])
    assert missing.exit_code
    assert "no context 'page' is stored" in str(missing.exception)


def test_an_expired_context_is_not_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4, ttl=60)
    engine.load(TEXT)
    engine.close()
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert run(tmp_path, "verify") == {"checked": 1, "damaged": {}}
    assert run(tmp_path, "gc")["expired"] == 1


def test_names_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 200)
    engine, name = tiny_engine(cache_dir=tmp_path, ratio=0.4), "notes [/draft] [v2]"
    engine.load(TEXT, name=name, tags="[red]")
    engine.close()
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4)
    engine.load(TEXT, name="draft")
    engine.close()
    out = CliRunner().invoke(app, ["rm", "draft", "--cache-dir", str(tmp_path)])
    assert f"draft is no longer a name of {name}" in out.stdout
    for command in (["ls"], ["show", name], ["pin", name], ["unpin", name], ["rm", name]):
        out = CliRunner().invoke(app, [*command, "--cache-dir", str(tmp_path)])
        assert out.exit_code == 0, out.exception
        assert name in out.stdout


def test_what_cannot_be_deleted_is_not_said_to_be(folder: Path) -> None:
    blob = next((folder / "contexts" / "blobs").rglob(f"{run(folder, 'show', 'page')['key']}*"))
    blob.unlink()
    blob.mkdir()
    out = CliRunner().invoke(app, ["rm", "page", "--cache-dir", str(folder)])
    assert isinstance(out.exception, OSError)
    assert "deleted" not in out.stdout


def test_a_file_is_loaded_and_found_by_an_engine(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "page.txt").write_text(TEXT)
    args = ["load", str(tmp_path / "page.txt"), "--model", str(tmp_path / "model"), "--ratio", "0.4", "--keep", "8306"]
    first, second = run(tmp_path / "cache", *args), run(tmp_path / "cache", *args)
    assert (first["tier"], second["tier"]) == ("built", "disk")
    engine = tiny_engine(cache_dir=tmp_path / "cache", ratio=0.4)
    assert engine.load(tmp_path / "page.txt", keep="8306").receipt.tier == "disk"  # type: ignore[union-attr]
    assert engine.get("page").key == first["key"]
    engine.close()


def test_damage_is_found_by_verify_explained_by_doctor_and_cleared_by_gc(folder: Path) -> None:
    assert run(folder, "verify") == {"checked": 2, "damaged": {}}
    assert {f["level"] for f in run(folder, "doctor")} == {"ok"}
    key = run(folder, "show", "page")["key"]
    (path,) = (folder / "contexts" / "blobs").rglob(f"{key}*")
    whole = bytearray(path.read_bytes())
    whole[-5000] ^= 1
    path.write_bytes(whole)
    damaged = run(folder, "verify", code=1)["damaged"]
    assert list(damaged) == [key]
    assert "checksum" in damaged[key]
    notes = [f for f in run(folder, "doctor") if f["level"] != "ok"]
    assert [f["what"] for f in notes] == ["quarantine"]
    assert "gc" in notes[0]["advice"]
    assert run(folder, "gc")["quarantined"] == 1
    assert {f["level"] for f in run(folder, "doctor")} == {"ok"}


def test_doctor_sees_what_needs_somebody(folder: Path) -> None:
    os.chmod(folder / "contexts", 0o755)
    (finding,) = [f for f in run(folder, "doctor", code=1) if f["level"] == "problem"]
    assert (finding["what"], "chmod 700" in finding["advice"]) == ("permissions", True)
    (folder / "contexts" / "FORMAT").write_text("9")
    assert {f.what for f in examine(folder / "contexts") if f.level == "problem"} == {"permissions", "layout"}
    shutil.rmtree(folder)
    assert [f["level"] for f in run(folder, "doctor")] == ["note"]


@pytest.mark.parametrize("command", [["ls"], ["show", "page"], ["stats"], ["doctor"], ["gc"], ["verify"]])
def test_people_get_words_and_tables(folder: Path, command: list[str]) -> None:
    out = CliRunner().invoke(app, [*command, "--cache-dir", str(folder)])
    assert out.exit_code == 0
    assert out.stdout.strip()
    assert "{" not in out.stdout.splitlines()[0]


def test_a_folder_that_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    out = CliRunner().invoke(app, ["ls", "--cache-dir", str(tmp_path / "none")])
    assert out.exit_code == 2
    assert "nothing is stored" in out.output
    assert not (tmp_path / "none").exists()


def test_prometheus_reads_the_counters(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry

    from kvzip_memory.metrics import export_metrics

    engine, registry = tiny_engine(cache_dir=tmp_path, ratio=0.4), CollectorRegistry()
    export_metrics(engine, "test", registry)
    engine.load(TEXT)
    engine.load(TEXT)
    engine.registry.flush()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"engine": "test", **labels})

    assert value("kvzip_lookups_total", tier="built") == 1
    assert value("kvzip_lookups_total", tier="device") == 1
    assert value("kvzip_tier_contexts", tier="disk") == 1
    assert value("kvzip_tier_bytes", tier="device") == engine.stats()["tiers"]["device"]["nbytes"]
    assert value("kvzip_events_total", event="stored") == 1
    assert (value("kvzip_answers", state="running"), value("kvzip_answers", state="waiting")) == (0, 0)
    assert value("kvzip_oldest_wait_seconds") == 0
    engine.close()


def test_an_index_that_somebody_holds_is_not_an_empty_folder(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        for command in (["ls"], ["show", "page"], ["gc"], ["stats"], ["rm", "page"], ["pin", "page"]):
            out = CliRunner().invoke(app, [*command, "--cache-dir", str(folder)])
            assert isinstance(out.exception, StorageError)  # which main() makes one line
            assert "another process holds the index locked; try again when it is free" in str(out.exception)
        doctor = run(folder, "doctor", code=1)
        assert [finding["found"] for finding in doctor if finding["what"] == "index"] == ["another process holds the index locked"]
        holder.execute("ROLLBACK")
    assert len(run(folder, "ls")) == 2
