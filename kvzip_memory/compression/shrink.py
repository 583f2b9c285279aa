"""From a stored context to one of a smaller ratio: drop pairs in the order of their scores. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvzip_memory.compression.allocators import ALLOCATORS, Allocator
from kvzip_memory.compression.choosing import choose
from kvzip_memory.context import CompressedContext, RaggedLayer, Resident
from kvzip_memory.system.digests import same
from kvzip_memory.system.modes import plain


def obstacle(identity: Mapping[str, Any]) -> str | None:
    """Why a context of this identity cannot be cut from one of a larger ratio; None if it can."""
    if identity.get("parts"):
        return "it shares pairs with another context"
    if identity.get("refit") is not None:
        return "pairs are fitted to those that were evicted"
    if identity.get("compress_every") is not None:
        return "it is compressed in pieces, before everything is read"
    return "its allocator is not registered as one whose choices are nested" if _allocator(identity) is None else None


def _allocator(identity: Mapping[str, Any]) -> Allocator | None:
    """The one that is registered under its name in a context's identity, says the same of itself, and makes nested choices."""
    told = identity.get("allocator")
    name = told.get("name") if isinstance(told, Mapping) else told
    if name not in ALLOCATORS:
        return None
    try:
        allocator = ALLOCATORS.of(name)
        nested = getattr(allocator, "nested", False) is True and same(ALLOCATORS.identity(allocator), told)
    except Exception:  # what others have registered cannot be made, or is none
        return None
    return allocator if nested else None


@plain()
def shrink(context: CompressedContext, key: str, identity: Mapping[str, Any]) -> CompressedContext | None:
    """The context a build at ``identity["ratio"]`` would give, cut from one built at a larger ratio.

    Scores were rounded to fp16 before the first choice was made, and the allocator is the same, so the pairs are the
    same. None if it cannot be told: not if :func:`obstacle` says why, without scores, or if a share of a layer is larger than what is
    left of it (the shares of ``per_layer`` and ``uniform`` are rounded).

    Raises:
        ModelError: an allocator of others gave something else than it owes.
    """
    allocator = _allocator(identity)
    if allocator is None or obstacle(identity) is not None:
        return None
    with context.lease() as lease:
        layers, states = lease.layers, {name: state.clone() for name, state in lease.states.items()}
    full = [i for i, layer in enumerate(layers) if layer.window is None]
    if any(layers[i].scores is None for i in full):
        return None
    n = context.n_tokens
    scores = torch.stack([layers[i].dense_scores(n) for i in full])
    keep = choose(allocator, scores, identity["ratio"], context.protected)
    if bool((keep & scores.isneginf()).any()):
        return None
    kept = dict(zip(full, keep, strict=True))
    cut = tuple(_cut(layer, kept[i]) if i in kept else _copied(layer) for i, layer in enumerate(layers))
    ratio: float = identity["ratio"]
    coarsest = min(ratio, context.coarsest)
    return replace(
        context, key=key, identity=dict(identity), ratio=ratio, coarsest=coarsest, storage=Resident(cut, states=states), receipt=None
    )


def _cut(layer: RaggedLayer, keep: Tensor) -> RaggedLayer:
    """The pairs of ``keep`` ``[H, n]``, copied so that the rest can be freed."""
    rows = keep[layer.heads().cpu(), layer.positions.long().cpu()].nonzero().squeeze(1).to(layer.keys.device)
    assert layer.scores is not None
    return RaggedLayer(*layer.pick(rows), tuple(keep.sum(1).tolist()), layer.positions[rows], layer.scores[rows])


def _copied(layer: RaggedLayer) -> RaggedLayer:
    """A sliding layer, free of the storage it shares with what is dropped."""
    return layer.having([tensor.clone() for tensor in layer.tensors()])
