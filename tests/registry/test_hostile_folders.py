"""Folders in which somebody has put links, pipes, folders and files: nothing outside is touched, and every engine opens or says why."""

import os
import random
import re
import shutil
import signal
import socket
import stat
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import synthetic
from conftest import STRESS, say
from kvzip_memory import InputError, StorageError
from kvzip_memory.inference import loading
from kvzip_memory.registry import ContextRegistry
from kvzip_memory.registry.disk import layout as layout_of
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.disk.index import Index
from kvzip_memory.registry.disk.layout import strangers
from kvzip_memory.registry.disk.store import DiskTier
from kvzip_memory.turns import TurnsFile, erase, remove_expired, sessions
from synthetic import CPU, load, wanted

PRECIOUS = b"what somebody else has written"
BUDGET = 2_000_000


def model(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"weights")
    return folder / "model.gguf"


def convert(source: Path, dtype: object, folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def fill(cache: Path) -> None:
    """Every kind of file that a folder can hold."""
    root = cache / "contexts"
    registry = ContextRegistry(CPU, root, disk_bytes=BUDGET)
    for number in (1, 2):
        load(registry, number)
    registry.flush()
    disk = registry._backing.tier
    assert disk is not None
    disk.builders.report(wanted(1).key, {"stage": "score", "done": 1, "total": 2})
    load(registry, 3)
    registry.flush()
    disk._quarantine(wanted(3).key, "as damage does")
    registry.close()
    (root / "quarantine" / "index.1").mkdir()
    shutil.copy(root / "index" / "cache.db", root / "quarantine" / "index.1")
    (root / "tmp").mkdir()
    for folder in (root / "tmp", root / "blobs" / ".tmp"):
        (folder / f"{wanted(9).key}.tmp").write_bytes(b"half a context")
    (root / "names" / f".{next((root / 'names').iterdir()).stem}").write_bytes(b"half a name")
    for suffix in ("-wal", "-shm", "-journal"):
        (root / "index" / f"cache.db{suffix}").touch()
    TurnsFile.of(cache, "memory", "ana").append({"turns": []}, "ana", None)
    loading._converted(model(cache.parent), "float32", cache)


def kind_of(path: str) -> str:
    path = re.sub("model-.*transformers-[0-9.]*[0-9]", "MODEL", re.sub("[0-9a-f]{64}", "KEY", path))
    return re.sub(r"(?<=/)[0-9a-f]{2,3}(?=[./]|$)|(?<=-)[0-9a-f]{2}(?=[.])|[0-9]{9,}", "N", path)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, and beside it a file and a folder of somebody else."""
    top = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_convert", convert)
        fill(top / "cache")
    (top / "outside").mkdir()
    tempting = (f"{wanted(9).key}.tmp", "cache.db", "index.1", "a.progress")
    for name in ("file", "folder/file", *(f"folder/{name}" for name in tempting), "mine/page", "mine/sub/page"):
        (top / "outside" / name).parent.mkdir(exist_ok=True, parents=True)
        (top / "outside" / name).write_bytes(PRECIOUS)
    return top


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_convert", convert)


def kinds() -> list[str]:
    """What :func:`fill` makes, a path of each kind. Named by the layout, so that a new file is not forgotten."""
    return [
        "contexts",
        *(f"contexts/{folder}" for folder in ("tmp", *layout_of.FOLDERS)),
        "contexts/FORMAT",
        "contexts/tmp/KEY.tmp",
        "contexts/blobs/.tmp/KEY.tmp",
        "contexts/blobs/N",
        "contexts/blobs/N/KEY.safetensors",
        "contexts/names/KEY.json",
        "contexts/names/.KEY",
        *(f"contexts/index/cache.db{suffix}" for suffix in ("", "-wal", "-shm", "-journal")),
        "contexts/locks/N.lock",
        "contexts/locks/N.progress",
        "contexts/locks/names.lock",
        "contexts/locks/index.lock",
        "contexts/quarantine/KEY.N.safetensors",
        "contexts/quarantine/index.1",
        "contexts/quarantine/index.1/cache.db",
        "locks",
        "locks/memory-N.lock",
        "memory",
        "memory/KEY.jsonl",
        "gguf",
        "gguf/MODEL",
        "gguf/MODEL.lock",
        "gguf/MODEL/config.json",
        "gguf/MODEL/CONVERSION",
    ]


def paths(cache: Path, kind: str) -> list[Path]:
    found = [path for path in cache.rglob("*") if kind_of(str(path.relative_to(cache))) == kind]
    return found or [cache / kind]  # made when it is needed


def test_all_kinds_of_files_are_known(filled: Path) -> None:
    made = {str(path.relative_to(filled / "cache")) for path in (filled / "cache").rglob("*")}
    named = {kind_of(path) for path in made}
    assert named <= set(kinds())
    assert strangers(filled / "cache" / "contexts") == []


HARMS: dict[str, Callable[[Path, Path], object]] = {
    "link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "link to a folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "dangling link": lambda path, outside: path.symlink_to(outside / "missing"),
    "second name": lambda path, outside: os.link(outside / "file", path),
    "pipe": lambda path, outside: os.mkfifo(path),
    "folder": lambda path, outside: shutil.copytree(outside / "mine", path),
    "foreign file": lambda path, outside: path.write_bytes(os.urandom(3000)),
    "empty file": lambda path, outside: path.touch(),
    "nested JSON": lambda path, outside: path.write_text("[" * 100_000),
}


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def a_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 7))  # what is written to it does not fit, and it is read for ever
    except OSError:
        os.mkfifo(path)


def copied(source: str | Path, target: str | Path) -> None:
    """A sparse file stays one. What is no file is not copied: a device would be read until the disk is full."""
    if not stat.S_ISREG((status := os.stat(source)).st_mode):
        raise shutil.SpecialFileError(f"{source} is no file")
    if (size := status.st_size) > 1 << 30:
        Path(target).touch()
        os.truncate(target, size)
    else:
        shutil.copy2(source, target)


def a_copy(path: Path) -> None:
    other = path.with_name(f"{path.stem} (copy){path.suffix}")
    shutil.copytree(path, other, copy_function=copied) if path.is_dir() else copied(path, other)


def sparse(path: Path) -> None:
    """As it is, and zeros behind that of which the disk knows only the number."""
    path.touch() if not path.is_dir() else None
    os.truncate(path, 9 << 30)


#: What takes the place of a file or folder.
REPLACED: dict[str, Callable[[Path, Path], object]] = {
    **HARMS,
    "loop": lambda path, outside: path.symlink_to(path.name),
    "link to the folder above": lambda path, outside: path.symlink_to(".."),
    "socket": lambda path, outside: a_socket(path),
    "device": lambda path, outside: a_device(path),
}
#: What is done to one that stays.
CHANGED: dict[str, Callable[[Path], object]] = {
    "of another user": lambda path: os.chown(path, 65533, 65533) if os.geteuid() == 0 else None,
    "mode 0666": lambda path: path.chmod(0o666),
    "mode 0777": lambda path: path.chmod(0o777),
    "mode 0000": lambda path: path.chmod(0),
    "sparse": lambda path: sparse(path) if path.is_file() else None,
    "copy": a_copy,
    "of long ago": lambda path: os.utime(path, (-1e9, -1e9)),
    "of a time to come": lambda path: os.utime(path, (1e10, 1e10)),
}


def snapshot(folder: Path) -> list[tuple[Any, ...]]:
    found = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        facts = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_uid, status.st_ino)
        small = path.is_file() and status.st_size < 1 << 20  # another may have been made sparse under its second name
        found.append((str(path), *facts, path.read_bytes() if small else b""))
    return found


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """What hangs is interrupted."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"hangs for {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def use(cache: Path) -> list[str]:
    """All that touches a folder; what is refused, and why."""
    refused: list[str] = []
    registry = ContextRegistry(CPU, cache / "contexts", disk_bytes=BUDGET)
    refused += [registry.no_disk] if registry.no_disk else []
    for number in (1, 2, 4):
        load(registry, number)
    registry.flush()
    registry.contexts()
    registry.find("page 1")
    registry.quarantine()
    registry.stats()
    for change in (
        lambda: registry.pin("page 1"),
        lambda: registry.untag(wanted(1).key, "red"),
        lambda: registry.verify("page 2"),
        lambda: registry.remove("page 2"),
        lambda: registry.forget(lambda key, tag: False),
        registry.gc,
    ):
        with suppress(StorageError):
            change()
    if registry._backing.tier is not None and registry._backing.tier.read_only is None:
        registry._backing.tier.builders.report(wanted(1).key, {"stage": "score", "done": 1, "total": 2})
        registry._backing.tier.builders.reported(wanted(1).key)
        with suppress(OSError):
            assert registry._backing.tier.usage() == registry._backing.tier.measured() <= BUDGET
    registry.close()
    examine(cache / "contexts")
    turns = TurnsFile.of(cache, "memory", "ana")
    for act in (
        turns.read,
        lambda: turns.append({"turns": []}, "ana", None),
        lambda: list(sessions(cache)),
        lambda: remove_expired(cache),
        lambda: erase(cache, None, "memory: ana"),
        turns.remove,
        lambda: loading._converted(cache.parent / "model.gguf", "float32", cache),
    ):
        try:
            act()
        except InputError as error:  # of a session, which has more turns than it may
            assert "delete its turns" in str(error)  # noqa: PT017
        except OSError as error:
            refused.append(str(error))
    return refused


# -- many of them, each in a process of its own -----------------------------------------------------------------------------

USER = 65534
DEADLINE_S = 60


def hostile(cache: Path, outside: Path, harms: list[tuple[str, str]]) -> None:
    for kind, harm in harms:
        for path in paths(cache, kind):
            with suppress(FileNotFoundError, NotADirectoryError, OSError):  # another harm was there
                if harm in REPLACED:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
                    REPLACED[harm](path, outside)
                elif os.path.lexists(path) and not path.is_symlink():
                    CHANGED[harm](path)


# By which something was raised that did not say what to do. All but the last as a user who is not root.
PROVEN = [
    [("contexts/quarantine", "mode 0666")],
    [("contexts/quarantine/index.1", "of another user")],
    [("memory", "of another user")],
    [("gguf/MODEL", "of another user")],
    [("memory/KEY.jsonl", "sparse")],
]


def chosen(count: int) -> list[list[tuple[str, str]]]:
    """What was proven once, each harm to each kind of file, then two or three of them at once."""
    count -= len(PROVEN)
    rng, every = random.Random(17), [[(kind, harm)] for kind in kinds() for harm in (*REPLACED, *CHANGED)]
    if count < len(every):
        every = rng.sample(every, count // 2)
    return PROVEN + every + [[each for one in rng.sample(every, rng.choice((2, 3))) for each in one] for _ in range(count - len(every))]


def in_a_child(user: int, act: Callable[[], list[str]]) -> str:
    """What went wrong, empty for nothing. The child has until the deadline."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            if user:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(DEADLINE_S)
            wrong = "\n".join(act())
        except BaseException:
            wrong = traceback.format_exc()
        os.write(write, wrong.encode(errors="replace")[-60_000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        wrong = answer.read().decode()
    status = os.waitpid(pid, 0)[1]
    return wrong if status == 0 else f"{wrong} ended by signal {status}: hangs, or was killed"


def raw(cache: Path) -> list[str]:
    """Use a folder twice; what was raised that says neither where nor what to do."""
    torch.set_num_threads(1)
    told = [*use(cache), *use(cache)]
    ways_out = re.compile(r"remove|delete|give |chmod|chown|move it|make .* (readable|writable)")
    return [text for text in told if str(cache) not in text or not ways_out.search(text)]


def test_hostile_folders_in_any_combination(filled: Path) -> None:
    top = Path(tempfile.mkdtemp(prefix="hostile"))
    top.chmod(0o755)
    wrong: dict[str, str] = {}
    counts = Counter[str]()
    try:
        for number, harms in enumerate(chosen(2000 if STRESS else 12 + len(PROVEN))):
            user = USER if os.geteuid() == 0 and (number % 2 or harms in PROVEN[:-1]) else 0
            folder = top / str(number)
            shutil.copytree(filled, folder)
            for path in (folder, *folder.rglob("*")) if user else ():
                os.chown(path, user, user)
            hostile(folder / "cache", folder / "outside", harms)
            before = snapshot(folder / "outside"), sum(map(is_precious, (folder / "cache").rglob("*")))
            told = in_a_child(user, lambda folder=folder: raw(folder / "cache"))  # type: ignore[misc]
            if snapshot(folder / "outside") != before[0]:
                told += "; what is outside was changed"
            if sum(map(is_precious, (folder / "cache").rglob("*"))) < before[1]:
                told += "; what is another's was deleted"
            if told:
                wrong[f"{harms} as user {user}"] = told
            counts["folders"] += 1
            counts["as_another_user"] += bool(user)
            counts["harms"] += len(harms)
            shutil.rmtree(folder)
        say(**counts, wrong=len(wrong))
        assert not wrong, f"{len(wrong)} of {counts['folders']}:\n" + "\n".join(f"{k}: {v}" for k, v in [*wrong.items()][:40])
    finally:
        shutil.rmtree(top, ignore_errors=True)


@pytest.mark.parametrize("harm", HARMS if STRESS else [*HARMS][:6])
@pytest.mark.parametrize("kind", kinds())
def test_nothing_outside_is_touched_and_every_engine_opens_or_says_why(filled: Path, tmp_path: Path, kind: str, harm: str) -> None:
    for name in ("cache", "outside", "model.gguf"):
        source = filled / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    for path in paths(cache, kind):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        HARMS[harm](path, outside)
    before, precious = snapshot(outside), sum(is_precious(path) for path in cache.rglob("*"))
    with within(20):
        refused = use(cache)
        refused += use(cache)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "access", lambda path, mode: False)
            refused += use(cache)
    assert snapshot(outside) == before
    assert sum(is_precious(path) for path in cache.rglob("*")) >= precious
    assert all(str(cache) in text for text in refused), refused


def is_precious(path: Path) -> bool:
    """Whether it is a file of somebody else, and that its only name."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size < 10_000 and path.read_bytes() == PRECIOUS


def test_what_does_not_look_like_ours_is_left_alone_counted_nowhere_and_named(filled: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled / "cache", cache)
    root, strange = cache / "contexts", []
    for path in [path for path in root.rglob("*") if path.is_file()]:
        for name in (f"{path.stem} (copy){path.suffix}", f"{path.name}.sync-conflict-1", f"._{path.name}"):
            shutil.copy(path, path.with_name(name))
            strange.append(path.with_name(name))
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        (folder / "notes").mkdir()
        (folder / "notes" / "mine.txt").write_bytes(PRECIOUS)
        strange.append(folder / "notes")
    (root / "blobs" / wanted(7).key[:2]).mkdir(exist_ok=True)
    taken = root / "blobs" / wanted(7).key[:2] / f"{wanted(7).key}.safetensors"
    taken.mkdir()
    (root / "blobs" / "not-ours").write_bytes(PRECIOUS)
    misplaced = root / "blobs" / wanted(7).key[:2] / f"{wanted(1).key}.safetensors"
    shutil.copy(root / "blobs" / wanted(1).key[:2] / misplaced.name, misplaced)
    strange += [taken, root / "blobs" / "not-ours", misplaced]
    assert sorted(strange) == strangers(root)
    before = [snapshot(path) for path in sorted(strange)]
    (finding,) = [finding for finding in examine(root) if finding.what == "not ours"]
    assert "(copy)" in finding.found
    size = (root / "blobs" / wanted(1).key[:2] / misplaced.name).stat().st_size
    for _ in range(2):
        registry = ContextRegistry(CPU, root, disk_bytes=3 * size)
        assert [load(registry, number) for number in (1, 2)] == ["disk", "disk"]
        load(registry, 5)
        load(registry, 7)
        registry.flush()
        registry.gc()
        assert registry._backing.tier is not None
        assert registry._backing.tier.usage() == registry._backing.tier.measured() == 3 * size
        assert {entry.key for entry in registry.contexts()} >= {wanted(number).key for number in (1, 2, 5)}
        registry.forget(lambda key, tag: False)
        registry.close()
        shutil.rmtree(root / "index")
    assert [snapshot(path) for path in sorted(strange) if path.exists()] == [each for each in before if "/index/" not in each[0][0]]


# -- who else can write ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0o775, 0o757, 0o777])
@pytest.mark.parametrize("kind", [".", *kinds()])
def test_what_others_can_write_is_refused_with_the_way_out(filled: Path, tmp_path: Path, kind: str, bits: int) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled / "cache", cache)
    for path in (cache, *(path for path in cache.rglob("*") if path.is_dir())):
        path.chmod(0o755)
    path = paths(cache, kind)[0]
    path.touch()
    path.chmod(bits)
    before = snapshot(cache)
    top = kind.split("/")[0]
    if top in (".", "contexts"):
        registry = ContextRegistry(CPU, cache / "contexts")
        assert layout_of.without_keys(str(path)) in str(registry.no_disk)
        assert "chmod go-w" in str(registry.no_disk)
        assert load(registry, 1) == "built"
        registry.close()
        assert any(finding.level == "problem" and "chmod go-w" in finding.found for finding in examine(cache / "contexts"))
    if top in (".", "memory"):
        for act in (TurnsFile.of(cache, "memory", "ana").read, lambda: TurnsFile.of(cache, "memory", "ana").append({}, "ana", None)):
            with pytest.raises(StorageError, match="chmod go-w"):
                act()
    if top in (".", "gguf") and not kind.endswith(".lock"):
        with pytest.raises(StorageError, match="chmod go-w"):
            loading._converted(filled / "model.gguf", "float32", cache)
    assert snapshot(cache) == before


def test_a_folder_of_our_own_that_only_we_can_enter_is_ours_in_a_place_for_all(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    for _ in range(2):
        registry = ContextRegistry(CPU, tmp_path / "contexts")
        assert registry.no_disk is None
        registry.close()
    tmp_path.chmod(0o777)
    assert "chmod go-w" in str(ContextRegistry(CPU, tmp_path / "contexts").no_disk)


@pytest.fixture
def anothers(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of another user that we can write."""
    cache = tmp_path / "cache"
    shutil.copytree(filled / "cache", cache)
    if os.geteuid() == 0:
        for path in (cache, *cache.rglob("*")):
            os.chown(path, 65533, 65533)
    else:
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    return cache


def test_a_folder_of_another_owner_that_we_can_write_is_refused(anothers: Path) -> None:
    before = snapshot(anothers)
    registry = ContextRegistry(CPU, anothers / "contexts")
    assert "belongs to user" in str(registry.no_disk)
    assert "chown" in str(registry.no_disk)
    assert load(registry, 1) == "built"
    registry.close()
    with pytest.raises(StorageError, match="belongs to user"):
        TurnsFile.of(anothers, "memory", "ana").read()
    with pytest.raises(StorageError, match="belongs to user"):
        loading._converted(model(anothers.parent), "float32", anothers)
    assert snapshot(anothers) == before


def test_a_folder_of_another_owner_that_we_can_only_read_is_used_and_every_file_verified(
    anothers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    disk = DiskTier(anothers / "contexts")
    path = disk.folder.path(wanted(2).key)
    whole = bytearray(path.read_bytes())
    whole[-5000] ^= 1
    path.write_bytes(whole)
    shutil.rmtree(anothers / "contexts" / "index")  # root would write to it all the same, by SQLite
    before = snapshot(anothers)
    registry = ContextRegistry(CPU, anothers / "contexts")
    assert [load(registry, number) for number in (1, 2, 3)] == ["disk", "built", "built"]
    registry.flush()
    registry.close()
    assert snapshot(anothers) == before


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_all_that_is_made_is_private_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        cache = tmp_path / "made" / "cache"
        registry = ContextRegistry(CPU, cache / "contexts")
        load(registry, 1)
        registry.flush()
        assert registry._backing.tier is not None
        registry._backing.tier.builders.report(wanted(1).key, {"stage": "score", "done": 1, "total": 2})
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in cache.rglob("*")}  # SQLite's are there, too
        registry.close()
        TurnsFile.of(cache, "memory", "ana").append({"turns": []}, "ana", None)
        (tmp_path / "model.gguf").write_bytes(b"weights")
        loading._converted(tmp_path / "model.gguf", "float32", cache)
    finally:
        os.umask(before)
    modes |= {path: stat.S_IMODE(path.stat().st_mode) for path in (cache.parent, cache, *cache.rglob("*"))}
    assert {path.name: oct(mode) for path, mode in modes.items() if path.exists() and mode != (0o700 if path.is_dir() else 0o600)} == {}


# -- rows -----------------------------------------------------------------------------------------------------------------

PATHS = ["../../outside/file", "..", "", "/etc/passwd", "../../../x", wanted(1).key + "/../../../outside/file", "\0", "[" * 70]
ROWS: dict[str, Callable[[str], tuple[str, Any]]] = {
    "being written": lambda path: ("totals", {"usage": 5, "writing": {path: 5}}),
    "being written, negative": lambda path: ("totals", {"usage": -(10**15), "writing": {}}),
    "totals of another kind": lambda path: ("totals", [path]),
    "quarantined": lambda path: ("bad:" + path, {"key": path, "file": path, "nbytes": 5, "reason": "x", "time": 0.0}),
    "quarantined under another name": lambda path: (
        f"bad:{wanted(1).key}.1.safetensors",
        {"key": path, "file": path, "nbytes": 5, "reason": "x", "time": 0.0},
    ),
    "context": lambda path: ("context:" + path, {**row(), "key": path}),
    "context under another key": lambda path: (f"context:{wanted(1).key}", {**row(), "key": path}),
    "lost": lambda path: ("lost:" + path, {**row(), "key": path}),
    "catalog": lambda path: ("catalog:" + path, {}),
    "group": lambda path: ("group:" + wanted(1).group, {"keys": [path, 5, None]}),
    "negative size": lambda path: (f"context:{wanted(1).key}", {**row(), "file_nbytes": -(10**15)}),
    "negative memory": lambda path: (f"context:{wanted(1).key}", {**row(), "nbytes": -(10**15)}),
    "forgotten": lambda path: ("forgotten", {"before": path, "notes": [path]}),
}


def row() -> dict[str, Any]:
    identity = dict(wanted(1).identity)
    sizes = {"file_nbytes": 5, "nbytes": 5, "n_tokens": 5, "ratio": 0.5}
    return {"key": wanted(1).key, "identity": identity, "group": wanted(1).group, **sizes, "names": {}, "tags": [], "used": 1.0}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_never_paths_and_never_switch_a_budget_off(filled: Path, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(filled / "outside", outside)
    shutil.copy(filled / "model.gguf", tmp_path)
    before = snapshot(outside)
    for path in PATHS:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        shutil.copytree(filled / "cache", tmp_path / "cache")
        root = tmp_path / "cache" / "contexts"
        index = Index(root / "index")
        index.set(*ROWS[kind](path))
        index.close()
        inside = {path.name for path in root.iterdir()}
        with within(20):
            registry = ContextRegistry(CPU, root, disk_bytes=BUDGET)
            load(registry, 4)
            registry.flush()
            assert registry._backing.tier is not None
            assert registry._backing.tier.usage() == registry._backing.tier.measured() <= BUDGET
            assert wanted(4).key in {entry.key for entry in registry.contexts()}
            registry.close()
            assert use(tmp_path / "cache") == []
        assert {path.name for path in root.iterdir()} <= inside | {"tmp"}
        assert snapshot(outside) == before


def test_a_path_is_no_key(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "contexts")
    for key in PATHS:
        with pytest.raises(ValueError, match="no key"):
            disk.folder.path(key)
    disk.close()
    assert torch.device("cpu") == synthetic.CPU
