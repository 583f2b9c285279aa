"""How close do answers from a compressed context come to answers from the full cache?

Contexts of about 2,000 tokens from SQuAD articles; questions of SQuAD, and questions for short codes hidden in the
articles. The full cache answers greedily; every method is then teacher-forced on that answer. Per token of the answer:
KL(full || compressed) and top-1 agreement. Methods are compared at the same kept fraction of all pairs; "default" is what the engine
does when that is its ratio, which keeps the template's head beside it.

    python benchmarks/fidelity.py --squad squad.json --kvpress-python peer/bin/python
    python benchmarks/fidelity.py --squad squad.json --model gemma3
    python benchmarks/fidelity.py --squad squad.json --scorers sum_of_squares/local/500

Everything is deterministic: rows of methods that are not run are kept from the last result.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import PROBE, RESULTS, articles, gemma3, run_peer, save, smollm2
from kvzip_memory import KVzipEngine
from kvzip_memory.compression import Prefilled, Stages, compress, prefill
from kvzip_memory.compression.codecs import CODECS
from kvzip_memory.compression.refit import Refit, RidgeRefit
from kvzip_memory.compression.rows import Rows
from kvzip_memory.compression.scorers import KVzipScorer
from kvzip_memory.context import CompressedContext, Resident
from kvzip_memory.inference.cache import Row, Tail

RATIOS = [0.5, 0.3, 0.2, 0.1]
# aggregation/repeat/chunk_tokens
SCORERS = {
    f"{aggregation}/{repeat}/{n}": KVzipScorer(aggregation=aggregation, repeat=repeat, chunk_tokens=n)  # type: ignore[arg-type]
    for aggregation, repeat, sizes in (
        ("max", "whole", (1000, 2000)),
        ("max", "local", (500, 1000)),
        ("sum_of_squares", "whole", (1000, 2000)),
        ("sum_of_squares", "local", (250, 500, 1000)),
    )
    for n in sizes
}
PLACES = ["boathouse", "greenhouse", "observatory", "north gate", "wine cellar", "map room"]


def documents(data: list[dict[str, Any]], count: int, tokenizer: Any, tokens: int) -> list[dict[str, Any]]:
    """Articles cut to about ``tokens``, six hidden codes in each, and six questions of either kind."""
    found = []
    for number, article in enumerate(data[:count]):
        rng = random.Random(number)
        paragraphs, questions, length = [], [], 0
        for paragraph in article["paragraphs"]:
            length += len(tokenizer(paragraph["context"]).input_ids)
            if length > tokens - 150:
                break
            paragraphs.append(paragraph["context"])
            questions += [qa["question"] for qa in paragraph["qas"]]
        asked = [("question", q) for q in questions[:: max(1, len(questions) // 6)][:6]]
        for i, place in enumerate(PLACES):
            at = round((i + 0.5) * len(paragraphs) / len(PLACES))
            paragraphs[min(at, len(paragraphs) - 1)] += f" The access code of the {place} is {rng.randint(10000, 99999)}."
            asked.append(("needle", f"What is the access code of the {place}?"))
        found.append({"title": article["title"], "text": "\n\n".join(paragraphs), "asked": asked})
    return found


class Scored:
    """A scorer that has scored already, for contexts of several ratios."""

    has_rows = True

    def __init__(self, scorer: KVzipScorer, prefilled: Prefilled) -> None:
        self.rows = Rows(RidgeRefit().every)
        self.scores = scorer.score(replace(prefilled, rows=self.rows), lambda *_: None)

    def identity(self) -> dict[str, Any]:
        return {"name": "scored"}

    def cost(self, n_tokens: int) -> int:
        return 0

    def score(self, prefilled: Prefilled, progress: Any) -> torch.Tensor:
        if prefilled.rows is not None:
            prefilled.rows._taken = {layer: dict(blocks) for layer, blocks in self.rows._taken.items()}
        return self.scores.clone()


def of_text(ratio: float, prefilled: Prefilled) -> float:
    """The ratio at which ours keeps a fraction of all pairs."""
    n, head = len(prefilled.token_ids), prefilled.protected
    return (ratio * n - head) / (n - head)


def context_at(
    prefilled: Prefilled, scored: Scored, ratio: float, refit: Refit | str, base: CompressedContext, codec: str = "none"
) -> CompressedContext:
    """A context evicted to ``ratio`` from a dense cache that stays whole."""
    stages = Stages.of(scored, refit=refit, codec=CODECS[codec]).for_layers(prefilled.model.windows, latent=False, refit=refit)
    layers = compress(replace(prefilled, dense=[*prefilled.dense]), ratio, stages, lambda *_: None).layers
    fields = {k: getattr(base, k) for k in ("key", "identity", "token_ids", "protected", "dense_nbytes", "recipe")}
    return CompressedContext(**fields, storage=Resident(layers), ratio=ratio)


def divergence(full: torch.Tensor, ours: torch.Tensor) -> dict[str, float]:
    p, q = full.log_softmax(-1), ours.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return {"kl": kl.sum().item(), "agree": (full.argmax(-1) == ours.argmax(-1)).sum().item(), "tokens": len(kl)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--kvpress-python")
    parser.add_argument("--model", choices=["smollm2", "gemma3"], default="smollm2")
    parser.add_argument("--articles", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--compress-every", type=int, nargs="*", default=[256, 500])
    parser.add_argument("--scorers", nargs="*", choices=list(SCORERS), default=list(SCORERS))
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2() if args.model == "smollm2" else gemma3(), codec="none")
    docs = documents(articles(args.squad), args.articles, engine.tokenizer, args.tokens)
    results: list[dict[str, Any]] = []
    kept: dict[tuple[str, float], list[float]] = defaultdict(list)
    job: dict[str, Any] = {"task": "fidelity", "threads": torch.get_num_threads(), "ratios": RATIOS, "contexts": []}
    agreement = None
    paper: torch.Tensor | None = None
    for doc in tqdm(docs, desc="articles"):
        full = engine.load(doc["text"], ratio=1.0)
        prompt = engine._contexts.prompt(engine._language, doc["text"])
        questions = []
        for kind, question in doc["asked"]:
            ids = engine.prompt_ids(full, question)
            if answer := greedy(engine, full, ids):
                questions.append({"kind": kind, "question": ids, "answer": answer})
        reference = [engine.logits(full, q["question"] + q["answer"][:-1])[-len(q["answer"]) :] for q in questions]
        job["contexts"].append({"ids": list(prompt.token_ids), "questions": questions})
        pairs, _ = prefill(engine._model, prompt.token_ids, lambda *_: None)
        prefilled = Prefilled(
            engine._model, pairs, prompt.token_ids, prompt.protected, prompt.recipe.opening, prompt.recipe.closing, engine._prompts.text_ids
        )
        if paper is None:
            paper = kvpress_scores(prefilled)
        for name in args.scorers:
            scored = Scored(SCORERS[name], prefilled)
            ours = SCORERS[name] == KVzipScorer()
            ways = {name: ("none", False)}
            if ours:
                ways |= {f"{name}, refitted": ("ridge", False), 'default with refit="none"': ("none", True), "default": ("auto", True)}
            for ratio, (method, (refit, beside)) in product(RATIOS, ways.items()):
                context = context_at(prefilled, scored, ratio if beside else of_text(ratio, prefilled), refit, full)
                kept[method, ratio].append(context.kept_pairs / context.total_pairs)
                for q, expected in zip(questions, reference, strict=True):
                    logits = engine.logits(context, q["question"] + q["answer"][:-1])[-len(q["answer"]) :]
                    results.append({"method": method, "ratio": ratio, "kind": q["kind"]} | divergence(expected, logits))
        for every in args.compress_every:
            twin = KVzipEngine(engine.model, engine.tokenizer, compress_every=every, codec="none")
            for ratio in RATIOS:
                context = twin.load(doc["text"], ratio=ratio)
                kept[f"default in pieces of {every}", ratio].append(context.kept_pairs / context.total_pairs)
                for q, expected in zip(questions, reference, strict=True):
                    logits = twin.logits(context, q["question"] + q["answer"][:-1])[-len(q["answer"]) :]
                    row = {"method": f"default in pieces of {every}", "ratio": ratio, "kind": q["kind"]}
                    results.append(row | divergence(expected, logits))
    if args.kvpress_python:
        assert paper is not None
        job |= {"model": str(engine.model.config.name_or_path), "probe": PROBE}
        job["probe_ids"] = engine.tokenizer(PROBE, add_special_tokens=False).input_ids
        peer = run_peer(args.kvpress_python, job)
        results += [{**row, "method": f"kvpress {row['method']}"} for row in peer["results"]]
        theirs = torch.tensor(peer["scores"])[:, :, -paper.shape[2] :]
        agreement = (theirs - paper).abs().max().item()
    table = summary(results)
    for row in table:
        if shares := kept.get((row["method"], row["ratio"])):
            row["kept"] = round(sum(shares) / len(shares), 4)
        print(row)
    name = "fidelity" if args.model == "smollm2" else f"fidelity_{args.model}"
    titles, earlier = [d["title"] for d in docs], []
    if (path := RESULTS / f"{name}.json").exists() and (last := json.loads(path.read_text()))["articles"] == titles:
        run = {row["method"] for row in table}
        earlier = sorted({row["method"] for row in last["table"]} - run)
        table = sorted([row for row in last["table"] if row["method"] in earlier] + table, key=lambda row: order(row["method"]))
        agreement = agreement or last["kvpress_score_difference"]
    print("largest difference between our paper score and kvpress':", agreement)
    save(
        name,
        {
            "model": args.model,
            "articles": titles,
            "kvpress_score_difference": agreement,
            "from_earlier_run": earlier,
            "table": table,
        },
    )


def order(method: str) -> int:
    """Ours, what the engine does, in pieces, then the peer's."""
    return 3 if method.startswith("kvpress") else 2 if "pieces" in method else 1 if method.startswith("default") else 0


def greedy(engine: KVzipEngine, context: CompressedContext, ids: list[int]) -> list[int]:
    """The full cache's own answer, at most 32 ids."""
    row = Row(context.layers, context.n_tokens, Tail())
    answer: list[int] = []
    logits = engine._model.forward([row], [ids])[0][-1]
    while len(answer) < 32 and (token := int(logits.argmax())) not in engine._model.eos_ids:
        answer.append(token)
        logits = engine._model.forward([row], [[token]])[0][-1]
    return answer


def kvpress_scores(prefilled: Prefilled) -> torch.Tensor:
    """The paper's score as kvpress computes it: softmax over 4 sinks, one chunk and the repeat; [L, H, n - prefix]."""
    n = len(prefilled.token_ids)
    prefix = prefilled.protected
    scorer = KVzipScorer(aggregation="max", repeat="whole")
    repeat = scorer._repeat_ids(prefilled, prefix, n)
    return scorer.score_chunk(prefilled, repeat, 4, prefix, n)


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str, float], dict[str, float]] = defaultdict(lambda: {"kl": 0.0, "agree": 0, "tokens": 0})
    for row in results:
        entry = sums[row["method"], row["kind"], row["ratio"]]
        for field in ("kl", "agree", "tokens"):
            entry[field] += row[field]
    return [
        {
            "method": m,
            "kind": k,
            "ratio": r,
            "kl": round(e["kl"] / e["tokens"], 5),
            "top1": round(e["agree"] / e["tokens"], 4),
            "tokens": int(e["tokens"]),
        }
        for (m, k, r), e in sums.items()
    ]


if __name__ == "__main__":
    main()
