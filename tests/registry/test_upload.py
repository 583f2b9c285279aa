"""Layers on their way to a device. What a GPU adds, streams and events, is measured by benchmarks/gpu.py."""

from collections.abc import Iterator

import pytest
import torch

from kvzip_memory.context import RaggedLayer
from kvzip_memory.context.upload import Stage, upload


@pytest.mark.parametrize("pairs", [1, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_goes_through_the_stage_piece_by_piece(pairs: int, dtype: torch.dtype) -> None:
    stage = Stage(256, torch.device("cpu"))  # smaller than most of the tensors, and no divisor of them
    for _ in range(3):
        source, target = torch.randn(pairs, 5).to(dtype), torch.empty(pairs, 5, dtype=dtype)
        stage.copy(source, target)
        assert torch.equal(source, target)


def test_layers_leave_one_by_one() -> None:
    """A layer is on its way before the next one is read."""
    asked: list[int] = []

    def reading() -> Iterator[RaggedLayer]:
        for i in range(3):
            asked.append(i)
            yield RaggedLayer(torch.randn(4, 8), torch.randn(4, 8), (1, 3), torch.arange(4, dtype=torch.int32))

    for i, arrival in enumerate(upload(reading(), torch.device("cpu"))):
        assert asked == list(range(i + 1))
        assert arrival.wait() is arrival.source
