"""A LangChain chat model that answers from a compressed context."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from kvzip_memory import CompressedContext, KVzipEngine, Reply
from kvzip_memory.errors import InputError

# One engine for all copies of a chat model (with_context, bind, ...), made by whichever answers first.
_ENGINE_LOCK = threading.Lock()


class _LazyEngine:
    def __init__(self) -> None:
        self.engine: KVzipEngine | None = None


class KVzipChatModel(BaseChatModel):
    """Chat model over a local transformers model and, if one is attached, a compressed context.

    Setup:
        ``pip install "kvzip-memory[langchain]"``

    Instantiate:
        .. code-block:: python

            llm = KVzipChatModel(model="HuggingFaceTB/SmolLM2-135M-Instruct", ratio=0.3)  # weights load on first use
            llm = KVzipChatModel(engine=engine)  # share an engine

    Ask a document:
        .. code-block:: python

            handbook = llm.engine.load(Path("handbook.md"), name="handbook")
            chain = prompt | llm.with_context(handbook) | StrOutputParser()
            chain.invoke({"question": "Who approves travel?"})

    Usage:
        ``usage_metadata`` counts the whole context as input; ``input_token_details["cache_read"]`` is the part that was
        reused. Bytes, ratio and milliseconds are in ``response_metadata["kvzip"]``.
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True)

    model_name: str = Field(default="", alias="model")
    """Hub id, local folder or ``.gguf`` file; not needed with an ``engine``."""
    given_engine: KVzipEngine | None = Field(default=None, alias="engine", exclude=True, repr=False)
    context: CompressedContext | None = Field(default=None, exclude=True)
    """What is answered from; set it with :meth:`with_context`."""
    ratio: float = 0.3
    cache_dir: str | None = None
    temperature: float = 0.0
    max_tokens: int = 256
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of :meth:`KVzipEngine.from_pretrained`."""

    _lazy: _LazyEngine = PrivateAttr(default_factory=_LazyEngine)

    @model_validator(mode="after")
    def _check_model(self) -> KVzipChatModel:
        if not self.model_name and self.given_engine is None:
            raise ValueError("give model= (a hub id, a folder or a .gguf file) or engine=")
        if not self.model_name and self.given_engine is not None:
            self.model_name = str(self.given_engine.model.config.name_or_path or self.given_engine.model.config.model_type)
        return self

    @property
    def engine(self) -> KVzipEngine:
        """The engine; loads the weights when first asked for."""
        if self.given_engine is not None:
            return self.given_engine
        with _ENGINE_LOCK:
            if self._lazy.engine is None:
                self._lazy.engine = KVzipEngine.from_pretrained(
                    self.model_name, ratio=self.ratio, cache_dir=self.cache_dir, **self.model_kwargs
                )
            return self._lazy.engine

    def with_context(self, context: CompressedContext | None) -> KVzipChatModel:
        """This model answering from ``context``; both share the engine and its weights."""
        return self.model_copy(update={"context": context})

    # -- BaseChatModel -------------------------------------------------------------------------------------------

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        params = {
            "max_new_tokens": kwargs.get("max_tokens", self.max_tokens),
            "temperature": kwargs.get("temperature", self.temperature),
            "top_p": kwargs.get("top_p", self.top_p),
            "top_k": kwargs.get("top_k", self.top_k),
            "seed": kwargs.get("seed", self.seed),
            "stop": stop if stop is not None else self.stop,
        }
        with self.engine.stream(self.context, [_plain(m) for m in messages], **params) as pieces:
            for piece in pieces:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
            reply = pieces.reply
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                usage_metadata=_usage(reply),
                response_metadata=self._metadata(reply),
                chunk_position="last",
            )
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    # _agenerate and _astream are inherited: they run the two methods above in a thread, off the event loop.

    def _metadata(self, reply: Reply) -> dict[str, Any]:
        # No "model_provider" while a context is attached: SummarizationMiddleware would then count the context's
        # tokens as messages and summarise the history away.
        receipt = reply.receipt
        facts: dict[str, Any] = {"tier": receipt.tier, "ms": {k: round(v, 1) for k, v in receipt.ms.items()}}
        if self.context is not None:
            facts |= {
                "context": self.context.key,
                "tokens": self.context.n_tokens,
                "kept_pairs": self.context.kept_pairs,
                "nbytes": self.context.nbytes,
            }
        return {"model_name": self.model_name, "finish_reason": reply.finish_reason, "kvzip": facts}

    @property
    def _llm_type(self) -> str:
        return "kvzip-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # Part of LangChain's LLM cache key: the context enters by its content hash, so that two models over two
        # contexts never share a cached answer.
        return {
            "model": self.model_name,
            "model_kwargs": {k: str(v) for k, v in self.model_kwargs.items()},
            "engine": self.given_engine.fingerprint if self.given_engine else None,
            "context": self.context.key if self.context else None,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": self.stop,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop, **kwargs) | {"ls_provider": "kvzip"}

    def get_num_tokens(self, text: str) -> int:
        """Tokens of a text by the model's own tokenizer."""
        return len(self.engine.tokenizer(text, add_special_tokens=False).input_ids)


ChatKVzip = KVzipChatModel

_ROLES: dict[type[BaseMessage], str] = {HumanMessage: "user", AIMessage: "assistant", SystemMessage: "system"}


def _plain(message: BaseMessage) -> dict[str, str]:
    role = next((role for kind, role in _ROLES.items() if isinstance(message, kind)), None)
    if role is None or getattr(message, "tool_calls", None):
        raise InputError(f"messages of type {message.type!r} and tool calls are not supported; send human, ai and system messages")
    if isinstance(message.content, list):
        foreign = sorted({b.get("type", "?") for b in message.content if isinstance(b, dict)} - {"text"})
        if foreign:
            raise InputError(f"content blocks of type {foreign} are not supported; send text")
    return {"role": role, "content": str(message.text)}


def _usage(reply: Reply) -> UsageMetadata:
    usage = reply.usage
    return UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
        input_token_details={"cache_read": usage.cached_tokens},
    )
