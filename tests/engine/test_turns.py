"""Turns of a conversation that any number of processes write down, killed at any step: none is lost, none is told twice."""

import asyncio
import json
import os
import random
import resource
import threading
import time
from inspect import getmembers, isfunction, signature
from pathlib import Path
from typing import Any

import pytest

import killing
import writers
from conftest import STRESS, say
from killing import add, texts
from kvzip_memory import turns
from kvzip_memory.turns import Turns, TurnsFile, sessions
from llama_index_kvzip import KVzipLLM, KVzipMemoryBlock
from synthetic import in_a_process, processes


@pytest.fixture(params=["file", "memory"])
def lines(request: pytest.FixtureRequest, tmp_path: Path) -> Turns:
    return TurnsFile.of(tmp_path, "ana") if request.param == "file" else Turns()


@pytest.mark.parametrize("before", [0, 2])
def test_a_writer_killed_at_any_step_loses_and_doubles_nothing(tmp_path: Path, before: int) -> None:
    assert in_a_process(killing.kill_at_every_step, tmp_path, before) > 20


def test_a_session_is_deleted_as_a_whole_whenever_its_process_is_killed(tmp_path: Path) -> None:
    assert in_a_process(killing.remove_at_every_step, tmp_path) > 10


def test_a_line_torn_at_any_byte_is_no_ones(tmp_path: Path) -> None:
    file = TurnsFile.of(tmp_path, "ana")
    for text in ("one", "two", "three"):
        add(file, text)
    whole = file.path.read_bytes()
    for size in range(0, len(whole), killing.STRIDE):
        file.path.write_bytes(whole[:size])
        found, mark = texts(file)
        assert found == ["one", "two", "three"][: len(found)]
        assert len(found) >= whole[:size].count(b"\n") - 1  # the first line is the session's own
        add(file, "four")
        assert [*found, *texts(file, mark)[0]] == texts(file)[0] == [*found, "four"]
        [session] = sessions(tmp_path)
        assert (session.name, session.turns) == ("ana", len(found) + 1)


def test_a_damaged_byte_costs_its_line_and_moves_no_other(tmp_path: Path) -> None:
    file = TurnsFile.of(tmp_path, "ana")
    for text in ("one", "two", "three"):
        add(file, text)
    whole, said = file.path.read_bytes(), ["one", "two", "three"]
    places = {record["turns"][0]["content"]: at for at, record in file.read()[0] if "turns" in record}
    for at in {*range(0, len(whole), killing.STRIDE), *(at for at, byte in enumerate(whole) if byte == ord("\n"))}:
        for bit in (1, 2, 4, 7, 8, 0x80):  # 7 makes "\r" of "\n"
            file.path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            records = [(place, record["turns"][0]["content"]) for place, record in file.read()[0] if "turns" in record]
            assert {text: place for place, text in records}.items() <= places.items()
            hit = whole.count(b"\n", 0, at) - 1  # of the turns; -1 is the session's own line
            spared = [text for i, text in enumerate(said) if i not in (hit, hit + (whole[at] == ord("\n")))]
            assert [text for _, text in records if text in spared] == spared  # nor is one told that no one has said: see above


def test_a_full_disk_leaves_every_turn_before_and_takes_the_next(tmp_path: Path) -> None:
    file = TurnsFile.of(tmp_path, "ana")
    add(file, "one")
    size, limits = file.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for more in range(0, 60, 7):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + more, limits[1]))
            with pytest.raises(OSError, match="too large"):
                add(file, "two " + 100 * "x")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert texts(file)[0] == ["one"]
        size = file.path.stat().st_size
    add(file, "two")
    assert texts(file)[0] == ["one", "two"]


def test_a_session_begun_again_is_not_taken_for_the_one_before(lines: Turns) -> None:
    add(lines, "one")
    add(lines, "two")
    said, mark = texts(lines)
    lines.remove()
    add(lines, "six")
    add(lines, "ten")  # as many bytes
    again, new = texts(lines, mark)
    assert (said, again) == (["one", "two"], ["six", "ten"])
    assert new.head != mark.head
    assert lines.stamp() != mark.stamp
    assert texts(lines, new)[0] == []


def test_a_condition_is_looked_at_while_no_other_can_write(lines: Turns) -> None:
    seen: list[Any] = []
    lines.append({"turns": []}, "ana", None, still=lambda: bool(seen.append(lines.read()[0])))
    assert (seen, lines.read()[0]) == ([[]], [])


def test_turns_of_earlier_versions_are_read_and_gone_on_from(tmp_path: Path) -> None:
    file = TurnsFile.of(tmp_path, "ana")
    file.path.parent.mkdir()
    records = [
        {"session": "ana", "ttl": None},
        {"turns": [{"role": "user", "content": "old"}]},
        {"context": "a" * 64, "first": 0, "count": 1},
    ]
    file.path.write_bytes("".join(f"\n{json.dumps(record)}" for record in records[:2]).encode())
    said, mark = texts(file)
    add(file, "new")
    with file.path.open("ab") as older:
        older.write(b'\n{"context": "a", "first": 0, "count": 1}')
    add(file, "newer")
    assert [*said, *texts(file, mark)[0]] == texts(file)[0] == ["old", "new", "newer"]
    assert [session.name for session in sessions(tmp_path)] == ["ana"]


def test_only_an_expired_session_expires(lines: Turns) -> None:
    def is_as_old_as_can_be() -> None:
        if isinstance(lines, TurnsFile):
            os.utime(lines.path, (1, 1))
        else:
            lines._written = 1

    lines.remove(if_older=0)  # there is none
    add(lines, "one")
    lines.remove(if_older=60)
    is_as_old_as_can_be()
    add(lines, "two")  # which makes it young again
    lines.remove(if_older=60)
    assert texts(lines)[0] == ["one", "two"]
    is_as_old_as_can_be()
    lines.remove(if_older=60)
    assert texts(lines)[0] == []


# -- blocks ----------------------------------------------------------------------------------------------------------


def run(targets: list[tuple[Any, ...]]) -> list[int | None]:
    """Run processes, ``(what, *arguments)`` each, and wait for them; their exit codes."""
    workers = [processes.Process(target=work, args=args) for work, *args in targets]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers]


def test_two_processes_on_one_session_lose_and_double_no_turn(tmp_path: Path) -> None:
    barrier = processes.Barrier(2)
    assert run([(writers.write_turns, tmp_path, f"w{i}", 8, barrier) for i in range(2)]) == [0, 0]
    assert writers.told(tmp_path) == dict.fromkeys(writers.acknowledged(tmp_path), 1)


@pytest.mark.parametrize("disk", [False, True])
def test_threads_and_tasks_on_one_session_lose_and_double_no_turn(tmp_path: Path, disk: bool) -> None:
    engine = writers.wide_engine(tmp_path if disk else None)

    async def work(who: str) -> None:
        block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine))
        tasks = [block.aput(writers.exchange(f"{who}-{i}"), session_id="ana") for i in range(3)]
        cancelled = asyncio.create_task(block.aput(writers.exchange(f"{who}-3"), session_id="ana"))
        await asyncio.gather(*tasks, asyncio.wait_for(cancelled, 0.005), return_exceptions=True)
        assert writers.said(await block.aget([], session_id="ana"), block.context("ana"), engine)

    threads = [threading.Thread(target=asyncio.run, args=(work(f"t{i}"),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine))
    found = writers.said(asyncio.run(block.aget([], session_id="ana")), block.context("ana"), engine)
    wanted = dict.fromkeys((f"t{i}-{j}" for i in range(3) for j in range(3)), 1)
    assert wanted.items() <= found.items()
    assert set(found.values()) == {1}  # one that was cancelled, too, if it is there
    engine.close()


def test_a_block_killed_at_any_step_loses_and_doubles_no_turn(tmp_path: Path) -> None:
    """The process is killed at a step of taking a turn, of reading it, and of writing down what was made of it."""
    assert in_a_process(writers.kill_a_block, tmp_path) > 20


@pytest.mark.skipif(not STRESS, reason="make stress")
def test_eight_processes_of_which_one_in_ten_is_killed_lose_and_double_no_turn(tmp_path: Path) -> None:
    """Over 400 questions and as many answers from 90 processes, eight at a time; then every later one is told each exactly once."""
    rng, waiting, alive, killed = random.Random(19), list(range(90)), [], 0
    doomed = set(rng.sample(waiting, 9))
    while waiting or alive:
        while waiting and len(alive) < 8:
            number = waiting.pop()
            within = 1.5 if number in doomed else None
            alive.append(processes.Process(target=writers.write_turns, args=(tmp_path, f"w{number}", 5, None, within)))
            alive[-1].start()
        for worker in [worker for worker in alive if not worker.is_alive()]:
            worker.join()
            alive.remove(worker)
            killed += worker.exitcode != 0
        time.sleep(0.01)
    acknowledged = writers.acknowledged(tmp_path)
    for _ in range(3):
        found = writers.told(tmp_path)
        assert dict.fromkeys(acknowledged, 1).items() <= found.items()
        assert set(found.values()) == {1}
        assert len(found) - len(acknowledged) <= killed
    say(processes=90, killed=killed, acknowledged=2 * len(acknowledged), not_acknowledged=2 * (len(found) - len(acknowledged)))


def test_agents_of_several_processes_share_what_is_folded_and_answer_as_if_they_had_read_everything(tmp_path: Path) -> None:
    killed = {"w3"}
    targets = [(writers.talk_to_an_agent, tmp_path, who, 6, who in killed) for who in ("w0", "w1", "w2", "w3")]
    assert run(targets)[:3] == [0, 0, 0]
    acknowledged = writers.acknowledged(tmp_path)
    for who in ("w0", "w1", "w2", "w3"):
        said = [name.split(":")[1] for name in acknowledged if name.startswith(who)]
        assert said == writers.told_to_an_agent(tmp_path, who)[: len(said)]
    # Who was killed goes on from its last checkpoint.
    assert run([(writers.talk_to_an_agent, tmp_path, "w3", 6)]) == [0]


def test_a_folder_is_given_as_to_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every function that takes one, as a text or a path, with ``~`` for the home folder, and relative."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given in ("~/cache", Path("~/cache"), "cache", Path("cache"), str(tmp_path / "cache")):
        file = TurnsFile.of(given, None, "history", "ana")
        assert file.path.parent == tmp_path / "cache" / "memory"
        file.append({"turns": [{"role": "user", "content": "Hi."}]}, "memory history: ana", 1e-9)
        [session] = turns.sessions(given)
        assert turns.is_of(given, session, None)
        assert turns.find(given, session.name, None) is not None
        assert turns.usage(given)["sessions"] == 1
        assert any(finding.what == "sessions" for finding in turns.examine(given))
        assert turns.erase(given, None, session.name) == 1
        file.append({"turns": []}, session.name, 1e-9)
        assert turns.remove_expired(given) == 1
        assert turns.sessions(given) == []
    taking = [signature(f).parameters for _, f in getmembers(turns, isfunction) if f.__module__ == turns.__name__]
    assert {p["cache_dir"].annotation for p in taking if "cache_dir" in p} == {"str | Path", "str | Path | None"}
