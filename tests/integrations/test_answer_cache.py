"""LangChain's cache of answers: whatever way a context comes in, its key and the tenant's digest are in the key of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import ChatMessage, HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField

from conftest import TEXT, tiny_engine
from kvzip_memory import CompressedContext, InputError, KVzipEngine
from langchain_kvzip import KVzipChatModel

OTHER = "Another page. " * 30


def configured(llm: KVzipChatModel, context: CompressedContext) -> Any:
    return llm.configurable_fields(context=ConfigurableField(id="context")).with_config(configurable={"context": context})


#: Ways in which a context comes into a call: the model that is asked, and what it is asked.
WAYS: dict[str, Callable[[KVzipChatModel, CompressedContext], tuple[Any, Any]]] = {
    "field": lambda llm, context: (llm.with_context(context), "Who?"),
    "field by name": lambda llm, context: (llm.with_context("page"), "Who?"),
    "constructor": lambda llm, context: (KVzipChatModel(engine=llm.engine, context=context, cache=llm.cache, max_tokens=4), "Who?"),
    "config": lambda llm, context: (configured(llm, context), "Who?"),
    "block": lambda llm, context: (llm, [HumanMessage([context.as_block(), "Who?"])]),
    "name": lambda llm, context: (llm, [HumanMessage([{"type": "file", "file_id": "page"}, "Who?"])]),
    "beginning of a key": lambda llm, context: (llm, [HumanMessage([{"type": "file", "file_id": context.key[:8]}, "Who?"])]),
    "system": lambda llm, context: (llm, [SystemMessage([{"type": "file", "file_id": "page"}]), HumanMessage("Who?")]),
    "chat message": lambda llm, context: (llm, [ChatMessage([{"type": "file", "file_id": "page"}, "Who?"], role="user")]),
    "mapping": lambda llm, context: (llm, [{"role": "user", "content": [{"type": "file", "file_id": "page"}, "Who?"]}]),
    "bound": lambda llm, context: (llm.bind(stop=["zz"]), [HumanMessage([{"type": "file", "file_id": "page"}, "Who?"])]),
}
ASK: dict[str, Callable[[Any, Any], Any]] = {
    "invoke": lambda llm, messages: llm.invoke(messages),
    "ainvoke": lambda llm, messages: asyncio.run(llm.ainvoke(messages)),
    "batch": lambda llm, messages: llm.batch([messages])[0],
}


class Keys(InMemoryCache):
    """A cache that tells what answers are kept under."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []

    def update(self, prompt: str, llm_string: str, return_val: Any) -> None:
        self.keys.append(f"{prompt} {llm_string}")
        super().update(prompt, llm_string, return_val)


def model(engine: KVzipEngine, cache: Any) -> KVzipChatModel:
    return KVzipChatModel(engine=engine, max_tokens=4, cache=cache, contexts_by_name=True)


def answered_from(reply: Any) -> str:
    return str(reply.response_metadata["kvzip"]["context"])


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_kept_by_the_context_s_key_and_the_tenant(way: str, ask: str) -> None:
    cache = Keys()
    for tenant, text in (("ana", TEXT), ("ben", TEXT), (None, TEXT), ("ana", OTHER)):
        engine = tiny_engine(tenant=tenant)
        context = engine.load(text, name="page", ratio=0.4)
        first = ASK[ask](*WAYS[way](model(engine, cache), context))
        assert answered_from(first) == context.key
        assert "total_cost" not in first.usage_metadata  # LangChain's mark of a hit
        assert context.key in cache.keys[-1]
        assert str(engine.registry.tenant) in cache.keys[-1]
        again = ASK[ask](*WAYS[way](model(engine, cache), context))
        assert (again.usage_metadata["total_cost"], answered_from(again)) == (0, context.key)
    assert len(cache.keys) == 4


@pytest.mark.parametrize("ask", ASK)
def test_an_answer_from_what_a_name_meant_before_is_not_given(ask: str) -> None:
    engine, cache = tiny_engine(), InMemoryCache()
    block = [HumanMessage([{"type": "file", "file_id": "page"}, "Who?"])]
    for text in (TEXT, OTHER, TEXT):
        context = engine.load(text, name="page", ratio=0.4)
        assert answered_from(ASK[ask](model(engine, cache), block)) == context.key
    engine.registry.remove("page")
    with pytest.raises(InputError, match="no context 'page'"):
        ASK[ask](model(engine, cache), block)


def test_tenants_of_models_that_load_later_share_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def from_pretrained(model: str, *, tenant: str, **options: Any) -> KVzipEngine:
        made.append(tenant)
        return tiny_engine(tenant=tenant)

    monkeypatch.setattr(KVzipEngine, "from_pretrained", from_pretrained)
    cache = Keys()
    for tenant in ("ana", "ben"):
        KVzipChatModel(model="a/b", model_kwargs={"tenant": tenant}, cache=cache, max_tokens=2).invoke("Who?")
    assert made == ["ana", "ben"]
    assert len(set(cache.keys)) == 2
    assert not any("ana" in key or "ben" in key for key in cache.keys)


def test_the_cache_for_all_models_is_keyed_so_too_and_without_one_messages_are_as_they_were() -> None:
    cache = Keys()
    block = [HumanMessage([{"type": "file", "file_id": "page"}, "Who?"])]
    engines = [tiny_engine(tenant=tenant) for tenant in ("ana", "ben")]
    contexts = [engine.load(TEXT, name="page", ratio=0.4) for engine in engines]
    set_llm_cache(cache)
    try:
        replies = [KVzipChatModel(engine=engine, max_tokens=4, contexts_by_name=True).invoke(block) for engine in engines]
        assert [answered_from(reply) for reply in replies] == [context.key for context in contexts]
        assert KVzipChatModel(engine=engines[0], max_tokens=4, cache=False)._by_keys(block) is block
    finally:
        set_llm_cache(None)
    assert block[0].content[0] == {"type": "file", "file_id": "page"}


def test_engines_of_other_ratios_share_no_answer_to_a_marked_prompt() -> None:
    cache, mark = Keys(), {"cache_control": {"type": "ephemeral"}}
    marked = [("system", [{"type": "text", "text": OTHER * 3, **mark}]), ("human", "Who?")]
    keys = {
        answered_from(KVzipChatModel(engine=tiny_engine(ratio=ratio), max_tokens=2, cache=cache).invoke(marked)) for ratio in (0.4, 0.8)
    }
    assert len(keys) == len(cache.keys) == 2
