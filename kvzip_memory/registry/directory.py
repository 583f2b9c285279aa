"""Contexts on disk, one file a key."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import torch

from kvzip_memory.context import CompressedContext
from kvzip_memory.errors import CorruptFileError
from kvzip_memory.registry.files import read_context, write_context

logger = logging.getLogger(__name__)


class ContextDirectory:
    """A folder of context files (``<key[:2]>/<key>.safetensors``), readable by its owner only.

    Several processes may share one: files appear whole, and one that fails its checks is set aside, never served.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def get(self, key: str, device: torch.device) -> tuple[CompressedContext | None, str | None]:
        """The context stored under ``key``, or None and the reason why it cannot be used."""
        path = self.path(key)
        try:
            context = read_context(path, device)
            if context.key != key:
                raise CorruptFileError(f"{path}: holds the context {context.key[:12]}")
        except FileNotFoundError:
            return None, "not stored"
        except OSError as error:
            logger.warning("cannot read stored context %s: %s", key[:12], error)
            return None, f"stored file unreadable: {error}"
        except CorruptFileError as error:
            aside = path.with_suffix(".corrupt")
            with suppress(OSError):  # another process has done it, or the folder is read-only
                os.replace(path, aside)
            logger.warning("%s; set aside as %s", error, aside.name)
            return None, f"stored file unusable: {error}"
        return context, None

    def put(self, context: CompressedContext) -> Path | None:
        """Store a context. A disk that cannot be written costs a warning and the reuse, not the context."""
        path = self.path(context.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return write_context(context, path)
        except OSError as error:
            logger.warning("cannot store context %s: %s; it is served from memory", context.key[:12], error)
            return None
