"""The command line, doctor and metrics."""

import errno
import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import InputError, KVzipEngine, StorageError, __version__
from kvzip_memory.cli import app
from kvzip_memory.cli.terminal import console
from kvzip_memory.compression.codecs import CODECS
from kvzip_memory.registry import EVERYONE, ContextRegistry
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.identity import tenant_digest
from kvzip_memory.turns import TurnsFile


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


def test_what_cannot_be_deleted_is_not_said_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    out = CliRunner().invoke(app, ["rm", "page", "--cache-dir", str(folder)])
    assert isinstance(out.exception, OSError)
    assert "deleted" not in out.stdout


def test_a_file_is_loaded_by_a_packed_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "page.txt").write_text(TEXT)
    args = ["load", str(tmp_path / "page.txt"), "--model", str(tmp_path / "model"), "--weights"]
    plain, packed, again = (run(tmp_path / "cache", *args, weights) for weights in ("int8", "int4", "int4"))
    assert plain["key"] != packed["key"]
    assert again["tier"] == "disk"
    engine = KVzipEngine.from_pretrained(tmp_path / "model", weights="int4", cache_dir=tmp_path / "cache")
    assert engine.get("page").key == packed["key"]
    engine.close()


@pytest.mark.parametrize("codec", ["auto", *CODECS])
def test_a_file_is_loaded_and_found_by_an_engine(codec: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "page.txt").write_text(TEXT)
    args = ["load", str(tmp_path / "page.txt"), "--model", str(tmp_path / "model"), "--ratio", "0.4", "--keep", "8306"]
    args += [] if codec == "auto" else ["--codec", codec]
    first, second = run(tmp_path / "cache", *args), run(tmp_path / "cache", *args)
    assert (first["tier"], second["tier"]) == ("built", "disk")
    engine = tiny_engine(cache_dir=tmp_path / "cache", ratio=0.4, codec=codec)
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
    (file,) = (folder / "contexts" / "quarantine").iterdir()
    assert file.name.startswith(key)
    assert f"{key[:12]}*" in notes[0]["found"]
    assert str(file.parent) in notes[0]["found"]
    assert "rebuilt" not in str(notes)  # nobody has asked for it
    assert run(folder, "gc")["quarantined"] == 1
    assert {f["level"] for f in run(folder, "doctor")} == {"ok"}


def test_doctor_sees_what_needs_somebody(folder: Path) -> None:
    os.chmod(folder / "contexts", 0o755)
    (finding,) = [f for f in run(folder, "doctor", code=1) if f["level"] == "problem"]
    assert (finding["what"], "chmod 700" in finding["advice"]) == ("permissions", True)
    (folder / "contexts" / "FORMAT").write_text("9")
    assert {f.what for f in examine(folder / "contexts") if f.level == "problem"} == {"permissions", "folder"}
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


# -- tenants ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, str]]:
    folder, keys = tmp_path_factory.mktemp("filled"), dict[str | None, str]()
    for tenant in ("ana", "ben", None):
        engine = tiny_engine(cache_dir=folder, ratio=0.4, tenant=tenant)
        keys[tenant] = engine.load(TEXT, name="page", tags="red").key
        engine.close()
    return folder, keys


@pytest.fixture
def shared(filled: tuple[Path, dict[str | None, str]], tmp_path: Path) -> dict[str | None, str]:
    """The keys of one text of one name and tag that two tenants, and nobody, have."""
    shutil.copytree(filled[0], tmp_path, dirs_exist_ok=True)
    return filled[1]


#: What is asked for with a reference, and how.
REFERRING = {"show": ["page"], "pin": ["page"], "unpin": ["page"], "verify": ["page"], "rm": ["page"], "rm --tag": ["red"]}


def refer(folder: Path, command: str, *args: str) -> Any:
    return CliRunner().invoke(app, [*command.split(), *args, "--cache-dir", str(folder), "--json"])


def test_all_commands_that_are_given_a_name_are_here() -> None:
    found = set()
    for command in app.registered_commands:
        assert command.callback
        parameters = signature(command.callback).parameters
        if "reference" in parameters or "references" in parameters:
            found.add(command.name or command.callback.__name__)
            assert "tenant" in parameters
    assert found == {command.split()[0] for command in REFERRING}


@pytest.mark.parametrize("command", REFERRING)
def test_a_name_of_several_tenants_asks_for_one_and_changes_nothing(shared: dict[str | None, str], tmp_path: Path, command: str) -> None:
    before = run(tmp_path, "ls")
    out = refer(tmp_path, command, *REFERRING[command])
    assert isinstance(out.exception, InputError), out.output
    digests = sorted(["-", *(tenant_digest(t)[:12] for t in ("ana", "ben"))])  # type: ignore[index]
    assert f"of 3 tenants; say whose with --tenant, by itself or one of {', '.join(digests)}" in str(out.exception)
    assert run(tmp_path, "ls") == before


@pytest.mark.parametrize("by", ["itself", "digest", "environment"])
@pytest.mark.parametrize("tenant", ["ana", "ben", None])
@pytest.mark.parametrize("command", REFERRING)
def test_a_tenant_s_own_is_taken_and_that_of_no_other(
    shared: dict[str | None, str], tmp_path: Path, command: str, tenant: str | None, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "-" if tenant is None else tenant if by == "itself" else str(tenant_digest(tenant))[:8]
    if by == "environment":
        monkeypatch.setenv("KVZIP_MEMORY_TENANT", tenant or "-")
    out = refer(tmp_path, command, *REFERRING[command], *([] if by == "environment" else ["--tenant", given]))
    assert out.exit_code == 0, out.exception
    assert {entry["key"] for entry in run(tmp_path, "ls", "--tenant", given)} <= {shared[tenant]}
    monkeypatch.delenv("KVZIP_MEMORY_TENANT", raising=False)
    left = {entry["key"]: (entry["pinned"], entry["tags"]) for entry in run(tmp_path, "ls")}
    done: dict[str, Any] = {"pin": {shared[tenant]: (True, ["red"])}, "rm --tag": {shared[tenant]: (False, [])}}
    as_before = {key: (False, ["red"]) for of, key in shared.items() if command != "rm" or of != tenant}
    assert left == {**as_before, **done.get(command, {})}
    if command == "show":
        assert json.loads(out.stdout)["tenant"] == tenant_digest(tenant)


def test_a_whole_key_is_nobody_s_name_and_its_beginning_asks_where_it_is_several_keys_or_a_name(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4, tenant="ana")
    key = engine.load(TEXT).key
    engine.close()
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.4, tenant="ben")
    with pytest.raises(InputError, match="has the form of a key"):
        engine.load(TEXT, name=key)
    engine.load(TEXT, name=key[:8])
    engine.close()
    assert run(tmp_path, "show", key)["tenant"] == tenant_digest("ana")
    assert "is a name and the beginning of a key; give the whole key" in str(refer(tmp_path, "rm", key[:8]).exception)
    assert run(tmp_path, "show", key[:8], "--tenant", "ben")["names"]
    assert run(tmp_path, "show", key[:8], "--tenant", "ana")["key"] == key
    assert run(tmp_path, "rm", key)["tenant"] == tenant_digest("ana")


def test_the_beginning_of_several_keys_asks_for_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ContextRegistry(torch.device("cpu"), folder / "contexts", tenant=EVERYONE).contexts()
    both = [replace(entry, key="abcdefab" + entry.key[8:]) for entry in entries]
    monkeypatch.setattr(ContextRegistry, "looked_up", lambda *args: (both, {}))
    for command in ("show", "pin", "unpin", "verify", "rm"):
        out = refer(folder, command, "abcdefab")
        assert isinstance(out.exception, InputError)
        assert "is the beginning of 2 keys; give more digits of one of abcdefab" in str(out.exception)
    assert len(run(folder, "ls")) == 2


def test_an_other_tenant_s_session_is_not_deleted(tmp_path: Path) -> None:
    for tenant in ("ana", "ben"):
        engine = tiny_engine(cache_dir=tmp_path, tenant=tenant)
        engine.close()
        session = TurnsFile.of(tmp_path, engine.registry.tenant, "kvzip", "s1")
        session.append({"turns": [{"role": "user", "content": "Hi."}]}, "memory kvzip: s1", None)
    assert isinstance(refer(tmp_path, "rm", "memory kvzip: s1").exception, InputError)
    assert isinstance(refer(tmp_path, "rm", "memory kvzip: s1", "--tenant", "eve").exception, InputError)
    assert len(run(tmp_path, "sessions")) == 2
    assert run(tmp_path, "rm", "memory kvzip: s1", "--tenant", "ana")["turns"] == 1
    (left,) = run(tmp_path, "sessions")
    assert left["file"] == str(session.path)


def said(folder: Path, tenant: str, **options: Any) -> Path:
    """The turns of a tenant who has no contexts, unless some are to be loaded."""
    engine = tiny_engine(cache_dir=folder, tenant=tenant)
    if options:
        engine.load(TEXT, **options)
    engine.close()
    file = TurnsFile.of(folder, engine.registry.tenant, "kvzip", "s1")
    file.append({"turns": [{"role": "user", "content": "Hi."}]}, "memory kvzip: s1", None)
    return file.path


def test_a_tenant_that_has_turns_alone_is_known_by_itself_and_by_its_whole_digest(tmp_path: Path) -> None:
    for tenant in ("ana", str(tenant_digest("ana"))):
        file = said(tmp_path, "ana")
        other = said(tmp_path, "ben")
        for whose in (tenant, str(tenant_digest("ben"))):
            assert len(run(tmp_path, "sessions", "--tenant", whose)) == 1
        assert run(tmp_path, "sessions", "--tenant", str(tenant_digest("eve"))) == []
        assert run(tmp_path, "rm", "memory kvzip: s1", "--tenant", tenant)["turns"] == 1
        assert (file.exists(), other.exists()) == (False, True)
        said(tmp_path, "ana")
        assert run(tmp_path, "rm", "--tag", "memory kvzip: s1", "--tenant", tenant)["turns"] == 1
        assert (file.exists(), other.exists()) == (False, True)


@pytest.mark.parametrize("options", [{}, {"tags": "memory kvzip: s1"}])
def test_turns_of_a_tag_are_deleted_by_operators_who_say_whose_if_they_are_several_s(tmp_path: Path, options: dict[str, str]) -> None:
    file = said(tmp_path, "ana", **options)
    other = said(tmp_path, "ben")
    refused = refer(tmp_path, "rm", "--tag", "memory kvzip: s1").exception
    assert isinstance(refused, InputError)
    assert "say whose with --tenant" in str(refused)
    assert file.exists() and other.exists()  # noqa: PT018
    assert run(tmp_path, "rm", other.stem[:12])["turns"] == 1
    forgotten = run(tmp_path, "rm", "--tag", "memory kvzip: s1")
    assert (forgotten["turns"], len(forgotten["deleted"])) == (1, len(options))
    assert not file.exists()
    assert "nothing is tagged" in str(refer(tmp_path, "rm", "--tag", "memory kvzip: s1").exception)


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


def test_what_names_nothing_says_what_would(folder: Path) -> None:
    key = run(folder, "show", "page")["key"]
    assert "8 digits" in str(refer(folder, "rm", key[:7]).exception)
    assert "kvzip-memory sessions" in str(refer(folder, "rm", "memory history: nope").exception)
    assert "--conversion is empty" in str(refer(folder, "rm", "--conversion", "").exception)
    assert "only one of them" in " ".join(refer(folder, "rm", "page", "--tag", "red").output.replace("│", " ").split())
    engine = tiny_engine(cache_dir=folder, ratio=0.4)
    with pytest.raises(InputError, match="first 8 digits at least"):
        engine.get(key[:7])
    assert engine.get(key[:8]).key == key
    with pytest.raises(InputError) as error:
        engine.get("another")
    assert "digits" not in str(error.value)
    engine.close()
