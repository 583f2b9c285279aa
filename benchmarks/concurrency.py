"""Threads that ask at random: every answer as it is alone, how long a running stream stands still, growth of memory.

python benchmarks/concurrency.py --squad squad.json --minutes 5
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from agents import QUESTIONS
from common import articles, save, smollm2
from kvzip_memory import CompressedContext, KVzipEngine

TOKENS = 24


class Load:
    """Threads that answer until told to stop, and one that builds contexts meanwhile."""

    def __init__(self, engine: KVzipEngine, contexts: list[CompressedContext], alone: dict[tuple[int, int], str]) -> None:
        self.engine, self.contexts, self.alone = engine, contexts, alone
        self.end = threading.Event()
        self.answers, self.cancelled, self.wrong, self.builds = 0, 0, 0, 0
        self.waits: list[float] = []  # between two pieces of one stream
        self.failures: list[BaseException] = []
        self._lock = threading.Lock()

    def ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.end.is_set():
            c, q = rng.randrange(len(self.contexts)), rng.randrange(len(QUESTIONS))
            cancel_after = rng.randrange(1, 8) if rng.random() < 0.3 else None
            waits, pieces = [], []
            stream = self.engine.stream(self.contexts[c], QUESTIONS[q], max_new_tokens=TOKENS)
            before = None
            for piece in stream:
                if before is not None:
                    waits.append(time.perf_counter() - before)
                pieces.append(piece)
                if cancel_after is not None and len(pieces) >= cancel_after:
                    stream.cancel()
                before = time.perf_counter()
            text = "".join(pieces)
            with self._lock:
                self.waits += waits
                if stream.reply.finish_reason == "cancelled":
                    self.cancelled += 1
                    self.wrong += not self.alone[c, q].startswith(text)
                else:
                    self.answers += 1
                    self.wrong += text != self.alone[c, q]

    def build(self, text: str) -> None:
        while not self.end.is_set():
            context = self.engine.load(f"{self.builds}. {text}", ratio=0.3)
            self.engine.registry.remove(context.key)
            self.builds += 1

    def guarded(self, work: Any, argument: Any) -> None:
        try:
            work(argument)
        except BaseException as error:
            self.failures.append(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--threads", type=int, default=32)
    args = parser.parse_args()
    engine = KVzipEngine.from_pretrained(smollm2(), progress=False)
    texts = ["\n\n".join(p["context"] for p in a["paragraphs"])[:8_600] for a in articles(args.squad)]
    contexts = [engine.load(text, ratio=0.3) for text in texts[:4]]
    pairs = [(c, q) for c in range(4) for q in range(len(QUESTIONS))]
    alone = {(c, q): engine.generate(contexts[c], QUESTIONS[q], max_new_tokens=TOKENS).text for c, q in pairs}
    load = Load(engine, contexts, alone)
    threads = [threading.Thread(target=load.guarded, args=(load.ask, seed)) for seed in range(args.threads)]
    threads.append(threading.Thread(target=load.guarded, args=(load.build, texts[4])))
    for thread in threads:
        thread.start()
    process, memory = psutil.Process(), []
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end and not load.failures:
        time.sleep(5)
        memory.append(process.memory_info().rss)
    load.end.set()
    for thread in threads:
        thread.join()
    if load.failures:
        raise load.failures[0]
    third = max(1, len(memory) // 3)  # the first third warms up
    waits = sorted(load.waits)
    row = {
        "threads": args.threads,
        "minutes": args.minutes,
        "answers": load.answers,
        "cancelled": load.cancelled,
        "wrong": load.wrong,
        "builds_meanwhile": load.builds,
        "pieces": len(waits),
        "wait_ms": {
            "median": round(1e3 * statistics.median(waits)),
            "p99": round(1e3 * waits[int(0.99 * len(waits))]),
            "max": round(1e3 * waits[-1]),
        },
        "rss_mb": {"second third": round(max(memory[third : 2 * third]) / 1e6), "last third": round(max(memory[2 * third :]) / 1e6)},
    }
    print(row)
    save("concurrency", {"model": "SmolLM2-135M-Instruct, fp32, ratio 0.3", "context_tokens": [c.n_tokens for c in contexts], **row})


if __name__ == "__main__":
    main()
