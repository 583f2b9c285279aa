"""Three readers of one document at once, each streaming, on one event loop.

python examples/async_streaming.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from demo import demo_model
from langchain_core.documents import Document
from structured_output import NOTICE

from langchain_kvzip import KVzipChatModel

QUESTIONS = ["Who winds the lamp?", "What did the storm break?", "When does the supply boat come?"]


async def main(model: str | Path) -> list[str]:
    llm = KVzipChatModel(model=str(model), max_tokens=24)
    notice = await llm.aload_documents(Document(NOTICE * 3), name="notice")
    reader = llm.with_context(notice)

    async def ask(number: int, question: str) -> str:
        answer = ""
        async for chunk in reader.astream(question):
            answer += chunk.text
            print(f"[{number}] {chunk.text!r}")
        return answer

    return await asyncio.gather(*(ask(number, question) for number, question in enumerate(QUESTIONS)))


if __name__ == "__main__":
    for answer in asyncio.run(main(demo_model())):
        print(answer.strip())
