"""torch's modes of the calling thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain() -> Iterator[None]:
    """torch as it is by itself, whatever autocast or default device the caller is in: we say where and in what we compute.

    The model's own thread has no modes; this is for what is computed in the threads of callers.
    """
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield
