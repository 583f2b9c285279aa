"""What the integrations share: an engine made on first use."""

from __future__ import annotations

import os.path
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, SupportsIndex

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from kvzip_memory.context import CompressedContext, checked_context
from kvzip_memory.engine import KVzipEngine
from kvzip_memory.errors import InputError
from kvzip_memory.frameworks.hidden import told
from kvzip_memory.inference.admission import Places
from kvzip_memory.system.digests import digest
from kvzip_memory.system.forks import after_fork
from kvzip_memory.system.paths import as_folder
from kvzip_memory.system.sharing import Shared

#: What a framework's model answers from, see :func:`given_context`.
Given = CompressedContext | str | Sequence[CompressedContext | str] | None


class LazyEngine(Shared):
    """One engine for all copies of a framework's model object, made by whichever needs it first; another one in each process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.engine: KVzipEngine | None = None
        after_fork(self, LazyEngine.__init__)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[object], tuple[()]]:
        return type(self), ()

    def get(self, make: Callable[[], KVzipEngine]) -> KVzipEngine:
        """The engine; others wait while it is made. What fails is tried again by the next."""
        with self._lock:
            if self.engine is None:
                self.engine = make()
            return self.engine


class LazyEngines(Shared, dict[str, LazyEngine]):
    """Those of one model object and its copies, by what they are made of: copies of other options have other engines."""

    def of(self, model: str, cache_dir: str | None, options: dict[str, Any]) -> LazyEngine:
        """The engine of a model and these options, which :mod:`~kvzip_memory.frameworks.hidden` may hide; nothing of them can be read
        here.
        """
        return self.setdefault(digest([model, cache_dir, told(options)]), LazyEngine())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[object], tuple[()]]:
        return type(self), ()


def places_of(model: Any) -> Places | Callable[[], Places]:
    """Threads for answers that an event loop waits for; or what gives them, in a thread, once the weights are loaded."""
    engine: KVzipEngine | None = model._ready
    return engine.places if engine is not None else lambda: model.engine.places


def loads_of(model: Any) -> Places | Callable[[], Places]:
    """:func:`places_of` for everything else that an event loop waits for."""
    engine: KVzipEngine | None = model._ready
    return engine.loads if engine is not None else lambda: model.engine.loads


def given_context(model: Any, given: Any) -> CompressedContext | None:
    """What a framework's model is to answer from: nothing, a context, the one of a name, or several of them as one.

    Raises:
        InputError: nothing is stored under a name, one is no context, or as for :meth:`KVzipEngine.join`.
        WindowError: together they do not fit into the window.
    """
    if isinstance(given, str):
        return model.engine.get(given)
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        return None if given is None else checked_context(given)
    several = [one if isinstance(one, str) else checked_context(one) for one in given]
    if not several:
        raise InputError("no context is given; give one or several, or None to answer from nothing")
    return model.engine.one_context(several)


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
            config: dict[str, Any] = PreTrainedConfig.get_config_dict(os.path.dirname(file))[0]
            window: int | None = (config.get("text_config") or config).get("max_position_embeddings")
            return window
    return None
