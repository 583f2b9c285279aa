"""How a context reaches KVzipChatModel, and the traps on the way (each of these failed on the naive way)."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_core.tracers import BaseTracer
from langgraph.checkpoint.memory import InMemorySaver

from conftest import CHATML, TEXT, kept_at, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, InputError, KVzipEngine, QueueFullError, UnfinishedError
from kvzip_memory.contexts import FEWEST_TOKENS
from langchain_kvzip import KVzipChatModel, answers
from langchain_kvzip.answers import metadata_of
from templates import HERMES

LONG = TEXT * 2


@pytest.fixture
def context(engine: KVzipEngine) -> CompressedContext:
    return engine.load(LONG, ratio=0.4)


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipChatModel:
    return KVzipChatModel(engine=engine, max_tokens=12)


@tool
def weather(town: str) -> str:
    """The weather of a town."""
    return f"rain in {town}"


# -- the three ways --------------------------------------------------------------------------------------------------


def test_field_block_and_name_give_the_same_answer(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    engine.load(LONG, ratio=0.4, name="lamps")
    expected = engine.generate(context, "Who?", max_new_tokens=12).text
    assert llm.with_context(context).invoke("Who?").content == expected
    assert llm.with_context("lamps").invoke("Who?").content == expected
    block = context.as_block()
    assert block == {"type": "file", "file_id": context.key}
    assert llm.invoke([HumanMessage([block, {"type": "text", "text": "Who?"}])]).content == expected
    prompt = ChatPromptTemplate.from_messages([("system", [block]), ("human", "{q}")])
    reply = (prompt | llm).invoke({"q": "Who?"})
    assert reply.content == expected
    assert reply.usage_metadata["input_token_details"]["cache_read"] == context.n_tokens  # type: ignore[index]
    templated = ChatPromptTemplate.from_messages([("human", [{"type": "file", "file_id": "{file}"}, {"type": "text", "text": "{q}"}])])
    assert (templated | llm).invoke({"q": "Who?", "file": context.key}).content == expected


@pytest.mark.parametrize("template", [CHATML, HERMES], ids=["chatml", "hermes"])
@pytest.mark.parametrize("role", ["system", "user"])
@pytest.mark.parametrize("tools", [False, True], ids=["plain", "tools"])
def test_everything_up_to_a_mark_is_loaded_once(template: str, role: str, tools: bool) -> None:
    engine = tiny_engine(template=template, ratio=1.0)
    llm: Any = KVzipChatModel(engine=engine, max_tokens=5)
    if tools:
        llm = llm.bind_tools([weather], tool_choice="none")

    def messages(question: str) -> list[Any]:
        marked = [
            {"type": "text", "text": "Be brief. "},
            {"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": " Quote."},
        ]
        return [(role, marked), *([("human", question)] if role == "system" else [("ai", "Yes."), ("human", question)])]

    first, second = llm.invoke(messages("Who?")), llm.invoke(messages("When?"))
    created, read = (reply.usage_metadata["input_token_details"] for reply in (first, second))
    assert created["cache_creation"] == read["cache_read"] > len(LONG)
    assert created["cache_read"] == read["cache_creation"] == 0
    assert engine.stats()["built"] == 1
    # at ratio 1.0 nothing is lost: the same as the same prompt without the mark, but for where its text is cut into tokens
    plain = tiny_engine(template=template)
    turns = [{"role": {"human": "user", "ai": "assistant"}.get(r, r), "content": c} for r, c in messages("When?")]
    for block in turns[0]["content"]:
        block.pop("cache_control", None)
    options = {"tools": llm.kwargs["tools"], "tool_choice": "none"} if tools else {}
    expected = plain.generate(None, turns, max_new_tokens=5, **options)
    assert second.content == expected.text
    assert second.usage_metadata["input_tokens"] == expected.usage.input_tokens


def test_a_mark_that_moves_on_has_only_what_is_new_read(tmp_path: Path) -> None:
    engine = KVzipEngine(tiny_model(max_position_embeddings=8192), tiny_tokenizer(), ratio=0.5, cache_dir=tmp_path)
    llm: Any = KVzipChatModel(engine=engine, max_tokens=4)
    talk: list[Any] = [("system", "Be brief. " * 30)]
    usages, new, total = [], [], 0
    for turn in range(10):
        asked = [{"type": "text", "text": f"Question {turn}: " + "who winds the lamp? " * 16, "cache_control": {"type": "ephemeral"}}]
        reply = llm.invoke([*talk, ("human", asked)])
        usages.append(reply.usage_metadata)
        talk += [("human", asked[0]["text"]), ("ai", "The keeper.")]
        length = engine.count_tokens([*_turns(talk[:-1])])
        new.append(length - total)
        total = length
    created = [usage["input_token_details"]["cache_creation"] for usage in usages]
    read = [usage["input_token_details"]["cache_read"] for usage in usages]
    computed = [usage["input_tokens"] - cached for usage, cached in zip(usages, read, strict=True)]
    assert sum(created) == pytest.approx(sum(new), abs=FEWEST_TOKENS)
    assert all(made <= tokens + 8 for made, tokens in zip(created, new, strict=True))
    assert max(computed[2:]) <= max(computed[:2])  # what is computed for a turn does not grow
    assert len(engine.registry.contexts()) == 3
    assert {entry.tags for entry in engine.registry.contexts()} == {("cache_control",)}
    short = [*talk, ("human", [{"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}}])]
    details = llm.invoke(short).usage_metadata["input_token_details"]
    assert (details["cache_creation"], details["cache_read"]) == (0, read[-1] + created[-1])


def test_a_mark_behind_a_system_prompt_that_changes_at_every_call_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    engine = KVzipEngine(tiny_model(max_position_embeddings=8192), tiny_tokenizer(), ratio=0.5)
    llm: Any = KVzipChatModel(engine=engine, max_tokens=4)
    talk: list[Any] = []

    def ask(turn: int, system: str) -> int:
        asked = [{"type": "text", "text": f"Question {turn}: " + "who winds the lamp? " * 16, "cache_control": {"type": "ephemeral"}}]
        reply = llm.invoke([("system", system), *talk, ("human", asked)], {"metadata": {"thread_id": "ana"}})
        talk.extend([("human", asked[0]["text"]), ("ai", "The keeper.")])
        return int(reply.usage_metadata["input_token_details"]["cache_creation"])

    created = [ask(turn, f"It is {turn} o'clock.") for turn in range(6)]
    assert [tokens > 0 for tokens in created] == [True, True, False, False, False, False]
    assert "cache_control is ignored in thread: ana" in caplog.text
    assert "put what changes behind the mark" in caplog.text
    created = [ask(turn, "Be brief.") for turn in range(6, 9)]
    assert [tokens > 0 for tokens in created] == [False, True, True]
    assert created[2] < created[1] / 2  # it goes on from the one before
    assert {entry.tags for entry in engine.registry.contexts()} == {("cache_control", "thread: ana")}


@pytest.mark.parametrize("kept", [True, False])
def test_a_mark_goes_on_from_one_in_the_system_prompt(kept: bool) -> None:
    engine = tiny_engine(ratio=0.5)
    llm: Any = KVzipChatModel(engine=engine, max_tokens=4)
    mark = {"cache_control": {"type": "ephemeral"}}
    rules: dict[str, Any] = {"type": "text", "text": LONG}
    first = llm.invoke([("system", [rules | mark]), ("human", "Who?")])
    details = first.usage_metadata["input_token_details"]
    assert first.response_metadata["kvzip"]["tier"] == "built"
    asked = {"type": "text", "text": "And who else winds the lamp? " * 16} | mark
    second = llm.invoke([("system", [rules | mark if kept else rules]), ("human", [asked])])
    assert second.usage_metadata["input_token_details"]["cache_read"] == details["cache_creation"]
    assert second.usage_metadata["input_token_details"]["cache_creation"] > 256
    assert engine.stats()["built"] == 2


def test_a_mark_does_not_go_on_from_a_context_that_kept_less(engine: KVzipEngine) -> None:
    def marked(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]}]

    coarse = engine.load_marked(marked(LONG), ratio=0.2)
    fine = engine.load_marked(marked(LONG * 2), ratio=0.6)
    assert coarse is not None
    assert fine is not None
    assert fine.identity["parent"] is None
    assert fine.receipt is not None
    assert fine.receipt.read == fine.n_tokens


def _turns(messages: list[Any]) -> list[dict[str, str]]:
    return [{"role": {"human": "user", "ai": "assistant"}.get(role, role), "content": text} for role, text in messages]


def test_what_stands_before_a_marked_system_block_is_never_evicted(engine: KVzipEngine) -> None:
    blocks = [{"type": "text", "text": "Be brief. " * 5}, {"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}}]
    context = engine.load_marked([{"role": "system", "content": blocks}, {"role": "user", "content": "Who?"}], ratio=0.3)
    assert context is not None
    assert engine.tokenizer.decode(context.token_ids[: context.protected]).endswith("Be brief. ")
    assert engine.tokenizer.decode(context.token_ids).endswith(LONG)
    assert context.kept_pairs == kept_at(0.3, context)
    assert engine.load_marked([{"role": "user", "content": [{"type": "text", "text": "Short.", "cache_control": {}}]}]) is None
    assert engine.load_marked([{"role": "user", "content": LONG}]) is None


def test_a_prompt_that_begins_with_a_loaded_context_uses_it_by_itself() -> None:
    engine, plain = tiny_engine(ratio=1.0), tiny_engine()
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "I see."}]
    engine.load(turns[:1])
    context = engine.load(turns)
    engine.load("Another page. " * 30)
    messages = [HumanMessage(LONG), AIMessage("I see."), HumanMessage("Who?")]
    question = [*turns, {"role": "user", "content": "Who?"}]
    reply = KVzipChatModel(engine=engine, max_tokens=12).invoke(messages)
    assert reply.usage_metadata["input_token_details"]["cache_read"] == context.n_tokens  # type: ignore[index] # the longest
    assert reply.response_metadata["kvzip"]["context"] == context.key
    assert "model_provider" not in reply.response_metadata
    expected = plain.generate(None, question, max_new_tokens=12)
    assert (reply.content, reply.usage_metadata["input_tokens"]) == (expected.text, expected.usage.input_tokens)  # type: ignore[index]
    # and the logits are the plain prompt's
    ids = plain.prompt_ids(None, question)
    found = engine.stored_prefix(ids)
    assert found is not None
    rest = engine.logits(found, ids[found.n_tokens :])
    torch.testing.assert_close(rest, plain.logits(None, ids)[found.n_tokens :], atol=1e-4, rtol=1e-4)


def test_a_beginning_is_found_on_disk_by_a_later_process_and_not_by_others(tmp_path: Any) -> None:
    first = tiny_engine(cache_dir=tmp_path)
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "I see."}]
    half, context = first.load(turns, ratio=0.5), first.load(turns, ratio=0.8)
    ids = first.prompt_ids(None, [*turns, {"role": "user", "content": "Who?"}])
    assert half.n_tokens == context.n_tokens
    first.close()
    later = tiny_engine(cache_dir=tmp_path)
    assert later.stored_prefix(ids).key == context.key  # type: ignore[union-attr] # the larger ratio
    assert later.stored_prefix(ids[: context.n_tokens]) is None  # nothing would be left to ask
    assert later.stored_prefix([ids[0] + 1, *ids[1:]]) is None
    assert tiny_engine(cache_dir=tmp_path, tenant="else").stored_prefix(ids) is None
    assert tiny_engine("qwen2", cache_dir=tmp_path).stored_prefix(ids) is None
    later.registry.remove(context.key)
    assert later.stored_prefix(ids).key == half.key  # type: ignore[union-attr]
    later.registry.remove(half.key)
    assert later.stored_prefix(ids) is None


def test_a_context_brought_explicitly_wins(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    turns = [HumanMessage("Another page. " * 30), AIMessage("I see.")]
    other = engine.load(turns)
    reply = llm.with_context(context).invoke([*turns, HumanMessage("Who?")])
    assert reply.response_metadata["kvzip"]["context"] == context.key
    # a context made of the conversation that is asked about is used in its place, not put before it
    reply = llm.with_context(other).invoke([*turns, HumanMessage("Who?")])
    ids = engine.prompt_ids(None, [*turns, HumanMessage("Who?")])
    assert reply.usage_metadata["input_tokens"] == len(ids)  # type: ignore[index]


def test_several_contexts_in_one_prompt_are_joined(llm: KVzipChatModel, engine: KVzipEngine) -> None:
    page, other = (engine.load(text, joinable=True, name=text[:7]) for text in (LONG, "Another page. " * 30))
    both = engine.join([page, other])
    expected = engine.generate(both, "Who?", max_new_tokens=12).text
    asked = {
        "one field": (llm.with_context([page, other]), "Who?"),
        "names": (llm.with_context([page.name, other.name]), "Who?"),
        "field and block": (llm.with_context(page), [HumanMessage([other.as_block(), "Who?"])]),
        "two blocks": (llm, [SystemMessage([page.as_block()]), HumanMessage([other.as_block(), "Who?"])]),
        "one of them twice": (llm.with_context([page, other]), [HumanMessage([page.as_block(), "Who?"])]),
    }
    for way, (model, question) in asked.items():
        reply = model.invoke(question)
        assert (reply.text, reply.response_metadata["kvzip"]["context"]) == (expected, both.key), way
    assert llm.with_context([page]).context is page


def test_contexts_that_cannot_be_joined_say_why(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    other = engine.load("Another page. " * 30, system="Be brief.")
    with pytest.raises(InputError, match="another system prompt"):
        llm.with_context(context).invoke([HumanMessage([other.as_block(), "Who?"])])
    with pytest.raises(InputError, match="another system prompt"):
        llm.with_context([context, other])
    for wrong, said in (
        ([], "no context is given"),
        ([3], "no context"),
        (["nothing"], "no context .nothing. of this model"),
        (b"x", "no context"),
    ):
        with pytest.raises(InputError, match=said):
            llm.with_context(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no context"):
        llm.invoke([HumanMessage([{"type": "file", "file_id": "f" * 64}, "Who?"])])


def test_documents_of_a_loader_are_loaded_as_one_context(llm: KVzipChatModel) -> None:
    from langchain_core.document_loaders import BaseLoader

    class Pages(BaseLoader):
        def lazy_load(self) -> Any:
            yield from (Document(f"Page {i}. {TEXT}", metadata={"source": f"{i}.txt"}) for i in range(2))

    context = llm.load_documents(Pages(), name="pages")
    assert [source.name for source in context.sources] == ["0.txt", "1.txt"]
    assert asyncio.run(llm.aload_documents(list(Pages().lazy_load()))).key == context.key
    assert llm.load_documents(Document(TEXT)).sources[0].name == "document 1"
    small = llm.model_copy(update={"ratio": 0.9}).load_documents(TEXT, nbytes=0.3)  # in place of the model's ratio
    assert small.key == llm.engine.load([TEXT], nbytes=0.3).key


# -- traps -----------------------------------------------------------------------------------------------------------


def test_t1_a_cache_of_answers_knows_contexts_blocks_and_options(
    llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext
) -> None:
    other = engine.load("Another page. " * 30, ratio=0.4)
    cached = llm.model_copy(update={"cache": InMemoryCache()})
    for one, two in [
        (cached.with_context(context).invoke("Who?"), cached.with_context(other).invoke("Who?")),
        (cached.invoke([HumanMessage([context.as_block(), "Who?"])]), cached.invoke([HumanMessage([other.as_block(), "Who?"])])),
    ]:
        assert one.response_metadata["kvzip"]["context"] == context.key
        assert two.response_metadata["kvzip"]["context"] == other.key
    assert isinstance(cached.with_context(context)._identifying_params["context"], str)
    again = cached.with_context(engine.load(LONG, ratio=0.4)).invoke("Who?")
    assert again.usage_metadata["total_cost"] == 0  # type: ignore[typeddict-item, index] # LangChain's mark of a hit
    assert engine.stats()["built"] == 2


def test_t2_the_contexts_tokens_do_not_make_langchain_summarise(
    engine: KVzipEngine, context: CompressedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    summaries = []

    class Spy(SummarizationMiddleware):
        def _create_summary(self, messages: Any) -> str:
            summaries.append(messages)
            return "summary"

    def run(llm: KVzipChatModel) -> int:
        summaries.clear()
        agent = create_agent(llm, [], middleware=[Spy(llm, trigger=("tokens", 300), keep=("messages", 1))], checkpointer=InMemorySaver())
        for question in ("Who?", "When?", "Why?"):
            agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "1"}})
        return len(summaries)

    llm = KVzipChatModel(engine=engine, max_tokens=5).with_context(context)
    assert run(llm) == 0
    monkeypatch.setattr(answers, "metadata_of", lambda *args: metadata_of(*args) | {"model_provider": "kvzip"})
    assert run(llm) > 0


def test_t3_a_context_survives_binding_tools_and_agents(engine: KVzipEngine, context: CompressedContext) -> None:
    llm = KVzipChatModel(engine=engine, max_tokens=5)
    seen = []
    for model, prompt in [
        (llm.with_context(context), None),
        (llm, SystemMessage([context.as_block(), {"type": "text", "text": "Quote."}])),
    ]:
        agent = create_agent(model, [weather], system_prompt=prompt, checkpointer=InMemorySaver())
        for question in ("Who?", "When?"):
            state = agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "1"}})
            seen.append(state["messages"][-1].response_metadata["kvzip"].get("context"))
    assert seen == [context.key] * 4


def test_t4_a_forced_choice_is_kept_to(engine: KVzipEngine) -> None:
    from pydantic import BaseModel

    class Answer(BaseModel):
        """An answer."""

        yes: bool

    llm = KVzipChatModel(engine=engine, max_tokens=80)
    for model in (llm, llm.model_copy(update={"profile": {"structured_output": False}})):  # by the schema, and by a forced tool
        state = create_agent(model, [], response_format=Answer).invoke({"messages": [("user", "Yes?")]}, {"recursion_limit": 5})
        assert isinstance(state["structured_response"], Answer)
    with pytest.raises(InputError, match="response_fromat"):
        llm.invoke("Yes?", response_fromat=Answer)  # nothing is silently ignored


def test_t5_traces_hold_no_tensors(llm: KVzipChatModel, context: CompressedContext) -> None:
    runs: list[Any] = []

    class Tracer(BaseTracer):
        def _persist_run(self, run: Any) -> None:
            runs.append(run)

    model = llm.with_context(context).bind_tools([weather], tool_choice="none")
    model.invoke("Who?", config={"callbacks": [Tracer()]})

    def leaves(value: Any) -> Any:
        if isinstance(value, dict):
            for item in value.values():
                yield from leaves(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from leaves(item)
        else:
            yield value

    found = [leaf for run in runs for part in (run.extra, run.serialized, run.inputs, run.outputs) for leaf in leaves(part)]
    assert not [leaf for leaf in found if isinstance(leaf, torch.Tensor | CompressedContext)]
    assert not [leaf for leaf in found if "tensor(" in str(leaf)]
    assert runs[0].extra["invocation_params"]["context"] == context.key
    assert runs[0].extra["metadata"]["ls_provider"] == "kvzip"


def test_t6_a_prefix_does_not_drift_with_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    import transformers.utils.chat_template_utils as utils

    engine = tiny_engine(template="{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    context = engine.load([{"role": "user", "content": LONG}, {"role": "assistant", "content": "I see."}])

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 1, 1)

    monkeypatch.setattr(utils, "datetime", Tomorrow)
    reply = KVzipChatModel(engine=engine, max_tokens=3).invoke([HumanMessage(LONG), AIMessage("I see."), HumanMessage("Who?")])
    assert reply.response_metadata["kvzip"]["context"] == context.key
    ids = engine.prompt_ids(None, "Who?")
    assert ids.count(engine.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2  # nor are its tokens doubled


def test_t7_a_context_is_the_same_after_many_answers(llm: KVzipChatModel, context: CompressedContext) -> None:
    before = [tensor.clone() for layer in context.layers for tensor in layer.tensors()]
    model = llm.with_context(context)
    first = model.invoke("Who?").content
    model.batch(["When?", "Why?"])
    list(model.stream("How?"))
    assert model.invoke("Who?").content == first
    assert all(torch.equal(a, b) for a, b in zip(before, [t for layer in context.layers for t in layer.tensors()], strict=True))


# -- many at once ----------------------------------------------------------------------------------------------------


async def test_agents_of_different_contexts_at_one_time_equal_each_alone(engine: KVzipEngine, context: CompressedContext) -> None:
    """Tools in one, another streams, a third is cancelled."""
    other = engine.load("Another page about ships. " * 15, ratio=0.5)
    llm = KVzipChatModel(engine=engine, max_tokens=40)
    plain = llm.with_context(context)
    called = llm.with_context(other).bind_tools([weather], tool_choice="any")
    alone = plain.invoke("Who?").content
    question = "How is Oslo?"

    def arguments(message: Any) -> Any:
        return [(call["name"], call["args"]) for call in message.tool_calls]

    try:
        expected = arguments(called.invoke(question, max_tokens=200))
    except UnfinishedError:
        expected = None

    async def streamed() -> str:
        return "".join([chunk.text async for chunk in plain.astream("Who?")])

    async def cancelled() -> None:
        async for _ in plain.astream("When?", max_tokens=1500):
            pass

    doomed = asyncio.create_task(cancelled())
    results = asyncio.gather(plain.ainvoke("Who?"), streamed(), called.ainvoke(question, max_tokens=200), return_exceptions=True)
    await asyncio.sleep(0.1)
    doomed.cancel()
    one, two, three = await results
    assert one.content == alone  # type: ignore[union-attr]
    assert two == alone
    assert (arguments(three) if isinstance(three, AIMessage) else None) == expected
    with pytest.raises(asyncio.CancelledError):
        await doomed
    assert [reply.content for reply in plain.batch(["Who?"] * 3)] == [alone] * 3


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_stream_that_is_left_frees_its_row(engine: KVzipEngine, kind: str) -> None:
    llm = KVzipChatModel(engine=engine, max_tokens=1800, temperature=1.0, seed=1)
    admission = engine._model._admission
    if kind == "sync":
        stream = llm.stream("Who?")
        next(stream)
        assert admission._running == 1
        stream.close()
    else:
        async for _ in llm.astream("Who?"):
            assert admission._running == 1
            break
    deadline = time.monotonic() + 10
    while admission._running and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert admission._running == 0


async def test_cancelling_ends_the_reading_of_a_question() -> None:
    engine, read = KVzipEngine(tiny_model(max_position_embeddings=8192), tiny_tokenizer()), list[int]()
    engine.model.register_forward_hook(lambda module, args, output: read.append(1))
    task = asyncio.create_task(KVzipChatModel(engine=engine, max_tokens=2).ainvoke("word " * 1200))
    while not read:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = len(read)
    while engine._model._admission.running:
        await asyncio.sleep(0.001)
    assert len(read) <= before + 1  # of the 24 pieces in which it is read


@pytest.mark.parametrize("loaded", [True, False])
async def test_a_batch_larger_than_the_queue(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_running=2, max_waiting=3)
    monkeypatch.setattr(KVzipEngine, "from_pretrained", lambda model, **options: engine)
    llm = KVzipChatModel(engine=engine, max_tokens=2) if loaded else KVzipChatModel(model="any", max_tokens=2)
    alone = engine.generate(None, "Who?", max_new_tokens=2).text
    doomed = asyncio.create_task(llm.abatch(["Why?"] * 9, {"max_concurrency": 5}))
    await asyncio.sleep(0)
    doomed.cancel()
    await asyncio.gather(doomed, return_exceptions=True)
    while engine.places.running:
        await asyncio.sleep(0.001)
    assert [reply.content for reply in await llm.abatch(["Who?"] * 12, {"max_concurrency": 5})] == [alone] * 12
    with pytest.raises(QueueFullError, match=r"12 calls .* the 2 that run and the 3 that may wait"):
        await llm.abatch(["Who?"] * 12)
    replies = await llm.abatch(["Who?"] * 12, return_exceptions=True)
    assert {type(reply) for reply in replies} == {AIMessage, QueueFullError}


async def test_more_answers_at_once_than_the_loops_pool_has_threads(engine: KVzipEngine, context: CompressedContext) -> None:
    llm = KVzipChatModel(engine=engine, max_tokens=60).with_context(context)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, engine._model._admission._running)
            await asyncio.sleep(0)

    watcher = asyncio.create_task(watch())
    replies = await llm.abatch(["Who?"] * 24)
    watcher.cancel()
    assert len({reply.content for reply in replies}) == 1
    assert most > 12  # asyncio's own pool: cores + 4


# -- the rest --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_langchains_own_error(llm: KVzipChatModel, context: CompressedContext) -> None:
    with pytest.raises(ContextOverflowError, match="window"):
        llm.with_context(context).invoke("word " * 500)


def test_tokens_are_counted_by_the_models_own_template(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    messages = [SystemMessage([context.as_block(), {"type": "text", "text": "S"}]), HumanMessage("Who?")]
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Who?"}]
    assert llm.get_num_tokens_from_messages(messages) == len(engine.prompt_ids(None, turns))
    ended = [HumanMessage("Who?"), AIMessage("", tool_calls=[{"name": "weather", "args": {"town": "Oslo"}, "id": "1"}])]
    assert llm.get_num_tokens_from_messages(ended, [weather]) > llm.get_num_tokens_from_messages(ended) > 20
    assert llm.get_num_tokens("Who?") == 4


def test_the_profile_says_what_a_context_leaves_of_the_window(llm: KVzipChatModel, engine: KVzipEngine, context: CompressedContext) -> None:
    assert llm.profile["max_input_tokens"] == 2048  # type: ignore[index]
    assert llm.with_context(context).profile["max_input_tokens"] == 2048 - context.n_tokens  # type: ignore[index]
    shared = engine.join([context, context, context], positions=context.n_tokens + 9)
    assert llm.with_context(shared).profile["max_input_tokens"] == 2048 - context.n_tokens - 9  # type: ignore[index]
    assert llm.profile["tool_calling"]  # type: ignore[index]
    own = llm.model_copy(update={"profile": {"max_input_tokens": 9}})
    assert own.with_context(context).profile == {"max_input_tokens": 9}


def test_a_conversation_with_tools_goes_through(llm: KVzipChatModel, engine: KVzipEngine) -> None:
    call = {"name": "weather", "args": {"town": "Oslo"}, "id": "1"}
    messages = [HumanMessage("Who?"), AIMessage("", tool_calls=[call]), ToolMessage("rain", tool_call_id="1")]
    reply = llm.bind_tools([weather]).invoke(messages)
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    tools = llm.bind_tools([weather]).kwargs["tools"]  # type: ignore[attr-defined]
    assert reply.usage_metadata["input_tokens"] == len(engine.prompt_ids(None, turns, tools))  # type: ignore[index]


def test_threads_share_one_chat_model(llm: KVzipChatModel, context: CompressedContext) -> None:
    model = llm.with_context(context)
    alone, found = model.invoke("Who?").content, list[Any]()
    threads = [threading.Thread(target=lambda: found.append(model.invoke("Who?").content)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 6
