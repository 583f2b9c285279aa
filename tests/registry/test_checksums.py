"""A folder with a secret: whatever others put there, nothing of it is used."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
from pydantic import SecretStr
from typer.testing import CliRunner

from conftest import TEXT, tiny_engine
from kvzip_memory import CorruptFileError, InputError, KVzipEngine, StorageError
from kvzip_memory.cli import app
from kvzip_memory.context import Resident
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk import layout
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.disk.files import PreparedFile, read_context
from kvzip_memory.registry.disk.index import Index
from kvzip_memory.registry.disk.names import _file_of
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.registry.holders import Naming
from kvzip_memory.system.checksums import PLAIN, Checksums
from kvzip_memory.turns import Mark, TurnsFile, sessions
from synthetic import CPU, context, load, wanted

SECRET, OTHER = "the harbour master's own", "somebody else's secret"
EVIL = "EVIL"
NAME = "page 1"


def evil_context(number: int) -> Any:
    """Of the same key, with other pairs."""
    right = context(number)
    return replace(right, storage=Resident(context(number + 100).storage.layers))  # type: ignore[attr-defined]


def fill(cache: Path, secret: str | None, evil: bool = False) -> None:
    """All that is read again: contexts 1 and 2, names, rows, a note of progress, and two sessions."""
    registry = ContextRegistry(CPU, cache / "contexts", secret=secret)
    disk = registry._backing.tier
    assert disk is not None
    for number in (1, 2):
        asked = replace(wanted(number), tags=(EVIL,) if evil else (f"tag {number}",))
        with registry.lease(asked, lambda report, number=number: evil_context(number) if evil else context(number)):  # type: ignore[misc]
            pass
    registry.flush()
    if evil:  # the name means the other one
        label = registry._backing.names.of(None, NAME)[-1]
        registry._backing.names.write(registry._backing.names.give(replace(label, key=wanted(2).key)))
    for number in (1, 2):
        disk.builders.report(wanted(number).key, {"stage": EVIL if evil else "score", "done": 1, "total": 2})
    registry.close()
    for session in ("ana", "bob"):
        file = TurnsFile.of(cache, "memory", session, checksums=Checksums(secret))
        for turn in ("one", "two"):
            file.append(said(EVIL if evil else f"{session} {turn}"), session, None)


def said(text: str) -> dict[str, Any]:
    """A line of a session."""
    return {"turns": [{"role": "user", "content": text}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("made")
    fill(top / "ours", SECRET)
    fill(top / "without", None, evil=True)
    fill(top / "another", OTHER, evil=True)
    return top


# -- what can be put where -------------------------------------------------------------------------------------------


def blob(cache: Path, number: int) -> Path:
    return cache / "contexts" / "blobs" / wanted(number).key[:2] / f"{wanted(number).key}.safetensors"


def name(cache: Path, number: int) -> Path:
    return cache / "contexts" / "names" / f"{_file_of(None, f'page {number}')}.json"


def note(cache: Path, number: int) -> Path:
    return cache / "contexts" / "locks" / f"{wanted(number).key[:3]}.progress"


def index(cache: Path, number: int) -> Path:
    return cache / "contexts" / "index" / "cache.db"


def session(cache: Path, number: int) -> Path:
    return TurnsFile.of(cache, "memory", ("ana", "bob")[number - 1]).path


FILES: dict[str, Callable[[Path, int], Path]] = {"blob": blob, "name": name, "note": note, "index": index, "session": session}


def plainly(kind: str, path: Path) -> None:
    """Change what a file says, and give it the checksums of a folder without a secret."""
    if kind == "blob":
        whole = path.read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        table, body = json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length : -32])
        body[10] ^= 1
        facts, start = json.loads(table["__metadata__"]["kvzip_memory"]), 0
        for extent in facts["extents"]:
            del extent["hmac"]
            extent["xxh3"] = xxhash.xxh3_64_hexdigest(bytes(body[start : start + extent["padded"]]))
            start += extent["padded"]
        table["__metadata__"]["kvzip_memory"] = json.dumps(facts)
        table["header.xxh3"] = table.pop("header.hmac")
        header = json.dumps(table).encode()
        header += b" " * (-(8 + len(header)) % 4096)
        header = struct.pack("<Q", len(header)) + header
        path.write_bytes(header + body + struct.pack("<Q", xxhash.xxh3_64_intdigest(header)))
    elif kind == "index":
        rows = Index(path.parent, Checksums(SECRET))
        row = rows.get(f"context:{wanted(1).key}")
        rows.close()
        planted = Index(path.parent, PLAIN)
        planted.set(f"context:{wanted(1).key}", {**(row or {}), "tags": [EVIL]})
        planted.close()
    elif kind == "session":
        lines = path.read_bytes().splitlines()
        line = json.dumps(said(EVIL)).encode()
        path.write_bytes(b"\n".join([*lines[:-1], b'{"crc": "%08x", ' % zlib.crc32(line) + line[1:], b""]))
    else:
        text = path.read_text().partition("\n")[2].replace(wanted(1).key, wanted(2).key).replace("score", EVIL)
        of = path.stem if kind == "name" else wanted(1).key
        path.write_text(PLAIN.seal("", of, text))


def copied(kind: str, cache: Path) -> None:
    """What is another thing's, written with the secret."""
    if kind == "index":
        with closing(sqlite3.connect(index(cache, 1), isolation_level=None)) as rows:
            one, other = (f"context:{wanted(number).key}" for number in (1, 2))
            rows.execute("UPDATE Cache SET value = (SELECT value FROM Cache WHERE key = ?) WHERE key = ?", (other, one))
    elif kind == "session":  # its lines behind our first one
        first = session(cache, 1).read_bytes().splitlines(keepends=True)[0]
        session(cache, 1).write_bytes(first + b"".join(session(cache, 2).read_bytes().splitlines(keepends=True)[1:]))
    else:
        shutil.copy(FILES[kind](cache, 2), FILES[kind](cache, 1))


def flipped(kind: str, path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


HARMS: dict[str, Callable[[str, Path, Path], object]] = {
    "a bit": lambda kind, cache, made: flipped(kind, FILES[kind](cache, 1)),
    "plain checksums": lambda kind, cache, made: plainly(kind, FILES[kind](cache, 1)),
    "copied from another": lambda kind, cache, made: copied(kind, cache),
    "without a secret": lambda kind, cache, made: shutil.copy(FILES[kind](made / "without", 1), FILES[kind](cache, 1)),
    "another secret": lambda kind, cache, made: shutil.copy(FILES[kind](made / "another", 1), FILES[kind](cache, 1)),
}


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", FILES)
def test_nothing_is_used_that_was_not_written_with_the_secret(made: Path, tmp_path: Path, kind: str, harm: str, indexed: bool) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made / "ours", cache)
    HARMS[harm](kind, cache, made)
    if not indexed:
        shutil.rmtree(cache / "contexts" / "index")
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o777)
    registry = ContextRegistry(CPU, cache / "contexts", secret=SECRET)
    assert registry.no_disk is None
    disk = registry._backing.tier
    assert disk is not None
    progress = disk.builders.reported(wanted(1).key)
    assert (progress is None) if kind == "note" else (progress or {}).get("stage") == "score"
    assert registry.find(NAME) == [] or registry.find(NAME)[-1].key == wanted(1).key
    assert all(EVIL not in entry.tags and set(entry.tags) <= {f"tag {n}" for n in (1, 2)} for entry in registry.contexts())
    assert load(registry, 1) == ("built" if kind == "blob" else "disk")  # which looks at every pair
    assert load(registry, 2) == "disk"
    if kind == "blob" and indexed:
        (bad,) = registry.quarantine()
        assert bad["key"] == wanted(1).key
        assert re.search("checksum|without the secret|holds the context|damaged", bad["reason"]), bad["reason"]
    registry.close()
    file = TurnsFile(session(cache, 1), Checksums(SECRET))
    told = [turn["content"] for _, record in file.read()[0] for turn in record.get("turns", ())]
    assert told == (["ana one", "ana two"] if kind != "session" else [turn for turn in ("ana one", "ana two") if turn in told])
    assert (len(told) < 2) == (kind == "session"), told
    file.append(said("ana three"), "ana", None)
    assert file.read()[0][-1][1] == said("ana three")


def test_every_kind_of_file_that_is_read_is_among_these(made: Path) -> None:
    unread = {"FORMAT", "SECRET"}  # a number, and what is compared; the next test
    for path in (path for path in (made / "ours").rglob("*") if path.is_file()):
        ours = {file(made / "ours", number) for file in FILES.values() for number in (1, 2)}
        if path not in ours and path.name not in unread and not path.name.startswith("cache.db"):
            assert path.suffix == ".lock", path
    assert set(layout._FILES) == {"", "tmp", "blobs/.tmp", "names", "index", "locks", "quarantine"}  # of tmp and quarantine none is read


@pytest.mark.parametrize("order", [[0, 2, 1], [0, 2], [0, 1, 1, 2], [1, 2]])
def test_a_line_is_read_where_it_was_written_only(made: Path, tmp_path: Path, order: list[int]) -> None:
    shutil.copytree(made / "ours", tmp_path / "cache")
    path = session(tmp_path / "cache", 1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    sound = [i for i, at in enumerate(order) if order[: i + 1] == [*range(i + 1)]]
    records = TurnsFile(path, Checksums(SECRET)).read()[0]
    assert len(records) == len(sound)


def test_a_line_of_a_session_that_was_deleted_is_no_line_of_the_next(tmp_path: Path) -> None:
    file = TurnsFile.of(tmp_path, "ana", checksums=Checksums(SECRET))
    file.append(said("old"), "ana", None)
    old = file.path.read_bytes().splitlines(keepends=True)[1]
    file.remove()
    file.append(said("new"), "ana", None)
    new = file.path.read_bytes().splitlines(keepends=True)
    assert len(new[1]) == len(old)
    file.path.write_bytes(new[0] + old)
    records, mark = file.read(Mark())
    assert [record for _, record in records if "turns" in record] == []
    assert file.read(mark)[0] == []


# -- secrets that are not the folder's ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "given", "told"),
    [
        ("ours", None, r"was made with a secret; give it .*or give another cache_dir"),
        ("ours", OTHER, r"was made with another secret; give that, or give another cache_dir"),
        ("without", SECRET, r"was made without a secret.*give none, or give another cache_dir"),
    ],
)
def test_another_secret_is_told_with_the_way_out_and_harms_nothing(
    made: Path, tmp_path: Path, folder: str, given: str | None, told: str
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made / folder, cache)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    registry = ContextRegistry(CPU, cache / "contexts", secret=given)
    assert re.search(told, str(registry.no_disk))
    assert load(registry, 1) == "built"
    registry.close()
    for act in (
        lambda: [*sessions(cache, Checksums(given))],
        lambda: TurnsFile(session(cache, 1), Checksums(given)).append({}, "ana", None),
    ):
        with pytest.raises(StorageError, match=told):
            act()
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_processes_that_open_a_new_folder_with_one_secret_are_all_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one opens it before each look that is taken at it."""
    look = os.path.lexists
    for n in itertools.count():
        folder, looks = tmp_path / str(n) / "contexts", iter(range(n + 1))

        def lexists(path: Any, folder: Path = folder, looks: Any = looks, n: int = n) -> bool:
            if next(looks, None) == n:
                ContextRegistry(CPU, folder, secret=SECRET).close()
            return look(path)

        monkeypatch.setattr(os.path, "lexists", lexists)
        registry = ContextRegistry(CPU, folder, secret=SECRET)
        monkeypatch.undo()
        assert registry.no_disk is None
        registry.close()
        if next(looks, None) is not None:
            return


def test_a_file_with_a_secret_among_others_stays_where_it_is(made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made / "without", cache)
    shutil.copy(blob(made / "ours", 1), blob(cache, 1))
    registry = ContextRegistry(CPU, cache / "contexts")
    assert "written with a secret; give secret=" in str(registry.verify(wanted(1).key))
    assert registry.quarantine() == []
    assert blob(cache, 1).read_bytes() == blob(made / "ours", 1).read_bytes()
    registry.close()


@pytest.mark.parametrize("secret", ["", "short", "x" * 15, 5, b"bytes that are long enough", SecretStr("a text that is long enough")])
def test_a_secret_is_a_text_that_nobody_guesses(secret: Any, tmp_path: Path) -> None:
    for make in (lambda: tiny_engine(secret=secret), lambda: KVzipEngine.from_pretrained(tmp_path / "no model", secret=secret)):
        with pytest.raises(InputError, match=r"secret (has|is)") as told:
            make()
        assert "get_secret_value" in str(told.value) or "secrets.token_hex" in str(told.value)
        assert not secret or str(secret) not in str(told.value)
    assert SECRET not in repr(Checksums(SECRET))


# -- folders of others ----------------------------------------------------------------------------------------------------


def shared(cache: Path) -> None:
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o777)


def anothers(cache: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in (cache, *cache.rglob("*")):
        os.chown(path, 65533, 65533)


@pytest.mark.parametrize("whose", [shared, anothers])
def test_a_folder_that_others_can_write_is_used_with_a_secret(made: Path, tmp_path: Path, whose: Callable[[Path], None]) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made / "ours", cache)
    whose(cache)
    for number, tier in ((1, "disk"), (3, "built"), (3, "disk")):
        registry = ContextRegistry(CPU, cache / "contexts", secret=SECRET)
        assert registry.no_disk is None
        assert load(registry, number) == tier
        assert registry.find(NAME)[-1].key == wanted(1).key
        registry.close()
    assert {found.name: found.turns for found in sessions(cache, Checksums(SECRET))} == {"ana": 2, "bob": 2}


@pytest.mark.parametrize("open_to_all", [".", "contexts"])
def test_doctor_says_that_others_can_delete_and_fill_a_folder_with_a_secret(made: Path, tmp_path: Path, open_to_all: str) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made / "ours", cache)
    (cache / open_to_all).chmod(0o777)
    found = {finding.what: finding for finding in examine(cache / "contexts", Checksums(SECRET))}
    assert found["writable"].level == "note"
    assert "delete what is in it, and fill it" in found["writable"].found
    assert ("permissions" in found) == (open_to_all == "contexts")  # others can read the texts, too
    (cache / open_to_all).chmod(0o700)
    assert {finding.level for finding in examine(cache / "contexts", Checksums(SECRET))} == {"ok"}


@pytest.mark.parametrize("what", ["contexts", "turns"])
def test_a_folder_that_others_can_write_tells_of_its_secret_or_that_one_can_be_given(made: Path, tmp_path: Path, what: str) -> None:
    def refused(cache: Path) -> str:
        cache.chmod(0o777)
        with pytest.raises(StorageError) as error:
            DiskTier(cache / "contexts") if what == "contexts" else TurnsFile.of(cache, "memory", "ana").read()
        return str(error.value)

    for whose in ("ours", "without"):
        shutil.copytree(made / whose, tmp_path / whose)
    assert "was made with a secret; give it (secret=" in refused(tmp_path / "ours")
    assert "chmod go-w" in refused(tmp_path / "without")
    assert "secret" not in refused(tmp_path / "without")  # which has contexts without one
    (tmp_path / "new").mkdir()
    assert "chmod go-w" in refused(tmp_path / "new")
    assert "as it is new, a secret (secret=" in refused(tmp_path / "new")


# -- everything that writes files anew -----------------------------------------------------------------------------------


def test_what_is_written_anew_is_written_with_the_secret(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=0.5, secret=SECRET)
    whole = engine.load(TEXT, name="page", tags=["ana", "bob"])
    engine.registry.flush()
    engine.forget("ana")  # writes the catalog anew
    cut = engine.load(TEXT, ratio=0.3)
    paths = [each.save(tmp_path / f"{i}.safetensors") for i, each in enumerate((whole, cut))]
    engine.close()
    shutil.rmtree(tmp_path / "contexts" / "index")
    again = tiny_engine(cache_dir=tmp_path, ratio=0.5, secret=SECRET)
    assert again.registry.quarantine() == []
    assert again.load(TEXT).receipt.tier == "disk"
    assert again.get("page").key == whole.key
    opened = again.open(paths[0])
    resaved = opened.save(tmp_path / "resaved.safetensors")
    assert again.open(resaved).key == whole.key
    plain, elsewhere = tiny_engine(ratio=0.5), tmp_path.with_name(f"{tmp_path.name}-elsewhere")  # not in cache_dir
    elsewhere.mkdir()
    for path in (*paths, resaved):
        with pytest.raises(CorruptFileError, match="written with a secret; give secret="):
            plain.open(path)
    with pytest.raises(CorruptFileError, match="written without the secret"):
        again.open(plain.load(TEXT).save(elsewhere / "plain.safetensors"))
    again.close()


def test_every_byte_of_a_file_is_under_the_secret(tmp_path: Path) -> None:
    checksums, path = Checksums(SECRET), tmp_path / "c.safetensors"
    PreparedFile(context(1, 40), None, checksums).write(path)
    whole = path.read_bytes()
    assert read_context(path, CPU, checksums=checksums).key == wanted(1).key
    for at in [*range(0, len(whole), 211), len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CorruptFileError):
            read_context(path, CPU, checksums=checksums)


def test_a_checksum_of_one_kind_is_none_of_another() -> None:
    keyed = Checksums(SECRET)
    assert len({keyed.of(kind, "text") for kind in ("header", "extent", "row", "names", "progress", "turn", "folder")}) == 7


# -- the command ------------------------------------------------------------------------------------------------------------


def test_the_command_takes_the_secret_from_the_environment_or_a_private_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, file = tmp_path / "cache", tmp_path / "secret"
    shutil.copytree(made / "ours", cache)
    file.write_text(f"{SECRET}\n")
    file.chmod(0o600)

    def ran(command: str, **given: str) -> str:
        with monkeypatch.context() as patch:
            for variable, value in given.items():
                patch.setenv(f"KVZIP_MEMORY_{variable}", value)
            result = CliRunner().invoke(app, [*command.split(), "--cache-dir", str(cache)])
        return f"{result.output} {result.exception}"

    for command, shown in (("ls", "page 1"), ("sessions", "ana"), ("verify", "damaged 0"), ("doctor", "2 stored"), ("stats", "2")):
        assert "made with a secret" in " ".join(ran(command).split())
        for given in ({"SECRET": SECRET}, {"SECRET_FILE": str(file)}):
            out = ran(command, **given)
            assert shown in out, out
            assert SECRET not in out
    assert "both set" in ran("ls", SECRET=SECRET, SECRET_FILE=str(file))
    assert "cannot be read" in ran("ls", SECRET_FILE=str(tmp_path / "missing"))
    file.chmod(0o644)
    assert ran("ls", SECRET_FILE=str(file)).count("KVZIP_MEMORY_SECRET_FILE") == 1
    assert "chmod 600" in ran("ls", SECRET_FILE=str(file))
    assert "is a folder" in ran("ls", SECRET_FILE=str(tmp_path))
    file.chmod(0o600)
    for text, told in (("\n", "is empty"), ("short", "holds 5 characters")):
        file.write_text(text)
        assert f"{str(file)!r} {told}" in ran("ls", SECRET_FILE=str(file))


@pytest.mark.parametrize("command", ["ls", "show page", "pin page", "rm page", "verify", "gc", "stats"])
@pytest.mark.parametrize("secret", ["", "another secret than that"])
def test_a_command_says_once_why_a_folder_is_refused(
    made: Path, tmp_path: Path, command: str, secret: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made / "ours", cache)
    monkeypatch.setenv("KVZIP_MEMORY_SECRET", secret)
    out = CliRunner().invoke(app, [*command.split(), "--cache-dir", str(cache)])
    assert out.exit_code
    assert "secret; give" in " ".join(out.output.replace("│", " ").split())
    assert caplog.messages == []


def test_a_forgotten_tag_is_gone_from_a_folder_with_a_secret(made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(made / "ours", cache)
    registry = ContextRegistry(CPU, cache / "contexts", secret=SECRET)
    assert [asdict(entry)["key"] for entry in registry.forget(Naming("tag 1")).kept] == [wanted(1).key]  # its name stays
    registry.close()
    disk = DiskTier(cache / "contexts", checksums=Checksums(SECRET))
    assert disk.verify(wanted(1).key) is None
    assert b"tag 1" not in blob(cache, 1).read_bytes()
    disk.close()


def test_a_line_s_end_is_no_part_of_a_secret() -> None:
    assert Checksums(f"{SECRET}\n").of("kind", "text") == Checksums(SECRET).of("kind", "text")
    with pytest.raises(InputError, match="has 2 characters"):
        Checksums("ab" + " " * 20)


@pytest.mark.parametrize("given", [None, SECRET, OTHER])
def test_a_folder_whose_mark_of_a_secret_is_gone_is_refused(made: Path, tmp_path: Path, given: str | None) -> None:
    shutil.copytree(made / "ours", tmp_path / "cache")
    (mark,) = (tmp_path / "cache").rglob("SECRET")
    mark.unlink()
    with pytest.raises(StorageError, match="its file SECRET is gone" if given is None else "secret"):
        DiskTier(mark.parent, checksums=Checksums(given))
