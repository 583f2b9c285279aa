"""What a framework's model object is elsewhere: pickled, or written down as a dictionary and made anew.

The name of a model whose engine was given is what its configuration happens to say, or a part of it. It tells what answered; it is
nothing to load a model by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvzip_memory.context import CompressedContext
from kvzip_memory.engine import KVzipEngine
from kvzip_memory.errors import NotPicklableError

# Stands for an engine where a model object is written down.
_HELD = "held by the process that wrote this"


def cannot_travel(kind: str) -> NotPicklableError:
    """What a process holds cannot go to another one; a model object of a name and options can, and loads where it arrives."""
    return NotPicklableError(
        f"a {kind} with an engine or a context cannot be pickled or sent to another process; make it there, or send one that has model= "
        "and a cache_dir instead of engine=, and beside it the context's key, for with_context"
    )


def written_down(data: Mapping[str, Any], engine: KVzipEngine | None, context: CompressedContext | None) -> dict[str, Any]:
    """A dump, which tells what it leaves out."""
    return {**data, **({} if engine is None else {"engine": _HELD}), **({} if context is None else {"context": context.key})}


def check_arrived(kind: str, values: Mapping[str, Any]) -> None:
    """What was written down without its engine or its context is not made of the rest.

    Raises:
        NotPicklableError: nobody has put them in again.
    """
    if any(isinstance(values.get(name), str) for name in ("engine", "given_engine")):
        raise NotPicklableError(
            f"this {kind} was written down without its engine, and its name, {values.get('model', values.get('model_name'))!r}, is none to "
            f"load it by; put the engine in again, {kind}(**dict(data, engine=engine)), or write down one that was made with model="
        )
    if isinstance(key := values.get("context"), str):
        raise NotPicklableError(
            f"this {kind} was written down with the key of its context, {key!r}; put the context in again, "
            f"{kind}(**dict(data, context=engine.get(key))), or make it without and use with_context"
        )


def still_held(kind: str, name: str, engine: object) -> KVzipEngine:
    """The engine that was given; weights are not loaded in the place of one that has been taken away.

    Raises:
        NotPicklableError: it is not there.
    """
    if not isinstance(engine, KVzipEngine):
        raise NotPicklableError(
            f"this {kind} has lost its engine, and its name, {name!r}, is none to load it by; make another with engine="
        )
    return engine
