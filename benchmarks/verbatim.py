"""What eviction loses first, with and without a refit: strings, texts that repeat themselves, and questions unlike the text.

    python benchmarks/verbatim.py --squad squad.json
    python benchmarks/verbatim.py --squad squad.json --codecs        the strings alone, refitted, in each codec

Ten parts of SQuAD articles of about 1,200 tokens with three strings of each kind: UUIDs, long numbers, e-mail addresses and code
identifiers. Asked for each of them, the full cache answers greedily; reported are how often that answer is given word for word, and
KL(full || compressed) per token of it. Texts of equal paragraphs, rows or characters, requests for a summary and questions in other
languages have no right answer, so the KL alone. Everything is deterministic.
"""

from __future__ import annotations

import argparse
import random
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import articles, save, smollm2
from fidelity import RATIOS, Scored, context_at, divergence, greedy
from kvzip_memory import KVzipEngine
from kvzip_memory.compression import Prefilled, prefill
from kvzip_memory.compression.codecs import CODECS
from kvzip_memory.compression.scorers import KVzipScorer

SECTIONS = ["harbour", "library", "tower", "kitchen", "garden", "archive", "stable", "chapel", "mill", "quarry", "orchard", "ferry"]
OUT_OF_STYLE = {
    "summary": ["Summarise the text in three sentences.", "List the five most important facts of the text."],
    "other language": ["Wovon handelt der Text?", "De quoi parle ce texte ?", "¿Cuál es la idea principal del texto?"],
}
EQUAL = {
    "a paragraph 20 times": "The ferry leaves at nine from the north pier; the fare is four crowns for each passenger and two for a dog. "
    * 20,
    "a table of equal rows": "| item | count | place |\n|---|---|---|\n" + "| bolt | 12 | shelf 4 |\n" * 80,
    "a page of one character": "x" * 3000,
}


def strings(rng: random.Random) -> dict[str, str]:
    """One of each kind."""
    name, word = (rng.choice(["alder", "birch", "cedar", "maple", "rowan", "willow"]) for _ in range(2))
    return {
        "UUID": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "number": str(rng.randrange(10**11, 10**12)),
        "e-mail address": f"{name}.{word}{rng.randrange(10, 100)}@{rng.choice(['example', 'sample'])}-{rng.randrange(100, 1000)}.org",
        "code identifier": f"get_{name}_{word.title()}{rng.randrange(10, 100)}_v{rng.randrange(1, 10)}",
    }


def parts(data: list[dict[str, Any]], tokenizer: Any, count: int, tokens: int = 1200) -> list[tuple[str, list[tuple[str, str]]]]:
    """Texts, and of each what is asked: kind and question."""
    found = []
    for number in range(count):
        article, rng = data[number % len(data)], random.Random(number)
        paragraphs = [p["context"] for p in article["paragraphs"]][number // len(data) * 8 :]
        chosen: list[str] = []
        length = 0
        for paragraph in paragraphs:
            length += len(tokenizer(paragraph).input_ids)
            if length > tokens and chosen:
                break
            chosen.append(paragraph)
        asked = []
        for i, place in enumerate(rng.sample(SECTIONS, 3)):
            for kind, string in strings(rng).items():
                at = min(round((i + rng.random()) * len(chosen) / 3), len(chosen) - 1)
                chosen[at] += f" The {kind} of the {place} is {string}."
                asked.append((kind, f"What is the {kind} of the {place}? Give it exactly."))
        found.append(("\n\n".join(chosen), asked))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--codecs", action="store_true")
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), codec="none")
    texts = parts(articles(args.squad)[:4], engine.tokenizer, args.parts)
    style = [(kind, question) for kind, questions in OUT_OF_STYLE.items() for question in questions]
    told = [(text, [*asked, *([] if args.codecs else style)]) for text, asked in texts]
    if not args.codecs:
        told += [(text, [(kind, "What does the text say?"), (kind, "How does the text go on?")]) for kind, text in EQUAL.items()]
    ways = {codec: ("ridge", codec) for codec in CODECS} if args.codecs else {refit: (refit, "none") for refit in ("none", "ridge")}
    sums: dict[tuple[str, float, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for text, asked in tqdm(told, desc="texts"):
        full, prompt = engine.load(text, ratio=1.0), engine._contexts.prompt(engine._language, text)
        questions = [(kind, engine.prompt_ids(full, question)) for kind, question in asked]
        questions = [(kind, ids, answer) for kind, ids in questions if (answer := greedy(engine, full, ids))]
        expected = [engine.logits(full, ids + answer[:-1])[-len(answer) :] for _, ids, answer in questions]
        (pairs, _), recipe = prefill(engine._model, prompt.token_ids, lambda *_: None), prompt.recipe
        prefilled = Prefilled(
            engine._model, pairs, prompt.token_ids, prompt.protected, recipe.opening, recipe.closing, engine._prompts.text_ids
        )
        scored = Scored(KVzipScorer(), prefilled)
        for ratio in RATIOS:
            for way, (refit, codec) in ways.items():
                context = context_at(prefilled, scored, ratio, refit, full, codec)
                for (kind, ids, answer), wanted in zip(questions, expected, strict=True):
                    logits = engine.logits(context, ids + answer[:-1])[-len(answer) :]
                    assert logits.isfinite().all()
                    apart, entry = divergence(wanted, logits), sums[kind, ratio, way]
                    entry[0] += apart["kl"]
                    entry[1] += apart["tokens"]
                    entry[2] += apart["agree"] == apart["tokens"]
                    entry[3] += 1
    table = []
    for kind, ratio in dict.fromkeys(key[:2] for key in sums):
        row: dict[str, Any] = {"kind": kind, "ratio": ratio, "asked": int(sums[kind, ratio, "none"][3])}
        for way in ways:
            kl, tokens, exact, count = sums[kind, ratio, way]
            row |= {f"{way} kl": round(kl / tokens, 5), f"{way} same answer": round(exact / count, 3)}
        table.append(row)
        print(row)
    save("verbatim_codecs" if args.codecs else "verbatim", {"model": "smollm2", "table": table})


if __name__ == "__main__":
    main()
