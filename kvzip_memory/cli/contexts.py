"""Contexts: load, list, look, pin, check."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.filesize import decimal
from rich.table import Table

from kvzip_memory import turns
from kvzip_memory.cli.conversions import conversions_table
from kvzip_memory.cli.opening import contexts_of, folder_secret, owner_of
from kvzip_memory.cli.options import DEFAULT, CacheDir, Json, Reference, Tenant
from kvzip_memory.cli.terminal import ago, as_time, pairs_table, shown, tell
from kvzip_memory.errors import InputError
from kvzip_memory.inference import conversions
from kvzip_memory.registry import Entry
from kvzip_memory.registry.identity import NOBODY


def load(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a text file")],
    model: Annotated[str, typer.Option(help="hub id, folder or .gguf file")],
    ratio: Annotated[float | None, typer.Option(help="fraction of the pairs to keep; 0.3 if not given")] = None,
    nbytes: Annotated[str | None, typer.Option(help='in its place what it may take: "20MB", or 0.1 of a dense 16-bit cache')] = None,
    codec: Annotated[str, typer.Option(help="how they are written: auto, none, fp16, int8, k8v4 or int4")] = "auto",
    weights: Annotated[str | None, typer.Option(help="on a CPU, what those of the model are kept as: auto, int8 or int4")] = None,
    name: Annotated[str | None, typer.Option(help="alias; the file's name if not given")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="a string never to evict; may be given again")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="a word to list it by; may be given again")] = None,
    joinable: Annotated[bool, typer.Option("--joinable", help="to be joined with others")] = False,
    tenant: Annotated[str | None, typer.Option(envvar="KVZIP_MEMORY_TENANT", help="salt of the key; - for none")] = None,
    disk_bytes: Annotated[str | None, typer.Option(help='budget of the folder, such as "20GiB"')] = None,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """Read a text with a model once and store it compressed."""
    from kvzip_memory.engine import KVzipEngine

    if ratio is not None and nbytes is not None:
        raise InputError(f"--ratio is {ratio} and --nbytes is {nbytes!r}; give one of them")  # before a model is read
    tenant = None if tenant == NOBODY else tenant
    engine = KVzipEngine.from_pretrained(
        model,
        ratio=0.3 if ratio is None else ratio,
        codec=codec,
        weights=weights,
        cache_dir=cache_dir,
        disk_bytes=disk_bytes,
        tenant=tenant,
        secret=folder_secret(),
        progress=False if as_json else None,
    )
    name = file.stem if name is None else name
    context = engine.load(file, name=name, system=system, keep=keep or (), tags=tag or (), joinable=joinable, ratio=ratio, nbytes=nbytes)
    engine.close()
    receipt = context.receipt
    assert receipt is not None
    facts = {"context": repr(context), **asdict(receipt), "ms": {k: round(v, 1) for k, v in receipt.ms.items()}}
    tell(facts, as_json, lambda: pairs_table(facts))


def list_(
    limit: Annotated[int, typer.Option(min=0, help="how many, the most recently used first")] = 50,
    tag: Annotated[str | None, typer.Option(help="only those with this tag")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="below each what shares its pairs")] = False,
    tenant: Tenant = None,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """List contexts, the most recently used first; and conversions of .gguf files, which another command lists alone."""
    registry = contexts_of(cache_dir, tenant)
    entries = [e for e in registry.contexts(None if tag else limit) if tag is None or tag in e.tags][:limit]
    said = turns.usage(cache_dir.expanduser())

    def render() -> Table | Group:
        fronts = {e.identity["parent"] for e in entries if "shift" in e.identity}  # what joinable contexts were read behind
        table = Table("name", "key", "tokens", "ratio", "bytes", "used", "")
        for depth, e in _tree(entries) if tree else [(0, e) for e in entries]:
            older = [f"(was {name})" for name in e.former]
            whose = [f"tenant {e.tenant[:12]}"] if e.tenant else []
            states = [*(["pinned"] if e.pinned else []), *(["expired"] if e.expired else [])]
            states += [f"{e.other_version} version"] if e.other_version else []
            states += ["preamble"] if e.key in fronts else []
            marks = " ".join([*states, *whose, *older, *e.tags])
            size, used = decimal(e.file_nbytes), ago(e.used)
            called = depth * "  " + shown(", ".join(e.names) or ("-" if depth else ""))
            table.add_row(called, shown(e.key[:12]), f"{e.n_tokens:,}", f"{e.ratio:g}", size, used, shown(marks))
        if said["sessions"]:
            table.caption = f"and {said['sessions']:,} sessions, {decimal(said['nbytes'])} of turns: kvzip-memory sessions"
        found = [] if tag or tenant else conversions.conversions(cache_dir.expanduser())
        return Group(table, conversions_table(found)) if found else table

    tell([facts_of(e) for e in entries], as_json, render)


def _tree(entries: Sequence[Entry]) -> Iterator[tuple[int, Entry]]:
    """The entries with their depths, each before those that share its pairs: one that shares those of several comes below each."""
    shares = {e.key: {*e.parts} for e in entries}
    below: dict[str | None, list[Entry]] = {}
    for e in entries:
        near = [key for key in e.parts if key in shares and not any(key in shares.get(other, ()) for other in e.parts)]
        for over in [*near] if near else [None]:
            below.setdefault(over, []).append(e)
    left = [(0, e) for e in reversed(below.get(None, []))]
    while left:
        depth, e = left.pop()
        yield depth, e
        left += [(depth + 1, sharing) for sharing in reversed(below.get(e.key, []))]


def show(reference: Reference, tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Everything about one context, the fields of its key included."""
    entry = owner_of(reference, tenant, cache_dir).one(reference)
    facts = facts_of(entry)
    table = pairs_table({**facts, **{f"identity.{k}": v for k, v in entry.identity.items()}})
    tell({**facts, "identity": entry.identity}, as_json, lambda: table)


def pin(reference: Reference, tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Never evict a context."""
    entry = owner_of(reference, tenant, cache_dir).pin(reference)
    tell(facts_of(entry), as_json, lambda: f"pinned {name_of(entry)}")


def unpin(reference: Reference, tenant: Tenant = None, cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Let a context be evicted again."""
    entry = owner_of(reference, tenant, cache_dir).pin(reference, pinned=False)
    tell(facts_of(entry), as_json, lambda: f"unpinned {name_of(entry)}")


def verify(
    references: Annotated[list[str] | None, typer.Argument(help="names or keys; all contexts if none is given")] = None,
    tenant: Tenant = None,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """Check every byte of stored contexts. What is damaged goes to quarantine; the exit code is 1 then."""
    registry = contexts_of(cache_dir, tenant)
    entries = [owner_of(r, tenant, cache_dir).one(r) for r in references] if references else registry.contexts()
    wrong = {e.key: problem for e in entries if (problem := registry.verify(e.key)) is not None}
    lines = [f"checked {len(entries)}, damaged {len(wrong)}", *(f"[red]{shown(key[:12])}[/] {shown(text)}" for key, text in wrong.items())]
    tell({"checked": len(entries), "damaged": wrong}, as_json, lambda: "\n".join(lines))
    raise typer.Exit(bool(wrong))


def facts_of(entry: Entry) -> dict[str, Any]:
    """What is told of a context as JSON."""
    facts = {k: v for k, v in asdict(entry).items() if k != "identity"}
    times = {k: as_time(v or None) for k, v in facts.items() if k in ("created", "used", "expires")}
    names = {"names": list(entry.names), "former": list(entry.former), "parts": list(entry.parts)}
    return {**facts, **times, **names, "tenant": entry.tenant, "other_version": entry.other_version}


def name_of(entry: Entry) -> str:
    """What a terminal calls a context: its names, or else the beginning of its key."""
    return shown(", ".join(entry.names) or entry.key[:12])
