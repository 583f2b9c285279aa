"""How close does a join of documents come to the full cache of all of them, read one behind another?

Slices of SQuAD articles, of up to 900 tokens; three sets of seven, of which none has a slice of another. Each slice is loaded by itself,
plain or ``joinable`` (read behind the preamble), and the first 2, 3, 5 or 7 of a set are joined in their order: all plain, all joinable,
or the first one plain and the others joinable, of which 16 or 64 tokens are read again or none; beside one build of all. Twenty questions
about them; and, with a code hidden in each slice, one for each code (apart, since a small model answers other questions with codes, too).
Per token of the full cache's own answers: KL(full || join); and how many of a way's own answers have a right one in them.

    python benchmarks/joining.py --squad squad.json                 deterministic
    python benchmarks/joining.py --squad squad.json --model gemma3
    python benchmarks/joining.py --squad squad.json --only crowded
    python benchmarks/joining.py --squad squad.json --only room     on a quiet machine

``crowded``: the same five of each set where they share positions, so many tokens one.

``room``: what a join takes, milliseconds and bytes; and a decode step behind it, over one behind a single context of as many pairs.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import articles, gemma3, save, smollm2
from fidelity import divergence, greedy
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.compression import Prefilled, Stages, compress, prefill
from kvzip_memory.context import Resident
from kvzip_memory.inference.cache import Tail

RATIOS = [1.0, 0.5, 0.3]
COUNTS = [2, 3, 5, 7]
PARTS = [3, 8]
SETS = [0, 1, 2]
QUESTIONS = 20
TOKENS = 900  # of a slice
TOWNS = ["Aldmoor", "Brackwell", "Carrow", "Dunhythe", "Eastry", "Fenwick", "Garth"]
WAYS = [("plain", 0, 1.0), ("joinable", 0, 1.0), ("first plain", 0, 1.0), ("first plain", 16, 1.0), ("first plain", 64, 1.0)]
CROWDED = [
    ("plain", 0, 2.0),
    ("plain", 0, 9.0),
    *((way, 0, crowd) for way in ("joinable", "first plain") for crowd in (1.5, 2.0, 3.0, 9.0)),
]


def whole(engine: KVzipEngine, join: CompressedContext, ratio: float) -> CompressedContext:
    """The join's tokens in one build."""
    ids = tuple(join.token_ids.tolist())
    pairs, _ = prefill(engine._model, ids, lambda *_: None)
    opening, closing = join.recipe.opening, join.recipe.closing
    prefilled = Prefilled(engine._model, pairs, ids, join.protected, opening, closing, engine._prompts.text_ids)
    layers = compress(prefilled, ratio, Stages.of(), lambda *_: None).layers
    fields = {k: getattr(join, k) for k in ("key", "token_ids", "protected", "dense_nbytes", "recipe")}
    return CompressedContext(**fields, identity={**join.identity, "parts": []}, storage=Resident(layers), ratio=ratio)


def told(data: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Slices of the articles, the first one of each before the second ones. In each a code is hidden, of a town of its own in each set."""
    rounds: list[list[dict[str, Any]]] = []
    for article in data:
        number, length = 0, 0
        for paragraph in article["paragraphs"]:
            more = len(tokenizer(paragraph["context"]).input_ids)
            if length + more > TOKENS:
                number, length = number + 1, 0
            length += more
            while len(rounds) <= number:
                rounds.append([])
            if not rounds[number] or rounds[number][-1]["title"] != article["title"]:
                rounds[number].append({"title": article["title"], "paragraphs": []})
            rounds[number][-1]["paragraphs"].append(paragraph)
    found: list[dict[str, Any]] = []
    for some in rounds:
        for place in some:
            paragraphs = [p["context"] for p in place["paragraphs"]]
            asked = [(qa["question"], qa["answers"]) for p in place["paragraphs"] for qa in p["qas"]]
            town, code = TOWNS[len(found) % len(TOWNS)], random.Random(len(found)).randint(1000, 9999)
            needle = (f"What is the access code of the archive in {town}?", [str(code)])
            text = "\n\n".join(paragraphs)
            paragraphs[len(paragraphs) // 2] += f" The access code of the archive in {town} is {code}."
            found.append({"question": text, "needle": "\n\n".join(paragraphs), "asked": asked, "code": needle, **place})
    return found


def beginning(doc: dict[str, Any], count: int) -> dict[str, Any]:
    """The first paragraphs of a slice, and the questions about them."""
    some = doc["paragraphs"][:count]
    return {
        "question": "\n\n".join(p["context"] for p in some),
        "asked": [(qa["question"], qa["answers"]) for p in some for qa in p["qas"]],
    }


def asked_of(docs: list[dict[str, Any]], kind: str) -> list[tuple[str, list[str]]]:
    """Questions and what a right answer has in it: twenty of all documents, of each as many; or one for each code."""
    if kind == "needle":
        return [doc["code"] for doc in docs]
    asked = []
    for number, doc in enumerate(docs):
        count = QUESTIONS // len(docs) + (number < QUESTIONS % len(docs))
        asked += [doc["asked"][i * len(doc["asked"]) // count] for i in range(count)]
    return asked


def joined(engine: KVzipEngine, texts: list[str], ratio: float, way: str, repair: int = 0, crowd: float = 1.0) -> CompressedContext:
    """Documents as they are joined, one of the ways; ``crowd`` tokens a position, or as many as the longest leaves."""
    contexts = []
    for number, text in enumerate(texts):
        joinable = way == "joinable" or (way == "first plain" and number > 0)
        contexts.append(engine.load(text if joinable else f"{text}\n\n", ratio=ratio, joinable=joinable))  # others begin with a blank line
    if crowd == 1.0:
        return engine.join(contexts, repair=repair)
    tokens = contexts[0].n_tokens + sum(context.n_tokens - context.protected for context in contexts[1:])
    return engine.join(contexts, positions=max(round(tokens / crowd), *(context.n_tokens for context in contexts)))


def right(engine: KVzipEngine, context: CompressedContext, asked: list[tuple[str, list[str]]]) -> int:
    """How many answers have a right one in them."""
    with ThreadPoolExecutor(len(asked)) as pool:  # decoded together
        texts = [*pool.map(lambda question: engine.generate(context, question, max_new_tokens=24).text, [q for q, _ in asked])]
    return sum(any(answer.lower() in text.lower() for answer in answers) for text, (_, answers) in zip(texts, asked, strict=True))


def fidelity(
    engine: KVzipEngine,
    docs: list[dict[str, Any]],
    kind: str,
    count: int,
    ratios: list[float],
    some: list[tuple[str, int, float]] = WAYS,
) -> list[dict[str, Any]]:
    """The first documents of one set: a row for each ratio and way."""
    texts, asked, rows = [doc[kind] for doc in docs[:count]], asked_of(docs[:count], kind), []
    full = whole(engine, joined(engine, texts, 1.0, "plain"), 1.0)
    prompts = [engine.prompt_ids(full, question) for question, _ in asked]
    answers = [greedy(engine, full, ids) for ids in prompts]
    expected = [engine.logits(full, ids + answer[:-1])[-len(answer) :] for ids, answer in zip(prompts, answers, strict=True)]
    for ratio in ratios:
        ways = [(*way, joined(engine, texts, ratio, *way)) for way in some]
        ways.append(("one build", 0, 1.0, full if ratio == 1.0 else whole(engine, ways[0][3], ratio)))
        for way, repair, crowd, context in ways:
            kl = tokens = 0.0
            for ids, answer, wanted in zip(prompts, answers, expected, strict=True):
                apart = divergence(wanted, engine.logits(context, ids + answer[:-1])[-len(answer) :])
                kl, tokens = kl + apart["kl"], tokens + apart["tokens"]
            row = {"articles": count, "kind": kind, "ratio": ratio, "way": way, "repair": repair, "kl": round(kl / tokens, 4)}
            if some is CROWDED:
                row["tokens_a_position"] = round(context.n_tokens / (context.n_tokens - context.saved), 2) if crowd > 1 else 1.0
            rows.append({**row, "right": right(engine, context, asked), "of": len(asked)})
            print(rows[-1], flush=True)
    return rows


def shapes(engine: KVzipEngine, docs: list[dict[str, Any]], ratios: list[float]) -> list[dict[str, Any]]:
    """Five documents in five orders, their first paragraphs alone, and documents of one, all, two, all and one of their paragraphs."""
    five = docs[:5]
    kinds = {f"order {i + 1}": [*five[i:], *five[:i]] for i in range(5)}
    kinds["one paragraph each"] = [beginning(doc, 1) for doc in five]
    kinds["unequal"] = [beginning(doc, count) for doc, count in zip(five, (1, 99, 2, 99, 1), strict=True)]
    return [{"shape": name, **row} for name, some in kinds.items() for row in fidelity(engine, some, "question", 5, ratios)]


def mean(sets: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several sets as one: the mean, each set's, and all right answers."""
    rows = []
    for same in zip(*sets, strict=True):
        kl = [row["kl"] for row in same]
        right, of = (sum(row[name] for row in same) for name in ("right", "of"))
        rows.append({**same[0], "kl": round(sum(kl) / len(kl), 4), "kl_of_sets": kl, "right": right, "of": of})
    return rows


def room(engine: KVzipEngine, docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What joins take, and the steps behind them."""
    rows: list[dict[str, Any]] = []
    for count in PARTS:
        contexts = [engine.load(doc["question"], ratio=0.3, joinable=True) for doc in docs[:count]]
        ways, took, nbytes = {"single": contexts[0]}, {}, {}
        for repair in (0, 16, 64) if count > 1 else ():
            engine.join(contexts, repair=repair, store=False)  # warm
            began = time.perf_counter()
            join = engine.join(contexts, repair=repair, name=f"{count} {repair}")
            took[repair], nbytes[repair] = round(1e3 * (time.perf_counter() - began), 1), join.nbytes
            ways |= {"join": join} if repair == 0 else {}
        began = time.perf_counter()
        if count > 1:
            ways["single"] = whole(engine, join, 0.3)
        built, steps = time.perf_counter() - began, defaultdict[str, list[float]](list)
        for _ in range(40):
            for way, context in ways.items():
                with context.lease() as lease:
                    row = engine._model.row(lease, context.n_tokens, Tail())
                    began = time.perf_counter()
                    engine._model.forward([row], [[5]])
                    steps[way].append(time.perf_counter() - began)
        ms = {way: round(1e3 * sorted(times)[len(times) // 2], 2) for way, times in steps.items()}
        found = {"contexts": count, "join_ms": took, "join_bytes": nbytes, "one_build_s": round(built, 1), "step_ms": ms}
        rows.append({**found, "step": round(ms["join"] / ms["single"], 3)} if count > 1 else found)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--model", choices=["smollm2", "gemma3"], default="smollm2")
    parser.add_argument("--kinds", nargs="*", default=["question", "needle"])
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--ratios", type=float, nargs="*", default=RATIOS)
    parser.add_argument("--sets", type=int, nargs="*", default=SETS)
    parser.add_argument("--only", choices=["fidelity", "crowded", "room", "shapes"], default="fidelity")
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(
        smollm2() if args.model == "smollm2" else gemma3(), device_bytes="8GiB", codec="none", progress=False
    )
    docs, most = told(articles(args.squad), engine.tokenizer), max(COUNTS)
    if args.only == "room":
        save("joining_seconds", {"model": args.model, "room": room(engine, docs)})
        return
    if args.only == "shapes":
        save("joining_shapes", {"model": args.model, "table": shapes(engine, docs, args.ratios)})
        return
    if args.only == "crowded":
        sets = [fidelity(engine, docs[n * most : (n + 1) * most], "question", 5, args.ratios, CROWDED) for n in args.sets]
        save("joining_crowded", {"model": args.model, "sets": args.sets, "table": mean(sets)})
        return
    rows = []
    for kind in args.kinds:
        for count in args.counts:
            rows += mean([fidelity(engine, docs[n * most : (n + 1) * most], kind, count, args.ratios) for n in args.sets])
            save("joining" if args.model == "smollm2" else f"joining_{args.model}", {"model": args.model, "sets": args.sets, "table": rows})


if __name__ == "__main__":
    main()
