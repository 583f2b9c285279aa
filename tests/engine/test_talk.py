"""Sessions over many turns: what later turns read is the template's own rendering of what was said before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from conftest import tiny_model
from kinds import tiny
from kvzip_memory import KVzipEngine, Reply
from kvzip_memory.inference.generation import Sampler
from kvzip_memory.prompting.messages import Message
from kvzip_memory.session import Session
from templates import FAMILIES

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a town.", "parameters": {"type": "object", "properties": {}}},
}


def engine_of(family: str, kind: str = "bytes digits", template: Any = None) -> KVzipEngine:
    known = FAMILIES[family]
    tokenizer = tiny(kind, known.special, known.tags)
    tokenizer.chat_template = known.template if template is None else template
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return KVzipEngine(model, tokenizer, ratio=1.0, progress=False, template_kwargs=known.kwargs or None)


class Speaker:
    """Says what it is given, id by id, in the place of what a random model would say."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __call__(self, session: Session, question: str | Sequence[Message], answer: str, tools: Any = None, **options: Any) -> Reply:
        tokenizer = session._prompts.tokenizer
        self.ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return session.ask(question, tools, speculate=False, **options)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Speaker:
    speaker = Speaker()
    monkeypatch.setattr(Sampler, "_pick", lambda sampler, logits: speaker.ids.pop(0))
    return speaker


def read(session: Session) -> str:
    """All that the session has read and said, its context included."""
    before = session.context.token_ids.tolist() if session.context else []
    return session._prompts.tokenizer.decode([*before, *session._talk.ids])


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def rendered(engine: KVzipEngine, messages: list[dict[str, str]], **options: Any) -> str:
    kwargs = {"tokenize": False, "add_generation_prompt": True} | options
    return engine.tokenizer.apply_chat_template(messages, **kwargs)


@pytest.mark.parametrize("family", ["qwen3", "llama3.1", "gemma3", "llama2"])
def test_a_stop_string_within_a_token_takes_nothing_from_what_was_said(family: str, say: Speaker) -> None:
    engine = engine_of(family)
    session = engine.session()
    assert say(session, "Which town?", "It is Oslo.\n\nMore", stop=["\n"]).text == "It is Oslo."
    say(session, "And?", "No")
    assert "It is Oslo." in read(session)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_folded_session_describes_its_tools_once(keep: int, say: Speaker) -> None:
    engine = engine_of("qwen3")
    session = engine.session()
    say(session, turns("How warm?"), "Cold.", [TOOL])
    say(session, "Where?", "Oslo.")
    say(session, "When?", "Today.")
    session.fold(keep)
    say(session, "Why?", "So.")
    assert read(session).count("Of a town.") == 1


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("over", [False, True])
def test_what_was_thought_is_not_folded(keep: int, over: bool, say: Speaker) -> None:
    engine = engine_of("qwen3")
    session = engine.session(engine.load("A page about lamps.") if over else None)
    say(session, "First?", "<think>\nSECRET one\n</think>\n\nYes.")
    reply = say(session, "Second?", "<think>\nSECRET two\n</think>\n\nNo.")
    assert (reply.text, reply.reasoning) == ("No.", "SECRET two")
    session.fold(keep)
    assert session.context is not None
    assert "SECRET" not in engine.tokenizer.decode(session.context.token_ids)
    say(session, "Third?", "So.")
    whole = turns(*(["A page about lamps.\n\nFirst?"] if over else ["First?"]), "Yes.", "Second?", "No.", "Third?")
    assert read(session).startswith(rendered(engine, whole))


@pytest.mark.parametrize("family", ["qwen3", "r1", "llama2", "llama3.1", "gemma3"])
def test_a_session_that_repeats_its_context_goes_on_as_the_template_has_it(family: str, say: Speaker) -> None:
    engine = engine_of(family)
    before = turns("Name a town.", "Oslo.")
    session = engine.session(engine.load(before))
    opened = "" if family == "r1" else "<think>\n"
    thought = f"{opened}hm\n</think>\n\n" if engine._prompts.thought else ""
    assert say(session, [*before, *turns("Another?")], f"{thought}Rome.").text == "Rome."
    say(session, "Why?", "So.")
    expected = rendered(engine, turns("Name a town.", "Oslo.", "Another?", "Rome.", "Why?"), date_string="26 Jul 2024")
    assert read(session).startswith(engine.tokenizer.decode(engine.tokenizer(expected, add_special_tokens=False).input_ids))


def test_calls_stay_as_they_were_generated(say: Speaker) -> None:
    engine = engine_of("qwen3")
    session = engine.session()
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    say(session, turns("How warm?"), call, [TOOL])
    say(session, "Where?", "Oslo.")
    assert f"assistant\n{call}<|im_end|>" in read(session)


def test_a_template_for_tools_is_used_where_there_are_some() -> None:
    known = FAMILIES["qwen3"]
    engine = engine_of("qwen3", template={"default": FAMILIES["qwen2.5"].template, "tool_use": known.template})
    messages = turns("How warm?", "Cold.", "Why?")
    for tools in (None, [TOOL]):
        expected = engine.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert engine.tokenizer.decode(engine.prompt_ids(None, messages, tools)) == expected
    engine.tokenizer.chat_template["default"] = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    assert engine.tokenizer.decode(engine.prompt_ids(None, messages)) == "How warm?!Cold.!Why?!"
