"""What KVzipIndex answers a question from, where its documents lie in several contexts.

SQuAD articles cut to about 2,000 tokens, six in an index. Questions about one article, two such questions at one time about different
articles, and questions about everything; at ratio 0.3. By the words of the question, and by these and the attention it pays, which must
agree (ours). Then ninety documents of about 900 tokens, ten times the model's window, and a question about each: is the right one among
those that are joined, and how long does the first token take?

    python benchmarks/aiming.py --squad squad.json                  which are asked
    python benchmarks/aiming.py --squad squad.json --only ninety    on a quiet machine
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from llama_index.core import Document
from llama_index.core.base.response.schema import StreamingResponse

from common import articles, save, smollm2
from indexes import cut
from kvzip_memory import KVzipEngine
from llama_index_kvzip import KVzipIndex, KVzipLLM
from llama_index_kvzip.sources import Ranking, _best, _only, _words

EVERYTHING = [
    "Summarise all documents.",
    "What are these texts about?",
    "List the main topics.",
    "Which years are mentioned?",
    "Which people are named?",
    "What do the texts have in common?",
]
ONE, TWO, SIZE = 12, 60, 6


def aimed(first: KVzipEngine, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of which contexts a question is asked."""
    counts = Counter[tuple[str, str]]()
    for start in range(0, len(found) - SIZE + 1, SIZE):
        texts = {article["title"]: cut(article) for article in found[start : start + SIZE]}
        documents = [Document(text="\n\n".join(p["context"] for p in paragraphs), doc_id=title) for title, paragraphs in texts.items()]
        questions = {title: [p["qas"][0]["question"] for p in paragraphs if p["qas"]][:ONE] for title, paragraphs in texts.items()}
        engine = KVzipEngine(first.model, first.tokenizer, progress=False)
        index = KVzipIndex.from_documents(documents, llm=KVzipLLM(engine=engine, ratio=0.3))
        parts, rank, chance = index.parts(), Ranking(engine), random.Random(start)
        of = {node.node.ref_doc_id: number for number, part in enumerate(parts) for node in part.nodes}
        asked = [("one", {of[title]}, question) for title in texts for question in questions[title]]
        for _ in range(TWO):
            a, b = chance.sample([*texts], 2)
            asked.append(("two", {of[a], of[b]}, f"{chance.choice(questions[a])} {chance.choice(questions[b])}"))
        asked += [("all", {*range(len(parts))}, question) for question in EVERYTHING]
        passages = rank._found(parts)
        for kind, about, question in asked:
            ours = {parts.index(part) for part in rank.about(parts, question, engine.window - 512)}
            by_words = _only(_best(_words(passages, question)))
            counts[kind, "questions"] += 1
            for method, chosen in (("words", None if by_words is None else {by_words}), ("ours", ours if len(ours) == 1 else None)):
                counts[kind, f"{method}_one"] += chosen is not None
                counts[kind, f"{method}_wrong"] += chosen is not None and chosen != about
            counts[kind, "among"] += about <= ours
        print(start, dict(counts), flush=True)
    kinds = dict.fromkeys(kind for kind, _ in counts)
    return [{"questions_about": kind, **{name: count for (of, name), count in counts.items() if of == kind}} for kind in kinds]


def slices(found: list[dict[str, Any]], count: int) -> list[tuple[Document, str, list[str]]]:
    """All articles as about so many documents of whole paragraphs, and of each a question and its answers."""
    made: list[tuple[Document, str, list[str]]] = []
    sizes = [sum(len(p["context"]) for p in article["paragraphs"]) for article in found]
    for article, size in zip(found, sizes, strict=True):
        groups: list[list[dict[str, Any]]] = [[] for _ in range(max(1, round(count * size / sum(sizes))))]
        before = 0
        for paragraph in article["paragraphs"]:
            groups[before * len(groups) // size].append(paragraph)
            before += len(paragraph["context"])
        for number, some in enumerate(groups):
            asked = next(qa for p in [*some[len(some) // 2 :], *some] for qa in p["qas"])
            document = Document(text="\n\n".join(p["context"] for p in some), doc_id=f"{article['title']} {number}")
            made.append((document, asked["question"], asked["answers"]))
    return made


def ninety(first: KVzipEngine, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents of ten times the window in one index."""
    engine = KVzipEngine(first.model, first.tokenizer, progress=False)
    asked = slices(found, 90)
    began = time.perf_counter()
    index = KVzipIndex.from_documents([document for document, _, _ in asked], llm=KVzipLLM(engine=engine, ratio=0.3, max_tokens=32))
    built = time.perf_counter() - began
    tokens, query_engine = sum(part.context.n_tokens for part in index.parts()), index.as_query_engine(streaming=True)
    seconds, joined, counts = list[float](), list[int](), Counter[str]()
    for document, question, answers in asked:
        began = time.perf_counter()
        response = query_engine.query(question)
        assert isinstance(response, StreamingResponse)
        pieces = iter(response.response_gen)
        text = next(pieces, "")
        seconds.append(time.perf_counter() - began)
        text += "".join(pieces)
        ids = [node.node.ref_doc_id for node in response.source_nodes]
        joined.append(len(ids))
        counts["among"] += document.doc_id in ids
        counts["most"] += ids[-1] == document.doc_id
        counts["contains"] += any(answer.lower() in text.lower() for answer in answers)
        print(len(joined), round(seconds[-1], 2), dict(counts), flush=True)
    before = engine.stats()["built"]
    document = asked[0][0]
    index.update_ref_doc(Document(text=document.text + "\n\nChanged.", doc_id=document.doc_id))
    return {
        "documents": len(asked),
        "tokens": tokens,
        "window": engine.window,
        "built_s": round(built),
        **counts,
        "joined_median": statistics.median(joined),
        "joined_alone": joined.count(1),
        "first_token_s_median": round(statistics.median(seconds[1:]), 2),
        "first_token_s_most": round(max(seconds[1:]), 2),
        "built_by_an_update": engine.stats()["built"] - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--only", choices=["aimed", "ninety"], default="aimed")
    args = parser.parse_args()
    engine, found = KVzipEngine.from_pretrained(smollm2(), progress=False), articles(args.squad)
    model = "SmolLM2-135M-Instruct, fp32, ratio 0.3"
    if args.only == "ninety":
        save("ninety", {"model": model, **ninety(engine, found)})
    else:
        save("aiming", {"model": model, "table": aimed(engine, found)})


if __name__ == "__main__":
    main()
