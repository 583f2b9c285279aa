"""How close does a join of documents come to the full cache of all of them, read one behind another?

SQuAD articles with hidden codes, of 900 tokens each. Each is loaded by itself, plain or ``joinable`` (read behind the preamble), and they
are joined in their order: all plain, all joinable, or the first one plain and the others joinable; beside one build of all. Questions
about each article and its codes. Per token of the full cache's own answers: KL(full || join), and how many answers are the same.

    python benchmarks/joining.py --squad squad.json

Also what a join takes: milliseconds and bytes; and a decode step behind it, over one behind a single context of as many pairs. Everything
but the timings is deterministic.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import articles, save, smollm2
from fidelity import divergence, documents, greedy
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.compression import Prefilled, Stages, compress, prefill
from kvzip_memory.context import Resident
from kvzip_memory.inference.cache import Tail

RATIOS = [1.0, 0.3]
COUNTS = [3]
TOKENS = 900  # of an article
TOWNS = ["Aldmoor", "Brackwell", "Carrow", "Dunhythe", "Eastry", "Fenwick", "Garth"]
WAYS = ["plain", "joinable", "first plain"]


def whole(engine: KVzipEngine, join: CompressedContext, ratio: float) -> CompressedContext:
    """The join's tokens in one build."""
    ids = tuple(join.token_ids.tolist())
    pairs, _ = prefill(engine._model, ids, lambda *_: None)
    opening, closing = join.recipe.opening, join.recipe.closing
    prefilled = Prefilled(engine._model, pairs, ids, join.protected, opening, closing, engine._prompts.text_ids)
    layers = compress(prefilled, ratio, Stages.of(), lambda *_: None).layers
    fields = {k: getattr(join, k) for k in ("key", "token_ids", "protected", "dense_nbytes", "recipe")}
    return CompressedContext(**fields, identity={**join.identity, "parts": []}, storage=Resident(layers), ratio=ratio)


def told_apart(docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents whose codes are of other places each."""
    found = []
    for doc, town in zip(docs, TOWNS, strict=False):
        asked = [(kind, question.replace("access code of the", f"{town} access code of the")) for kind, question in doc["asked"]]
        text = doc["text"].replace("access code of the", f"{town} access code of the")
        found.append({**doc, "asked": asked, "text": f"{text}\n\n"})
    return found


def joined(engine: KVzipEngine, texts: list[str], ratio: float, way: str) -> CompressedContext:
    contexts = []
    for number, text in enumerate(texts):
        joinable = way == "joinable" or (way == "first plain" and number > 0)
        text = text if way == "plain" else text.rstrip()  # the others begin with a blank line
        contexts.append(engine.load(text, ratio=ratio, joinable=joinable))
    return engine.join(contexts)


def fidelity(engine: KVzipEngine, data: list[dict[str, Any]], sets: int, counts: list[int]) -> list[dict[str, Any]]:
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for number in range(sets):
        docs = documents(data[number * max(counts) : (number + 1) * max(counts)], max(counts), engine.tokenizer, TOKENS)
        docs = told_apart(docs)
        for count in tqdm(counts, desc=f"set {number}"):
            some = docs[:count]
            texts = [doc["text"] for doc in some]
            full = whole(engine, joined(engine, texts, 1.0, "plain"), 1.0)
            asked = [(kind, engine.prompt_ids(full, question)) for doc in some for kind, question in doc["asked"]]
            asked = [(kind, ids, answer) for kind, ids in asked if (answer := greedy(engine, full, ids))]
            expected = [engine.logits(full, ids + answer[:-1])[-len(answer) :] for _, ids, answer in asked]
            for ratio in RATIOS:
                contexts = {way: joined(engine, texts, ratio, way) for way in WAYS}
                if ratio < 1.0:
                    contexts["one build"] = whole(engine, contexts["plain"], ratio)
                for way, context in contexts.items():
                    for (kind, ids, answer), wanted in zip(asked, expected, strict=True):
                        logits = engine.logits(context, ids + answer[:-1])[-len(answer) :]
                        apart, entry = divergence(wanted, logits), sums[count, ratio, kind, way]
                        entry[0] += apart["kl"]
                        entry[1] += apart["tokens"]
                        entry[2] += apart["agree"] == apart["tokens"]
                        entry[3] += 1
    rows = []
    for count, ratio, kind, way in sums:
        kl, tokens, same, answers = sums[count, ratio, kind, way]
        rows.append(
            {
                "articles": count,
                "ratio": ratio,
                "kind": kind,
                "way": way,
                "kl": round(kl / tokens, 5),
                "same": int(same),
                "of": int(answers),
            }
        )
        print(rows[-1])
    return rows


def room(engine: KVzipEngine, data: list[dict[str, Any]], counts: list[int]) -> list[dict[str, Any]]:
    """What joins take, and the steps behind them."""
    docs, rows = documents(data[: max(counts)], max(counts), engine.tokenizer, TOKENS), []
    for count in [1, *counts]:
        contexts = [engine.load(doc["text"], ratio=0.3, joinable=True) for doc in docs[:count]]
        if count == 1:
            continue
        began = time.perf_counter()
        join = engine.join(contexts)
        took = time.perf_counter() - began
        single = whole(engine, join, 0.3)
        steps: dict[str, list[float]] = {"join": [], "single": []}
        for _ in range(30):
            for way, context in (("join", join), ("single", single)):
                with context.lease() as lease:
                    row = engine._model.row(lease, context.n_tokens, Tail())
                    began = time.perf_counter()
                    engine._model.forward([row], [[5]])
                    steps[way].append(time.perf_counter() - began)
        ms = {way: round(1e3 * sorted(times)[len(times) // 2], 2) for way, times in steps.items()}
        rows.append({"parts": count, "join_ms": round(1e3 * took, 2), "join_bytes": join.nbytes, "step_ms": ms})
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--sets", type=int, default=1)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), device_bytes="8GiB")
    data = articles(args.squad)
    rows = room(engine, data, args.counts)
    table = fidelity(engine, data, args.sets, args.counts)
    if args.counts == COUNTS and args.sets == 1:
        save("joining", {"model": "smollm2", "threads": torch.get_num_threads(), "room": rows, "table": table})


if __name__ == "__main__":
    main()
