"""llama.cpp and ours, in turn, on the same file of weights, the same ids and the same cores.

llama.cpp is the package ``xllamacpp``, in an environment of its own, as a process that this one starts for each number of threads:

    python -m venv peer && peer/bin/pip install --no-deps xllamacpp
    python benchmarks/llamacpp_peer.py --squad squad.json --peer peer/bin/python    on a quiet machine

``xllamacpp`` gives llama.cpp's server, not ``llama_decode``: its figures are those of the server's own clock (``prompt_ms``, ``save_ms``,
``restore_ms``, differences of ``predicted_ms`` from token to token), so without HTTP and JSON, and with the choice of a token. Its cache
has 16 bits a number, its default. ``compiled_for`` in the result says for which instructions: a wheel from PyPI is for AVX2, whatever the
processor has; what is compiled where it runs may be faster.

Ours is ``{weights} {ratio}``, with pairs in 16 bits. Milliseconds:

``read``: the text, until its pairs are in memory; of ours a whole load, which below 1.0 is a prefill and a compression. Measured once.
``step``: a decode step behind the text, the median of many. A turn is five steps, the first of which is not counted.
``question``: 16 ids behind the text, until the logits of the last one; the text's pairs are in memory.
``save``: the text's pairs to a file. Ours are written behind the answers, and are not measured.
``restore``: from a file, which is in the page cache. Of ours ``engine.load`` by an engine that does not have it in memory: the text is
tokenized, and its context is found by its key, read and verified. llama.cpp is told the file and the ids, and checks neither.
``disk``: ``restore`` and then ``question``.
``first load``: of a new engine, of 1,000 characters from disk: weights and tokenizer are hashed, once an engine; in no other row.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

AS_PEER = sys.argv[1:2] == ["--as-peer"]
if not AS_PEER:  # what the peer's environment does not have
    import torch
    from tqdm import tqdm

    from common import articles, save, smollm2
    from fidelity import documents
    from kvzip_memory import CompressedContext, KVzipEngine
    from kvzip_memory.inference.cache import Row, Tail

PEER = "llama.cpp"
RATIOS = (1.0, 0.3)
# Steps of a turn, the ids of a question, and the one that is read where there is no text.
STEPS, QUESTION, ALONE = 4, [5] * 16, [17]
WINDOW, REOPENED = 8192, 5


class Peer:
    """llama.cpp in its process, which computes only while it is asked."""

    def __init__(self, python: str, model: Path, threads: int) -> None:
        command = [python, __file__, "--as-peer", str(model), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def ask(self, what: str, **given: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps([what, given]), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"llama.cpp's process ended with {self._process.wait()}; what it said is above")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def as_peer(model: str, threads: int) -> None:
    """The peer's process: a command a line, and as many answers."""
    import xllamacpp  # type: ignore[import-not-found]

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    with tempfile.TemporaryDirectory() as folder:
        params = xllamacpp.CommonParams()
        params.model.path, params.slot_save_path = model, f"{folder}/"
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_ctx, params.n_parallel, params.verbosity = WINDOW, 1, 1
        params.cache_ram_mib = 0  # what is erased is to be read again
        server = xllamacpp.Server(params)

        def complete(ids: list[int], tokens: int, **more: Any) -> Any:
            greedy = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"], "ignore_eos": True}
            return {"prompt": ids, "max_tokens": tokens, "cache_prompt": True, **greedy, **more}

        def asked(ids: list[int], new: int) -> float:
            """Milliseconds until the first token behind ids of which so many are new."""
            timings = server.handle_completions(complete(ids, 1))["timings"]
            assert timings["prompt_n"] == new, timings
            return timings["prompt_ms"]

        def slot(action: str, **what: Any) -> Any:
            connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"))
            connection.request("POST", f"/slots/0?action={action}", json.dumps(what), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.load(response)
            connection.close()
            assert response.status == 200, answer
            return answer

        def read(ids: list[int]) -> float:
            slot("erase")
            return asked(ids, len(ids))

        def turn(ids: list[int]) -> tuple[list[float], float]:
            until: dict[int, float] = {}

            def told(piece: Any) -> bool:
                until[piece["timings"]["predicted_n"]] = piece["timings"]["predicted_ms"]
                return False

            # The first token is that of the last id, which is read once more.
            server.handle_completions(complete(ids or ALONE, 1 + STEPS, stream=True, timings_per_token=True), told)
            steps = [until[n + 1] - until[n] for n in range(1, 1 + STEPS)]
            return steps, asked(ids + QUESTION, len(QUESTION))

        def keep(tokens: int) -> float:
            saved = slot("save", filename="text")
            assert saved["n_saved"] == tokens, saved
            return saved["timings"]["save_ms"]

        def restore(ids: list[int]) -> tuple[float, float]:
            slot("erase")
            restored = slot("restore", filename="text")
            assert restored["n_restored"] == len(ids), restored
            return restored["timings"]["restore_ms"], asked(ids + QUESTION, len(QUESTION))

        about = {"xllamacpp": xllamacpp.__version__, "compiled_for": xllamacpp.get_system_info().strip(" |")}
        print(json.dumps(about), file=answers, flush=True)
        commands: dict[str, Callable[..., Any]] = {"read": read, "turn": turn, "keep": keep, "restore": restore}
        for line in sys.stdin:
            what, given = json.loads(line)
            print(json.dumps(commands[what](**given)), file=answers, flush=True)


def renewed(loaded: KVzipEngine, folder: str, threads: int) -> KVzipEngine:
    """An engine of a loaded model that has nothing in memory yet."""
    engine = KVzipEngine(loaded.model, loaded.tokenizer, cache_dir=folder, progress=False)
    engine._model._worker.run(partial(torch.set_num_threads, threads))  # a number for each thread, and this is the one that computes
    return engine


def other(text: str) -> str:
    """What is loaded before it, so that what is done once is done."""
    return text[-1000:]


def load(engine: KVzipEngine, text: str, ratio: float, tier: str) -> tuple[float, CompressedContext]:
    """Milliseconds, and the context, which was found there."""
    began = time.perf_counter()
    context = engine.load(text, ratio=ratio)
    ms = 1e3 * (time.perf_counter() - began)
    assert context.receipt is not None
    assert context.receipt.tier == tier, context.receipt
    return ms, context


def forward(engine: KVzipEngine, row: Row, ids: list[int]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    engine._model.forward([row], [ids])
    return 1e3 * (time.perf_counter() - began)


def turn(engine: KVzipEngine, context: CompressedContext | None) -> tuple[list[float], float]:
    """Milliseconds of each step, and of the question."""
    with context.lease() if context else nullcontext() as lease:

        def behind() -> Row:
            return engine._model.row(lease, context.n_tokens, Tail()) if context and lease else Row((), 0, Tail())

        row = behind()
        steps = [forward(engine, row, [5]) for _ in range(1 + STEPS)]
        return steps[1:], forward(engine, behind(), QUESTION)


def measure(loaded: dict[str, KVzipEngine], peer: Peer, text: str | None, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Rows for one text, or for none."""
    times = defaultdict[tuple[str, str], list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        engines = {weights: renewed(engine, folder, threads) for weights, engine in loaded.items()}
        ways: dict[str, tuple[KVzipEngine, CompressedContext | None]] = {}
        ids: list[int] = []
        if text is None:
            ways |= {weights: (engine, None) for weights, engine in engines.items()}
        else:
            for (weights, engine), ratio in product(engines.items(), RATIOS):
                load(engine, other(text), ratio, "built")
                ms, context = load(engine, text, ratio, "built")
                times["read", f"{weights} {ratio}"].append(ms)
                ways[f"{weights} {ratio}"] = engine, context
                ids = context.token_ids.tolist()
            times["read", PEER].append(peer.ask("read", ids=ids))
            times["save", PEER] += [peer.ask("keep", tokens=len(ids)) for _ in range(REOPENED)]
        for _ in range(rounds):
            steps, question = peer.ask("turn", ids=ids)
            times["step", PEER] += steps
            times["question", PEER].append(question)
            for way, (engine, context_or_none) in ways.items():
                steps, question = turn(engine, context_or_none)
                times["step", way] += steps
                times["question", way].append(question)
        for engine in engines.values():
            engine.close()
        for again in [text] * REOPENED if text else []:
            restored, question = peer.ask("restore", ids=ids)
            times["restore", PEER].append(restored)
            times["disk", PEER].append(restored + question)
            for (weights, engine), ratio in product(loaded.items(), RATIOS):
                first, restored, whole = reopened(renewed(engine, folder, threads), again, ratio)
                times["restore", f"{weights} {ratio}"].append(restored)
                times["disk", f"{weights} {ratio}"].append(whole)
                times["first load", f"{weights} {ratio}"].append(first)
    rows = []
    for of in dict.fromkeys(of for of, _ in times):
        medians = {way: round(statistics.median(some), 2) for (what, way), some in times.items() if what == of}
        over = {way: round(some / medians[PEER], 3) for way, some in medians.items() if way != PEER and PEER in medians}
        rows.append({"threads": threads, "tokens": len(ids), "of": of, "ms": medians, "over_llamacpp": over})
        print(rows[-1], flush=True)
    return rows


def reopened(engine: KVzipEngine, text: str, ratio: float) -> tuple[float, float, float]:
    """Milliseconds of its first load, until the text's context is in memory, and until the first token behind it."""
    forward(engine, Row((), 0, Tail()), QUESTION)
    first, _ = load(engine, other(text), ratio, "disk")
    restored, context = load(engine, text, ratio, "disk")
    with context.lease() as lease:
        asked = forward(engine, engine._model.row(lease, context.n_tokens, Tail()), QUESTION)
    engine.close()
    return first, restored, restored + asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="python of an environment with xllamacpp")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 2000, 6000])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    table: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {
            str(weights or "none"): KVzipEngine.from_pretrained(smollm2(), weights=weights, cache_dir=folder, progress=False)
            for weights in (None, "auto")
        }
        tokenizer, data = loaded["none"].tokenizer, articles(args.squad)
        texts = [documents(data, 1, tokenizer, tokens)[0]["text"] if tokens else None for tokens in args.tokens]
        for threads in args.threads:
            torch.set_num_threads(threads)
            peer = Peer(args.peer, smollm2(), threads)
            about = peer.about
            for text in tqdm(texts, desc=f"texts, {threads} threads"):
                table += measure(loaded, peer, text, threads, args.rounds)
            peer.close()
    facts = {"model": "SmolLM2-135M-Instruct, Q4_1", **about, "processor": torch.backends.cpu.get_cpu_capability(), "rounds": args.rounds}
    save("llamacpp_peer", {**facts, "table": table})


if __name__ == "__main__":
    if AS_PEER:
        as_peer(sys.argv[2], int(sys.argv[3]))
    else:
        main()
