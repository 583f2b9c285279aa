"""Agents that remember their whole conversation: older turns live on in a compressed context."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, NotRequired
from weakref import WeakSet

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
)
from langchain.agents.structured_output import AutoStrategy, OutputToolBinding, ProviderStrategy, ToolStrategy
from langchain_core.runnables.configurable import DynamicRunnable
from langgraph.types import Command, TracePolicy, omit_payload

from kvzip_memory import CompressedContext, InputError, KVzipEngine
from kvzip_memory.bridge import result_of
from kvzip_memory.compression.ratios import checked_ratio
from kvzip_memory.context import checked_context
from kvzip_memory.conversations import Memory, Recalled, Size, Trigger
from kvzip_memory.frameworks.engines import loads_of
from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.registry.holders import thread_tag
from langchain_kvzip.chat_models import KVzipChatModel
from langchain_kvzip.messages import plain_messages, thread_tags, without_files
from langchain_kvzip.tools import openai_tool


class KVzipMemoryState(AgentState[Any]):
    """State of an agent with memory: all messages, and the handle of the context of the older ones."""

    kvzip_memory: NotRequired[Annotated[dict[str, Any] | None, PrivateStateAttr]]


class KVzipMemoryMiddleware(AgentMiddleware[KVzipMemoryState, Any, Any]):
    """Memory for :func:`langchain.agents.create_agent` that never summarises.

    When what has come behind the folded messages passes ``trigger``, the older part of it is read once more, compressed and
    added to the agent's context; the newest messages stay as they are. So a call reads no more than that tail. The state keeps
    every message, and beside them only the context's key. Contexts lie in the engine's registry: with a ``cache_dir`` another
    process goes on from there. A context that is lost or no longer fits, since a message was edited or the thread was forked
    or rewound, is made anew.

    It comes last in the list of middleware: one behind it sees only the newest messages. A fallback model, for one, would be
    asked without the others. Once that shows, since the chat model was asked something else than the memory says or another one
    answered in its place, a warning tells it; one that only reads the messages does not show.

    Args:
        trigger: ``("tokens", n)``, ``("messages", n)``, ``("fraction", x)`` of the model's window; a dictionary of several that
            must all be reached, or a list of which one must.
        keep: how much is never folded.
        documents: contexts, or the names of some, that stand before every conversation, joined if there are several. All threads share
            them; a thread has pairs of its own for what is said in it alone.
        ratio: fraction of key-value pairs kept; None is the chat model's.
        unsupported_model_behavior: what to do with another chat model than :class:`KVzipChatModel`: it is called
            as if there were no memory, with a warning (``"warn"``) or without (``"ignore"``), or a ``TypeError`` is raised.

    Raises:
        InputError: a size that is none, ``keep`` not below ``trigger``, or a ratio outside (0, 1].

    Setup:
        ```bash
        pip install "kvzip-memory[agents]"
        ```

    Instantiate:
        ```python
        from langchain.agents import create_agent
        from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware
        from langgraph.checkpoint.memory import InMemorySaver

        llm = KVzipChatModel(model="HuggingFaceTB/SmolLM2-135M-Instruct", ratio=0.5, max_tokens=48)
        memory = KVzipMemoryMiddleware(trigger=("tokens", 3000), keep=("messages", 6))
        agent = create_agent(llm, tools=[], middleware=[memory], checkpointer=InMemorySaver())
        ```

    Invoke:
        ```python
        thread = {"configurable": {"thread_id": "ana"}}
        state = agent.invoke({"messages": [("user", "Hello, I am Ana.")]}, thread)
        state["messages"][-1].text
        ```

    Async:
        The event loop goes on while a block is folded.

        ```python
        await agent.ainvoke({"messages": [("user", "Who am I?")]}, thread)
        ```
    """

    state_schema = KVzipMemoryState
    trace_policy = TracePolicy(process_inputs=omit_payload)  # the model's own run shows what it was sent

    def __init__(
        self,
        *,
        trigger: Trigger = ("tokens", 6000),
        keep: Size = ("messages", 6),
        documents: Sequence[CompressedContext | str] = (),
        ratio: float | None = None,
        unsupported_model_behavior: Literal["ignore", "warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        ratio = None if ratio is None else checked_ratio(ratio)
        self._memory, self._ratio, self._unsupported = Memory(trigger, keep), ratio, unsupported_model_behavior
        if isinstance(documents, str | CompressedContext):
            documents = [documents]
        self._documents = [one if isinstance(one, str) else checked_context(one) for one in documents]
        self._warned = False
        self._engines: WeakSet[KVzipEngine] = WeakSet()

    def forget(self, thread_id: str, model: KVzipChatModel | None = None) -> None:
        """Delete the contexts of a thread that no other thread has. Its messages are the checkpointer's: ``delete_thread`` deletes them.

        Args:
            thread_id: as in ``{"configurable": {"thread_id": ...}}``; ``""`` for all conversations without one.
            model: whose contexts they are; None stands for all models that this middleware has been called with.

        Raises:
            InputError: it has been called with none yet, as after a restart.
            StorageError: as for :meth:`KVzipEngine.forget`.
        """
        engines = self._asked(model)
        for engine in engines:  # before the first deletes anything
            engine.registry.check_changeable()
        for engine in engines:
            engine.forget(thread_tag(clean(str(thread_id), "thread_id")))

    async def aforget(self, thread_id: str, model: KVzipChatModel | None = None) -> None:
        """:meth:`forget` in a thread."""
        engines = self._asked(model)
        for engine in engines:
            await result_of(engine.loads, engine.registry.check_changeable)
        for engine in engines:
            await engine.aforget(thread_tag(clean(str(thread_id), "thread_id")))

    def _asked(self, model: KVzipChatModel | None) -> list[KVzipEngine]:
        engines = [*self._engines] if model is None else [model.engine]
        if not engines:
            raise InputError("this middleware has seen no model yet; give the agent's as model=, or kvzip-memory rm --tag")
        return engines

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Call the model with the newest messages, over the context of the others."""
        if not self._supports(request.model):
            return handler(request)
        recalled, shorter, witness = self._recalled(request)
        response = handler(shorter)
        self._look(witness, shorter.model)
        return self._with_handle(response, request, recalled)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """:meth:`wrap_model_call`; the event loop goes on while a context is built."""
        if not self._supports(request.model):
            return await handler(request)
        recalled, shorter, witness = await result_of(loads_of(request.model), self._recalled, request)
        response = await handler(shorter)
        self._look(witness, shorter.model)
        return self._with_handle(response, request, recalled)

    def _supports(self, model: Any) -> bool:
        if isinstance(model, KVzipChatModel):
            return True
        message = f"KVzipMemoryMiddleware does nothing for a {type(model).__name__}; its memory is a KVzipChatModel's"
        if isinstance(model, DynamicRunnable):
            message += ": choose the model, or model_settings, in a middleware in front of it"
        if self._unsupported == "raise":
            raise TypeError(message)
        if self._unsupported == "warn":
            warnings.warn(message, stacklevel=3)
        return False

    def _look(self, witness: _Witness | None, model: Any) -> None:
        """Warn, once, if the model was not asked as the memory says, or did not answer (an answer from LangChain's cache aside)."""
        if self._warned or witness is None or (witness.answers and not witness.changed) or (not witness.changed and model._cached):
            return
        self._warned = True
        seen = "changed the messages" if witness.changed else "had another model answer"
        warnings.warn(
            f"a middleware behind KVzipMemoryMiddleware {seen}; it sees only the newest messages, without those in the context: put "
            "KVzipMemoryMiddleware last in the list",
            stacklevel=4,
        )

    def _recalled(self, request: ModelRequest[Any]) -> tuple[Recalled, ModelRequest[Any], _Witness | None]:
        """The context, the request with the messages behind it, and who tells whether the model is asked these."""
        model: Any = request.model
        system = [request.system_message] if request.system_message else []
        said = [message for message in request.messages if plain_messages([message])[0]]  # not what only brings a context
        turns, file_ids = plain_messages([*system, *request.messages])
        if self._documents:
            model = model.with_context([*([model.context] if model.context else []), *self._documents], behind=True)
            request = request.override(model=model)
        base = model.engine.one_context([model.context, *file_ids], by_name=model.contexts_by_name)
        tools = [openai_tool(tool) for tool in [*request.tools, *_answering_tools(request)]]
        handle: Any = request.state.get("kvzip_memory")
        ratio = model.ratio if self._ratio is None else self._ratio
        self._engines.add(model.engine)
        recalled = self._memory.recall(model.engine, turns, tools, base, handle, ratio, thread_tags() or [thread_tag()])
        if recalled.context is None:
            behind = base is not None and not file_ids
            return recalled, request.override(model=model.with_context(base, behind=True)) if behind else request, None
        rest = said[recalled.messages - (len(turns) - len(said)) :]
        if recalled.behind:
            first = next((i for i, message in enumerate(said) if message.type != "system"), 0)
            at = next(i for i, message in enumerate(rest) if message.type == "human")
            rest[at:at] = [*([request.system_message] if len(turns) > len(said) and request.system_message else []), *said[:first]]
        if file_ids:  # the context they bring is part of the one recalled
            rest = [without_files(message) for message in rest]
        recalling = model.with_context(recalled.context, behind=True)
        recalling._witness = witness = _Witness(rest)
        return recalled, request.override(model=recalling, messages=rest, system_message=None), witness

    def _with_handle(
        self, response: ModelResponse[Any], request: ModelRequest[Any], recalled: Recalled
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        if recalled.handle == request.state.get("kvzip_memory"):
            return response
        return ExtendedModelResponse(response, Command(update={"kvzip_memory": recalled.handle}))


class _Witness:
    """Whether a model is asked what the memory says, and answers."""

    def __init__(self, messages: list[Any]) -> None:
        self._turns, self.changed, self.answers = plain_messages(messages)[0], False, False

    def asked(self, messages: list[Any]) -> None:
        self.changed, self.answers = self.changed or plain_messages(messages)[0] != self._turns, False

    def answered(self) -> None:
        self.answers = True


def _answering_tools(request: ModelRequest[Any]) -> list[Any]:
    """The tools by which an agent answers in its response format; LangChain adds them behind all middleware."""
    wanted: Any = request.response_format
    if wanted is None or isinstance(wanted, ProviderStrategy):
        return []
    if not isinstance(wanted, ToolStrategy):
        if (request.model.profile or {}).get("structured_output"):
            return []
        wanted = ToolStrategy(wanted.schema if isinstance(wanted, AutoStrategy) else wanted)
    return [OutputToolBinding.from_schema_spec(spec).tool for spec in wanted.schema_specs]
