"""What the integrations share: an engine made on first use, and answers that leave an event loop free."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing, suppress
from typing import TypeVar

from transformers import PreTrainedConfig

from kvzip_memory.engine import KVzipEngine

T = TypeVar("T")


class LazyEngine:
    """One engine for all copies of a framework's model object, made by whichever needs it first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.engine: KVzipEngine | None = None

    def get(self, make: Callable[[], KVzipEngine]) -> KVzipEngine:
        """The engine; others wait while it is made. What fails is tried again by the next."""
        with self._lock:
            if self.engine is None:
                self.engine = make()
            return self.engine


def configured_window(model: str) -> int | None:
    """A model's window by its configuration on this machine; None if it is not here yet, or for a ``.gguf`` file."""
    with suppress(OSError, ValueError):
        window: int | None = PreTrainedConfig.get_config_dict(model, local_files_only=True)[0].get("max_position_embeddings")
        return window
    return None


async def in_thread(pieces: Callable[[], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """What a generator yields, run in a thread of its own with this task's context variables.

    The loop's own pool has a handful of threads, which would be the limit of what is decoded together. When the
    iteration is left, the generator is closed behind the piece it is computing.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[T | None, BaseException | None, bool]]()
    left = threading.Event()

    def tell(piece: T | None, error: BaseException | None = None, ended: bool = False) -> None:
        if not left.is_set():
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(queue.put_nowait, (piece, error, ended))

    def run() -> None:
        try:
            with closing(pieces()) as generator:
                for piece in generator:
                    if left.is_set():
                        return
                    tell(piece)
            tell(None, ended=True)
        except BaseException as error:
            tell(None, error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="kvzip-answer", daemon=True).start()
    try:
        while True:
            piece, error, ended = await queue.get()
            if error is not None:
                raise error
            if ended:
                return
            yield piece  # type: ignore[misc]
    finally:
        left.set()
