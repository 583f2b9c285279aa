"""The tiers in memory: contexts on the device and in the host's RAM, each under a hard budget of bytes."""

from __future__ import annotations

import ctypes
import mmap
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvzip_memory.context import CompressedContext, Resident
from kvzip_memory.context.upload import upload
from kvzip_memory.registry.beginnings import beginning
from kvzip_memory.registry.identity import family_of
from kvzip_memory.system.printable import logger_of

logger = logger_of(__name__)


@dataclass(eq=False)
class Held:
    """A context in a tier of memory.

    Attributes:
        context: it holds its pairs itself.
        group: digest of its text and tenant.
        uses: who reads or moves it now; it is neither moved by others nor freed while there are any.
        names: the names it was loaded under, and when that was last, in seconds since the epoch.
        tags: those it was loaded with here, and when, in seconds since the epoch.
        pinned: never lost.
        room: of one that is no longer found: its bytes are counted until its users have ended.
        used: seconds since the epoch of the last use.
        loaded: seconds since the epoch when it was last loaded here, which an answer from it is not.
        stored: seconds since the epoch when it was last written to disk or read from there, None for never.
    """

    context: CompressedContext
    group: str
    names: dict[str, float] = field(default_factory=dict)
    tags: dict[str, float] = field(default_factory=dict)
    pinned: bool = False
    room: Room | None = None
    used: float = field(default_factory=time.time)
    loaded: float = field(default_factory=time.time)
    stored: float | None = None
    uses: weakref.WeakSet[Use] = field(default_factory=weakref.WeakSet)

    @property
    def key(self) -> str:
        return self.context.key

    @property
    def users(self) -> int:
        return len(self.uses)

    def __post_init__(self) -> None:
        self.nbytes = self.context.nbytes  # the same in every tier
        self.parts = {part.key for part in self.context.parts}
        self.family = family_of(self.context.identity)
        self.beginning = beginning(self.context.token_ids.numpy())


class Use:
    """Somebody who reads or moves a context. Of none at first, so that a scope can be around it before there is one.

    It counts for as long as the object is there: what is not ended, for whatever reason, ends with the frame that had it.
    """

    held: Held | None = None

    def begin(self, held: Held) -> None:
        held.uses.add(self)
        self.held = held

    def end(self) -> Held | None:
        """The context that was used, None if there was none or it has ended before."""
        held, self.held = self.held, None
        if held is not None:
            held.uses.discard(self)
        return held


class Room:
    """Bytes of a tier that are kept for a context on its way there; none at first. Like a :class:`Use`, it goes with its frame."""

    nbytes = 0


class Filing:
    """The contexts of a tier of memory, by their texts and beginnings."""

    def __init__(self, held: Iterable[Held] = ()) -> None:
        self._files: dict[tuple[str, ...], dict[str, Held]] = {}
        for each in held:
            self.add(each)

    def add(self, held: Held) -> None:
        for place in self._places(held):
            self._files.setdefault(place, {})[held.key] = held

    def discard(self, held: Held) -> None:
        for place in self._places(held):
            file = self._files.get(place, {})
            file.pop(held.key, None)
            if not file:
                self._files.pop(place, None)

    def of_text(self, group: str) -> list[Held]:
        """Contexts of one text and tenant."""
        return list(self._files.get((group,), {}).values())

    def begun_with(self, family: str, begun: Iterable[str]) -> Iterator[Held]:
        """Contexts of one model and tenant that are filed under one of these beginnings."""
        for each in begun:
            yield from self._files.get((family, each), {}).values()

    def _places(self, held: Held) -> tuple[tuple[str, ...], ...]:
        return (held.group,), (held.family, held.beginning)


class MemoryTier:
    """Contexts in the order of their last use. Not locked: the registry does that.

    Attributes:
        budget: bytes it may hold, None for no limit.
        held: contexts by key.
        filing: the same by their beginnings and texts.
        reserved: bytes of contexts that are arriving.
        nbytes: bytes of all of them.
    """

    def __init__(self, name: str, budget: int | None) -> None:
        self.name, self.budget = name, budget
        self.held: OrderedDict[str, Held] = OrderedDict()
        self.filing = Filing()
        self._rooms: weakref.WeakSet[Room] = weakref.WeakSet()
        self._settled = 0

    @property
    def reserved(self) -> int:
        return sum(room.nbytes for room in self._rooms)

    @property
    def nbytes(self) -> int:
        return self._settled + self.reserved

    def keep(self, room: Room, nbytes: int) -> None:
        """Keep bytes for a context that arrives."""
        room.nbytes = nbytes
        self._rooms.add(room)

    def give_back(self, room: Room) -> None:
        self._rooms.discard(room)

    def add(self, held: Held, room: Room) -> None:
        """Take in a context, into the room that was kept for it."""
        self._rooms.discard(room)
        self.filing.add(held)
        self.held[held.key] = held
        self._settled += held.nbytes

    def take(self, held: Held) -> None:
        """Take a context out, if it is there; its bytes are free."""
        if self.held.get(held.key) is held:
            del self.held[held.key]
            self._settled -= held.nbytes
            self.filing.discard(held)

    def recount(self) -> None:
        """Count and file the contexts anew."""
        self._settled = sum(held.nbytes for held in self.held.values())
        self.filing = Filing(self.held.values())

    def has_room(self, nbytes: int) -> bool:
        return self.budget is None or self.nbytes + nbytes <= self.budget

    def victim(self, may_leave: Callable[[Held], bool]) -> Held | None:
        """The least recently used context that nobody reads and that may leave."""
        return next((held for held in self.held.values() if held.users == 0 and may_leave(held)), None)


def settle(device: MemoryTier, host: MemoryTier, where: torch.device) -> None:
    """After a failure, wherever it was: a context is in one tier, where its pairs are, and the sums are those of what lies there."""
    for key, held in [*host.held.items(), *device.held.items()]:
        apart = where.type != "cpu"  # else both tiers are in one memory, and a context may be in either
        right = device if key in device.held and not apart else host if _device(held.context).type == "cpu" else device
        for tier in (device, host):
            if tier is not right:
                tier.held.pop(key, None)
        right.held.setdefault(key, held)
    for tier in (device, host):
        tier.recount()


def to_device(context: CompressedContext, device: torch.device) -> CompressedContext:
    """The context with its layers on ``device``; the same object if they are there."""
    if _device(context) == device:
        return context
    resident = _resident(context)
    layers = tuple(arrival.wait() for arrival in upload(resident.layers, device))
    states = {name: state.to(device) for name, state in resident.states.items()}
    _synchronize(device)  # whoever gives the context may free it
    return replace(context, storage=Resident(layers, states=states))


def to_host(context: CompressedContext) -> CompressedContext:
    """The context in the host's memory; the same object if it is there."""
    return context if _device(context).type == "cpu" else packed(context)


def packed(context: CompressedContext) -> CompressedContext:
    """A copy of the context in one piece of page-locked host memory of exactly its size.

    torch's own pinned memory comes in powers of two, up to twice what is needed. This is an anonymous mapping that is
    registered with the driver, and given back when the last tensor is gone.
    """
    resident = _resident(context)
    tensors = [*(t for layer in resident.layers for t in layer.tensors()), *resident.states.values()]
    sizes = {id(t): t.numel() * t.element_size() for t in tensors}
    buffer, views, start = _page_locked(sum(sizes.values())), {}, 0
    for tensor in sorted(tensors, key=lambda t: -t.element_size()):  # so that no gaps are needed
        views[id(tensor)] = buffer[start : start + sizes[id(tensor)]].view(tensor.dtype).view(tensor.shape)
        start += sizes[id(tensor)]
    for tensor in tensors:
        views[id(tensor)].copy_(tensor, non_blocking=True)
    _synchronize(_device(context))
    layers = tuple(layer.having([views[id(tensor)] for tensor in layer.tensors()]) for layer in resident.layers)
    states = {name: views[id(state)] for name, state in resident.states.items()}
    return replace(context, storage=Resident(layers, states=states))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident(context: CompressedContext) -> Resident:
    assert isinstance(context.storage, Resident), "tiers hold contexts that hold their pairs themselves"
    return context.storage


def _device(context: CompressedContext) -> torch.device:
    return _resident(context).layers[0].keys.device


def _page_locked(nbytes: int) -> Tensor:
    """``[nbytes]`` uint8, page-locked if the driver agrees."""
    mapping = mmap.mmap(-1, max(nbytes, 1))
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    if torch.cuda.is_available():
        cudart = torch.cuda.cudart()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        if int(cudart.cudaHostRegister(address, len(mapping), 0)) == 0:
            weakref.finalize(mapping, cudart.cudaHostUnregister, address)
        else:
            logger.warning("the driver does not lock %d bytes of host memory; contexts come back slower", nbytes)
    return buffer[:nbytes]
