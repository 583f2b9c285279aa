"""Conversions of ``.gguf`` files: whole or not there, listed, and freed when nobody uses them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from forking import forked, outcome
from kvzip_memory import StorageError
from kvzip_memory.cli import app
from kvzip_memory.inference import loading
from kvzip_memory.inference.conversions import UNUSED_DAYS, conversions
from kvzip_memory.inference.conversions import gc as freed
from kvzip_memory.registry import ContextRegistry

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 64}


def convert(source: Path, dtype: object, folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_convert", convert)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def run(cache: Path, *command: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*command, "--cache-dir", str(cache), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.output) if code == 0 else f"{result.output} {result.exception}"


def test_a_conversion_is_named_after_all_of_its_file(source: Path, tmp_path: Path) -> None:
    folder = loading._converted(source, "float32", tmp_path)
    assert hashlib.sha256(b"weights").hexdigest() in folder.name
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "CONVERSION"} == FILES
    source.write_bytes(b"other weights")
    assert loading._converted(source, "float32", tmp_path) != folder
    long = source.with_name(f"{'ü' * 120}.gguf")
    long.write_bytes(b"weights")
    assert loading._converted(long, "float32", tmp_path).is_dir()


def killed_within(source: Path, cache: Path) -> None:
    def half(source: Path, dtype: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    loading._convert = half
    try:
        loading._converted(source, "float32", cache)
    finally:
        os._exit(1)  # where it was not killed


def test_what_a_killed_process_has_left_is_never_read_and_is_freed(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        if (child := os.fork()) == 0:
            killed_within(source, cache)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert conversions(cache) == []
    (left,) = (path for path in (cache / "gguf").iterdir() if path.is_dir())
    assert run(cache, "gc")["conversions"] == 1
    assert not left.exists()
    assert (loading._converted(source, "float32", cache) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "CONVERSION"])
def test_one_that_is_damaged_is_made_anew(source: Path, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = loading._converted(source, "float32", tmp_path)
    DAMAGE[damage](folder / name)
    if (name, damage) == ("CONVERSION", "missing"):  # nobody knows whose the rest is
        with pytest.raises(StorageError, match="no conversion of ours"):
            loading._converted(source, "float32", tmp_path)
        return
    assert loading._converted(source, "float32", tmp_path) == folder
    assert "is damaged; it is made anew" in caplog.text
    assert all((folder / name).read_bytes() == content for name, content in FILES.items())


def test_what_is_none_of_its_files_is_told_and_left_alone(source: Path, tmp_path: Path) -> None:
    folder = loading._converted(source, "float32", tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"adapter_config\.json is no file of the conversion; move it away"):
        loading._converted(source, "float32", tmp_path)
    (folder / "adapter_config.json").rename(tmp_path / "mine")
    (folder / "sub").mkdir()
    (only,) = conversions(tmp_path)
    with pytest.raises(StorageError, match="sub is a folder"):
        only.remove()
    assert (folder / "config.json").exists()


def test_one_that_a_process_reads_is_not_deleted(source: Path, tmp_path: Path) -> None:
    with loading._conversion(source, "float32", tmp_path) as folder:
        with loading._conversion(source, "float32", tmp_path) as same:  # others read it meanwhile
            assert same == folder
        long_ago = time.time() - (UNUSED_DAYS + 1) * 86400
        os.utime(folder / "CONVERSION", (long_ago, long_ago))
        assert "made or read by a process" in run(tmp_path, "rm", "--conversion", "model", code=1)
        assert run(tmp_path, "gc")["conversions"] == 0
        assert folder.exists()
    assert run(tmp_path, "gc")["conversions"] == 1
    assert not folder.exists()


def test_one_that_is_being_made_is_waited_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), list[int]()

    def slowly(source: Path, dtype: object, folder: Path) -> None:
        made.append(1)
        begun.set()
        assert go_on.wait(20)
        convert(source, dtype, folder)

    monkeypatch.setattr(loading, "_convert", slowly)
    threads = [threading.Thread(target=loading._converted, args=(source, "float32", tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    assert conversions(tmp_path) == []
    assert run(tmp_path, "gc")["conversions"] == 0
    go_on.set()
    for thread in threads:
        thread.join()
    assert (len(made), len(conversions(tmp_path))) == (1, 1)


def test_conversions_are_listed_and_deleted_by_their_names(source: Path, tmp_path: Path) -> None:
    folders = [loading._converted(source, dtype, tmp_path) for dtype in ("float32", "bfloat16")]
    (tmp_path / "gguf" / "mine").mkdir()
    listed = run(tmp_path, "conversions")
    assert {each["conversion"] for each in listed} == {folder.name for folder in folders}
    assert all(each["nbytes"] > len(FILES["model.safetensors"]) and each["used"] for each in listed)
    assert "beginning of 2" in run(tmp_path, "rm", "--conversion", "model", code=1)
    assert "beginning of no" in run(tmp_path, "rm", "--conversion", "mine", code=1)
    assert run(tmp_path, "rm", "--conversion", folders[0].name)["conversion"] == folders[0].name
    assert [each.folder for each in conversions(tmp_path)] == folders[1:]
    assert (tmp_path / "gguf" / "mine").is_dir()
    os.makedirs(tmp_path / "contexts")
    out = CliRunner().invoke(app, ["ls", "--cache-dir", str(tmp_path)]).output
    assert "conversion" in out
    assert folders[1].name[:20] in out.replace("\n", "")


def test_one_of_an_earlier_version_is_freed_like_any_other(source: Path, tmp_path: Path) -> None:
    folder = loading._converted(source, "float32", tmp_path)
    earlier = folder.with_name(f"model-{'a' * 16}-float32-transformers-4.0.0")
    shutil.copytree(folder, earlier)
    (earlier / "CONVERSION").unlink()
    long_ago = time.time() - (UNUSED_DAYS + 1) * 86400
    os.utime(earlier, (long_ago, long_ago))
    assert run(tmp_path, "gc")["conversions"] == 1
    assert [each.folder for each in conversions(tmp_path)] == [folder]


def test_what_is_no_file_of_a_conversion_is_neither_deleted_nor_freed(source: Path, tmp_path: Path) -> None:
    folder = loading._converted(source, "float32", tmp_path)
    (folder / "extra.txt").write_text("mine")
    long_ago = time.time() - (UNUSED_DAYS + 1) * 86400
    os.utime(folder / "CONVERSION", (long_ago, long_ago))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    told = run(tmp_path, "rm", "--conversion", "model", code=1)
    assert "extra.txt is no file of the conversion; move it away" in told
    assert run(tmp_path, "gc")["conversions"] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "CONVERSION").rename(tmp_path / "list")
    assert "is no conversion of ours" in run(tmp_path, "rm", "--conversion", "model", code=1)
    os.utime(folder, (long_ago, long_ago))
    assert run(tmp_path, "gc")["conversions"] == 0
    (tmp_path / "list").rename(folder / "CONVERSION")
    (folder / "extra.txt").unlink()
    assert run(tmp_path, "gc")["conversions"] == 1


def test_doctor_and_statistics_tell_of_conversions_and_of_what_is_none(source: Path, tmp_path: Path) -> None:
    ContextRegistry(torch.device("cpu"), tmp_path / "contexts").close()
    folder = loading._converted(source, "float32", tmp_path)
    (only,) = conversions(tmp_path)
    stats = run(tmp_path, "stats")
    assert (stats["conversions"], stats["conversions_nbytes"]) == (1, only.nbytes)

    def told(what: str) -> list[dict[str, Any]]:
        return [finding for finding in run(tmp_path, "doctor") if finding["what"] == what]

    (found,) = told("conversions")
    assert f"{only.nbytes:,} bytes" in found["found"]
    assert told("not ours") == []
    strange = [tmp_path / "gguf" / "foo.txt", folder / "extra.txt", tmp_path / "gguf" / "mine"]
    for path in strange[:2]:
        path.write_text("mine")
    strange[2].mkdir()
    (unlisted := folder.with_name(folder.name + "-a")).mkdir()
    (found,) = told("not ours")
    assert found["level"] == "note"
    assert all(repr(str(path.relative_to(tmp_path))) in found["found"] for path in [*strange, unlisted])


def as_another_user(use: Callable[[], object]) -> str:
    """What a user says who can only read: in a process that is theirs."""

    def theirs() -> object:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        return use()

    return outcome(forked(theirs))


@pytest.fixture
def baked(source: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A ``.gguf`` file, a cache folder of another user's that can be read, and its one conversion."""
    top = Path(tempfile.mkdtemp())
    shutil.copy(source, file := top / source.name)
    folder = loading._converted(file, "float32", top / "cache")
    (folder.parent / f"{folder.name}.lock").unlink()
    for path in (top, *top.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield file, top / "cache", folder
    for path in (top, *top.rglob("*")):
        path.chmod(0o700)
    shutil.rmtree(top)


def test_one_that_can_only_be_read_is_read_as_it_is(baked: tuple[Path, Path, Path]) -> None:
    source, cache, folder = baked
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in cache.rglob("*"))
    assert as_another_user(lambda: loading._converted(source, "float32", cache)) == str(folder)
    for ask in (
        lambda: loading._converted(source, "bfloat16", cache),  # is not there
        lambda: loading._converted(source, "float32", source.parent / "elsewhere"),  # nor is its folder
    ):
        said = as_another_user(ask)
        assert said.startswith("StorageError")
        assert "cannot be written by user" in said
        assert "model=" in said
        assert "another cache_dir" in said
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in cache.rglob("*")) == before
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_bytes(b"[]")
    (folder / "config.json").chmod(0o444)
    assert "damaged" in as_another_user(lambda: loading._converted(source, "float32", cache))
    said = as_another_user(lambda: freed(cache))
    assert said.startswith("StorageError")
    assert "cannot be written by user" in said
    assert (folder / "config.json").exists()
