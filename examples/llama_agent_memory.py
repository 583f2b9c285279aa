"""An agent whose old turns go, word for word, into a compressed context. Run it twice: it goes on.

python examples/llama_agent_memory.py --cache-dir FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo import HERE, demo_model
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import Memory

from llama_index_kvzip import KVzipLLM, KVzipMemoryBlock

SECTIONS = (HERE / "handbook.md").read_text().split("\n## ")[1:]
DIALOGUE = [
    "Please look up section 4 for me.",
    "My sister's name is Nadia.",
    "Please look up section 6 for me.",
    "Thank you.",
    "What is my sister's name?",
]


def look_up(section: int) -> str:
    """Read the beginning of a section of the keeper's handbook."""
    return SECTIONS[section % len(SECTIONS)][:600]


async def main(llm: KVzipLLM, folder: Path, dialogue: Sequence[str] = DIALOGUE) -> list[dict[str, Any]]:
    """One row a turn: what was answered, how many tokens the model saw and how many it had to read."""
    block = KVzipMemoryBlock(llm=llm)
    memory = Memory.from_defaults(
        session_id="ana",
        token_limit=400,
        token_flush_size=200,
        tokenizer_fn=llm.engine.tokenizer.tokenize,
        memory_blocks=[block],
        async_database_uri=f"sqlite+aiosqlite:///{folder / 'agent.db'}",
    )
    print(f"messages so far: {len(await memory.aget_all())}")
    prompt = "You are a lighthouse keeper's assistant. Answer in one short sentence."
    talker = FunctionAgent(llm=llm, tools=[], system_prompt=prompt)
    # A model of 135M parameters cannot tell when to call a tool; with yours one agent will do.
    reader = FunctionAgent(llm=llm, tools=[look_up], initial_tool_choice="look_up", system_prompt=prompt)
    rows = []
    for text in dialogue:
        answer = await (reader if "look up" in text else talker).run(text, memory=memory)
        usage, context = answer.raw["usage"], block.context("ana")
        row = {
            "reply": str(answer),
            "seen": usage["prompt_tokens"],
            "read": usage["prompt_tokens"] - usage["cached_tokens"],
            "folded": context.n_tokens if context else 0,
        }
        print(f"{text}\n    {row['reply'].strip()}\n    saw {row['seen']} tokens, read {row['read']}; {row['folded']} are compressed")
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", default=tempfile.gettempdir() + "/kvzip-llama-agent")
    folder = Path(parser.parse_args().cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(KVzipLLM(model=str(demo_model()), cache_dir=str(folder), ratio=0.5, max_tokens=32), folder))
