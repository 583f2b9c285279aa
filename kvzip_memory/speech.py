"""The language an engine speaks now: a tokenizer may be changed by its owner at any time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvzip_memory.errors import InputError
from kvzip_memory.inference.ends import eos_ids
from kvzip_memory.inference.modeling import LanguageModel
from kvzip_memory.prompting.guidance import Guidance
from kvzip_memory.prompting.language import Language
from kvzip_memory.system.printable import brief


class Speech:
    """The language of a tokenizer as it is now, made anew when its owner has changed it.

    Args:
        model: which is told of the tokenizer in use.
        tokenizer: the owner's.
        template_kwargs: variables of the chat template.

    Raises:
        InputError: the tokenizer's chat template is none, or these are no variables.
    """

    def __init__(self, model: LanguageModel, tokenizer: Any, template_kwargs: Mapping[str, Any] | None) -> None:
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            raise InputError(f'template_kwargs is {brief(template_kwargs)}; give a mapping, such as {{"enable_thinking": False}}')
        self._model, self.tokenizer, self._template_kwargs = model, tokenizer, dict(template_kwargs or {})
        self._language = Language(tokenizer, self._template_kwargs, model.window)
        model.tokenizer = self._language.tokenizer

    @property
    def now(self) -> Language:
        """What is made of the tokenizer as it is now. Sessions keep the one they began with."""
        language = self._language
        if not language.still(self.tokenizer):
            language = self._language = Language(self.tokenizer, self._template_kwargs, self._model.window, language)
            self._model.tokenizer = language.tokenizer
        return language

    def forget(self) -> None:
        """Keep no text that was read."""
        self._language.prompts.forget()

    def guidance(self, language: Language) -> Guidance:
        """Makes grammars for answers of the model in a language."""
        model = self._model.model
        return language.guidance(model.config.vocab_size, eos_ids(model, language.tokenizer))
