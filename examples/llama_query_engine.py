"""A query engine over a folder: its files are read once and whole, and every answer shows its sources.

python examples/llama_query_engine.py [--folder FOLDER] [--cache-dir FOLDER] [--question QUESTION]...
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo import HERE, demo_model
from llama_index.core import SimpleDirectoryReader
from llama_index.core.base.response.schema import RESPONSE_TYPE

from llama_index_kvzip import KVzipIndex, KVzipLLM

QUESTIONS = ["What is the telephone number of head office?", "What is the code word for a ship in danger?"]


def write_sections(folder: Path, count: int | None = None) -> Path:
    """The handbook's first sections, a file each."""
    for section in (HERE / "handbook.md").read_text().split("\n## ")[1:][:count]:
        title = section.splitlines()[0].split(". ", 1)[-1]
        (folder / f"{title}.md").write_text(section)
    return folder


def main(llm: KVzipLLM, folder: Path, questions: Sequence[str] = QUESTIONS) -> list[RESPONSE_TYPE]:
    """The answers to questions about the files of a folder."""
    index = KVzipIndex.from_documents(SimpleDirectoryReader(folder, filename_as_id=True).load_data(), llm=llm)
    for part in index.parts():
        print(f"{part.context!r} from {part.context.receipt.tier}: {len(part.nodes)} documents")
    query_engine = index.as_query_engine()
    answers = []
    for question in questions:
        answer = query_engine.query(question)
        answers.append(answer)
        print(f"{question}\n    {str(answer).strip()}")
        print(f"    from {', '.join(node.metadata['file_name'] for node in answer.source_nodes)}")
        print(f"    {answer.metadata['usage']}")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cache-dir")
    parser.add_argument("--question", action="append")
    args = parser.parse_args()
    llm = KVzipLLM(model=str(demo_model()), ratio=0.5, cache_dir=args.cache_dir, max_tokens=24)
    with tempfile.TemporaryDirectory() as folder:
        main(llm, args.folder or write_sections(Path(folder)), args.question or QUESTIONS)
