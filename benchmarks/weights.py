"""What do weights of few bits take, and what do answers from contexts say with them?

Contexts, questions and codes of `fidelity.py`. Each article is loaded by engines of each kind of weights, at ratios 1.0 and 0.3. Per token
of the answers of the full cache with the weights as they are: KL(full || context) and how often both have the same likeliest token; how
many of a way's own answers to questions about the hidden codes have the code; and which part of the pairs that are kept at 0.3 with the
weights as they are is kept with others.

    python benchmarks/weights.py --squad squad.json                  deterministic
    python benchmarks/weights.py --squad squad.json --model gemma3
    python benchmarks/weights.py --squad squad.json --only step      on a quiet machine

``step``: a decode step, and a question of 16 tokens, behind nothing and behind 6,000 tokens at 0.3, in turn; seconds of that build.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from common import articles, gemma3, save, smollm2
from fidelity import divergence, documents, greedy
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.inference.cache import Row, Tail
from kvzip_memory.inference.packed import PackedLinear, Weights

RATIOS = [1.0, 0.3]


def linear_nbytes(engine: KVzipEngine) -> int:
    """Bytes of a model's linear layers, measured; of a head that is its embeddings only where it has weights of its own."""
    embedding = engine.model.get_input_embeddings().weight.data_ptr()
    nbytes = 0
    for module in engine.model.modules():
        if isinstance(module, PackedLinear):
            nbytes += sum(tensor.untyped_storage().nbytes() for part in module._parts for tensor in part)
        elif isinstance(module, torch.nn.Linear) and module.weight.data_ptr() != embedding:
            nbytes += module.weight.nbytes
    return nbytes


def kept(context: CompressedContext) -> set[tuple[int, int, int]]:
    """Layers, heads and positions of its pairs."""
    with context.lease() as lease:
        return {
            (i, head, position)
            for i, layer in enumerate(lease.layers)
            for head, position in zip(layer.heads().tolist(), layer.positions.tolist(), strict=True)
        }


def fidelity(engines: dict[str, KVzipEngine], docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    exact = engines["none"]
    sums: dict[tuple[str, float, str], list[float]] = defaultdict(lambda: [0.0] * 5)
    same: dict[str, list[float]] = defaultdict(list)
    for doc in tqdm(docs, desc="articles"):
        full, asked = exact.load(doc["text"], ratio=1.0), []
        for kind, question in doc["asked"]:
            ids = exact.prompt_ids(full, question)
            if answer := greedy(exact, full, ids):
                asked.append((kind, question, ids + answer[:-1], exact.logits(full, ids + answer[:-1])[-len(answer) :]))
        chosen = kept(exact.load(doc["text"], ratio=0.3))
        for name, engine in engines.items():
            for ratio in RATIOS:
                context = engine.load(doc["text"], ratio=ratio)
                if ratio < 1.0:
                    same[name].append(len(kept(context) & chosen) / len(chosen))
                for kind, question, ids, expected in asked:
                    found = divergence(expected, engine.logits(context, ids)[-len(expected) :])
                    row = sums[name, ratio, kind]
                    for i, field in enumerate(("kl", "agree", "tokens")):
                        row[i] += found[field]
                    if kind == "needle":
                        code = re.search(rf"{re.escape(question[28:-1])} is (\d+)", doc["text"])
                        assert code is not None, question
                        row[3] += code[1] in engine.generate(context, question, max_new_tokens=24).text
                        row[4] += 1
    rows = []
    for (name, ratio, kind), (kl, agree, tokens, right, of) in sums.items():
        told = {"weights": name, "ratio": ratio, "of": kind, "kl": float(f"{kl / tokens:.3g}"), "top_1": round(agree / tokens, 3)}
        rows.append(told | ({"right": int(right), "asked": int(of)} if kind == "needle" else {}))
        print(rows[-1], flush=True)
    taken = {name: linear_nbytes(engine) for name, engine in engines.items()}
    return [
        *rows,
        *(
            {"weights": name, "linear_mb": round(taken[name] / 1e6, 1), "kept_alike": round(statistics.mean(same[name]), 4)}
            for name in engines
        ),
    ]


def step(engines: dict[str, KVzipEngine], text: str) -> list[dict[str, Any]]:
    contexts, built = {}, {}
    for name, engine in engines.items():
        began = time.perf_counter()
        contexts[name] = engine.load(text, ratio=0.3)
        built[name] = round(time.perf_counter() - began, 1)
    times = defaultdict[tuple[str, int, str], list[float]](list)
    for _ in range(40):
        for of, ids in (("step", [5]), ("question", [5] * 16)):
            for name, engine in engines.items():
                with contexts[name].lease() as lease:
                    for behind, row in ((0, Row((), 0, Tail())), (1, engine._model.row(lease, contexts[name].n_tokens, Tail()))):
                        began = time.perf_counter()
                        engine._model.forward([row], [ids])
                        times[of, behind, name].append(time.perf_counter() - began)
    rows: list[dict[str, Any]] = [{"of": "build", "s": built, "over_none": {n: round(s / built["none"], 3) for n, s in built.items()}}]
    for of in ("step", "question"):
        for behind in (0, 1):
            ms = {name: round(1e3 * statistics.median(times[of, behind, name][3:]), 2) for name in engines}
            over = {name: round(some / ms["none"], 3) for name, some in ms.items()}
            rows.append({"of": of, "behind": behind * contexts["none"].n_tokens, "ms": ms, "over_none": over})
    for row in rows:
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--model", choices=["smollm2", "gemma3"], default="smollm2")
    parser.add_argument("--only", choices=["fidelity", "step"], default="fidelity")
    parser.add_argument("--articles", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    path = smollm2() if args.model == "smollm2" else gemma3()
    engines = {
        str(weights or "none"): KVzipEngine.from_pretrained(path, weights=weights, codec="none", progress=False)
        for weights in (None, *get_args(Weights))
    }
    facts = {"model": args.model, "threads": torch.get_num_threads(), "processor": torch.backends.cpu.get_cpu_capability()}
    if args.only == "step":
        [doc] = documents(articles(args.squad), 1, engines["none"].tokenizer, 6000)
        save("weights_seconds", {**facts, "table": step(engines, doc["text"])})
        return
    docs = documents(articles(args.squad), args.articles, engines["none"].tokenizer, args.tokens)
    name = "weights" if args.model == "smollm2" else f"weights_{args.model}"
    save(name, {**facts, "articles": [doc["title"] for doc in docs], "table": fidelity(engines, docs)})


if __name__ == "__main__":
    main()
