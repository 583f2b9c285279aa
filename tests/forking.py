"""Children that are forked in a test, and what they say."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable


def forked(work: Callable[[], object]) -> tuple[int, int]:
    """A child that is forked now and does some work: its process and where it says what came of it, for :func:`outcome`."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    return child, reader


def outcome(child: tuple[int, int], wait_s: float = 60.0) -> str:
    """What a child has said, or the error that it ended with. One that hangs is killed."""
    process, reader = child
    said, deadline = b"", time.monotonic() + wait_s
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (piece := os.read(reader, 1 << 16)):
            break
        said += piece
    else:
        os.kill(process, signal.SIGKILL)
        said += b"it hangs"
    os.close(reader)
    os.waitpid(process, 0)
    return said.decode()
