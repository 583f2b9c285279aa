"""KVzipChatEngine: conversations over documents."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.chat_engine.types import ChatMode
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer, Memory

import writers
from conftest import TEXT
from documents import DOCUMENTS, THIRD
from kvzip_memory import InputError, KVzipEngine, SessionBusyError, WindowError
from llama_index_kvzip import KVzipChatEngine, KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine
from synthetic import processes


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=12)


async def test_a_chat_engine_answers_from_documents_and_history(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    chat_engine, model = index.as_chat_engine(system_prompt="Be brief."), llm.with_context(index.parts()[0].context)
    said = [ChatMessage("Be brief.", role="system"), ChatMessage("Who?")]
    first = chat_engine.chat("Who?")
    assert str(first) == model.chat(said).message.content
    said += [ChatMessage(str(first), role="assistant"), ChatMessage("When?")]
    expected = str(model.chat(said).message.content)
    assert str(await chat_engine.achat("When?")) == expected
    assert [message.role.value for message in chat_engine.chat_history] == ["user", "assistant"] * 2
    assert [node.node.ref_doc_id for node in first.source_nodes] == ["a", "b"]
    streamed = chat_engine.stream_chat("When?", chat_history=said[1:3])
    assert "".join(streamed.response_gen) == expected
    assert len(streamed.source_nodes) == 2
    astreamed = await chat_engine.astream_chat("When?", chat_history=said[1:3])
    assert "".join([piece async for piece in astreamed.async_response_gen()]) == expected
    chat_engine.reset()
    assert str(chat_engine.chat("Who?")) == str(first)


def test_a_conversation_is_over_all_contexts_joined(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents([*DOCUMENTS, THIRD], llm=llm, context_tokens=450)
    chat_engine, engine = index.as_chat_engine(), llm.engine
    join = engine.join([part.context for part in index.parts()])
    response = chat_engine.chat("Who?")
    assert str(response) == engine.generate(join, "Who?", max_new_tokens=llm.max_tokens).text
    assert [node.node.ref_doc_id for node in response.source_nodes] == ["a", "c", "b"]
    index = KVzipIndex.from_documents([Document(text=f"{i}. {TEXT}") for i in range(6)], llm=llm)
    with pytest.raises(InputError, match="6 contexts that do not fit into the window together"):
        index.as_chat_engine()
    assert str(index.as_chat_engine(ChatMode.CONDENSE_QUESTION).chat("Who?")) == str(index.as_query_engine().query("Who?"))


def test_a_long_context_leaves_room_to_converse(engine: KVzipEngine) -> None:
    llm = KVzipLLM(engine=engine, max_tokens=512)
    context = engine.load("x " * 890)
    assert engine.window - context.n_tokens < 300
    chat_engine = KVzipChatEngine.from_context(context, llm=llm)
    assert str(chat_engine.chat("Who?")) == str(KVzipQueryEngine.from_context(context, llm=llm).query("Who?"))
    chat_engine.chat("When? " * 20)


def test_what_cannot_converse_is_refused_when_it_is_made(llm: KVzipLLM) -> None:
    memory = Memory.from_defaults(token_limit=500, memory_blocks=[KVzipMemoryBlock(llm=llm)])
    with pytest.raises(InputError, match="KVzipMemoryBlock, whose context cannot be joined"):
        KVzipIndex.from_documents(DOCUMENTS, llm=llm).as_chat_engine(memory=memory)
    with pytest.raises(InputError, match="from_context"):
        KVzipChatEngine.from_defaults(llm=llm)


async def test_other_modes_take_what_those_of_llama_index_take(llm: KVzipLLM) -> None:
    """As a SummaryIndex of the same documents with the same options, where both read the documents in the prompt."""
    documents = [Document(text=document.text.strip(), doc_id=document.doc_id) for document in DOCUMENTS]  # LlamaIndex strips them
    index, summary = KVzipIndex.from_documents(documents, llm=llm), SummaryIndex.from_documents(documents)
    said = [ChatMessage("Where?"), ChatMessage("There.", role="assistant")]
    for mode in ("context", "condense_plus_context", "simple"):
        answers = []
        for of in (index, summary):
            memory = Memory.from_defaults(chat_history=said, token_limit=500)
            answers.append(of.as_chat_engine(mode, llm=llm, memory=memory, system_prompt="Be brief.", verbose=True).chat("Who?"))
        assert str(answers[0]) == str(answers[1])
        assert [n.text for n in answers[0].source_nodes] == [n.text for n in answers[1].source_nodes]
    memory = Memory.from_defaults(token_limit=500)
    condensing = index.as_chat_engine(ChatMode.CONDENSE_QUESTION, memory=memory, verbose=True, source_top_k=1, max_tokens=3, streaming=True)
    streamed = condensing.stream_chat("Who?")
    assert "".join(streamed.response_gen) == str(index.as_query_engine(max_tokens=3).query("Who?"))
    assert len(streamed.source_nodes) == 1
    assert [message.content for message in memory.get_all()][:1] == ["Who?"]
    for mode in ChatMode.BEST, ChatMode.CONTEXT:
        with pytest.raises(InputError, match=r"options \['nonsense'\] are unknown; known are .*'memory'"):
            index.as_chat_engine(mode, nonsense=1, memory=memory)
    with pytest.raises(ValueError, match="deprecated and removed"):
        index.as_chat_engine("react", verbose=True)


async def test_questions_are_answered_in_their_order_whether_answers_are_read_or_not(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    model, said, history = llm.with_context(index.parts()[0].context), list[ChatMessage](), list[str]()
    for question in ("Who?", "When?", "Where?", "Why?", "How?"):
        answer = str(model.chat([*said, ChatMessage(question)]).message.content)
        kept = answer.strip() if question in ("Who?", "When?", "Why?") else answer  # LlamaIndex strips what was streamed
        said += [ChatMessage(question), ChatMessage(kept, role="assistant")]
        history += [question, answer.strip()]

    def seen(chat_engine: KVzipChatEngine) -> list[str]:
        return [str(message.content).strip() for message in chat_engine.chat_history]

    chat_engine = index.as_chat_engine()
    unread = [chat_engine.stream_chat("Who?"), chat_engine.stream_chat("When?")]
    chat_engine.chat("Where?")
    last = await chat_engine.astream_chat("Why?")
    with pytest.raises(SessionBusyError, match="under way in this event loop"):
        chat_engine.chat("How?")
    with pytest.raises(SessionBusyError):
        chat_engine.reset()
    await chat_engine.achat("How?")
    assert seen(chat_engine) == history
    assert ["".join(stream.response_gen).strip() for stream in unread] == [history[1], history[3]]
    assert "".join([piece async for piece in last.async_response_gen()]).strip() == history[7]

    together = index.as_chat_engine()
    cancelled = [asyncio.create_task(together.achat(question)) for question in ("Who?", "Nobody?", "When?")]
    await asyncio.sleep(0)
    cancelled[1].cancel()
    await asyncio.gather(*cancelled, return_exceptions=True)
    assert seen(together) == history[:4]

    forgotten = index.as_chat_engine()
    forgotten.stream_chat("Who?")
    forgotten.reset()
    assert seen(forgotten) == []


@pytest.mark.parametrize("memory", [None, ChatMemoryBuffer], ids=["memory", "buffer"])
async def test_a_question_without_an_answer_leaves_the_history(llm: KVzipLLM, memory: type[ChatMemoryBuffer] | None) -> None:
    options = {"memory": memory.from_defaults(token_limit=10_000)} if memory else {}
    chat_engine, long = KVzipIndex.from_documents(DOCUMENTS, llm=llm).as_chat_engine(**options), "Why? " * 500
    chat_engine.chat("Who?")
    before = list(chat_engine.chat_history)
    with pytest.raises(WindowError):
        chat_engine.chat(long)
    with pytest.raises(WindowError):
        await chat_engine.achat(long)
    with pytest.raises(WindowError):
        list(chat_engine.stream_chat(long).response_gen)
    astreamed = await chat_engine.astream_chat(long)
    with pytest.raises(WindowError):
        [piece async for piece in astreamed.async_response_gen()]
    assert chat_engine.chat_history == before
    assert str(chat_engine.chat("When?"))
    assert [message.role.value for message in chat_engine.chat_history] == ["user", "assistant"] * 2


def test_a_history_that_several_processes_write_to_has_questions_with_their_answers(tmp_path: Path) -> None:
    """One of them only asks what is too long to be answered, another one is killed."""
    writers.chat_over_a_document(tmp_path).chat("First?")  # makes the table
    barrier = processes.Barrier(3)
    work = [("ana", False, False), ("failing", True, False), ("killed", False, True)]
    workers = [processes.Process(target=writers.converse, args=(tmp_path, who, 12, barrier, *how)) for who, *how in work]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers[:2]] == [0, 0]
    said = writers.chat_over_a_document(tmp_path).chat_history
    assert [message.role.value for message in said] == ["user", "assistant"] * (len(said) // 2)
    asked = Counter(str(message.content).strip() for message in said[::2])
    acknowledged = ["First?", *writers.acknowledged(tmp_path)]
    assert dict.fromkeys(acknowledged, 1).items() <= asked.items()
    assert len(asked) - len(acknowledged) <= 1
    assert {f"ana-{i}?" for i in range(12)} <= asked.keys()


@pytest.mark.parametrize("memory", [None, ChatMemoryBuffer], ids=["memory", "buffer"])
def test_a_long_question_is_answered_without_the_oldest_exchanges(llm: KVzipLLM, memory: type[ChatMemoryBuffer] | None) -> None:
    options = {"memory": memory.from_defaults(token_limit=900, tokenizer_fn=llm.engine.tokenizer.tokenize)} if memory else {}
    context = llm.engine.load("x " * 300)
    chat_engine = KVzipChatEngine.from_context(context, llm=llm, **options)
    for i in range(9):
        chat_engine.chat(f"Question {i}? " + "Why? " * 12)
    before = len(chat_engine.chat_history)
    assert str(chat_engine.chat("Why? " * 260))
    assert len(chat_engine.chat_history) == before + 2


async def test_a_question_that_is_too_long_is_told_with_the_limit_and_the_way_out(llm: KVzipLLM) -> None:
    index = KVzipIndex.from_documents(DOCUMENTS, llm=llm)
    chat_engine, taken, window = index.as_chat_engine(), index.parts()[0].context.n_tokens, llm.engine.window
    told = rf"window of {window:,} tokens {taken:,} are taken.* leaves {window - taken - 1:,}; ask shorter, .*reset\(\), or load less"
    for ask in (chat_engine.chat, lambda asked: list(chat_engine.stream_chat(asked).response_gen)):
        with pytest.raises(WindowError, match=told):
            ask("word " * 350)
    with pytest.raises(WindowError, match=told):
        await chat_engine.achat("word " * 350)
    with pytest.raises(WindowError, match=rf"window is {window:,}; ask shorter, or load less"):
        index.as_query_engine(source_top_k=1).query("word " * 350)
    assert chat_engine.chat_history == []
