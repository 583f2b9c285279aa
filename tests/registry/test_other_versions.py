"""Contexts that other versions of this package have stored: they miss and say why, are listed as such, and go when that is asked for.

``stored/format-1.safetensors.gz`` and so on are the file that ``engine(folder).load(TEXT, name="lamp")`` of the last version of each format
left in its folder. Whoever changes ``FORMAT`` puts the one of the version before it there.
"""

from __future__ import annotations

import gzip
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import TESTS, tiny_model, tiny_tokenizer
from kvzip_memory import IdentityMismatchError, KVzipEngine
from kvzip_memory.cli import app
from kvzip_memory.cli.terminal import console
from kvzip_memory.compression import scorers
from kvzip_memory.registry import identity
from kvzip_memory.registry.disk.files import read_context

TEXT = "The lamp is in the attic."
STORED = TESTS / "stored"
EARLIER = range(1, identity.FORMAT)
LATER = {name: identity.NEWEST_FORMAT + n for name, n in {"FORMAT": 1, "FORMAT_OF_STATES": 2, "NEWEST_FORMAT": 2}.items()}


def engine(folder: Path | None) -> KVzipEngine:
    return KVzipEngine(tiny_model(num_hidden_layers=1), tiny_tokenizer(), ratio=0.5, cache_dir=folder)


def unpacked(version: int, folder: Path) -> Path:
    path = folder / "saved.safetensors"
    path.write_bytes(gzip.decompress((STORED / f"format-{version}.safetensors.gz").read_bytes()))
    return path


def blobs(folder: Path) -> list[str]:
    """Keys of what is in a cache folder."""
    return [path.stem for path in (folder / "contexts" / "blobs").glob("??/*.safetensors")]


def stored(version: int, folder: Path) -> str:
    """The key of a context that an earlier version has left in a folder."""
    engine(folder).close()
    saved = unpacked(version, folder)
    key = read_context(saved, torch.device("cpu")).key
    blob = folder / "contexts" / "blobs" / key[:2] / f"{key}.safetensors"
    blob.parent.mkdir(mode=0o700)
    saved.rename(blob)
    blob.chmod(0o600)
    return key


def run(folder: Path, *args: str) -> Any:
    out = CliRunner().invoke(app, [*args, "--cache-dir", str(folder), "--json"])
    assert out.exit_code == 0, out.output
    return json.loads(out.stdout)


def later(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """From now on it is a later version of this package."""
    if what == "format":
        for module in ("identity", "disk.files"):
            for name in LATER.keys() & vars(import_module(f"kvzip_memory.registry.{module}")).keys():
                monkeypatch.setattr(f"kvzip_memory.registry.{module}.{name}", LATER[name])
    else:
        monkeypatch.setattr(scorers.kvzip, "VERSION", scorers.kvzip.VERSION + 1)
        monkeypatch.setitem(scorers.VERSIONS, "kvzip", scorers.kvzip.VERSION)


def test_there_is_a_file_of_every_earlier_version() -> None:
    assert {path.name for path in STORED.iterdir()} == {f"format-{version}.safetensors.gz" for version in EARLIER}


@pytest.mark.parametrize("version", EARLIER)
def test_what_an_earlier_version_has_stored_misses_and_says_so(tmp_path: Path, version: int) -> None:
    key = stored(version, tmp_path)
    made = engine(tmp_path)
    receipt = made.load(TEXT).receipt
    assert receipt is not None
    assert (receipt.tier, receipt.differs) == ("built", ("format",))
    assert f"by an older version of kvzip-memory (field format: stored {version}, wanted {identity.FORMAT})" in str(receipt.reason)
    assert "gc --old" in str(receipt.reason)
    assert receipt.key != key
    again = made.load(TEXT).receipt
    assert again is not None
    assert again.hit
    made.close()


@pytest.mark.parametrize("version", EARLIER)
def test_it_is_listed_as_such_and_freed_when_that_is_asked_for(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = stored(version, tmp_path)
    made = engine(tmp_path)
    mine = made.load(TEXT)
    made.close()
    assert {entry["key"]: entry["other_version"] for entry in run(tmp_path, "ls")} == {key: "older", mine.key: None}
    assert run(tmp_path, "show", key)["other_version"] == "older"
    monkeypatch.setattr(console, "width", 200)
    assert CliRunner().invoke(app, ["ls", "--cache-dir", str(tmp_path)]).output.count("older version") == 1
    run(tmp_path, "pin", key)
    assert "old" not in run(tmp_path, "gc")
    assert run(tmp_path, "gc", "--old")["old"] == 0  # it is pinned
    run(tmp_path, "unpin", key)
    freed = run(tmp_path, "gc", "--old")
    assert (freed["old"], freed["expired"], freed["bytes"] > 0) == (1, 0, True)
    assert blobs(tmp_path) == [mine.key]


@pytest.mark.parametrize("version", EARLIER)
def test_a_file_of_an_earlier_version_is_refused_by_that(tmp_path: Path, version: int) -> None:
    path = unpacked(version, tmp_path)
    with pytest.raises(
        IdentityMismatchError, match=rf"older version of kvzip-memory \(format: stored {version}, here {identity.FORMAT}"
    ) as error:
        engine(None).open(path)
    assert "format" in error.value.fields


@pytest.mark.parametrize("what", ["format", "scorer"])
def test_what_this_version_stores_is_a_later_one_s_to_delete_and_the_reverse(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine(tmp_path)
    old = before.load(TEXT).key
    before.close()
    later(monkeypatch, what)
    after = engine(tmp_path)
    new = after.load(TEXT)
    assert new.receipt is not None
    assert new.receipt.differs == (what,)
    assert f"by an older version of kvzip-memory (field {what}: " in str(new.receipt.reason)
    assert {entry.key: entry.other_version for entry in after.registry.contexts()} == {old: "older", new.key: None}
    after.close()
    monkeypatch.undo()
    before = engine(tmp_path)
    assert {entry.key: entry.other_version for entry in before.registry.contexts()} == {old: None, new.key: "newer"}
    assert before.registry.gc(old=True)["old"] == 0
    assert len(blobs(tmp_path)) == 2
    before.registry.remove(old)
    receipt = before.load(TEXT).receipt
    assert receipt is not None
    assert "by a newer version of kvzip-memory" in str(receipt.reason)
    assert "gc --old" not in str(receipt.reason)
    before.close()
    later(monkeypatch, what)
    after = engine(tmp_path)
    assert after.registry.gc(old=True)["old"] == 1
    assert blobs(tmp_path) == [new.key]
    after.close()
