"""Which ids end an answer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer, as model and tokenizer say now."""
    ids: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        ids.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(ids)
