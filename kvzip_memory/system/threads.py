"""torch's OpenMP threads: only the model's own thread is to keep some."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch


def release() -> None:
    """Let the calling thread's OpenMP threads go. They are made again, in 0.4 ms, when it next computes in parallel.

    GNU OpenMP, which torch for Linux brings along, keeps threads for every thread that has ever computed. Once there are
    more of them than processors, those that wait no longer spin but sleep at once, between any two operations: with a
    second thread that had only loaded the model, decode steps took 92 ms in place of 52, those of 32 rows 375 in place of 186.
    """
    library = _openmp()
    if library is not None:
        library.omp_pause_resource_all(1)  # omp_pause_soft; OpenMP 5.0


@cache
def _openmp() -> Any:
    """GNU OpenMP as torch has loaded it; None where it uses another, which waits in its own way."""
    for path in Path(torch.__file__).parent.glob("lib/libgomp*"):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        except OSError:
            continue
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
