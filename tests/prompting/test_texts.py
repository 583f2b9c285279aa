"""Texts as people bring them: what is no name of a file, halves of surrogate pairs, and the mark of a file's beginning."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import HumanMessage
from llama_index.core import Document as LlamaIndexDocument
from llama_index.core.llms import ChatMessage

from conftest import TEXT, tiny_engine
from kinds import KINDS, tiny
from kvzip_memory import Document, InputError, KVzipEngine, WindowError
from kvzip_memory.prompting.cleaning import clean
from kvzip_memory.prompting.documents import as_document
from kvzip_memory.prompting.encoding import Encoder
from kvzip_memory.prompting.messages import as_message, as_messages
from kvzip_memory.system.printable import brief
from langchain_kvzip import KVzipChatModel, create_memory_tools
from llama_index_kvzip import KVzipChatEngine, KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine

LONE = "x\ud83d y"
READ = "x\ufffd y"

# -- names of files ----------------------------------------------------------------------------------------------

#: One-line texts under 256 characters that no file can be called.
NO_NAMES = ["日" * 86, "a\0b", LONE]


@pytest.mark.parametrize("text", NO_NAMES, ids=["long", "nul", "surrogate"])
def test_a_text_need_not_be_a_possible_name(engine: KVzipEngine, text: str) -> None:
    context = engine.load(text)
    assert engine.tokenizer.decode(context.token_ids).endswith(clean(text, ""))
    engine.extend(context, [text, "more"])
    llm = KVzipChatModel(engine=engine)
    assert llm.load_documents(text).token_ids.tolist() == context.token_ids.tolist()
    assert "is kept" in create_memory_tools(engine)[0].invoke({"name": "page", "text": text})


@pytest.mark.parametrize("path", [*NO_NAMES, "x" * 5000, "a/" + "x" * 300], ids=["long", "nul", "surrogate", "longer", "deep"])
def test_a_path_that_no_file_can_have_is_a_file_that_is_not_there(engine: KVzipEngine, path: str, tmp_path: Path) -> None:
    load = create_memory_tools(engine, folder=tmp_path)[0]
    assert load.invoke({"path": path}) == f"there is no file {brief(path)}"
    with pytest.raises(InputError, match="cannot read"):
        engine.load(Path(path))
    with pytest.raises(InputError, match="does not exist"):
        KVzipEngine.from_pretrained(f"{path}.gguf")


@pytest.mark.parametrize("name", NO_NAMES, ids=["long", "nul", "surrogate"])
def test_a_models_name_need_not_be_a_possible_path(engine: KVzipEngine, name: str) -> None:
    engine.model.config.name_or_path = name
    assert KVzipChatModel(engine=engine).model_name == KVzipLLM(engine=engine).model == name


def test_an_agents_document_may_have_a_name_that_is_no_text(engine: KVzipEngine, tmp_path: Path) -> None:
    load, names, ask, forget = create_memory_tools(engine, namespace="caf\udce9", max_tokens=3)
    load.invoke({"name": LONE, "text": TEXT})
    assert names.invoke({}).startswith(READ)
    assert "no document" not in ask.invoke({"name": LONE, "question": LONE})
    assert "is forgotten" in forget.invoke({"name": LONE})


# -- surrogates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("plain, 日本 🙂", "plain, 日本 🙂"),
        (LONE, READ),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd"),
        ("end \ud83d", "end \ufffd"),
        (b"caf\xe9 9".decode("utf-8", "surrogateescape"), "caf\ufffd 9"),
        ("\ufeffBOM \ufeff", "BOM \ufeff"),
        ("\ufeff\ud83d", "\ufffd"),
        ("", ""),
    ],
)
def test_half_a_pair_is_read_as_a_replacement_and_a_whole_one_as_its_character(text: str, read: str) -> None:
    assert clean(text, "a text") == read
    assert clean(read, "a text") == read.removeprefix("\ufeff")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, "kvzip_memory.prompting.cleaning"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_one_warning_names_the_document_and_the_place(engine: KVzipEngine, warnings: Callable[[], list[str]]) -> None:
    text = TEXT + "\ud83d and \udce9"
    for _ in range(2):
        engine.load(["The first.", Document(text, "scan.pdf")])
    engine.load(["The first.", text + "."])
    halves = f"character {len(TEXT)} is half of a surrogate pair; 2 such are read as U+FFFD"
    assert warnings() == [f"document 'scan.pdf': {halves}", f"document 2: {halves}"]


def test_pairs_and_marks_are_read_without_a_word(engine: KVzipEngine, warnings: Callable[[], list[str]]) -> None:
    assert engine.load("\ufeff\ud83d\ude00 page").key == engine.load("😀 page").key
    assert warnings() == []


def equal(engine: KVzipEngine, use: Callable[[KVzipEngine, str], Any]) -> None:
    """What is done with a text with half a pair and with the text as it is read has the same result."""
    assert use(engine, LONE) == use(engine, READ)


TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}


def tool(text: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {text: {"description": text, "enum": [text]}}}
    return {"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}


def conversation(text: str) -> list[dict[str, Any]]:
    call = {"id": "1", "function": {"name": "f", "arguments": {text: [text, {"a": text}]}}}
    said = [("system", text), ("user", text), ("assistant", text)]
    told = [{"role": role, "content": content} for role, content in said]
    return [*told[:-1], {**told[-1], "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": text}]


USES: dict[str, Callable[[KVzipEngine, str], Any]] = {
    "document": lambda engine, text: engine.load(text).key,
    "documents": lambda engine, text: engine.load([text, Document(text, text, {text: text})]).key,
    "langchain": lambda engine, text: engine.load(LangChainDocument(text, metadata={"source": text})).sources,
    "llamaindex": lambda engine, text: engine.load(LlamaIndexDocument(text=text, metadata={"title": text})).sources,
    "system": lambda engine, text: engine.load(TEXT, system=text).key,
    "keep": lambda engine, text: engine.load(TEXT + text, keep=text, ratio=0.3).kept_pairs,
    "extension": lambda engine, text: engine.extend(engine.load(TEXT), text, keep=text).key,
    "turns": lambda engine, text: engine.extend(engine.load(TEXT), [{"role": "user", "content": text}], keep=[text]).key,
    "question": lambda engine, text: engine.prompt_ids(engine.load(TEXT), text),
    "conversation": lambda engine, text: engine.load(conversation(text), system=text, tools=[tool(text)]).key,
    "messages": lambda engine, text: engine.prompt_ids(None, conversation(text), [tool(text)]),
    "tools": lambda engine, text: engine.generate(None, "a", tools=[tool(text)], tool_choice="any", max_new_tokens=200).text,
    "counted": lambda engine, text: engine.count_tokens(conversation(text), [tool(text)]),
    "offsets": lambda engine, text: engine.token_offsets(text),
    "relevance": lambda engine, text: engine.relevance([(engine.load(TEXT), [(5, 9), (9, 20)])], text, text)[0].tolist(),
    "langchain model": lambda engine, text: KVzipChatModel(engine=engine, max_tokens=3).invoke([("system", text), ("human", text)]).content,
    "langchain tokens": lambda engine, text: KVzipChatModel(engine=engine).get_token_ids(text),
    "llamaindex model": lambda engine, text: KVzipLLM(engine=engine, max_tokens=3).complete(text).text,
}


@pytest.mark.parametrize("use", USES)
def test_half_a_pair_is_no_error_wherever_texts_come_in(engine: KVzipEngine, use: str) -> None:
    equal(engine, USES[use])


def test_a_file_with_a_mark_of_its_beginning(engine: KVzipEngine, tmp_path: Path) -> None:
    file = tmp_path / "page.txt"
    file.write_text("A page.", encoding="utf-8-sig")
    assert engine.load(file).key == engine.load("A page.").key == engine.load("\ufeffA page.").key
    with pytest.raises(InputError, match="empty"):
        engine.load("\ufeff")


def test_a_document_that_has_no_text_says_so() -> None:
    with pytest.raises(InputError, match="the text of document is a NoneType"):
        as_document(Document(None))  # type: ignore[arg-type]


def test_indexes_chats_and_memories_of_half_a_pair(tmp_path: Path) -> None:
    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path), max_tokens=3)
    documents = [LlamaIndexDocument(text=f"{TEXT} {LONE}", metadata={"file_name": LONE}, doc_id="a")]
    index = KVzipIndex.from_documents(documents, llm=llm)
    index.insert(LlamaIndexDocument(text=f"The boat. {LONE}", doc_id="b"))
    assert index.refresh_ref_docs(documents) == [False]
    assert str(KVzipQueryEngine.from_documents(documents, llm=llm).query(LONE))
    assert index.as_query_engine(source_top_k=1).query(LONE).source_nodes
    chat = index.as_chat_engine()
    assert isinstance(chat, KVzipChatEngine)
    assert str(chat.chat(LONE)) == str(chat.chat(READ, chat_history=[]))
    block = KVzipMemoryBlock(llm=llm)
    asyncio.run(block.aput([ChatMessage(LONE), ChatMessage("b", role="assistant")], from_short_term_memory=True, session_id=LONE))
    assert block.context(LONE) is not None
    block.forget(LONE)
    assert block.context(LONE) is None


def test_messages_of_frameworks_are_read_alike() -> None:
    for message in (HumanMessage(LONE), ChatMessage(LONE), {"role": "user", "content": [{"type": "text", "text": LONE}]}):
        assert as_message(message) == {"role": "user", "content": READ}
    assert as_messages(LONE)[0]["content"] == READ


# -- long texts are remembered -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_read_again_as_it_was_read_first(kind: str) -> None:
    tokenizer = tiny(kind)
    for continued in (False, True):
        encoder, fresh = (Encoder(tokenizer, {}) for _ in range(2))
        texts = [TEXT * 9, TEXT * 9 + "日é\n\n ", " " * 2000]
        for text in [*texts, *texts]:
            fresh.forget()
            read, wanted = encoder.tokens(text, continued), fresh.tokens(text, continued)
            assert read.ids == wanted.ids
            assert [*read.starts] == [*wanted.starts]
            assert [*read.ends] == [*wanted.ends]
            read.ids.clear()  # whoever gets them may change them
        assert encoder._remembered.cache_info().hits == len(texts)


def test_what_is_read_only_to_be_refused_is_not_remembered(engine: KVzipEngine) -> None:
    with pytest.raises(WindowError):
        engine.load("a " * 20_000)
    with pytest.raises(WindowError):
        engine.generate(None, "a " * 20_000)
    assert not engine._speech.now.prompts._encoder._remembered.cache_info().currsize
