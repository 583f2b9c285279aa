"""KVzipLLM: the contract of LlamaIndex LLMs, and what goes beyond it: the engine's own answers, contexts, messages, errors."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core.base.llms.types import CacheControl, CachePoint, ImageBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import ChatMessage, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool

from conftest import TEXT, batch_sizes, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, InputError, KVzipEngine, UnfinishedError, WindowError
from llama_index_contract import MESSAGES, PAINT, Approval, LLMContract, paint
from llama_index_kvzip import KVzipLLM


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, max_tokens=12)


@pytest.fixture
def context(engine: KVzipEngine) -> CompressedContext:
    return engine.load(TEXT, ratio=0.4)


def plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role.value, "content": str(message.content)} for message in messages]


class TestContract(LLMContract):
    @pytest.fixture
    def weights(self) -> tuple[Any, Any]:
        return tiny_model(), tiny_tokenizer()

    def make(self, model: Any, tokenizer: Any, max_tokens: int) -> KVzipLLM:
        return KVzipLLM(engine=KVzipEngine(model, tokenizer), max_tokens=max_tokens)


# -- parity ------------------------------------------------------------------------------------------------------


async def test_all_eight_ways_give_the_engines_answer(llm: KVzipLLM, engine: KVzipEngine, context: CompressedContext) -> None:
    for model, source in ((llm, None), (llm.with_context(context), context)):
        said = engine.generate(source, plain(MESSAGES), max_new_tokens=12)
        chunks = list(model.stream_chat(MESSAGES))
        achunks = [chunk async for chunk in await model.astream_chat(MESSAGES)]
        for streamed in (chunks, achunks):
            assert "".join(chunk.delta for chunk in streamed) == streamed[-1].message.content == said.text
            assert len(streamed) > 2
            assert [chunk.raw for chunk in streamed[:-1]] == [None] * (len(streamed) - 1)
        for response in (model.chat(MESSAGES), await model.achat(MESSAGES), chunks[-1], achunks[-1]):
            assert response.message.content == said.text
            assert response.message.role == "assistant"
            assert response.raw["usage"]["prompt_tokens"] == said.usage.input_tokens
        asked = engine.generate(source, "Who?", max_new_tokens=12).text
        pieces = list(model.stream_complete("Who?"))
        apieces = [piece async for piece in await model.astream_complete("Who?")]
        for streamed in (pieces, apieces):
            assert "".join(piece.delta for piece in streamed) == streamed[-1].text == asked
        assert model.complete("Who?").text == (await model.acomplete("Who?")).text == asked
        assert model.predict(PromptTemplate("{q}?"), q="Who") == asked


def test_usage_and_what_was_reused_are_in_raw_and_counted(llm: KVzipLLM, context: CompressedContext) -> None:
    counter = TokenCountingHandler()
    model = llm.with_context(context)
    model.callback_manager = CallbackManager([counter])
    raw = model.chat(MESSAGES).raw
    assert raw["usage"]["cached_tokens"] == context.n_tokens
    assert raw["usage"]["completion_tokens"] == 12
    assert raw["finish_reason"] == "length"
    assert raw["kvzip"] == {"context": context.key, "tier": "device", "nbytes": raw["kvzip"]["nbytes"], "ms": raw["kvzip"]["ms"]}
    assert counter.prompt_llm_token_count == raw["usage"]["prompt_tokens"]
    list(model.stream_chat(MESSAGES))
    assert counter.total_llm_token_count == 2 * raw["usage"]["total_tokens"]


def test_the_window_it_tells_is_what_the_context_leaves(llm: KVzipLLM, engine: KVzipEngine, context: CompressedContext) -> None:
    assert llm.metadata.context_window == engine.window
    assert llm.with_context(context).metadata.context_window == engine.window - context.n_tokens
    shared = engine.join([context, context, context], positions=context.n_tokens + 9)
    assert llm.with_context(shared).metadata.context_window == engine.window - context.n_tokens - 9
    assert llm.metadata.is_chat_model
    assert llm.metadata.is_function_calling_model
    assert llm.metadata.num_output == 12
    with pytest.raises(WindowError, match="do not fit"):
        llm.complete("word " * engine.window)


def test_call_options_override_fields(llm: KVzipLLM) -> None:
    whole = str(llm.chat(MESSAGES).message.content)
    assert llm.chat(MESSAGES, stop=[whole[4:7]]).message.content == whole[: whole.index(whole[4:7])]
    assert llm.chat(MESSAGES, max_tokens=3).raw["usage"]["completion_tokens"] == 3
    warm = llm.model_copy(update={"temperature": 1.0, "seed": 5})
    assert warm.chat(MESSAGES).message.content == llm.chat(MESSAGES, temperature=1.0, seed=5).message.content != whole
    with pytest.raises(InputError, match=r"options \['beams'\] are unknown"):
        llm.chat(MESSAGES, beams=2)


# -- the event loop ----------------------------------------------------------------------------------------------


async def test_concurrent_calls_share_a_batch_and_answer_as_alone(llm: KVzipLLM, engine: KVzipEngine, context: CompressedContext) -> None:
    model = llm.with_context(context).model_copy(update={"max_tokens": 40})
    questions = [[ChatMessage(f"Question {i}?")] for i in range(4)]
    alone = [model.chat(question).message.content for question in questions]
    sizes = batch_sizes(engine)
    together = await asyncio.gather(*(model.achat(question) for question in questions))
    assert [response.message.content for response in together] == alone
    assert max(sizes) == 4


async def test_an_error_arrives_and_a_stream_that_is_left_ends(llm: KVzipLLM, engine: KVzipEngine) -> None:
    with pytest.raises(InputError, match="unknown"):
        await llm.achat(MESSAGES, beams=2)
    stream = await llm.astream_chat(MESSAGES, max_tokens=400)
    await anext(stream)
    await stream.aclose()
    for _ in range(100):
        if engine._model._admission._running == 0:
            break
        await asyncio.sleep(0.05)
    assert engine._model._admission._running == 0
    assert (await llm.achat(MESSAGES)).message.content


# -- tools -------------------------------------------------------------------------------------------------------


def test_required_tools_are_called_and_run(llm: KVzipLLM) -> None:
    model = llm.model_copy(update={"max_tokens": 200})
    response = model.chat_with_tools([PAINT], "Paint it.", tool_required=True)
    [call] = model.get_tool_calls_from_response(response)
    assert call.tool_name == "paint"
    assert call.tool_kwargs["colour"] in ("red", "blue")
    assert call.tool_id
    assert response.raw["finish_reason"] == "tool_calls"
    assert isinstance(response.message.blocks[0], ToolCallBlock)
    assert str(model.predict_and_call([PAINT], "Paint it.", tool_required=True)).startswith("painted ")
    chunks = list(model.stream_chat_with_tools([PAINT], "Paint it.", tool_required=True))
    [streamed] = model.get_tool_calls_from_response(chunks[-1])
    assert streamed.tool_kwargs == call.tool_kwargs
    for chunk in chunks:
        assert all(isinstance(c.tool_kwargs, dict) for c in model.get_tool_calls_from_response(chunk, error_on_no_tool_call=False))


def test_tool_choice_is_kept_to_and_a_cut_call_is_an_error(llm: KVzipLLM) -> None:
    other = FunctionTool.from_defaults(paint, name="varnish")
    model = llm.model_copy(update={"max_tokens": 200})
    response = model.chat_with_tools([PAINT, other], "Do it.", tool_choice="varnish")
    assert [call.tool_name for call in model.get_tool_calls_from_response(response)] == ["varnish"]
    none = llm.chat_with_tools([PAINT], "Do it.", tool_choice="none")
    with pytest.raises(ValueError, match="calls no tool"):
        llm.get_tool_calls_from_response(none)
    with pytest.raises(InputError, match="max_new_tokens is 3"):
        llm.chat_with_tools([PAINT], "Do it.", tool_required=True, max_tokens=3)
    with pytest.raises(UnfinishedError):
        model.chat_with_tools([PAINT], "Do it.", tool_required=True, stop=["paint"])
    forced = llm.chat_with_tools([PAINT], "Do it.", tool_required=True, max_tokens=74)
    assert forced.raw["finish_reason"] == "forced"
    assert len(llm.get_tool_calls_from_response(forced)) == 1


def test_calls_and_results_are_told_as_by_openais_messages(llm: KVzipLLM, engine: KVzipEngine) -> None:
    made = ToolCallBlock(tool_call_id="a", tool_name="paint", tool_kwargs={"colour": "red"})
    messages = [
        ChatMessage("Paint it."),
        ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), made]),
        ChatMessage("painted red", role="tool", additional_kwargs={"tool_call_id": "a"}),
    ]
    told = [
        {"role": "user", "content": "Paint it."},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "name": "paint", "arguments": {"colour": "red"}}]},
        {"role": "tool", "content": "painted red", "tool_call_id": "a"},
    ]
    tools = [PAINT.metadata.to_openai_tool()]
    expected = engine.generate(None, told, tools=tools, tool_choice="paint", max_new_tokens=200)
    response = llm.chat(messages, tools=tools, tool_choice="paint", max_tokens=200)
    [call] = llm.get_tool_calls_from_response(response)
    assert call.tool_kwargs == engine.read_calls(expected.text)[1][0]["arguments"]
    assert response.raw["usage"]["prompt_tokens"] == expected.usage.input_tokens


# -- messages ----------------------------------------------------------------------------------------------------


def test_a_cache_point_loads_what_is_before_it_once(llm: KVzipLLM, engine: KVzipEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    marked = ChatMessage(role="system", blocks=[TextBlock(text=TEXT * 2), point, TextBlock(text="Be brief.")])
    first, second = (llm.chat([marked, ChatMessage(question)]).raw for question in ("Who?", "When?"))
    assert first["kvzip"]["context"] == second["kvzip"]["context"] is not None
    assert second["usage"]["cached_tokens"] > len(TEXT)
    assert (first["kvzip"]["tier"], second["kvzip"]["tier"]) == ("built", "device")
    assert first["usage"]["cache_creation_tokens"] == second["usage"]["cached_tokens"]
    assert first["usage"]["cached_tokens"] == second["usage"]["cache_creation_tokens"] == 0


def test_a_message_may_stand_for_a_context(llm: KVzipLLM, context: CompressedContext) -> None:
    handle = ChatMessage("", role="system", additional_kwargs={"kvzip_context": context.key})
    assert llm.chat([handle, *MESSAGES]).message.content == llm.with_context(context).chat(MESSAGES).message.content


def test_several_contexts_are_joined(llm: KVzipLLM, engine: KVzipEngine, context: CompressedContext) -> None:
    other = engine.load("Another page. " * 9, ratio=0.4, name="other")
    handle = ChatMessage("", role="system", additional_kwargs={"kvzip_context": context.key})
    joined = [
        llm.with_context([other, context]),
        llm.with_context(["other", context.key]),
        llm.with_context(engine.join([other, context])),
    ]
    said = [model.chat(MESSAGES).message.content for model in joined] + [llm.with_context(other).chat([handle, *MESSAGES]).message.content]
    assert len({*said}) == 1
    assert joined[0].metadata.context_window == engine.window - engine.join([other, context]).n_tokens


def test_what_cannot_be_sent_is_refused(llm: KVzipLLM, engine: KVzipEngine, context: CompressedContext) -> None:
    with pytest.raises(InputError, match="'image'"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="http://x/y.png")])])
    other = engine.load("Another page. " * 9, ratio=0.4, system="Be brief.")
    with pytest.raises(InputError, match="another system prompt"):
        llm.with_context(other).chat([ChatMessage("", role="system", additional_kwargs={"kvzip_context": context.key}), *MESSAGES])
    with pytest.raises(ValueError, match="model="):
        KVzipLLM()


def test_weights_load_on_first_use_once_for_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def from_pretrained(model: str, **options: object) -> KVzipEngine:
        made.append((model, options))
        return tiny_engine()

    monkeypatch.setattr(KVzipEngine, "from_pretrained", from_pretrained)
    llm = KVzipLLM(model="some/model", ratio=0.5, max_tokens=3)
    copies = [llm.with_context(None), llm.model_copy(), llm.as_structured_llm(Approval).llm]
    assert not made
    for copy in [llm, *copies]:
        assert copy.complete("Who?").text
    assert made == [("some/model", {"cache_dir": None, "ratio": 0.5})]


def test_it_is_serialised_without_engine_and_context(llm: KVzipLLM, context: CompressedContext) -> None:
    facts = llm.with_context(context).to_dict()
    assert facts["class_name"] == "KVzipLLM"
    assert "given_engine" not in facts
    assert isinstance(facts["engine"], str)
    assert facts["context"] == context.key


def test_unknown_fields_are_refused(engine: KVzipEngine) -> None:
    with pytest.raises(ValueError, match=r"options \['device', 'max_token'\] are unknown; .* model_kwargs"):
        KVzipLLM(engine=engine, device="cuda", max_token=5)
    llm = KVzipLLM(model="some/model", ratio=0.5, callback_manager=CallbackManager([]), system_prompt="Be brief.")
    assert KVzipLLM.from_dict(llm.to_dict()).ratio == KVzipLLM(**llm.to_dict()).ratio == 0.5
