"""Conversations: each alone, whatever others do."""

import gc
import signal
import threading
import time
from typing import Any

import pytest
import torch

from conftest import TEXT, row_over, tiny_engine
from kvzip_memory import CompressedContext, InputError, KVzipEngine, Session, SessionBusyError, WindowError
from kvzip_memory.inference.cache import Row

QUESTIONS = ["Who carries oil?", "When?", "And what is the code of the door?"]


def probe(session: Session) -> torch.Tensor:
    """Logits of the next token after a fixed text, without changing the session."""
    twin = session.fork()
    return twin._model.forward([_row(twin)], [[*twin._talk.ids[twin._tail.length :], 40, 41, 42]])[0][-1]


def _row(session: Session) -> Row:
    return row_over(session.context, session._tail)


def converse(session: Session, questions: list[str]) -> list[torch.Tensor]:
    states = []
    for question in questions:
        session.ask(question, max_new_tokens=6)
        states.append(probe(session))
    return states


def test_interleaved_sessions_over_two_contexts_equal_each_alone(architecture: str) -> None:
    engine = tiny_engine(architecture)
    a, b = engine.load(TEXT, ratio=0.4), engine.load("Another page, longer. " * 12, ratio=0.4)
    alone = {c.key: converse(engine.session(c), QUESTIONS) for c in (a, b)}
    one, two, three = engine.session(a), engine.session(b), engine.session(a)
    for i, question in enumerate(QUESTIONS):
        for session in (one, two, three):
            session.ask(question, max_new_tokens=6)
            assert session.context is not None
            assert torch.equal(probe(session), alone[session.context.key][i])


def test_a_fork_goes_on_from_the_same_conversation_and_neither_sees_the_other(engine: KVzipEngine) -> None:
    context = engine.load(TEXT, ratio=0.4)
    alone = converse(engine.session(context), QUESTIONS)
    session = engine.session(context)
    session.ask(QUESTIONS[0], max_new_tokens=6)
    twin = session.fork()
    twin.ask("Something else entirely?", max_new_tokens=20)
    session.ask(QUESTIONS[1], max_new_tokens=6)
    assert torch.equal(probe(session), alone[1])
    twin.reset()
    assert torch.equal(converse(twin, QUESTIONS)[2], alone[2])


def test_a_reset_session_is_like_a_new_one(engine: KVzipEngine) -> None:
    session = engine.session(engine.load(TEXT, ratio=0.4))
    first = converse(session, QUESTIONS)
    session.reset()
    assert all(torch.equal(x, y) for x, y in zip(first, converse(session, QUESTIONS), strict=True))


@pytest.mark.parametrize(
    "end", ["close", "drop", "cancel", "exception", "never started", "all decoded", "all decoded, cancel", "in a cycle"]
)
def test_an_answer_that_does_not_end_is_taken_back(engine: KVzipEngine, end: str) -> None:
    session = engine.session(engine.load(TEXT, ratio=0.4))
    session.ask(QUESTIONS[0], max_new_tokens=6)
    before, length = probe(session), session.n_tokens
    stream = session.stream(QUESTIONS[1], max_new_tokens=50)
    if end != "never started":
        next(stream)
        next(stream)
    if end.startswith("all decoded"):
        while engine.stats()["running"]:
            time.sleep(0.001)
        assert session.n_tokens == length  # it counts when it has been read
    if end.endswith("cancel"):
        thread = threading.Thread(target=stream.cancel)
        thread.start()
        read = stream._read[:2]
        while piece := next(stream, ""):
            read.append(piece)
        thread.join()
        assert (stream.reply.finish_reason, stream.reply.text) == ("cancelled", "".join(read))
    elif end == "in a cycle":
        stream.itself = stream  # type: ignore[attr-defined]
    elif end == "exception":
        with pytest.raises(KeyError), stream:
            raise KeyError
    elif end == "close":
        stream.close()
    del stream
    gc.collect()
    assert session.n_tokens == length
    assert torch.equal(probe(session), before)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_fails_half_way_leaves_the_session_as_it_was(engine: KVzipEngine, streamed: bool) -> None:
    session = engine.session(engine.load(TEXT, ratio=0.4))
    session.ask(QUESTIONS[0], max_new_tokens=6)
    before = probe(session)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    handle = engine.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(session.stream(QUESTIONS[1])) if streamed else session.ask(QUESTIONS[1])
    handle.remove()
    assert torch.equal(probe(session), before)
    assert session.ask(QUESTIONS[1], max_new_tokens=6).text


def test_a_session_that_is_answering_says_so(engine: KVzipEngine) -> None:
    session = engine.session(engine.load(TEXT, ratio=0.4))
    with session.stream(QUESTIONS[0], max_new_tokens=6) as stream:
        next(stream)
        for attempt in (session.reset, session.fork, lambda: session.ask("Now?"), lambda: stream.reply):
            with pytest.raises(SessionBusyError):
                attempt()
    assert session.ask(QUESTIONS[0], max_new_tokens=6).text


def test_a_stream_that_nobody_reads_decodes_on_and_lets_go_of_its_context() -> None:
    alone = tiny_engine(ratio=0.4)
    context = alone.load(TEXT)
    expected = alone.generate(context, QUESTIONS[0], max_new_tokens=40)
    engine = tiny_engine(ratio=0.4, device_bytes=context.nbytes)
    session = engine.session(engine.load(TEXT))
    stream, unread = session.stream(QUESTIONS[0], max_new_tokens=40), engine.stream(None, "Who?")
    pieces = [next(stream)]
    assert engine.load(TEXT[:-5]).nbytes < context.nbytes  # waits for its end; there is no room beside it
    assert "".join([*pieces, *stream]) == expected.text
    assert stream.reply.usage == expected.usage
    assert engine.stats()["running"] == 0
    assert (unread._pieces, session.n_tokens) == (None, session.context.n_tokens + len(session._talk.ids))  # type: ignore[union-attr]


def test_an_interrupted_reader_gets_the_rest(engine: KVzipEngine) -> None:
    expected = engine.generate(None, QUESTIONS[0], max_new_tokens=20).text
    forward, go = engine._model._batcher._forward, threading.Event()

    def held(*args: Any) -> list[torch.Tensor]:
        assert go.wait(60)
        return forward(*args)

    engine._model._batcher._forward = held
    session = engine.session()
    stream = session.stream(QUESTIONS[0], max_new_tokens=20)
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        signal.signal(signal.SIGINT, before)
    go.set()
    assert "".join(stream) == expected
    assert session.n_tokens == len(session._talk.ids) > 0


def test_a_cancelled_stream_that_is_read_to_its_end_has_its_reply(engine: KVzipEngine) -> None:
    """Whatever was decoded before it was cancelled, and however long the token takes that is being computed."""
    forward, go, calls = engine._model._batcher._forward, threading.Event(), list[int]()

    def held(*args: Any) -> list[torch.Tensor]:
        calls.append(1)
        assert len(calls) < 6 or go.wait(60)
        return forward(*args)

    engine._model._batcher._forward = held
    stream = engine.stream(None, QUESTIONS[0], max_new_tokens=40)
    next(stream)
    while len(calls) < 6:  # it runs ahead of its reader
        time.sleep(0.001)
    stream.cancel()
    timer = threading.Timer(0.2, go.set)
    timer.start()
    assert list(stream) == []
    assert stream.reply.finish_reason == "cancelled"


def test_threads_get_the_answers_each_gets_alone(engine: KVzipEngine) -> None:
    contexts = [engine.load(TEXT, ratio=0.4), engine.load("Another page. " * 20, ratio=0.4)]
    tasks = [(context, f"{question} {i}") for i, question in enumerate(QUESTIONS * 3) for context in contexts]
    alone = [engine.generate(context, question, max_new_tokens=12).text for context, question in tasks]
    answers: list[str] = [""] * len(tasks)

    def ask(i: int) -> None:
        answers[i] = engine.generate(*tasks[i], max_new_tokens=12).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone


def test_two_threads_on_a_real_model(smollm2: KVzipEngine, excerpt_context: CompressedContext) -> None:
    questions = ["What is the telephone number of head office?", "In which year was the company founded?"]
    alone = [smollm2.generate(excerpt_context, q, max_new_tokens=16).text for q in questions]
    answers = [""] * 2

    def ask(i: int) -> None:
        answers[i] = smollm2.generate(excerpt_context, questions[i], max_new_tokens=16).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == alone
    assert "5529" in answers[0]
    assert "1871" in answers[1]


def test_later_turns_are_the_chat_templates_own_rendering(smollm2: KVzipEngine, excerpt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, questions = excerpt[:600], ["What is this about?", "And who wrote it?"]
    context = smollm2.load(text, ratio=1.0)
    fed: list[int] = []
    feed = smollm2._model.feed
    monkeypatch.setattr(smollm2._model, "feed", lambda row, ids, *args, **options: fed.extend(ids) or feed(row, ids, *args, **options))
    session = smollm2.session(context)
    replies = [session.ask(question, max_new_tokens=8, speculate=False).text for question in questions]
    turns = [("user", f"{text}\n\n{questions[0]}"), ("assistant", replies[0]), ("user", questions[1])]
    rendered = smollm2.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
    )
    whole = smollm2.tokenizer(rendered + replies[1], add_special_tokens=False).input_ids
    assert [*context.token_ids.tolist(), *fed, *session._talk.ids[session._tail.length :]] == whole


def test_after_a_stop_string_a_session_remembers_the_text_before_it_and_no_more(
    smollm2: KVzipEngine, excerpt_context: CompressedContext
) -> None:
    question = "What is the telephone number of head office?"
    free = smollm2.generate(excerpt_context, question, max_new_tokens=16).text
    stop = " head office"
    session = smollm2.session(excerpt_context)
    reply = session.ask(question, max_new_tokens=16, stop=stop)
    assert reply.text == free[: free.index(stop)]
    told = smollm2.session(excerpt_context)  # the same conversation, fed as text
    ids = [*smollm2.prompt_ids(excerpt_context, question), *smollm2._prompts.text_ids(reply.text)]
    smollm2._model.forward([_row(told)], [ids])
    assert session.n_tokens == told._start + told._tail.length
    torch.testing.assert_close(probe(session), probe(told), atol=1e-3, rtol=1e-3)


def test_a_question_that_no_longer_fits_is_refused_before_any_work(engine: KVzipEngine) -> None:
    session = engine.session(engine.load(TEXT, ratio=0.4))
    session.ask(QUESTIONS[0], max_new_tokens=4)
    before = probe(session)
    with pytest.raises(WindowError, match=r"window of 2,048 tokens.*reset\(\)") as error:
        session.ask("word " * 500)
    assert error.value.window == 2048
    assert error.value.tokens > 2048
    assert torch.equal(probe(session), before)


def test_an_answer_ends_where_the_window_does(engine: KVzipEngine) -> None:
    context = engine.load("word " * 340, ratio=0.4)
    reply = engine.generate(context, "Go on.", max_new_tokens=10_000)
    assert reply.usage.total_tokens == engine.window
    assert reply.finish_reason == "length"


@pytest.mark.parametrize("question", ["", "   \n", [{"role": "user", "content": "Who?"}, {"role": "user", "content": ""}], []])
def test_an_empty_question_is_refused_first_or_later(engine: KVzipEngine, question: str) -> None:
    session = engine.session()
    with pytest.raises(InputError, match=r"empty|no messages"):
        session.ask(question)
    session.ask("Who?", max_new_tokens=2)
    with pytest.raises(InputError, match=r"empty|no messages|only be the first"):
        session.ask(question)
    assert session.ask("When?", max_new_tokens=2).text


@pytest.mark.parametrize("question", [None, 42, [1, 2]])
def test_what_is_no_question_is_refused(engine: KVzipEngine, question: object) -> None:
    with pytest.raises(InputError, match="cannot ask"):
        engine.generate(None, question)  # type: ignore[arg-type]


def test_closing_from_another_thread_ends_the_answer(engine: KVzipEngine) -> None:
    session = engine.session(engine.load(TEXT, ratio=0.4))
    stream = session.stream(QUESTIONS[0], max_new_tokens=1500)
    next(stream)
    thread = threading.Thread(target=lambda: list(stream))
    thread.start()
    while thread.is_alive():
        stream.close()
    assert session.n_tokens == session.context.n_tokens  # type: ignore[union-attr]
    assert session.ask(QUESTIONS[1], max_new_tokens=2).text


def test_a_session_without_a_context_keeps_its_turns(engine: KVzipEngine) -> None:
    session = engine.session()
    session.ask("One?", max_new_tokens=4)
    session.ask("Two?", max_new_tokens=4)
    assert session.n_tokens == len(session._talk.ids)
    reply = session.ask("Three?", max_new_tokens=4)
    assert reply.usage.cached_tokens > 0
    assert reply.receipt.key is None
