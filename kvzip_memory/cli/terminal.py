"""What commands tell: as JSON, or in tables and lines of which nothing is obeyed by the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvzip_memory.system.printable import printable

console = Console(emoji=False)


def shown(text: object) -> str:
    """A text of others for a terminal: nothing in it is obeyed, by rich or by the terminal."""
    return escape(printable(text))


def tell(value: Any, as_json: bool, render: Callable[[], Any]) -> None:
    """Print a value as JSON, or else what is rendered of it."""
    if as_json:
        typer.echo(json.dumps(value, default=str).replace("\x7f", "\\u007f"))
    else:
        console.print(render())


def pairs_table(facts: dict[str, Any]) -> Table:
    """A line for each fact."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(f"[bold]{shown(key)}", shown(value))
    return table


def as_time(seconds: float | None) -> str | None:
    """Seconds since 1970 in ISO 8601."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # further away than any calendar goes
        return f"{seconds:g} s"


def ago(seconds: float) -> str:
    """How long ago seconds since 1970 are."""
    passed = max(0.0, time.time() - seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= size:
            return f"{passed / size:.0f} {unit} ago"
    return "just now"
