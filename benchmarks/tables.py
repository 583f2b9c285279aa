"""The tables of docs/benchmarks.md, from results/*.json:  python benchmarks/tables.py"""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS


def fidelity(name: str) -> str:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows: list[dict[str, Any]] = result["table"]
    ratios = sorted({r["ratio"] for r in rows}, reverse=True)
    kinds = ["question", "needle"]
    head = [f"{kind}s {ratio}" for kind in kinds for ratio in ratios]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = []
        for kind in kinds:
            for ratio in ratios:
                row = next(r for r in rows if (r["method"], r["kind"], r["ratio"]) == (method, kind, ratio))
                cells.append(f"{row['kl']:.4f} / {row['top1']:.3f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def build() -> str:
    lines = ["| method | tokens | prefill s | build s | build / prefill | peak over the model / dense cache |", "|---|---|---|---|---|---|"]
    for row in json.loads((RESULTS / "build.json").read_text())["table"]:
        peak = row.get("peak_over_dense", "")
        lines.append(f"| {row['method']} | {row['tokens']:,} | {row['prefill_s']} | {row['build_s']} | {row['ratio']} | {peak} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in [path.stem for path in sorted(RESULTS.glob("fidelity*.json"))]:
        print(f"{name}\n\n{fidelity(name)}\n")
    print(f"build\n\n{build()}")
