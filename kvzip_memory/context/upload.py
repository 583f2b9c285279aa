"""From the host's memory to a GPU, layer by layer, beside what the GPU computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_memory.context.layers import RaggedLayer

#: Bytes of a piece on its way through page-locked memory; there are two of them.
PIECE = 16 << 20


class Arrival(NamedTuple):
    """A layer on its way.

    Attributes:
        layer: on the device; not to be read before :meth:`wait`.
        event: recorded behind its copy, None where nothing had to be waited for.
        source: what is copied from, kept until then.
    """

    layer: RaggedLayer
    event: torch.cuda.Event | None
    source: RaggedLayer

    def wait(self) -> RaggedLayer:
        """Let what is enqueued on the current stream from here on wait for the layer. The host does not wait."""
        if self.event is not None:
            torch.cuda.current_stream(self.layer.keys.device).wait_event(self.event)
        return self.layer


def upload(layers: Iterable[RaggedLayer], device: torch.device) -> Iterator[Arrival]:
    """Copy layers to ``device`` on a stream of their own, in the order in which they come.

    Page-locked layers are copied as they are, and the host goes on at once. Others go piece by piece through two
    page-locked buffers: one is filled while the other is on its way.

    Args:
        layers: may be a generator that reads a file; a layer is on its way before the next one is asked for.
        device: a CUDA device. On a CPU nothing is copied.
    """
    if device.type != "cuda":
        for layer in layers:
            yield Arrival(layer, None, layer)
        return
    stream, stage = torch.cuda.Stream(device), Stage(PIECE, device)
    for layer in layers:
        copies = []
        for tensor in layer.tensors():
            copy = torch.empty_like(tensor, device=device)  # on the current stream, which may still use this memory
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                if tensor.is_pinned():
                    copy.copy_(tensor, non_blocking=True)
                else:
                    stage.copy(tensor, copy)
            copy.record_stream(stream)
            copies.append(copy)
        yield Arrival(layer.having(copies), stream.record_event(), layer)


class Stage:
    """Two buffers, page-locked for a GPU, through which tensors go piece by piece."""

    def __init__(self, piece: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pieces = [torch.empty(piece, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Enqueue the copy of a contiguous tensor on the current stream. Its memory may be used again at once."""
        flat, goal = (tensor.view(-1).view(torch.uint8) for tensor in (source, target))
        for start in range(0, len(flat), len(self._pieces[0])):
            sent = self._sent[self._next]
            if sent is not None:
                sent.synchronize()
            part = flat[start : start + len(self._pieces[0])]
            piece = self._pieces[self._next][: len(part)]
            piece.copy_(part)
            goal[start : start + len(part)].copy_(piece, non_blocking=True)
            if self._cuda:
                self._sent[self._next] = torch.cuda.current_stream(target.device).record_event()
            self._next = 1 - self._next
