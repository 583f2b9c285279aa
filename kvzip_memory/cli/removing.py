"""Deletes contexts, sessions with their turns, conversions, and all that was loaded with a tag."""

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from kvzip_memory import turns
from kvzip_memory.cli.contexts import facts_of, name_of
from kvzip_memory.cli.conversions import conversion_facts
from kvzip_memory.cli.opening import check_one, contexts_of, folder_checksums, owner_of, registry_of
from kvzip_memory.cli.options import DEFAULT, CacheDir, Json, Tenant
from kvzip_memory.cli.sessions import session_facts
from kvzip_memory.cli.terminal import shown, tell
from kvzip_memory.errors import InputError
from kvzip_memory.inference import conversions
from kvzip_memory.registry import Entry
from kvzip_memory.registry.holders import Naming, without


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
        return tell(conversion_facts(found), as_json, lambda: f"deleted {shown(found.name)}, {decimal(found.nbytes)}")
    if reference is None:
        assert tag is not None
        return _forget(tag, tenant, cache_dir.expanduser(), as_json)
    registry, called = owner_of(reference, tenant, cache_dir), shown(reference)
    if not registry.find(reference) and (session := turns.find(cache_dir.expanduser(), reference, registry.tenant, registry.checksums)):
        count = session.remove(registry)
        tell(session_facts(session), as_json, lambda: f"deleted {shown(session.name)}, {session.turns} turns and {count} contexts")
        return
    try:
        entry = registry.remove(reference)
    except InputError as error:
        if registry.find(reference):  # it may not be deleted
            raise
        raise InputError(f"{error}; or a session, as kvzip-memory sessions shows it") from None
    older = [e for e in registry.contexts() if reference in e.former]
    kept = f"{called} is no longer a name of {name_of(entry)}; give {entry.key[:12]} to delete it"
    key = "" if called == entry.key[:12] else f", {entry.key[:12]}"
    lines = [kept if entry.names else f"deleted {called}{key}, {decimal(entry.file_nbytes)}"]
    lines += [f"{e.key[:12]}, which was {called} before, stays; give that key to delete it" for e in older]
    lines += [f"the turns it was made of are kept; rm {shown(repr(s.name))} deletes them" for s in _sessions_from(cache_dir, entry)]
    tell(facts_of(entry), as_json, lambda: "\n".join(lines))


def _forget(tag: str, tenant: str | None, cache_dir: Path, as_json: bool) -> None:
    registry = contexts_of(cache_dir, tenant)
    if tenant is None:
        tagged = [entry for entry in registry.contexts() if without(entry.tags, entry.key, Naming(tag)) != entry.tags]
        whose = {entry.tenant for entry in tagged}
        check_one(f"{tag!r} is a tag of contexts", whose)
        said = [session for session in turns.sessions(cache_dir, registry.checksums) if session.name == tag]
        unknown = [session for session in said if not any(turns.is_of(cache_dir, session, tenant) for tenant in whose)]
        if len(unknown) + len(whose) > 1:
            files = ", ".join(session.file.path.stem[:12] for session in said)
            raise InputError(
                f"{tag!r} is a session of several tenants; say whose with --tenant, or rm the turns of one by their file: {files}"
            )
        if not unknown:  # else turns alone have the tag, and whose they are cannot be told from the folder
            registry = registry_of(cache_dir, whose.pop() if whose else None)
    forgotten = registry.forget(Naming(tag))
    count = turns.erase(cache_dir, registry.tenant, tag, registry.checksums)
    if not (forgotten.deleted or forgotten.kept or count):
        raise InputError(f"nothing is tagged {tag!r}; kvzip-memory ls shows the tags")
    nbytes = sum(entry.file_nbytes for entry in forgotten.deleted)
    lines = [f"deleted {len(forgotten.deleted)} contexts, {decimal(nbytes)}, and {count} turns"]
    along = [entry for entry in forgotten.deleted if without(entry.tags, entry.key, Naming(tag)) == entry.tags]
    lines += [f"{name_of(entry)} went with what it shared" for entry in along]
    for entry in forgotten.kept:
        others = [*entry.names, *without(entry.tags, entry.key, Naming(tag)), *(["a pin"] if entry.pinned else [])]
        lines.append(f"{entry.key[:12]} stays, which others have: {shown(', '.join(others))}")
    facts = {"deleted": [facts_of(e) for e in forgotten.deleted], "kept": [facts_of(e) for e in forgotten.kept], "turns": count}
    tell(facts, as_json, lambda: "\n".join(lines))


def _sessions_from(cache_dir: Path, entry: Entry) -> list[turns.Session]:
    return [session for session in turns.sessions(cache_dir.expanduser(), folder_checksums()) if entry.key in session.keys]
