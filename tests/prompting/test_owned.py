"""A tokenizer is its owner's: what he does with it meanwhile cuts no text, and what he changes is followed as a whole or not at all."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Document
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from conftest import CHATML, TEXT, tiny_model, tiny_tokenizer
from kinds import KINDS, tiny
from kvzip_memory import IdentityMismatchError, KVzipEngine
from kvzip_memory.prompting.owned import FEW
from kvzip_memory.system.digests import digest
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipIndex, KVzipLLM
from llama_index_kvzip.packing import room
from makers import mistral

MESSAGES = [{"role": "user", "content": TEXT}]


def tokenizer_of(kind: str) -> Any:
    if kind.startswith("mistral "):
        return mistral(kind.removeprefix("mistral "))
    tokenizer = tiny(kind, ["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def engine_of(tokenizer: Any) -> KVzipEngine:
    return KVzipEngine(tiny_model(vocab_size=max(300, len(tokenizer)), num_hidden_layers=1), tokenizer, 1.0)


def ways(engine: KVzipEngine) -> dict[str, Callable[[], Any]]:
    """Whatever makes ids of texts, or texts of ids."""
    chat, llm = KVzipChatModel(engine=engine, max_tokens=6), KVzipLLM(engine=engine, max_tokens=6)
    counts = KVzipIndex.from_documents([Document(text="A page.")], llm=llm).as_chat_engine()._memory
    return {
        "count": lambda: engine.count_tokens(MESSAGES),
        "prompt": lambda: engine.prompt_ids(None, TEXT),
        "offsets": lambda: engine.token_offsets(TEXT),
        "load": lambda: engine.load(TEXT).token_ids.tolist(),
        "extend": lambda: engine.extend(engine.load(MESSAGES), [{"role": "assistant", "content": TEXT}]).token_ids.tolist(),
        "answer": lambda: engine.generate(None, "Go on.", max_new_tokens=6).text,
        "json": lambda: engine.generate(None, "Go on.", max_new_tokens=30, schema={"enum": ["a", TEXT[:9]]}).text,
        "ids": lambda: chat.get_token_ids(TEXT),
        "messages": lambda: chat.get_num_tokens(TEXT),
        "invoked": lambda: chat.invoke("Go on.").content,
        "room": lambda: room(llm, TEXT),
        "memory": lambda: len(counts.tokenizer_fn(TEXT)),  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("kind", ["bytes", "prepend", "unigram", "mistral v3"])
def test_truncation_by_somebody_else_cuts_no_text(kind: str) -> None:
    """As by another thread, that steps in wherever the owner's tokenizer is used."""
    tokenizer = tokenizer_of(kind)
    engine = engine_of(tokenizer)
    right = {name: way() for name, way in ways(engine).items()}
    assert len(right["load"]) > 20
    backend = getattr(tokenizer, "_tokenizer", None)

    def steps_in(*args: Any, **options: Any) -> None:
        assert backend is not None
        backend.enable_truncation(8)
        backend.enable_padding(length=512, pad_id=3)
        backend.encode_special_tokens = True

    if backend is not None:
        steps_in()
        vars(tokenizer)["set_truncation_and_padding"] = steps_in
    engine.registry.remove(engine.load(TEXT).key)
    assert {name: way() for name, way in ways(engine).items()} == right
    assert {name: way() for name, way in ways(engine_of(tokenizer)).items()} == right


def test_a_thread_that_truncates_all_the_time_changes_nothing_and_is_not_disturbed() -> None:
    tokenizer = tokenizer_of("bytes")
    engine, stop, seen = engine_of(tokenizer), threading.Event(), list[int]()

    def truncate() -> None:
        while not stop.is_set():
            seen.append(len(tokenizer(TEXT, truncation=True, max_length=8, padding="max_length").input_ids))

    tokenizer.pad_token = "<s>"
    thread = threading.Thread(target=truncate)
    thread.start()
    try:
        right = {"ids": engine.text_ids(TEXT), "prompt": engine.prompt_ids(None, TEXT)}
        for _ in range(60):
            assert {"ids": engine.text_ids(TEXT), "prompt": engine.prompt_ids(None, TEXT)} == right
            other = engine_of(tokenizer)
            assert (other.text_ids(TEXT), other._identity["tokenizer"]) == (right["ids"], engine._identity["tokenizer"])
    finally:
        stop.set()
        thread.join()
    assert len(right["ids"]) > 20
    assert set(seen) == {8}


def _replaced(tokenizer: Any) -> None:
    tokenizer._tokenizer = Tokenizer.from_str(tiny("bytes digits").backend_tokenizer.to_str())


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda tokenizer: setattr(tokenizer.backend_tokenizer, name, value)


#: What an owner may change, by what it changes: the model's fields of a key, or only what an answer ends with, or nothing.
CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "template": (lambda t: setattr(t, "chat_template", CHATML.replace("<|im_start|>", "<|im_start|>the ")), True),
    "no template": (lambda t: setattr(t, "chat_template", None), True),
    "a special token": (lambda t: t.add_special_tokens({"additional_special_tokens": ["handbook"]}), True),
    "a token": (lambda t: t.add_tokens(["handbook"]), True),
    "a word that becomes a token": (lambda t: t.add_tokens([t.convert_ids_to_tokens(800)]), True),
    "a token's flags": (lambda t: t.add_tokens([AddedToken("<|im_end|>", special=True, lstrip=True)], special_tokens=True), True),
    "eos": (lambda t: setattr(t, "eos_token", "<|im_end|>"), False),
    "bos": (lambda t: setattr(t, "bos_token", "<|im_end|>"), False),
    "normalizer": (_set("normalizer", normalizers.Lowercase()), True),
    "pre_tokenizer": (_set("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)), True),
    "decoder": (_set("decoder", decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 0)])), True),
    "post_processor": (_set("post_processor", processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])), True),
    "a flag of its model": (lambda t: setattr(t.backend_tokenizer.model, "ignore_merges", True), True),
    "another tokenizer in its place": (_replaced, True),
    "dropout": (lambda t: setattr(t.backend_tokenizer.model, "dropout", 0.5), False),
    "padding side": (lambda t: setattr(t, "padding_side", "left"), False),
    "truncation side": (lambda t: setattr(t, "truncation_side", "left"), False),
    "length": (lambda t: setattr(t, "model_max_length", 9), False),
    "clean up": (lambda t: setattr(t, "clean_up_tokenization_spaces", True), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_an_owner_changes_is_followed_as_by_a_new_engine(change: str) -> None:
    tokenizer = tokenizer_of("bytes")
    engine = engine_of(tokenizer)
    before, session, fields = engine.load(TEXT), engine.session(), dict(engine._identity)
    first = session.ask("Who?", max_new_tokens=4).text
    CHANGES[change][0](tokenizer)
    fresh = KVzipEngine(engine.model, tokenizer, 1.0)
    assert engine._identity == fresh._identity
    assert (engine._identity != fields) is CHANGES[change][1]
    ours, theirs = ways(engine), ways(fresh)
    assert {name: way() for name, way in ours.items()} == {name: way() for name, way in theirs.items()}
    assert engine._model.eos_ids == fresh._model.eos_ids
    assert engine.guidance.added == fresh.guidance.added
    if CHANGES[change][1]:
        with pytest.raises(IdentityMismatchError):
            engine.generate(before, "Who?")
        with pytest.raises(IdentityMismatchError, match="set that one again"):
            session.fold(0)
    else:
        assert engine.load(TEXT).receipt.hit
    assert session.ask("Who?", max_new_tokens=4).text  # goes on as it began
    session.reset()
    assert session.ask("Who?", max_new_tokens=4).text == first or change == "eos"


@pytest.fixture(params=["template", "a token", "decoder"])
def changing(request: pytest.FixtureRequest) -> tuple[KVzipEngine, Callable[..., Any]]:
    """An engine, and what puts a change of its tokenizer right behind a step."""
    tokenizer = tokenizer_of("bytes")
    engine = engine_of(tokenizer)

    def behind(step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **options: Any) -> Any:
            result = step(*args, **options)
            CHANGES[request.param][0](tokenizer)
            return result

        return stepped

    return engine, behind


def test_a_change_in_the_middle_of_a_call_is_not_half_seen(changing: tuple[KVzipEngine, Callable[..., Any]]) -> None:
    engine, behind = changing
    same = {name: way() for name, way in ways(engine_of(tokenizer_of("bytes"))).items()}
    fields = dict(engine._identity)
    engine._contexts.prompt = behind(engine._contexts.prompt)  # type: ignore[method-assign]
    context = engine.load(TEXT)
    assert context.token_ids.tolist() == same["load"]
    assert {name: context.identity[name] for name in fields} == fields
    del engine._contexts.prompt  # type: ignore[method-assign]
    assert engine._identity != fields
    assert engine.load(TEXT).key != context.key


def test_the_key_is_that_of_the_ids_while_another_thread_changes_the_template() -> None:
    tokenizer = tiny_tokenizer()
    engine, stop = KVzipEngine(tiny_model(num_hidden_layers=1), tokenizer, 1.0), threading.Event()
    templates = [CHATML, CHATML.replace("<|im_start|>", "<|im_start|>the ")]
    wanted = {}
    for template in templates:
        tokenizer.chat_template = template
        wanted[digest(template)] = engine.load("A page.").token_ids.tolist()

    def change() -> None:
        while not stop.is_set():
            for template in templates:
                tokenizer.chat_template = template

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for n in range(40):
            context = engine.load(f"A page.{n}")
            assert context.token_ids.tolist()[:6] == wanted[context.identity["template"]][:6]
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_does_what_the_owners_does(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    engine = engine_of(tokenizer)
    copied = engine._language.tokenizer
    for text in (TEXT, " a  b\n\n<|im_end|>é東🙂 ", ""):
        ids = tokenizer(text).input_ids
        assert copied(text).input_ids == ids
        assert copied.decode(ids) == tokenizer.decode(ids)
    assert engine._language.still(tokenizer)
    assert engine._language is engine._language


def test_many_added_tokens_are_counted() -> None:
    tokenizer = tokenizer_of("bytes")
    tokenizer.add_tokens([f"<{i}>" for i in range(FEW)])
    engine = engine_of(tokenizer)
    language = engine._language
    assert engine._language is language
    tokenizer.add_tokens(["<more>"])
    assert engine._language is not language
    assert len(engine.text_ids("<more>")) == 1
