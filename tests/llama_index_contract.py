"""What LlamaIndex and its users may expect of an LLM with chat and tools, whichever it is: a class of tests to derive from."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.callbacks.token_counting import get_tokens_from_response
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms import LLM, ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel

MESSAGES = [ChatMessage("Be brief.", role="system"), ChatMessage("Who?"), ChatMessage("He.", role="assistant"), ChatMessage("When?")]


class Approval(BaseModel):
    """Who approves what."""

    what: Literal["travel", "books"]
    approved: bool


PROMPT = PromptTemplate("May {who} approve travel?")


def paint(colour: Literal["red", "blue"]) -> str:
    """Paint the wall."""
    return f"painted {colour}"


PAINT = FunctionTool.from_defaults(paint)
VARNISH = FunctionTool.from_defaults(paint, name="varnish")


class Events(BaseEventHandler):
    names: list[str]

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.names.append(event.class_name())


class LLMContract:
    """Derive, and say how the LLM is made.

    The model may be random: where it has to choose, what there is to choose from is given.
    """

    def make(self, model: Any, tokenizer: Any, max_tokens: int) -> LLM:
        raise NotImplementedError

    @pytest.fixture
    def weights(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        raise NotImplementedError

    @pytest.fixture
    def llm(self, weights: tuple[Any, Any]) -> Any:
        return self.make(*weights, max_tokens=12)

    @pytest.fixture
    def patient(self, weights: tuple[Any, Any]) -> Any:
        """With room for JSON and calls."""
        return self.make(*weights, max_tokens=200)

    @pytest.fixture
    def forwards(self, weights: tuple[Any, Any]) -> Iterator[list[int]]:
        """Rows of every forward of the model."""
        rows: list[int] = []
        hook = weights[0].get_input_embeddings().register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
        yield rows
        hook.remove()

    @pytest.fixture
    def events(self) -> Iterator[list[str]]:
        handler, dispatcher = Events(names=[]), get_dispatcher()
        dispatcher.add_event_handler(handler)
        yield handler.names
        dispatcher.event_handlers.remove(handler)

    # -- parity ------------------------------------------------------------------------------------------------------

    def test_chat_streams_what_it_says(self, llm: LLM) -> None:
        chunks = list(llm.stream_chat(MESSAGES))
        assert "".join(chunk.delta or "" for chunk in chunks) == chunks[-1].message.content == llm.chat(MESSAGES).message.content
        assert len(chunks) > 2

    async def test_async_chat_says_the_same(self, llm: LLM) -> None:
        said = llm.chat(MESSAGES).message.content
        chunks = [chunk async for chunk in await llm.astream_chat(MESSAGES)]
        assert (await llm.achat(MESSAGES)).message.content == said == "".join(chunk.delta or "" for chunk in chunks)

    async def test_complete_says_the_same_four_ways(self, llm: LLM) -> None:
        said = llm.complete("Who?").text
        assert "".join(piece.delta or "" for piece in llm.stream_complete("Who?")) == said == (await llm.acomplete("Who?")).text
        assert "".join([piece.delta or "" async for piece in await llm.astream_complete("Who?")]) == said

    # -- events and usage --------------------------------------------------------------------------------------------

    async def test_events_of_chat_fire_once(self, llm: LLM, events: list[str]) -> None:
        for call in (llm.chat, llm.achat):
            events.clear()
            result = call(MESSAGES)
            if asyncio.iscoroutine(result):
                await result
            assert [name for name in events if "Chat" in name] == ["LLMChatStartEvent", "LLMChatEndEvent"]

    async def test_events_of_completions_fire_once(self, llm: LLM, events: list[str]) -> None:
        for call in (llm.complete, llm.acomplete):
            events.clear()
            result = call("Who?")
            if asyncio.iscoroutine(result):
                await result
            assert events == ["LLMCompletionStartEvent", "LLMCompletionEndEvent"]

    async def test_events_of_streams_fire_once(self, llm: LLM, events: list[str]) -> None:
        sync = len(list(llm.stream_chat(MESSAGES)))
        expected = ["LLMChatStartEvent", *["LLMChatInProgressEvent"] * sync, "LLMChatEndEvent"]
        assert [name for name in events if "Chat" in name] == expected
        events.clear()
        assert len([chunk async for chunk in await llm.astream_chat(MESSAGES)]) == sync
        assert [name for name in events if "Chat" in name] == expected

    def test_usage_is_told(self, llm: LLM) -> None:
        for response in (llm.chat(MESSAGES), list(llm.stream_chat(MESSAGES))[-1]):
            prompt, completion = get_tokens_from_response(response)
            assert prompt > 10
            assert 0 < completion <= 12

    # -- what is sent ------------------------------------------------------------------------------------------------

    def test_stop_is_kept_to(self, llm: LLM) -> None:
        whole = str(llm.chat(MESSAGES).message.content)
        assert llm.chat(MESSAGES, stop=[whole[4:7]]).message.content == whole[: whole.index(whole[4:7])]

    def test_max_tokens_is_kept_to(self, llm: LLM) -> None:
        asked = [ChatMessage("Tell a long story about the sea.")]
        whole, cut = (str(response.message.content) for response in (llm.chat(asked), llm.chat(asked, max_tokens=3)))
        assert whole.startswith(cut)
        assert len(cut) < len(whole)

    def test_a_prompt_beyond_the_window_is_refused(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match="window"):
            llm.complete("word " * llm.metadata.context_window)

    def test_an_image_is_refused_not_left_out(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match="image"):
            llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="http://x/y.png")])])

    # -- tools -------------------------------------------------------------------------------------------------------

    def test_a_required_tool_is_called(self, patient: Any) -> None:
        [call] = patient.get_tool_calls_from_response(patient.chat_with_tools([PAINT], "Paint it.", tool_required=True))
        assert call.tool_name == "paint"
        assert call.tool_kwargs["colour"] in ("red", "blue")
        assert str(patient.predict_and_call([PAINT], "Paint it.", tool_required=True)).startswith("painted ")

    async def test_streams_and_async_call_the_same_tool(self, patient: Any) -> None:
        options: dict[str, Any] = {"tools": [PAINT], "user_msg": "Paint it.", "tool_required": True}
        chunks = [chunk async for chunk in await patient.astream_chat_with_tools(**options)]
        last = [patient.chat_with_tools(**options), list(patient.stream_chat_with_tools(**options))[-1], chunks[-1]]
        calls = [patient.get_tool_calls_from_response(response) for response in [*last, await patient.achat_with_tools(**options)]]
        assert [(call.tool_name, call.tool_kwargs) for [call] in calls] == [("paint", calls[0][0].tool_kwargs)] * 4

    def test_the_tool_of_a_choice_is_called(self, patient: Any) -> None:
        response = patient.chat_with_tools([PAINT, VARNISH], "Do it.", tool_choice="varnish")
        assert [call.tool_name for call in patient.get_tool_calls_from_response(response)] == ["varnish"]

    async def test_a_function_agent_runs_a_tool(self, patient: Any) -> None:
        agent = FunctionAgent(tools=[PAINT], llm=patient, initial_tool_choice="paint")
        handler = agent.run("Paint it.", max_iterations=2, early_stopping_method="generate")
        called = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
        await handler
        assert called[0].tool_output.content.startswith("painted ")

    # -- structured output -------------------------------------------------------------------------------------------

    async def test_a_structured_answer_validates(self, patient: LLM, events: list[str]) -> None:
        one = patient.structured_predict(Approval, PROMPT, who="she")
        assert isinstance(one, Approval)
        assert await patient.astructured_predict(Approval, PROMPT, who="she") == one
        assert events.count("LLMStructuredPredictStartEvent") == events.count("LLMStructuredPredictEndEvent") == 2

    async def test_a_streamed_structured_answer_validates(self, patient: LLM) -> None:
        one = patient.structured_predict(Approval, PROMPT, who="she")
        assert list(patient.stream_structured_predict(Approval, PROMPT, who="she"))[-1] == one
        assert [part async for part in await patient.astream_structured_predict(Approval, PROMPT, who="she")][-1] == one

    async def test_a_structured_llm_chats(self, patient: LLM) -> None:
        structured, asked = patient.as_structured_llm(Approval), [ChatMessage("May she approve travel?")]
        assert isinstance(structured.chat(asked).raw, Approval)
        assert isinstance((await structured.achat(asked)).raw, Approval)

    # -- the event loop ----------------------------------------------------------------------------------------------

    async def test_the_loop_goes_on_during_an_answer(self, patient: LLM, forwards: list[int]) -> None:
        seen = set[int]()

        async def look() -> None:
            while True:
                seen.add(len(forwards))
                await asyncio.sleep(0.001)

        task = asyncio.create_task(look())
        await patient.achat([ChatMessage("Tell me a long story about a lighthouse.")])
        task.cancel()
        assert len(forwards) > 50
        assert len(seen) > 10  # it came round meanwhile; were it held up, twice: before and behind

    async def test_four_answers_share_forwards_and_are_as_alone(self, llm: LLM, forwards: list[int]) -> None:
        questions = [[ChatMessage(f"Question {i}?")] for i in range(4)]
        alone = [llm.chat(question).message.content for question in questions]
        steps = len(forwards) / 4
        forwards.clear()
        together = await asyncio.gather(*(llm.achat(question) for question in questions))
        assert [response.message.content for response in together] == alone
        assert max(forwards) == 4
        assert len(forwards) < 2 * steps

    def test_a_stream_that_is_left_ends(self, patient: LLM, forwards: list[int]) -> None:
        stream = patient.stream_chat(MESSAGES)
        next(stream)
        stream.close()
        before = len(forwards)
        time.sleep(0.5)
        assert len(forwards) <= before + 1
