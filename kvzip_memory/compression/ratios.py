"""The fraction of a text's pairs that is kept."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief


def checked_ratio(ratio: Any, name: str = "ratio") -> float:
    """The fraction of pairs to keep, which was given under a name; a text that spells a number is that number.

    Raises:
        InputError: it is none, or outside (0, 1].
    """
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(ratio, bool | bytes | bytearray) and 0 < (number := float(ratio)) <= 1:
            return number
    raise InputError(f"{name} is {brief(ratio)}; it is the fraction of pairs kept and must lie in (0, 1]")


def pairs_kept(ratio: float, n_tokens: int, protected: int, n_heads: int) -> int:
    """Pairs that a context keeps over ``n_heads`` KV heads of all layers: its protected head whole, and of the rest the ratio."""
    return n_heads * protected + round(ratio * n_heads * (n_tokens - protected))
