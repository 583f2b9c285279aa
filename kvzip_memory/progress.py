"""How far a build is: counted in tokens, and shown as a bar."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

from kvzip_memory.registry import Report
from kvzip_memory.system.printable import printable

_NAME = 40  # characters of a name that a bar shows


class Tally:
    """Counts the tokens of one stage after another, and tells how many of all are done."""

    def __init__(self, total: int, *listeners: Report) -> None:
        self._total, self._listeners, self._done = total, listeners, 0

    def __call__(self, stage: str, tokens: int) -> None:
        self._done += tokens
        for tell in self._listeners:
            tell(stage, self._done, self._total)


class Bar:
    """A progress bar that appears with the first progress, where it is shown.

    Where it is not there is none: tqdm's lock, of all threads and forked processes, would hang a child that is forked while another
    thread has it, and all the others once such a child is killed.

    Args:
        name: of what is built.
        shown: None shows it on a terminal only.
        unit: what is counted.
    """

    def __init__(self, name: str, shown: bool | None, unit: str = "tok") -> None:
        self._unit, self._name = unit, printable(name)[:_NAME]
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total``, in the given stage; 0 of 0 while nothing is known."""
        if not self._shown:
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._name, unit=self._unit, leave=False)
        self._bar.total = total or None
        self._bar.set_postfix_str(printable(stage)[:_NAME], refresh=False)  # another process' may have told it
        self._bar.update(done - self._bar.n)
