"""Building: what a context is made of, and the key of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from kvzip_memory.inference.weights import weights_identity
from kvzip_memory.prompting.prompt import Prompt
from kvzip_memory.registry import identity
from kvzip_memory.registry.identity import key_of, recipe_digest, tokens_digest
from kvzip_memory.system.digests import digest


def model_identity(model: PreTrainedModel, weights: str | None = None) -> dict[str, Any]:
    """Those of :data:`~kvzip_memory.registry.identity.MODEL_FIELDS` that a model in memory decides.

    Args:
        weights: their fingerprint; None has them read (measured: about 0.6 s a GB on one CPU core).
    """
    return {"format": identity.FORMAT, **weights_identity(model, weights)}


def context_identity(
    model_fields: Mapping[str, Any],
    prompt: Prompt,
    ratio: float,
    scorer: Mapping[str, Any],
    allocator: str,
    tenant: str | None = None,
    parent: Mapping[str, Any] | None = None,
    compress_every: int | None = None,
) -> dict[str, Any]:
    """All fields that determine a context's bytes, what may follow it, and who may use it.

    Args:
        tenant: a digest, see :func:`tenant_digest`.
        compress_every: size of the pieces it is built in, None if in one.
        parent: identity of the context it was grown from. If that has scores, this one has them at any ratio.
    """
    scored = ratio < 1.0 or (parent is not None and parent.get("scorer") is not None)
    return {
        **model_fields,
        "text": prompt.text_digest,
        "system": prompt.system_digest,
        "keep": digest(prompt.keep) if prompt.keep and scored else None,
        "ratio": ratio,
        "scorer": dict(scorer) if scored else None,
        "allocator": allocator if scored else None,
        "compress_every": compress_every,
        "tenant": tenant,
        "tokens": tokens_digest(prompt.token_ids),
        "protected": prompt.protected,
        "recipe": recipe_digest(prompt.recipe),
        "tools": prompt.recipe.tools,
        "parent": None if parent is None else key_of(parent),
    }
