"""What a context costs per decoded token: transformers' DynamicCache and ours at several ratios, in turn, in one process.

python benchmarks/decode.py --squad squad.json --tokens 1000 2000 4000 6000 7000
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from common import articles, save, smollm2
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.inference.cache import Row, Tail

RATIOS = (1.0, 0.5, 0.3, 0.1)


def dense_step(engine: KVzipEngine, ids: list[int]) -> Callable[[], None]:
    """One more token by the model's own attention over a dense cache of ``ids``; on our thread, as two that compute slow each other."""
    cache = DynamicCache(config=engine.model.config)
    with torch.inference_mode():
        for start in range(0, len(ids), 2048):
            engine.model.base_model(input_ids=torch.tensor([ids[start : start + 2048]]), past_key_values=cache)

    @torch.inference_mode()
    def step() -> None:
        engine.model(input_ids=torch.tensor([[17]]), past_key_values=cache)

    return lambda: engine._model._worker.run(step)


def our_step(engine: KVzipEngine, context: CompressedContext | None) -> Callable[[], None]:
    row = Row(context.layers if context else (), context.n_tokens if context else 0, Tail())

    def step() -> None:
        engine._model.forward([row], [[17]])

    return step


def medians(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each step, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 5):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if i >= 5:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(engine: KVzipEngine, text: str, tokens: int, rounds: int) -> dict[str, Any]:
    text = engine.tokenizer.decode(engine.tokenizer(text, add_special_tokens=False).input_ids[:tokens])
    engine.load(text, ratio=0.5)
    contexts = {ratio: engine.load(text, ratio=ratio) for ratio in RATIOS}
    ids = contexts[1.0].token_ids.tolist()
    steps = {"dense": dense_step(engine, ids), "dense empty": dense_step(engine, ids[:1]), "empty": our_step(engine, None)}
    steps |= {str(ratio): our_step(engine, context) for ratio, context in contexts.items()}
    ms = medians(steps, rounds)
    dense_cost = ms["dense"] - ms["dense empty"]
    row: dict[str, Any] = {"tokens": len(ids), "step_ms": {name: round(t, 2) for name, t in ms.items()}}
    row["dense_context_ms"] = round(dense_cost, 2)
    row["context_ms"] = {str(r): round(ms[str(r)] - ms["empty"], 2) for r in RATIOS}
    row["context_cost_ratio"] = {str(r): round(dense_cost / (ms[str(r)] - ms["empty"]), 2) for r in RATIOS}
    row["step_ratio"] = {str(r): round(ms["dense"] / ms[str(r)], 2) for r in RATIOS}
    for context in contexts.values():
        engine.registry.remove(context.key)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 2000, 4000, 6000, 7000])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), progress=False)
    text = "\n\n".join(p["context"] for a in articles(args.squad) for p in a["paragraphs"])
    table = []
    for tokens in tqdm(args.tokens, desc="contexts"):
        table.append(measure(engine, text, tokens, args.rounds))
        print(table[-1])
    save("decode", {"model": "SmolLM2-135M-Instruct, fp32", "rounds": args.rounds, "table": table})


if __name__ == "__main__":
    main()
