"""Arguments that are yes or no."""

from __future__ import annotations

from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.system.printable import brief


def checked_flag(name: str, value: Any, about: str = "") -> bool:
    """Whether something is to be done.

    Args:
        about: what else there is to say of it.

    Raises:
        InputError: the value is neither True nor False.
    """
    if isinstance(value, bool):
        return value
    raise InputError(f"{name} is {brief(value)}; it must be True or False{about}")


def check_flags(**values: Any) -> None:
    """:func:`checked_flag` of several."""
    for name, value in values.items():
        checked_flag(name, value)
