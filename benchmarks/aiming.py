"""Which questions KVzipIndex asks of one context alone, where its documents lie in several.

SQuAD articles cut to about 2,000 tokens, six in an index, in two contexts and in six. Questions about one article, two such questions
at one time about articles of different contexts, and questions about everything; at ratio 0.3. By the words of the question, and by
these and the attention it pays, which must agree (ours).

    python benchmarks/aiming.py --squad squad.json
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

from llama_index.core import Document

from common import articles, save, smollm2
from indexes import cut
from kvzip_memory import KVzipEngine
from llama_index_kvzip import KVzipIndex, KVzipLLM
from llama_index_kvzip.sources import Ranking, _only, _words

EVERYTHING = [
    "Summarise all documents.",
    "What are these texts about?",
    "List the main topics.",
    "Which years are mentioned?",
    "Which people are named?",
    "What do the texts have in common?",
]
ONE, TWO, SIZE = 12, 60, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    args = parser.parse_args()
    first, counts = KVzipEngine.from_pretrained(smollm2(), progress=False), Counter[tuple[int, str, str]]()
    found = articles(args.squad)
    for start in range(0, len(found) - SIZE + 1, SIZE):
        texts = {article["title"]: cut(article) for article in found[start : start + SIZE]}
        documents = [Document(text="\n\n".join(p["context"] for p in paragraphs), doc_id=title) for title, paragraphs in texts.items()]
        questions = {title: [p["qas"][0]["question"] for p in paragraphs if p["qas"]][:ONE] for title, paragraphs in texts.items()}
        for context_tokens in (None, 2600):
            engine = KVzipEngine(first.model, first.tokenizer, progress=False)
            index = KVzipIndex.from_documents(documents, llm=KVzipLLM(engine=engine, ratio=0.3), context_tokens=context_tokens)
            parts, rank, chance = index.parts(), Ranking(engine), random.Random(start)
            of = {node.node.ref_doc_id: number for number, part in enumerate(parts) for node in part.nodes}
            asked = [("one", {of[title]}, question) for title in texts for question in questions[title]]
            for _ in range(TWO):
                a, b = chance.sample([*texts], 2)
                if of[a] != of[b]:
                    asked.append(("two", {of[a], of[b]}, f"{chance.choice(questions[a])} {chance.choice(questions[b])}"))
            asked += [("all", {*range(len(parts))}, question) for question in EVERYTHING]
            passages = rank._found(parts)
            for kind, about, question in asked:
                ours = rank.about_one(parts, question)
                chosen = {"words": _only(_words(passages, question)), "ours": None if ours is None else parts.index(ours)}
                counts[len(parts), kind, "questions"] += 1
                for method, part in chosen.items():
                    counts[len(parts), kind, f"{method}, one"] += part is not None
                    counts[len(parts), kind, f"{method}, wrong"] += part is not None and about != {part}
            print(start, len(parts), dict(counts), flush=True)
    table = [
        {
            "contexts": contexts,
            "questions_about": kind,
            "questions": counts[contexts, kind, "questions"],
            **{
                f"{method}_{what}": counts[contexts, kind, f"{method}, {what}"] for method in ("words", "ours") for what in ("one", "wrong")
            },
        }
        for contexts, kind in dict.fromkeys((contexts, kind) for contexts, kind, _ in counts)
    ]
    save("aiming", {"model": "SmolLM2-135M-Instruct, fp32, ratio 0.3", "table": table})


if __name__ == "__main__":
    main()
