"""The contract of LlamaIndex LLMs (tests/llama_index_contract.py) on KVzipLLM and on HuggingFaceLLM, over the same SmolLM2.

python benchmarks/llm_contract.py     with llama-index-llms-huggingface installed (a venv of its own, see docs/benchmarks.md)
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.llms import LLM, ChatMessage
from llama_index.llms.huggingface import HuggingFaceLLM

from common import Outcomes, save, smollm2
from kvzip_memory import KVzipEngine
from llama_index_kvzip import KVzipLLM

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from llama_index_contract import LLMContract

ENGINE = KVzipEngine.from_pretrained(smollm2(), progress=False)


class OnSmolLM2(LLMContract):
    @pytest.fixture
    def weights(self) -> tuple[Any, Any]:
        return ENGINE.model, ENGINE.tokenizer


class TestKVzipLLM(OnSmolLM2):
    def make(self, model: Any, tokenizer: Any, max_tokens: int) -> LLM:
        return KVzipLLM(engine=ENGINE, max_tokens=max_tokens)


class TestHuggingFaceLLM(OnSmolLM2):
    def make(self, model: Any, tokenizer: Any, max_tokens: int) -> LLM:
        window = model.config.max_position_embeddings
        greedy = {"do_sample": False}
        return HuggingFaceLLM(
            model=model, tokenizer=tokenizer, context_window=window, max_new_tokens=max_tokens, is_chat_model=True, generate_kwargs=greedy
        )


async def answer(cls: type[LLMContract], max_tokens: int) -> dict[str, Any]:
    """Seconds of a long answer, and ticks of a 50 ms timer in them."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.05)
            ticks += 1

    llm = cls().make(ENGINE.model, ENGINE.tokenizer, max_tokens)
    task, began = asyncio.create_task(tick()), time.perf_counter()
    await asyncio.sleep(0)
    await llm.achat([ChatMessage("Tell me a long story about a lighthouse.")])
    task.cancel()
    return {"seconds": round(time.perf_counter() - began, 1), "ticks": ticks}


def main() -> None:
    found = Outcomes()
    pytest.main([__file__, "-q", "--tb=line", "-p", "no:cacheprovider"], plugins=[found])
    classes = {"KVzipLLM": TestKVzipLLM, "HuggingFaceLLM": TestHuggingFaceLLM}
    outcomes = {name: found.of[cls.__name__] for name, cls in classes.items()}
    table = [{"contract": test, **{name: of[test] for name, of in outcomes.items()}} for test in outcomes["KVzipLLM"]]
    loop = {name: asyncio.run(answer(cls, 160)) for name, cls in classes.items()}
    versions = {name: importlib.metadata.version(name) for name in ("llama-index-core", "llama-index-llms-huggingface")}
    save("llm_contract", {"versions": versions, "table": table, "loop": loop})


if __name__ == "__main__":
    main()
