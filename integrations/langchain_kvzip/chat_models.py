"""A LangChain chat model that answers from a compressed context."""

from __future__ import annotations

import json
import os.path
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, TypeVar

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.exceptions import ContextOverflowError
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel, agenerate_from_stream, generate_from_stream
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer, model_validator

from kvzip_memory import CompressedContext, InputError, KVzipEngine, Reply, UnfinishedError, WindowError, __version__
from kvzip_memory.bridge import pieces_of, result_of
from kvzip_memory.context import checked_context
from kvzip_memory.frameworks.engines import LazyEngine, LazyEngines, configured_window, fixed_folder, loads_of, located, places_of
from kvzip_memory.frameworks.hidden import Options, revealed, told
from kvzip_memory.frameworks.options import CALL_OPTIONS, for_fields, renamed, reused, sampling
from kvzip_memory.frameworks.travel import cannot_travel, check_arrived, still_held, written_down
from kvzip_memory.prompting.call_reader import CallReader
from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.prompting.forms import FORMS
from kvzip_memory.prompting.messages import as_message, may_bring_contexts
from kvzip_memory.prompting.reasoning import Reasoning
from kvzip_memory.registry.holders import thread_tag
from kvzip_memory.registry.identity import tenant_digest
from langchain_kvzip.structured import AnswerParser, Wanted, own_schema

# A model that is guided but not told of the schema answers badly: a small one repeats itself to the end.
_ASKED = "Answer with one JSON {} that validates against this JSON schema: {}"

# Options of a call that say nothing to a local model.
_IGNORED = {"ls_structured_output_format", "strict", "stream", "stream_usage", "timeout", "user"}

# With ``keep_unfinished`` what is cut is given as it is, not raised.
_KNOWN = {*CALL_OPTIONS, "reuse", "tools", "tool_choice", "parallel_tool_calls", "response_format", "model", "keep_unfinished"}

Documents = BaseLoader | Document | str | Path | Iterable[Document]

# Arguments that LangChain's chat models have for servers.
_FOR_SERVERS = {"api_key", "base_url", "max_retries", "timeout"}


Message = TypeVar("Message", bound=BaseMessage)


class Witness(Protocol):
    """Is told of the calls of a model and its copies."""

    def asked(self, messages: list[BaseMessage]) -> None: ...

    def answered(self) -> None: ...


class KVzipChatModel(BaseChatModel):
    """Chat model over a local transformers model that reads documents and conversations from compressed contexts.

    Setup:
        ```bash
        pip install "kvzip-memory[langchain]"
        ```

    Instantiate:
        Weights load on first use. What says how an answer is generated is an option of every call, too, which comes first:
        ``llm.invoke(..., temperature=1.0)``; None is what the model has.

        ```python
        from langchain_kvzip import KVzipChatModel

        llm = KVzipChatModel(model="HuggingFaceTB/SmolLM2-135M-Instruct", ratio=0.3, temperature=0, max_tokens=48)
        ```

    Invoke:
        ```python
        messages = [("system", "You translate English to French."), ("human", "I love programming.")]
        reply = llm.invoke(messages)
        reply.text
        reply.usage_metadata
        ```

    Stream:
        ```python
        for chunk in llm.stream(messages):
            print(chunk.text, end="")
        ```

    Async:
        The event loop goes on while the model computes. Calls made at one time are decoded together.

        ```python
        await llm.ainvoke(messages)
        await llm.abatch([messages, messages])
        async for chunk in llm.astream(messages):
            print(chunk.text, end="")
        ```

    Contexts:
        A text is read once and kept as a compressed KV cache, on disk too with ``cache_dir``. There are three ways to
        bring it. A prompt whose tokens begin with a loaded context finds it by itself, unless ``reuse=False``.

        ```python
        from langchain_core.documents import Document
        from langchain_core.prompts import ChatPromptTemplate

        handbook = llm.load_documents([Document("Travel is approved by Ms Ito. " * 40)], name="handbook")

        # 1. a model that answers from it
        llm.with_context(handbook).invoke("Who approves travel?").usage_metadata["input_token_details"]["cache_read"]

        # 2. a block of a prompt; survives prompt templates, agents and checkpoints
        prompt = ChatPromptTemplate.from_messages([("system", [handbook.as_block()]), ("human", "{question}")])
        (prompt | llm).invoke({"question": "Who approves travel?"})

        # 3. a mark: everything up to it is loaded once
        text = {"type": "text", "text": "Travel is approved by Ms Ito. " * 40, "cache_control": {"type": "ephemeral"}}
        llm.invoke([("system", [text]), ("human", "Who approves travel?")])
        ```

    Tools:
        Calls are guided: they are valid JSON for the tool's schema. ``tool_choice`` may be ``"auto"``, ``"any"``, ``"none"`` or
        a tool's name, and is kept to.

        ```python
        from langchain_core.tools import tool

        @tool
        def multiply(a: int, b: int) -> int:
            "Multiply two numbers."
            return a * b

        llm.bind_tools([multiply], tool_choice="any").invoke("How much is 6 times 7?").tool_calls
        ```

    Structured output:
        ```python
        from typing import Literal

        from pydantic import BaseModel

        class Approval(BaseModel):
            "Who approves what."
            what: Literal["travel", "books"]
            approved: bool

        llm.with_context(handbook).with_structured_output(Approval).invoke("May Ms Ito approve travel?")
        ```

    Usage:
        ``usage_metadata`` counts the whole context as input. ``input_token_details`` tells how much of it was read
        (``cache_read``) or built in this very call (``cache_creation``). Tier, bytes, and milliseconds are in
        ``response_metadata["kvzip"]``. ``model_provider`` is left out of an answer that used a context: with it LangChain's
        SummarizationMiddleware would count the context's tokens as messages and summarise the history away.

        ```python
        reply = llm.with_context(handbook).invoke("Who approves travel?")
        reply.usage_metadata["input_token_details"]
        reply.response_metadata["kvzip"]["tier"]
        ```
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
    def _check_model(self) -> KVzipChatModel:
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
    def _add_kvzip_version(self) -> KVzipChatModel:
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

    # -- contexts ------------------------------------------------------------------------------------------------

    def load_documents(self, documents: Documents, **options: Any) -> CompressedContext:
        """One context of documents or of all that a loader yields, with a progress bar while it is built.

        Args:
            documents: documents, a document loader, a text, or the path of a text file.
            options: ``name``, ``ratio``, ``system``, ``keep``, ``tags``, see :meth:`KVzipEngine.load`, which tells the errors too.
        """
        if isinstance(documents, BaseLoader):
            documents = documents.lazy_load()
        given: Any = documents
        one = isinstance(given, Document | str | Path) or not isinstance(given, Iterable)
        loaded = [given] if one else list(given)
        return self.engine.load(loaded, **{"ratio": self.ratio, **options})

    async def aload_documents(self, documents: Documents, **options: Any) -> CompressedContext:
        """:meth:`load_documents` in a thread, so that an event loop goes on."""
        return await result_of(loads_of(self), self.load_documents, documents, **options)

    def with_context(self, context: CompressedContext | str | None, *, behind: bool = False) -> KVzipChatModel:
        """This model answering from a context, or from the one loaded under a name; both share the engine and its weights.

        Args:
            context: what is answered from; None for nothing.
            behind: messages come behind it, also those that say what it begins with once more; otherwise such are taken for the
                whole conversation, of which the context holds a part.

        Raises:
            InputError: nothing is stored under the name, or it is no context.
        """
        if isinstance(context, str):
            context = self.engine.get(context)
        context = None if context is None else checked_context(context)
        given = self.profile != self._resolve_model_profile()
        copy = self.model_copy(update={"context": context, "behind": behind})
        if not given:
            copy.profile = copy._resolve_model_profile()
        return copy

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
            profile["max_input_tokens"] = window - (self.context.n_tokens if self.context else 0)
            profile["max_output_tokens"] = self.max_tokens
        return profile

    # -- BaseChatModel -------------------------------------------------------------------------------------------

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Generator[ChatGenerationChunk, None, None]:
        yield from self._answer(messages, stop, kwargs, thread_tags(run_manager))

    def _answer(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any], tags: Sequence[str]
    ) -> Generator[ChatGenerationChunk, None, None]:
        if self._witness is not None:
            self._witness.asked(messages)
        try:
            yield from self._chunks(messages, stop, kwargs, tags)
            if self._witness is not None:
                self._witness.answered()
        except WindowError as error:
            raise ContextOverflowError(str(error)) from error

    def _chunks(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any], tags: Sequence[str]
    ) -> Iterator[ChatGenerationChunk]:
        options = self._options(stop, kwargs)
        engine = self.engine
        options["form"] = engine.tool_form if self.tool_call_parser == "auto" else FORMS[self.tool_call_parser]
        turns, file_ids = _plain(messages)
        context = engine.one_context([self.context, *file_ids], by_name=self.contexts_by_name)
        options["behind"] = self.behind or bool(file_ids)  # a block stands for what comes before
        created = 0
        if context is None:
            context = engine.load_marked(turns, tools=options["tools"], ratio=self.ratio, tags=tags)
            if context is not None and context.receipt is not None:
                created = context.receipt.read
        form, shown, kept = options["form"], options.pop("shown"), options.pop("keep_unfinished")
        if shown and options["schema"] is not None and turns and turns[-1]["role"] != "assistant":
            kind = "object" if Wanted(options["schema"]).is_object else "value"
            asked = _ASKED.format(kind, json.dumps(options["schema"], ensure_ascii=False))
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{asked}"}
        reader = CallReader(form) if options["tools"] and options["tool_choice"] != "none" else None
        called = False
        try:
            with engine.stream(context, turns, **options) as pieces:
                for piece in pieces.with_reasoning():
                    if isinstance(piece, Reasoning):
                        yield ChatGenerationChunk(message=AIMessageChunk(content="", additional_kwargs={"reasoning_content": str(piece)}))
                        continue
                    text, deltas = reader.push(piece) if reader else (piece, [])
                    called |= bool(deltas)
                    calls = [tool_call_chunk(name=d.name, args=d.arguments, id=d.id, index=d.index) for d in deltas]
                    if text or calls:
                        yield ChatGenerationChunk(message=AIMessageChunk(content=text, tool_call_chunks=calls))
                reply = pieces.reply
        except UnfinishedError as error:
            if not kept:
                raise
            facts = {"model_name": self.model_name, "finish_reason": "length", "kvzip": {"unfinished": str(error)}}
            yield ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata=facts, chunk_position="last"))
            return
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content=reader.flush() if reader else "",
                usage_metadata=_usage(reply, created),
                response_metadata=self._metadata(reply, called, created),
                chunk_position="last",
            )
        )

    def _options(self, stop: list[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of :meth:`KVzipEngine.stream` for a call."""
        given = renamed({**kwargs, "stop": stop if stop is not None else kwargs.get("stop")})
        if (model := given.get("model") or self.model_name) != self.model_name:
            raise InputError(f"model={model!r} was asked of a chat model over {self.model_name!r}; make another one with the same engine")
        if unknown := sorted(given.keys() - _KNOWN - _IGNORED):
            raise InputError(f"options {unknown} are unknown; known are {sorted(_KNOWN)}")
        response_format = given.get("response_format")
        return {
            **self._sampling(given),
            "reuse": reused(given.get("reuse"), self.reuse, self.ratio),
            "tools": given.get("tools"),
            "tool_choice": given.get("tool_choice"),
            "parallel_tool_calls": given.get("parallel_tool_calls"),
            "schema": _response_schema(response_format),
            "shown": not _is_json_mode(response_format),
            "keep_unfinished": given.get("keep_unfinished", False),
        }

    def _sampling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        defaults = {name: type(self).model_fields[name].default for name in CALL_OPTIONS}
        return sampling(given, {name: getattr(self, name) for name in CALL_OPTIONS}, defaults)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        self._options(stop, kwargs)  # tells what is wrong with them before the weights are loaded
        asked = partial(self._answer, messages, stop, kwargs, thread_tags(run_manager))
        async with aclosing(pieces_of(asked, places_of(self))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """:meth:`batch`. Of more questions than can run and wait none is asked, unless ``max_concurrency`` says how many at one time, or
        ``return_exceptions`` that some may be refused.
        """
        first = config[0] if isinstance(config, list) and config else config
        at_once = not (isinstance(first, dict) and first.get("max_concurrency"))
        if self._ready is not None and at_once and not return_exceptions and not self._cached:
            self._ready.places.check_takes(len(inputs))
        return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    # The key of a cached answer is made of the messages as they are handed on here. A name in a block would mean another context later, and
    # another tenant's elsewhere.

    def _generate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return super()._generate_with_cache(self._by_keys(messages), stop, run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if self._cached and any(map(files_in, messages)):
            messages = await result_of(loads_of(self), self._by_keys, messages)
        return await super()._agenerate_with_cache(messages, stop, run_manager, **kwargs)

    def _by_keys(self, messages: list[BaseMessage]) -> list[BaseMessage]:
        """Messages with the whole keys of contexts in the blocks that stand for them, if answers are kept.

        Raises:
            InputError: nothing is stored under a block's name or key.
        """
        return [self._with_keys(message) if files_in(message) else message for message in messages] if self._cached else messages

    def _with_keys(self, message: BaseMessage) -> BaseMessage:
        def key(block: dict[str, Any]) -> str:
            context = self.engine.one_context([str(block["file_id"])], by_name=self.contexts_by_name)
            assert context is not None
            return context.key

        blocks = files_in(message)
        content = [{**block, "file_id": key(block)} if block in blocks else block for block in message.content]
        return message.model_copy(update={"content": content})

    def _metadata(self, reply: Reply, called: bool, created: int = 0) -> dict[str, Any]:
        receipt = reply.receipt
        facts: dict[str, Any] = {"tier": "built" if created else receipt.tier, "ms": {k: round(v, 1) for k, v in receipt.ms.items()}}
        metadata = {"model_name": self.model_name, "finish_reason": reply.finish_reason, "kvzip": facts}
        if called and reply.finish_reason != "forced":
            metadata["finish_reason"] = "tool_calls"
        if receipt.key is None:
            return metadata | {"model_provider": "kvzip"}
        facts |= {"context": receipt.key, "tokens": reply.usage.cached_tokens, "nbytes": receipt.nbytes}
        return metadata

    @property
    def _llm_type(self) -> str:
        return "kvzip-chat"

    @property
    def _cached(self) -> bool:
        """Whether LangChain keeps answers. Only then are the weights hashed, which takes seconds and holds up an event loop."""
        return self.cache is not False and (isinstance(self.cache, BaseCache) or get_llm_cache() is not None)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # Part of LangChain's LLM cache key, and of traces: the context, the tenant and model_kwargs enter by hashes. Blocks enter with the
        # messages, see _by_keys.
        engine = self.given_engine
        return {
            "model": self.model_name,
            "model_kwargs": told(self.model_kwargs),
            "tenant": engine.registry.tenant if engine else tenant_digest(revealed(self.model_kwargs).get("tenant")),
            "engine": engine.fingerprint if engine and self._cached else None,
            "settings": repr(engine.model.generation_config) if engine else None,
            "context": self.context.key if self.context else None,
            "behind": self.behind,
            "ratio": engine.ratio if engine and self.ratio is None else self.ratio,
            "reuse": self.reuse,
            **{name: getattr(self, name) for name in CALL_OPTIONS},
            "tool_call_parser": self.tool_call_parser,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop, **kwargs) | {"ls_provider": "kvzip"}

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of a text by the model's own tokenizer."""
        return self.engine.text_ids(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Tokens of messages by the model's own template and tokenizer; those of contexts are not counted."""
        turns, _ = _plain(messages)
        return self.engine.count_tokens(turns, [_openai_tool(tool) for tool in tools or ()])

    # -- tools and structured output -----------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools it may call.

        Args:
            tools: functions, tools, Pydantic classes, typed dictionaries or OpenAI's mappings.
            tool_choice: ``"auto"`` or None lets the model choose, ``"any"``, ``"required"`` or True makes it call one, a name or
                ``{"type": "function", "function": {"name": ...}}`` that one, ``"none"`` none. Kept to by guided decoding.
            kwargs: options of the call, such as ``parallel_tool_calls=True`` (several forced calls in one answer) or ``response_format``.
        """
        if not tools and tool_choice not in (None, False, "auto", "none"):
            raise InputError(f"tool_choice is {tool_choice!r}, but there are no tools")
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=[_openai_tool(tool) for tool in tools], **kwargs)

    def with_structured_output(
        self,
        schema: Any,
        *,
        method: str = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model answering with what validates against a schema.

        Decoding is guided by the JSON schema whatever the method: the answer always validates against it and ends within
        ``max_tokens``. An :class:`~kvzip_memory.InputError` says before anything is computed if they are too few, an
        :class:`~kvzip_memory.UnfinishedError` that a stop string cut the answer. What a class checks beyond its schema may still fail,
        as an ``OutputParserException``.

        Args:
            schema: a Pydantic class, an ``Enum``, a dataclass or any other type that Pydantic validates, of which the answer is a value; a
                ``TypedDict`` class, a JSON schema, or an OpenAI tool, of which it is a dictionary.
            method: how the model is told. ``"json_schema"`` puts the schema behind what the user or a tool says last,
                ``"function_calling"`` shows it as a tool, ``"json_mode"`` leaves it to your prompt.
            include_raw: give ``{"raw", "parsed", "parsing_error"}``; then nothing is raised for what is wrong with an answer.
            strict: accepted; answers are always strict.

        Raises:
            InputError: another ``method``, or a schema that is none of these.
        """
        if method not in ("json_schema", "json_mode", "function_calling"):
            raise InputError(f"method is {method!r}; use 'json_schema', 'json_mode' or 'function_calling'")
        if kwargs:
            raise InputError(f"options {sorted(kwargs)} are unknown")
        wanted = Wanted.of({"type": "object"} if schema is None and method == "json_mode" else schema)
        options = {
            "ls_structured_output_format": {"kwargs": {"method": method}, "schema": _traced(wanted.schema)},
            "keep_unfinished": include_raw,
        }
        if method == "function_calling":
            llm = self.bind_tools([wanted.as_tool()], tool_choice="any", **options)
        else:
            named = {"name": wanted.schema.get("title", "answer"), "schema": wanted.schema}
            kind = "json_schema" if method == "json_schema" else "json_object"
            llm = self.bind(response_format={"type": kind, "json_schema": named}, **options)
        return llm | AnswerParser(wanted=wanted, in_call=method == "function_calling", include_raw=include_raw)


ChatKVzip = KVzipChatModel


def thread_tags(run_manager: Any = None) -> list[str]:
    """The tag of the graph's thread that this is called in, if any; a call outside of a graph may have a ``thread_id`` in its metadata."""
    told = getattr(run_manager, "metadata", None) or {}
    thread_id = ensure_config().get("configurable", {}).get("thread_id") or told.get("thread_id")
    return [] if thread_id is None else [thread_tag(clean(str(thread_id), "thread_id"))]


def _plain(messages: Sequence[BaseMessage]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Messages for the engine, and the ids of the contexts that blocks in them stand for."""
    turns, file_ids = [], []
    for number, message in enumerate(messages, 1):
        if files := files_in(message):
            file_ids += [str(block["file_id"]) for block in files]
            message = without_files(message)
            if not message.content and message.type == "system":
                continue
        turn = as_message(message, f"message {number}")
        if turn is None:
            raise InputError(f"messages of type {message.type!r} are not supported; send human, ai, system and tool messages")
        turns.append(turn)
    return turns, file_ids


def files_in(message: BaseMessage) -> list[dict[str, Any]]:
    """The blocks of a message that stand for contexts. Those of what a model has made or a tool has returned do not."""
    blocks = message.content if isinstance(message.content, list) and may_bring_contexts(message) else []
    return [block for block in blocks if isinstance(block, dict) and block.get("type") == "file" and "file_id" in block]


def without_files(message: Message) -> Message:
    """A message without the blocks that stand for contexts."""
    files = files_in(message)
    return message.model_copy(update={"content": [block for block in message.content if block not in files]}) if files else message


def _response_schema(response_format: Any) -> dict[str, Any] | None:
    """The schema of OpenAI's ``response_format``, of a class, or of a JSON schema."""
    if response_format is None or response_format == {"type": "text"}:
        return None
    if isinstance(response_format, Mapping) and "json_schema" in response_format:
        schema = response_format["json_schema"].get("schema") if isinstance(response_format["json_schema"], Mapping) else None
        if not isinstance(schema, Mapping):
            raise InputError(f'response_format is {str(response_format)[:80]}; it needs a JSON schema at ["json_schema"]["schema"]')
        return dict(schema)
    return {"type": "object"} if _is_json_mode(response_format) else Wanted.of(response_format).schema


def _openai_tool(tool: Any) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    own = own_schema(tool)
    kinds = own.get("type") if own else None
    if isinstance(tool, dict) and isinstance(kinds, list) and "object" in kinds:  # a call's arguments are one
        tool = own = {**tool, "type": "object"}
    try:
        made = convert_to_openai_tool(tool)
    except Exception as error:  # LangChain's, in many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{str(tool)[:80]} is no tool ({reason}); give a function, a tool, a class, or a mapping in OpenAI's form or with a title"
        ) from error
    if own and "function" in made:
        made["function"]["parameters"] = {key: value for key, value in own.items() if key not in ("title", "description")}
    return made


def _traced(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema for LangChain's traces, which knows types by one name: several are said as ``anyOf``."""
    kinds = schema.get("type", "")
    if isinstance(kinds, str):
        return dict(schema)
    several = {"anyOf": [{"type": kind} for kind in kinds]} if isinstance(kinds, list) else {}
    return {**{key: value for key, value in schema.items() if key != "type"}, **several}


def _is_json_mode(response_format: Any) -> bool:
    return isinstance(response_format, Mapping) and response_format.get("type") == "json_object"


def _usage(reply: Reply, created: int) -> UsageMetadata:
    usage = reply.usage
    return UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
        input_token_details={"cache_read": usage.cached_tokens - created, "cache_creation": created},
    )
