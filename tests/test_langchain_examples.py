"""Examples and the snippets of docstrings run as they are, on SmolLM2."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import langchain_kvzip
from conftest import tiny_engine
from kvzip_memory import KVzipEngine
from langchain_kvzip import KVzipChatModel, create_memory_tools

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples"))

CLASSES = [name for name in langchain_kvzip.__all__ if inspect.isclass(getattr(langchain_kvzip, name)) and name != "ChatKVzip"]
SECTIONS = ["Setup", "Instantiate", "Invoke", "Stream", "Async", "Contexts", "Tools", "Structured output", "Usage"]


@pytest.fixture
def shared(smollm2: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chat model made from a name gets the one engine there is, in the place of a download."""
    monkeypatch.setattr(KVzipEngine, "from_pretrained", lambda *args, **options: smollm2)


@pytest.fixture
def brief(shared: None, smollm2: KVzipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free answers end after a few tokens: snippets are to run, what they are told is not the point."""
    stream = smollm2.stream

    def cut(context: Any, question: Any, **options: Any) -> Any:
        free = options["schema"] is None and not options["tools"]
        return stream(context, question, **options | ({"max_new_tokens": 6} if free else {}))

    monkeypatch.setattr(smollm2, "stream", cut)


async def run(snippet: str, names: dict[str, Any]) -> None:
    """A snippet's statements, in which ``await`` may stand, as in a notebook."""
    code = compile(snippet, "<snippet>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if (awaitable := eval(code, names)) is not None:
        await awaitable


def snippets(text: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("name", CLASSES)
async def test_every_snippet_of_a_docstring_runs(name: str, brief: None, smollm2: KVzipEngine) -> None:
    text = inspect.getdoc(getattr(langchain_kvzip, name)) or ""
    names: dict[str, Any] = {"llm": KVzipChatModel(engine=smollm2, max_tokens=8)}
    assert snippets(text)
    for snippet in snippets(text):
        await run(snippet, names)
    if name == "KVzipChatModel":
        assert [section for section in SECTIONS if f"\n{section}:\n" not in text] == []
        assert names["reply"].usage_metadata["input_token_details"]["cache_read"] > 256


async def test_every_snippet_of_the_page_runs(brief: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handbook.md").write_text("Travel is approved by Ms Ito. " * 40)
    names: dict[str, Any] = {}
    for snippet in snippets((ROOT / "docs" / "langchain.md").read_text()):
        await run(snippet, names)


def test_chain_example(shared: None) -> None:
    import chain

    assert len(chain.main("model", characters=1500)) == 4


def test_structured_output_example(shared: None) -> None:
    import structured_output

    assert structured_output.main("model").what == "glass"


def test_async_streaming_example(shared: None) -> None:
    import async_streaming

    assert "Ferdinand" in asyncio.run(async_streaming.main("model"))[0]


def test_an_agents_documents(tmp_path: Path) -> None:
    engine = tiny_engine(cache_dir=tmp_path / "cache")
    load, names, ask, forget = create_memory_tools(engine, max_tokens=5)
    assert [t.name for t in (load, names, ask, forget)] == ["load_document", "list_documents", "ask_document", "forget_document"]
    mine = engine.load("What the user has loaded. " * 9, name="private")
    assert names.invoke({}) == "no documents"
    assert "is kept" in load.invoke({"name": "page", "text": "A page. " * 9})
    assert re.fullmatch(r"page: \d+ tokens", names.invoke({}))
    assert ask.invoke({"name": "page", "question": "Who?"}) == engine.generate(engine.get("page"), "Who?", max_new_tokens=5).text
    assert create_memory_tools(engine, namespace="else")[1].invoke({}) == "no documents"
    for tool in (ask, forget):
        assert "no document 'private'" in tool.invoke({"name": "private", "question": "Who?"})
    load.invoke({"name": "shared", "text": "Shared. " * 9})
    engine.load("Shared. " * 9, name="shared", tags="user")
    assert "used by others" in forget.invoke({"name": "shared"})
    assert "is forgotten" in forget.invoke({"name": "page"})
    assert "no document 'page'" in ask.invoke({"name": "page", "question": "Who?"})
    assert engine.get("private").key == mine.key
    assert "empty" in load.invoke({"name": "nothing", "text": " "})


def test_an_agent_reads_files_of_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "page.txt").write_text("A page. " * 9)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    load, names, *_ = create_memory_tools(tiny_engine(), folder=folder)
    assert "is kept" in load.invoke({"path": "page.txt"})
    for path in ("../secret.txt", str(tmp_path / "secret.txt"), "link.txt", "nothing.txt"):
        assert "no file" in load.invoke({"path": path})
    assert names.invoke({}).startswith("page.txt: ")


def test_an_agent_calls_them(tmp_path: Path) -> None:
    llm = KVzipChatModel(engine=tiny_engine(), max_tokens=300)
    called = llm.bind_tools(create_memory_tools(llm.engine), tool_choice="list_documents").invoke("What is there?")
    assert called.tool_calls[0]["name"] == "list_documents"
