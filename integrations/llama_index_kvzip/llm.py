"""A LlamaIndex LLM that answers from a compressed context."""

from __future__ import annotations

import os.path
import reprlib
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

from llama_index.core import Settings
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    ToolCallBlock,
)
from llama_index.core.llms import LLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import BaseTool
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kvzip_memory import CompressedContext, InputError, KVzipEngine
from kvzip_memory.bridge import pieces_of
from kvzip_memory.frameworks.engines import (
    Given,
    LazyEngine,
    LazyEngines,
    configured_window,
    fixed_folder,
    given_context,
    located,
    places_of,
)
from kvzip_memory.frameworks.hidden import Options, revealed
from kvzip_memory.frameworks.options import CALL_OPTIONS, for_fields, renamed, reused, sampling
from kvzip_memory.frameworks.travel import cannot_travel, check_arrived, still_held, written_down
from kvzip_memory.system.sharing import is_only_tried
from llama_index_kvzip.answers import alast, arguments_of, completion_of, last, responses_of
from llama_index_kvzip.messages import as_said, plain_messages

_KNOWN = {*CALL_OPTIONS, "reuse", "tools", "tool_choice", "parallel_tool_calls"}


class KVzipLLM(FunctionCallingLLM):
    """LLM over a local transformers model that reads documents and conversations from compressed contexts.

    Weights load on first use. ``temperature``, ``max_tokens``, ``top_p``, ``top_k``, ``seed``, ``stop``, ``repetition_penalty``,
    ``no_repeat_ngram_size`` and ``reuse`` are options of every call, too, which comes first; None is what the model has.

    .. code-block:: python

        from llama_index.core.llms import ChatMessage
        from llama_index_kvzip import KVzipLLM

        llm = KVzipLLM(model="HuggingFaceTB/SmolLM2-135M-Instruct", ratio=0.3, max_tokens=48)
        print(llm.chat([ChatMessage("Name a colour.")]).message.content)

        handbook = llm.engine.load("Travel is approved by Ms Ito. " * 40, name="handbook")
        print(llm.with_context(handbook).complete("Who approves travel?"))

    Tool calls and structured outputs are guided: they are valid JSON for the tool or the class. A message with a ``CachePoint``
    has everything up to it loaded once. ``raw`` holds ``usage``, ``finish_reason`` and, under ``kvzip``, what was reused.

    The async methods compute in threads: the event loop goes on, and calls made at one time are decoded together. May be used
    from any number of threads.

    Raises:
        InputError: by every call: unknown options, messages that are not text or that the template refuses.
        WindowError: by every call: context and messages fill the model's window.
        UnfinishedError: by every call: JSON or a tool call was cut by ``stop``. ``max_tokens`` too few for one are an InputError.
    """

    model_config = ConfigDict(populate_by_name=True, hide_input_in_errors=True)

    model: str = ""
    """Hub id, local folder or ``.gguf`` file; not needed with an ``engine``."""
    given_engine: KVzipEngine | None = Field(default=None, alias="engine", exclude=True, repr=False)
    """Share an engine; its ratio and cache folder apply."""
    context: CompressedContext | None = Field(default=None, exclude=True)
    """What is answered from; set it with :meth:`with_context`."""
    ratio: float | None = None
    """Fraction of key-value pairs kept by what this model loads; None is the engine's, 0.3."""
    reuse: bool = True
    """Whether a prompt without a context is answered from the longest stored one that it begins with and that keeps ``ratio``; an option
    of every call, too."""
    cache_dir: str | None = None
    """Contexts are stored there and found again by later processes."""
    temperature: float = 0.0
    max_tokens: int = 256
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    contexts_by_name: bool = False
    """Whether messages may bring contexts by their names and by the first digits of their keys, too, not by whole keys only."""
    model_kwargs: Options = Field(default_factory=dict, repr=False)
    """Further arguments of :meth:`KVzipEngine.from_pretrained`; tokens, a ``tenant`` and other secrets are held as ``SecretStr``."""

    _engines: LazyEngines = PrivateAttr(default_factory=LazyEngines)
    _held: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = for_fields(values)
        check_arrived(cls.__name__, values)
        known = {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
        if unknown := sorted(values.keys() - known - {"class_name"}):
            raise ValueError(f"options {unknown} are unknown; arguments of KVzipEngine.from_pretrained go into model_kwargs")
        return values

    @model_validator(mode="after")
    def _check_model(self) -> KVzipLLM:
        self.stream_options({})  # tells what is wrong with a field
        self._held = self.given_engine is not None
        if not self.model:
            if self.given_engine is None:
                raise ValueError("give model= (a hub id, a folder or a .gguf file) or engine=")
            name = str(self.given_engine.model.config.name_or_path or self.given_engine.model.config.model_type)
            self.model = Path(name).name if os.path.isdir(name) else name
        elif self.given_engine is None:  # loaded later, perhaps from elsewhere
            self.model, self.cache_dir = located(self.model), fixed_folder(self.cache_dir)
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if self.given_engine is None and self.context is None:
            return super().__reduce_ex__(protocol)
        if is_only_tried():
            return object, ()
        raise cannot_travel(type(self).__name__)

    def __getstate__(self) -> dict[str, Any]:
        """LlamaIndex takes what cannot be pickled, such as callbacks, from the object that it asks: here a copy."""
        return super(KVzipLLM, self.model_copy()).__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """LlamaIndex makes an object of the fields alone; copies that were sent together share the engine that is made here."""
        super().__setstate__(state)
        self._engines = state["__pydantic_private__"]["_engines"]

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """What was written down without its engine or context cannot be made of the dump alone."""
        return written_down({**handler(self), "class_name": self.class_name()}, self.given_engine, self.context)

    @classmethod
    def class_name(cls) -> str:
        return "KVzipLLM"

    @property
    def _lazy(self) -> LazyEngine:
        return self._engines.of(self.model, self.cache_dir, self.model_kwargs)

    @property
    def _ready(self) -> KVzipEngine | None:
        """The engine, if there is one without loading weights."""
        return self.engine if self._held or self.given_engine is not None else self._lazy.engine

    @property
    def engine(self) -> KVzipEngine:
        """The engine; loads the weights when first asked for."""
        if self._held or self.given_engine is not None:
            return still_held(type(self).__name__, self.model, self.given_engine)
        options = {"cache_dir": self.cache_dir, **({} if self.ratio is None else {"ratio": self.ratio}), **revealed(self.model_kwargs)}
        return self._lazy.get(lambda: KVzipEngine.from_pretrained(self.model, **options))

    def with_context(self, context: Given) -> KVzipLLM:
        """This model answering from a context, or from the one loaded under a name; both share the engine and its weights. Several are
        joined, see :meth:`KVzipEngine.join`.

        Raises:
            InputError: nothing is stored under the name, it is no context, or several cannot be joined.
            WindowError: several do not fit into the window together.
        """
        return self.model_copy(update={"context": given_context(self, context)})

    @property
    def metadata(self) -> LLMMetadata:
        """What is left of the model's window beside the context, and what the model can do."""
        engine = self._ready
        window = engine.window if engine else configured_window(self.model) or self.engine.window
        return LLMMetadata(
            context_window=window - (self.context.positions if self.context else 0),
            num_output=self.max_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model,
        )

    # -- answers -------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages, of which the last is the user's or a tool's."""
        return last(self._answer(messages, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """:meth:`chat`, piece by piece."""
        return self._answer(messages, kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """:meth:`chat` in a thread."""
        return await alast(self._aanswer(messages, kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """:meth:`stream_chat` in a thread."""
        return self._aanswer(messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, which is what the user says, also where it is ``formatted``: control tokens come from the template only."""
        return completion_of(last(self._answer(as_said(prompt), kwargs)))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """:meth:`complete`, piece by piece."""
        return (completion_of(response) for response in self._answer(as_said(prompt), kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """:meth:`complete` in a thread."""
        return completion_of(await alast(self._aanswer(as_said(prompt), kwargs)))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """:meth:`stream_complete` in a thread."""

        async def completions() -> CompletionResponseAsyncGen:
            async with aclosing(self._aanswer(as_said(prompt), kwargs)) as responses:
                async for response in responses:
                    yield completion_of(response)

        return completions()

    def _answer(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> ChatResponseGen:
        options = self.stream_options(kwargs)
        engine = self.engine
        turns, keys = plain_messages(messages)
        context = engine.one_context([self.context, *keys], by_name=self.contexts_by_name)
        created = 0
        if context is None:
            context = engine.load_marked(turns, tools=options["tools"], ratio=self.ratio)
            if context is not None and context.receipt is not None:
                created = context.receipt.read
        options["behind"] = bool(keys)  # a message that stands for it comes before
        yield from responses_of(engine, context, turns, options, self.model, created)

    async def _aanswer(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> ChatResponseAsyncGen:
        self.stream_options(kwargs)  # tells what is wrong with them before the weights are loaded
        async with aclosing(pieces_of(partial(self._answer, messages, kwargs), places_of(self))) as responses:
            async for response in responses:
                yield response

    def stream_options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of :meth:`KVzipEngine.stream` for a call with these options.

        Raises:
            InputError: some of them are unknown, or a value is outside its range.
        """
        given = renamed(kwargs)
        if unknown := sorted(given.keys() - _KNOWN):
            raise InputError(f"options {unknown} are unknown; known are {sorted(_KNOWN)}")
        defaults = {name: type(self).model_fields[name].default for name in CALL_OPTIONS}
        options = sampling(given, {name: getattr(self, name) for name in CALL_OPTIONS}, defaults)
        reuse = reused(given.get("reuse"), self.reuse, self.ratio)
        return {**options, "reuse": reuse, **{name: given.get(name) for name in ("tools", "tool_choice", "parallel_tool_calls")}}

    # -- tools and structured output -----------------------------------------------------------------------------

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        # None: several where the model chooses. A model that is made to call more than once seldom knows when to end.
        several = None if allow_parallel_tool_calls and not tool_required else allow_parallel_tool_calls
        return {
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": tool_choice or ("any" if tool_required else "auto"),
            "parallel_tool_calls": several,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of an answer; of an unfinished one with what there is of their arguments.

        Raises:
            ValueError: there is none, and ``error_on_no_tool_call``.
            InputError: other options, of which there are none.
        """
        if kwargs:
            raise InputError(f"options {sorted(kwargs)} are unknown; known is error_on_no_tool_call")
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            raise ValueError(f"the answer calls no tool: {response.message.content!r}")
        return [ToolSelection(tool_id=c.tool_call_id or "", tool_name=c.tool_name, tool_kwargs=arguments_of(c)) for c in calls]

    # Streamed objects would otherwise come from calls that the model is free not to make.

    def _structured_stream_call(
        self, output_cls: type[BaseModel], prompt: PromptTemplate, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        asked, parsed = self._asked_for(output_cls, prompt, prompt_args)
        for response in self.stream_chat_with_tools(**asked, **(llm_kwargs or {})):
            yield parsed(response)

    async def _structured_astream_call(
        self, output_cls: type[BaseModel], prompt: PromptTemplate, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        asked, parsed = self._asked_for(output_cls, prompt, prompt_args)
        responses = await self.astream_chat_with_tools(**asked, **(llm_kwargs or {}))
        return (parsed(response) async for response in responses)

    def _asked_for(
        self, output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[ChatResponse], Any]]:
        """How an object is asked for, and what makes it of the answer so far."""
        before: list[Any] = []

        def parsed(response: ChatResponse) -> Any:
            before[:] = [process_streaming_objects(response, output_cls, cur_objects=list(before) or None, llm=self)]
            return before[0]

        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        return {"tools": [get_function_tool(output_cls)], "chat_history": messages, "tool_required": True}, parsed


def given_or_set(llm: LLM | None) -> Any:
    """The model that was given, or else ``Settings.llm`` if that was set: never LlamaIndex' default, which is a server's.

    Raises:
        InputError: there is none of both.
    """
    if llm is not None:
        return llm
    if Settings._llm is None:
        raise InputError("no model: give llm=KVzipLLM(...), or set Settings.llm to one")
    return Settings.llm


def given_or_set_kvzip(llm: LLM | None = None) -> KVzipLLM:
    """:func:`given_or_set`, if it is a :class:`KVzipLLM`.

    Raises:
        InputError: it is another model, or there is none.
    """
    found = given_or_set(llm)
    if not isinstance(found, KVzipLLM):
        raise InputError(
            f"{'Settings.llm' if llm is None else 'llm'} is {reprlib.repr(found)}; texts are read into contexts by a KVzipLLM: give one as "
            "llm=, or set Settings.llm to one. as_query_engine takes as_structured_llm of one"
        )
    return found
