"""The values that flow through everything: a compressed context and its layers. No behaviour beyond reading them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvzip_memory.checksums import PLAIN, Checksums
from kvzip_memory.errors import InputError
from kvzip_memory.sharing import Shared
from kvzip_memory.sources import as_path


@dataclass(frozen=True, eq=False)
class RaggedLayer:
    """The kept pairs of one layer, heads one after another, each head's pairs in the order of their positions.

    Attributes:
        keys: ``[sum(lengths), D]``, post-RoPE at their original positions, dtype of the model.
        values: ``[sum(lengths), D]``, dtype of the model.
        lengths: pairs kept by each KV head.
        positions: ``[sum(lengths)]`` int32, position of each pair in the context.
        scores: ``[sum(lengths)]`` fp16 importance in the same order (``inf``: protected), or None if never scored.
        window: the layer's sliding window in tokens, None for full attention. A sliding layer keeps exactly the
            pairs the next token can still see and is never compressed.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    scores: Tensor | None = None
    window: int | None = None
    offsets: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(accumulate(self.lengths, initial=0)))

    @property
    def n_heads(self) -> int:
        return len(self.lengths)

    def head(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one KV head, each ``[lengths[index], D]``: views, nothing is copied."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return self.keys[rows], self.values[rows]

    def heads(self) -> Tensor:
        """``[sum(lengths)]``, the KV head of each pair."""
        lengths = torch.tensor(self.lengths, device=self.positions.device)
        return torch.repeat_interleave(torch.arange(self.n_heads, device=lengths.device), lengths)

    def dense_scores(self, n: int) -> Tensor:
        """``[H, n]`` fp16 on the host, ``-inf`` where the pair is gone. The layer has scores."""
        assert self.scores is not None
        scores = torch.full((self.n_heads, n), float("-inf"), dtype=self.scores.dtype)
        scores[self.heads().cpu(), self.positions.long().cpu()] = self.scores.cpu()
        return scores

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors this layer owns."""
        scores = () if self.scores is None else (self.scores,)
        return (self.keys, self.values, self.positions, *scores)


@dataclass(frozen=True)
class Source:
    """One loaded document: its name, its metadata and the tokens it covers, ``[start, end)`` of the context.

    The name and the metadata are those of whoever loaded it. The text itself has no more than a name that is ``shown`` in a header.
    """

    name: str
    metadata: Mapping[str, Any]
    start: int
    end: int
    shown: bool = False


def as_told(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Sources as the text itself tells them, for those who share it: without what only their loader knows."""
    told = enumerate(sources, 1)
    return tuple(replace(source, name=source.name if source.shown else f"document {number}", metadata={}) for number, source in told)


@dataclass(frozen=True)
class Recipe:
    """What follows a context's tokens, cut from the chat template once and never rendered again.

    A first question is ``opening + tokens(separator + question) + closing``; every later one starts with
    ``next_turn`` in the place of opening and separator.

    Attributes:
        opening: ids between the context and the first question (a user header after a conversation, else empty).
        separator: plain text put before the first question.
        closing: ids that end a user's turn and open the assistant's.
        next_turn: ids that end an assistant's turn and open the user's.
        role: whose turn the context ends in.
        tools: digest of the tools that are described in the context, None without any.
        tail: the text's last characters, if their tokens depend on what follows: they are not in the context and are read with
            that. Mostly none, or a full stop.
        system: the system prompt in the context, which some templates look at to write what follows.
    """

    opening: tuple[int, ...]
    separator: str
    closing: tuple[int, ...]
    next_turn: tuple[int, ...]
    role: str = "user"
    tools: str | None = None
    tail: str = ""
    system: str = ""


@dataclass(frozen=True)
class Receipt:
    """What one call reused or built.

    Attributes:
        key: the context's key, None for an answer without a context.
        hit: whether a stored context was used.
        tier: where it lay: ``"device"``, ``"host"``, ``"disk"``, ``"built"`` when it had to be computed, or ``"none"``
            when the call used no context.
        reason: why there was no hit, None on a hit.
        differs: on a miss, the fields of the identity in which the nearest stored context of the same text differs.
        shrunk_from: the ratio of the stored context this one was cut from, None if it was stored as it is.
        nbytes: bytes of the context in memory.
        ms: milliseconds by stage (``wait``, ``load``, ``prefill``, ``score``, ``evict``, ``decode``, ...).
        read: tokens that this call read to build it: all of them, or those behind the context that it goes on from.
    """

    key: str | None
    hit: bool
    tier: str
    reason: str | None = None
    differs: tuple[str, ...] = ()
    shrunk_from: float | None = None
    nbytes: int = 0
    ms: Mapping[str, float] = field(default_factory=dict)
    read: int = 0


@dataclass(frozen=True)
class Lease:
    """A context's layers on the model's device, there for as long as the lease is held.

    Attributes:
        layers: one :class:`RaggedLayer` a layer.
        receipt: where they came from.
    """

    layers: tuple[RaggedLayer, ...]
    receipt: Receipt


@runtime_checkable  # pydantic models hold contexts
class Storage(Protocol):
    """Where a context's layers are: in its own hands (:class:`Resident`), or in a registry's.

    Attributes:
        nbytes: bytes of the layers' storages, each counted once.
        kept_pairs: pairs in the layers with full attention, over all their heads.
        full_heads: KV heads of the layers with full attention, over all of them.
        checksums: of the files that it is saved to.
    """

    nbytes: int
    kept_pairs: int
    full_heads: int
    checksums: Checksums

    def lease(self, key: str) -> AbstractContextManager[Lease]: ...


class Resident(Shared):
    """Layers that stay where they are for as long as the object lives."""

    _way_out = "save() the context that they belong to and open() the file"

    def __init__(self, layers: tuple[RaggedLayer, ...], checksums: Checksums = PLAIN) -> None:
        self.layers, self.checksums = layers, checksums
        full = [layer for layer in layers if layer.window is None]
        self.nbytes = storage_nbytes([t for layer in layers for t in layer.tensors()])
        self.kept_pairs = sum(sum(layer.lengths) for layer in full)
        self.full_heads = sum(layer.n_heads for layer in full)

    def lease(self, key: str) -> AbstractContextManager[Lease]:
        return nullcontext(Lease(self.layers, Receipt(key, hit=True, tier="device", nbytes=self.nbytes)))


@dataclass(frozen=True, repr=False, eq=False)
class CompressedContext(Shared):
    """A token prefix and what is left of its KV cache. Immutable: any number of sessions read one context at a time.

    A context loaded by an engine is a light handle: its pairs lie in the engine's registry, which may move them from
    the device to the host's memory and to disk between two answers, and brings them back for the next one. A context
    opened from a file by hand holds its pairs itself. A copy, deep or not, is the context itself.

    Attributes:
        key: content hash of everything that determines the bytes (see :mod:`kvzip_memory.registry.identity`).
        identity: the fields the key was made of.
        token_ids: ``[n]`` int32 on the host, the prefix the context stands for.
        storage: where the layers are.
        protected: the first so many positions are never evicted (template head and system prompt).
        ratio: the fraction of pairs that was asked for.
        dense_nbytes: storage of the uncompressed cache, measured while building.
        recipe: the ids that follow.
        sources: the loaded documents and the tokens each covers, with the names and metadata that this object was loaded with.
        name: the name given by the user; not part of the key.
        receipt: how this object came to be.
        created: when its text was read, seconds since the epoch; of one that was grown, the first of it. 0.0: not known.
        expires: when whoever stored it wanted it built anew, seconds since the epoch; None for never.
        coarsest: the smallest ratio at which it, or a context it was grown from, was compressed; 0.0: not known.
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
    def n_tokens(self) -> int:
        """Tokens the context stands for; a session's positions go on from here."""
        return int(self.token_ids.numel())

    @property
    def kept_pairs(self) -> int:
        """Pairs kept in the layers with full attention, over all their heads."""
        return self.storage.kept_pairs

    @property
    def total_pairs(self) -> int:
        """Pairs the same layers held before eviction."""
        return self.storage.full_heads * self.n_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all storages of the context, measured when it was built or read, each counted once."""
        return self.storage.nbytes + storage_nbytes([self.token_ids])

    def save(self, path: str | Path) -> Path:
        """Write the context to one safetensors file, atomically; an older file there is replaced only when done. If its engine has a
        secret, only one that has it can open the file.

        Raises:
            InputError: a path that no file can have.
            OSError: the file cannot be written; whatever was at ``path`` is still there.
        """
        from kvzip_memory.registry.files import write_context

        file = as_path(path, "path")
        if not file.name:
            raise InputError(f"path is {str(path)!r}, which names no file; give a file's")
        with self.lease() as lease:
            return write_context(replace(self, storage=Resident(lease.layers)), file, self.storage.checksums)

    def as_block(self) -> dict[str, str]:
        """A content block that stands for this context in a prompt: ``{"type": "file", "file_id": key}``."""
        return {"type": "file", "file_id": self.key}

    def __repr__(self) -> str:
        kept = 100 * self.kept_pairs / self.total_pairs
        return (
            f"<CompressedContext {self.name or self.key[:12]!r} {self.n_tokens:,} tokens, {kept:.1f} % kept, "
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


def storage_nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage counted once, whole."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
