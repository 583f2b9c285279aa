"""What is fuzzed: each kind of file of a cache folder, read by all that reads it, and what must hold then. See :mod:`fuzz`."""

from __future__ import annotations

import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from conftest import tiny_engine
from fuzz import Target
from kvzip_memory import CompressedContext, CorruptFileError, IdentityMismatchError, KVzipEngine, KVzipError, StorageError
from kvzip_memory.cli.contexts import facts_of
from kvzip_memory.cli.sessions import session_facts
from kvzip_memory.cli.terminal import ago
from kvzip_memory.context import Resident
from kvzip_memory.errors import BudgetError, InputError
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.disk.facts import ALIGNMENT
from kvzip_memory.registry.disk.files import PreparedFile
from kvzip_memory.registry.disk.frozen import FrozenIndex, _Rows
from kvzip_memory.registry.disk.index import Index
from kvzip_memory.registry.disk.keeper import Keeper
from kvzip_memory.registry.disk.names import Label, Names
from kvzip_memory.registry.disk.rows import Rows
from kvzip_memory.registry.disk.store import DiskTier, NotStoredError
from kvzip_memory.registry.disk.version import LAYOUT
from kvzip_memory.system.checksums import PLAIN
from kvzip_memory.turns import TurnsFile, find, remove_expired, sessions
from llama_index_kvzip import KVzipLLM, KVzipMemoryBlock
from synthetic import context, wanted

BUDGET = 400_000
TENANT = "tenant"


def of_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- a context's file --------------------------------------------------------------------------------------------------


@cache
def engine() -> KVzipEngine:
    return tiny_engine("gemma3")


@cache
def genuine() -> CompressedContext:
    return engine().load("The lamp is wound at dusk. " * 3, ratio=0.4, name="lamp", system="Be brief.")


@cache
def genuine_join() -> CompressedContext:
    """With parts, of which one has moved and one is read again in part; they share positions. Grown, so that some pairs are its own."""
    texts = [engine().load("The fog horn sounds. " * 3, ratio=0.4, joinable=how, system="Be brief.") for how in (True, False)]
    inner = engine().join([genuine(), texts[0]], repair=6)
    join = engine().join([inner, texts[1]], positions=inner.n_tokens + 5)
    return engine().extend(join, [{"role": "user", "content": "Who?"}], name="lamp", share=True)


@cache
def genuine_codes() -> CompressedContext:
    """Pairs in codes of several kinds, some of them those of a part, and numbers beside them."""
    few, mixed = (KVzipEngine(engine().model, engine().tokenizer, 0.4, codec=codec) for codec in ("int4", "k8v4"))
    fog = "The fog horn sounds. " * 3
    join = engine().join([few.load(fog, system="Be brief."), mixed.load(fog, joinable=True, system="Be brief."), genuine()])
    return few.extend(join, [{"role": "user", "content": "Who?"}], name="lamp", share=True)


@cache
def genuine_file(folder: Path, genuine: CompressedContext) -> tuple[dict[str, Any], bytes]:
    """The table of a header and the data behind it."""
    catalog = {"group": wanted(1).group, "names": {"lamp": 1.0}, "tags": ["thread: ana"]}
    with genuine.lease() as lease:
        whole = CompressedContext.__new__(CompressedContext)
        storage = Resident(lease.layers, before=lease.before, shifts=lease.shifts, nearer=lease.nearer)
        whole.__dict__.update({**genuine.__dict__, "storage": storage})
        PreparedFile(whole, catalog).write(folder / "genuine")
    data = (folder / "genuine").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length : -8]


def a_context_file(folder: Path) -> Target:
    """A header with any facts over the genuine pairs. What is served under the key that was asked for answers as the genuine one."""
    return _a_file(folder, genuine(), "context file")


def a_joins_file(folder: Path) -> Target:
    """The same of a join, whose file has its parts, too."""
    return _a_file(folder, genuine_join(), "file of a join")


def a_file_of_codes(folder: Path) -> Target:
    """The same of pairs in codes."""
    return _a_file(folder, genuine_codes(), "file of codes")


def _a_file(folder: Path, genuine: CompressedContext, name: str) -> Target:
    folder.mkdir()
    table, body = genuine_file(folder, genuine)
    path, looked_at, again = folder / f"{genuine.key}.safetensors", set[bytes](), DiskTier(folder / "contexts")
    ids = engine().prompt_ids(genuine, "Who?")
    logits = engine().logits(genuine, ids)

    def signed(text: bytes) -> bytes:
        whole = {**table, "__metadata__": {"kvzip_memory": text.decode("latin-1")}}
        header = json.dumps(whole).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        header = struct.pack("<Q", len(header)) + header
        return header + body + struct.pack("<Q", xxhash.xxh3_64_intdigest(header))

    def read(data: bytes) -> str:
        path.write_bytes(data)
        try:
            found = engine().open(path)
        except (CorruptFileError, IdentityMismatchError) as error:
            _look_as_an_index(again, path)
            return "newer" if "newer than" in str(error) else f"refused: {type(error).__name__}"
        if found.key == genuine.key:
            assert torch.equal(found.token_ids, genuine.token_ids)
        header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
        if header in looked_at:
            return "served"
        looked_at.add(header)
        repr(found)
        _look_as_an_index(again, path)
        if found.key == genuine.key:
            assert torch.equal(engine().logits(found, engine().prompt_ids(found, "Who?")), logits), "another answer under the same key"
        else:
            with suppress(KVzipError):
                engine().generate(found, "Who?", max_new_tokens=1)
        with suppress(KVzipError):
            engine().extend(found, [{"role": "assistant", "content": "I."}])
        return "served"

    return Target(name, [of_json(json.loads(table["__metadata__"]["kvzip_memory"]))], signed, read)


def _look_as_an_index(disk: DiskTier, path: Path) -> None:
    """Make a row of a file, which must be one that is read again."""
    entry = disk.folder.entry_of_file(path)
    if entry is None:
        path_in = disk.folder.path(path.stem)
        path_in.parent.mkdir(exist_ok=True)
        return
    index = Rows(rows_in_memory({}))
    index.set_totals(0, {})
    index.add(entry)
    again = index.entry(entry.key)
    assert again is not None
    json.dumps(facts_of(again))


# -- rows --------------------------------------------------------------------------------------------------------------


class RowsInMemory(FrozenIndex):
    """An index without SQLite."""

    def rewrite(self) -> None: ...


def rows_in_memory(rows: dict[str, str]) -> RowsInMemory:
    import threading

    index = RowsInMemory.__new__(RowsInMemory)
    index._lock, index._open, index._rows = threading.RLock(), None, _Rows(rows)
    index._checksums = PLAIN
    return index


class KeeperInMemory(Keeper):
    """Of an index whose rows are given; where they are damaged it has none."""

    rows: dict[str, str]

    def _open(self) -> None:
        self._rows = Rows(rows_in_memory(self.rows))

    def _replace(self, reason: str) -> None:
        self._rows, self.made_anew = Rows(rows_in_memory({})), True
        self._fill({}, {})


def small(number: int) -> CompressedContext:
    return context(number, 8)


def filled(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of every kind; their contexts are in the folder."""
    disk = DiskTier(folder, BUDGET)
    for number in (1, 2, 3, 4):
        disk.put(small(number), wanted(number).group, names={f"page {number}": 1.0}, tags=["thread: ana", f"red {number}"])
    disk._quarantine(wanted(3).key, "as damage does")
    disk.untag(wanted(4).key, "thread: ana")
    disk.remove(wanted(4).key, for_good=time.time())
    index = disk._keeper.opened().index
    index.set("catalog:" + wanted(2).key, {})
    rows = {key: index.get(key) for key in index.keys("")}
    disk.close()
    return {key: row for key, row in rows.items() if row is not None}


def rows(folder: Path) -> Target:
    """Rows of an index, all of them in one text; used in every way a tier uses them."""
    seed = [[key, row] for key, row in filled(folder / "pristine").items()]
    shutil.copytree(folder / "pristine", folder / "contexts")
    disk = DiskTier(folder / "contexts", BUDGET)
    disk.close()
    keeper = disk._keeper
    keeper.__class__ = KeeperInMemory
    assert isinstance(keeper, KeeperInMemory)

    def restore() -> None:
        for name in ("blobs", "quarantine"):
            for path in (path for path in (folder / "pristine" / name).rglob("*") if path.is_file()):
                target = folder / "contexts" / path.relative_to(folder / "pristine")
                if not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    shutil.copy(path, target)

    def read(data: bytes) -> str:
        restore()
        packed: dict[str, str] = {}
        with suppress(ValueError, RecursionError, TypeError):
            for key, row in json.loads(data):
                with suppress(UnicodeEncodeError):
                    if type(key) is str:
                        key.encode()
                        packed[key] = Index.packed(key, row)
        keeper.rows, keeper._rows, keeper.made_anew, disk._tidying.doubtful, keeper.owed = packed, None, False, False, set()
        with suppress(StorageError):
            use_rows(disk)
            assert disk.usage() == disk.measured() <= BUDGET, (disk.usage(), disk.measured())
        for number in (1, 2):
            with suppress(NotStoredError):
                assert disk.get(wanted(number).key, torch.device("cpu")).key == wanted(number).key
        return "damaged" if disk.made_anew else "served"

    return Target("rows", [of_json(seed)], lambda text: text, read)


def use_rows(disk: DiskTier) -> None:
    from kvzip_memory.registry.disk.doctor import _contents
    from kvzip_memory.registry.identity import family_of

    for entry in disk.entries():
        json.dumps(facts_of(entry))
        assert entry.fineness >= 0
        assert entry.expired in (True, False)
        disk.lengths(family_of(entry.identity), [entry.beginning])
        disk.with_tokens(family_of(entry.identity), entry.identity.get("tokens", ""))
    for number in (1, 2, 3, 4):
        disk.group(wanted(number).group)
        disk.starting_with(wanted(number).key[:8])
        disk.notes().taken(wanted(number).key, "thread: ana")
        disk.notes().deleted(wanted(number).key)
    disk.quarantine()
    _contents(disk)
    disk.touch(wanted(1).key, names={"page": 2.0}, tags=["blue"])
    disk.pin(wanted(2).key, True)
    disk.untag(wanted(1).key, "red 1")
    disk.unname(wanted(1).key, "page")
    disk._leaving._write_catalogs()
    with suppress(BudgetError):
        disk.put(small(6), wanted(6).group)
    disk.forget(lambda key, tag: tag == "thread: ana", lambda entry: True)
    disk.gc()


# -- smaller files -----------------------------------------------------------------------------------------------------


def names(folder: Path) -> Target:
    for name in ("names", "locks"):
        (folder / name).mkdir(parents=True)
    known = Names(folder)
    family, other = "f" * 64, "e" * 64
    for of, number in ((family, 1), (other, 2)):
        known.write(known.give(Label("page", TENANT, of, wanted(number).key, sources=(("a.md", {"page": 1}), ("b.md", {})))))
    [path] = (folder / "names").iterdir()
    seed = path.read_text().partition("\n")[2].encode()

    def read(data: bytes) -> str:
        path.write_bytes(data)
        found = known.of(TENANT, "page")
        labels = [*known.all(), *known.everyones("page")]
        for label in labels:
            json.dumps(label.loaded)
        known.still(TENANT, ["page"], family, wanted(1).key)
        known.gc(lambda key: True)
        given = Label("page", TENANT, family, wanted(5).key)
        known.write(known.give(given))
        assert wanted(5).key in {label.key for label in Names(folder).of(TENANT, "page")}, "a name that cannot be given"
        known.take(next(label for label in known.of(TENANT, "page") if label.key == wanted(5).key))
        assert wanted(5).key not in {label.key for label in Names(folder).of(TENANT, "page")}, "a name that cannot be taken"
        return "served" if found else "nothing"

    return Target("names", [seed], lambda text: PLAIN.of("names", path.stem, "\n", text).encode() + b"\n" + text, read)


def progress(folder: Path) -> Target:
    disk = DiskTier(folder)
    key = wanted(1).key
    disk.builders.report(key, {"stage": "score", "done": 1, "total": 2})
    path = disk.builders.note_of(key)

    def read(data: bytes) -> str:
        path.write_bytes(data)
        note = disk.builders.reported(key)
        if note is None:
            return "nothing"
        stage, done, total = str(note["stage"]), int(note["done"]), int(note["total"])
        assert len(stage) < 100
        assert 0 <= done <= total < 2**53
        return "served"

    seed = path.read_bytes().partition(b"\n")[2]
    return Target("progress", [seed], lambda text: PLAIN.of("progress", key, "\n", text).encode() + b"\n" + text, read)


def version(folder: Path) -> Target:
    disk = DiskTier(folder)

    def read(data: bytes) -> str:
        (folder / "FORMAT").write_bytes(data)
        try:
            disk.folder.check_version()
        except StorageError:
            return "refused"
        assert int(data) == LAYOUT
        return "served"

    return Target("FORMAT", [b"1\n"], lambda text: text, read)


def turns(folder: Path) -> Target:
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine()))
    file = TurnsFile.of(folder, None, block.name, "ana")
    first = {"turns": [{"role": "user", "content": "I am Ana."}, {"role": "assistant", "content": "Hello."}]}
    called = {"id": "1", "name": "look", "arguments": {"x": 1}}
    second = {
        "turns": [{"role": "assistant", "content": "", "tool_calls": [called]}, {"role": "tool", "content": "3", "tool_call_id": "1"}]
    }
    for record in (first, second, {"context": genuine().key, "first": [0, 0], "last": [0, 1], "model": engine().fingerprint}):
        file.append(record, "memory history: ana", 3600.0)
    seed = b"\n".join(b"{" + line[len(b'{"crc": "00000000", ') :] for line in file.path.read_bytes().splitlines()) + b"\n"

    def signed(text: bytes) -> bytes:
        lines = text.split(b"\n")
        return b"\n".join(b'{"crc": "%08x", ' % zlib.crc32(line) + line[1:] if line[:1] == b"{" else line for line in lines)

    def read(data: bytes) -> str:
        from llama_index_kvzip.memory import _Session, _Sessions

        file.path.write_bytes(data)
        records, mark = file.read()
        file.read(mark)
        for session in sessions(folder):
            json.dumps(session_facts(session))
            (session.expired, session.keys, ago(session.written))
        find(folder, "memory history: ana")
        find(folder, file.path.stem[:9])
        history = _Session(engine(), block.name, "ana", _Sessions(engine()))
        history._lines = file
        history._look()
        history.told()
        if history.known.turns:
            with suppress(InputError):
                engine().count_tokens(history.known.turns)
        file.append({"turns": []}, "memory history: ana", None)
        assert file.read()[0][-1][1] == {"turns": []}
        remove_expired(folder)
        return "served" if any(record.get("turns") for _, record in records) else "nothing"

    return Target("turns", [seed], signed, read)


def whole_folder(folder: Path) -> Target:
    """The bytes of a database, opened as an engine does."""
    filled(folder / "pristine")
    with closing(__import__("sqlite3").connect(folder / "pristine" / "index" / "cache.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode=DELETE")
    seed = (folder / "pristine" / "index" / "cache.db").read_bytes()

    def read(data: bytes) -> str:
        shutil.rmtree(folder / "contexts", ignore_errors=True)
        shutil.copytree(folder / "pristine", folder / "contexts")
        (folder / "contexts" / "index" / "cache.db").write_bytes(data)
        disk = DiskTier(folder / "contexts", BUDGET)
        disk.entries()
        assert disk.usage() == disk.measured() <= BUDGET
        for number in (1, 2):
            assert disk.get(wanted(number).key, torch.device("cpu")).key == wanted(number).key
        anew = disk.made_anew
        use_rows(disk)
        disk.close()
        examine(folder / "contexts")
        return "damaged" if anew else "served"

    return Target("database", [seed], lambda text: text, read)


#: Each kind of file, and its part of all inputs.
TARGETS: dict[Callable[[Path], Target], float] = {
    a_context_file: 0.2,
    a_joins_file: 0.1,
    a_file_of_codes: 0.1,
    rows: 0.05,
    names: 0.2,
    progress: 0.25,
    version: 0.15,
    turns: 0.047,
    whole_folder: 0.003,
}
