"""Agents with memory: what the model reads at each call, what the state holds, and what survives."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sqlite3
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelFallbackMiddleware, ModelRequest, ModelRetryMiddleware, wrap_model_call
from langchain.agents.structured_output import OutputToolBinding, ToolStrategy
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.config import get_config
from pydantic import BaseModel

import langchain_kvzip
from conftest import ROOT, TEXT, tiny_engine
from kvzip_memory import InputError, KVzipEngine
from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware
from synthetic import processes
from templates import HERMES, MISTRAL

THREAD: Any = {"configurable": {"thread_id": "ana"}}
PERSONA = "You are a lighthouse keeper's assistant."


@tool
def wind(lamp: Literal["north", "south"]) -> str:
    """Wind a lamp."""
    return f"The {lamp} lamp is wound."


class Lamp(BaseModel):
    """A lamp."""

    wound: bool


class Call(AgentMiddleware[Any, Any, Any]):
    """A model of this size cannot choose: call the tool when the user says "wind", else answer."""

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        last = request.messages[-1]
        wants = isinstance(last, HumanMessage) and "wind" in last.text
        return handler(request.override(tool_choice="wind" if wants else "none"))


class Watch(AgentMiddleware[Any, Any, Any]):
    """What reaches the model."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[ModelRequest[Any]] = []

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        self.requests.append(request)
        return handler(request)

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        self.requests.append(request)
        return await handler(request)


def memory(**options: Any) -> KVzipMemoryMiddleware:
    return KVzipMemoryMiddleware(**{"trigger": ("messages", 6), "keep": ("messages", 2), "ratio": 0.6, **options})


def agent_of(engine: KVzipEngine, *middleware: Any, tools: Any = (), checkpointer: Any = None, **options: Any) -> Any:
    llm = KVzipChatModel(engine=engine, **{"max_tokens": 6, **options})
    return create_agent(llm, tools=tools, system_prompt=PERSONA, middleware=middleware, checkpointer=checkpointer or InMemorySaver())


def talk(agent: Any, turns: int, first: int = 0) -> list[AIMessage]:
    replies = []
    for turn in range(first, first + turns):
        state = agent.invoke({"messages": [("user", f"Fact {turn}: lamp {turn} is wound at {turn} o'clock.")]}, THREAD)
        replies.append(state["messages"][-1])
    return replies


def test_the_model_reads_the_newest_messages_and_the_state_keeps_all() -> None:
    engine, watch = tiny_engine(), Watch()
    agent = agent_of(engine, memory(), watch)
    replies = talk(agent, 8)
    state = agent.get_state(THREAD).values
    assert len(state["messages"]) == 16
    handle = state["kvzip_memory"]
    assert json.loads(json.dumps(handle)) == handle
    assert "kvzip_memory" not in agent.invoke({"messages": [("user", "Hello.")]}, THREAD)
    sent = [len(request.messages) for request in watch.requests]
    assert max(sent) < 6
    assert watch.requests[-1].model.context is not None
    assert watch.requests[-1].system_message is None  # it is in the context
    for reply in replies[4:]:
        usage = reply.usage_metadata
        assert usage is not None
        assert usage["input_tokens"] - usage["input_token_details"]["cache_read"] < 400
    # every prompt was that of the whole conversation
    last = watch.requests[-1].model.context
    plain = [SystemMessage(PERSONA), *state["messages"]]
    ids = engine.prompt_ids(None, [*plain, HumanMessage("Hello.")])
    assert ids[: last.n_tokens] == last.token_ids.tolist()


def test_at_ratio_1_an_agent_with_memory_says_what_one_without_says() -> None:
    with_memory = talk(agent_of(tiny_engine(), memory(ratio=1.0)), 7)
    without = talk(agent_of(tiny_engine()), 7)
    assert [reply.text for reply in with_memory] == [reply.text for reply in without]


class Changing(AgentMiddleware[Any, Any, Any]):
    """Another system prompt, or other tools, at every call, as ``dynamic_prompt`` makes them."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        self.calls += 1
        if self.what == "prompt":
            return handler(request.override(system_message=SystemMessage(f"You keep a lamp. It is {self.calls} past noon.")))
        named = convert_to_openai_tool(wind)
        named["function"]["description"] = f"Wind a lamp. It is {self.calls} past noon."
        return handler(request.override(tools=[named], tool_choice="none"))


@pytest.mark.parametrize("template", ["chatml", "hermes", "mistral"])
@pytest.mark.parametrize("what", ["prompt", "tools"])
def test_a_front_that_changes_at_every_call_is_read_behind_the_conversation(tmp_path: Path, what: str, template: str) -> None:
    options = {} if template == "chatml" else {"template": {"hermes": HERMES, "mistral": MISTRAL}[template]}
    engine, watch = tiny_engine(cache_dir=tmp_path, **options), Watch()
    middleware = memory(trigger=("messages", 6), keep=("messages", 2))
    llm = KVzipChatModel(engine=engine, max_tokens=2)
    tools = [wind] if what == "tools" else []
    agent = create_agent(llm, tools, middleware=[Changing(what), middleware, watch], checkpointer=InMemorySaver())
    nbytes, read = [0], [0]
    for call in range(30):
        state = agent.invoke({"messages": [("user", f"Fact {call}.")]}, THREAD)
        engine.registry.flush()
        nbytes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))
        usage, request = state["messages"][-1].usage_metadata, watch.requests[-1]
        context = request.model.context
        built = context.receipt.read if context and context.receipt else 0
        read.append(read[-1] + built + usage["input_tokens"] - usage["input_token_details"]["cache_read"])
        assert usage["input_tokens"] < 2048
        turns = [*([request.system_message] if request.system_message else []), *request.messages]
        shown = [tool for tool in request.tools if isinstance(tool, dict)]
        told = engine.tokenizer.decode([*(context.token_ids.tolist() if context else []), *engine.prompt_ids(context, turns, shown)])
        assert f"It is {call + 1} past noon." in told
        assert f"Fact {call}." in told
        if call > 6:
            assert told.count("past noon") == 1
    for sums in (nbytes, read):
        tens = [sums[n + 10] - sums[n] for n in (0, 10, 20)]
        assert tens[2] < 1.3 * tens[1]
    assert engine.stats()["built"] < 30 / 2 + 3


def test_a_front_that_a_template_does_not_take_behind_a_conversation_stays_in_front() -> None:
    strict = """{%- for message in messages if message.role == 'user' and 'past noon' in message.content %}
        {{- raise_exception('no user tells the time') }}{%- endfor %}"""
    engine, watch = tiny_engine(template=strict + HERMES), Watch()
    llm = KVzipChatModel(engine=engine, max_tokens=2)
    agent = create_agent(llm, [], middleware=[Changing("prompt"), memory(), watch], checkpointer=InMemorySaver())
    with pytest.warns(UserWarning, match="no user tells the time") as warned:
        talk(agent, 12)
    assert sum("nothing is folded" in str(warning.message) for warning in warned) == 1
    assert engine.stats()["built"] <= 3
    assert watch.requests[-1].system_message.text == "You keep a lamp. It is 12 past noon."
    assert len(watch.requests[-1].messages) == 23


def test_an_agent_that_is_given_another_prompt_once_has_it_in_front() -> None:
    engine, watch, saver = tiny_engine(), Watch(), InMemorySaver()
    talk(agent_of(engine, memory(), watch, checkpointer=saver), 5)
    llm = KVzipChatModel(engine=engine, max_tokens=6)
    talk(create_agent(llm, system_prompt="You keep bees.", middleware=[memory(), watch], checkpointer=saver), 3, first=5)
    context = watch.requests[-1].model.context
    assert "You keep bees." in engine.tokenizer.decode(context.token_ids)
    assert watch.requests[-1].system_message is None
    assert all(message.type != "system" for message in watch.requests[-1].messages)


@pytest.mark.parametrize("based", [False, True])
def test_a_conversation_that_repeats_itself_is_remembered_whole(based: bool) -> None:
    said = [("user", "Is it lit?"), ("assistant", "Yes.")] * 5
    texts, tokens = [], []
    for middleware in ([memory(ratio=1.0, trigger=("messages", 6), keep=("messages", 5))], []):
        engine = tiny_engine()
        base = engine.load([{"role": role, "content": text} for role, text in said[:2]], ratio=1.0) if based else None
        llm = KVzipChatModel(engine=engine, max_tokens=12).with_context(base, behind=True)
        agent = create_agent(llm, middleware=middleware, checkpointer=InMemorySaver())
        for messages in (said[:7], said[1:3], said[1:3]):
            reply = agent.invoke({"messages": messages}, THREAD)["messages"][-1]
            texts.append(reply.text)
            tokens.append(reply.usage_metadata["input_tokens"])
    assert texts[:3] == texts[3:]
    assert tokens[:3] == tokens[3:]


async def test_async_agents_remember_the_same() -> None:
    watch = Watch()
    agent = agent_of(tiny_engine(), memory(), watch)
    for turn in range(6):
        await agent.ainvoke({"messages": [("user", f"Fact {turn}: lamp {turn} is wound at {turn} o'clock.")]}, THREAD)
    assert len(agent.get_state(THREAD).values["messages"]) == 12
    assert agent.get_state(THREAD).values["kvzip_memory"]["messages"] > 6
    sync = agent_of(tiny_engine(), memory())
    talk(sync, 6)
    assert agent.get_state(THREAD).values["kvzip_memory"] == sync.get_state(THREAD).values["kvzip_memory"]


def test_forks_and_time_travel_go_on_from_what_fits() -> None:
    engine, watch = tiny_engine(), Watch()
    agent = agent_of(engine, memory(), watch)
    talk(agent, 8)
    built = engine.stats()["built"]
    early = next(s for s in agent.get_state_history(THREAD) if len(s.values["messages"]) == 10 and not s.next)
    agent.invoke({"messages": [("user", "And what if we go back?")]}, early.config)
    context = watch.requests[-1].model.context
    assert context is not None
    assert context.n_tokens < engine.count_tokens([SystemMessage(PERSONA), *early.values["messages"]])
    assert engine.stats()["built"] == built


def test_a_document_in_the_system_prompt_stays_in_front() -> None:
    engine, watch = tiny_engine(), Watch()
    page = engine.load(TEXT, ratio=0.6)
    llm = KVzipChatModel(engine=engine, max_tokens=6)
    agent = create_agent(
        llm, tools=[], system_prompt=SystemMessage([page.as_block()]), middleware=[memory(), watch], checkpointer=InMemorySaver()
    )
    talk(agent, 6)
    context = watch.requests[-1].model.context
    assert context.token_ids.tolist()[: page.n_tokens] == page.token_ids.tolist()
    assert context.identity["parent"]
    attached = create_agent(llm.with_context(page), tools=[], middleware=[memory()], checkpointer=InMemorySaver())
    talk(attached, 6)
    assert attached.get_state(THREAD).values["kvzip_memory"] == agent.get_state(THREAD).values["kvzip_memory"]


def test_documents_stand_before_every_thread_and_are_no_threads_own() -> None:
    engine, watch = tiny_engine(), Watch()
    pages = [engine.load(text, ratio=0.6, joinable=True) for text in (TEXT, "The ferry leaves at nine. " * 12)]
    engine.load("The ferry leaves at nine. " * 12, ratio=0.6, joinable=True, name="ferry")
    llm = KVzipChatModel(engine=engine, max_tokens=6)
    agent = create_agent(
        llm, tools=[], middleware=[memory(documents=[pages[0], "ferry"]), watch], checkpointer=InMemorySaver(), system_prompt=PERSONA
    )
    talk(agent, 1)
    assert watch.requests[-1].model.context.key == engine.join(pages).key  # before the first fold, too
    talk(agent, 6)
    context = watch.requests[-1].model.context
    both = engine.join(pages)
    assert context.token_ids.tolist()[: both.n_tokens] == both.token_ids.tolist()
    assert {part.key for part in context.parts} >= {page.key for page in pages}
    assert context.nbytes < both.shared_nbytes
    attached = create_agent(llm.with_context(pages), tools=[], middleware=[memory()], checkpointer=InMemorySaver(), system_prompt=PERSONA)
    talk(attached, 1)
    talk(attached, 6)
    assert attached.get_state(THREAD).values["kvzip_memory"] == agent.get_state(THREAD).values["kvzip_memory"]
    brought = create_agent(llm, tools=[], middleware=[memory(documents=pages[:1]), watch], checkpointer=InMemorySaver())
    brought.invoke({"messages": [SystemMessage([pages[1].as_block()]), HumanMessage("Who?")]}, THREAD)
    assert str(brought.get_state(THREAD).values["messages"][-1].response_metadata["kvzip"]["context"]) == both.key
    for wrong in ([3], [None]):
        with pytest.raises(InputError, match="no context"):
            memory(documents=wrong)


def test_a_message_that_only_brings_a_context_takes_no_others_place() -> None:
    engine, watch = tiny_engine(), Watch()
    page = engine.load(TEXT, ratio=1.0)
    agent = agent_of(engine, memory(ratio=1.0), watch, ratio=1.0)
    talk(agent, 3)
    said = [SystemMessage([page.as_block()]), HumanMessage("And the page?")]
    agent.invoke({"messages": said}, THREAD)
    request, state = watch.requests[-1], agent.get_state(THREAD).values["messages"]
    assert request.model.context is not None
    rest = engine.prompt_ids(request.model.context, request.messages)
    plain = [SystemMessage(PERSONA), *(message for message in state[:-1] if message.content != said[0].content)]
    assert request.model.context.token_ids.tolist() + rest == page.token_ids.tolist() + engine.prompt_ids(page, plain)


@pytest.mark.parametrize("kind", ["tool", "auto"])
def test_an_answers_schema_is_described_once(kind: str) -> None:
    prompts = []
    for middleware in ([memory(ratio=1.0), watch := Watch()], [plain := Watch()]):
        engine = tiny_engine(template=HERMES)
        llm = KVzipChatModel(engine=engine, max_tokens=3, profile={"structured_output": False} if kind == "auto" else None)
        wanted: Any = ToolStrategy(Lamp) if kind == "tool" else Lamp
        agent = create_agent(llm, [wind], middleware=middleware, response_format=wanted)
        said = [("user", "One."), ("assistant", "Yes.")] * 3
        with pytest.raises(InputError, match="max_new_tokens is 3"):  # for which a call is too long
            agent.invoke({"messages": [*said, ("user", "Four.")]})
        request = middleware[-1].requests[-1]
        tools = [
            convert_to_openai_tool(t)
            for t in [wind, *(OutputToolBinding.from_schema_spec(s).tool for s in ToolStrategy(Lamp).schema_specs)]
        ]
        context = request.model.context
        prompts.append([*(context.token_ids.tolist() if context else []), *engine.prompt_ids(context, request.messages, tools)])
    assert watch.requests[-1].model.context is not None
    assert plain.requests[-1].model.context is None
    assert prompts[0] == prompts[1]


def test_other_models_are_called_as_if_there_were_no_memory() -> None:
    fake = FakeListChatModel(responses=["Yes."])

    def ask(**options: Any) -> Any:
        return create_agent(fake, tools=[], middleware=[memory(**options)]).invoke({"messages": [("user", "Well?")]})

    with pytest.warns(UserWarning, match="FakeListChatModel"):
        assert ask()["messages"][-1].text == "Yes."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(unsupported_model_behavior="ignore")["messages"][-1].text == "Yes."
    with pytest.raises(TypeError, match="KVzipChatModel"):
        ask(unsupported_model_behavior="raise")


def test_a_wrong_size_is_an_error_when_the_middleware_is_made() -> None:
    with pytest.raises(InputError, match="keep"):
        memory(trigger=("messages", 2), keep=("messages", 2))
    for wrong in ({"trigger": 6}, {"trigger": None}, {"keep": 2}, {"ratio": 30}):
        with pytest.raises(InputError, match=r"is no size|ratio is 30"):
            memory(**wrong)


def test_without_langchain_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langchain.agents.middleware.types", None)
    monkeypatch.delitem(sys.modules, "langchain_kvzip.middleware")
    with pytest.raises(ImportError, match=r"kvzip-memory\[agents\]"):
        langchain_kvzip.KVzipMemoryMiddleware  # noqa: B018


def converse(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Turns of an agent with tools and a SQLite checkpointer, first in a process of their own."""
    engine, watch = tiny_engine(cache_dir=folder), Watch()
    spelled = engine.tokenizer.convert_ids_to_tokens(range(engine.model.config.vocab_size))
    with torch.no_grad():  # a random model's answer could end within a character, which guided decoding takes for cut
        engine.model.lm_head.weight[[i for i, token in enumerate(spelled) if not (token and token.isascii())]] = 0
    middleware = [KVzipMemoryMiddleware(trigger=("messages", 8), keep=("messages", 3), ratio=0.5), Call(), watch]
    with sqlite3.connect(folder / "agent.db", check_same_thread=False) as database:
        agent = agent_of(engine, *middleware, tools=[wind], checkpointer=SqliteSaver(database), max_tokens=110)
        for text in texts:
            agent.invoke({"messages": [("user", text)]}, THREAD)
        values = agent.get_state(THREAD).values
    engine.registry.flush()  # what a process has time for before it is killed
    types = [message.type for message in values["messages"]]
    sent = [len(request.messages) for request in watch.requests]
    return {"messages": types, "sent": sent, "handle": values.get("kvzip_memory"), "stats": engine.stats()}


def converse_and_die(folder: Path, texts: list[str]) -> None:
    torch.set_num_threads(1)
    (folder / "found.json").write_text(json.dumps(converse(folder, texts)))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_agent_goes_on_from_disk_without_reading_again(tmp_path: Path) -> None:
    texts = ["Please wind a lamp.", "My name is Ana.", "Please wind another.", "I like tea."]
    killed = processes.Process(target=converse_and_die, args=(tmp_path, texts))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    before = json.loads((tmp_path / "found.json").read_text())
    after = converse(tmp_path, ["Who am I?"])
    assert before["stats"]["built"] > 0
    assert before["messages"].count("tool") == 2
    assert len(after["messages"]) == len(before["messages"]) + 2
    assert after["handle"] == before["handle"]
    assert after["stats"]["built"] == 0
    assert after["stats"]["hits"]["disk"] == 1
    assert max(after["sent"]) < len(before["messages"])


def test_the_example_goes_on_in_its_second_run(smollm2: KVzipEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("agent_memory")
    engine = KVzipEngine(smollm2.model, smollm2.tokenizer, cache_dir=tmp_path)
    brief: Any = {"ratio": 0.5, "max_tokens": 48, "stop": ["."]}  # a sentence is enough
    first = example.main(KVzipChatModel(engine=engine, **brief), tmp_path, example.DIALOGUE[:2])
    again = KVzipEngine(smollm2.model, smollm2.tokenizer, cache_dir=tmp_path)
    second = example.main(KVzipChatModel(engine=again, **brief), tmp_path, ["Thank you."])
    assert first[-1]["folded"] > 0
    assert second[0]["seen"] > first[-1]["seen"]
    assert second[0]["read"] < 400 < second[0]["seen"]
    assert second[0]["reply"].strip()


class Shorter(AgentMiddleware[Any, Any, Any]):
    """Asks with the last message only."""

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        return handler(request.override(messages=request.messages[-1:]))

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        return await handler(request.override(messages=request.messages[-1:]))


class Elsewhere(AgentMiddleware[Any, Any, Any]):
    """Asks another model."""

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        return handler(request.override(model=FakeListChatModel(responses=["Elsewhere."])))


class Failing(KVzipChatModel):
    """Over a context it fails on its first attempt of a question."""

    failures: Any = None

    def _chunks(self, messages: Any, *args: Any) -> Any:
        text = str(messages[-1].content)
        self.failures[text] = self.failures.get(text, 0) + 1
        if self.context is not None and self.failures[text] == 1:
            raise RuntimeError("busy")
        yield from super()._chunks(messages, *args)


def memory_warnings(seen: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in seen if "behind KVzipMemoryMiddleware" in str(warning.message)]


def test_a_middleware_behind_is_told_of_once_when_it_shows() -> None:
    for behind, words in ((Shorter(), "changed the messages"), (Elsewhere(), "had another model answer")):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            agent = agent_of(tiny_engine(), memory(), behind)
            talk(agent, 2)
            assert memory_warnings(seen) == []  # nothing is in a context yet
            talk(agent, 4)
        [told] = memory_warnings(seen)
        assert words in told
        assert "put KVzipMemoryMiddleware last" in told


async def test_a_middleware_behind_shows_in_async_agents_too() -> None:
    agent = agent_of(tiny_engine(), memory(), Shorter())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for turn in range(6):
            await agent.ainvoke({"messages": [("user", f"Fact {turn}: lamp {turn} is wound.")]}, THREAD)
    assert ["changed the messages" in told for told in memory_warnings(seen)] == [True]


def test_what_asks_the_same_of_the_same_model_is_no_reason_to_warn() -> None:
    retry, fallback = ModelRetryMiddleware(initial_delay=0, jitter=False), ModelFallbackMiddleware(FakeListChatModel(responses=["Well."]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        talk(agent_of(tiny_engine(), memory(), Watch()), 6)
        talk(agent_of(tiny_engine(), Shorter(), memory()), 6)
        for cached in (False, True):
            engine, cache = tiny_engine(), InMemoryCache()
            for _ in range(2):  # all answers of the second agent are in the cache
                talk(agent_of(engine, memory(), cache=cache if cached else None), 6)
        llm = Failing(engine=tiny_engine(), max_tokens=6, failures={})
        talk(create_agent(llm, middleware=[memory(), retry], checkpointer=InMemorySaver()), 6)
        assert max(llm.failures.values()) == 2
        assert memory_warnings(seen) == []
        llm = Failing(engine=tiny_engine(), max_tokens=6, failures={})
        talk(create_agent(llm, middleware=[memory(), fallback], checkpointer=InMemorySaver()), 6)
    assert ["had another model answer" in told for told in memory_warnings(seen)] == [True]


def test_a_model_is_chosen_in_a_middleware_in_front(engine: KVzipEngine) -> None:
    llm = KVzipChatModel(engine=engine, max_tokens=4)
    fields: Any = llm.configurable_fields(max_tokens=ConfigurableField("length"))

    @wrap_model_call
    def configured(request: Any, handler: Any) -> Any:
        return handler(request.override(model_settings={"max_tokens": get_config()["configurable"]["length"]}))

    def talk(model: Any, *middleware: Any) -> Any:
        agent: Any = create_agent(model, tools=[], middleware=[*middleware, memory()], checkpointer=InMemorySaver())
        thread = {"configurable": {"thread_id": "ana", "length": 7}}
        for number in range(6):
            state = agent.invoke({"messages": [("user", f"Question number {number}? " * 9)]}, thread)
        return state["messages"][-1].usage_metadata, agent.get_state(thread).values.get("kvzip_memory")

    with pytest.warns(UserWarning, match=r"nothing for a RunnableConfigurableFields.*in a middleware in front"):
        usage, handle = talk(fields)
    assert (usage["output_tokens"], usage["input_token_details"]["cache_read"], handle) == (7, 0, None)
    usage, handle = talk(llm, configured)
    assert usage["output_tokens"] == 7
    assert usage["input_token_details"]["cache_read"] > 0
    assert handle
