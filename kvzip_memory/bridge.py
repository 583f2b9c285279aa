"""Calls that an event loop waits for, in threads of their own. One that is cancelled there ends within a token, or a chunk of a build."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing, closing, suppress
from functools import partial
from typing import Any, TypeVar

from kvzip_memory.inference.admission import Place, Places
from kvzip_memory.streaming import Stream
from kvzip_memory.system.calls import within

T = TypeVar("T")


async def pieces_of(make: Callable[[], Generator[T, None, None]], places: Places | Callable[[], Places]) -> AsyncGenerator[T, None]:
    """What a generator yields, run in a thread of its own with this task's context variables.

    The loop's own pool has a handful of threads, which would be the limit of what is decoded together, and may be full of what waits for
    us. What is yielded is kept for the loop, so answers are decoded in this thread. When the iteration is left, they are cancelled.

    Args:
        make: makes the generator.
        places: where it is run; or what gives them, in a thread, once weights are loaded.

    Raises:
        QueueFullError: as many run and wait there as may.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[T | None, BaseException | None, bool]]()
    left, streams, taken = threading.Event(), list[Stream](), list[tuple[Places, Place]]()

    def tell(piece: T | None, error: BaseException | None = None, ended: bool = False) -> None:
        if not left.is_set():
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(queue.put_nowait, (piece, error, ended))

    def started(stream: Stream) -> None:
        streams.append(stream.in_this_thread())
        if left.is_set():
            stream.cancel()

    def run(place: Place | None) -> None:
        if left.is_set():
            return
        try:
            with within(left, place, started), closing(make()) as pieces:
                for piece in pieces:
                    if left.is_set():
                        return
                    tell(piece)
            tell(None, ended=True)
        except BaseException as error:
            tell(None, error)

    context, failed = contextvars.copy_context(), partial(tell, None)

    def work(place: Place | None) -> None:
        context.run(run, place)

    def start(places: Places) -> None:
        taken.append((places, places.start(work, failed)))

    def start_in(places: Callable[[], Places]) -> None:
        try:
            start(places())
        except BaseException as error:
            tell(None, error)

    if isinstance(places, Places):
        start(places)
    else:
        threading.Thread(target=start_in, args=(places,), name="kvzip-load", daemon=True).start()
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
        for where, place in taken:
            where.withdraw(place)
        for stream in streams:
            stream.cancel()


async def result_of(places: Places | Callable[[], Places], work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What a function returns, run as by :func:`pieces_of`."""

    def once() -> Generator[T, None, None]:
        yield work(*args, **kwargs)

    async with aclosing(pieces_of(once, places)) as results:
        return await anext(results)


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """What a short coroutine gives that must not be left half done, such as by a database's client; a cancelled caller waits for it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
