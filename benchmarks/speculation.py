"""Prompt-lookup speculation: time of answers with and without it, in turn, for questions that quote and for free ones.

python benchmarks/speculation.py --squad squad.json
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import articles, save, smollm2
from kvzip_memory import CompressedContext, KVzipEngine

FREE = [
    "Write a short poem about the sea.",
    "What would a child ask about this?",
    "Invent a story that begins at night.",
    "Explain why people like music.",
    "Give advice to a new employee.",
    "Describe a good breakfast.",
]


def quoting(article: dict[str, Any]) -> list[str]:
    """Questions of the dataset, which are answered from the text, and requests to copy a passage of it."""
    asked = [p["qas"][0]["question"] for p in article["paragraphs"][:3]]
    return asked + [f'Quote the sentence that begins with "{" ".join(p["context"].split()[:5])}".' for p in article["paragraphs"][:3]]


def measure(engine: KVzipEngine, context: CompressedContext, question: str, tokens: int) -> dict[str, Any]:
    """Milliseconds of decoding without and with speculation, the better of two each."""
    ms: dict[bool, list[float]] = {False: [], True: []}
    texts = set()
    for _ in range(2):
        for speculate, times in ms.items():
            reply = engine.generate(context, question, max_new_tokens=tokens, speculate=speculate)
            times.append(reply.receipt.ms["decode"])
            texts.add(reply.text)
    return {"plain": min(ms[False]), "speculated": min(ms[True]), "same": len(texts) == 1, "noise": min(ms[False]) / max(ms[False])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=48)
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), progress=False)
    rows: dict[str, list[dict[str, Any]]] = {"quoting": [], "free": []}
    for article in tqdm(articles(args.squad)[:3], desc="articles"):
        context = engine.load("\n\n".join(p["context"] for p in article["paragraphs"])[:8_600], ratio=0.3)
        for kind, questions in {"quoting": quoting(article), "free": FREE}.items():
            rows[kind] += [measure(engine, context, question, args.new_tokens) for question in questions]
    result = {
        kind: {
            "answers": len(found),
            "identical": sum(row["same"] for row in found),
            "speedup": round(sum(row["plain"] for row in found) / sum(row["speculated"] for row in found), 2),
            "median": round(statistics.median(row["plain"] / row["speculated"] for row in found), 2),
            "worst": round(min(row["plain"] / row["speculated"] for row in found), 2),
            "worst_of_two_plain": round(min(row["noise"] for row in found), 2),
            "best": round(max(row["plain"] / row["speculated"] for row in found), 2),
        }
        for kind, found in rows.items()
    }
    print(result)
    save("speculation", {"model": "SmolLM2-135M-Instruct, fp32, ratio 0.3", "new_tokens": args.new_tokens, **result})


if __name__ == "__main__":
    main()
