"""What the integrations share: an engine made on first use, and answers that leave an event loop free."""

from __future__ import annotations

import asyncio
import contextvars
import os.path
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import SupportsIndex, TypeVar

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from kvzip_memory.engine import KVzipEngine
from kvzip_memory.session import Stream
from kvzip_memory.sharing import Shared
from kvzip_memory.sources import as_folder

T = TypeVar("T")


class LazyEngine(Shared):
    """One engine for all copies of a framework's model object, made by whichever needs it first. In another process it is made there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.engine: KVzipEngine | None = None

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[object], tuple[()]]:
        return type(self), ()

    def get(self, make: Callable[[], KVzipEngine]) -> KVzipEngine:
        """The engine; others wait while it is made. What fails is tried again by the next."""
        with self._lock:
            if self.engine is None:
                self.engine = make()
            return self.engine


class LazyEngines(Shared, dict[str, LazyEngine]):
    """Those of one model object and its copies, by what they are made of."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[object], tuple[()]]:
        return type(self), ()


def located(path: str) -> str:
    """A path on this machine, wherever the process goes later; a hub id stays what it is."""
    here = Path(os.path.expanduser(path))
    return str(here.absolute()) if here.exists() else path


def fixed_folder(folder: str | None) -> str | None:
    """A folder that may not be there yet, wherever the process goes later."""
    return None if folder is None else str(as_folder(folder, "cache_dir"))


def configured_window(model: str) -> int | None:
    """A model's window by its configuration on this machine; None if it is not here yet, or for a ``.gguf`` file."""
    with suppress(OSError, ValueError):
        # Not by local_files_only, with which huggingface_hub still connects, to learn what to call itself.
        file = os.path.join(model, "config.json") if os.path.isdir(model) else try_to_load_from_cache(model, "config.json")
        if isinstance(file, str):
            window: int | None = PreTrainedConfig.get_config_dict(os.path.dirname(file))[0].get("max_position_embeddings")
            return window
    return None


#: Told which stream an answer comes from, as soon as there is one.
Started = Callable[[Stream], None]


async def in_thread(
    pieces: Callable[[Started], Generator[T, None, None]], engine: KVzipEngine | None, load: Callable[[], KVzipEngine]
) -> AsyncGenerator[T, None]:
    """What a generator yields, run in a thread of its own with this task's context variables.

    The loop's own pool has a handful of threads, which would be the limit of what is decoded together. As many run at a time as
    the engine decodes; more wait, as many as there are. What is yielded is kept for the loop, so these threads decode themselves. When
    the iteration is left, the stream is cancelled.

    Args:
        pieces: makes the generator.
        engine: that answers, None while its weights are not loaded.
        load: loads them.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[T | None, BaseException | None, bool]]()
    left, streams = threading.Event(), list[Stream]()

    def tell(piece: T | None, error: BaseException | None = None, ended: bool = False) -> None:
        if not left.is_set():
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(queue.put_nowait, (piece, error, ended))

    def started(stream: Stream) -> None:
        streams.append(stream.in_this_thread())
        if left.is_set():
            stream.cancel()

    def run() -> None:
        if left.is_set():
            return
        try:
            with closing(pieces(started)) as generator:
                for piece in generator:
                    if left.is_set():
                        return
                    tell(piece)
            tell(None, ended=True)
        except BaseException as error:
            tell(None, error)

    work = partial(contextvars.copy_context().run, run)

    def begin(ready: KVzipEngine) -> None:
        ready.places.start(work)

    def load_first() -> None:
        try:
            begin(load())
        except BaseException as error:
            tell(None, error)

    if engine is not None:
        begin(engine)
    else:
        threading.Thread(target=load_first, name="kvzip-load", daemon=True).start()
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
        for stream in streams:
            stream.cancel()
