"""Processes that are killed at each step of what they do. Imported by the processes of the tests."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from kvzip_memory.turns import Mark, Turns, TurnsFile, sessions


def killed_at(step: int, act: Callable[[], object]) -> bool:
    """Run something in a forked process, which is killed at the so many-th call or return of the code that keeps turns.

    Returns:
        Whether it got that far.
    """
    pid = os.fork()
    if pid == 0:
        try:
            sys.setprofile(killer(step))
            act()
            sys.setprofile(None)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def killer(step: int) -> Callable[[FrameType, str, object], None]:
    """A profiler that kills its process at a step: a call or a return, of the system too, in modules that keep turns."""
    modules, left = {"kvzip_memory.turns", "kvzip_memory.system.locks", "filelock._unix", "llama_index_kvzip.memory"}, step

    def look(frame: FrameType, event: str, arg: object) -> None:
        nonlocal left
        if frame.f_globals.get("__name__") in modules:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return look


def texts(lines: Turns, since: Mark | None = None) -> tuple[list[str], Mark]:
    records, mark = lines.read(since)
    return [turn["content"] for _, record in records for turn in record.get("turns", ())], mark


def add(lines: Turns, text: str) -> None:
    lines.append({"turns": [{"role": "user", "content": text}]}, "ana", None)


#: Between the steps that are tried.
STRIDE = 1 if os.environ.get("KVZIP_STRESS") == "1" else 7


def kill_at_every_step(folder: Path, before: int, answers: Any) -> None:
    """Who adds a turn is killed at each step in turn; another one goes on; readers old and new are told the same."""
    for step in range(0, 100_000, STRIDE):
        lines = TurnsFile.of(folder / str(step), "ana")
        for i in range(before):
            add(lines, f"turn {i}")
        begun, mark = texts(lines)
        got_there = killed_at(step, lambda lines=lines: add(lines, "the killed one's " + 200 * "x"))  # type: ignore[misc]
        more, mark = texts(lines, mark)
        read_after, kept = [*begun, *more], texts(lines)[0]
        assert read_after == kept
        for i in range(2):
            add(lines, f"later {i}")
            more, mark = texts(lines, mark)
            read_after += more
        found = texts(lines)[0]
        assert read_after == found, (read_after, found)
        wanted = [*(f"turn {i}" for i in range(before)), "later 0", "later 1"]
        assert [text for text in found if "killed" not in text] == wanted
        assert sum("killed" in text for text in found) <= 1
        assert [session.name for session in sessions(folder / str(step))] == ["ana"]
        if not got_there:
            assert sum("killed" in text for text in kept) == 1
            answers.put(step)
            return


def remove_at_every_step(folder: Path, answers: Any) -> None:
    for step in range(0, 100_000, STRIDE):
        lines = TurnsFile.of(folder / str(step), "ana")
        add(lines, "turn 0")
        got_there = killed_at(step, lines.remove)
        assert texts(lines)[0] in ([["turn 0"], []] if got_there else [[]])
        add(lines, "later")
        assert texts(lines)[0][-1] == "later"
        if not got_there:
            answers.put(step)
            return
