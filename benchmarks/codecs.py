"""What do pairs that are written in fewer bits say, and what do they take?

Contexts, questions and codes of `fidelity.py`. Each article is loaded by engines of each codec, at each ratio. Per token of the answers of
the full cache, in the model's own dtype: KL(full || context), and bytes of the context's storages, scores and positions among them, over
those of a dense cache of 16 bits.

    python benchmarks/codecs.py --squad squad.json
    python benchmarks/codecs.py --squad squad.json --model gemma3
    python benchmarks/codecs.py --squad squad.json --only frontier  each codec at ratios that take as many bytes, and KIVI
    python benchmarks/codecs.py --squad squad.json --only step      on a quiet machine

``frontier``: beside ours the full cache rounded as KIVI does (arXiv 2402.02750): keys by channel over 32 tokens, values by token over 32
channels, scales and offsets of 16 bits, the last 128 tokens in 16 bits; what it would take is computed.

``step``: one decode step behind 6,000 tokens, and a question of 16 tokens, over those of pairs in the model's own dtype, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common import articles, gemma3, save, smollm2
from fidelity import divergence, documents, greedy
from kvzip_memory import CompressedContext, KVzipEngine
from kvzip_memory.compression.codecs import CODECS
from kvzip_memory.context import Resident
from kvzip_memory.inference.cache import Tail

RATIOS = [1.0, 0.5, 0.3, 0.1]
SHARES = [4, 8, 12, 20]
# KIVI's: tokens or channels of a scale, and tokens that are left as they are.
GROUP, RESIDUAL = 32, 128


def step(exact: KVzipEngine, engines: dict[str, KVzipEngine], text: str) -> list[dict[str, Any]]:
    """A row for each ratio and codec."""
    rows = []
    for ratio in (1.0, 0.3):
        contexts = {codec: engine.load(text, ratio=ratio) for codec, engine in engines.items()}
        for name, ids in (("step", [5]), ("question", [5] * 16)):
            times = defaultdict[str, list[float]](list)
            for _ in range(60):
                for codec, context in contexts.items():
                    with context.lease() as lease:
                        row = exact._model.row(lease, context.n_tokens, Tail())
                        began = time.perf_counter()
                        exact._model.forward([row], [ids])
                        times[codec].append(time.perf_counter() - began)
            ms = {codec: round(1e3 * statistics.median(some), 2) for codec, some in times.items()}
            over = {codec: round(some / ms["none"], 3) for codec, some in ms.items()}
            rows.append({"ratio": ratio, "tokens": contexts["none"].n_tokens, "of": name, "ms": ms, "over_none": over})
            print(rows[-1], flush=True)
    return rows


def fidelity(
    exact: KVzipEngine,
    engines: dict[str, KVzipEngine],
    docs: list[dict[str, Any]],
    ratios: Callable[[str, CompressedContext], dict[str, float]],
    peers: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """A row for each codec and each of its ratios, by what they are called, and for KIVI of so many bits."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    taken: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for doc in tqdm(docs, desc="articles"):
        full = exact.load(doc["text"], ratio=1.0)
        asked = []
        for kind, question in doc["asked"]:
            ids = exact.prompt_ids(full, question)
            if answer := greedy(exact, full, ids):
                ids += answer[:-1]
                asked.append((kind, ids, exact.logits(full, ids)[-len(answer) :]))
        found = [
            (codec, called, ratio, engine, engine.load(doc["text"], ratio=ratio))
            for codec, engine in engines.items()
            for called, ratio in ratios(codec, full).items()
        ]
        ways = [(codec, called, ratio, engine, context, float(context.nbytes)) for codec, called, ratio, engine, context in found]
        for bits in peers:
            context, nbytes = kivi(full, bits)
            ways.append((f"KIVI, {bits} bits", "1.0", 1.0, exact, context, nbytes))
        for codec, called, ratio, engine, context, nbytes in ways:
            for i, more in enumerate((nbytes, dense(context, engine), ratio / len(docs))):
                taken[codec, called][i] += more
            for kind, ids, expected in asked:
                apart = divergence(expected, engine.logits(context, ids)[-len(expected) :])
                sums[codec, called, kind][0] += apart["kl"]
                sums[codec, called, kind][1] += apart["tokens"]
    rows = []
    for (codec, called), (nbytes, whole, ratio) in taken.items():
        kl = {kind: float(f"{total / tokens:.3g}") for (c, r, kind), (total, tokens) in sums.items() if (c, r) == (codec, called)}
        rows.append({"codec": codec, "at": called, "ratio": round(ratio, 3), "of_dense_16_bits": round(nbytes / whole, 4), "kl": kl})
        print(rows[-1], flush=True)
    return rows


def kivi(full: CompressedContext, bits: int) -> tuple[CompressedContext, float]:
    """A full context whose pairs are rounded as KIVI does, and the bytes that their codes, scales and offsets take."""
    layers, nbytes = [], 0.0
    with full.lease() as lease:
        for layer in lease.layers:
            assert isinstance(layer.keys, torch.Tensor)
            assert isinstance(layer.values, torch.Tensor)
            keys, values = (x.unflatten(0, (len(layer.lengths), -1)).clone() for x in (layer.keys, layer.values))
            n = keys.shape[1]
            of_keys, of_values = n - n % RESIDUAL, max(0, n - RESIDUAL)
            keys[:, :of_keys] = rounded(keys[:, :of_keys].unflatten(1, (-1, GROUP)), 2, bits).flatten(1, 2)
            values[:, :of_values] = rounded(values[:, :of_values].unflatten(2, (-1, GROUP)), 3, bits).flatten(2)
            for pairs, coded in ((keys, of_keys), (values, of_values)):
                vectors, dim = len(pairs), pairs.shape[2]
                nbytes += vectors * dim * (coded * (bits / 8 + 4 / GROUP) + 2 * (n - coded))
            layers.append(replace(layer, keys=keys.flatten(0, 1), values=values.flatten(0, 1)))
    return replace(full, storage=Resident(tuple(layers))), nbytes


def rounded(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """To codes from the least to the largest along a dimension, and back."""
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((most - least) / (2**bits - 1)).half().float()
    least = least.half().float()
    return ((x - least) / torch.where(scale == 0, 1, scale)).round().clamp(0, 2**bits - 1) * scale + least


def dense(context: CompressedContext, engine: KVzipEngine) -> int:
    """Bytes of a dense cache of 16 bits."""
    return 2 * context.dense_nbytes // engine.model.dtype.itemsize


def of_bytes(exact: KVzipEngine, codec: str, full: CompressedContext) -> dict[str, float]:
    """The ratios at which a codec takes a share of a dense cache of 16 bits; of a model without windows."""
    (_, dim, dim_v), heads = exact._model.kinds[0], full.kept_pairs // full.n_tokens
    pair = CODECS[codec].nbytes(exact.model.dtype, dim)[0] + CODECS[codec].nbytes(exact.model.dtype, dim_v)[1] + 6  # position and score
    found = {}
    for share in SHARES:
        pairs = (dense(full, exact) / share - 4 * full.n_tokens) / pair - full.protected * heads
        if 0.02 < (ratio := pairs / heads / (full.n_tokens - full.protected)) < 1:
            found[f"1/{share}"] = ratio
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--model", choices=["smollm2", "gemma3"], default="smollm2")
    parser.add_argument("--only", choices=["fidelity", "frontier", "step"], default="fidelity")
    parser.add_argument("--articles", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    exact = KVzipEngine.from_pretrained(smollm2() if args.model == "smollm2" else gemma3(), codec="none", progress=False)
    engines = {codec: KVzipEngine(exact.model, exact.tokenizer, codec=codec, progress=False) for codec in CODECS}
    if args.only == "step":
        [doc] = documents(articles(args.squad), 1, exact.tokenizer, 6000)
        save("codecs_seconds", {"model": args.model, "table": step(exact, engines, doc["text"])})
        return
    docs = documents(articles(args.squad), args.articles, exact.tokenizer, args.tokens)
    if args.only == "frontier":
        rows = fidelity(exact, engines, docs, partial(of_bytes, exact), (4, 2))
        save("codecs_frontier", {"model": args.model, "articles": [doc["title"] for doc in docs], "table": rows})
        return
    rows = fidelity(exact, engines, docs, lambda *_: {str(ratio): ratio for ratio in RATIOS})
    name = "codecs" if args.model == "smollm2" else f"codecs_{args.model}"
    save(name, {"model": args.model, "articles": [doc["title"] for doc in docs], "table": rows})


if __name__ == "__main__":
    main()
