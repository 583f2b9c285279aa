"""``kvzip-memory``: what lies in a cache folder, and what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from kvzip_memory import __version__, turns
from kvzip_memory.errors import InputError, KVzipError
from kvzip_memory.inference import conversions
from kvzip_memory.registry import EVERYONE, ContextRegistry, Entry
from kvzip_memory.registry.backing import logger as disk_logger
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.registry.disk.layout import KEY
from kvzip_memory.registry.holders import Naming, without
from kvzip_memory.registry.identity import NOBODY, tenant_digest
from kvzip_memory.system.checksums import SHORTEST, Checksums
from kvzip_memory.system.findings import Finding
from kvzip_memory.system.printable import printable

app = typer.Typer(no_args_is_help=True, add_completion=False)
console = Console(emoji=False)

Reference = Annotated[str, typer.Argument(help="a name, a key, or the first 8 digits of a key")]
Tenant = Annotated[
    str | None,
    typer.Option(
        envvar="KVZIP_MEMORY_TENANT",
        help="whose: a tenant, the first 8 digits of its digest as ls shows it (all 64 if it has only sessions), or - for what is nobody's",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
CacheDir = Annotated[Path, typer.Option(envvar="KVZIP_MEMORY_CACHE_DIR", help="the folder given to the engine as cache_dir")]
DEFAULT = Path("~/.cache/kvzip_memory")


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvzip-memory {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="show the version and exit")] = False,
) -> None:
    """Contexts in a cache folder: load, look, pin, delete, check.

    The folder's secret, if it has one, is in KVZIP_MEMORY_SECRET, or in the file that KVZIP_MEMORY_SECRET_FILE names.
    """


def shown(text: object) -> str:
    """A text of others for a terminal: nothing in it is obeyed, by rich or by the terminal."""
    return escape(printable(text))


class Level(StrEnum):
    ok = "green"
    note = "yellow"
    problem = "red"


def _secret() -> str | None:
    """The folder's secret, from the environment or from a file that only its owner can read: other users can see what a command was given.

    Raises:
        InputError: both are given, or the file cannot be read, can be by others, or holds too short a secret.
    """
    given, file = os.environ.get("KVZIP_MEMORY_SECRET"), os.environ.get("KVZIP_MEMORY_SECRET_FILE")
    if not file:
        return given or None
    if given:
        raise InputError("KVZIP_MEMORY_SECRET and KVZIP_MEMORY_SECRET_FILE are both set; one of them is enough")
    called = f"KVZIP_MEMORY_SECRET_FILE {file!r}"
    try:
        mode = os.stat(file).st_mode
        text = "" if stat.S_ISDIR(mode) or mode & 0o077 else Path(file).read_text().strip()
    except (OSError, ValueError) as error:
        raise InputError(f"{called} cannot be read: {error}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{called} is a folder; give a file of mode 0600 that holds the secret")
    if mode & 0o077:
        raise InputError(f"{called} can be read by others; chmod 600 it")
    if len(text) < SHORTEST:
        found = f"holds {len(text)} characters" if text else "is empty"
        raise InputError(f"{called} {found}; give a secret of {SHORTEST} at least, such as secrets.token_hex() makes")
    return text


def _checksums() -> Checksums:
    return Checksums(_secret())


@contextmanager
def _errors_alone() -> Iterator[None]:
    """Nothing is logged of a folder that cannot be opened, which is the command's error. What else is to be said of one still is."""
    before, disk_logger.disabled = disk_logger.disabled, True
    try:
        yield
    finally:
        disk_logger.disabled = before


def _registry(cache_dir: Path, tenant: str | None = EVERYONE) -> ContextRegistry:
    folder = cache_dir.expanduser() / "contexts"
    if not folder.is_dir():
        raise typer.BadParameter(f"nothing is stored at {folder}; give another --cache-dir", param_hint="--cache-dir")
    secret = _secret()
    with _errors_alone():
        registry = ContextRegistry(torch.device("cpu"), folder, tenant=tenant, secret=secret)
    if registry.no_disk is not None:
        raise typer.BadParameter(printable(registry.no_disk), param_hint="--cache-dir")
    registry.check_disk()
    return registry


def _contexts(cache_dir: Path, tenant: str | None) -> ContextRegistry:
    """The contexts of a tenant that was given as itself, by the beginning of its digest, or as ``-``; all of them if none was given.

    Raises:
        InputError: several tenants are meant.
    """
    registry = _registry(cache_dir)
    if tenant is None:
        return registry
    if tenant == NOBODY:
        return _registry(cache_dir, None)
    itself = str(tenant_digest(tenant))
    known = {entry.tenant for entry in registry.contexts() if entry.tenant is not None}
    meant = {itself} & known or {digest for digest in known if len(tenant) >= 8 and digest.startswith(tenant)}
    if len(meant) > 1:
        raise InputError(f"--tenant is the beginning of the digests of {len(meant)} tenants; give more digits")
    if not meant and KEY.fullmatch(tenant) and _sessions(cache_dir, tenant) and not _sessions(cache_dir, itself):
        meant = {tenant}
    return _registry(cache_dir, meant.pop() if meant else itself)


def _sessions(cache_dir: Path, tenant: str | None) -> list[turns.Session]:
    """A tenant's, by its digest, which only the whole of it finds."""
    folder = cache_dir.expanduser()
    return [session for session in turns.sessions(folder, _checksums()) if turns.is_of(folder, session, tenant)]


def _of(reference: str, tenant: str | None, cache_dir: Path) -> ContextRegistry:
    """The contexts of whom a name or key belongs to.

    Raises:
        InputError: it could be several tenants', or it is the beginning of several keys.
    """
    registry = _contexts(cache_dir, tenant)
    found, labels = registry.looked_up(reference)
    if [entry.key for entry in found] == [reference]:
        return registry
    keys = sorted(entry.key for entry in found if entry.key.startswith(reference))
    if len(keys) > 1:
        raise InputError(f"{reference!r} is the beginning of {len(keys)} keys; give more digits of one of {', '.join(keys)}")
    named = {label.key: label.tenant for label in labels.values() if registry.tiers(label.key)}
    if keys and named.keys() - {*keys}:
        both = ", ".join(sorted({*keys, *named}))
        raise InputError(f"{reference!r} is a name and the beginning of a key; give the whole key of the one that is meant: {both}")
    whose = {entry.tenant for entry in found} | {*named.values()}
    _check_one(f"{reference!r} is a name of contexts", whose)
    return _registry(cache_dir, whose.pop()) if whose else registry


def _check_one(what: str, whose: set[str | None]) -> None:
    if len(whose) > 1:
        digests = ", ".join(sorted(NOBODY if digest is None else digest[:12] for digest in whose))
        raise InputError(f"{what} of {len(whose)} tenants; say whose with --tenant, by itself or one of {digests}")


def _show(value: Any, as_json: bool, render: Callable[[], Any]) -> None:
    if as_json:
        typer.echo(json.dumps(value, default=str).replace("\x7f", "\\u007f"))
    else:
        console.print(render())


def _facts(entry: Entry) -> dict[str, Any]:
    facts = {k: v for k, v in asdict(entry).items() if k != "identity"}
    times = {k: _time(v or None) for k, v in facts.items() if k in ("created", "used", "expires")}
    names = {"names": list(entry.names), "former": list(entry.former)}
    return {**facts, **times, **names, "tenant": entry.tenant, "other_version": entry.other_version}


def _session(session: turns.Session) -> dict[str, Any]:
    times = {"written": _time(session.written), "expires": _time(session.expires)}
    return {"session": session.name, "turns": session.turns, "nbytes": session.nbytes, **times, "file": str(session.file.path)}


def _conversion(conversion: conversions.Conversion) -> dict[str, Any]:
    return {"conversion": conversion.name, "nbytes": conversion.nbytes, "used": _time(conversion.used), "folder": str(conversion.folder)}


def _conversions(found: list[conversions.Conversion]) -> Table:
    table = Table("conversion of a .gguf file", "bytes", "used")
    for c in found:
        table.add_row(shown(c.name), decimal(c.nbytes), _ago(c.used))
    return table


def _sessions_of(cache_dir: Path, entry: Entry) -> list[turns.Session]:
    return [session for session in turns.sessions(cache_dir.expanduser(), _checksums()) if entry.key in session.keys]


def _time(seconds: float | None) -> str | None:
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # further away than any calendar goes
        return f"{seconds:g} s"


def _called(entry: Entry) -> str:
    return shown(", ".join(entry.names) or entry.key[:12])


def _ago(seconds: float) -> str:
    passed = max(0.0, time.time() - seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= size:
            return f"{passed / size:.0f} {unit} ago"
    return "just now"


def _pairs(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(f"[bold]{shown(key)}", shown(value))
    return table


@app.command()
def load(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a text file")],
    model: Annotated[str, typer.Option(help="hub id, folder or .gguf file")],
    ratio: Annotated[float, typer.Option(help="fraction of the pairs to keep")] = 0.3,
    name: Annotated[str | None, typer.Option(help="alias; the file's name if not given")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="a string never to evict; may be given again")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="a word to list it by; may be given again")] = None,
    tenant: Annotated[str | None, typer.Option(envvar="KVZIP_MEMORY_TENANT", help="salt of the key; - for none")] = None,
    disk_bytes: Annotated[str | None, typer.Option(help='budget of the folder, such as "20GiB"')] = None,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """Read a text with a model once and store it compressed."""
    from kvzip_memory.engine import KVzipEngine

    tenant = None if tenant == NOBODY else tenant
    engine = KVzipEngine.from_pretrained(
        model, ratio=ratio, cache_dir=cache_dir, disk_bytes=disk_bytes, tenant=tenant, secret=_secret(), progress=False if as_json else None
    )
    context = engine.load(file, name=file.stem if name is None else name, system=system, keep=keep or (), tags=tag or ())
    engine.close()
    receipt = context.receipt
    assert receipt is not None
    facts = {"context": repr(context), **asdict(receipt), "ms": {k: round(v, 1) for k, v in receipt.ms.items()}}
    _show(facts, as_json, lambda: _pairs(facts))


@app.command(name="ls")
def list_(
    limit: Annotated[int, typer.Option(min=0, help="how many, the most recently used first")] = 50,
    tag: Annotated[str | None, typer.Option(help="only those with this tag")] = None,
    tenant: Tenant = None,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """List contexts, the most recently used first; and conversions of .gguf files, which another command lists alone."""
    registry = _contexts(cache_dir, tenant)
    entries = [e for e in registry.contexts(None if tag else limit) if tag is None or tag in e.tags][:limit]
    said = turns.usage(cache_dir.expanduser())

    def render() -> Table | Group:
        table = Table("name", "key", "tokens", "ratio", "bytes", "used", "")
        for e in entries:
            older = [f"(was {name})" for name in e.former]
            whose = [f"tenant {e.tenant[:12]}"] if e.tenant else []
            states = [*(["pinned"] if e.pinned else []), *(["expired"] if e.expired else [])]
            states += [f"{e.other_version} version"] if e.other_version else []
            marks = " ".join([*states, *whose, *older, *e.tags])
            size, used = decimal(e.file_nbytes), _ago(e.used)
            table.add_row(shown(", ".join(e.names)), shown(e.key[:12]), f"{e.n_tokens:,}", f"{e.ratio:g}", size, used, shown(marks))
        if said["sessions"]:
            table.caption = f"and {said['sessions']:,} sessions, {decimal(said['nbytes'])} of turns: kvzip-memory sessions"
        found = [] if tag or tenant else conversions.conversions(cache_dir.expanduser())
        return Group(table, _conversions(found)) if found else table

    _show([_facts(e) for e in entries], as_json, render)


@app.command()
def show(reference: Reference, tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Everything about one context, the fields of its key included."""
    entry = _of(reference, tenant, cache_dir).one(reference)
    facts = _facts(entry)
    table = _pairs({**facts, **{f"identity.{k}": v for k, v in entry.identity.items()}})
    _show({**facts, "identity": entry.identity}, as_json, lambda: table)


@app.command()
def pin(reference: Reference, tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Never evict a context."""
    entry = _of(reference, tenant, cache_dir).pin(reference)
    _show(_facts(entry), as_json, lambda: f"pinned {_called(entry)}")


@app.command()
def unpin(reference: Reference, tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Let a context be evicted again."""
    entry = _of(reference, tenant, cache_dir).pin(reference, pinned=False)
    _show(_facts(entry), as_json, lambda: f"unpinned {_called(entry)}")


@app.command()
def rm(
    reference: Annotated[str | None, typer.Argument(help="a name, a key, the first 8 digits of a key, or a session")] = None,
    tag: Annotated[str | None, typer.Option(help='forget what was loaded with a tag, such as "thread: ana", "document: a.pdf"')] = None,
    conversion: Annotated[str | None, typer.Option(help="the beginning of a conversion's name, as ls shows it")] = None,
    tenant: Tenant = None,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """Delete a context, a session with its turns, or all of a tag. One of several names that is given by one of them only loses that name.

    Older texts of a name stay, and are deleted by their keys.
    """
    given = [given for given in (reference, tag, conversion) if given is not None]
    if len(given) != 1:
        only = "; only one of them" if given else ""
        raise typer.BadParameter(f"give a name or key, or --tag, or --conversion{only}", param_hint="REFERENCE")
    if conversion is not None:
        if not conversion:
            raise InputError("--conversion is empty; give the beginning of a conversion's name, as kvzip-memory conversions shows it")
        found = conversions.find(cache_dir.expanduser(), conversion)
        found.remove()
        return _show(_conversion(found), as_json, lambda: f"deleted {shown(found.name)}, {decimal(found.nbytes)}")
    if reference is None:
        assert tag is not None
        return _forget(tag, tenant, cache_dir.expanduser(), as_json)
    registry, called = _of(reference, tenant, cache_dir), shown(reference)
    if not registry.find(reference) and (session := turns.find(cache_dir.expanduser(), reference, registry.tenant, registry.checksums)):
        count = session.remove(registry)
        _show(_session(session), as_json, lambda: f"deleted {shown(session.name)}, {session.turns} turns and {count} contexts")
        return
    try:
        entry = registry.remove(reference)
    except InputError as error:
        raise InputError(f"{error}; or a session, as kvzip-memory sessions shows it") from None
    older = [e for e in registry.contexts() if reference in e.former]
    kept = f"{called} is no longer a name of {_called(entry)}; give {entry.key[:12]} to delete it"
    lines = [kept if entry.names else f"deleted {called}, {entry.key[:12]}, {decimal(entry.file_nbytes)}"]
    lines += [f"{e.key[:12]}, which was {called} before, stays; give that key to delete it" for e in older]
    lines += [f"the turns it was made of are kept; rm {shown(repr(s.name))} deletes them" for s in _sessions_of(cache_dir, entry)]
    _show(_facts(entry), as_json, lambda: "\n".join(lines))


def _forget(tag: str, tenant: str | None, cache_dir: Path, as_json: bool) -> None:
    registry = _contexts(cache_dir, tenant)
    if tenant is None:
        tagged = [entry for entry in registry.contexts() if without(entry.tags, entry.key, Naming(tag)) != entry.tags]
        whose = {entry.tenant for entry in tagged}
        _check_one(f"{tag!r} is a tag of contexts", whose)
        said = [session for session in turns.sessions(cache_dir, registry.checksums) if session.name == tag]
        unknown = [session for session in said if not any(turns.is_of(cache_dir, session, tenant) for tenant in whose)]
        if len(unknown) + len(whose) > 1:
            files = ", ".join(session.file.path.stem[:12] for session in said)
            raise InputError(
                f"{tag!r} is a session of several tenants; say whose with --tenant, or rm the turns of one by their file: {files}"
            )
        if not unknown:  # else turns alone have the tag, and whose they are cannot be told from the folder
            registry = _registry(cache_dir, whose.pop() if whose else None)
    forgotten = registry.forget(Naming(tag))
    count = turns.erase(cache_dir, registry.tenant, tag, registry.checksums)
    if not (forgotten.deleted or forgotten.kept or count):
        raise InputError(f"nothing is tagged {tag!r}; kvzip-memory ls shows the tags")
    nbytes = sum(entry.file_nbytes for entry in forgotten.deleted)
    lines = [f"deleted {len(forgotten.deleted)} contexts, {decimal(nbytes)}, and {count} turns"]
    for entry in forgotten.kept:
        others = [*entry.names, *without(entry.tags, entry.key, Naming(tag)), *(["a pin"] if entry.pinned else [])]
        lines.append(f"{entry.key[:12]} stays, which others have: {shown(', '.join(others))}")
    facts = {"deleted": [_facts(e) for e in forgotten.deleted], "kept": [_facts(e) for e in forgotten.kept], "turns": count}
    _show(facts, as_json, lambda: "\n".join(lines))


@app.command()
def sessions(tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Conversations whose turns lie in the folder as text, beside the contexts made of them."""
    found = _sessions(cache_dir, EVERYONE if tenant is None else _contexts(cache_dir, tenant).tenant)

    def render() -> Table:
        table = Table("session", "turns", "bytes", "written", "")
        for s in found:
            table.add_row(shown(s.name), f"{s.turns:,}", decimal(s.nbytes), _ago(s.written), "expired" if s.expired else "")
        return table

    _show([_session(s) for s in found], as_json, render)


@app.command(name="conversions")
def list_conversions(cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Folders that .gguf files were dequantised into, the last used first. They are in no budget; gc and rm --conversion delete them."""
    found = conversions.conversions(cache_dir.expanduser())
    _show([_conversion(c) for c in found], as_json, lambda: _conversions(found))


@app.command()
def verify(
    references: Annotated[list[str] | None, typer.Argument(help="names or keys; all contexts if none is given")] = None,
    tenant: Tenant = None,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """Check every byte of stored contexts. What is damaged goes to quarantine; the exit code is 1 then."""
    registry = _contexts(cache_dir, tenant)
    entries = [_of(r, tenant, cache_dir).one(r) for r in references] if references else registry.contexts()
    wrong = {e.key: problem for e in entries if (problem := registry.verify(e.key)) is not None}
    lines = [f"checked {len(entries)}, damaged {len(wrong)}", *(f"[red]{shown(key[:12])}[/] {shown(text)}" for key, text in wrong.items())]
    _show({"checked": len(entries), "damaged": wrong}, as_json, lambda: "\n".join(lines))
    raise typer.Exit(bool(wrong))


@app.command()
def gc(
    old: Annotated[bool, typer.Option("--old", help="also contexts of older versions of kvzip-memory, unless they are pinned")] = False,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """Delete what is expired, in quarantine, or left behind by killed processes, and conversions that were not used for 30 days."""
    folder = cache_dir.expanduser()
    only_conversions = (folder / "gguf").is_dir() and not (folder / "contexts").is_dir()
    freed = {} if only_conversions else _registry(cache_dir).gc(old)
    freed["sessions"] = turns.remove_expired(folder, _checksums())
    freed["conversions"], nbytes = conversions.gc(folder)
    freed["bytes"] = freed.get("bytes", 0) + nbytes
    _show(freed, as_json, lambda: _pairs({**freed, "bytes": decimal(freed.get("bytes", 0))}))


@app.command()
def stats(cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Bytes and contexts of the folder, and the space left beside it."""
    registry = _registry(cache_dir)
    folder = cache_dir.expanduser() / "contexts"
    tier = registry.stats()["tiers"]["disk"]
    facts = {
        "folder": str(folder),
        "contexts": tier["contexts"],
        "nbytes": tier["nbytes"],
        "quarantined": len(registry.quarantine()),
        **{f"turns_{name}": count for name, count in turns.usage(cache_dir.expanduser()).items()},
        "conversions": len(made := conversions.conversions(cache_dir.expanduser())),
        "conversions_nbytes": sum(conversion.nbytes for conversion in made),
        "free_nbytes": shutil.disk_usage(folder).free,
    }
    sizes = ("nbytes", "turns_nbytes", "conversions_nbytes", "free_nbytes")
    _show(facts, as_json, lambda: _pairs({**facts, **{name: decimal(facts[name] or 0) for name in sizes}}))


@app.command()
def doctor(cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Look at a folder, its files and its index, and say what to do. The exit code is 1 if there is a problem, not for notes.

    The pairs of contexts are not read: verify does that.
    """
    folder, checksums = cache_dir.expanduser(), _checksums()
    findings = [*examine(folder / "contexts", checksums), *conversions.examine(folder)]
    try:
        findings += turns.examine(folder, checksums)
    except OSError as error:  # the others say so, too
        findings.append(Finding("problem", "sessions", str(error), "nothing of them is read or written until then"))

    def render() -> Table:
        table = Table("", "what", "found", "what to do")
        for f in findings:
            table.add_row(f"[{Level[f.level].value}]{f.level}", *map(shown, (f.what, f.found, f.advice)))
        return table

    _show([asdict(f) for f in findings], as_json, render)
    raise typer.Exit(any(f.level == "problem" for f in findings))


def main() -> None:
    """Entry point: errors of ours are one line, not a traceback."""
    try:
        app()
    except (KVzipError, OSError) as error:
        Console(stderr=True, emoji=False).print(f"[red]error:[/] {shown(' '.join(str(error).split(chr(10))))}")
        raise SystemExit(2) from None


__all__ = ["app", "main"]
