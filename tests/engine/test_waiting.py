"""Answers that wait for memory hold no place, and those that hold memory and wait for a place get one."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_cancelling import Gated, freed

from conftest import TEXT, tiny_engine
from kvzip_memory import BudgetError, CompressedContext, InputError, KVzipEngine, QueueFullError
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.inference.admission import Admission

OTHER = "Another page. " * 20


def asked(ask: Callable[[], Any], answers: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    return thread


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def one_at_a_time(**options: Any) -> tuple[KVzipEngine, list[Any], list[str]]:
    """An engine with room for one of two contexts, which lie in the host's memory beside it, and what each answers."""
    sizes = tiny_engine(ratio=0.4)
    size = max(sizes.load(text).nbytes for text in (TEXT, OTHER))
    engine = tiny_engine(ratio=0.4, device_bytes=size, host_bytes=2 * size, max_running=1, **options)
    contexts = [engine.load(text) for text in (TEXT, OTHER)]
    return engine, contexts, [engine.generate(context, "Who?", max_new_tokens=8).text for context in contexts]


@pytest.mark.parametrize("waits", [0, 1])
def test_who_waits_for_room_lets_an_answer_over_a_resident_context_pass(waits: int) -> None:
    engine, contexts, expected = one_at_a_time()
    late: list[Any] = []
    with contexts[1 - waits].lease():
        thread = asked(lambda: engine.generate(contexts[waits], "Who?", max_new_tokens=8).text, late)
        until(lambda: len(engine._model._admission._away) == 1)
        assert engine.stats()["running"] == 0
        assert engine.stats()["waiting"] == 1
        assert engine.generate(contexts[1 - waits], "Who?", max_new_tokens=8).text == expected[1 - waits]
        assert not late
    thread.join(30)
    assert late == [expected[waits]]


async def test_the_same_for_answers_that_an_event_loop_waits_for() -> None:
    engine, contexts, expected = one_at_a_time()
    with contexts[1].lease():
        tasks = [asyncio.create_task(engine.agenerate(contexts[0], "Who?", max_new_tokens=8)) for _ in range(3)]
        while len(engine._model._admission._away) < 3:
            await asyncio.sleep(0.001)
        assert (await asyncio.wait_for(engine.agenerate(contexts[1], "Who?", max_new_tokens=8), 30)).text == expected[1]
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
    assert [(await task).text for task in tasks[1:]] == [expected[0]] * 2
    await freed(engine)


@contextmanager
def building(lost: bool) -> Iterator[tuple[KVzipEngine, Any, Callable[[], Any], Gated]]:
    """An engine, a context that is there, and how to ask about one that is built for that."""
    scorer = Gated()
    scorer.go.set()
    sizes = tiny_engine(ratio=0.4)
    size = max(sizes.load(text).nbytes for text in (TEXT, OTHER))
    engine = tiny_engine(ratio=0.4, max_running=1, scorer=scorer, device_bytes=size)
    cold = engine.load(OTHER)
    if not lost:
        engine.registry.remove(cold.key)
    there = engine.load(TEXT)  # in its place
    assert not engine.registry.tiers(cold.key)
    scorer.begun = threading.Semaphore(0)
    scorer.go.clear()
    yield engine, there, lambda: engine.generate(cold, "Who?", max_new_tokens=8), scorer
    scorer.go.set()


@pytest.mark.parametrize("lost", [True, False])
def test_who_waits_for_a_build_lets_others_pass(lost: bool) -> None:
    with building(lost) as (engine, there, ask, scorer):
        answers: list[Any] = []
        threads = [asked(ask, answers) for _ in range(2)]  # one builds; the other waits for that, or builds for itself
        assert scorer.begun.acquire(timeout=30)
        passed: list[Any] = []
        asked(lambda: engine.generate(there, "Who?", max_new_tokens=8), passed).join(30)
        assert passed
        assert not answers
        scorer.go.set()
        for thread in threads:
            thread.join(30)
        assert answers[0].text == answers[1].text


def test_who_comes_back_is_the_next_and_is_never_refused() -> None:
    admission, order, back = Admission(1, 1), list[str](), threading.Event()

    def first() -> None:
        with admission.admitted() as place:
            with place.away():
                back.wait()
            order.append("back")

    def second() -> None:
        with admission.admitted():
            order.append("queued")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    until(lambda: len(admission._away) == 1)
    with admission.admitted():  # its place was free
        with pytest.raises(QueueFullError, match="1 answers are running and 1 wait"), admission.admitted():
            pass
        admission._queue_limit = 2
        threads.append(threading.Thread(target=second))
        threads[1].start()
        until(lambda: len(admission._queue) == 1)
        back.set()
        until(lambda: len(admission._back) == 1)
        assert admission.running == 1
        assert len(admission.waiting) == 2
    for thread in threads:
        thread.join()
    assert order == ["back", "queued"]
    assert (admission.running, admission.waiting) == (0, [])


@pytest.mark.parametrize("max_running", [1, 2])
async def test_many_answers_over_more_contexts_than_there_is_room_for_all_end(max_running: int) -> None:
    """Room for two of four contexts on the device, and for one more on the host; the fourth is built for each of its answers."""
    texts = [f"Page {i}. " + TEXT for i in range(4)]
    fresh = tiny_engine(ratio=0.4)
    expected = [fresh.generate(fresh.load(text), "Who?", max_new_tokens=4).text for text in texts]
    size = max(fresh.load(text).nbytes for text in texts)
    engine = tiny_engine(ratio=0.4, device_bytes=2 * size, host_bytes=size, max_running=max_running)
    contexts = [engine.load(text) for text in texts]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(4):
            i = rng.randrange(4)
            try:
                if engine.generate(contexts[i], "Who?", max_new_tokens=4).text != expected[i]:
                    wrong.append(i)
            except BudgetError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    picked = [random.Random(seed).randrange(4) for seed in range(16)]
    replies = await asyncio.gather(*(engine.agenerate(contexts[i], "Who?", max_new_tokens=4) for i in picked))
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert [reply.text for reply in replies] == [expected[i] for i in picked]
    assert not wrong
    await freed(engine)


# -- what takes the room ----------------------------------------------------------------------------------------------


def removed(engine: KVzipEngine, context: CompressedContext) -> None:
    engine.registry.remove(context.key)


def expired(engine: KVzipEngine, context: CompressedContext) -> None:
    engine.registry._memory.ttl = 0.0
    with engine.registry._memory.changed:
        assert not engine.registry._memory.alive(engine.registry._memory.device.held[context.key])
    engine.registry._memory.ttl = None


USERS: dict[
    str, tuple[Callable[[KVzipEngine, CompressedContext], None] | None, Callable[[KVzipEngine, CompressedContext], None] | None]
] = {
    "one that was removed, built for an answer": (removed, None),
    "one that was removed as it was read": (None, removed),
    "one that expired as it was read": (None, expired),
    "one that is there": (None, None),
}


@pytest.mark.parametrize("ask", ["load", "a removed one"])
@pytest.mark.parametrize("user", USERS)
def test_who_needs_room_waits_for_whatever_leaves_with_its_reader(user: str, ask: str) -> None:
    before, meanwhile = USERS[user]
    engine = tiny_engine(ratio=0.4)
    held, other = engine.load(TEXT), engine.load(OTHER)
    engine.registry.remove(other.key)
    engine.registry._memory.device.budget = max(held.nbytes, other.nbytes) + 1000
    if before is not None:
        before(engine, held)
    done: list[Any] = []
    with held.lease():
        if meanwhile is not None:
            meanwhile(engine, held)
        thread = asked(lambda: engine.load(OTHER) if ask == "load" else engine.generate(other, "Who?", max_new_tokens=1), done)
        thread.join(0.6)
        assert thread.is_alive()
    thread.join(30)
    assert len(done) == 1
    assert engine.registry._memory.device.reserved == 0


def test_how_long_it_waited_is_told() -> None:
    engine = tiny_engine(ratio=0.4)
    held, other = engine.load(TEXT), engine.load(OTHER)
    engine.registry._memory.device.budget = max(held.nbytes, other.nbytes) + 1000
    engine.registry.remove(held.key)
    engine.registry._memory.wait_s = 1.1
    with held.lease(), pytest.raises(BudgetError, match=rf"0 contexts in use.* {held.nbytes:,} bytes of others .*\(waited 1 s\)"):
        engine.load(OTHER, ratio=0.39)
    engine.load(OTHER)
    engine.registry.pin(other.key)
    began = time.monotonic()
    with pytest.raises(BudgetError, match=r"1 pinned.*\(waited 0 s\)"):
        engine.load(TEXT)
    assert time.monotonic() - began < 1


class _Loads(KVzipScorer):
    """Loads a text while it scores another, or the same."""

    engine: KVzipEngine
    text: str
    found: list[Any]

    def score(self, *given: Any) -> Any:
        if not self.found:
            self.found.append(None)
            try:
                self.found[0] = self.engine.load(self.text).key
            except InputError as error:
                self.found[0] = str(error)
        return super().score(*given)


@pytest.mark.parametrize("same", [True, False])
def test_a_scorer_that_loads_what_it_scores_is_told_and_does_not_wait_for_itself(same: bool) -> None:
    scorer = _Loads()
    scorer.engine, scorer.text, scorer.found = tiny_engine(scorer=scorer), TEXT if same else OTHER, []
    loaded: list[Any] = []
    thread = asked(lambda: scorer.engine.load(TEXT), loaded)
    thread.join(30)
    assert loaded[0].n_tokens > 50
    assert ("by the very thread" in scorer.found[0]) == same
    assert same or scorer.found[0] == scorer.engine.load(OTHER).key


class _Crossed(KVzipScorer):
    """Loads another text while it scores the first one, once both threads are there."""

    engine: KVzipEngine
    both: threading.Barrier
    others: dict[int, str]
    told: list[str]

    def score(self, *given: Any) -> Any:
        if other := self.others.pop(threading.get_ident(), None):
            self.both.wait(30)
            try:
                self.engine.load(other)
            except InputError as error:
                self.told.append(str(error))
        return super().score(*given)


def test_threads_whose_scorers_load_each_others_text_do_not_wait_for_ever() -> None:
    scorer = _Crossed()
    scorer.engine, scorer.both, scorer.others, scorer.told = tiny_engine(scorer=scorer), threading.Barrier(2), {}, []
    loaded: list[Any] = []

    def load(text: str, other: str) -> None:
        scorer.others[threading.get_ident()] = other
        loaded.append(scorer.engine.load(text))

    threads = [threading.Thread(target=load, args=texts, daemon=True) for texts in ((TEXT, OTHER), (OTHER, TEXT))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(loaded) == 2
    assert len(scorer.told) == 1
    assert "by one that waits for it" in scorer.told[0]
    assert not scorer.engine.registry._memory.awaited
