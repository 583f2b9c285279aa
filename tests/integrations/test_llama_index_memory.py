"""KVzipMemoryBlock: old turns that stay readable, whatever becomes of contexts, processes and builds."""

import asyncio
import errno
import json
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ImageBlock, MessageRole, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory
from typer.testing import CliRunner

from conftest import tiny_engine
from kvzip_memory import BudgetError, InputError, KVzipEngine, StorageError, WindowError
from kvzip_memory import turns as turns_of_sessions
from kvzip_memory.cli import app
from kvzip_memory.system.private import open_file
from kvzip_memory.turns import TurnsFile, sessions
from llama_index_kvzip import KVzipLLM, KVzipMemoryBlock
from llama_index_kvzip.memory import _message
from llama_index_kvzip.messages import plain_messages


@pytest.fixture
def llm(engine: KVzipEngine) -> KVzipLLM:
    return KVzipLLM(engine=engine, ratio=0.4, max_tokens=12)


def turns(count: int) -> list[ChatMessage]:
    return [ChatMessage(f"Line {i // 2}.", role="assistant" if i % 2 else "user") for i in range(2 * count)]


async def test_turns_beyond_the_limit_are_read_from_a_growing_context(llm: KVzipLLM, engine: KVzipEngine) -> None:
    block = KVzipMemoryBlock(llm=llm, ratio=1.0)
    memory = Memory.from_defaults(
        session_id="ana",
        token_limit=60,
        chat_history_token_ratio=0.7,
        token_flush_size=20,
        tokenizer_fn=engine.tokenizer.tokenize,
        memory_blocks=[block],
    )
    everything = turns(12)
    for message in everything:
        await memory.aput(message)
    handle, *recent = await memory.aget()
    context = block.context("ana")
    assert context is not None
    assert handle.additional_kwargs == {"kvzip_context": context.key}
    assert 0 < len(recent) < 8
    # At ratio 1.0 nothing is lost: the answer is that to the whole conversation.
    question = ChatMessage("Which?")
    answer = await llm.achat([handle, *recent, question])
    assert answer.message.content == llm.chat([*everything, question]).message.content
    assert answer.raw["usage"]["cached_tokens"] >= context.n_tokens
    assert block.context("bob") is None


async def flush(block: KVzipMemoryBlock, messages: list[ChatMessage], session_id: str = "ana") -> None:
    await block.aput([message.model_copy(deep=True) for message in messages], from_short_term_memory=True, session_id=session_id)


def said(block: KVzipMemoryBlock, messages: list[ChatMessage]) -> str | None:
    return block.llm.chat([*messages, ChatMessage("Which?")]).message.content


async def test_turns_that_say_the_same_again_are_remembered(llm: KVzipLLM) -> None:
    block, everything = KVzipMemoryBlock(llm=llm, ratio=1.0), []
    for chunk in (turns(1), turns(1), turns(3), turns(2)[1:], turns(1)):
        await flush(block, chunk)
        everything += chunk
        [handle] = await block.aget([], session_id="ana")
        assert said(block, [handle, *turns(1)]) == said(block, [*everything, *turns(1)])
    await flush(block, [ChatMessage("", role="assistant")])  # nothing is said
    assert said(block, await block.aget([], session_id="ana")) == said(block, everything)


async def test_sessions_are_apart_and_found_again_after_a_restart(tmp_path: Path) -> None:
    def later(**options: Any) -> KVzipMemoryBlock:
        return KVzipMemoryBlock(llm=KVzipLLM(engine=tiny_engine(cache_dir=tmp_path, **options), max_tokens=12))

    block = later()
    for session_id, chunks in {"ana": 2, "bob": 1, "eve": 1}.items():
        for _ in range(chunks):
            await flush(block, turns(6), session_id)
    found = {session_id: block.context(session_id) for session_id in ("ana", "bob", "eve")}
    assert found["ana"].n_tokens > found["bob"].n_tokens
    assert found["bob"].key == found["eve"].key
    assert KVzipMemoryBlock(llm=block.llm).context("ana") is found["ana"]  # a block for each request will do
    block.llm.engine.close()
    again = later()
    for session_id, context in found.items():
        [handle] = await again.aget([], session_id=session_id)
        assert handle.additional_kwargs["kvzip_context"] == context.key
    assert again.llm.engine.stats()["built"] == 0
    # Another process goes on, and this one goes on from that.
    other = later()
    await flush(other, turns(1))
    told = await again.aget([], session_id="ana")
    assert told[0].additional_kwargs["kvzip_context"] == other.context("ana").key != found["ana"].key
    await flush(again, turns(2))
    assert other.context("ana").key == again.context("ana").key
    # Another model, or a folder without the contexts, builds them from the turns.
    other.llm.engine.close()
    again.llm.engine.close()
    shutil.rmtree(tmp_path / "contexts")
    rebuilt = later(ratio=1.0)
    whole = [*turns(6), *turns(6), *turns(1), *turns(2)]
    assert said(rebuilt, await rebuilt.aget([], session_id="ana")) == said(rebuilt, whole)
    assert stat.S_IMODE((tmp_path / "memory").stat().st_mode) == 0o700
    [*files] = (tmp_path / "memory").iterdir()
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    # Forgotten is forgotten.
    rebuilt.forget("ana")
    assert await rebuilt.aget([], session_id="ana") == []
    assert len([*(tmp_path / "memory").iterdir()]) == 2
    assert not any("ana" in tag for entry in rebuilt.llm.engine.registry.contexts() for tag in entry.tags)
    rebuilt.forget("bob")  # of the same turns as eve's
    assert said(rebuilt, await rebuilt.aget([], session_id="eve")) == said(rebuilt, turns(6))


async def test_a_session_whose_context_has_left_the_registry_goes_on(engine: KVzipEngine) -> None:
    size = engine.load([{"role": "user", "content": "Line. " * 60}], ratio=1.0).nbytes
    llm = KVzipLLM(engine=tiny_engine(device_bytes=int(1.3 * size)), ratio=1.0, max_tokens=12)
    block = KVzipMemoryBlock(llm=llm)
    for session_id in ("ana", "bob", "eve"):
        await flush(block, turns(5), session_id)
        await flush(block, [ChatMessage(f"I am {session_id}."), ChatMessage("Well.", role="assistant")], session_id)
    for session_id in ("ana", "bob", "eve"):
        whole = [*turns(5), ChatMessage(f"I am {session_id}."), ChatMessage("Well.", role="assistant")]
        assert said(block, await block.aget([], session_id=session_id)) == said(block, whole)


@pytest.mark.parametrize("stored", [True, False])
async def test_a_session_without_end_keeps_its_newest_turns(tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: bool) -> None:
    engine = tiny_engine(cache_dir=tmp_path if stored else None)
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine, ratio=1.0, max_tokens=12), context_tokens=400)
    everything: list[ChatMessage] = []
    lengths = []
    for i in range(40):
        chunk = [ChatMessage(f"My number {i} is {7 * i}."), ChatMessage("Noted.", role="assistant")]
        await flush(block, chunk)
        everything += chunk
        lengths.append(block.context("ana").n_tokens)
        if stored and i % 7 == 0:  # others have read the file from its beginning
            engine.shared.clear()
    assert max(lengths) <= 400
    assert min(lengths[10:]) > 140
    assert sum(after < before for before, after in pairwise(lengths)) >= 3
    assert "have left the context" in caplog.text
    # The context is that of the newest turns alone.
    newest = [engine.load(plain_messages(everything[i:])[0], ratio=1.0) for i in range(60, 80, 2)]
    assert block.context("ana").token_ids.tolist() in [context.token_ids.tolist() for context in newest]
    with pytest.raises(WindowError):
        await flush(block, [ChatMessage("word " * 5000), ChatMessage("Noted.", role="assistant")])
    await flush(block, turns(1))
    assert [message.content for message in (await block.aget([], session_id="ana"))[1:]] == []
    assert said(block, await block.aget([], session_id="ana")) == said(block, turns(1))


async def test_turns_that_could_not_be_read_are_told_and_read_later(engine: KVzipEngine, tmp_path: Path) -> None:
    size = engine.load([{"role": "user", "content": "Line. " * 60}], ratio=1.0).nbytes
    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path, device_bytes=size), ratio=1.0, max_tokens=12)
    block, long = KVzipMemoryBlock(llm=llm), [ChatMessage("Line. " * 100), ChatMessage("Long.", role="assistant")]
    await flush(block, turns(2))
    for chunk in (long, turns(1)):
        with pytest.raises(BudgetError):
            await flush(block, chunk)
    whole = [*turns(2), *long, *turns(1)]
    told = await block.aget([], session_id="ana")
    assert [message.content for message in told[1:]] == [message.content for message in [*long, *turns(1)]]
    assert said(block, told) == said(block, whole)
    with pytest.raises(InputError, match="'image'"):
        await flush(block, [ChatMessage(blocks=[ImageBlock(image=b"x")])])
    llm.engine.close()
    with next((tmp_path / "memory").iterdir()).open("ab") as file:
        file.write(b'\n{"turns": [{"role": "us')  # killed while it wrote
    later = KVzipMemoryBlock(llm=KVzipLLM(engine=tiny_engine(cache_dir=tmp_path), ratio=1.0, max_tokens=12))
    [handle] = await later.aget([], session_id="ana")
    assert said(later, [handle]) == said(later, whole)
    await flush(later, turns(1))
    assert said(later, await later.aget([], session_id="ana")) == said(later, [*whole, *turns(1)])


async def test_what_is_known_is_told_while_more_is_read(llm: KVzipLLM) -> None:
    block = KVzipMemoryBlock(llm=llm)
    await flush(block, turns(3))
    with block._session("ana")._building:  # as a build holds it
        assert len(await asyncio.wait_for(block.aget([], session_id="ana"), 5)) == 1
        adding = asyncio.create_task(flush(block, turns(1)))
        while block._session("ana").is_current:
            await asyncio.sleep(0.01)
        assert len(await asyncio.wait_for(block.aget([], session_id="ana"), 5)) == 3
    await adding
    assert len(await block.aget([], session_id="ana")) == 1


async def test_calls_and_their_results_are_remembered_together(llm: KVzipLLM) -> None:
    call = ToolCallBlock(tool_call_id="c1", tool_name="look_up", tool_kwargs={"page": 3})
    asked = [ChatMessage("Look it up."), ChatMessage(role="assistant", blocks=[call])]
    result = ChatMessage("Page three.", role="tool", additional_kwargs={"tool_call_id": "c1"})
    ended = [result, ChatMessage("It says so.", role="assistant")]
    block = KVzipMemoryBlock(llm=llm, ratio=1.0)
    await flush(block, asked)
    assert [message.model_dump(exclude={"additional_kwargs"}) for message in await block.aget([], session_id="ana")] == [
        message.model_dump(exclude={"additional_kwargs"}) for message in asked
    ]
    await flush(block, ended)
    [handle] = await block.aget([], session_id="ana")
    assert said(block, [handle]) == said(block, [*asked, *ended])


@pytest.mark.parametrize("result", ["", " ", "\n"])
@pytest.mark.parametrize("apart", [False, True])
async def test_a_call_without_a_result_to_tell_is_remembered_with_it(llm: KVzipLLM, result: str, apart: bool) -> None:
    call = ToolCallBlock(tool_call_id="c1", tool_name="save", tool_kwargs={"page": 3})
    everything = [
        ChatMessage("Save it.", role="user"),
        ChatMessage(role="assistant", blocks=[call]),
        ChatMessage(result, role="tool", additional_kwargs={"tool_call_id": "c1"}),
    ]
    block = KVzipMemoryBlock(llm=llm, ratio=1.0)
    for chunk in [everything[:2], everything[2:]] if apart else [everything]:
        await flush(block, chunk)
    [handle] = await block.aget([], session_id="ana")
    context = block.context("ana")
    assert context is not None
    assert handle.additional_kwargs == {"kvzip_context": context.key}
    assert said(block, [handle]) == said(block, everything)


@pytest.mark.parametrize("session_id", [5, None, ["ana"], b"ana"])
async def test_a_session_id_that_is_no_text_is_refused(llm: KVzipLLM, session_id: Any) -> None:
    block = KVzipMemoryBlock(llm=llm)
    for call in (block.context, block.forget):
        with pytest.raises(InputError, match="session_id is"):
            call(session_id)
    with pytest.raises(InputError, match="session_id is"):
        await block.aput([ChatMessage("A.", additional_kwargs={"session_id": session_id})])


def test_a_turn_is_the_message_it_was() -> None:
    call = ToolCallBlock(tool_call_id="1", tool_name="f", tool_kwargs={"a": "b"})
    message = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), TextBlock(text="yes"), call])
    [turn] = plain_messages([message])[0]
    assert _message(turn) == message


def command(folder: Path, *args: str, code: int = 0) -> Any:
    out = CliRunner().invoke(app, [*args, "--cache-dir", str(folder), "--json"])
    assert out.exit_code == code, out.output
    return json.loads(out.stdout)


async def test_the_command_line_finds_and_deletes_the_turns_of_a_session(tmp_path: Path) -> None:
    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path), ratio=0.4, max_tokens=12)
    block = KVzipMemoryBlock(llm=llm)
    for session_id in ("ana", "bob"):
        await flush(block, [ChatMessage(f"I am {session_id}."), ChatMessage("Well.", role="assistant")], session_id)
        await flush(block, turns(2), session_id)
    of_bob = block.context("bob")
    assert of_bob is not None
    llm.engine.registry.flush()
    listed = command(tmp_path, "sessions")
    assert [(s["session"], s["turns"], s["expires"]) for s in listed] == [(f"memory history: {name}", 6, None) for name in ("bob", "ana")]

    assert command(tmp_path, "rm", "memory history: ana")["turns"] == 6
    assert [s["session"] for s in command(tmp_path, "sessions")] == ["memory history: bob"]
    texts = b"".join(file.read_bytes() for file in (tmp_path / "memory").iterdir())
    assert (b"I am ana" in texts, b"I am bob" in texts) == (False, True)
    assert {tag for entry in command(tmp_path, "ls") for tag in entry["tags"]} == {"memory history: bob"}
    assert await block.aget([], session_id="ana") == []  # also in a process that knew it

    told = CliRunner().invoke(app, ["rm", of_bob.key, "--cache-dir", str(tmp_path)]).output
    assert "'memory history: bob' deletes them" in " ".join(told.split())
    assert command(tmp_path, "rm", listed[0]["file"].split("/")[-1][:12])["session"] == "memory history: bob"
    assert command(tmp_path, "sessions") == []
    missing = CliRunner().invoke(app, ["rm", "memory history: ana", "--cache-dir", str(tmp_path)])
    assert isinstance(missing.exception, InputError)


async def test_sessions_of_one_name_and_several_tenants_are_not_confused(tmp_path: Path) -> None:
    for tenant in (None, "acme"):
        await flush(KVzipMemoryBlock(llm=KVzipLLM(engine=tiny_engine(cache_dir=tmp_path, tenant=tenant))), turns(1))
    refused = CliRunner().invoke(app, ["rm", "memory history: ana", "--cache-dir", str(tmp_path)])
    assert "2 sessions are called 'memory history: ana', of several tenants" in str(refused.exception)
    assert len(command(tmp_path, "sessions")) == 2


async def test_the_turns_of_a_session_expire_after_its_last_one(tmp_path: Path) -> None:
    llm = KVzipLLM(engine=tiny_engine(cache_dir=tmp_path, ttl=3600), ratio=0.4, max_tokens=12)
    block = KVzipMemoryBlock(llm=llm)
    await flush(block, turns(2), "ana")
    await flush(block, turns(2), "bob")
    files = [Path(session["file"]) for session in command(tmp_path, "sessions")]
    for file in files:
        os.utime(file, (time.time() - 3500,) * 2)
    assert command(tmp_path, "gc")["sessions"] == 0
    assert len(await block.aget([], session_id="bob")) == 1
    for file in files:
        os.utime(file, (time.time() - 3700,) * 2)
    assert await block.aget([], session_id="bob") == []
    assert command(tmp_path, "gc")["sessions"] == 1  # the other one's
    assert not [*(tmp_path / "memory").iterdir()]
    await flush(block, turns(1), "bob")
    assert said(block, await block.aget([], session_id="bob")) == said(block, turns(1))


async def test_turns_that_cannot_be_forgotten_now_are_all_there(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path)
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine))
    await flush(block, turns(2))
    engine.registry.flush()
    (file,) = (tmp_path / "memory").glob("*.jsonl")
    told, written = await block.aget([], session_id="ana"), file.read_bytes()
    with closing(sqlite3.connect(tmp_path / "contexts" / "index" / "cache.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="try again when it is free"):
            block.forget("ana")
        (session,) = sessions(tmp_path)
        with pytest.raises(StorageError, match="try again when it is free"):
            session.remove(engine.registry)
        holder.execute("ROLLBACK")
    assert (file.read_bytes(), await block.aget([], session_id="ana")) == (written, told)
    block.forget("ana")
    assert (file.exists(), await block.aget([], session_id="ana"), engine.registry.contexts()) == (False, [], [])
    engine.close()


SID = {"session_id": "s"}
CALLS: dict[str, dict[str, Any]] = {
    "no id": {"blocks": [ToolCallBlock(tool_call_id=None, tool_name="t", tool_kwargs={"a": 1})], "additional_kwargs": SID},
    "no mapping": {"blocks": [ToolCallBlock(tool_call_id="1", tool_name="t", tool_kwargs="[1]")], "additional_kwargs": SID},
    "no number": {"blocks": [ToolCallBlock(tool_call_id="1", tool_name="t", tool_kwargs={"a": float("nan")})], "additional_kwargs": SID},
    "half a character": {
        "blocks": [ToolCallBlock(tool_call_id="\ud800", tool_name="t", tool_kwargs={"\ud800": "\ud800"})],
        "additional_kwargs": SID,
    },
    "OpenAI's, no id": {
        "content": "",
        "additional_kwargs": {"tool_calls": [{"id": None, "type": "function", "function": {"name": "f", "arguments": "{}"}}], **SID},
    },
    **{f"role {role.value}": {"content": "Yes.", "role": role, "additional_kwargs": SID} for role in MessageRole},
}


@pytest.mark.parametrize("said", CALLS)
async def test_every_turn_that_is_taken_is_read_again(tmp_path: Path, said: str) -> None:
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=tiny_engine(cache_dir=tmp_path, ratio=1.0)))
    ask, answer = ChatMessage("Who?", additional_kwargs=SID), ChatMessage(**{"role": "assistant", **CALLS[said]})
    await block._aput([ask, answer, ChatMessage("3", role="tool", additional_kwargs=SID), ask])
    known = block._session("s").known.turns
    assert len(known) >= 2
    block.llm.engine.close()
    again = KVzipMemoryBlock(llm=KVzipLLM(engine=tiny_engine(cache_dir=tmp_path, ratio=1.0)))
    await again._aget(session_id="s")
    assert again._session("s").known.turns == known


ANSWER = {"role": "assistant", "content": "It is."}


@pytest.mark.parametrize(
    "turn", ["Hello.", {**ANSWER, "tool_calls": None}, {**ANSWER, "tool_calls": "f"}, {**ANSWER, "reasoning": None}], ids=str
)
def test_what_nobody_would_read_is_not_written(tmp_path: Path, turn: Any) -> None:
    file = TurnsFile.of(tmp_path, "ana")
    with pytest.raises(InputError, match="are no turns"):
        file.append({"turns": [turn]}, "ana", None)
    assert file.read()[0] == []


@pytest.mark.parametrize("harm", ["another's", "too large"])
async def test_a_file_that_cannot_be_read_is_in_the_way_of_no_other_session(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(cache_dir=tmp_path, ratio=1.0)
    block = KVzipMemoryBlock(llm=KVzipLLM(engine=engine))
    for name in ("ana", "bob"):
        said = [ChatMessage("My secret.", role=role, additional_kwargs={"session_id": name}) for role in ("user", "assistant")]
        await block._aput(said)
    other = tmp_path / "memory" / f"{'0' * 64}.jsonl"
    other.touch()
    if harm == "another's":
        monkeypatch.setattr(turns_of_sessions, "open_file", refusing(other))
    else:
        os.truncate(other, (1 << 26) + 1)
    found = turns_of_sessions.sessions(tmp_path)
    assert {session.name for session in found} == {"memory history: ana", "memory history: bob", "0" * 64}
    assert other.name in caplog.text
    engine.forget("memory history: ana")
    engine.registry.flush()
    assert block.context("ana") is None
    left = {session.name for session in turns_of_sessions.sessions(tmp_path)}
    assert left == {"memory history: bob", "0" * 64}
    engine.close()
    assert command(tmp_path, "doctor", code=0)
    command(tmp_path, "rm", "0" * 12)
    assert not other.exists()


def refusing(path: Path) -> Callable[..., int]:
    """Opens all files but one."""

    def opened(file: Path, *args: Any) -> int:
        if file == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return open_file(file, *args)

    return opened
