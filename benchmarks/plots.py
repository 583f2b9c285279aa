"""The plots of docs/, from results/*.json:  python benchmarks/plots.py     with matplotlib installed"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import matplotlib.pyplot as plt  # type: ignore[import-not-found]

from common import RESULTS


def frontier() -> None:
    """KL of questions by bytes, of each codec at several ratios, and of KIVI."""
    rows: list[dict[str, Any]] = [
        row for name in ("codecs", "codecs_frontier") for row in json.loads((RESULTS / f"{name}.json").read_text())["table"]
    ]
    points = defaultdict[str, list[tuple[float, float]]](list)
    for row in rows:
        if row["kl"]["question"] > 1e-4:  # what is less cannot be told from nothing
            points[row["codec"].split(",")[0]].append((row["of_dense_16_bits"], row["kl"]["question"]))
    _, axes = plt.subplots(figsize=(7, 4.5))
    for codec, some in points.items():
        axes.plot(*zip(*sorted(some), strict=True), marker="o", linestyle="--" if codec == "KIVI" else "-", label=codec)
    axes.set(xscale="log", yscale="log", xlabel="bytes, of a dense cache of 16 bits", ylabel="KL to the full cache, per token")
    axes.set_xticks(ticks := [1 / 20, 1 / 12, 1 / 8, 1 / 4, 1 / 2], [f"1/{round(1 / tick)}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    plt.savefig(RESULTS.parent.parent / "docs" / "frontier.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "frontier"
    frontier()
