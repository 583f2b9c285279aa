"""What looking at a folder has found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_SHOWN = 10  # files that are not ours


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: ``note`` is worth knowing, ``problem`` needs somebody.
        what: the thing.
        found: how it is.
        advice: what to do, empty if nothing.
    """

    level: Literal["ok", "note", "problem"]
    what: str
    found: str
    advice: str = ""


def not_ours(paths: Iterable[Path]) -> list[Finding]:
    """What is to be said of files and folders that are not ours, if there are any."""
    found = [*map(str, paths)]
    if not found:
        return []
    shown = ", ".join(map(repr, found[:_SHOWN])) + (f" and {len(found) - _SHOWN} others" if len(found) > _SHOWN else "")
    return [Finding("note", "not ours", shown, "left alone and counted nowhere; look at them, and move them elsewhere")]
