"""How close does a context that has grown come to one that was built at once?

Conversations whose messages say SQuAD articles with hidden codes, in exchanges of about 30, 200 or 1,000 tokens: loaded at once, or the
first exchange loaded and each of the others put behind by ``extend`` (folding a session does the same, see the tests). Both have the same
tokens. Per token of the full cache's own answers: KL(full || compressed).

    python benchmarks/growing.py --squad squad.json

Ten exchanges, of 1,000 tokens as many as fit into the model's window. Everything is deterministic.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import articles, save, smollm2
from fidelity import divergence, documents, greedy
from kvzip_memory import CompressedContext, KVzipEngine

RATIOS = [0.5, 0.3]
#: Tokens of an exchange, exchanges, tokens of each article, and how many of them.
SIZES = [(30, 10, 480, 1), (200, 10, 2000, 1), (1000, 7, 2000, 4)]


def exchanges(engine: KVzipEngine, text: str, size: int, count: int) -> list[list[dict[str, str]]]:
    """A text told by two in turn, in exchanges of so many tokens."""
    ids, found = engine.tokenizer(text).input_ids, []
    for start in range(0, len(ids), size)[:count]:
        middle = start + size // 2
        halves = (ids[start:middle], ids[middle : start + size])
        roles = zip(("user", "assistant"), halves, strict=True)
        found.append([{"role": role, "content": engine.tokenizer.decode(half)} for role, half in roles if half])
    return found


def grown(engine: KVzipEngine, pieces: list[list[dict[str, str]]], ratio: float) -> CompressedContext:
    context = engine.load(pieces[0], ratio=ratio)
    for piece in pieces[1:]:
        context = engine.extend(context, piece, ratio=ratio)
    return context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--articles", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="*", default=[size for size, *_ in SIZES])
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), codec="none")
    engines = {refit: KVzipEngine(engine.model, engine.tokenizer, refit=refit, codec="none") for refit in ("none", "auto")}
    data = articles(args.squad)[args.first : args.first + args.articles]
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    shapes: dict[int, list[list[int]]] = defaultdict(list)
    for size, count, tokens, joined in SIZES:
        if size not in args.sizes:
            continue
        docs = documents(data, args.articles, engine.tokenizer, tokens)
        for i in tqdm(range(0, len(docs), joined), desc=f"{count} x {size} tokens"):
            told = docs[i : i + joined]
            pieces = exchanges(engine, "\n\n".join(doc["text"] for doc in told), size, count)
            messages = [message for piece in pieces for message in piece]
            full = engine.load(messages, ratio=1.0)
            shapes[size].append([len(pieces), full.n_tokens])
            asked = [(kind, engine.prompt_ids(full, question)) for doc in told for kind, question in doc["asked"]]
            asked = [(kind, ids, answer) for kind, ids in asked if (answer := greedy(engine, full, ids))]
            expected = [engine.logits(full, ids + answer[:-1])[-len(answer) :] for _, ids, answer in asked]
            for ratio in RATIOS:
                for refit, twin in engines.items():
                    for way, context in (("at once", twin.load(messages, ratio=ratio)), ("grown", grown(twin, pieces, ratio))):
                        assert context.token_ids.tolist() == full.token_ids.tolist()
                        for (kind, ids, answer), wanted in zip(asked, expected, strict=True):
                            apart = divergence(wanted, twin.logits(context, ids + answer[:-1])[-len(answer) :])
                            entry = sums[size, ratio, refit, kind, way]
                            entry[0] += apart["kl"]
                            entry[1] += apart["tokens"]
                            entry[2] = context.kept_pairs / context.total_pairs
    table = []
    for size, ratio, refit, kind in dict.fromkeys(key[:-1] for key in sums):
        once, piecewise = (sums[size, ratio, refit, kind, way] for way in ("at once", "grown"))
        kl = [round(entry[0] / entry[1], 5) for entry in (once, piecewise)]
        row = {"exchange": size, "ratio": ratio, "refit": refit, "kind": kind, "at_once": kl[0], "grown": kl[1]}
        table.append(row | {"grown / at_once": round(kl[1] / kl[0], 2), "kept": round(piecewise[2], 4), "tokens": int(once[1])})
        print(table[-1])
    if args.first == 0 and set(args.sizes) == {size for size, *_ in SIZES}:
        save("growing", {"model": "smollm2", "exchanges_and_tokens": shapes, "table": table})


if __name__ == "__main__":
    main()
