"""Every Python snippet of README.md and docs/, and what they say in words, passes ``mypy --strict`` as far as it is ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from test_docs import PAGES, snippets

from conftest import ROOT

# The frameworks' own types, of which their own pages fail, too: an agent's input and configuration, middleware of several states in one
# list, a reply that may have no usage, sources that may have no text, responses that may be streams.
_THEIRS = re.compile(r'of "Pregel"|expected "AgentMiddleware\[|"UsageMetadata \| None"|"BaseNode"|"(Async)?StreamingResponse" of "Response')

_AS_DOCUMENTED = """
from kvzip_memory import KVzipEngine
from langchain_kvzip import ChatKVzip, KVzipChatModel, KVzipMemoryMiddleware, create_memory_tools
from llama_index.core.memory import Memory
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters
from llama_index_kvzip import KVzipChatEngine, KVzipIndex, KVzipLLM, KVzipMemoryBlock, KVzipQueryEngine, KVzipSynthesizer

engine = KVzipEngine.from_pretrained("maker/model", cache_dir="folder", ratio=0.3)
context = engine.load("A text.", name="page", tags="red", keep=["text"])
options = {"dtype": "bfloat16"}
llm = KVzipLLM(engine=engine)
KVzipLLM(model="maker/model", ratio=0.3, cache_dir="folder", temperature=0.5, max_tokens=3, top_p=0.9, top_k=5, seed=1, stop="x",
         repetition_penalty=1.1, no_repeat_ngram_size=3, model_kwargs=options, system_prompt="Be brief.", context=context)
KVzipLLM(model="maker/model", stop=["x"]).with_context("page").complete("Who?", stop="y")
chat = ChatKVzip(engine=engine)
KVzipChatModel(model="maker/model", ratio=0.3, cache_dir="folder", temperature=0.5, max_tokens=3, top_p=0.9, top_k=5, seed=1, stop="x",
               repetition_penalty=1.1, no_repeat_ngram_size=3, streaming=True, tool_call_parser="hermes", model_kwargs=options)
KVzipChatModel(model="maker/model", stop=["x"]).with_context(context).invoke("Who?", stop=["y"], max_tokens=4).text
KVzipMemoryBlock()
block = KVzipMemoryBlock(llm=llm)
KVzipMemoryBlock(llm=llm, name="history", ratio=0.5, context_tokens=300, priority=1)
Memory.from_defaults(memory_blocks=[block])
index = KVzipIndex.from_documents([], llm=llm, system="Be brief.", context_tokens=400)
chosen = MetadataFilters(filters=[MetadataFilter(key="user", value="ana")])
index.as_query_engine(filters=chosen, doc_ids=["a"], similarity_top_k=2, stop=["x"]).query("Who?")
index.as_retriever(source_top_k=2, filters=chosen).retrieve("Who?")
index.as_chat_engine(doc_ids=["a"]).chat("Who?")
KVzipQueryEngine.from_context(context).query("Who?")
KVzipQueryEngine.from_documents([], llm=llm.as_structured_llm(KVzipLLM), stop=["x"])
KVzipChatEngine.from_context(context, llm=llm, source_top_k=3)
KVzipSynthesizer(llm, stop=["x"], streaming=True)
KVzipMemoryMiddleware(trigger=("tokens", 3000), keep=("messages", 6), ratio=0.5)
create_memory_tools(engine, folder="documents")
engine.generate(context, "Who?", stop="x", max_new_tokens=3).usage.cached_tokens
engine.session(context).ask("Who?", stop=["x"]).text
"""


def test_what_the_docs_say_type_checks(tmp_path: Path) -> None:
    files = [tmp_path / "as_documented.py"]
    files[0].write_text(_AS_DOCUMENTED)
    for page in PAGES:
        if found := snippets(page):
            files.append(tmp_path / f"{page.stem}_page.py")  # in a function, in which ``await`` may stand
            files[-1].write_text("async def page() -> None:\n" + textwrap.indent("\n".join(found), "    "))
    assert len(files) > 4
    # By the repository's configuration and cache, which make lint has filled: with none of them it takes minutes.
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", *map(str, files)]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")])}
    checked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode in (0, 1), checked.stdout + checked.stderr
    told = [line for line in checked.stdout.splitlines() if line.startswith(str(tmp_path)) and " error: " in line]
    assert [line for line in told if not _THEIRS.search(line)] == []
