"""A chain over a handbook: read once, asked in one batch; the next process starts from disk.

python examples/chain.py [--cache-dir FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo import HERE, demo_model
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from langchain_kvzip import KVzipChatModel


def main(model: str | Path, cache_dir: str | None = None, characters: int | None = None) -> list[str]:
    """Answers to the handbook's questions. ``characters``: read only so much of it."""
    llm = KVzipChatModel(model=str(model), ratio=0.5, cache_dir=cache_dir, max_tokens=24)
    text = (HERE / "handbook.md").read_text()[:characters]
    handbook = llm.load_documents(Document(text, metadata={"source": "handbook.md"}), name="handbook")
    print(f"{handbook!r} from {handbook.receipt.tier}")

    prompt = ChatPromptTemplate.from_messages([("system", [handbook.as_block()]), ("human", "{question}")])
    chain = prompt | llm | StrOutputParser()
    questions = [asked["question"] for asked in json.loads((HERE / "questions.json").read_text())][:4]
    answers = chain.batch([{"question": question} for question in questions])  # decoded together
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n    {answer.strip()}")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache-dir")
    main(demo_model(), parser.parse_args().cache_dir)
