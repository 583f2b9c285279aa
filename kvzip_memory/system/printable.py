"""Texts of others, such as names, tags and files' names, where people read them: on a terminal and in logs."""

from __future__ import annotations

import logging
import reprlib
import unicodedata
from typing import Any


def printable(text: object) -> str:
    """One line in which a terminal finds nothing to obey: what is no visible character and no space is shown as its escape, ``\\x1b``."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in str(text))


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = printable(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(value if isinstance(value, int | float) else printable(value) for value in record.args)
        return True


_FILTER = _Printable()


def logger_of(module: str) -> logging.Logger:
    """The logger of a module, whose records are :func:`printable`."""
    logger = logging.getLogger(module)
    logger.addFilter(_FILTER)  # a filter of a parent is not asked
    return logger


_MOST_TOLD = 200


class _Brief(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        """Python writes no number of more than 4,300 digits."""
        return super().repr_int(value, level) if value.bit_length() < 1000 else f"a number of {value.bit_length():,} bits"


_brief = _Brief()
_brief.maxstring = _brief.maxother = 80
_brief.maxlevel = 3


def brief(value: Any) -> str:
    """A value in an error's message: short, however large it is."""
    told = _brief.repr(value)
    return told if len(told) <= _MOST_TOLD else f"{told[:_MOST_TOLD]}..."
