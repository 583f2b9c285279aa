"""A compressed context, and where its pairs are."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kvzip_memory.context.facts import Part, Receipt, Recipe, Source, parts_of
from kvzip_memory.context.layers import NO_STATES, RaggedLayer, States, storage_nbytes
from kvzip_memory.errors import InputError
from kvzip_memory.system.paths import as_path
from kvzip_memory.system.sharing import Shared

Writer = Callable[["CompressedContext", Path], Path]
#: One :class:`RaggedLayer` for each layer of the model that has pairs.
Layers = tuple[RaggedLayer, ...]


def seen_from(layers: Layers, first: int) -> Layers:
    """Layers without pairs at positions below ``first``, see :meth:`RaggedLayer.seen_from`; what a window shows stays as it is."""
    return tuple(layer.seen_from(first) if layer.window is None else layer for layer in layers)


@dataclass(frozen=True)
class Lease:
    """A context's layers on the model's device, there for as long as the lease is held.

    Attributes:
        layers: the context's own.
        receipt: where they came from.
        states: what layers without attention remember.
        before: layers of the parts that it shares with others, which stand before its own, in their order. Of a layer with a window its own
            have all that the next token sees.
        shifts: how far each of :attr:`parts` has moved from where it was made, in positions; empty if none has.
        nearer: how much nearer to what follows each is seen than it stands then; empty if none is.
    """

    layers: Layers
    receipt: Receipt
    states: States = field(default_factory=dict)
    before: tuple[Layers, ...] = ()
    shifts: tuple[int, ...] = ()
    nearer: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[Layers, ...]:
        """Layers of all parts."""
        return (*self.before, self.layers)


@runtime_checkable  # pydantic models hold contexts
class Storage(Protocol):
    """Where a context's layers are: in its own hands (:class:`Resident`), or in a registry's.

    Attributes:
        nbytes: bytes of the layers' storages, each counted once; the context's own, as all that follows.
        shared_nbytes: the same of the parts that it shares with others.
        kept_pairs: pairs in the layers with full attention, over all their heads.
        full_heads: KV heads of the layers with full attention, over all of them.
        write: writes a context that holds its pairs itself to a file, atomically; None where there is nobody who does.
    """

    nbytes: int
    shared_nbytes: int
    kept_pairs: int
    full_heads: int
    write: Writer | None

    def lease(self, key: str) -> AbstractContextManager[Lease]: ...


class Resident(Shared):
    """Layers that stay where they are for as long as the object lives."""

    _way_out = "save() the context that they belong to and open() the file"

    def __init__(
        self,
        layers: Layers,
        write: Writer | None = None,
        states: States = NO_STATES,
        before: tuple[Layers, ...] = (),
        shifts: tuple[int, ...] = (),
        nearer: tuple[int, ...] = (),
    ) -> None:
        self.layers, self.write, self.states, self.before, self.shifts, self.nearer = layers, write, states, before, shifts, nearer
        full = [layer for layer in layers if layer.window is None]
        self.nbytes = storage_nbytes([*(t for layer in layers for t in layer.tensors()), *states.values()])
        self.shared_nbytes = storage_nbytes([t for part in before for layer in part for t in layer.tensors()])
        self.kept_pairs = sum(sum(layer.lengths) for layer in full)
        self.full_heads = sum(layer.n_heads for layer in full)

    def lease(self, key: str) -> AbstractContextManager[Lease]:
        receipt = Receipt(key, hit=True, tier="device", nbytes=self.nbytes)
        return nullcontext(Lease(self.layers, receipt, self.states, self.before, self.shifts, self.nearer))


@dataclass(frozen=True, repr=False, eq=False)
class CompressedContext(Shared):
    """A token prefix and what is left of its KV cache. Immutable: any number of sessions read one context at a time.

    A context loaded by an engine is a light handle: its pairs lie in the engine's registry, which may move them from
    the device to the host's memory and to disk between two answers, and brings them back for the next one. A context
    opened from a file by hand holds its pairs itself. A copy, deep or not, is the context itself.

    One that was grown with ``share`` has pairs of its own for what is new alone, and goes on behind those of other contexts, its parts.

    Attributes:
        key: content hash of everything that determines the bytes (see :mod:`kvzip_memory.registry.identity`).
        identity: the fields the key was made of.
        token_ids: ``[n]`` int32 on the host, the prefix the context stands for.
        storage: where the layers are.
        protected: the first so many positions are never evicted (template head and system prompt).
        ratio: the fraction of pairs that was asked for.
        dense_nbytes: storage of the uncompressed cache, measured while building; what its parts stand for does not count.
        recipe: the ids that follow.
        sources: the loaded documents and the tokens each covers, with the names and metadata that this object was loaded with.
        name: the name given by the user; not part of the key.
        receipt: how this object came to be.
        created: when its text was read, seconds since the epoch; of one that was grown, the first of it. 0.0: not known.
        expires: when whoever stored it wanted it built anew, seconds since the epoch; None for never.
        coarsest: the smallest ratio at which it, or a context it was grown from, was compressed; 0.0: not known.
        fitted: spans ``(start, end)`` of positions whose kept pairs were refitted, each once, to what attention over its block of the
            span and the protected head gave: one build's, or one for each extension, fold or piece. Others are those the model computed.
    """

    key: str
    identity: Mapping[str, Any]
    token_ids: Tensor
    storage: Storage
    protected: int
    ratio: float
    dense_nbytes: int
    recipe: Recipe
    sources: tuple[Source, ...] = ()
    name: str | None = None
    receipt: Receipt | None = None
    created: float = 0.0
    expires: float | None = None
    coarsest: float = 0.0
    fitted: tuple[tuple[int, int], ...] = ()

    _way_out = "give its key, which engine.get() finds in the same cache_dir, or save() it and open() the file"

    def lease(self) -> AbstractContextManager[Lease]:
        """The layers on the model's device, not moved or freed while the ``with`` block runs.

        Raises:
            BudgetError: no room for them on the device, since other answers use all of it.
        """
        return self.storage.lease(self.key)

    @property
    def layers(self) -> tuple[RaggedLayer, ...]:
        """The layers, brought to the device if they are not there. For looking at them; answers take a :meth:`lease`."""
        with self.lease() as lease:
            return lease.layers

    @property
    def states(self) -> States:
        """What layers without attention remember, brought to the device if it is not there; nothing for most models."""
        with self.lease() as lease:
            return lease.states

    @property
    def n_tokens(self) -> int:
        """Tokens the context stands for; a session's positions go on from here."""
        return int(self.token_ids.numel())

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it shares with other contexts, in the order in which it is seen; nothing for most."""
        return parts_of(self.identity)

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """What another context shares that shares all of this one: its parts and its own pairs, if there are any."""
        own = self.n_tokens - self.shared_tokens
        return (*self.parts, Part(self.key, own, self.shift, 0, self.saved, "again" in self.identity)) if own else self.parts

    @property
    def shift(self) -> int:
        """How far its own pairs have moved from where they were made, in positions."""
        return int(self.identity.get("shift", 0))

    @property
    def is_one(self) -> bool:
        """Whether what grows from it shares all of it: its own pairs have moved together, or stand among those of its parts."""
        return self.shift != 0 or "again" in self.identity

    @property
    def shifts(self) -> tuple[int, ...]:
        """The same of each of its parts and, last, of its own pairs; empty if nothing has moved."""
        shifts = (*(part.shift for part in self.parts), self.shift)
        return shifts if any(shifts) else ()

    @property
    def nearer(self) -> tuple[int, ...]:
        """How much nearer to what follows each of these is seen than it stands; empty if none is."""
        return (*(part.nearer for part in self.parts), self.saved) if self.saved else ()

    @property
    def saved(self) -> int:
        """Tokens that take no positions of the window for themselves: 0 but where documents were joined in shared positions."""
        return self.parts[0].nearer if self.parts else 0

    @property
    def positions(self) -> int:
        """How many positions of the model's window it takes: as many as it has tokens, but for those that are :attr:`saved`."""
        return self.n_tokens - self.saved

    @property
    def shared_tokens(self) -> int:
        """Tokens that its parts stand for; its own pairs are of those behind them, or of those that a join has read again."""
        return sum(part.n_tokens for part in self.parts)

    @property
    def is_shareable(self) -> bool:
        """Whether what conversations over it fold shares its pairs: of documents, which others may be over, too."""
        return bool(self.sources) and not self.parts

    @property
    def codec(self) -> str:
        """How its own pairs are written; ``"none"`` as the model computed them."""
        return str(self.identity.get("codec") or "none")

    @property
    def kept_pairs(self) -> int:
        """Its own pairs that are kept in the layers with full attention, over all their heads."""
        return self.storage.kept_pairs

    @property
    def total_pairs(self) -> int:
        """Pairs the same layers held before eviction."""
        return self.storage.full_heads * (self.n_tokens - self.shared_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages of its own, measured when it was built or read, each counted once."""
        return self.storage.nbytes + storage_nbytes([self.token_ids])

    @property
    def shared_nbytes(self) -> int:
        """Bytes of the parts that it shares with others."""
        return self.storage.shared_nbytes

    def save(self, path: str | Path) -> Path:
        """Write the context to one safetensors file, atomically, with the parts that it shares; an older file there is replaced only when
        done. If its engine has a secret, only one that has it can open the file.

        Raises:
            InputError: a path that no file can have.
            OSError: the file cannot be written; whatever was at ``path`` is still there.
        """
        file = as_path(path, "path")
        if not file.name:
            raise InputError(f"path is {str(path)!r}, which names no file; give a file's")
        write = self.storage.write
        if write is None:
            raise InputError(f"{self!r} was made by hand, and nothing is known of how to write it; load its text with an engine")
        with self.lease() as lease:
            resident = Resident(lease.layers, None, lease.states, lease.before, lease.shifts, lease.nearer)
            return write(replace(self, storage=resident), file)

    def as_block(self) -> dict[str, str]:
        """A content block that stands for this context in a prompt: ``{"type": "file", "file_id": key}``."""
        return {"type": "file", "file_id": self.key}

    def __repr__(self) -> str:
        told = f"{self.n_tokens:,} tokens" + (f" in {self.positions:,} positions" if self.saved else "")
        if not self.total_pairs:
            return f"<CompressedContext {self.name or self.key[:12]!r} {told} of {len(self.parts)} parts>"
        kept = 100 * self.kept_pairs / self.total_pairs
        own = f"{self.n_tokens - self.shared_tokens:,} of them its own, " if self.parts else ""
        codec = "" if self.codec in ("none", "fp16") or self.parts else f" as {reprlib.repr(self.codec)}"
        return (
            f"<CompressedContext {self.name or self.key[:12]!r} {told}, {own}{kept:.1f} % kept{codec}, "
            f"{self.nbytes / 1e6:.1f} MB of {self.dense_nbytes / 1e6:.1f} MB>"
        )


def checked_context(context: Any) -> CompressedContext:
    """Raises:
    InputError: it is no context.
    """
    if not isinstance(context, CompressedContext):
        raise InputError(
            f"{reprlib.repr(context)} is no context, but of type {type(context).__name__}; give what load(), get() or open() of the engine "
            "has returned"
        )
    return context
