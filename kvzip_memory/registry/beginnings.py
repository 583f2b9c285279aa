"""Contexts found by what a prompt begins with, or by their text, in a time that does not grow with how many there are.

A context of n tokens is filed under the digest of its first p, p being the largest power of two that is not above n. A prompt has one such
digest for each power of two up to its length: some ten places to look at, in which are only contexts that share more than half of their
tokens with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def beginning(ids: Sequence[int] | np.ndarray) -> str:
    """What a context of these tokens is filed under."""
    return beginnings(ids)[-1] if len(ids) else ""


def beginnings(ids: Sequence[int] | np.ndarray) -> list[str]:
    """What the contexts that a prompt begins with may be filed under, the shortest first."""
    data, hasher, found = np.asarray(ids, dtype=np.int32), hashlib.sha256(), []
    for power in range(len(data).bit_length()):
        hasher.update(data[1 << power >> 1 if power else 0 : 1 << power].tobytes())
        found.append(f"{1 << power}:{hasher.hexdigest()[:16]}")
    return found
