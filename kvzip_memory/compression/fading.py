"""How the model's attention to a text fades while more is read behind it.

A pair's score is of the distance from which the text was repeated, so scores of a text that has grown are not comparable with those of
what came behind it: of one build of 2,000 tokens the last tenth keeps twice what the first does, of ten pieces each kept the same, at
twice the KL. So the scores of what was there fade as the text grows, by a curve measured of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 2.0**-24  # what is less is zero in fp16, as which scores are stored


@dataclass(frozen=True)
class Fading:
    """Of a model.

    Attributes:
        distances: in tokens, rising; of fewer than two nothing fades.
        logs: of the score of the same pair from these distances.
    """

    distances: tuple[float, ...]
    logs: tuple[float, ...]

    @classmethod
    def of(cls, distances: Sequence[int], scores: Sequence[Tensor]) -> Fading:
        """The curve of scores ``[L, H, m]`` of the same pairs from each distance: of their geometric mean over all heads.

        Curves of each head or layer gave twice the KL, as did the mean, which a few pairs decide. Where scores are not finite nothing is
        known.
        """
        logs = [scored.clamp_min(_LEAST).log().mean().item() for scored in scores]
        known = [pair for pair in zip(map(float, distances), logs, strict=True) if math.isfinite(pair[1])]
        return cls(tuple(distance for distance, _ in known), tuple(log for _, log in known))

    def between(self, start: int, n: int) -> Tensor:
        """``[start]`` fp32: what scores of a text of ``start`` tokens, by position, are to be multiplied by when it has n."""
        positions = torch.arange(start)
        return (self._log(n - positions) - self._log(start - positions)).exp()

    def _log(self, distance: Tensor) -> Tensor:
        """Linear between what was measured, over the logarithm of the distance; no farther."""
        known, logs = (torch.tensor(numbers, dtype=torch.float32) for numbers in (self.distances, self.logs))
        known = known.log()
        if len(known) < 2:
            return torch.zeros(len(distance), dtype=torch.float32)
        x = distance.float().log().clamp(known[0], known[-1])
        i = torch.searchsorted(known, x, right=True).sub(1).clamp(0, len(known) - 2)
        return torch.lerp(logs[i], logs[i + 1], (x - known[i]) / (known[i + 1] - known[i]))
