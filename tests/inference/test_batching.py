"""Answers of many threads, decoded together: each as if it were alone."""

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conftest import STRESS, TESTS, TEXT, batch_sizes, tiny_engine
from kvzip_memory import InputError, QueueFullError
from kvzip_memory.bridge import pieces_of
from kvzip_memory.inference.admission import Admission
from kvzip_memory.inference.cache import Row
from kvzip_memory.inference.worker import Worker
from kvzip_memory.system import threads
from kvzip_memory.system.calls import Gate


def in_threads(count: int, work) -> None:  # type: ignore[no-untyped-def]
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_many_threads_on_several_contexts_with_cancels_answer_as_each_alone(architecture: str) -> None:
    engine = tiny_engine(architecture)
    contexts = [engine.load(TEXT, ratio=0.3), engine.load("Another page. " * 9, ratio=0.7), None]
    questions = [f"Question {i}?" for i in range(4)]
    pairs = [(c, q) for c in range(len(contexts)) for q in range(len(questions))]
    alone = {(c, q): engine.generate(contexts[c], questions[q], max_new_tokens=12).text for c, q in pairs}
    sizes = batch_sizes(engine)
    rounds = 40 if STRESS else 3

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(rounds):
            c, q = rng.randrange(len(contexts)), rng.randrange(len(questions))
            stream = engine.stream(contexts[c], questions[q], max_new_tokens=12)
            if rng.random() < 0.3:
                next(stream, None)
                stream.cancel()
                list(stream)
            else:
                assert "".join(stream) == alone[c, q]

    in_threads(16, work)
    assert max(sizes) >= 4  # they were together
    assert engine._model._batcher._waiting == []
    assert engine._model._admission._running == 0


def test_a_conversation_among_others_remembers_what_it_would_alone() -> None:
    engine = tiny_engine()
    context = engine.load(TEXT, ratio=0.4)

    def converse(i: int) -> list[str]:
        session = engine.session(context)
        return [session.ask(f"{i}: {q}", max_new_tokens=8).text for q in ("Who?", "And then?", "Why?")]

    alone = [converse(i) for i in range(8)]
    together: dict[int, list[str]] = {}
    in_threads(8, lambda i: together.__setitem__(i, converse(i)))
    assert [together[i] for i in range(8)] == alone


def test_a_row_that_fails_fails_alone() -> None:
    engine = tiny_engine()
    context = engine.load(TEXT, ratio=0.4)
    expected = engine.generate(context, "Who?", max_new_tokens=20).text
    forward, poison = engine._model._batcher._forward, 299

    def failing(rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> list[torch.Tensor]:
        if any(poison in row_ids for row_ids in ids):
            raise RuntimeError("a bad row")
        return forward(rows, ids, n_logits)

    engine._model._batcher._forward = failing
    answers, failed = [], []

    def work(i: int) -> None:
        if i == 0:
            row = Row((), 0, engine.session()._tail)
            with engine._model.answering(row.tail):
                for _ in range(10):
                    with pytest.raises(RuntimeError, match="a bad row"):
                        engine._model.feed(row, [poison], lambda logits: [0])
                    failed.append(i)
        else:
            answers.append(engine.generate(context, "Who?", max_new_tokens=20).text)

    in_threads(6, work)
    assert answers == [expected] * 5
    assert len(failed) == 10


def test_a_long_question_is_fed_in_chunks_between_the_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvzip_memory.inference.modeling.CHUNK_TOKENS", 64)
    engine = tiny_engine()
    lengths: list[int] = []
    forward = engine._model._batcher._forward

    def noted(rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> list[torch.Tensor]:
        lengths.append(max(len(row_ids) for row_ids in ids))
        time.sleep(0.002)
        return forward(rows, ids, n_logits)

    engine._model._batcher._forward = noted
    with engine.stream(None, "Go on.", max_new_tokens=400) as running:
        next(running)
        asked = threading.Thread(target=lambda: engine.generate(None, "word " * 150, max_new_tokens=2))
        asked.start()
        while asked.is_alive():
            next(running)
        asked.join()
    question = [i for i, length in enumerate(lengths) if length > 1][1:]
    assert len(question) >= 10
    between = [b - a for a, b in pairwise(question)]
    assert max(between) > 1  # steps of the running answer lie between its chunks


@pytest.mark.parametrize("count", [4, 32])
def test_streams_that_are_open_and_unread_stop_nobody(count: int) -> None:
    engine = tiny_engine(max_running=count)
    expected = engine.generate(None, "Who?", max_new_tokens=30).text
    pieces: list[list[str]] = []

    def open_all() -> None:
        streams = [engine.stream(None, "Who?", max_new_tokens=30) for _ in range(count + 1)]  # the last one in the same thread
        pieces.extend([next(stream)] for stream in streams)
        assert engine.generate(None, "Who?", max_new_tokens=30).text == expected
        for read, stream in zip(pieces, streams, strict=True):
            read.extend(stream)
            assert stream.reply.text == expected

    thread = threading.Thread(target=open_all, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert ["".join(read) for read in pieces] == [expected] * (count + 1)
    assert engine.stats()["running"] == 0


def test_who_runs_and_who_waits_since_when_is_told() -> None:
    engine, go = tiny_engine(max_running=2), threading.Event()
    forward = engine._model._batcher._forward

    def held(rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> list[torch.Tensor]:
        assert go.wait(60)
        return forward(rows, ids, n_logits)

    engine._model._batcher._forward = held
    asked = [threading.Thread(target=lambda: engine.generate(None, "Who?", max_new_tokens=2)) for _ in range(5)]
    began = time.monotonic()
    for thread in asked:
        thread.start()
    while engine.stats()["waiting"] < 3:
        time.sleep(0.001)
    time.sleep(0.05)
    stats, passed = engine.stats(), time.monotonic() - began
    assert (stats["running"], stats["waiting"]) == (2, 3)
    assert 0.05 <= stats["oldest_wait_s"] <= passed
    go.set()
    for thread in asked:
        thread.join()
    assert {what: engine.stats()[what] for what in ("running", "waiting", "oldest_wait_s")} == {
        "running": 0,
        "waiting": 0,
        "oldest_wait_s": 0.0,
    }


async def test_answers_for_an_event_loop_take_a_thread_each_and_wait_without_one() -> None:
    engine, go, threads = tiny_engine(max_running=2), threading.Event(), []
    expected = engine.generate(None, "Who?", max_new_tokens=6).text
    forward = engine._model._batcher._forward

    def held(rows: Sequence[Row], ids: Sequence[Sequence[int]], n_logits: int) -> list[torch.Tensor]:
        assert go.wait(60)
        return forward(rows, ids, n_logits)

    def pieces() -> Generator[str, None, None]:
        threads.append(threading.current_thread())
        with engine.stream(None, "Who?", max_new_tokens=6) as stream:
            yield from stream

    async def answer() -> str:
        return "".join([piece async for piece in pieces_of(pieces, engine.places)])

    engine._model._batcher._forward = held
    answers = asyncio.gather(*(answer() for _ in range(5)))
    while engine.stats()["running"] < 2:
        await asyncio.sleep(0.001)
    waiting, running = engine.stats()["waiting"], len(threads)
    go.set()
    assert (waiting, running) == (3, 2)
    assert await answers == [expected] * 5
    assert len(set(threads)) == 5


def test_more_answers_than_may_wait_are_refused_with_a_clear_error() -> None:
    engine = tiny_engine(max_running=1, max_waiting=1)
    running = engine.stream(None, "Go on.", max_new_tokens=1500)
    next(running)
    waiting = threading.Thread(target=lambda: engine.generate(None, "Who?", max_new_tokens=2))
    waiting.start()
    while not engine._model._admission._queue:
        time.sleep(0.001)
    with pytest.raises(QueueFullError, match=r"1 answers are running and 1 wait.*max_concurrency.*max_waiting"):
        engine.generate(None, "Too many?", max_new_tokens=2)
    running.close()
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    assert engine.generate(None, "Now?", max_new_tokens=2).finish_reason


def test_admission_is_first_come_first_served() -> None:
    admission, order = Admission(1, 10), []
    with admission.admitted():

        def enter(i: int) -> None:
            with admission.admitted():
                order.append(i)

        threads = []
        for i in range(5):
            threads.append(threading.Thread(target=enter, args=(i,)))
            threads[-1].start()
            while len(admission._queue) <= i:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(5))


def test_whoever_leaves_the_queue_takes_no_place_along() -> None:
    admission, entry = Admission(1, 10), Gate()

    def enter() -> None:
        with admission.admitted(entry):
            pass

    with admission.admitted():
        thread = threading.Thread(target=enter)
        thread.start()
        while not admission.waiting:
            time.sleep(0.001)
        entry.put(None)
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert admission.running == 0

    class Interrupt:
        def get(self, timeout: float | None = None) -> None:
            raise KeyboardInterrupt

    with admission.admitted(), pytest.raises(KeyboardInterrupt), admission.admitted(Interrupt()):  # type: ignore[arg-type]
        pass
    assert admission.running == 0
    with pytest.raises(InputError, match="max_running is 0"):
        tiny_engine(max_running=0)


def test_the_worker_takes_work_in_order_and_hands_back_what_goes_wrong() -> None:
    worker, order, begun, go = Worker(), [], threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert go.wait(60)

    threads = [threading.Thread(target=worker.run, args=(first,))]
    threads[0].start()
    begun.wait()
    for i in range(5):
        threads.append(threading.Thread(target=worker.run, args=(lambda i=i: order.append((i, threading.get_ident())),)))
        threads[-1].start()
        while worker._queue.qsize() <= i:
            time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert [i for i, _ in order] == list(range(5))
    assert len({ident for _, ident in order}) == 1
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 / 0)


@pytest.mark.skipif(threads._openmp() is None, reason="torch does not use GNU OpenMP here")
def test_an_asking_thread_lets_its_openmp_threads_go_and_gets_them_back() -> None:
    def native_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    counts = []

    def compute() -> None:
        threads.release()
        torch.set_num_threads(4)
        before = native_threads()
        for _ in range(2):
            torch.ones(1 << 20).exp_()
            counts.append(native_threads() - before)
            threads.release()
            deadline = time.monotonic() + 10
            while native_threads() > before and time.monotonic() < deadline:  # they end by themselves
                time.sleep(0.001)
            counts.append(native_threads() - before)

    number = torch.get_num_threads()
    try:
        in_threads(1, lambda i: compute())
    finally:
        torch.set_num_threads(number)
    assert counts == [3, 0, 3, 0]


IDLE = """
import time
from pathlib import Path
import torch
from kvzip_memory.inference.worker import Worker

def native_threads(worker):
    worker.run(lambda: torch.ones(1 << 20).exp())
    time.sleep(0.2)  # threads end by themselves
    return len(list(Path("/proc/self/task").iterdir()))

one, other = Worker(), Worker()
print(native_threads(one), native_threads(other), native_threads(one))
"""


@pytest.mark.skipif(threads._openmp() is None, reason="torch does not use GNU OpenMP here")
def test_an_engine_that_computes_has_the_others_let_their_openmp_threads_go() -> None:
    """Two engines in a process: with the threads of both there would be more than processors."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", IDLE], env=environment, check=True, capture_output=True, text=True).stdout
    first, second, third = map(int, out.split())
    assert first == second == third


ENDING = """
import sys
import threading
from conftest import TEXT, tiny_engine

engine = tiny_engine()
context = engine.load(TEXT)
begun = threading.Barrier(4)

def ask():
    begun.wait()
    with engine.stream(context, "Who?", max_new_tokens=100) as stream:
        sys.stdout.write(f"{len(''.join(stream)) > 0}\\n")

for _ in range(3):
    threading.Thread(target=ask).start()
begun.wait()
"""


def test_answers_that_run_when_the_main_thread_ends_end() -> None:
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    out = subprocess.run([sys.executable, "-c", ENDING], env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    assert out.split() == ["True"] * 3


ENDING_UNREAD = """
import os
import sys
from conftest import tiny_engine
from kvzip_memory import KVzipError

engine = tiny_engine(max_running=2)
streams = [engine.stream(None, "Who?", max_new_tokens=1500) for _ in range(2)]
for stream in streams:
    next(stream)
if (pid := os.fork()) == 0:
    for attempt in (lambda: next(streams[0]), lambda: engine.session().ask("Who?")):
        while True:
            try:
                attempt()
            except KVzipError as error:
                print("spawn" in str(error), flush=True)
                break
    streams[0].close()
    os._exit(0)
os.waitpid(pid, 0)
print(len("".join(streams[0])) > 0)
"""


def test_a_process_that_ends_or_forks_while_streams_are_unread_does_not_hang() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", ENDING_UNREAD]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    assert out.split() == ["True"] * 3
