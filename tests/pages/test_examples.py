"""The examples, run on SmolLM2 over a part of their texts. examples/agent_memory.py: test_middleware.py."""

import asyncio
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from kvzip_memory import KVzipEngine
from llama_index_kvzip import KVzipLLM

sys.path.append(str(ROOT / "examples"))


@pytest.fixture
def shared(smollm2: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chat model made from a name gets the one engine there is, in the place of a download."""
    monkeypatch.setattr(KVzipEngine, "from_pretrained", lambda *args, **options: smollm2)


def test_chain(shared: None) -> None:
    import chain

    assert len(chain.main("model", characters=1500)) == 4


def test_structured_output(shared: None) -> None:
    import structured_output

    assert structured_output.main("model").what == "glass"


def test_async_streaming(shared: None) -> None:
    import async_streaming

    assert "Ferdinand" in asyncio.run(async_streaming.main("model"))[0]


def test_llama_query_engine(smollm2: KVzipEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import llama_query_engine

    llm = KVzipLLM(engine=smollm2, ratio=0.5, max_tokens=16)
    folder = llama_query_engine.write_sections(tmp_path, 2)
    [answer] = llama_query_engine.main(llm, folder, ["What is the telephone number of head office?"])
    assert "5529" in str(answer)
    assert {node.metadata["file_name"] for node in answer.source_nodes} == {"Welcome.md", "Who is who.md"}
    assert answer.metadata["usage"]["cached_tokens"] > 500
    assert "from Welcome.md, Who is who.md" in capsys.readouterr().out


def test_llama_chat_engine(smollm2: KVzipEngine, capsys: pytest.CaptureFixture[str]) -> None:
    import llama_chat_engine

    llm = KVzipLLM(engine=smollm2, ratio=0.5, max_tokens=16)
    chat_engine = llama_chat_engine.main(llm, llama_chat_engine.MESSAGES[:2], characters=1700)
    history = [message.content for message in chat_engine.chat_history]
    assert history[::2] == llama_chat_engine.MESSAGES[:2]
    assert "1871" in history[1]
    assert all(f"{answer}\n    from handbook.md" in capsys.readouterr().out for answer in history[1:2])


def test_llama_agent_memory_goes_on_in_its_second_run(smollm2: KVzipEngine, tmp_path: Path) -> None:
    import llama_agent_memory

    def run(*dialogue: str) -> list[dict[str, object]]:
        engine = KVzipEngine(smollm2.model, smollm2.tokenizer, cache_dir=tmp_path)
        return asyncio.run(llama_agent_memory.main(KVzipLLM(engine=engine, ratio=0.5, max_tokens=32), tmp_path, dialogue))

    first = run(*llama_agent_memory.DIALOGUE[:3])
    [second] = run(llama_agent_memory.DIALOGUE[-1])
    assert first[0]["folded"] == 0 < first[-1]["folded"] <= second["folded"]
    assert second["reply"]
    assert second["read"] < 400 < second["seen"]
