"""A LangChain chat model that answers from a compressed context."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.exceptions import ContextOverflowError
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool

from kvzip_memory import CompressedContext, InputError, WindowError
from kvzip_memory.bridge import pieces_of, result_of
from kvzip_memory.frameworks.engines import Given, given_context, loads_of, places_of
from kvzip_memory.frameworks.hidden import revealed, told
from kvzip_memory.frameworks.options import CALL_OPTIONS, reused
from kvzip_memory.prompting.forms import FORMS
from kvzip_memory.registry.identity import tenant_digest
from kvzip_memory.system.printable import brief
from langchain_kvzip.answers import chunks_of
from langchain_kvzip.messages import files_in, plain_messages, thread_tags, with_keys
from langchain_kvzip.options import CallOptions, given_options
from langchain_kvzip.settings import ChatModelSettings
from langchain_kvzip.structured import AnswerParser, Wanted
from langchain_kvzip.tools import openai_tool

Documents = BaseLoader | Document | str | Path | Iterable[Document]


class KVzipChatModel(ChatModelSettings):
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

    # -- contexts ------------------------------------------------------------------------------------------------

    def load_documents(self, documents: Documents, **options: Any) -> CompressedContext:
        """One context of documents or of all that a loader yields, with a progress bar while it is built.

        Args:
            documents: documents, a document loader, a text, or the path of a text file.
            options: ``name``, ``ratio`` or ``nbytes``, ``system``, ``keep``, ``tags``, see :meth:`KVzipEngine.load`, also for errors.
        """
        if isinstance(documents, BaseLoader):
            documents = documents.lazy_load()
        given: Any = documents
        one = isinstance(given, Document | str | Path) or not isinstance(given, Iterable)
        loaded = [given] if one else list(given)
        ratio = None if options.get("nbytes") is not None else self.ratio
        return self.engine.load(loaded, **{"ratio": ratio, **options})

    async def aload_documents(self, documents: Documents, **options: Any) -> CompressedContext:
        """:meth:`load_documents` in a thread, so that an event loop goes on."""
        return await result_of(loads_of(self), self.load_documents, documents, **options)

    def with_context(self, context: Given, *, behind: bool = False) -> KVzipChatModel:
        """This model answering from a context, or from the one loaded under a name; both share the engine and its weights.

        Args:
            context: what is answered from; several contexts or names are joined, see :meth:`KVzipEngine.join`. None for nothing.
            behind: messages come behind it, also those that say what it begins with once more; otherwise such are taken for the
                whole conversation, of which the context holds a part.

        Raises:
            InputError: nothing is stored under the name, it is no context, or several cannot be joined.
            WindowError: several do not fit into the window together.
        """
        context = given_context(self, context)
        given = self.profile != self._resolve_model_profile()
        copy = self.model_copy(update={"context": context, "behind": behind})
        if not given:
            copy.profile = copy._resolve_model_profile()
        return copy

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
        options, engine = self._options(stop, kwargs), self.engine
        turns, file_ids = plain_messages(messages)
        context = engine.one_context([self.context, *file_ids], by_name=self.contexts_by_name)
        created = 0
        if context is None:
            context = engine.load_marked(turns, tools=options.stream["tools"], ratio=self.ratio, tags=tags)
            if context is not None and context.receipt is not None:
                created = context.receipt.read
        options.stream["form"] = engine.tool_form if self.tool_call_parser == "auto" else FORMS[self.tool_call_parser]
        options.stream["behind"] = self.behind or bool(file_ids)  # a block stands for what comes before
        yield from chunks_of(engine, context, turns, options, self.model_name, created)

    def _options(self, stop: list[str] | None, kwargs: Mapping[str, Any]) -> CallOptions:
        given = given_options({**kwargs, "stop": stop if stop is not None else kwargs.get("stop")}, self.model_name)
        return CallOptions.of(given, self._sampling(given), reused(given.get("reuse"), self.reuse, self.ratio))

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
        return [with_keys(message, self._key) if files_in(message) else message for message in messages] if self._cached else messages

    def _key(self, reference: str) -> str:
        context = self.engine.one_context([reference], by_name=self.contexts_by_name)
        assert context is not None
        return context.key

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
        turns, _ = plain_messages(messages)
        return self.engine.count_tokens(turns, [openai_tool(tool) for tool in tools or ()])

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
            raise InputError(f"tool_choice is {brief(tool_choice)}, but there are no tools")
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return self.bind(tools=[openai_tool(tool) for tool in tools], **kwargs)

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
            raise InputError(f"method is {brief(method)}; use 'json_schema', 'json_mode' or 'function_calling'")
        if kwargs:
            raise InputError(f"options {sorted(kwargs)} are unknown")
        wanted = Wanted.of({"type": "object"} if schema is None and method == "json_mode" else schema)
        options = {
            "ls_structured_output_format": {"kwargs": {"method": method}, "schema": wanted.traced},
            "keep_unfinished": include_raw,
        }
        if method == "function_calling":
            llm = self.bind_tools([wanted.as_tool()], tool_choice="any", **options)
        else:
            llm = self.bind(response_format=wanted.as_format(told=method == "json_schema"), **options)
        return llm | AnswerParser(wanted=wanted, in_call=method == "function_calling", include_raw=include_raw)


ChatKVzip = KVzipChatModel
