"""An agent that never forgets and never summarises: tools, memory, and a SQLite checkpointer. Run it twice: it goes on.

python examples/agent_memory.py --cache-dir FOLDER
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo import HERE, demo_model
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, wrap_model_call
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver

from langchain_kvzip import KVzipChatModel, KVzipMemoryMiddleware

SECTIONS = (HERE / "handbook.md").read_text().split("\n## ")[1:]
DIALOGUE = [
    "Please look up section 4 for me.",
    "My sister's name is Nadia.",
    "Please look up section 6 for me.",
    "Thank you.",
    "What is my sister's name?",
]


@tool
def look_up(section: int) -> str:
    """Read the beginning of a section of the keeper's handbook."""
    return SECTIONS[section % len(SECTIONS)][:600]


@wrap_model_call
def choose(request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
    """A model of 135M parameters cannot tell when to call a tool; yours can, leave this out."""
    last = request.messages[-1]
    return handler(request.override(tool_choice="look_up" if last.type == "human" and "look up" in last.text else "none"))


def main(llm: KVzipChatModel, folder: Path, dialogue: Sequence[str] = DIALOGUE) -> list[dict[str, Any]]:
    """One row a turn: what was answered, how many tokens the model saw and how many it had to read."""
    memory = KVzipMemoryMiddleware(trigger=("tokens", 400), keep=("messages", 4))
    rows = []
    with sqlite3.connect(folder / "agent.db", check_same_thread=False) as database:
        agent = create_agent(
            llm,
            tools=[look_up],
            system_prompt="You are a lighthouse keeper's assistant. Answer in one short sentence.",
            middleware=[choose, memory],
            checkpointer=SqliteSaver(database),
        )
        thread: Any = {"configurable": {"thread_id": "ana"}}
        print(f"messages so far: {len(agent.get_state(thread).values.get('messages', []))}")
        for text in dialogue:
            reply = agent.invoke({"messages": [("user", text)]}, thread)["messages"][-1]
            usage, folded = reply.usage_metadata, agent.get_state(thread).values.get("kvzip_memory")
            row = {
                "reply": reply.text,
                "seen": usage["input_tokens"],
                "read": usage["input_tokens"] - usage["input_token_details"]["cache_read"],
                "folded": folded["messages"] if folded else 0,
            }
            print(f"{text}\n    {row['reply'].strip()}\n    saw {row['seen']} tokens, read {row['read']}; {row['folded']} messages folded")
            rows.append(row)
    llm.engine.close()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache-dir", default=tempfile.gettempdir() + "/kvzip-agent")
    folder = Path(parser.parse_args().cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    main(KVzipChatModel(model=str(demo_model()), cache_dir=str(folder), ratio=0.5, max_tokens=32), folder)
