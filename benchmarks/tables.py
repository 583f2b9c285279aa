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


def growing() -> str:
    rows = json.loads((RESULTS / "growing.json").read_text())["table"]
    lines = [
        "| exchanges of | ratio | refit | questions: at once | grown | ratio of both | codes: at once | grown | ratio of both |",
        "|---" * 9 + "|",
    ]
    for size, ratio, refit in dict.fromkeys((row["exchange"], row["ratio"], row["refit"]) for row in rows):
        cells = [f"{size:,} tokens", ratio, refit]
        for kind in ("question", "needle"):
            row = next(r for r in rows if (r["exchange"], r["ratio"], r["refit"], r["kind"]) == (size, ratio, refit, kind))
            cells += [f"{row['at_once']:.4f}", f"{row['grown']:.4f}", row["grown / at_once"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def verbatim() -> str:
    rows = json.loads((RESULTS / "verbatim.json").read_text())["table"]
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    lines = [
        "| | " + " | ".join(f"{refit} {ratio}" for ratio in ratios for refit in ("none", "ridge")) + " |",
        "|---" * (2 * len(ratios) + 1) + "|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for ratio in ratios:
            row = next(r for r in rows if (r["kind"], r["ratio"]) == (kind, ratio))
            cells += [f"{row[f'{refit} kl']:.4f} / {row[f'{refit} same answer']:.2f}" for refit in ("none", "ridge")]
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines)


def build() -> str:
    head = [
        "method",
        "tokens",
        "prefill s",
        "build s",
        "build / prefill",
        "peak over the model / dense cache",
        "peak / (weights + dense cache)",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in json.loads((RESULTS / "build.json").read_text())["table"]:
        cells = [row["method"], f"{row['tokens']:,}", row["prefill_s"], row["build_s"], row["ratio"]]
        cells += [row.get("peak_over_dense", ""), row.get("peak_over_weights_and_dense", "")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def decode() -> str:
    ratios = ("1.0", "0.5", "0.3", "0.1")
    head = ["tokens", "DynamicCache", "ours 1.0", *ratios[1:], "DynamicCache / ours 1.0", *ratios[1:], "whole step at 0.3"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in json.loads((RESULTS / "decode.json").read_text())["table"]:
        ms = [row["dense_context_ms"], *(row["context_ms"][ratio] for ratio in ratios)]
        cells = [f"{row['tokens']:,}", *(f"{x} ms" for x in ms), *(row["context_cost_ratio"][ratio] for ratio in ratios)]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['step_ratio']['0.3']}x"])) + " |")
    return "\n".join(lines)


def agents() -> str:
    row = json.loads((RESULTS / "agents.json").read_text())
    return "\n".join(
        [
            "| | tokens a second |",
            "|---|---|",
            f"| one agent | {row['one_agent_tokens_per_s']} |",
            f"| 8 agents, one context | {row['eight_agents_tokens_per_s']} ({row['eight_over_one']} times one) |",
            f"| transformers, 8 dense caches | {row['dense_batch_of_8_tokens_per_s']} (ours: {row['eight_over_dense']} times) |",
        ]
    )


def speculation() -> str:
    result = json.loads((RESULTS / "speculation.json").read_text())
    lines = ["| questions | answers | identical | speed, all | median | best | worst | worst of plain against plain |", "|---" * 8 + "|"]
    for kind in ("quoting", "free"):
        cells = [result[kind][field] for field in ("answers", "identical", "speedup", "median", "best", "worst", "worst_of_two_plain")]
        lines.append("| " + " | ".join(map(str, [kind, *cells])) + " |")
    return "\n".join(lines)


RUNNING = {"device": "device_ms", "a file that is not in the page cache": "disk_ms"}


def registry() -> str:
    result = json.loads((RESULTS / "registry.json").read_text())
    table = result["table"]
    lines = ["| first token from | " + " | ".join(f"{row['tokens']:,} tokens" for row in table) + " |", "|---" * 3 + "|"]
    tiers = ("device", "host", "disk", "built")
    lines += [f"| {tier} | " + " | ".join(f"{row[f'{tier}_s']} s" for row in table) + " |" for tier in tiers]
    running = [row["running"] for row in table]
    lines += ["", "| running engine, first token from | " + lines[0].split(" | ", 1)[1], "|---" * 3 + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[field]} ms" for row in running) + " |" for name, field in RUNNING.items()]
    lines += ["", "| reading back | plain read + xxh3 | ours | speed of plain | verification |", "|---" * 5 + "|"]
    for row in table:
        for state in ("cold", "warm"):
            r = row[state]
            cells = [f"{row['tokens']:,} tokens, {state}", f"{r['plain_ms']} ms", f"{r['ours_ms']} ms"]
            lines.append("| " + " | ".join(map(str, [*cells, r["speed_of_plain"], r["verification"]])) + " |")
    return "\n".join([*lines, "", str(result["small"])])


def guidance() -> str:
    result = json.loads((RESULTS / "guidance.json").read_text())
    lines = [
        "| library | vocabulary | schemas compiled | valid value refused | compile ms median / p99 | mask ms median / p99 |",
        "|---" * 6 + "|",
    ]
    for row in result["table"]:
        ms = [f"{row[field]['median']} / {row[field]['p99']}" if row[field] else "" for field in ("compile_ms", "mask_ms")]
        compiled = f"{row['schemas'] - row['not_compiled']} of {row['schemas']}"
        cells = [f"{row['library']} {row['version']}", f"{row['vocabulary']:,}", compiled, str(row["refused_a_valid_value"]), *ms]
        lines.append("| " + " | ".join(cells) + " |")
    for library, found in result["coverage"].items():
        others = {keyword: how for keyword, how in found.items() if how != "kept"}
        lines.append(f"\n{library}: {len(found) - len(others)} of {len(found)} keywords kept; {others or 'none else'}")
    return "\n".join([*lines, "", str(result["whole_cost"])])


def standard_suites() -> str:
    result = json.loads((RESULTS / "standard_suites.json").read_text())
    lines = ["| | unit: passed | failed | skipped | integration: passed | failed | skipped |", "|---" * 7 + "|"]
    for row in result["table"]:
        counts = [row[suite].get(outcome, 0) for suite in ("unit", "integration") for outcome in ("passed", "failed", "skipped")]
        lines.append("| " + " | ".join(map(str, [row["model"], *counts])) + " |")
    return "\n".join([*lines, "", str(result["versions"])])


def memory() -> str:
    result = json.loads((RESULTS / "memory.json").read_text())
    lines = ["| sent | KL | top-1 | same answer | right | of those the full history gets right | tokens read |", "|---" * 7 + "|"]
    for row in result["recall"]:
        share = f"{100 * row['of_full_right']:.0f} %"
        cells = [row["method"], row["kl"], row["top1"], row["same_answer"], row["right"], share, row["tokens_behind_context"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"the full history: {result['recall'][0]['full_right']} right", ""]
    lines += ["| against one fold | KL | top-1 | same answer |", "|---" * 4 + "|"]
    for row in result["against_one_fold"]:
        lines.append(f"| {row['method']} | {row['kl']} | {row['top1']} | {row['same_answer']} |")
    turns = result["turns"]
    lines += ["", "| turn | calls | prompts | read | folded |", "|---" * 5 + "|"]
    shown = [row for row in turns if row["turn"] in (1, 2) or row["turn"] % 5 == 0]
    lines += [f"| {row['turn']} | {row['calls']} | {row['prompts']:,} | {row['read']:,} | {row['folded'] or ''} |" for row in shown]
    sums = {name: sum(row[name] for row in turns) for name in ("calls", "prompts", "read", "folded")}
    lines.append(f"| all | {sums['calls']} | {sums['prompts']:,} | {sums['read']:,} | {sums['folded']:,} |")
    return "\n".join([*lines, "", f"most read in a turn: {max(row['read'] for row in turns):,}"])


def llm_contract() -> str:
    result = json.loads((RESULTS / "llm_contract.json").read_text())
    names = [name for name in result["table"][0] if name != "contract"]
    lines = ["| contract | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in result["table"]:
        contract = row["contract"].removeprefix("test_").replace("_", " ")
        lines.append(f"| {contract} | " + " | ".join(row[name] for name in names) + " |")
    counts = [sum(row[name] == "passed" for row in result["table"]) for name in names]
    lines.append("| **passed** | " + " | ".join(f"**{count} of {len(result['table'])}**" for count in counts) + " |")
    return "\n".join([*lines, "", f"ticks of 50 ms during an answer: {result['loop']}", str(result["versions"])])


def indexes() -> str:
    result = json.loads((RESULTS / "indexes.json").read_text())
    path = RESULTS / "indexes_seconds.json"
    timed = {(row["corpus"], row["method"]): row for row in json.loads(path.read_text())["table"]} if path.exists() else {}
    lines = [
        "| | index | read once | calls a question | read a question | contains | F1 | KL | build s | question s |",
        "|---" * 10 + "|",
    ]
    for row in result["table"]:
        contains = f"{row['contains']} of {row['questions']}"
        kl = "" if row["kl"] is None else row["kl"]
        seconds = timed.get((row["corpus"], row["method"]), {"build_s": "", "question_s": ""})
        cells = [row["corpus"], row["method"], f"{row['read_once']:,}", row["calls"], f"{row['read']:,}", contains, row["f1"], kl]
        lines.append("| " + " | ".join(map(str, [*cells, seconds["build_s"], seconds["question_s"]])) + " |")
    return "\n".join([*lines, "", str(result["versions"])])


def memory_block() -> str:
    result = json.loads((RESULTS / "memory_block.json").read_text())
    lines = [
        "| block | KL | top-1 | same answer | right | of those the full history gets right | tokens read | calls of the block |",
        "|---" * 8 + "|",
    ]
    for row in result["table"]:
        share = f"{100 * row['of_full_right']:.0f} %"
        cells = [row["method"], row["kl"], row["top1"], row["same_answer"], row["right"], share]
        lines.append("| " + " | ".join(map(str, [*cells, row["tokens_behind_context"], row["calls_of_block"]])) + " |")
    facts = f"{result['tokens']:,} tokens, limit {result['token_limit']}; the full history: {result['table'][0]['full_right']} right"
    return "\n".join([*lines, "", facts, str(result["versions"])])


def aiming() -> str:
    result = json.loads((RESULTS / "aiming.json").read_text())
    lines = ["| contexts | questions about | questions | asked of one | of them wrong | by words alone | of them wrong |", "|---" * 7 + "|"]
    for row in result["table"]:
        share = {method: f"{100 * row[f'{method}_one'] / row['questions']:.0f} %" for method in ("ours", "words")}
        cells = [row["contexts"], row["questions_about"], row["questions"]]
        lines.append("| " + " | ".join(map(str, [*cells, share["ours"], row["ours_wrong"], share["words"], row["words_wrong"]])) + " |")
    return "\n".join(lines)


def sources() -> str:
    result = json.loads((RESULTS / "sources.json").read_text())
    lines = ["| ranked by | first | among the first three | where the answer is right |", "|---" * 4 + "|"]
    for row in result["table"]:
        cells = [f"{100 * row[field]:.1f} %" for field in ("top_1", "top_3", "top_3_where_the_answer_is_right")]
        lines.append("| " + " | ".join([row["ranked by"], *cells]) + " |")
    counts = ("questions", "windows", "passages", "three_at_random", "answers_right")
    return "\n".join([*lines, "", str({name: result[name] for name in counts})])


def greed() -> str:
    head = ["limit", "of", "at most", "given", "error", "s", "MB", "reading s", "reading MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in json.loads((RESULTS / "greed.json").read_text())["table"]:
        limit = f"{row['most']:,}" if row["most"] else ""
        cells = [
            row["limit"],
            row["of"],
            limit,
            f"{row['given']:,}",
            row["error"],
            row["s"],
            row["mb"],
            row["reading_s"],
            row["reading_mb"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in [path.stem for path in sorted(RESULTS.glob("fidelity*.json"))]:
        print(f"{name}\n\n{fidelity(name)}\n")
    tables = (
        growing,
        verbatim,
        build,
        decode,
        agents,
        speculation,
        registry,
        guidance,
        standard_suites,
        memory,
        llm_contract,
        indexes,
        aiming,
        memory_block,
        sources,
        greed,
    )
    for table in tables:
        if (RESULTS / f"{table.__name__}.json").exists():
            print(f"{table.__name__}\n\n{table()}\n")
