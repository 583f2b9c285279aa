"""What a build costs: (prefill + scoring + eviction) / prefill, and its peak memory, beside kvpress' KVzip.

python benchmarks/build.py --squad squad.json --kvpress-python peer/bin/python
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from common import PROBE, articles, run_peer, save, smollm2
from kvzip_memory import KVzipEngine
from kvzip_memory.context import storage_nbytes


@torch.inference_mode()
def prefill(engine: KVzipEngine, ids: torch.Tensor) -> None:
    engine.model.base_model(input_ids=ids, past_key_values=DynamicCache(config=engine.model.config))


def measure(text: str, repeats: int, every: int | None, refit: str) -> dict[str, Any]:
    """Plain prefill by transformers and our build, in turn; medians of the times and of their ratio pair by pair."""
    engine = KVzipEngine.from_pretrained(smollm2(), progress=False, compress_every=every, refit=refit)
    weights = storage_nbytes([*engine.model.parameters(), *engine.model.buffers()])
    ids = torch.tensor([engine._contexts.prompt(engine._language, text).token_ids])
    context = engine.load(text, ratio=0.3)  # first, and alone: transformers' whole prefill in one piece needs more memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = []
    for _ in range(repeats):
        began = time.perf_counter()
        engine._model._worker.run(lambda: prefill(engine, ids))  # on our thread: two that compute slow each other
        prefilled = time.perf_counter()
        engine.registry.remove(context.key)
        context = engine.load(text, ratio=0.3)
        rows.append((prefilled - began, time.perf_counter() - prefilled, context.receipt.ms))
    assert context.receipt is not None
    return {
        "tokens": context.n_tokens,
        "prefill_s": round(statistics.median(r[0] for r in rows), 2),
        "build_s": round(statistics.median(r[1] for r in rows), 2),
        "ratio": round(statistics.median(r[1] / r[0] for r in rows), 2),
        "score_s": round(statistics.median(r[2]["score"] for r in rows) / 1e3, 2),
        "evict_s": round(statistics.median(r[2]["evict"] for r in rows) / 1e3, 3),
        "dense_nbytes": context.dense_nbytes,
        "nbytes": context.nbytes,
        "weights_nbytes": weights,
        "peak_rss_nbytes": peak,
    }


def baseline_rss() -> int:
    """Peak resident memory of a process that only loads the model and prefills a few tokens."""
    engine = KVzipEngine.from_pretrained(smollm2(), progress=False)
    engine.load("A page.", ratio=1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_subprocess(*arguments: str) -> Any:
    """Peak memory is a process's, so each measurement gets its own."""
    out = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def text_of(squad: Path, tokens: int) -> str:
    """About ``tokens`` tokens of articles (4.3 characters a token)."""
    return "\n\n".join(p["context"] for a in articles(squad) for p in a["paragraphs"])[: int(tokens * 4.3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--kvpress-python")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 6000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compress-every", type=int, nargs="*", default=[256, 500], help="more rows, built in pieces")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pieces", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--refit", default="auto", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        text = text_of(args.squad, args.one)
        print(json.dumps(measure(text, args.repeats, args.pieces, args.refit) if args.one else baseline_rss()))
        return
    common = ["--squad", str(args.squad), "--repeats", str(args.repeats), "--one"]
    baseline = in_subprocess(*common, "0")
    table = []
    for tokens in args.tokens:
        pieces_of = {f"in pieces of {n}": ["--pieces", str(n)] for n in args.compress_every}
        for name, options in {"kvzip_memory": [], "without refit": ["--refit", "none"], **pieces_of}.items():
            row = in_subprocess(*common, str(tokens), *options)
            extra, dense, weights = row.pop("peak_rss_nbytes") - baseline, row["dense_nbytes"], row["weights_nbytes"]
            row |= {"method": name, "peak_over_model_nbytes": extra, "peak_over_dense": round(extra / dense, 2)}
            row["peak_over_weights_and_dense"] = round((weights + extra) / (weights + dense), 2)
            table.append(row)
            print(row, flush=True)
    if args.kvpress_python:
        engine = KVzipEngine.from_pretrained(smollm2(), progress=False)
        for tokens in args.tokens:
            ids = list(engine._contexts.prompt(engine._language, text_of(args.squad, tokens)).token_ids)
            job = {"task": "build", "threads": torch.get_num_threads(), "contexts": [ids], "repeats": args.repeats}
            job |= {"model": str(engine.model.config.name_or_path), "probe": PROBE}
            job["probe_ids"] = engine.tokenizer(PROBE, add_special_tokens=False).input_ids
            rows = run_peer(args.kvpress_python, job)["rows"]
            row = {"method": "kvpress KVzip", "tokens": len(ids)}
            row |= {key: round(statistics.median(r[key] for r in rows), 2) for key in ("prefill_s", "build_s")}
            row["ratio"] = round(statistics.median(r["build_s"] / r["prefill_s"] for r in rows), 2)
            table.append(row)
            print(row, flush=True)
    save("build", {"model": "SmolLM2-135M-Instruct, fp32", "kept": 0.3, "repeats": args.repeats, "table": table})


if __name__ == "__main__":
    main()
