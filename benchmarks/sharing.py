"""What does it take, and what does it cost in fidelity, that conversations share the pairs of the document they are over?

*Room.* A hundred conversations over the demo's handbook, each of which has put one turn behind it: bytes on the device and on disk, and
tokens read, with the handbook's pairs shared; and ten with a copy of them each.

*Fidelity.* A SQuAD article with hidden codes is loaded, and another one is told behind it by user and assistant, in exchanges of about 30
and 200 tokens, each put behind by ``extend``, sharing the first one's pairs or not. Per token of the full cache's own answers about
both: KL(full || compressed).

    python benchmarks/sharing.py --squad squad.json

Everything is deterministic but the bytes of file headers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import articles, save, smollm2
from fidelity import divergence, documents, greedy
from growing import exchanges
from kvzip_memory import CompressedContext, KVzipEngine

RATIOS = [0.5, 0.3]
SIZES = [(30, 6), (200, 5)]
TOKENS = 1500  # of an article


def room(conversations: int) -> list[dict[str, Any]]:
    rows = []
    for share, count in ((True, conversations), (False, min(conversations, 10))):  # copies of the handbook take gigabytes
        with tempfile.TemporaryDirectory() as folder:
            engine = KVzipEngine.from_pretrained(smollm2(), ratio=0.3, cache_dir=folder)
            handbook = engine.load(Path(__file__).parents[1] / "examples" / "handbook.md")
            read = 0
            for i in tqdm(range(count), desc=f"share={share}"):
                said = [
                    {"role": "user", "content": f"I am keeper number {i}, and I like tea."},
                    {"role": "assistant", "content": "Noted. Anything else that I should know?"},
                ]
                context = engine.extend(handbook, said, share=share)
                assert context.receipt is not None
                read += context.receipt.read
            engine.registry.flush()
            tiers = engine.registry.stats()["tiers"]
            rows.append(
                {
                    "share": share,
                    "conversations": count,
                    "document_tokens": handbook.n_tokens,
                    "document_mb": round(handbook.nbytes / 1e6, 2),
                    "device_mb": round(tiers["device"]["nbytes"] / 1e6, 2),
                    "disk_mb": round(tiers["disk"]["nbytes"] / 1e6, 2),
                    "read_each": read / count,
                }
            )
            engine.close()
    return rows


def told(
    context: CompressedContext, engine: KVzipEngine, pieces: list[list[dict[str, str]]], ratio: float, share: bool
) -> CompressedContext:
    for number, piece in enumerate(pieces):
        context = engine.extend(context, piece, ratio=ratio, share=share and number == 0)
    return context


def fidelity(squad: Path, first: int, count: int) -> list[dict[str, Any]]:
    engine = KVzipEngine.from_pretrained(smollm2(), codec="none")
    docs = documents(articles(squad)[first : first + count], count, engine.tokenizer, TOKENS)
    sums: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for number, doc in enumerate(tqdm(docs)):
        other = docs[(number + 1) % len(docs)]
        for size, pieces_of in SIZES:
            pieces = exchanges(engine, other["text"], size, pieces_of)
            full = told(engine.load(doc["text"], ratio=1.0), engine, pieces, 1.0, share=False)
            asked = [(where, kind, question) for where, of in (("document", doc), ("told", other)) for kind, question in of["asked"]]
            ids = [(where, kind, engine.prompt_ids(full, question)) for where, kind, question in asked]
            answers = [(where, kind, question, answer) for where, kind, question in ids if (answer := greedy(engine, full, question))]
            expected = [engine.logits(full, question + answer[:-1])[-len(answer) :] for *_, question, answer in answers]
            for ratio in RATIOS:
                document = engine.load(doc["text"], ratio=ratio)
                for share in (True, False):
                    context = told(document, engine, pieces, ratio, share)
                    for (where, _, question, answer), wanted in zip(answers, expected, strict=True):
                        apart = divergence(wanted, engine.logits(context, question + answer[:-1])[-len(answer) :])
                        entry = sums[size, ratio, where, share]
                        entry[0] += apart["kl"]
                        entry[1] += apart["tokens"]
    rows = []
    for size, ratio, where in dict.fromkeys(key[:-1] for key in sums):
        shared, alone = (sums[size, ratio, where, share] for share in (True, False))
        kl = [round(entry[0] / entry[1], 5) for entry in (shared, alone)]
        rows.append({"exchange": size, "ratio": ratio, "about": where, "shared": kl[0], "in one": kl[1], "tokens": int(shared[1])})
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--articles", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=100)
    args = parser.parse_args()
    table = fidelity(args.squad, args.first, args.articles)
    rows = room(args.conversations)
    for row in rows:
        print(row)
    if args.first == 0:
        save("sharing", {"model": "smollm2", "room": rows, "fidelity": table})


if __name__ == "__main__":
    main()
