"""Conversations whose older messages are folded: the prompt stays the same to the last id, and only its tail is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import CHATML, TEXT, tiny_engine, tiny_model, tiny_tokenizer
from kvzip_memory import CompressedContext, InputError, KVzipEngine
from kvzip_memory.conversations import Memory, Recalled
from kvzip_memory.prompting.messages import Message, as_message
from templates import CONTROL, HERMES, LLAMA3, MISTRAL, STRICT

TOOLS = [{"type": "function", "function": {"name": "note", "description": "Notes it.", "parameters": {"type": "object", "properties": {}}}}]
FAMILIES = {"chatml": CHATML, "hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "strict": STRICT}


def engine_of(template: str, **options: Any) -> KVzipEngine:
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL.get(template, [])})
    return KVzipEngine(tiny_model(), tokenizer, codec="none", **options)


def conversation(turns: int, tools: bool = True, system: bool = False) -> list[Message]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Fact {turn}: lamp {turn} is wound at {turn} o'clock."})
        if tools and turn % 2:
            call = {"id": f"c{turn}", "type": "function", "function": {"name": "note", "arguments": {"lamp": turn}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": f"noted {turn}"})
        messages.append({"role": "assistant", "content": "Noted."})
    messages.append({"role": "user", "content": "When is lamp 1 wound?"})
    return [message for item in messages if (message := as_message(item))]


def calls_of(messages: list[Message]) -> list[int]:
    """How many messages an agent has at each call of the model."""
    return [i + 1 for i, message in enumerate(messages) if message["role"] in ("user", "tool")]


def rest_ids(engine: KVzipEngine, recalled: Recalled, messages: list[Message], tools: Any) -> list[int]:
    return engine.prompt_ids(recalled.context, messages[recalled.messages :], tools)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("keep", [("messages", 3), ("tokens", 120)])
def test_context_and_rest_are_the_prompt_and_the_rest_stays_short(family: str, keep: Any) -> None:
    engine, tools = engine_of(FAMILIES[family]), TOOLS if family != "strict" else None
    messages = conversation(13 if family != "strict" else 26, tools=family != "strict", system=family in ("chatml", "hermes", "llama3"))
    memory, handle, folds, longest = Memory(("tokens", 800), keep), None, 0, 0
    for count in calls_of(messages):
        so_far = messages[:count]
        recalled = memory.recall(engine, so_far, tools, handle=handle, ratio=0.6)
        prompt, rest = engine.prompt_ids(None, so_far, tools), rest_ids(engine, recalled, so_far, tools)
        if recalled.context is not None:
            assert recalled.context.token_ids.tolist() + rest == prompt
            assert so_far[recalled.messages]["role"] != "tool"
        if recalled.handle != handle:
            folds += 1
            assert len(rest) < 800
        longest, handle = max(longest, len(rest)), recalled.handle
    assert folds > 1
    assert longest < 1000 < len(prompt)


def test_at_ratio_1_the_answer_is_that_to_the_whole_prompt() -> None:
    engine, messages = engine_of(HERMES), conversation(8)
    memory, handle = Memory(("messages", 6), ("messages", 2)), None
    for count in calls_of(messages):
        recalled = memory.recall(engine, messages[:count], TOOLS, handle=handle, ratio=1.0)
        handle = recalled.handle
    assert recalled.context is not None
    assert recalled.context.identity["parent"]
    ids = engine.prompt_ids(None, messages, TOOLS)
    ours = engine.logits(recalled.context, rest_ids(engine, recalled, messages, TOOLS))
    with torch.inference_mode():
        theirs = engine.model(input_ids=torch.tensor([ids])).logits[0, recalled.context.n_tokens :]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def walked(engine: KVzipEngine, messages: list[Message], base: CompressedContext | None = None) -> Recalled:
    memory, recalled = Memory(("messages", 6), ("messages", 2)), Recalled()
    for count in calls_of(messages):
        recalled = memory.recall(engine, messages[:count], TOOLS, base, recalled.handle, 0.6)
    return recalled


def test_an_edited_or_rewound_conversation_goes_on_from_what_still_fits() -> None:
    engine, messages = tiny_engine(), conversation(10)
    last = walked(engine, messages)
    chain = [last.context]
    while (parent := chain[-1].identity["parent"]) is not None:  # type: ignore[union-attr]
        chain.append(engine.get(parent))
    assert len(chain) > 3
    built = engine.stats()["built"]
    memory = Memory(("messages", 60), ("messages", 2))

    half = next(i for i, message in enumerate(messages) if message["content"].startswith("Fact 6"))
    edited = [*messages[:half], {"role": "user", "content": "Fact 6: none."}, *messages[half + 1 :]]
    found = memory.recall(engine, edited, TOOLS, handle=last.handle, ratio=0.6)
    assert found.context is not None
    assert 0 < found.messages <= half
    assert found.context.token_ids.tolist() + rest_ids(engine, found, edited, TOOLS) == engine.prompt_ids(None, edited, TOOLS)

    rewound = messages[: half + 1]
    again = memory.recall(engine, rewound, TOOLS, handle=last.handle, ratio=0.6)
    assert again.context is not None
    assert again.context.key in [context.key for context in chain if context]
    assert engine.stats()["built"] == built  # nothing was read anew

    other = [{**messages[0], "content": "Something else."}, *messages[1:]]
    assert memory.recall(engine, other, TOOLS, handle=last.handle).context is None
    assert memory.recall(engine, messages, [], handle=last.handle).context is None  # other tools, another prompt


def test_what_was_lost_is_made_anew() -> None:
    engine, messages = tiny_engine(), conversation(6)
    last = walked(engine, messages)
    assert last.context is not None
    for entry in engine.registry.contexts():
        engine.registry.remove(entry.key)
    again = Memory(("messages", 6), ("messages", 2)).recall(engine, messages, TOOLS, handle=last.handle, ratio=0.6)
    assert again.context is not None
    assert again.context.identity["parent"] is None
    assert again.context.token_ids.tolist() + rest_ids(engine, again, messages, TOOLS) == engine.prompt_ids(None, messages, TOOLS)


def test_a_conversation_over_a_document_is_folded_behind_it() -> None:
    engine, messages = tiny_engine(), conversation(6)
    page = engine.load(TEXT, ratio=0.6)
    last = walked(engine, messages, page)
    assert last.context is not None
    assert last.context.sources[0].end == page.n_tokens
    whole = page.token_ids.tolist() + engine.prompt_ids(page, messages, TOOLS)
    assert last.context.token_ids.tolist() + rest_ids(engine, last, messages, TOOLS) == whole


def test_the_handle_only_saves_a_search() -> None:
    engine, messages = tiny_engine(), conversation(8)
    last = walked(engine, messages)
    assert last.context is not None
    found = Memory(("messages", 60), ("messages", 2)).recall(engine, messages, TOOLS, ratio=0.6)
    assert (found.context and found.context.key, found.messages) == (last.context.key, last.messages)


def test_triggers_are_any_of_a_list_and_all_of_a_mapping() -> None:
    engine, messages = tiny_engine(), conversation(4)
    tokens = len(engine.prompt_ids(None, messages, TOOLS))

    def folds(trigger: Any) -> bool:
        recalled = Memory(trigger, ("messages", 2)).recall(tiny_engine(), messages, TOOLS, ratio=0.9)
        return recalled.context is not None

    assert folds(("tokens", tokens))
    assert not folds(("tokens", tokens + 1))
    assert folds(("messages", len(messages)))
    assert not folds(("messages", len(messages) + 1))
    assert folds(("fraction", tokens / engine.window))
    assert not folds(("fraction", (tokens + 1) / engine.window))
    assert not folds({"tokens": tokens, "messages": 99})
    assert folds({"tokens": tokens, "messages": 3})
    assert folds([("messages", 99), {"tokens": tokens, "messages": 3}])


@pytest.mark.parametrize(
    ("trigger", "keep"),
    [
        (("words", 5), ("messages", 2)),
        (("tokens", 0), ("messages", 2)),
        (("fraction", 1.5), ("messages", 2)),
        (("messages", 5), ("messages", 5)),
        ({}, ("messages", 2)),
        (("tokens", 5), ("turns", 2)),
    ],
)
def test_a_size_that_is_none_is_an_error(trigger: Any, keep: Any) -> None:
    with pytest.raises(InputError):
        Memory(trigger, keep)


def test_a_template_that_moves_the_beginning_folds_nothing_and_says_so() -> None:
    moving = CHATML.replace("{% for message", "{{ messages | length }}{% for message")
    engine, messages = engine_of(moving), conversation(6, tools=False)
    with pytest.warns(UserWarning, match="nothing is folded"):
        recalled = Memory(("messages", 6), ("messages", 2)).recall(engine, messages)
    assert (recalled.context, recalled.messages) == (None, 0)


def test_a_conversation_that_fills_the_window_is_not_folded_but_may_be_asked() -> None:
    engine = tiny_engine()
    messages = conversation(22, tools=False)
    room = engine.window - len(engine.prompt_ids(None, messages))
    messages[0] = {"role": "user", "content": messages[0]["content"] + "x" * (room - 60)}
    recalled = Memory(("messages", 6), ("messages", 1)).recall(engine, messages)
    assert (recalled.context, recalled.messages) == (None, 0)


@pytest.mark.parametrize("room", [0.5, 1.05])
def test_what_there_is_no_room_for_is_not_folded(room: float) -> None:
    messages, memory = conversation(10), Memory(("messages", 6), ("messages", 2))
    first = memory.recall(tiny_engine(), messages[:7], TOOLS, ratio=1.0)
    assert first.context is not None
    engine = tiny_engine(device_bytes=round(room * first.context.nbytes))
    recalled = memory.recall(engine, messages[:7], TOOLS, ratio=1.0) if room > 1 else Recalled()
    with pytest.warns(UserWarning, match="nothing is folded: the context takes"):
        recalled = memory.recall(engine, messages, TOOLS, handle=recalled.handle, ratio=1.0)
    assert recalled.messages == (0 if room < 1 else first.messages)
