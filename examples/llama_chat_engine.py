"""A conversation over a handbook: the history is kept, answers stream, and no turn reads the handbook again.

python examples/llama_chat_engine.py [--cache-dir FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from demo import HERE, demo_model
from llama_index.core import Document

from llama_index_kvzip import KVzipIndex, KVzipLLM
from llama_index_kvzip.chat_engine import KVzipChatEngine

MESSAGES = [
    "In which year was the company founded?",
    "Thank you. What is the telephone number of head office?",
    "And what is the staff newspaper called?",
]


def main(llm: KVzipLLM, messages: Sequence[str] = MESSAGES, characters: int | None = None) -> KVzipChatEngine:
    """The chat engine after a conversation. ``characters``: read only so much of the handbook."""
    handbook = Document(text=(HERE / "handbook.md").read_text()[:characters], doc_id="handbook.md")
    chat_engine = KVzipIndex.from_documents([handbook], llm=llm).as_chat_engine()
    for message in messages:
        print(f"> {message}")
        answer = chat_engine.stream_chat(message)
        for piece in answer.response_gen:
            print(piece, end="", flush=True)
        print(f"\n    from {', '.join(str(node.node.ref_doc_id) for node in answer.source_nodes)}")
    return chat_engine


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir")
    main(KVzipLLM(model=str(demo_model()), ratio=0.5, cache_dir=parser.parse_args().cache_dir, max_tokens=32))
