"""Agents on one context: aggregate tokens a second of 1 and 8 threads, beside transformers with a dense cache an agent.

python benchmarks/agents.py --squad squad.json
"""

from __future__ import annotations

import argparse
import gc
import statistics
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from common import articles, save, smollm2
from kvzip_memory import CompressedContext, KVzipEngine, Session
from kvzip_memory.context import storage_nbytes

QUESTIONS = [
    "What is the text about?",
    "Name a person who is mentioned.",
    "Name a place that is mentioned.",
    "Which year is mentioned first?",
    "Tell the beginning in your own words.",
    "Tell the end in your own words.",
    "Which organisation is mentioned?",
    "Write a title for the text.",
]


def ours(engine: KVzipEngine, context: CompressedContext, agents: int, tokens: int) -> tuple[float, list[Session]]:
    """Tokens a second of so many threads that ask at once, questions included, and their sessions."""
    sessions = [engine.session(context) for _ in range(agents)]
    counts: list[int] = []

    def ask(i: int) -> None:
        reply = sessions[i].ask(QUESTIONS[i], max_new_tokens=tokens)
        counts.append(reply.usage.output_tokens)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(agents)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began), sessions


def live_nbytes() -> int:
    """Bytes of all tensors' storages in the process, each counted once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some objects warns
        return storage_nbytes([x for x in gc.get_objects() if isinstance(x, torch.Tensor)])


def tail_nbytes(session: Session) -> int:
    return storage_nbytes([t for pair in session._tail._layers.values() for t in pair])


def memory(engine: KVzipEngine, text: str) -> dict[str, Any]:
    """What a context, eight agents on it and a ninth add to the process, beside what they should."""
    before = live_nbytes()
    context = engine.load(text, ratio=0.3)
    sessions = ours(engine, context, 8, 16)[1]
    eight = live_nbytes()
    ninth = ours(engine, context, 1, 16)[1][0]
    expected = context.nbytes + sum(map(tail_nbytes, sessions))
    return {
        "context_nbytes": context.nbytes,
        "tail_nbytes": [tail_nbytes(session) for session in sessions],
        "measured_over_context_and_tails": round((eight - before) / expected, 3),
        "ninth_over_its_tail": round((live_nbytes() - eight) / tail_nbytes(ninth), 3),
    }


@torch.inference_mode()
def dense(engine: KVzipEngine, context: CompressedContext, agents: int, tokens: int) -> float:
    """Tokens a second of transformers' greedy steps over a batch of dense caches of the same context."""
    cache = DynamicCache(config=engine.model.config)
    ids = context.token_ids.long()
    for start in range(0, len(ids), 2048):
        engine.model.base_model(input_ids=ids[None, start : start + 2048], past_key_values=cache)
    cache.batch_repeat_interleave(agents)
    next_ids = torch.full((agents, 1), 17)
    spent = []
    for _ in range(tokens):
        began = time.perf_counter()
        logits = engine.model(input_ids=next_ids, past_key_values=cache).logits
        next_ids = logits[:, -1].argmax(-1, keepdim=True)
        spent.append(time.perf_counter() - began)
    return agents / statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=27_000)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), progress=False)
    engine.model.generation_config.eos_token_id = None  # every answer has the same length
    engine.tokenizer.eos_token = None
    text = "\n\n".join(p["context"] for a in articles(args.squad) for p in a["paragraphs"])[: args.characters]
    rows: dict[str, Any] = memory(engine, text)
    context = engine.load(text, ratio=0.3)
    rows["tokens"] = context.n_tokens
    rates: dict[int, list[float]] = {1: [], 8: []}
    for _ in range(3):
        for agents in rates:
            rates[agents].append(ours(engine, context, agents, args.new_tokens)[0])
    one, eight = statistics.median(rates[1]), statistics.median(rates[8])
    theirs = engine._model._worker.run(lambda: dense(engine, context, 8, 24))  # two threads that compute slow each other
    rows |= {
        "one_agent_tokens_per_s": round(one, 1),
        "eight_agents_tokens_per_s": round(eight, 1),
        "dense_batch_of_8_tokens_per_s": round(theirs, 1),
        "eight_over_one": round(eight / one, 2),
        "eight_over_dense": round(eight / theirs, 2),
        "dense_8_nbytes": 8 * context.dense_nbytes,
    }
    print(rows)
    save("agents", {"model": "SmolLM2-135M-Instruct, fp32, ratio 0.3", "new_tokens": args.new_tokens, **rows})


if __name__ == "__main__":
    main()
