"""Sources of answers: how often the best passages hold the paragraph of SQuAD that a question was asked about.

Windows of whole paragraphs, of 2,000 tokens at most, at ratio 0.3. How sources are ranked was chosen on the first four articles of
the file, the figures are of the others.

python benchmarks/sources.py --squad squad.json
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_index.core import Document
from torch import Tensor
from tqdm import tqdm

from common import articles, save, smollm2
from kvzip_memory import KVzipEngine
from kvzip_memory.inference.attribution import blend, bm25
from llama_index_kvzip.sources import TOKENS_KEY, Part, Ranking, whole

DEV = 4
TOKENS = 2000
TOP = (1, 3)


def windows(engine: KVzipEngine, article: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """An article's paragraphs in groups of ``TOKENS`` at most; a shorter rest is left out."""
    groups: list[list[dict[str, Any]]] = []
    group: list[dict[str, Any]] = []
    size = 0
    for paragraph in article["paragraphs"]:
        tokens = len(engine.tokenizer(paragraph["context"] + "\n\n").input_ids)
        if size + tokens > TOKENS:
            groups.append(group)
            group, size = [], 0
        group.append(paragraph)
        size += tokens
    return groups


def spread(items: list[Any], n: int) -> list[Any]:
    """``n`` items at equal distances, all if there are fewer."""
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)] if len(items) > n else items


def measure(engine: KVzipEngine, paragraphs: list[dict[str, Any]], n_questions: int) -> list[dict[str, Any]]:
    """Of each question: the rank of the paragraph it was asked about by each way to rank, and whether the answer was right."""
    texts = [paragraph["context"] for paragraph in paragraphs]
    text = "\n\n".join(texts)
    document = Document(text=text, doc_id="window")
    context = engine.load([document], ratio=0.3)
    part = Part(context, whole(context, [document]))
    found: list[Any] = [n.node for n in Ranking(engine, len(text))([part], "What?")]
    passages = sorted(found, key=lambda node: node.start_char_idx)
    spans = [tuple(node.metadata[TOKENS_KEY]) for node in passages]
    questions = spread([(qa, i) for i, paragraph in enumerate(paragraphs) for qa in paragraph["qas"]], n_questions)
    with ThreadPoolExecutor(len(questions)) as pool:
        replies = list(pool.map(lambda asked: engine.generate(context, asked[0]["question"], max_new_tokens=24).text, questions))
    rows = []
    for (qa, number), reply in zip(questions, replies, strict=True):
        start = sum(len(before) + 2 for before in texts[:number])
        end = start + len(texts[number])
        holds = [
            node.start_char_idx < end and node.end_char_idx > start and any(answer in node.text for answer in qa["answers"])
            for node in passages
        ]

        def rank(scores: Tensor, holds: list[bool] = holds) -> int:
            order = scores.argsort(descending=True, stable=True).tolist()
            return next((place for place, i in enumerate(order) if holds[i]), len(order))

        words = bm25(qa["question"], [node.text for node in passages])
        (by_question,) = engine.relevance([(context, spans)], qa["question"])
        (by_answer,) = engine.relevance([(context, spans)], qa["question"], reply)
        rows.append(
            {
                "passages": len(passages),
                "right": any(answer.lower() in reply.lower() for answer in qa["answers"]),
                "ranks": {
                    "words of the question": rank(words),
                    "attention of the question": rank(by_question),
                    "attention of question and answer": rank(by_answer),
                    "attention and words of the question (ours)": rank(blend(by_question, words)),
                },
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--windows", type=int, default=12)
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), progress=False)
    test = articles(args.squad)[DEV:]
    groups = spread([window for article in test for window in windows(engine, article)], args.windows)
    rows: list[dict[str, Any]] = []
    for i, group in enumerate(tqdm(groups)):
        rows += measure(engine, group, (args.questions - len(rows)) // (len(groups) - i))
    table = []
    for name in rows[0]["ranks"]:
        shares = {f"top_{k}": round(sum(row["ranks"][name] < k for row in rows) / len(rows), 3) for k in TOP}
        right = [row for row in rows if row["right"]]
        of_right = round(sum(row["ranks"][name] < 3 for row in right) / len(right), 3)
        table.append({"ranked by": name, **shares, "top_3_where_the_answer_is_right": of_right})
    result = {
        "model": "SmolLM2-135M-Instruct, fp32, ratio 0.3",
        "questions": len(rows),
        "windows": len(groups),
        "passages": round(sum(row["passages"] for row in rows) / len(rows), 1),
        "three_at_random": round(sum(3 / row["passages"] for row in rows) / len(rows), 3),
        "answers_right": round(sum(row["right"] for row in rows) / len(rows), 3),
        "table": table,
    }
    print(result)
    save("sources", result)


if __name__ == "__main__":
    main()
