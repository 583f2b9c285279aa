"""Models that think before they answer: what they think is told from what they say, and later turns are read without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from llama_index.core.base.llms.types import TextBlock, ThinkingBlock
from llama_index.core.llms import ChatMessage

from conftest import tiny_model
from kinds import tiny
from kvzip_memory import KVzipEngine
from kvzip_memory.prompting.reasoning import Reasoning, ReasoningReader
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipLLM
from templates import FAMILIES

TAGS = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("answer", "inside", "reasoning", "text"),
    [
        ("<think>\nhm, a < b\n</think>\n\nYes.\n", False, "hm, a < b", "Yes.\n"),
        ("\n<think>hm</think>Yes", False, "hm", "Yes"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("hm\n\nso\n</think>\n\nYes </think> x", True, "hm\n\nso", "Yes </think> x"),
        ("<think>\nnever ends ", False, "never ends", ""),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("  <thin air", False, "", "  <thin air"),
        ("<th", False, "", "<th"),
        ("", True, "", ""),
    ],
)
@given(data=st.data())
def test_reasoning_is_told_from_text_however_it_is_cut(answer: str, inside: bool, reasoning: str, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    reader = ReasoningReader(TAGS, inside)
    pieces = [piece for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True) for piece in reader.push(answer[start:end])]
    pieces += reader.flush()
    assert (reader.reasoning, reader.text) == (reasoning, text)
    assert "".join(piece for piece in pieces if isinstance(piece, Reasoning)) == reasoning
    assert "".join(piece for piece in pieces if not isinstance(piece, Reasoning)) == text


def talk(question: str, answer: str = "") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, *([{"role": "assistant", "content": answer}] if answer else [])]


QUESTIONS = {"How warm is it?": ("Oslo, so cold.", "4 degrees."), "And at night?": ("Colder still.", "It freezes.")}


def thinking_engine(family: str) -> KVzipEngine:
    """A tiny model that has learned to think and answer by a few conversations."""
    known = FAMILIES[family]
    tokenizer = tiny("bytes", known.special, known.tags)
    tokenizer.chat_template = known.template
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.convert_tokens_to_ids(known.special[-1 if family == "r1" else 1])
    )
    eos, opened = model.config.eos_token_id, family == "r1"

    def rows() -> list[tuple[list[int], list[int]]]:
        found, before = [], list[dict[str, str]]()
        for question, (thought, answer) in QUESTIONS.items():
            for messages in (talk(question), [*before, *talk(question)]):
                prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                said = f"{'' if opened else '<think>' + chr(10)}{thought}\n</think>\n\n{answer}"
                found.append(
                    (tokenizer(prompt, add_special_tokens=False).input_ids, [*tokenizer(said, add_special_tokens=False).input_ids, eos])
                )
            before += talk(question, answer)
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    examples = [(torch.tensor([prompt + said]), len(prompt)) for prompt, said in rows()]
    for _ in range(120):
        losses = []
        for ids, start in examples:
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, start:]))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    return KVzipEngine(model.eval(), tokenizer, ratio=1.0)


@pytest.fixture(scope="module", params=["qwen3", "r1"])
def engine(request: pytest.FixtureRequest) -> KVzipEngine:
    return thinking_engine(request.param)


def test_an_answer_comes_without_its_reasoning_and_with_it_where_it_is_asked_for(engine: KVzipEngine) -> None:
    reply = engine.generate(None, "How warm is it?")
    assert (reply.text, reply.reasoning) == ("4 degrees.", "Oslo, so cold.")
    assert "".join(engine.stream(None, "How warm is it?")) == "4 degrees."
    pieces = [*engine.stream(None, "How warm is it?").with_reasoning()]
    assert "".join(piece for piece in pieces if isinstance(piece, Reasoning)) == "Oslo, so cold."
    assert "".join(piece for piece in pieces if not isinstance(piece, Reasoning)) == "4 degrees."


def test_later_turns_are_read_without_reasoning(engine: KVzipEngine) -> None:
    session = engine.session()
    assert session.ask("How warm is it?").text == "4 degrees."
    reply = session.ask("And at night?")
    assert (reply.text, reply.reasoning) == ("It freezes.", "Colder still.")
    whole = engine.prompt_ids(None, [*talk("How warm is it?", "4 degrees."), *talk("And at night?")])
    assert session._talk.ids[: len(whole)] == whole
    text = engine.tokenizer.decode(whole)
    assert "Oslo" not in text
    prompt = engine.tokenizer.apply_chat_template(
        [*talk("How warm is it?", "4 degrees."), *talk("And at night?")], tokenize=False, add_generation_prompt=True
    )
    assert text == prompt
    assert reply.usage.input_tokens == len(whole)
    assert 0 < reply.usage.cached_tokens < len(whole)  # up to where the answer began


def test_a_session_whose_second_answer_is_taken_back_answers_the_same(engine: KVzipEngine) -> None:
    session = engine.session()
    session.ask("How warm is it?")
    stream = session.stream("And at night?")
    next(stream)
    stream.close()
    assert session.ask("And at night?").text == "It freezes."
    context = session.fold(0, ratio=1.0)
    assert "Oslo" not in engine.tokenizer.decode(context.token_ids)


def test_json_is_not_reasoning(engine: KVzipEngine) -> None:
    reply = engine.generate(None, "How warm is it?", schema={"type": "object", "properties": {"n": {"enum": [4, 5]}}, "required": ["n"]})
    assert (reply.text in ('{"n": 4}', '{"n": 5}'), reply.reasoning) == (True, "")


async def test_langchain_gives_reasoning_as_a_block_and_takes_it_back(engine: KVzipEngine) -> None:
    llm = KVzipChatModel(engine=engine)
    asked: list[Any] = [HumanMessage("How warm is it?")]
    streamed: Any = None
    for chunk in llm.stream(asked):
        streamed = chunk if streamed is None else streamed + chunk
    for answer in (llm.invoke(asked), await llm.ainvoke(asked), streamed):
        assert isinstance(answer, AIMessage)
        kinds = [(block["type"], block.get("reasoning") or block.get("text")) for block in answer.content_blocks]
        assert kinds == [("reasoning", "Oslo, so cold."), ("text", "4 degrees.")]
        assert answer.text == "4 degrees."
        assert llm.invoke([*asked, answer, HumanMessage("And at night?")]).text == "It freezes."


async def test_llama_index_gives_reasoning_as_a_block_and_takes_it_back(engine: KVzipEngine) -> None:
    llm = KVzipLLM(engine=engine)
    asked = [ChatMessage("How warm is it?")]
    *_, streamed = pieces = [*llm.stream_chat(asked)]
    for answer in (llm.chat(asked), await llm.achat(asked), streamed):
        assert answer.message.blocks == [ThinkingBlock(content="Oslo, so cold."), TextBlock(text="4 degrees.")]
        assert answer.message.content == "4 degrees."
        assert llm.chat([*asked, answer.message, ChatMessage("And at night?")]).message.content == "It freezes."
    assert "".join(piece.delta or "" for piece in pieces) == "4 degrees."
    assert "".join(piece.additional_kwargs.get("thinking_delta", "") for piece in pieces) == "Oslo, so cold."
