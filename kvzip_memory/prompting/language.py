"""What an engine makes of a tokenizer: prompts, answers that keep to a grammar, and its part of a key; all of one moment.

A call takes one language and uses nothing else, so that whatever the tokenizer's owner does meanwhile, its ids, its text and its key
belong together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from kvzip_memory.errors import InputError, KVzipError
from kvzip_memory.prompting.encoding import added_tokens, knows_mistral
from kvzip_memory.prompting.guidance import Guidance
from kvzip_memory.prompting.owned import Owned
from kvzip_memory.prompting.prompts import PromptBuilder
from kvzip_memory.system.digests import digest


class Language:
    """Of a tokenizer as it is now.

    Args:
        tokenizer: the owner's, which is copied.
        template_kwargs: variables of the chat template.
        window: of the model.
        before: a language of what may be the same tokenizer.

    Raises:
        InputError: the tokenizer's chat template is none.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any], window: int, before: Language | None = None) -> None:
        self._owned: Owned = Owned(tokenizer, before._owned if before else None)
        self.tokenizer = self._owned.tokenizer
        self.prompts = _prompt_builder(self.tokenizer, template_kwargs, window)
        self._guidance: tuple[Any, Guidance | None] = (None, None)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The fields of a key that it decides."""
        return {"tokenizer": tokenizer_fingerprint(self.tokenizer), "template": digest(self.prompts.template)}

    def still(self, tokenizer: Any) -> bool:
        """Whether the owner has changed nothing since, see :meth:`Owned.same`."""
        return self._owned.same(tokenizer)

    def guidance(self, vocab_size: int, eos_ids: frozenset[int]) -> Guidance:
        """Makes grammars for a model of so many tokens, whose answers end in one of these."""
        wanted = (vocab_size, eos_ids)
        made, guidance = self._guidance
        if guidance is None or made != wanted:
            guidance = Guidance(self.tokenizer, vocab_size, eos_ids)
            self._guidance = (wanted, guidance)
        return guidance


def _prompt_builder(tokenizer: Any, template_kwargs: Mapping[str, Any], window: int) -> PromptBuilder:
    try:
        return PromptBuilder(tokenizer, template_kwargs, window)
    except KVzipError:
        raise
    except Exception as error:  # what a tokenizer and its template raise, in many kinds
        raise InputError(
            f"the tokenizer's chat_template {str(tokenizer.chat_template)[:80]!r} cannot be used ({error}); set it to another "
            "template's text, or to None for plain turns"
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of vocabulary, merges, added tokens and every setting that changes the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are written into the backend by calls that use them; ours never do.
        state = json.loads(backend.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
        if knows_mistral(tokenizer):  # whose vocabulary has one name for all tokens that end within a character
            state = {"model": _mistral_model(tokenizer.tokenizer.instruct_tokenizer.tokenizer), "class": type(tokenizer).__name__}
    return digest([state, sorted((i, str(t.content), t.special) for i, t in added_tokens(tokenizer).items())])


def _mistral_model(tokenizer: Any) -> str:
    """Hash of what turns texts into ids in one of mistral-common's, SentencePiece's or tekken."""
    model = tokenizer._model
    if hasattr(model, "serialized_model_proto"):
        return hashlib.sha256(model.serialized_model_proto()).hexdigest()
    return digest([model._pat_str, [tokenizer.id_to_byte_piece(i).hex() for i in range(tokenizer.n_words)]])
