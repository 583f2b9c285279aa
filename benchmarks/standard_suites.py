"""LangChain's standard tests for chat models, on our model and on ``ChatHuggingFace``: the same weights, the same switches.

python benchmarks/standard_suites.py     with langchain-huggingface installed (a venv of its own, see docs/benchmarks.md)
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from langchain_tests.unit_tests import ChatModelUnitTests
from transformers import pipeline

from common import Outcomes, save

sys.path += [str(Path(__file__).parent.parent / "tests" / room) for room in ("", "integrations")]
from test_langchain_standard import TestIntegration, TestIntegrationWithContext, TestUnit

ROWS = {  # what the table says, and the classes run for it
    "KVzipChatModel": (TestUnit, TestIntegration),
    "KVzipChatModel, a context attached": (TestUnit, TestIntegrationWithContext),
}


def peer(engine: Any, **options: Any) -> dict[str, Any]:
    """Arguments of ChatHuggingFace over the engine's model, as its documentation makes one."""
    options["return_full_text"] = False
    generator = pipeline("text-generation", model=engine.model, tokenizer=engine.tokenizer, **options)
    return {"llm": HuggingFacePipeline(pipeline=generator, pipeline_kwargs=options), "tokenizer": engine.tokenizer, "model_id": "SmolLM2"}


class TestPeerUnit(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _share_the_engine(self, smollm2: Any) -> None:
        type(self).engine = smollm2  # type: ignore[attr-defined]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatHuggingFace

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return peer(self.engine)  # type: ignore[attr-defined]


class TestPeer(TestIntegration):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatHuggingFace

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return peer(self.engine, max_new_tokens=self.options.get("max_tokens", 120), do_sample=False)  # type: ignore[attr-defined]

    def small(self) -> BaseChatModel:
        return ChatHuggingFace(**peer(self.engine, max_new_tokens=3))  # type: ignore[attr-defined]


ROWS["ChatHuggingFace"] = (TestPeerUnit, TestPeer)


def main() -> None:
    found = Outcomes()
    pytest.main(
        [__file__, "-p", "conftest", "-q", "--tb=no", "-p", "no:cacheprovider"],
        plugins=[found],
    )
    table = []
    for model, (unit, integration) in ROWS.items():
        outcomes = [found.of[cls.__name__] for cls in (unit, integration)]
        table.append(
            {
                "model": model,
                "unit": Counter(outcomes[0].values()),
                "integration": Counter(outcomes[1].values()),
                "failed": [test for part in outcomes for test, outcome in part.items() if outcome == "failed"],
                "skipped": [test for part in outcomes for test, outcome in part.items() if outcome == "skipped"],
            }
        )
    versions = {name: importlib.metadata.version(name) for name in ("langchain-tests", "langchain-core", "langchain-huggingface")}
    save("standard_suites", {"versions": versions, "table": table})


if __name__ == "__main__":
    main()
