"""Every Python snippet of README.md, docs/ and the docstrings runs, each file's from top to bottom, on a tiny model."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import llama_index.core
import prometheus_client
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import Memory

import kvzip_memory.metrics
import langchain_kvzip
import llama_index_kvzip
from conftest import TEXT, tiny_model, tiny_tokenizer
from kvzip_memory import KVzipEngine

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^ *```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"^( *)\.\. code-block:: python\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
PACKAGES = ("kvzip_memory", "integrations/langchain_kvzip", "integrations/llama_index_kvzip")
SECTIONS = ["Setup", "Instantiate", "Invoke", "Stream", "Async", "Contexts", "Tools", "Structured output", "Usage"]
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *(p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")))]


def snippets(path: Path) -> list[str]:
    text = path.read_text()
    return [textwrap.dedent(block) for block in (FENCED.findall(text) or [match[1] for match in DIRECTIVE.findall(text)])]


def run(snippet: str, names: dict[str, Any]) -> None:
    """A snippet's statements, in which ``await`` may stand, as in a notebook."""
    code = compile(snippet, "<snippet>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if (coroutine := eval(code, names)) is not None:
        asyncio.run(coroutine)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working and home folder of a reader, with the files that snippets read."""
    for name in ("contracts/lease.txt", "examples/handbook.md", "handbook.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("The lease was signed by Ms Ito on 3 May. " * 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> KVzipEngine:
    """A tiny random model in the place of every download. Answers are a few tokens, or what is valid for a schema."""
    model, stream = tiny_model(max_position_embeddings=16384), KVzipEngine.stream

    def brief(engine: KVzipEngine, context: Any, question: Any, **options: Any) -> Any:
        guided = options.get("schema") is not None or options.get("tools")
        # Greedy, a random model may add digits to a number for ever.
        changes = {"max_new_tokens": 300, "temperature": 1.0, "seed": 0} if guided else {"max_new_tokens": 6}
        return stream(engine, context, question, **options | changes)

    monkeypatch.setattr(KVzipEngine, "stream", brief)
    monkeypatch.setattr(KVzipEngine, "from_pretrained", lambda name, **options: KVzipEngine(model, tiny_tokenizer(), **options))
    return KVzipEngine.from_pretrained("any")


@pytest.fixture
def given(tiny: KVzipEngine) -> dict[str, Any]:
    """What the snippets of a docstring, or of a page that says so, take as there."""
    exported = [kvzip_memory.metrics, langchain_kvzip, llama_index_kvzip]
    names = {name: value for module in exported for name, value in vars(module).items() if not name.startswith("_")}
    documents = [llama_index.core.Document(text=TEXT, doc_id="lease")]
    messages = [{"role": "user", "content": "My sister's name is Nadia."}, {"role": "assistant", "content": "I will remember that."}]
    return names | {
        "Memory": Memory,
        "FunctionAgent": FunctionAgent,
        "SimpleDirectoryReader": llama_index.core.SimpleDirectoryReader,
        "StorageContext": llama_index.core.StorageContext,
        "SummaryIndex": llama_index.core.SummaryIndex,
        "prometheus_client": prometheus_client,
        "model": "any",
        "engine": tiny,
        "context": tiny.load(documents),
        "handbook": tiny.load(TEXT),
        "documents": documents,
        "llm": llama_index_kvzip.KVzipLLM(engine=tiny),
        "questions": ["Who?", "When?"],
        "talk": tiny.load(messages),
        "new_messages": [{"role": "user", "content": "What is my sister's name?"}],
        "tools": [],
        "saver": InMemorySaver(),
    }


@pytest.mark.parametrize("path", [path for path in FILES if snippets(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_snippet_runs(path: Path, folder: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus_client, "start_http_server", lambda port: None)
    for snippet in snippets(path):
        run(snippet, given)


def test_the_chat_model_has_the_sections_of_langchains_standard() -> None:
    text = inspect.getdoc(langchain_kvzip.KVzipChatModel) or ""
    assert [section for section in SECTIONS if f"\n{section}:\n" not in text] == []
