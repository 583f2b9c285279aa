"""What a chat model is made with: its settings, the engine that they say, and how both travel."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self, SupportsIndex

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import BaseMessage
from pydantic import ConfigDict, Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator

from kvzip_memory import CompressedContext, KVzipEngine, __version__
from kvzip_memory.frameworks.engines import LazyEngine, LazyEngines, configured_window, fixed_folder, located
from kvzip_memory.frameworks.hidden import Options, revealed
from kvzip_memory.frameworks.options import CALL_OPTIONS, for_fields, sampling
from kvzip_memory.frameworks.travel import cannot_travel, check_arrived, still_held, written_down
from kvzip_memory.prompting.forms import FORMS

# Arguments that LangChain's chat models have for servers.
_FOR_SERVERS = {"api_key", "base_url", "max_retries", "timeout"}


class Witness(Protocol):
    """Is told of the calls of a model and its copies."""

    def asked(self, messages: list[BaseMessage]) -> None: ...

    def answered(self) -> None: ...


class ChatModelSettings(BaseChatModel):
    """Settings of a chat model, which are told at its making where they are wrong, and the engine that they say.

    Raises:
        ValidationError: unknown settings, or values that cannot be.
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True, hide_input_in_errors=True)

    model_name: str = Field(default="", alias="model")
    """Hub id, local folder or ``.gguf`` file; not needed with an ``engine``."""
    given_engine: KVzipEngine | None = Field(default=None, alias="engine", exclude=True, repr=False)
    """Share an engine; its ratio and cache folder apply."""
    context: CompressedContext | None = Field(default=None, exclude=True)
    """What is answered from; set it with :meth:`with_context`."""
    behind: bool = Field(default=False, exclude=True)
    """Whether messages always come behind it; set with it."""
    ratio: float | None = None
    """Fraction of key-value pairs kept by what this model loads; None is the engine's, 0.3."""
    reuse: bool = True
    """Whether a prompt without a context is answered from the longest stored one that it begins with and that keeps ``ratio``; an option
    of every call, too."""
    cache_dir: str | None = None
    """Contexts are stored there and found again by later processes."""
    temperature: float = 0.0
    max_tokens: int = 1024
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    streaming: bool = False
    """Whether :meth:`invoke` streams to callbacks."""
    tool_call_parser: str = "auto"
    """How the model writes calls: ``"hermes"``, ``"llama3"``, ``"mistral"``, ``"mistral-ids"``, ``"mistral-args"``, or ``"auto"``, what its
    chat template says."""
    contexts_by_name: bool = False
    """Whether messages may bring contexts by their names and by the first digits of their keys, too, not by whole keys only."""
    model_kwargs: Options = Field(default_factory=dict, repr=False)
    """Further arguments of :meth:`KVzipEngine.from_pretrained`; tokens, a ``tenant`` and other secrets are held as ``SecretStr``."""

    engines: Any = Field(default_factory=LazyEngines, exclude=True, repr=False)
    """Engines made on first use; copies share them, also those that LangChain makes for ``configurable_fields``."""

    _witness: Witness | None = PrivateAttr(default=None)
    _held: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = for_fields(values)
        check_arrived(cls.__name__, values)
        known = {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
        if unknown := sorted(values.keys() - known - _FOR_SERVERS):
            raise ValueError(f"options {unknown} are unknown; arguments of KVzipEngine.from_pretrained go into model_kwargs")
        return values

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if not self.model_name and self.given_engine is None:
            raise ValueError("give model= (a hub id, a folder or a .gguf file) or engine=")
        self._sampling({})  # tells what is wrong with a field
        self._held = self.given_engine is not None
        if self.tool_call_parser not in ("auto", *FORMS):
            raise ValueError(f"tool_call_parser is {self.tool_call_parser!r}; use auto, {', '.join(FORMS)}")
        if not self.model_name and self.given_engine is not None:
            name = str(self.given_engine.model.config.name_or_path or self.given_engine.model.config.model_type)
            self.model_name = Path(name).name if os.path.isdir(name) else name
        elif self.given_engine is None:  # loaded later, perhaps from elsewhere
            self.model_name, self.cache_dir = located(self.model_name), fixed_folder(self.cache_dir)
        return self

    @model_validator(mode="after")
    def _add_kvzip_version(self) -> Self:
        self._add_version("kvzip-memory", __version__)
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if self.given_engine is not None or self.context is not None:
            raise cannot_travel(type(self).__name__)
        return super().__reduce_ex__(protocol)

    @model_serializer(mode="wrap")
    def _dumped(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was written down without its engine or context cannot be made of the dump alone."""
        return written_down(handler(self), self.given_engine, self.context)

    @property
    def _lazy(self) -> LazyEngine:
        lazy: LazyEngine = self.engines.of(self.model_name, self.cache_dir, self.model_kwargs)
        return lazy

    @property
    def _ready(self) -> KVzipEngine | None:
        """The engine, if there is one without loading weights."""
        return self.engine if self._held or self.given_engine is not None else self._lazy.engine

    @property
    def engine(self) -> KVzipEngine:
        """The engine; loads the weights when first asked for."""
        if self._held or self.given_engine is not None:
            return still_held(type(self).__name__, self.model_name, self.given_engine)
        options = {"cache_dir": self.cache_dir, **({} if self.ratio is None else {"ratio": self.ratio}), **revealed(self.model_kwargs)}
        return self._lazy.get(lambda: KVzipEngine.from_pretrained(self.model_name, **options))

    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(
            open_weights=True,
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            tool_calling=True,
            tool_choice=True,
            tool_call_streaming=True,
            structured_output=True,
        )
        engine = self._ready
        window = engine.window if engine is not None else configured_window(self.model_name)
        if window is not None:
            profile["max_input_tokens"] = window - (self.context.positions if self.context else 0)
            profile["max_output_tokens"] = self.max_tokens
        return profile

    def _sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        defaults = {name: type(self).model_fields[name].default for name in CALL_OPTIONS}
        return sampling(given, {name: getattr(self, name) for name in CALL_OPTIONS}, defaults)
