"""Bytes that a context takes, told before it is built, and the ratio at which it takes so many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvzip_memory.compression.codecs import Codec
from kvzip_memory.compression.ratios import pairs_kept
from kvzip_memory.errors import InputError
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.registry import parse_bytes
from kvzip_memory.system.printable import brief

#: The smallest ratio that a budget is met by. With less, hardly any answer is right.
SMALLEST_RATIO = 0.02
#: A ratio that was found for a budget is rounded down to a multiple.
_STEP = 1e-4


@dataclass(frozen=True)
class Sizes:
    """Of contexts of one model and codec.

    Args:
        model: what makes them.
        codec: what writes their pairs.
    """

    model: LanguageModel
    codec: Codec

    def nbytes(self, n_tokens: int, protected: int, ratio: float, shared: int = 0, pinned: int = 0) -> int:
        """Bytes of a context of so many tokens, of which the ``protected`` ones are kept whole, ``pinned`` ones as part of the ratio, and
        ``shared`` ones have no own pairs."""
        model, dtype = self.model, self.model.model.dtype
        layers = [
            (window, n_heads, self.codec.nbytes(dtype, dim)[0] + (0 if model.layout.latent else self.codec.nbytes(dtype, dim_v)[1]) + 4)
            for window, (n_heads, dim, dim_v) in zip(model.windows, model.kinds, strict=True)
        ]
        full = [(n_heads, pair) for window, n_heads, pair in layers if window is None]
        sliding = sum(n_heads * window.left(n_tokens) * pair for window, n_heads, pair in layers if window is not None)
        heads, whole = sum(n_heads for n_heads, _ in full), max(0, protected - shared)
        kept = max(pairs_kept(ratio, n_tokens - shared, whole, heads), heads * (whole + pinned))
        states = sum(map(math.prod, model.state_shapes.values())) * dtype.itemsize
        return round(kept * (full[0][1] + (2 if ratio < 1.0 else 0)) + sliding) + states + 4 * n_tokens

    def dense_nbytes(self, n_tokens: int) -> int:
        """Bytes of all pairs of so many tokens in 16 bits."""
        model = self.model
        numbers = [n_heads * (dim if model.layout.latent else dim + dim_v) for n_heads, dim, dim_v in model.kinds]
        seen = [n_tokens if window is None else window.left(n_tokens) for window in model.windows]
        return sum(2 * n * each for n, each in zip(seen, numbers, strict=True))

    def ratio_within(self, nbytes: Any, n_tokens: int, protected: int, keep: Sequence[tuple[int, int]] = ()) -> float:
        """The largest ratio at which a context takes ``nbytes`` at most.

        Args:
            nbytes: a number of bytes, a text such as ``"20MB"``, or a fraction below 1 of :meth:`dense_nbytes`.
            keep: spans of tokens that are never evicted either.

        Raises:
            InputError: it is none of these, or is less than the context takes at :data:`SMALLEST_RATIO`.
        """
        budget, pinned = self._budget(nbytes, n_tokens), len({i for span in keep for i in range(max(span[0], protected), span[1])})
        taken = partial(self.nbytes, n_tokens, protected, pinned=pinned)
        if taken(1.0) <= budget:
            return 1.0
        least, most = round(SMALLEST_RATIO / _STEP), round(1 / _STEP)
        if (needed := taken(least * _STEP)) > budget:
            raise InputError(
                f"nbytes is {brief(nbytes)}, {budget:,} bytes, and a text of {n_tokens:,} tokens takes {needed:,} at a ratio of "
                f"{SMALLEST_RATIO}, the smallest{', with what it is to keep' if pinned else ''}; give more, another codec, or less text"
            )
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if taken(middle * _STEP) <= budget else (least, middle)
        return round(least * _STEP, 4)

    def _budget(self, nbytes: Any, n_tokens: int) -> int:
        with suppress(TypeError, ValueError, OverflowError):
            if 0 < (fraction := float(nbytes)) < 1:
                return int(fraction * self.dense_nbytes(n_tokens))
        if isinstance(nbytes, int | str) and not isinstance(nbytes, bool):
            with suppress(InputError):
                if budget := parse_bytes("nbytes", nbytes):
                    return budget
        raise InputError(
            f'nbytes is {brief(nbytes)}; give bytes, a size such as "20MB", or a fraction below 1 of a dense cache of 16 bits, such as 0.1 '
            "(all of it is ratio=1.0)"
        )
