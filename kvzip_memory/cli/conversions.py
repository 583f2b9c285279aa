"""Folders that .gguf files were dequantised into."""

from typing import Any

from rich.filesize import decimal
from rich.table import Table

from kvzip_memory.cli.options import DEFAULT, CacheDir, Json
from kvzip_memory.cli.terminal import ago, as_time, shown, tell
from kvzip_memory.inference import conversions


def list_conversions(cache_dir: CacheDir = DEFAULT, as_json: Json = False) -> None:
    """Folders that .gguf files were dequantised into, the last used first. They are in no budget; gc and rm --conversion delete them."""
    found = conversions.conversions(cache_dir.expanduser())
    tell([conversion_facts(c) for c in found], as_json, lambda: conversions_table(found))


def conversion_facts(conversion: conversions.Conversion) -> dict[str, Any]:
    return {"conversion": conversion.name, "nbytes": conversion.nbytes, "used": as_time(conversion.used), "folder": str(conversion.folder)}


def conversions_table(found: list[conversions.Conversion]) -> Table:
    table = Table("conversion of a .gguf file", "bytes", "used")
    for c in found:
        table.add_row(shown(c.name), decimal(c.nbytes), ago(c.used))
    return table
