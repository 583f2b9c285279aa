"""kvpress in its own environment: reads a job (JSON), writes what it measured (JSON). Run by fidelity.py and build.py.

kvpress pins an older transformers than we run on, so it cannot share our environment:

    python -m venv peer && peer/bin/pip install torch kvpress accelerate
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from pathlib import Path

import torch
from kvpress import ExpectedAttentionPress, KnormPress, KVzipPress, SnapKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {"kvzip": KVzipPress, "snapkv": SnapKVPress, "expected_attention": ExpectedAttentionPress, "knorm": KnormPress}


def fresh_cache(model):
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return DynamicCache()


@torch.no_grad()
def compressed(model, press, ids):
    cache = fresh_cache(model)
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    return cache


@torch.no_grad()
def answer_logits(model, cache, n_context, question, answer):
    """Logits that predict ``answer`` after context and question, [len(answer), vocab]; the cache is not changed."""
    ids = torch.tensor([question + answer[:-1]])
    positions = torch.arange(n_context, n_context + ids.shape[1])[None]
    out = model(input_ids=ids, past_key_values=copy.deepcopy(cache), position_ids=positions)
    return out.logits[0, -len(answer) :].float()


def fidelity(model, job):
    results = []
    for context in job["contexts"]:
        ids = torch.tensor([context["ids"]])
        plain = fresh_cache(model)
        with torch.no_grad():
            model.model(input_ids=ids, past_key_values=plain)
        full = [answer_logits(model, plain, ids.shape[1], q["question"], q["answer"]) for q in context["questions"]]
        for name, press in PRESSES.items():
            for ratio in job["ratios"]:
                cache = compressed(model, press(compression_ratio=1 - ratio), ids)
                for q, reference in zip(context["questions"], full, strict=True):
                    logits = answer_logits(model, cache, ids.shape[1], q["question"], q["answer"])
                    results.append({"method": name, "ratio": ratio, "kind": q["kind"]} | divergence(reference, logits))
                print(name, ratio, file=sys.stderr, flush=True)
    return {"results": results}


def divergence(full, ours):
    p, q = full.log_softmax(-1), ours.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return {"kl": kl.sum().item(), "agree": (full.argmax(-1) == ours.argmax(-1)).sum().item(), "tokens": len(kl)}


def scores(model, job):
    """KVzip's raw scores [L, H, n] of the first context."""
    kept = {}

    class Keep(KVzipPress):
        def compress_post(self, model):
            kept["scores"] = self.score_val[:, 0].clone()

    compressed(model, Keep(compression_ratio=0.5), torch.tensor([job["contexts"][0]["ids"]]))
    return kept["scores"].tolist()


def build(model, job):
    """Seconds of a prefill and of prefill + KVzip, interleaved, and peak memory."""
    rows = []
    for ids in job["contexts"]:
        ids = torch.tensor([ids])
        for _ in range(job["repeats"]):
            began = time.perf_counter()
            with torch.no_grad():
                model.model(input_ids=ids, past_key_values=fresh_cache(model))
            prefilled = time.perf_counter()
            compressed(model, KVzipPress(compression_ratio=0.7), ids)
            done = time.perf_counter()
            rows.append({"tokens": ids.shape[1], "prefill_s": prefilled - began, "build_s": done - prefilled})
    return {"rows": rows, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if tokenizer(job["probe"], add_special_tokens=False).input_ids != job["probe_ids"]:
        raise SystemExit("the tokenizer splits text differently in this environment; the comparison would be unfair")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    if job["task"] == "build":
        out = build(model, job)
    else:
        out = fidelity(model, job)
        out["scores"] = scores(model, job)
    Path(sys.argv[2]).write_text(json.dumps(out))


main()
