"""The folder as a whole: what is left behind in it, its sizes, its state."""

import shutil
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from kvzip_memory import turns
from kvzip_memory.cli.opening import folder_checksums, registry_of
from kvzip_memory.cli.options import DEFAULT, CacheDir, Json
from kvzip_memory.cli.terminal import pairs_table, shown, tell
from kvzip_memory.inference import conversions
from kvzip_memory.registry.disk.doctor import examine
from kvzip_memory.system.findings import Finding


class Level(StrEnum):
    ok = "green"
    note = "yellow"
    problem = "red"


def gc(
    old: Annotated[bool, typer.Option("--old", help="also contexts of older versions of kvzip-memory, unless they are pinned")] = False,
    cache_dir: CacheDir = DEFAULT,
    as_json: Json = False,
) -> None:
    """Delete what is expired, in quarantine, or left behind by killed processes, and conversions that were not used for 30 days."""
    folder = cache_dir.expanduser()
    only_conversions = (folder / "gguf").is_dir() and not (folder / "contexts").is_dir()
    freed = {} if only_conversions else registry_of(cache_dir).gc(old)
    freed["sessions"] = turns.remove_expired(folder, folder_checksums())
    freed["conversions"], nbytes = conversions.gc(folder)
    freed["bytes"] = freed.get("bytes", 0) + nbytes
    tell(freed, as_json, lambda: pairs_table({**freed, "bytes": decimal(freed.get("bytes", 0))}))


def stats(cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Bytes and contexts of the folder, and the space left beside it."""
    registry = registry_of(cache_dir)
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
    tell(facts, as_json, lambda: pairs_table({**facts, **{name: decimal(facts[name] or 0) for name in sizes}}))


def doctor(cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Look at a folder, its files and its index, and say what to do. The exit code is 1 if there is a problem, not for notes.

    The pairs of contexts are not read: verify does that.
    """
    folder, checksums = cache_dir.expanduser(), folder_checksums()
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

    tell([asdict(f) for f in findings], as_json, render)
    raise typer.Exit(any(f.level == "problem" for f in findings))
