"""Every Python snippet of README.md, docs/ and the docstrings runs, each file's from top to bottom, on a tiny model."""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import llama_index.core
import prometheus_client
import pytest
import transformers
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import Memory

import kvzip_memory.errors
import kvzip_memory.metrics
import langchain_kvzip
import llama_index_kvzip
from conftest import HANDBOOK, ROOT, TEXT, tiny_model, tiny_tokenizer
from kvzip_memory import KVzipEngine
from kvzip_memory.inference.packed import checked_weights

FENCED = re.compile(r"^ *```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
DIRECTIVE = re.compile(r"^( *)\.\. code-block:: python\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
PACKAGES = ("kvzip_memory", "integrations/langchain_kvzip", "integrations/llama_index_kvzip")
SECTIONS = ["Setup", "Instantiate", "Invoke", "Stream", "Async", "Contexts", "Tools", "Structured output", "Usage"]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def snippets(path: Path) -> list[str]:
    text = path.read_text()
    return [textwrap.dedent(block) for block in (FENCED.findall(text) or [match[1] for match in DIRECTIVE.findall(text)])]


def run(snippet: str, names: dict[str, Any]) -> None:
    """A snippet's statements, in which ``await`` may stand, as in a notebook."""
    code = compile(snippet, "<snippet>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if (coroutine := eval(code, names)) is not None:
        asyncio.run(coroutine)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working and home folder of a reader, with the repository's handbook, shortened."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/handbook.md").write_text(HANDBOOK.read_text()[:1200])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> KVzipEngine:
    """A tiny random model in the place of every download. Answers are a few tokens, or what is valid for a schema."""
    model, stream = tiny_model(max_position_embeddings=16384), KVzipEngine.stream

    def brief(engine: KVzipEngine, context: Any, question: Any, **options: Any) -> Any:
        guided = options.get("schema") is not None or options.get("tools")
        # Greedy, a random model may add digits to a number for ever.
        changes = {"max_new_tokens": 300, "temperature": 1.0, "seed": 1} if guided else {"max_new_tokens": 6}
        return stream(engine, context, question, **options | changes)

    monkeypatch.setattr(KVzipEngine, "stream", brief)

    def from_pretrained(name: str, weights: str | None = None, **options: Any) -> KVzipEngine:
        checked_weights(weights)
        return KVzipEngine(model, tiny_tokenizer(), **options)

    monkeypatch.setattr(KVzipEngine, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **options: tiny_tokenizer())
    return KVzipEngine.from_pretrained("any")


@pytest.fixture
def given(tiny: KVzipEngine, folder: None) -> dict[str, Any]:
    """What the snippets of a docstring take as there."""
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


# A word that waits to be replaced: alone in its line where figures were to come, or one that says so wherever it stands.
PLACEHOLDER = re.compile(r"^[ \t]*[A-Z][A-Z_]{2,}[ \t]*$|\b(?:TODO|TBD|TBA|FIXME|XXX+|LOREM IPSUM)\b", re.MULTILINE)


def placeholders(page: str) -> list[str]:
    return [found[0].strip() for found in PLACEHOLDER.finditer(re.sub(r"^ *```.*?^ *```", "", page, flags=re.DOTALL | re.MULTILINE))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_nothing_is_left_to_be_filled_in(path: Path) -> None:
    assert placeholders(path.read_text()) == []


def test_a_placeholder_is_known_from_words_in_capitals() -> None:
    assert placeholders("(two cores):\nSTRESS\n") == ["STRESS"]
    assert placeholders("It takes TBD seconds. TODO: measure") == ["TBD", "TODO"]
    assert placeholders("JSON and KV caches\n\n```sql\nSELECT\n```\n") == []


@pytest.mark.parametrize("path", [path for path in PAGES if snippets(path)], ids=lambda path: path.name)
@pytest.mark.usefixtures("folder", "tiny")
def test_a_page_runs_from_top_to_bottom(path: Path) -> None:
    """Nothing is defined for it and no folder made; there is the repository's handbook, and a small model for every hub id."""
    names: dict[str, Any] = {}
    for snippet in snippets(path):
        run(snippet, names)


@pytest.mark.parametrize("path", [path for path in MODULES if snippets(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_snippets_of_a_module_run(path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("contracts").mkdir()
    Path("contracts/lease.txt").write_text(TEXT)
    monkeypatch.setattr(prometheus_client, "start_http_server", lambda port: None)
    for snippet in snippets(path):
        run(snippet, given)


def test_the_packaged_model_that_the_readme_names_is_the_one_that_is_installed(smollm2_path: Path) -> None:
    (line,) = re.findall(r"^# (model = .*)$", snippets(ROOT / "README.md")[0], re.MULTILINE)
    names: dict[str, Any] = {"importlib": importlib}
    run(line, names)
    assert names["model"] == str(smollm2_path)


def test_the_chat_model_has_the_sections_of_langchains_standard() -> None:
    text = inspect.getdoc(langchain_kvzip.KVzipChatModel) or ""
    assert [section for section in SECTIONS if f"\n{section}:\n" not in text] == []


def test_every_error_is_listed_and_imported_from_the_package() -> None:
    errors = {name for name, value in vars(kvzip_memory.errors).items() if isinstance(value, type)}
    listed = re.findall(r"^\| `(\w+Error)`", (ROOT / "docs/python.md").read_text(), re.MULTILINE)
    assert {*listed} == errors - {"KVzipError"}
    assert errors <= {*kvzip_memory.__all__}
